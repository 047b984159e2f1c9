"""What Graph checks of a send call before anything else: its JSON (whatsapp-cloud-api.md §9, §11).

Pure functions from the decoded body to the first error found, or None.
"""

import re
from collections.abc import Callable
from typing import Any

from sandbox.graph_errors import GraphError, refusal
from sandbox.meta import JSON, MEDIA_TYPES

MAX_TEXT = 4096
MAX_CAPTION = 1024
MAX_CALLBACK = 512
BSUID = re.compile(r"[A-Z]{2}\.(ENT\.)?[A-Za-z0-9]{1,128}")
_PHONE = re.compile(r"\+[0-9]{5,20}")


def is_read(body: JSON) -> bool:
    """Whether it marks a message as read instead of sending one."""
    return "status" in body


def wrong_envelope(body: object) -> GraphError | None:
    if not isinstance(body, dict):
        return refusal(100, "The body is not a JSON object")
    if "messaging_product" not in body:
        return refusal(100, title="The parameter messaging_product is required.")
    if body["messaging_product"] != "whatsapp":
        return refusal(100, title="Param messaging_product must be one of {WHATSAPP}")
    return None


def wrong_read(body: JSON) -> GraphError | None:
    if body["status"] != "read":
        return refusal(100, title="Param status must be one of {READ}")
    if _no_text(body.get("message_id")):
        return _missing("message_id")
    indicator = body.get("typing_indicator")
    if indicator is not None and indicator != {"type": "text"}:
        return _invalid("typing_indicator")
    return None


def wrong_message(body: JSON) -> GraphError | None:
    type_ = body.get("type", "text")
    if not isinstance(type_, str) or type_ not in _CHECKS:
        return refusal(100, title=f"Param type must be one of {{{', '.join(_CHECKS).upper()}}}")
    if body.get("recipient_type", "individual") != "individual":
        return refusal(100, title="Param recipient_type must be one of {INDIVIDUAL}")
    return _wrong_recipient(body) or _wrong_extras(body) or _wrong_content(type_, body)


def _wrong_recipient(body: JSON) -> GraphError | None:
    to, recipient = body.get("to"), body.get("recipient")
    if to is None and recipient is None:
        return _missing("to")
    if to is not None:
        # Without a plus Meta may prepend the business number's own country code (§9), which nobody wants.
        good = isinstance(to, str) and (_PHONE.fullmatch(to) or BSUID.fullmatch(to))
        return None if good else _invalid("to")
    return None if isinstance(recipient, str) and BSUID.fullmatch(recipient) else _invalid("recipient")


def _wrong_extras(body: JSON) -> GraphError | None:
    callback = body.get("biz_opaque_callback_data")
    if callback is not None and (not isinstance(callback, str) or len(callback) > MAX_CALLBACK):
        return refusal(100, title=f"Param biz_opaque_callback_data must be at most {MAX_CALLBACK} characters long.")
    context = body.get("context")
    if context is not None and (not isinstance(context, dict) or _no_text(context.get("message_id"))):
        return _invalid("context")
    return None


def _wrong_content(type_: str, body: JSON) -> GraphError | None:
    content = body.get(type_)
    if content is None:
        return _missing(type_)
    if not isinstance(content, list if type_ == "contacts" else dict):
        return refusal(100, title=f"Param {type_} must be a JSON {'array' if type_ == 'contacts' else 'object'}.")
    return _CHECKS[type_](content, type_)


def _text(content: JSON, name: str) -> GraphError | None:
    body: Any = content.get("body")
    if _no_text(body):
        return _missing("text['body']")
    if len(body) > MAX_TEXT:
        return refusal(100, title=f"Param text['body'] must be at most {MAX_TEXT} characters long.")
    return None


def _media(content: JSON, name: str) -> GraphError | None:
    given = [key for key in ("id", "link") if content.get(key) is not None]
    if not given:
        return _missing(f"{name}['id'] or {name}['link']")
    if len(given) == 2 or _no_text(content[given[0]]):
        return _invalid(f"{name}['id'] or {name}['link']")
    caption = content.get("caption")
    if caption is not None and (not isinstance(caption, str) or len(caption) > MAX_CAPTION):
        return refusal(100, title=f"Param {name}['caption'] must be at most {MAX_CAPTION} characters long.")
    return None


def _location(content: JSON, name: str) -> GraphError | None:
    for key, most in (("latitude", 90), ("longitude", 180)):
        try:
            value = float(content[key])  # strings of digits are taken too
        except KeyError:
            return _missing(f"location['{key}']")
        except (TypeError, ValueError):
            return _invalid(f"location['{key}']")
        if not -most <= value <= most:
            return _invalid(f"location['{key}']")
    return None


def _contacts(content: list[Any], name: str) -> GraphError | None:
    if not content or len(content) > 257:
        return _invalid("contacts")
    for one in content:
        its_name = one.get("name") if isinstance(one, dict) else None
        if not isinstance(its_name, dict) or _no_text(its_name.get("formatted_name")):
            return _missing("contacts[]['name']['formatted_name']")
    return None


def _reaction(content: JSON, name: str) -> GraphError | None:
    if _no_text(content.get("message_id")):
        return _missing("reaction['message_id']")
    return None if isinstance(content.get("emoji"), str) else _missing("reaction['emoji']")


def _interactive(content: JSON, name: str) -> GraphError | None:
    if _no_text(content.get("type")):
        return _missing("interactive['type']")
    return None if isinstance(content.get("action"), dict) else _missing("interactive['action']")


def _template(content: JSON, name: str) -> GraphError | None:
    if _no_text(content.get("name")):
        return _missing("template['name']")
    language = content.get("language")
    if not isinstance(language, dict) or _no_text(language.get("code")):
        return _missing("template['language']['code']")
    components = content.get("components", [])
    return None if isinstance(components, list) else _invalid("template['components']")


_CHECKS: dict[str, Callable[[Any, str], GraphError | None]] = {
    "text": _text,
    **dict.fromkeys(MEDIA_TYPES, _media),
    "location": _location,
    "contacts": _contacts,
    "reaction": _reaction,
    "interactive": _interactive,
    "template": _template,
}


def _no_text(value: object) -> bool:
    return not isinstance(value, str) or not value


def _missing(name: str) -> GraphError:
    return refusal(131008, f"The parameter {name} is missing")


def _invalid(name: str) -> GraphError:
    return refusal(131009, f"The value of the parameter {name} is not valid")
