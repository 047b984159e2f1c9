"""What may be asked of us to send: the shape of a request, and an error that names the field and its limit.

Limits are Meta's, so that what it would refuse hours later is refused at once (whatsapp-cloud-api.md §9, §11, §12);
what a channel of another kind takes of it is in `web/kinds.py`. Nothing here knows the database. An error never repeats
what was sent, but for the name of an unknown field.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import msgspec
import phonenumbers
from msgspec import Meta, Struct

from web import accepted
from web.errors import Failure
from web.refusals import converted, name_of, not_one_of, wrong

MOST_BYTES = 256 * 1024  # of a request
MOST_AHEAD = timedelta(days=30)  # of `not_before`
_MOST_BYTES_OF_A_PART = 16 * 1024  # of an object that is passed on as it is
_MOST_LEVELS = 32  # of lists and objects in each other
_SMALL_LIST = 10
_MOST_ROWS = 10  # of a list message, over all its sections


class Reference(NamedTuple):
    """A message that is meant, by our id or by the provider's, and the field that named it."""

    name: str
    field: str


class OwnFile(NamedTuple):
    """A file of ours that a message carries: under which name, where that stands, and as what it is sent."""

    name: str
    field: str
    kind: str


class Ask(NamedTuple):
    """What somebody wants sent. `element` is what the provider gets under the name of its type."""

    type: str
    element: Any
    recipient: str | None  # a phone number with its plus, a BSUID, or a JID (a LID, a group); none for a read receipt
    channel: str | None  # id or name; None for the default
    reference: Reference | None  # what it replies to, reacts to, or says was read
    not_before: datetime | None
    template: tuple[str, str] | None  # name and language
    digest: str  # of all that was asked
    files: tuple[OwnFile, ...] = ()
    at: str = "$"  # where its content stands

    def body(self, reference: str | None) -> bytes:
        """The message's body as JSON, with the id by which the referenced message is known best."""
        element = self.element
        if self.type in ("read", "reaction"):
            element = {**element, "message_id": reference}
        body = {self.type: element}
        if self.type not in ("read", "reaction") and reference is not None:
            body["context"] = {"message_id": reference}
        return msgspec.json.encode(body)


# ------------------------------------------------------------------------------------------------------------- shapes

Upto20: TypeAlias = Annotated[str, Meta(min_length=1, max_length=20)]
Upto24: TypeAlias = Annotated[str, Meta(min_length=1, max_length=24)]
Upto30: TypeAlias = Annotated[str, Meta(min_length=1, max_length=30)]
Upto60: TypeAlias = Annotated[str, Meta(min_length=1, max_length=60)]
Upto72: TypeAlias = Annotated[str, Meta(max_length=72)]
Upto200: TypeAlias = Annotated[str, Meta(min_length=1, max_length=200)]
Upto240: TypeAlias = Annotated[str, Meta(min_length=1, max_length=240)]
Upto256: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
Upto512: TypeAlias = Annotated[str, Meta(min_length=1, max_length=512)]
Upto1024: TypeAlias = Annotated[str, Meta(min_length=1, max_length=1024)]
Upto2048: TypeAlias = Annotated[str, Meta(min_length=1, max_length=2048)]
Upto4096: TypeAlias = Annotated[str, Meta(min_length=1, max_length=4096)]
MediaId: TypeAlias = Annotated[str, Meta(max_length=128, pattern=r"^[A-Za-z0-9._:-]+\Z")]
TemplateName: TypeAlias = Annotated[str, Meta(max_length=512, pattern=r"^[a-z0-9_]+\Z")]
LanguageCode: TypeAlias = Annotated[str, Meta(max_length=16, pattern=r"^[A-Za-z0-9_]+\Z")]
Birthday: TypeAlias = Annotated[str, Meta(max_length=10, pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")]
Index: TypeAlias = Annotated[int, Meta(ge=0, le=9)]
IndexText: TypeAlias = Annotated[str, Meta(max_length=1, pattern=r"^[0-9]\Z")]
Whenever: TypeAlias = Annotated[datetime, Meta(tz=True)]
AsItIs: TypeAlias = dict[str, Any]


class Shape(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Nothing may be in it but what it names; what was left out stays out."""


class Envelope(Shape):
    type: str
    to: Upto200 | None = None
    channel: Upto200 | None = None
    reply_to: Upto512 | None = None
    message_id: Upto512 | None = None
    not_before: Whenever | None = None


class OldEnvelope(Shape):
    to: str
    type: str
    content: Any
    channel: Upto200 | None = None


class Text(Shape):
    body: Upto4096
    preview_url: bool = False


class File(Shape):
    """A file by our id, by the provider's, or by a link that the provider fetches."""

    media_id: MediaId | None = None
    id: MediaId | None = None
    link: Upto2048 | None = None


class NamedFile(File):
    filename: Upto240 | None = None


class CaptionedFile(File):
    caption: Upto1024 | None = None


class Audio(File):
    voice: bool = False


class Document(CaptionedFile):
    filename: Upto240 | None = None


class Claim(Shape):
    """What the caller knows of the file: checked, and not sent on."""

    mime_type: Upto200 | None = None
    bytes: Annotated[int, Meta(ge=1)] | None = None


class Location(Shape):
    latitude: Annotated[float, Meta(ge=-90, le=90)]
    longitude: Annotated[float, Meta(ge=-180, le=180)]
    name: Upto1024 | None = None
    address: Upto1024 | None = None


class PersonName(Shape):
    formatted_name: Upto512
    first_name: Upto512 | None = None
    last_name: Upto512 | None = None
    middle_name: Upto512 | None = None
    suffix: Upto512 | None = None
    prefix: Upto512 | None = None


class Phone(Shape):
    phone: Upto60 | None = None
    wa_id: Upto60 | None = None
    type: Upto60 | None = None


class Email(Shape):
    email: Upto512
    type: Upto60 | None = None


class Url(Shape):
    url: Upto2048
    type: Upto60 | None = None


class Address(Shape):
    street: Upto512 | None = None
    city: Upto512 | None = None
    state: Upto512 | None = None
    zip: Upto60 | None = None
    country: Upto512 | None = None
    country_code: Upto60 | None = None
    type: Upto60 | None = None


class Organization(Shape):
    company: Upto512 | None = None
    department: Upto512 | None = None
    title: Upto512 | None = None


class Card(Shape):
    """A person's card, as in a contacts message."""

    name: PersonName
    phones: Annotated[list[Phone], Meta(max_length=_SMALL_LIST)] | None = None
    emails: Annotated[list[Email], Meta(max_length=_SMALL_LIST)] | None = None
    urls: Annotated[list[Url], Meta(max_length=_SMALL_LIST)] | None = None
    addresses: Annotated[list[Address], Meta(max_length=_SMALL_LIST)] | None = None
    org: Organization | None = None
    birthday: Birthday | None = None


Cards: TypeAlias = Annotated[list[Card], Meta(min_length=1, max_length=257)]


class Reaction(Shape):
    message_id: Upto512
    emoji: Annotated[str, Meta(max_length=32)]  # empty: takes the reaction back


# ---- template (§11)


class Language(Shape):
    code: LanguageCode
    policy: Literal["deterministic"] | None = None


class Money(Shape):
    fallback_value: Upto256
    code: Annotated[str, Meta(min_length=3, max_length=3)]
    amount_1000: int


class Moment(Shape):
    fallback_value: Upto256


class Offer(Shape):
    expiration_time_ms: Annotated[int, Meta(ge=0)]


class TextParameter(Shape, tag_field="type", tag="text"):
    text: Upto2048
    parameter_name: Upto60 | None = None


class MoneyParameter(Shape, tag_field="type", tag="currency"):
    currency: Money
    parameter_name: Upto60 | None = None


class MomentParameter(Shape, tag_field="type", tag="date_time"):
    date_time: Moment
    parameter_name: Upto60 | None = None


class ImagePart(Shape, tag_field="type", tag="image"):
    image: File


class VideoPart(Shape, tag_field="type", tag="video"):
    video: File


class DocumentPart(Shape, tag_field="type", tag="document"):
    document: NamedFile


class LocationParameter(Shape, tag_field="type", tag="location"):
    location: Location


class PayloadParameter(Shape, tag_field="type", tag="payload"):
    payload: Upto256


class CouponParameter(Shape, tag_field="type", tag="coupon_code"):
    coupon_code: Upto60


class ActionParameter(Shape, tag_field="type", tag="action"):
    action: AsItIs


class OfferParameter(Shape, tag_field="type", tag="limited_time_offer"):
    limited_time_offer: Offer


class HeaderComponent(Shape, tag_field="type", tag="header"):
    parameters: Annotated[
        list[TextParameter | ImagePart | VideoPart | DocumentPart | LocationParameter],
        Meta(min_length=1, max_length=1),
    ]


class BodyComponent(Shape, tag_field="type", tag="body"):
    parameters: Annotated[
        list[TextParameter | MoneyParameter | MomentParameter],
        Meta(max_length=100),
    ]


class ButtonComponent(Shape, tag_field="type", tag="button"):
    sub_type: Literal["quick_reply", "url", "copy_code", "flow", "catalog", "mpm"]
    index: Index | IndexText
    parameters: Annotated[
        list[PayloadParameter | TextParameter | CouponParameter | ActionParameter],
        Meta(max_length=1),
    ] = msgspec.field(default_factory=list)


class OfferComponent(Shape, tag_field="type", tag="limited_time_offer"):
    parameters: Annotated[list[OfferParameter], Meta(min_length=1, max_length=1)]


class TemplateCard(Shape):
    card_index: Index
    components: Annotated[list[HeaderComponent | BodyComponent | ButtonComponent], Meta(max_length=12)]


class CarouselComponent(Shape, tag_field="type", tag="carousel"):
    cards: Annotated[list[TemplateCard], Meta(min_length=1, max_length=10)]


Component: TypeAlias = HeaderComponent | BodyComponent | ButtonComponent | OfferComponent | CarouselComponent


class Template(Shape):
    name: TemplateName
    language: LanguageCode | Language
    components: Annotated[list[Component], Meta(max_length=14)] = msgspec.field(default_factory=list)


# What a button of each kind takes.
_OF_BUTTON: dict[str, type[Struct]] = {
    "quick_reply": PayloadParameter,
    "url": TextParameter,
    "copy_code": CouponParameter,
    "flow": ActionParameter,
    "catalog": ActionParameter,
    "mpm": ActionParameter,
}


# ---- interactive (§9)


class HeaderText(Shape, tag_field="type", tag="text"):
    text: Upto60


Header: TypeAlias = HeaderText | ImagePart | VideoPart | DocumentPart


class Body(Shape):
    text: Upto1024


class LongBody(Shape):
    text: Upto4096


class Footer(Shape):
    text: Upto60


class Reply(Shape):
    id: Upto256
    title: Upto20


class ReplyButton(Shape):
    type: Literal["reply"]
    reply: Reply


class ButtonAction(Shape):
    buttons: Annotated[list[ReplyButton], Meta(min_length=1, max_length=3)]


class ButtonMessage(Shape, tag_field="type", tag="button"):
    body: Body
    action: ButtonAction
    header: Header | None = None
    footer: Footer | None = None


class Row(Shape):
    id: Upto200
    title: Upto24
    description: Upto72 | None = None


class Section(Shape):
    rows: Annotated[list[Row], Meta(min_length=1, max_length=10)]
    title: Upto24 | None = None


class ListAction(Shape):
    button: Upto20
    sections: Annotated[list[Section], Meta(min_length=1, max_length=10)]


class ListMessage(Shape, tag_field="type", tag="list"):
    body: LongBody
    action: ListAction
    header: HeaderText | None = None
    footer: Footer | None = None


class LinkParameters(Shape):
    display_text: Upto20
    url: Upto2048


class LinkAction(Shape):
    name: Literal["cta_url"]
    parameters: LinkParameters


class LinkMessage(Shape, tag_field="type", tag="cta_url"):
    body: Body
    action: LinkAction
    header: Header | None = None
    footer: Footer | None = None


class FlowParameters(Shape):
    flow_message_version: Literal["3"]
    flow_cta: Upto30
    flow_id: Upto200 | None = None
    flow_name: Upto200 | None = None
    flow_token: Upto1024 | None = None
    flow_action: Literal["navigate", "data_exchange"] | None = None
    flow_action_payload: AsItIs | None = None
    mode: Literal["draft", "published"] | None = None


class FlowAction(Shape):
    name: Literal["flow"]
    parameters: FlowParameters


class FlowMessage(Shape, tag_field="type", tag="flow"):
    body: Body
    action: FlowAction
    header: Header | None = None
    footer: Footer | None = None


class LocationAction(Shape):
    name: Literal["send_location"]


class LocationRequest(Shape, tag_field="type", tag="location_request_message"):
    body: Body
    action: LocationAction


class ContactAction(Shape):
    name: Literal["request_contact_info"]


class ContactRequest(Shape, tag_field="type", tag="request_contact_info"):
    body: Body
    action: ContactAction


class CallAction(Shape):
    name: Literal["call_permission_request"]


class CallRequest(Shape, tag_field="type", tag="call_permission_request"):
    action: CallAction
    body: Body | None = None


# Of the following the provider's catalogue decides what is right; here only sizes are looked at.


class CatalogMessage(Shape, tag_field="type", tag="catalog_message"):
    body: Body
    action: AsItIs
    footer: Footer | None = None


class ProductMessage(Shape, tag_field="type", tag="product"):
    action: AsItIs
    body: Body | None = None
    footer: Footer | None = None


class ProductListMessage(Shape, tag_field="type", tag="product_list"):
    header: HeaderText
    body: Body
    action: AsItIs
    footer: Footer | None = None


class CarouselMessage(Shape, tag_field="type", tag="carousel"):
    body: Body
    action: AsItIs


Interactive: TypeAlias = (
    ButtonMessage
    | ListMessage
    | LinkMessage
    | FlowMessage
    | LocationRequest
    | ContactRequest
    | CallRequest
    | CatalogMessage
    | ProductMessage
    | ProductListMessage
    | CarouselMessage
)

_FILES: dict[str, type[File]] = {
    "image": CaptionedFile,
    "video": CaptionedFile,
    "audio": Audio,
    "document": Document,
    "sticker": File,
}
_OTHERS: dict[str, Any] = {
    "text": Text,
    "template": Template,
    "location": Location,
    "contacts": Cards,
    "reaction": Reaction,
    "interactive": Interactive,
}
TYPES = ("text", "template", *_FILES, "location", "contacts", "reaction", "interactive", "read")


# ------------------------------------------------------------------------------------------------------------ reading


def asked(raw: bytes) -> Ask:
    """The request of `POST /api/v1/messages`. Raises `Failure`."""
    return _understood(_decoded(raw))


def asked_the_old_way(raw: bytes) -> Ask:
    """The request of `POST /api/messages/send`: `content` is a text or the object, digits go without a plus."""
    old = converted(_decoded(raw), OldEnvelope, "$")
    if old.type not in TYPES:
        raise not_one_of("$.type", list(TYPES))
    to = f"+{old.to}" if re.fullmatch(r"[0-9]+", old.to) else old.to
    given: dict[str, Any] = {"type": old.type, "to": to}
    if old.channel is not None:
        given["channel"] = old.channel
    if old.type != "read":
        return _understood(given | {old.type: old.content}, at="$.content")
    content = converted(old.content, dict[str, Any], "$.content")
    if content.keys() != {"message_id"}:
        raise wrong("$.content", "must hold `message_id` and nothing else")
    del given["to"]  # the old form has one for everything
    return _understood(given | content)


def _decoded(raw: bytes) -> dict[str, Any]:
    try:
        given = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        field = _lone_surrogate(raw)
        if field:
            raise wrong(field, "must not contain half a surrogate pair") from None
        raise Failure(400, "INVALID_PAYLOAD", "the body is not JSON") from None
    if not isinstance(given, dict):
        raise wrong("$", "must be an object")
    if raw.count(b"[") + raw.count(b"{") > _MOST_LEVELS and _is_deep(given):
        raise wrong("$", f"must have at most {_MOST_LEVELS} levels", _MOST_LEVELS)
    if b"\\u0000" in raw:  # in JSON there is no other way to write it
        for field, text in _texts(given, "$"):
            if "\x00" in text:
                raise wrong(field, "must not contain the character NUL")
    return given


def _lone_surrogate(raw: bytes) -> str | None:
    """The field that holds one. Python's own parser takes them, so it is asked when the other one has refused."""
    try:
        given = json.loads(raw.decode())
    except (ValueError, RecursionError):
        return None
    return next((field for field, text in _texts(given, "$") if re.search(r"[\ud800-\udfff]", text)), None)


def _is_deep(given: Any) -> bool:
    """Whoever reads it later may have less room on the stack than we have."""
    level = [given]
    for _ in range(_MOST_LEVELS):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [value for part in parts for value in part]
    return any(isinstance(value, dict | list) for value in level)


def _texts(value: Any, at: str) -> Iterator[tuple[str, str]]:
    """All texts in a JSON value, and where they are; keys count for the object that has them."""
    waiting = [(value, at)]
    while waiting:
        value, at = waiting.pop()
        if isinstance(value, str):
            yield at, value
        elif isinstance(value, list):
            waiting += [(item, f"{at}[{n}]") for n, item in enumerate(value)]
        elif isinstance(value, dict):
            yield from ((at, key) for key in value)
            waiting += [(item, f"{at}.{name_of(key)}") for key, item in value.items()]


def _understood(given: dict[str, Any], at: str | None = None) -> Ask:
    """`at`: where the content stands, if not under the name of its type."""
    type_ = given.get("type")
    if type_ not in TYPES:
        raise not_one_of("$.type", list(TYPES)) if "type" in given else wrong("$.type", "is required")
    names = {"media", type_} if type_ in _FILES else {type_}
    envelope = {name: value for name, value in given.items() if name not in names}
    for name in sorted(envelope.keys() & {*TYPES, "media"}):
        raise wrong(f"$.{name}", f"does not go with type {type_}")
    asked = converted(envelope, Envelope, "$")
    found = sorted(given.keys() & names)
    if type_ == "read":
        if found:
            raise wrong("$.read", "is not needed: `message_id` says which message was read")
    elif not found:
        raise wrong(f"$.{type_}", "is required")
    elif len(found) > 1:
        raise wrong(f"$.{found[1]}", f"stands there twice: as `{found[0]}` too")

    field = at or (f"$.{found[0]}" if found else "$")
    element, template, files = _element(type_, given[found[0]] if found else None, field)
    return Ask(
        type=type_,
        element=element,
        recipient=_recipient(asked, type_),
        channel=asked.channel,
        reference=_reference(asked, type_, element, field),
        not_before=_not_before(asked.not_before),
        template=template,
        digest=hashlib.sha256(msgspec.json.encode(given, order="sorted")).hexdigest(),
        files=files,
        at=field,
    )


def _recipient(asked: Envelope, type_: str) -> str | None:
    if type_ == "read":
        if asked.to is not None:
            raise wrong("$.to", "does not go with type read: the message says whose it is")
        return None
    if asked.to is None:
        raise wrong("$.to", "is required")
    return recipient(asked.to)


_PHONE = re.compile(r"\+[0-9]{8,15}")
_BSUID = re.compile(r"[A-Z]{2}\.(ENT\.)?[A-Za-z0-9]{1,128}")
_LID = re.compile(r"[0-9]{1,20}@lid")
_GROUP = re.compile(r"[0-9]{5,24}(-[0-9]{1,16})?@g\.us")  # the older ones: who made it, and when
_OF_A_PERSON = "@s.whatsapp.net"


def recipient(to: str) -> str:
    """A phone number with its plus, a BSUID (§5), or a JID: of a LID or a group as it is, of a person as the number.

    Digits alone are refused, since Meta would guess the country.
    """
    if to.endswith(_OF_A_PERSON) and _PHONE.fullmatch(number := f"+{to.removesuffix(_OF_A_PERSON)}"):
        to = number
    if _PHONE.fullmatch(to):
        try:
            if phonenumbers.is_possible_number(phonenumbers.parse(to)):
                return to
        except phonenumbers.NumberParseException:  # no such country
            pass
        raise wrong("$.to", "is no phone number that can exist in its country")
    if _BSUID.fullmatch(to) or _LID.fullmatch(to) or _GROUP.fullmatch(to):
        return to
    if re.fullmatch(r"[0-9]+", to):
        raise wrong(
            "$.to",
            "needs a + and the country's code: without the +, WhatsApp may take it for a number in the country of the "
            "business and deliver it to somebody else",
        )
    raise wrong(
        "$.to",
        "must be + and 8 to 15 digits, a business-scoped user id like BR.A1b2C3, or a JID: digits and @s.whatsapp.net "
        "or @lid, or a group's id and @g.us",
        [8, 15],
    )


def identity(to: str) -> tuple[str, str]:
    """The recipient as webhooks would name it: `(kind, value)`, a phone by its digits without the plus."""
    if to.startswith("+"):
        return "phone", to[1:]
    value, is_jid, server = to.partition("@")
    return ({"lid": "lid", "g.us": "group"}[server], value) if is_jid else ("bsuid", to)


def _reference(asked: Envelope, type_: str, element: Any, at: str) -> Reference | None:
    if type_ == "read":
        if asked.message_id is None:
            raise wrong("$.message_id", "is required")
    elif asked.message_id is not None:
        raise wrong("$.message_id", f"does not go with type {type_}")
    if type_ in ("read", "reaction"):
        if asked.reply_to is not None:
            raise wrong("$.reply_to", f"does not go with type {type_}")
        if asked.message_id is not None:
            return Reference(asked.message_id, "$.message_id")
        return Reference(element["message_id"], f"{at}.message_id")
    return Reference(asked.reply_to, "$.reply_to") if asked.reply_to is not None else None


def _not_before(at: datetime | None) -> datetime | None:
    if at is None:
        return None
    try:
        at = at.astimezone(UTC)
    except OverflowError:  # the year 9999, west of Greenwich
        at = datetime.max.replace(tzinfo=UTC)
    if at > datetime.now(UTC) + MOST_AHEAD:
        raise wrong("$.not_before", f"must be at most {MOST_AHEAD.days} days ahead", MOST_AHEAD.days)
    return at


# ------------------------------------------------------------------------------------------------------------ content


def _element(type_: str, given: Any, at: str) -> tuple[Any, tuple[str, str] | None, tuple[OwnFile, ...]]:
    """The checked content as plain values, a template's name and language, and the files of ours that are in it."""
    if type_ == "read":
        return {}, None, ()
    if type_ == "text" and isinstance(given, str):
        return {"body": converted(given, Upto4096, at)}, None, ()
    if type_ in _FILES:
        given = _without_claim(type_, given, at)
    content = converted(given, _FILES.get(type_) or _OTHERS[type_], at)
    _look_inside(content, at)
    element, files = msgspec.to_builtins(content), tuple(_own_files(content, at, type_))
    if isinstance(content, Template):
        _check_components(content.components, f"{at}.components")
        _write_out(element)
        return element, (content.name, element["language"]["code"]), files
    if type_ == "interactive":
        _check_interactive(content, at)
    return element, None, files


def _without_claim(type_: str, given: Any, at: str) -> Any:
    if not isinstance(given, dict):
        return given
    claimed = {name: given[name] for name in Claim.__struct_fields__ if name in given}
    claim = converted(claimed, Claim, at)
    if claim.mime_type is not None:
        mime_type, allowed = claim.mime_type.split(";")[0].strip().lower(), accepted.TYPES[type_]
        if mime_type not in allowed:
            raise not_one_of(f"{at}.mime_type", list(allowed))
    most = accepted.MOST_BYTES_OF[type_]
    if claim.bytes is not None and claim.bytes > most:
        raise wrong(f"{at}.bytes", f"must be at most {most}", most)
    return {name: value for name, value in given.items() if name not in claimed}


def _look_inside(value: Any, at: str) -> None:
    """What no type says: of each file exactly one of its names, links that are links, sizes of what is passed on."""
    if isinstance(value, list):
        for n, item in enumerate(value):
            _look_inside(item, f"{at}[{n}]")
    elif isinstance(value, dict):
        if len(msgspec.json.encode(value)) > _MOST_BYTES_OF_A_PART:
            raise wrong(at, f"must have at most {_MOST_BYTES_OF_A_PART} bytes", _MOST_BYTES_OF_A_PART)
    elif isinstance(value, Struct):
        if isinstance(value, File):
            _exactly_one(at, media_id=value.media_id, id=value.id, link=value.link)
        for name in value.__struct_fields__:
            part = getattr(value, name)
            if isinstance(part, str) and (name == "link" or (name == "url" and isinstance(value, LinkParameters))):
                _check_link(part, f"{at}.{name}")
            else:
                _look_inside(part, f"{at}.{name}")


def _exactly_one(at: str, **choice: Any) -> None:
    if sum(value is not None for value in choice.values()) != 1:
        raise wrong(at, f"must have either {' or '.join(f'`{name}`' for name in choice)}", list(choice))


def _own_files(value: Any, at: str, kind: str) -> Iterator[OwnFile]:
    """Those that are meant by our id; `kind` is the name under which the value stands."""
    if isinstance(value, list):
        for n, item in enumerate(value):
            yield from _own_files(item, f"{at}[{n}]", kind)
    elif isinstance(value, File):
        if value.media_id is not None:
            yield OwnFile(value.media_id, f"{at}.media_id", kind)
    elif isinstance(value, Struct):
        for name in value.__struct_fields__:
            yield from _own_files(getattr(value, name), f"{at}.{name}", name)


def unfit(file: OwnFile, mime_type: str, size: int) -> Failure | None:
    """Why a stored file of that type, which its bytes tell, and that size cannot be sent as what it is to be sent."""
    allowed, most = accepted.TYPES[file.kind], accepted.MOST_BYTES_OF[file.kind]
    if mime_type not in allowed:
        return wrong(file.field, f"names a file that is none of {', '.join(allowed)}", list(allowed))
    if size > most:
        return wrong(file.field, f"names a file that is too large: {file.kind} may have {most} bytes", most)
    return None


def _check_link(link: str, at: str) -> None:
    try:
        parts = urlsplit(link)
        is_link = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_link = False
    if not is_link or not re.fullmatch(r"[!-~\u00a1-\U0010ffff]+", link):
        raise wrong(at, "must be a link that begins with https:// or http://")
    if "@" in parts.netloc:
        raise wrong(at, "must not contain a user name or a password")


def _check_components(components: list[Any], at: str) -> None:
    buttons: set[str] = set()
    for n, component in enumerate(components):
        here = f"{at}[{n}]"
        if isinstance(component, ButtonComponent):
            if str(component.index) in buttons:
                raise wrong(f"{here}.index", "is another button's already")
            buttons.add(str(component.index))
            wanted = _OF_BUTTON[component.sub_type]
            for m, parameter in enumerate(component.parameters):
                if type(parameter) is not wanted:
                    raise not_one_of(f"{here}.parameters[{m}].type", [str(wanted.__struct_config__.tag)])
        elif any(type(component) is type(other) for other in components[:n]):
            raise wrong(here, "stands there twice: one of its type is allowed")
        if isinstance(component, CarouselComponent):
            for m, card in enumerate(component.cards):
                _check_components(card.components, f"{here}.cards[{m}].components")


def _write_out(template: dict[str, Any]) -> None:
    """A template the long way: the language as an object, each index as a text."""
    if isinstance(template.get("language"), str):
        template["language"] = {"code": template["language"]}
    for component in template.get("components", []):
        if "index" in component:
            component["index"] = str(component["index"])
        for card in component.get("cards", []):
            _write_out(card)


def _check_interactive(content: Any, at: str) -> None:
    if isinstance(content, ButtonMessage):
        buttons = content.action.buttons
        _all_differ([(button.reply.id, f"{at}.action.buttons[{n}].reply.id") for n, button in enumerate(buttons)])
        _all_differ([(button.reply.title, f"{at}.action.buttons[{n}].reply.title") for n, button in enumerate(buttons)])
    elif isinstance(content, ListMessage):
        rows = []
        for n, section in enumerate(content.action.sections):
            if section.title is None and len(content.action.sections) > 1:
                raise wrong(f"{at}.action.sections[{n}].title", "is required where there are several sections")
            rows += [(row.id, f"{at}.action.sections[{n}].rows[{m}].id") for m, row in enumerate(section.rows)]
        if len(rows) > _MOST_ROWS:
            raise wrong(f"{at}.action.sections", f"must have at most {_MOST_ROWS} rows in all", _MOST_ROWS)
        _all_differ(rows)
    elif isinstance(content, FlowMessage):
        flow = content.action.parameters
        _exactly_one(f"{at}.action.parameters", flow_id=flow.flow_id, flow_name=flow.flow_name)


def _all_differ(values: list[tuple[str, str]]) -> None:
    seen: set[str] = set()
    for value, field in values:
        if value in seen:
            raise wrong(field, "must differ from the others")
        seen.add(value)
