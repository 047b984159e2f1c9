"""What may be asked of us to send, and what an error says (whatsapp-cloud-api.md §5, §9, §11, §12)."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from web.errors import Failure
from web.shapes import MOST_AHEAD, TYPES, Ask, OwnFile, asked, asked_the_old_way

TO = "+5511944440001"
SECRET = "do-not-repeat-this"


def ask(**given: Any) -> Ask:
    return asked(json.dumps({"to": TO} | given).encode())


def old(**given: Any) -> Ask:
    return asked_the_old_way(json.dumps(given).encode())


def refused(**given: Any) -> Failure:
    """The refusal of a request; `to=None` leaves the recipient out."""
    body = {name: value for name, value in ({"to": TO} | given).items() if value is not None}
    return refused_raw(json.dumps(body).encode())


def refused_raw(raw: bytes) -> Failure:
    with pytest.raises(Failure) as caught:
        asked(raw)
    return caught.value


def body(one: Ask, reference: str | None = None) -> Any:
    return json.loads(one.body(reference))


def a_button(n: int = 1, **changes: Any) -> dict[str, Any]:
    return {"type": "reply", "reply": {"id": f"b{n}", "title": f"Button {n}"} | changes}


def buttons(*given: Any, **more: Any) -> dict[str, Any]:
    return {"type": "button", "body": {"text": "?"}, "action": {"buttons": list(given)}} | more


def rows(*counts: int, **more: Any) -> dict[str, Any]:
    sections = [
        {"title": f"S{s}", "rows": [{"id": f"{s}.{n}", "title": "R"} for n in range(count)]}
        for s, count in enumerate(counts)
    ]
    return {"type": "list", "body": {"text": "?"}, "action": {"button": "Open", "sections": sections}} | more


def a_row(**changes: Any) -> dict[str, Any]:
    section = {"title": "S", "rows": [{"id": "1", "title": "R"} | changes]}
    return {"type": "list", "body": {"text": "?"}, "action": {"button": "Open", "sections": [section]}}


def a_flow(**changes: Any) -> dict[str, Any]:
    parameters = {"flow_message_version": "3", "flow_id": "1", "flow_cta": "Go"} | changes
    return {"type": "flow", "body": {"text": "?"}, "action": {"name": "flow", "parameters": parameters}}


def a_link(**changes: Any) -> dict[str, Any]:
    parameters = {"display_text": "Open", "url": "https://example.com/a?b=c"} | changes
    return {"type": "cta_url", "body": {"text": "?"}, "action": {"name": "cta_url", "parameters": parameters}}


def a_template(*components: Any, **changes: Any) -> dict[str, Any]:
    return {"name": "pedido_enviado", "language": {"code": "pt_BR"}, "components": list(components)} | changes


def url_button(index: Any, **changes: Any) -> dict[str, Any]:
    parameters = [{"type": "text", "text": "4410"}]
    return {"type": "button", "sub_type": "url", "index": index, "parameters": parameters} | changes


# --------------------------------------------------------------------------------------------------- what is understood


def test_a_text_may_be_a_plain_string() -> None:
    assert body(ask(type="text", text="Olá")) == {"text": {"body": "Olá"}}
    assert body(ask(type="text", text={"body": "Olá", "preview_url": True})) == {
        "text": {"body": "Olá", "preview_url": True}
    }


def test_a_reply_names_the_message_it_is_known_by_best() -> None:
    one = ask(type="text", text="Olá", reply_to="our-id")

    assert one.reference == ("our-id", "$.reply_to")
    assert body(one, "wamid.X") == {"text": {"body": "Olá"}, "context": {"message_id": "wamid.X"}}


def test_a_file_of_ours_is_named_with_the_field_that_it_stands_in() -> None:
    id_ = "0198c0de-0198-70de-8198-c0de0198c0de"
    given = {"media_id": id_, "caption": "c", "mime_type": "image/png", "bytes": 10}
    headers = [{"type": "header", "parameters": [{"type": "video", "video": {"media_id": id_}}]}]
    cards = [{"card_index": 0, "components": headers}]
    template = {"name": "a", "language": "pt_BR", "components": [{"type": "carousel", "cards": cards}]}
    at = "$.template.components[0].cards[0].components[0].parameters[0].video.media_id"

    assert body(ask(type="image", media=given)) == {"image": {"media_id": id_, "caption": "c"}}
    assert ask(type="image", media=given).files == (OwnFile(id_, "$.media.media_id", "image"),)
    assert ask(type="template", template=template).files == (OwnFile(id_, at, "video"),)
    assert ask(
        type="interactive", interactive=buttons(a_button(), header={"type": "document", "document": {"media_id": id_}})
    ).files == (OwnFile(id_, "$.interactive.header.document.media_id", "document"),)
    assert ask(type="image", image={"id": "1"}).files == ()
    assert old(to=TO, type="image", content={"media_id": id_}).files == (OwnFile(id_, "$.content.media_id", "image"),)


@pytest.mark.parametrize("kind", ["image", "video", "audio", "document", "sticker"])
def test_a_file_may_be_under_its_type_or_under_media(kind: str) -> None:
    by_type = body(ask(type=kind, **{kind: {"id": "920000000000001"}}))
    by_media = body(ask(type=kind, media={"link": "https://example.com/a.bin"}))

    assert by_type == {kind: {"id": "920000000000001"}}
    assert by_media == {kind: {"link": "https://example.com/a.bin"}}


def test_what_the_caller_knows_of_a_file_is_not_sent_on() -> None:
    file = {"id": "1", "mime_type": "audio/ogg; codecs=opus", "bytes": 16 * 1024 * 1024, "voice": True}

    assert body(ask(type="audio", audio=file)) == {"audio": {"id": "1", "voice": True}}


GOOD: list[tuple[str, Any]] = [
    ("image", {"id": "1", "caption": "c" * 1024}),
    ("document", {"link": "http://example.com:8080/a.pdf", "caption": "c", "filename": "f" * 240}),
    ("location", {"latitude": -90, "longitude": 180, "name": "Loja", "address": "Rua 1"}),
    ("contacts", [{"name": {"formatted_name": "Ana"}, "phones": [{"phone": "+55 48 95555-0002", "type": "CELL"}]}]),
    ("contacts", [{"name": {"formatted_name": "Ana"}}] * 257),
    ("reaction", {"message_id": "m", "emoji": "👍"}),
    ("interactive", buttons(a_button(1), a_button(2), a_button(3), footer={"text": "f" * 60})),
    ("interactive", buttons(a_button(id="i" * 256, title="t" * 20), header={"type": "text", "text": "h" * 60})),
    ("interactive", buttons(a_button(), header={"type": "image", "image": {"id": "1"}})),
    ("interactive", rows(5, 5)),
    ("interactive", a_row(id="i" * 200, title="t" * 24, description="d" * 72)),
    ("interactive", a_link()),
    ("interactive", a_flow()),
    ("interactive", a_flow(flow_action="navigate", flow_action_payload={"screen": "A", "data": {"a": [1]}})),
    ("interactive", {"type": "location_request_message", "body": {"text": "?"}, "action": {"name": "send_location"}}),
    (
        "interactive",
        {"type": "request_contact_info", "body": {"text": "?"}, "action": {"name": "request_contact_info"}},
    ),
    ("interactive", {"type": "call_permission_request", "action": {"name": "call_permission_request"}}),
    ("interactive", {"type": "catalog_message", "body": {"text": "?"}, "action": {"name": "catalog_message"}}),
    ("interactive", {"type": "product", "action": {"catalog_id": "1", "product_retailer_id": "a"}}),
    (
        "interactive",
        {
            "type": "product_list",
            "header": {"type": "text", "text": "H"},
            "body": {"text": "?"},
            "action": {"catalog_id": "1", "sections": [{"title": "S", "product_items": []}]},
        },
    ),
    ("interactive", {"type": "carousel", "body": {"text": "?"}, "action": {"cards": [{"card_index": 0}]}}),
    ("template", {"name": "hello_world", "language": {"code": "en_US", "policy": "deterministic"}}),
    (
        "template",
        a_template(
            {"type": "header", "parameters": [{"type": "document", "document": {"id": "92", "filename": "nf.pdf"}}]},
            {
                "type": "body",
                "parameters": [
                    {"type": "text", "text": "Bia"},
                    {"type": "text", "text": "#4410", "parameter_name": "order"},
                    {
                        "type": "currency",
                        "currency": {"fallback_value": "R$ 1", "code": "BRL", "amount_1000": 1000},
                    },
                    {"type": "date_time", "date_time": {"fallback_value": "today"}},
                ],
            },
            url_button("0"),
            url_button("1", sub_type="quick_reply", parameters=[{"type": "payload", "payload": "help:4410"}]),
            url_button("2", sub_type="copy_code", parameters=[{"type": "coupon_code", "coupon_code": "25OFF"}]),
            url_button("3", sub_type="flow", parameters=[{"type": "action", "action": {"flow_token": "t"}}]),
        ),
    ),
    (
        "template",
        a_template(
            {
                "type": "limited_time_offer",
                "parameters": [
                    {"type": "limited_time_offer", "limited_time_offer": {"expiration_time_ms": 1788000000000}}
                ],
            },
            {
                "type": "carousel",
                "cards": [
                    {
                        "card_index": n,
                        "components": [
                            {"type": "header", "parameters": [{"type": "image", "image": {"id": "9"}}]},
                            url_button("0"),
                        ],
                    }
                    for n in range(10)
                ],
            },
        ),
    ),
]


@pytest.mark.parametrize("given", GOOD, ids=lambda given: given[0])
def test_what_the_provider_takes_goes_on_as_it_came(given: tuple[str, Any]) -> None:
    type_, content = given

    one = ask(type=type_, **{type_: content})

    reference = one.reference.name if one.reference else None
    assert body(one, reference) == {type_: content}


def test_a_template_is_written_the_long_way() -> None:
    one = ask(type="template", template=a_template(url_button(0), language="pt_BR"))

    assert one.template == ("pedido_enviado", "pt_BR")
    assert one.element["language"] == {"code": "pt_BR"}
    assert one.element["components"][0]["index"] == "0"


def test_an_empty_emoji_takes_a_reaction_back() -> None:
    one = ask(type="reaction", reaction={"message_id": "our-id", "emoji": ""})

    assert one.reference == ("our-id", "$.reaction.message_id")
    assert body(one, "wamid.X") == {"reaction": {"message_id": "wamid.X", "emoji": ""}}


def test_a_read_receipt_needs_the_message_alone() -> None:
    one = asked(b'{"type": "read", "message_id": "wamid.X"}')

    assert (one.recipient, one.reference) == (None, ("wamid.X", "$.message_id"))
    assert body(one, "wamid.X") == {"read": {"message_id": "wamid.X"}}


def test_null_is_the_same_as_nothing() -> None:
    one = ask(type="text", text="Olá", channel=None, reply_to=None, not_before=None)

    assert (one.channel, one.reference, one.not_before) == (None, None, None)


# ----------------------------------------------------------------------------------------------------------- recipients


@pytest.mark.parametrize(
    "to",
    ["+5511944440001", "+551144440001", "+12025550100", "+447911123456", "BR.A1b2C3", "BR.ENT.90000000000000001"],
)
def test_a_recipient_is_a_number_with_its_plus_or_a_bsuid(to: str) -> None:
    assert ask(type="text", text="Olá", to=to).recipient == to


def test_digits_without_a_plus_are_refused_with_the_reason() -> None:
    failure = refused(type="text", text="Olá", to="5511944440001")

    assert failure.status == 422
    assert failure.details["field"] == "$.to"
    assert "+" in failure.message
    assert "country" in failure.message
    assert "5511944440001" not in failure.message


@pytest.mark.parametrize(
    "to",
    [
        "+1",
        "+1234567",
        "+5511",
        "+999123456789",
        "+1234567890123456",
        "+55 11 94444-0001",
        "+５５11944440001",
        "+5511944440001\n",
        "br.A1",
        "BR.",
        "BR." + "x" * 129,
        "BR.A1\n",
        "BR.ENT.",
        "someone@example.com",
        "",
        7,
        ["+5511944440001"],
    ],
)
def test_what_is_no_recipient_is_refused_by_name(to: Any) -> None:
    assert refused(type="text", text="Olá", to=to).details["field"] == "$.to"


# ----------------------------------------------------------------------------------------------------------------- time


def test_not_before_needs_an_offset_and_is_kept_in_utc() -> None:
    at = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=5)
    given = (at - timedelta(hours=3)).replace(tzinfo=None).isoformat() + "-03:00"

    assert ask(type="text", text="Olá", not_before=given).not_before == at
    assert ask(type="text", text="Olá", not_before=at.isoformat()).not_before == at


@pytest.mark.parametrize(
    "at",
    ["tomorrow", "2026-10-01", "2026-10-01T09:00:00", "2026-13-01T09:00:00Z", 1_788_000_000, True, {}, ""],
)
def test_not_before_in_another_form_is_refused(at: Any) -> None:
    assert refused(type="text", text="Olá", not_before=at).details["field"] == "$.not_before"


@pytest.mark.parametrize("at", [(datetime.now(UTC) + MOST_AHEAD).replace(year=2099), "9999-12-31T23:59:59-23:59"])
def test_not_before_is_at_most_thirty_days_ahead(at: Any) -> None:
    failure = refused(type="text", text="Olá", not_before=at if isinstance(at, str) else at.isoformat())

    assert failure.details == {"field": "$.not_before", "limit": 30}


# --------------------------------------------------------------------------------------------------------------- limits

FIELDS: list[tuple[str, Any, str, Any]] = [
    # type, content, the field that is wrong, its limit
    ("text", "", "$.text", 1),
    ("text", "x" * 4097, "$.text", 4096),
    ("text", {"body": ""}, "$.text.body", 1),
    ("text", {"body": "x" * 4097}, "$.text.body", 4096),
    ("text", {}, "$.text.body", None),
    ("text", {"body": 7}, "$.text.body", None),
    ("text", 7, "$.text", None),
    ("text", {"body": "x", "preview_url": "yes"}, "$.text.preview_url", None),
    ("text", {"body": "x", "colour": "red"}, "$.text.colour", None),
    ("image", {}, "$.image", ["media_id", "id", "link"]),
    ("image", {"id": "1", "link": "https://example.com/a"}, "$.image", ["media_id", "id", "link"]),
    ("image", {"id": "1", "caption": "x" * 1025}, "$.image.caption", 1024),
    ("image", {"id": "1", "filename": "x"}, "$.image.filename", None),
    ("image", {"id": "../1"}, "$.image.id", None),
    ("image", {"id": "1", "mime_type": "image/gif"}, "$.image.mime_type", ["image/jpeg", "image/png"]),
    ("image", {"id": "1", "bytes": 5 * 1024 * 1024 + 1}, "$.image.bytes", 5 * 1024 * 1024),
    ("image", {"id": "1", "bytes": 0}, "$.image.bytes", 1),
    ("video", {"id": "1", "bytes": 16 * 1024 * 1024 + 1}, "$.video.bytes", 16 * 1024 * 1024),
    ("video", {"id": "1", "mime_type": "video/webm"}, "$.video.mime_type", ["video/mp4", "video/3gpp"]),
    ("audio", {"id": "1", "caption": "x"}, "$.audio.caption", None),
    ("audio", {"id": "1", "bytes": 16 * 1024 * 1024 + 1}, "$.audio.bytes", 16 * 1024 * 1024),
    ("audio", {"id": "1", "voice": 1}, "$.audio.voice", None),
    ("document", {"id": "1", "filename": "x" * 241}, "$.document.filename", 240),
    ("document", {"id": "1", "bytes": 100 * 1024 * 1024 + 1}, "$.document.bytes", 100 * 1024 * 1024),
    ("document", {"id": "1", "voice": True}, "$.document.voice", None),
    ("sticker", {"id": "1", "caption": "x"}, "$.sticker.caption", None),
    ("sticker", {"id": "1", "mime_type": "image/png"}, "$.sticker.mime_type", ["image/webp"]),
    ("sticker", {"id": "1", "bytes": 500 * 1024 + 1}, "$.sticker.bytes", 500 * 1024),
    ("location", {"latitude": 90.1, "longitude": 0}, "$.location.latitude", 90),
    ("location", {"latitude": 0, "longitude": -181}, "$.location.longitude", -180),
    ("location", {"latitude": "0", "longitude": 0}, "$.location.latitude", None),
    ("location", {"latitude": 0}, "$.location.longitude", None),
    ("contacts", [], "$.contacts", 1),
    ("contacts", [{"name": {"formatted_name": "A"}}] * 258, "$.contacts", 257),
    ("contacts", [{"name": {"first_name": "A"}}], "$.contacts[0].name.formatted_name", None),
    ("contacts", [{"phones": []}], "$.contacts[0].name", None),
    ("contacts", [{"name": {"formatted_name": "A"}, "birthday": "31/12"}], "$.contacts[0].birthday", None),
    ("contacts", {}, "$.contacts", None),
    ("reaction", {"message_id": "m", "emoji": "x" * 33}, "$.reaction.emoji", 32),
    ("reaction", {"emoji": "x"}, "$.reaction.message_id", None),
    ("reaction", {"message_id": "m"}, "$.reaction.emoji", None),
    ("reaction", {"message_id": "x" * 513, "emoji": "x"}, "$.reaction.message_id", 512),
    ("interactive", {}, "$.interactive.type", None),
    ("interactive", buttons(), "$.interactive.action.buttons", 1),
    ("interactive", buttons(*(a_button(n) for n in range(4))), "$.interactive.action.buttons", 3),
    ("interactive", buttons(a_button(title="t" * 21)), "$.interactive.action.buttons[0].reply.title", 20),
    ("interactive", buttons(a_button(id="i" * 257)), "$.interactive.action.buttons[0].reply.id", 256),
    ("interactive", buttons(a_button(), a_button(title="x")), "$.interactive.action.buttons[1].reply.id", None),
    (
        "interactive",
        buttons(a_button(1, title="x"), a_button(2, title="x")),
        "$.interactive.action.buttons[1].reply.title",
        None,
    ),
    ("interactive", buttons(a_button(), body={"text": "x" * 1025}), "$.interactive.body.text", 1024),
    ("interactive", buttons(a_button(), footer={"text": "x" * 61}), "$.interactive.footer.text", 60),
    (
        "interactive",
        buttons(a_button(), header={"type": "text", "text": "x" * 61}),
        "$.interactive.header.text",
        60,
    ),
    (
        "interactive",
        buttons(a_button(), header={"type": "image", "image": {"id": "1", "link": "https://example.com"}}),
        "$.interactive.header.image",
        ["media_id", "id", "link"],
    ),
    (
        "interactive",
        buttons(a_button(), header={"type": SECRET}),
        "$.interactive.header.type",
        ["document", "image", "text", "video"],
    ),
    ("interactive", buttons({"type": SECRET}), "$.interactive.action.buttons[0].type", ["reply"]),
    ("interactive", rows(), "$.interactive.action.sections", 1),
    ("interactive", rows(*[1] * 11), "$.interactive.action.sections", 10),
    ("interactive", rows(6, 5), "$.interactive.action.sections", 10),
    ("interactive", rows(11), "$.interactive.action.sections[0].rows", 10),
    ("interactive", rows(1, body={"text": "x" * 4097}), "$.interactive.body.text", 4096),
    ("interactive", a_row(title="t" * 25), "$.interactive.action.sections[0].rows[0].title", 24),
    ("interactive", a_row(id="i" * 201), "$.interactive.action.sections[0].rows[0].id", 200),
    ("interactive", a_row(description="d" * 73), "$.interactive.action.sections[0].rows[0].description", 72),
    ("interactive", a_link(display_text="x" * 21), "$.interactive.action.parameters.display_text", 20),
    ("interactive", a_link(url="javascript:alert(1)"), "$.interactive.action.parameters.url", None),
    ("interactive", a_flow(flow_name="x"), "$.interactive.action.parameters", ["flow_id", "flow_name"]),
    ("interactive", a_flow(flow_id=None), "$.interactive.action.parameters", ["flow_id", "flow_name"]),
    ("interactive", a_flow(flow_cta="x" * 31), "$.interactive.action.parameters.flow_cta", 30),
    (
        "interactive",
        a_flow(flow_action_payload={"data": "x" * 20_000}),
        "$.interactive.action.parameters.flow_action_payload",
        16 * 1024,
    ),
    (
        "interactive",
        {"type": "product", "action": {"x": "x" * 20_000}},
        "$.interactive.action",
        16 * 1024,
    ),
    ("template", {"language": "pt_BR"}, "$.template.name", None),
    ("template", a_template(name="Pedido Enviado"), "$.template.name", None),
    ("template", a_template(name="x" * 513), "$.template.name", 512),
    ("template", a_template(language="pt-BR!"), "$.template.language", None),
    ("template", a_template(language={"code": "x" * 17}), "$.template.language.code", 16),
    ("template", a_template(language={}), "$.template.language.code", None),
    (
        "template",
        a_template({"type": SECRET}),
        "$.template.components[0].type",
        ["body", "button", "carousel", "header", "limited_time_offer"],
    ),
    (
        "template",
        a_template({"type": "header", "parameters": [{"type": "payload", "payload": "x"}]}),
        "$.template.components[0].parameters[0].type",
        ["document", "image", "location", "text", "video"],
    ),
    ("template", a_template({"type": "header", "parameters": []}), "$.template.components[0].parameters", 1),
    (
        "template",
        a_template({"type": "body", "parameters": []}, {"type": "body", "parameters": []}),
        "$.template.components[1]",
        None,
    ),
    ("template", a_template(url_button("10")), "$.template.components[0].index", 1),
    ("template", a_template(url_button(10)), "$.template.components[0].index", 9),
    ("template", a_template(*(url_button(n % 10) for n in range(11))), "$.template.components[10].index", None),
    ("template", a_template(*(url_button(n) for n in range(15))), "$.template.components", 14),
    (
        "template",
        a_template(url_button("0", sub_type="quick_reply")),
        "$.template.components[0].parameters[0].type",
        ["payload"],
    ),
    (
        "template",
        a_template(url_button("0", sub_type=SECRET)),
        "$.template.components[0].sub_type",
        ["catalog", "copy_code", "flow", "mpm", "quick_reply", "url"],
    ),
    (
        "template",
        a_template({"type": "header", "parameters": [{"type": "image", "image": {}}]}),
        "$.template.components[0].parameters[0].image",
        ["media_id", "id", "link"],
    ),
    (
        "template",
        a_template({"type": "carousel", "cards": [{"card_index": 0, "components": [url_button(1), url_button("1")]}]}),
        "$.template.components[0].cards[0].components[1].index",
        None,
    ),
]


@pytest.mark.parametrize("given", FIELDS, ids=lambda given: f"{given[2]}-{given[3]}")
def test_an_error_names_the_field_and_its_limit(given: tuple[str, Any, str, Any]) -> None:
    type_, content, field, limit = given

    failure = refused(type=type_, **{type_: content})

    assert (failure.status, failure.code) == (422, "INVALID_PAYLOAD")
    assert failure.details["field"] == field
    assert failure.details.get("limit") == limit
    assert failure.message.startswith(f"{field} ")
    if isinstance(limit, int):
        assert str(limit) in failure.message


@pytest.mark.parametrize(
    "link",
    [
        "ftp://example.com/a",
        "file:///etc/passwd",
        "example.com/a",
        "https://",
        "https://me:secret@example.com/a",
        "https://me@example.com/a",
        "https://example.com/a b",
        "https://example.com/\r\nX: y",
        "https://[::1/a",
        "https://example.com:99999/",
        "https://example.com/" + "x" * 2048,
    ],
)
def test_a_link_is_a_link_without_credentials(link: str) -> None:
    failure = refused(type="image", image={"link": link})

    assert failure.details["field"] == "$.image.link"
    assert "secret" not in failure.message


# ------------------------------------------------------------------------------------------------------------- envelope


def test_an_unknown_type_is_told_what_there_is() -> None:
    failure = refused(type=SECRET)

    assert failure.details == {"field": "$.type", "limit": list(TYPES)}
    assert SECRET not in failure.message


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, "$.type"),
        ({"type": "text"}, "$.text"),
        ({"type": "text", "text": "x", "to": None}, "$.to"),
        ({"type": "text", "text": "x", "image": {"id": "1"}}, "$.image"),
        ({"type": "text", "text": "x", "media": {"id": "1"}}, "$.media"),
        ({"type": "image", "image": {"id": "1"}, "media": {"id": "1"}}, "$.media"),
        ({"type": "text", "text": "x", "message_id": "m"}, "$.message_id"),
        ({"type": "text", "text": "x", "colour": "red"}, "$.colour"),
        ({"type": "text", "text": "x", "channel": ""}, "$.channel"),
        ({"type": "text", "text": "x", "channel": 7}, "$.channel"),
        ({"type": "text", "text": "x", "reply_to": "x" * 513}, "$.reply_to"),
        ({"type": "reaction", "reaction": {"message_id": "m", "emoji": ""}, "reply_to": "m"}, "$.reply_to"),
        ({"type": "read", "message_id": "m"}, "$.to"),
        ({"type": "read", "to": None}, "$.message_id"),
        ({"type": "read", "to": None, "message_id": "m", "read": {}}, "$.read"),
        ({"type": "read", "to": None, "message_id": "m", "reply_to": "m"}, "$.reply_to"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_belong_or_is_missing_is_named(given: dict[str, Any], field: str) -> None:
    failure = refused(**given)

    assert failure.status == 422
    assert failure.details["field"] == field


def test_an_unknown_field_is_named_only_if_its_name_can_be_repeated() -> None:
    assert refused(**{"type": "text", "text": "x", "<script>": 1}).details["field"] == "$.?"
    assert refused(type="text", text={"body": "x", "é`x - at `$.y": 1}).details["field"].startswith("$.text")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe{\x00}\x00",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'"\xed\xa0\x80"',
    ],
)
def test_what_is_not_json_is_refused(raw: bytes) -> None:
    failure = refused_raw(raw)

    assert (failure.status, failure.code) == (400, "INVALID_PAYLOAD")


@pytest.mark.parametrize("raw", [b"[]", b"7", b'"x"', b"null", b"true"])
def test_a_body_that_is_no_object_is_refused(raw: bytes) -> None:
    assert refused_raw(raw).details == {"field": "$"}


@pytest.mark.parametrize("half", ["\\ud800", "\\udc00", "\\ud800\\ud800", "\\ud800x"])
def test_half_a_surrogate_pair_is_refused_by_its_field(half: str) -> None:
    raw = '{"to": "+5511944440001", "type": "text", "text": {"body": "aHALFb"}}'.replace("HALF", half)

    failure = refused_raw(raw.encode())

    assert (failure.status, failure.details["field"]) == (422, "$.text.body")


def test_a_nul_is_refused_by_its_field() -> None:
    card = {"name": {"formatted_name": "a\x00b"}}

    assert refused(type="contacts", contacts=[card]).details["field"] == "$.contacts[0].name.formatted_name"
    assert refused(**{"type": "text", "text": "x", "a\x00": 1}).details["field"] == "$"


def nested(levels: int) -> bytes:
    """A request of so many levels, in the one place where anything goes."""
    rest = levels - 4
    given = {"to": TO, "type": "interactive", "interactive": {"type": "product", "action": {"x": "HERE"}}}
    return json.dumps(given).replace('"HERE"', "[" * (rest + 1) + "]" * (rest + 1)).encode()


@pytest.mark.parametrize("levels", [33, 100, 300])
def test_a_request_has_at_most_32_levels(levels: int) -> None:
    assert asked(nested(32)).type == "interactive"
    assert refused_raw(nested(levels)).details == {"field": "$", "limit": 32}


def test_a_backslash_before_u0000_is_no_nul() -> None:
    assert ask(type="text", text="\\u0000").element == {"body": "\\u0000"}


def test_an_error_never_repeats_what_was_sent() -> None:
    """Wherever in a request a value stands, and whatever is wrong with it."""
    wrong: list[Any] = [SECRET, [SECRET], {SECRET: SECRET}, {"type": SECRET}, {"id": SECRET, "link": SECRET}]
    seen = 0
    for type_ in TYPES:
        for value in wrong:
            for given in (
                {"type": type_, type_: value},
                {"type": type_, "media": value},
                {"type": type_, type_: {"type": value, "body": value, "language": value, "components": [value]}},
                {"type": value, "text": SECRET},
                {"type": "text", "text": "x", "to": value},
                {"type": "text", "text": "x", "not_before": value},
                {"type": "text", "text": "x", "channel": value, "reply_to": value},
            ):
                try:
                    asked(json.dumps({"to": TO} | given).encode())
                except Failure as failure:
                    told = json.dumps([failure.message, failure.details])
                    assert SECRET not in told.replace(f".{SECRET}", "").replace(f"field: {SECRET}", ""), given
                    seen += 1
    assert seen > 200


# --------------------------------------------------------------------------------------------------------------- digest


def test_the_digest_covers_all_that_was_asked_but_not_its_order_or_spaces() -> None:
    one = asked(b'{"to":"+5511944440001","type":"text","text":"a"}').digest

    assert asked(b'{ "text": "a", "type": "text",\n "to": "+5511944440001" }').digest == one
    for other in (
        {"text": "b"},
        {"text": "a", "to": "+5511944440002"},
        {"text": "a", "channel": "c"},
        {"text": "a", "reply_to": "m"},
        {"text": "a", "not_before": "2026-01-01T00:00:00Z"},
    ):
        assert ask(type="text", **other).digest != one, other


# ------------------------------------------------------------------------------------------------------------- old form


def test_the_old_form_takes_digits_and_plain_content() -> None:
    one = old(to="5511944440001", type="text", content="Olá")

    assert (one.recipient, one.type, body(one)) == (TO, "text", {"text": {"body": "Olá"}})
    assert old(to=TO, type="text", content="Olá").recipient == TO
    assert old(to="BR.A1b2C3", type="text", content={"body": "Olá"}, channel="c").channel == "c"


def test_the_old_form_takes_every_type() -> None:
    assert body(old(to=TO, type="image", content={"id": "1"})) == {"image": {"id": "1"}}
    assert old(to=TO, type="template", content=a_template()).template == ("pedido_enviado", "pt_BR")
    assert old(to=TO, type="read", content={"message_id": "m"}).reference == ("m", "$.message_id")
    assert old(to=TO, type="contacts", content=GOOD[3][1]).type == "contacts"


@pytest.mark.parametrize(
    ("given", "field", "limit"),
    [
        ({"type": "text", "content": "x"}, "$.to", None),
        ({"to": TO, "content": "x"}, "$.type", None),
        ({"to": TO, "type": "text"}, "$.content", None),
        ({"to": TO, "type": "text", "content": ""}, "$.content", 1),
        ({"to": TO, "type": "text", "content": {"body": "x" * 4097}}, "$.content.body", 4096),
        ({"to": TO, "type": "image", "content": {}}, "$.content", ["media_id", "id", "link"]),
        ({"to": TO, "type": "image", "content": "x"}, "$.content", None),
        ({"to": TO, "type": "reaction", "content": {"emoji": ""}}, "$.content.message_id", None),
        ({"to": TO, "type": "text", "content": "x", "text": "x"}, "$.text", None),
        ({"to": TO, "type": "read", "content": {}}, "$.content", None),
        ({"to": TO, "type": "read", "content": {"message_id": "m", "x": 1}}, "$.content", None),
        ({"to": TO, "type": SECRET, "content": "x"}, "$.type", list(TYPES)),
        ({"to": "(11) 94444-0001", "type": "text", "content": "x"}, "$.to", [8, 15]),
    ],
)
def test_the_old_form_names_its_own_fields(given: dict[str, Any], field: str, limit: Any) -> None:
    with pytest.raises(Failure) as caught:
        old(**given)

    assert caught.value.details["field"] == field
    assert caught.value.details.get("limit") == limit
