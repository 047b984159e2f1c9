"""What Meta puts on the wire: webhook bodies as plain dicts, their bytes and their signature.

Everything here is pure. The section signs refer to whatsapp-cloud-api.md. A *customer* (`from_`, `to`, `recipient`) is
written as a phone number (digits only) or as a BSUID (`BR.…`); the latter leaves the phone out, as Meta does for people
who hide it (§5). Times (`at`) are unix seconds.
"""

import base64
import hashlib
import hmac
import json
import math
import re
from collections.abc import Iterable
from random import Random
from typing import Any, NamedTuple
from urllib.parse import urlencode
from zlib import crc32

from sandbox import files

JSON = dict[str, Any]

MEDIA_TYPES = ("image", "video", "audio", "document", "sticker")
STATUSES = ("sent", "delivered", "read", "played", "failed")
"""The documented statuses in rising order; `failed` ends an attempt, so nothing follows it (§7)."""

NUMBER_FIELDS = frozenset(
    {
        "messages",
        "smb_message_echoes",
        "smb_app_state_sync",
        "history",
        "calls",
        "user_preferences",
        "user_id_update",
        "group_lifecycle_update",
        "group_participants_update",
        "group_settings_update",
        "group_status_update",
    }
)
"""Fields that name the business number in `metadata`; all others concern the whole WABA and carry none (§3, §8)."""

_QUOTED = "wamid.HBgNNTUxMTk0NDQ0MDAwMRUCABEYEjAwMDAwMDAwMDAwMDAwMDAwMAA="
_BSUID = re.compile(r"[A-Z]{2}\.(ENT\.)?[A-Za-z0-9]{1,128}")


class Number(NamedTuple):
    """A business number: the ids by which webhooks are routed, and the number people see."""

    phone_number_id: str
    waba_id: str
    display_phone_number: str = "5511955550100"


class MediaHost(NamedTuple):
    """Where files that customers send can be had.

    address  what the path of a URL is put behind
    seconds  for which a URL in a webhook is good, from its message on (§12); 0: it has run out already
    bytes    the size of each file; without one it is small
    """

    address: str = "https://lookaside.fbsbx.com"
    seconds: int = 300
    bytes: int | None = None


LOOKASIDE = MediaHost()
ATTACHMENTS = "/whatsapp_business/attachments/"


# Bytes and signature


def encode(body: Any) -> bytes:
    """JSON as Meta writes it (§2): no spaces, non-ASCII as lowercase \\uXXXX, every `/` as `\\/`."""
    return json.dumps(body, separators=(",", ":")).replace("/", r"\/").encode()


def sign(raw: bytes, secret: str) -> str:
    """The value of `X-Hub-Signature-256` for these bytes (§2)."""
    return "sha256=" + hmac.new(secret.encode(), raw, hashlib.sha256).hexdigest()


def sign_sha1(raw: bytes, secret: str) -> str:
    """The value of the legacy `X-Hub-Signature`, which proves nothing today (§2)."""
    return "sha1=" + hmac.new(secret.encode(), raw, "sha1").hexdigest()


# Ids


def new_wamid(rng: Random, customer: str, *, outgoing: bool = False) -> str:
    """A message id that looks like Meta's: `wamid.` and base64 around the customer's address and some hex digits."""
    size = 18 if outgoing else 20
    unique = f"{rng.getrandbits(size * 4):0{size}X}".encode()
    who = customer.encode()
    direction = b"\x11" if outgoing else b"\x12"
    packed = (
        b"\x1c\x18" + bytes([len(who)]) + who + b"\x15\x02\x00" + direction + b"\x18" + bytes([size]) + unique + b"\0"
    )
    return "wamid." + base64.b64encode(packed).decode()


def user_id(customer: str) -> str:
    """The BSUID of a customer (§5), the same each time; a BSUID is its own."""
    if _BSUID.fullmatch(customer):
        return customer
    digest = hashlib.sha256(customer.encode()).digest()
    return f"BR.{int.from_bytes(digest[:7]):017d}"


def _identity(customer: str, phone_key: str, user_key: str) -> JSON:
    bsuid = user_id(customer)
    return {user_key: bsuid} if customer == bsuid else {phone_key: customer, user_key: bsuid}


# Elements of `messages` (§6, §7)


def contact(customer: str, name: str | None = None) -> JSON:
    """An element of `value.contacts[]`; without a name it has no `profile`, as beside statuses (§7)."""
    profile = {"profile": {"name": name}} if name is not None else {}
    return profile | _identity(customer, "wa_id", "user_id")


def text_message(wamid: str, from_: str, body: str, at: int) -> JSON:
    """An incoming text, an element of `value.messages[]`."""
    return message("text", wamid, from_, at, {"body": body})


def message(
    type: str,
    wamid: str,
    from_: str,
    at: int,
    content: Any = None,
    *,
    variant: int = 0,
    media_host: MediaHost = LOOKASIDE,
    **extra: Any,
) -> JSON:
    """An incoming message of any type, an element of `value.messages[]` (§6).

    `content` is the object under the key named like the type; without it a realistic example is taken, and `variant`
    chooses (modulo their number) which. `extra` are further keys of the message: `context`, `referral`, `group_id`, …
    Raises ValueError for a type that has no example when no content is given.
    """
    if content is not None:
        parts = {type: content}
    else:
        choices = examples(type, wamid, at, media_host)
        parts = choices[variant % len(choices)]
    head = {**_identity(from_, "from", "from_user_id"), "id": wamid, "timestamp": str(at), "type": type}
    return head | parts | extra


def echo(wamid: str, number: Number, to: str, body: str, at: int) -> JSON:
    """A text the business wrote in its phone app, an element of `value.message_echoes[]` (§8)."""
    head = {"from": number.display_phone_number, **_identity(to, "to", "to_user_id")}
    return head | {"id": wamid, "timestamp": str(at), "type": "text", "text": {"body": body}}


def status(wamid: str, status: str, at: int, recipient: str, **extra: Any) -> JSON:
    """What became of an outgoing message, an element of `value.statuses[]` (§7). `extra` are further keys of it."""
    element: JSON = {"id": wamid, "status": status, "timestamp": str(at)}
    element |= _identity(recipient, "recipient_id", "recipient_user_id")
    if status == "sent":
        element["pricing"] = {"billable": True, "pricing_model": "PMP", "type": "regular", "category": "utility"}
    if status == "failed":
        title = "Re-engagement message"
        details = {"details": "Message failed to send because more than 24 hours have passed"}
        element["errors"] = [{"code": 131047, "title": title, "message": title, "error_data": details}]
    return element | extra


MESSAGE_TYPES = (
    "text",
    *MEDIA_TYPES,
    "location",
    "contacts",
    "reaction",
    "interactive",
    "button",
    "order",
    "system",
    "edit",
    "revoke",
    "unsupported",
    "request_welcome",
)
"""The types that have examples."""


def examples(type: str, wamid: str, at: int = 1_788_000_000, media_host: MediaHost = LOOKASIDE) -> list[JSON]:
    """Realistic contents of a message of this type: for each, the keys it adds to the common ones (§6)."""
    if type in MEDIA_TYPES:
        its_id = media_id(type, wamid)
        element = media_object(its_id, media_file(type, its_id, media_host.bytes), at, media_host)
        return [{type: element | _MEDIA[type]}]
    if type == "interactive":
        return [{type: {"type": kind, kind: reply}} for kind, reply in _INTERACTIVE.items()]
    if type in _EXAMPLES:
        return _EXAMPLES[type]
    raise ValueError(f"no example of a message of type {type!r}: give its content, or use one of {MESSAGE_TYPES}")


# Files (§12)


def media_id(type: str, wamid: str) -> str:
    """The id of the file in this message. Every message has one of its own, from which `media_type` reads the type."""
    return str(_FIRST_MEDIA_ID + MEDIA_TYPES.index(type) * _MEDIA_IDS + crc32(wamid.encode()))


def media_type(media_id: str) -> str | None:
    """The message type of a file, if its id is one of those above."""
    if _MEDIA_ID.fullmatch(media_id) is None:
        return None
    place, own = divmod(int(media_id) - _FIRST_MEDIA_ID, _MEDIA_IDS)
    return MEDIA_TYPES[place] if place < len(MEDIA_TYPES) and own < 2**32 else None


def media_file(type: str, media_id: str, size: int | None = None) -> files.Made:
    """What is in the file of that id, always the same."""
    return files.make(media_mime_type(type), media_id, size)


def media_mime_type(type: str) -> str:
    mime_type: str = _MEDIA[type]["mime_type"]
    return mime_type


def media_object(media_id: str, content: files.Content, at: float, host: MediaHost) -> JSON:
    """What a webhook says of any file, without its `mime_type`; `at` is when its URL begins to be good."""
    expires = math.ceil(at) + host.seconds if host.seconds else int(at)
    sha256 = base64.b64encode(content.digest).decode()
    return {"id": media_id, "sha256": sha256, "url": media_url(host.address, media_id, expires)}


def media_url(address: str, media_id: str, expires: int) -> str:
    """Where a file is to be had until that moment, unix seconds."""
    query = urlencode({"mid": media_id, "ext": expires, "hash": media_hash(media_id, str(expires))})
    return f"{address}{ATTACHMENTS}?{query}"


def media_hash(media_id: str, expires: str) -> str:
    """The `hash` that only the URL of this file with this `ext` has."""
    proof = hmac.digest(b"the sandbox's media host", f"{media_id} {expires}".encode(), "sha256")
    return base64.urlsafe_b64encode(proof[:18]).decode()


_FIRST_MEDIA_ID = 910_000_000_000_000
_MEDIA_IDS = 10**10  # of one type
_MEDIA_ID = re.compile(r"91[0-9]{13}")

_MEDIA: dict[str, JSON] = {
    "image": {"mime_type": "image/jpeg", "caption": "Nota fiscal nº 4410"},
    "video": {"mime_type": "video/mp4", "caption": "O barulho é este"},
    "audio": {"mime_type": "audio/ogg; codecs=opus", "voice": True},
    "document": {"mime_type": "application/pdf", "filename": "orçamento.pdf", "caption": "Segue o orçamento"},
    "sticker": {"mime_type": "image/webp", "animated": False},
}

_INTERACTIVE: dict[str, JSON] = {
    "button_reply": {"id": "confirm:77", "title": "Confirmar"},
    "list_reply": {"id": "plan:gold", "title": "Ouro", "description": "12 meses"},
    "nfm_reply": {"name": "flow", "body": "Sent", "response_json": '{"flow_token":"t-9","nota":"5"}'},
    "call_permission_reply": {
        "response": "accept",
        "expiration_timestamp": 1788600000,
        "response_source": "user_action",
    },
}

_EXAMPLES: dict[str, list[JSON]] = {
    "text": [{"text": {"body": "Olá, o pedido 4410/2026 já saiu? 😀"}}],
    "location": [
        {"location": {"latitude": -27.59, "longitude": -48.54, "name": "Loja Centro", "address": "Rua 7, 12"}}
    ],
    "contacts": [
        {
            "contacts": [
                {
                    "name": {"formatted_name": "Ana Luz", "first_name": "Ana"},
                    "phones": [{"phone": "+55 48 95555-0002", "wa_id": "5548955550002", "type": "CELL"}],
                }
            ]
        }
    ],
    "reaction": [{"reaction": {"message_id": _QUOTED, "emoji": "👍"}}, {"reaction": {"message_id": _QUOTED}}],
    "button": [{"button": {"payload": "confirm:77", "text": "Confirmar"}}],
    "order": [
        {
            "order": {
                "catalog_id": "31",
                "text": "",
                "product_items": [
                    {"product_retailer_id": "SKU-1", "quantity": 2, "item_price": 59.9, "currency": "BRL"}
                ],
            }
        }
    ],
    "system": [
        {"system": {"body": "changed number", "type": "user_changed_number", "wa_id": "5511933330009"}},
        {"system": {"body": "changed user id", "type": "user_changed_user_id", "user_id": "BR.90000000000000009"}},
        {
            "system": {"body": "identity changed", "type": "customer_identity_changed"},
            "identity": {"acknowledged": False, "created_timestamp": "1788000000", "hash": "DF2lS5v2W6x"},
        },
    ],
    "edit": [{"edit": {"original_message_id": _QUOTED, "message": {"type": "text", "text": {"body": "corrigido"}}}}],
    "revoke": [{"revoke": {"original_message_id": _QUOTED}}],
    "unsupported": [
        {
            "unsupported": {"type": "poll_creation"},
            "errors": [
                {
                    "code": 131051,
                    "title": "Message type unknown",
                    "message": "Message type unknown",
                    "error_data": {"details": "Message type is currently not supported."},
                }
            ],
        }
    ],
    "request_welcome": [{}],
}

REFERRAL: JSON = {
    "source_url": "https://fb.example/ad",
    "source_id": "12",
    "source_type": "ad",
    "headline": "Oferta",
    "body": "Só hoje",
    "media_type": "image",
    "image_url": "https://cdn.example/a.jpg",
    "ctwa_clid": "clid1",
}
"""The `referral` of a first message that came from an advertisement (§6)."""

CONTEXTS: tuple[JSON, ...] = (
    {"from": "5511955550100", "id": _QUOTED},
    {"forwarded": True},
    {"frequently_forwarded": True},
    {"from": "5511955550100", "id": _QUOTED, "referred_product": {"catalog_id": "31", "product_retailer_id": "SKU-1"}},
)
"""The forms of a message's `context`: reply, forwarded, forwarded often, question about a product (§6)."""


# Changes and the envelope (§3, §8)


def change(number: Number, field: str, value: JSON | None = None) -> JSON:
    """An element of `entry[].changes[]`; `metadata` is added where Meta has it.

    Without a value an example is taken, the same each time; raises ValueError for a field that has none.
    """
    if value is None:
        samples = _field_values(number)
        if field not in samples:
            raise ValueError(f"no example of field {field!r}: give its value, or use one of {tuple(samples)}")
        value = samples[field]
    if field in NUMBER_FIELDS:
        metadata = {
            "display_phone_number": number.display_phone_number,
            "phone_number_id": number.phone_number_id,
        }
        value = {"messaging_product": "whatsapp", "metadata": metadata} | value
    return {"field": field, "value": value}


def entry(waba_id: str, changes: list[JSON], time: int | None = None) -> JSON:
    """An element of `entry[]`; `time` (unix seconds) is given on account and template fields only (§3)."""
    when = {"time": time} if time is not None else {}
    return {"id": waba_id, **when, "changes": changes}


def envelope(entries: Iterable[JSON]) -> JSON:
    """A whole webhook body (§3)."""
    return {"object": "whatsapp_business_account", "entry": list(entries)}


def _field_values(number: Number) -> dict[str, JSON]:
    """An example value of every field of §8 that Meta documents, without `metadata`."""
    display = number.display_phone_number
    customer = "5511944440001"
    at = 1_788_000_000
    text: JSON = {"type": "text", "text": {"body": "Seu pedido está pronto"}}
    template = {
        "message_template_id": 1234567890123,
        "message_template_name": "pedido_enviado",
        "message_template_language": "pt_BR",
    }
    return {
        "messages": {
            "contacts": [contact(customer, "Bia Prado")],
            "messages": [text_message(_QUOTED, customer, "Bom dia", at)],
        },
        "message_template_status_update": {
            "event": "APPROVED",
            **template,
            "message_template_category": "UTILITY",
            "reason": "NONE",
        },
        "message_template_quality_update": {
            "previous_quality_score": "GREEN",
            "new_quality_score": "YELLOW",
            **template,
        },
        "message_template_components_update": {
            **template,
            "message_template_title": "",
            "message_template_element": "Olá {{1}}, o pedido {{2}} saiu.",
        },
        "template_category_update": {**template, "previous_category": "UTILITY", "new_category": "MARKETING"},
        "account_update": {
            "event": "ACCOUNT_RESTRICTION",
            "restriction_info": [{"restriction_type": "RESTRICTED_BIZ_INITIATED_MESSAGING", "expiration": at + 86_400}],
        },
        "account_review_update": {"decision": "APPROVED"},
        "account_alerts": {
            "entity_type": "WABA",
            "entity_id": number.waba_id,
            "alert_severity": "WARNING",
            "alert_status": "ACTIVE",
            "alert_type": "OTHER",
            "alert_description": "Business verification is pending",
        },
        "phone_number_quality_update": {
            "display_phone_number": display,
            "event": "THROUGHPUT_UPGRADE",
            "max_daily_conversations_per_business": "TIER_10K",
        },
        "phone_number_name_update": {
            "display_phone_number": display,
            "decision": "APPROVED",
            "requested_verified_name": "Loja Centro",
        },
        "business_capability_update": {
            "max_daily_conversations_per_business": 10_000,
            "max_phone_numbers_per_business": 25,
        },
        "security": {"display_phone_number": display, "event": "PIN_CHANGED", "requester": "61550000000001"},
        "user_preferences": {
            "contacts": [contact(customer, "Bia Prado")],
            "user_preferences": [
                {
                    "wa_id": customer,
                    "user_id": user_id(customer),
                    "category": "marketing_messages",
                    "value": "stop",
                    "detail": "User requested to stop marketing messages",
                    "timestamp": at,
                }
            ],
        },
        "user_id_update": {
            "user_id_update": [
                {
                    "wa_id": customer,
                    "detail": "User changed their phone number",
                    "user_id": {"previous": user_id(customer), "current": "BR.90000000000000009"},
                    "timestamp": str(at),
                }
            ]
        },
        "business_username_updates": {"display_phone_number": display, "username": "lojacentro", "status": "approved"},
        "smb_message_echoes": {"message_echoes": [echo(_QUOTED, number, customer, text["text"]["body"], at)]},
        "smb_app_state_sync": {
            "state_sync": [
                {
                    "type": "contact",
                    "action": "add",
                    "contact": {"full_name": "Bia Prado", "first_name": "Bia", "phone_number": customer},
                    "metadata": {"timestamp": str(at)},
                }
            ]
        },
        "history": {
            "history": [
                {
                    "metadata": {"phase": 0, "chunk_order": 1, "progress": 55},
                    "threads": [
                        {
                            "id": customer,
                            "messages": [{"from": display, "to": customer, "id": _QUOTED, "timestamp": str(at)} | text],
                        }
                    ],
                }
            ]
        },
        "calls": {
            "contacts": [contact(customer, "Bia Prado")],
            "calls": [
                {
                    "id": "wacid.HBgNNTUxMTk0NDQ0MDAwMRUCABIYFjAwMDAA",
                    "from": customer,
                    "to": display,
                    "event": "connect",
                    "timestamp": str(at),
                    "direction": "USER_INITIATED",
                    "session": {"sdp_type": "offer", "sdp": "v=0\r\n"},
                }
            ],
        },
        **{
            field: {"groups": [{"group_id": "grp-1", "type": type_, "timestamp": str(at), "request_id": "req-1"}]}
            for field, type_ in {
                "group_lifecycle_update": "group_create",
                "group_participants_update": "group_participants_add",
                "group_settings_update": "group_settings_update",
                "group_status_update": "group_suspend",
            }.items()
        },
        "flows": {"event": "FLOW_STATUS_CHANGE", "flow_id": "6627390910605886", "new_status": "PUBLISHED"},
        "payment_configuration_update": {"configuration_name": "pix", "status": "ACTIVE"},
        "partner_solutions": {"event": "SOLUTION_CREATED", "solution_id": "774485461512159"},
        "automatic_events": {"automatic_events": [{"id": _QUOTED, "event_name": "LeadSubmitted", "timestamp": at}]},
        "account_settings_update": {"type": "phone_number_settings", "timestamp": str(at)},
    }
