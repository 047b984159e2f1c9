"""What Meta's webhook bodies turn into. The samples are the examples of whatsapp-cloud-api.md §3, §6 and §7."""

import copy
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pombal.errors import Rejected
from providers.inbound import (
    Called,
    Change,
    Connection,
    File,
    Message,
    Notice,
    Parsed,
    Person,
    Reject,
    Status,
    TemplateStatus,
)
from providers.meta import parse

SAMPLES = Path(__file__).parent.parent / "samples"
NOW = datetime(2026, 9, 1, 12, 0, tzinfo=UTC)
NUMBER = "880011223344556"
WABA = "700100200300400"
VALUE = "$.entry[0].changes[0].value"


def sample(name: str) -> Any:
    return json.loads((SAMPLES / f"{name}.json").read_text())


MESSAGES: dict[str, dict[str, Any]] = {element["id"]: element for element in sample("messages")}
STATUSES: list[dict[str, Any]] = sample("statuses")


def a_message(**keys: Any) -> dict[str, Any]:
    base = {"from": "5511944440001", "id": "wamid.A", "timestamp": "1788000001", "type": "text", "text": {"body": "oi"}}
    return {key: value for key, value in (base | keys).items() if value is not ...}


def a_value(**keys: Any) -> dict[str, Any]:
    metadata = {"display_phone_number": "5511955550100", "phone_number_id": NUMBER}
    return {"messaging_product": "whatsapp", "metadata": metadata} | keys


def a_body(*values: Any, field: Any = "messages", **entry: Any) -> dict[str, Any]:
    changes = [{"field": field, "value": value} for value in values]
    return {"object": "whatsapp_business_account", "entry": [{"id": WABA, "changes": changes} | entry]}


def read(body: Any) -> Parsed:
    return parse(json.dumps(body).encode(), NOW)


def items(body: Any) -> list[Any]:
    parsed = read(body)
    assert parsed.rejects == []
    return [item for change in parsed.changes for item in change.items]


def message(element: dict[str, Any], **value: Any) -> Message:
    (item,) = items(a_body(a_value(messages=[element], **value)))
    assert isinstance(item, Message)
    return item


def status(**keys: Any) -> Status:
    (item,) = items(a_body(a_value(statuses=[{"id": "wamid.O", "status": "sent", "timestamp": "1788000100"} | keys])))
    assert isinstance(item, Status)
    return item


def reject(body: Any) -> Reject:
    parsed = read(body)
    assert parsed.changes == []
    (only,) = parsed.rejects
    return only


def nested(levels: int) -> Any:
    value: Any = "deep"
    for _ in range(levels):
        value = [value]
    return value


# -- envelope --------------------------------------------------------------------------------------------------------


def test_the_envelope_of_the_sheet_is_one_message_for_one_number() -> None:
    parsed = read(sample("envelope"))

    assert parsed.rejects == []
    assert parsed.ignored is None
    (change,) = parsed.changes
    assert (change.path, change.number, change.waba) == ("$.entry[0].changes[0]", NUMBER, WABA)
    person = Person((("bsuid", "BR.90000000000000001"), ("phone", "5511944440001")), "Bia Prado")
    assert change.items == [
        Message(
            path=f"{VALUE}.messages[0]",
            provider_id="wamid.TESTAAA1",
            direction="in",
            type="text",
            body={"text": {"body": "Bom dia"}, "from_parent_user_id": "BR.ENT.70000000000000001"},
            person=person,
            chat=person,
            at=datetime.fromtimestamp(1788000000, UTC),
        )
    ]


def test_every_entry_change_message_and_status_is_read() -> None:
    value = a_value(messages=[a_message(id="a"), a_message(id="b")], statuses=STATUSES[:2])
    body = a_body(value, value)
    body["entry"].append(a_body(value)["entry"][0])

    parsed = read(body)

    assert [change.path for change in parsed.changes] == [
        "$.entry[0].changes[0]",
        "$.entry[0].changes[1]",
        "$.entry[1].changes[0]",
    ]
    for change in parsed.changes:
        assert [item.path for item in change.items] == [
            f"{change.path}.value.{element}" for element in ("messages[0]", "messages[1]", "statuses[0]", "statuses[1]")
        ]


def test_a_body_about_something_else_is_ignored() -> None:
    assert read({"object": "instagram", "entry": []}) == Parsed(
        [], [], ignored="object is not whatsapp_business_account"
    )


def test_an_empty_body_of_ours_says_nothing() -> None:
    assert read({"object": "whatsapp_business_account", "entry": []}) == Parsed([], [])


def test_ids_may_be_numbers() -> None:
    body = a_body(a_value(messages=[a_message(id=77, **{"from": 5511944440001})]), id=123)
    body["entry"][0]["changes"][0]["value"]["metadata"]["phone_number_id"] = 456

    (change,) = read(body).changes

    assert (change.number, change.waba) == ("456", "123")
    assert isinstance(change.items[0], Message)
    assert change.items[0].provider_id == "77"
    assert change.items[0].person.identities == (("phone", "5511944440001"),)


# -- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element", MESSAGES.values(), ids=lambda element: f"{element['id']}-{element['type']}")
def test_every_message_of_the_sheet_keeps_its_type_and_all_it_said(element: dict[str, Any]) -> None:
    made = message(element)

    assert (made.provider_id, made.type, made.direction) == (element["id"], element["type"], "in")
    assert made.at == datetime.fromtimestamp(int(element["timestamp"]), UTC)
    assert made.body == {
        key: value for key, value in element.items() if key not in ("id", "from", "from_user_id", "timestamp", "type")
    }
    assert (made.file is not None) == (element["type"] in ("image", "audio"))


def test_a_media_message_names_its_file() -> None:
    sha256 = "m04pFf2ERdaopTyFkGPA0+bX3i+YY2dYgVFwOgDLSDI="

    assert message(MESSAGES["wamid.T1"]).file == File("910000000000001", "image", "image/jpeg", sha256)
    assert message(MESSAGES["wamid.T2"]).file == File("910000000000002", "audio", "audio/ogg; codecs=opus", sha256)


@pytest.mark.parametrize("kind", ["image", "video", "audio", "voice", "document", "sticker"])
def test_every_kind_of_media_has_a_file(kind: str) -> None:
    media = {"id": 91, "mime_type": "a/b", "sha256": "x", "filename": "../../nf.pdf"}

    assert message(a_message(type=kind, **{kind: media})).file == File("91", kind, "a/b", "x", "../../nf.pdf")


@pytest.mark.parametrize("media", [..., None, {}, [], "x", {"id": None}, {"mime_type": "image/jpeg"}])
def test_a_media_message_without_an_id_is_a_message_without_a_file(media: Any) -> None:
    made = message(a_message(type="image", image=media))

    assert (made.type, made.file) == ("image", None)


def test_file_details_of_a_wrong_type_count_as_absent() -> None:
    assert message(a_message(type="image", image={"id": "9", "mime_type": 1, "sha256": []})).file == File("9", "image")


def test_media_inside_an_edit_is_a_file() -> None:
    edit = {"original_message_id": "wamid.T1", "message": {"type": "image", "image": {"id": "91"}}}

    assert message(a_message(type="edit", edit=edit)).file == File("91", "image")


@pytest.mark.parametrize("edit", [None, [], {}, {"message": None}, {"message": {"type": ["image"]}}])
def test_an_odd_edit_is_still_a_message(edit: Any) -> None:
    assert message(a_message(type="edit", edit=edit)).file is None


def test_a_type_nobody_knows_is_kept_whole() -> None:
    made = message(a_message(type="hologram", hologram={"x": [1, 2.5, None]}, sparkle=True))

    assert made.type == "hologram"
    assert made.body == {"text": {"body": "oi"}, "hologram": {"x": [1, 2.5, None]}, "sparkle": True}


def test_a_message_without_type_is_unknown() -> None:
    assert message(a_message(type=...)).type == "unknown"


def test_an_interactive_message_that_lost_its_object_takes_the_errors_beside_it() -> None:
    errors = [{"code": 131000, "title": "Something went wrong"}]

    made = message(a_message(type="interactive", text=...), errors=errors)

    assert made.body == {"errors": errors}


def test_a_request_welcome_is_a_notice() -> None:
    element = a_message(type="request_welcome", text=...)

    (made,) = items(a_body(a_value(messages=[element])))

    assert isinstance(made, Notice)
    assert (made.type, made.payload, made.at) == (
        "request_welcome",
        element,
        datetime.fromtimestamp(1788000001, UTC),
    )


def test_errors_without_a_message_are_a_notice() -> None:
    errors = [{"code": 130429, "title": "Rate limit hit"}]

    (made,) = items(a_body(a_value(errors=errors)))

    assert isinstance(made, Notice)
    assert (made.path, made.type) == (f"{VALUE}.errors", "errors")
    assert made.payload["errors"] == errors
    assert made.payload["metadata"]["phone_number_id"] == NUMBER


def test_the_same_error_is_news_on_another_number_and_on_another_day() -> None:
    errors = [{"code": 130429, "title": "Rate limit hit"}]
    here = json.dumps(a_body(a_value(errors=errors))).encode()
    there = here.replace(NUMBER.encode(), b"1234567")

    digests = [
        item.digest
        for raw, at in ((here, NOW), (here, NOW), (there, NOW), (here, NOW + timedelta(days=1)))
        for change in parse(raw, at).changes
        for item in change.items
        if isinstance(item, Notice)
    ]

    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_errors_beside_several_messages_are_a_notice() -> None:
    made = items(a_body(a_value(messages=[a_message(), a_message(id="b")], errors=[{"code": 1}])))

    assert [type(item) for item in made] == [Message, Message, Notice]


def test_a_messages_value_with_nothing_we_know_is_kept() -> None:
    value = a_value(holograms=[{"id": "1"}])

    (made,) = items(a_body(value))

    assert isinstance(made, Notice)
    assert (made.type, made.payload) == ("messages", value)


# -- who -------------------------------------------------------------------------------------------------------------


def test_contacts_are_paired_by_id_and_not_by_index() -> None:
    contacts = [
        {"profile": {"name": "Bia"}, "wa_id": "2", "user_id": "BR.2"},
        {"profile": {"username": "@ana"}, "wa_id": "1"},
        {"profile": {"name": "Caio"}, "user_id": "BR.3", "wa_id": "3"},
    ]
    senders: list[dict[str, Any]] = [{"from": "1"}, {"from": "2"}, {"from": ..., "from_user_id": "BR.3"}, {"from": "4"}]

    made = items(a_body(a_value(contacts=contacts, messages=[a_message(**sender) for sender in senders])))

    assert [item.person for item in made] == [
        Person((("phone", "1"),), "@ana"),
        Person((("bsuid", "BR.2"), ("phone", "2")), "Bia"),
        Person((("bsuid", "BR.3"), ("phone", "3")), "Caio"),
        Person((("phone", "4"),)),
    ]


def test_a_message_without_sender_is_from_the_only_contact() -> None:
    made = message(a_message(**{"from": ...}), contacts=[{"user_id": "BR.1", "parent_user_id": "BR.ENT.7"}])

    assert made.person == Person((("bsuid", "BR.1"),))
    assert made.body["from_parent_user_id"] == "BR.ENT.7"


@pytest.mark.parametrize("contacts", [None, [], [{}], [{"wa_id": "1"}, {"wa_id": "2"}]])
def test_a_message_of_nobody_is_rejected(contacts: Any) -> None:
    body = a_body(a_value(contacts=contacts, messages=[a_message(**{"from": ...})]))

    assert reject(body) == Reject(f"{VALUE}.messages[0]", "no sender")


def test_an_empty_phone_is_no_phone() -> None:
    assert message(a_message(**{"from": "", "from_user_id": "BR.1"})).person == Person((("bsuid", "BR.1"),))


def test_a_phone_has_no_plus() -> None:
    assert message(a_message(**{"from": "+5511"})).person == Person((("phone", "5511"),))


def test_the_message_is_believed_before_the_contact() -> None:
    made = message(a_message(**{"from": "1", "from_user_id": "BR.1"}), contacts=[{"wa_id": "2", "user_id": "BR.1"}])

    assert made.person.identities == (("bsuid", "BR.1"), ("phone", "1"))


@pytest.mark.parametrize("contact", [7, None, {"wa_id": []}, {"user_id": "x" * 513}])
def test_a_bad_contact_is_rejected_and_its_message_kept(contact: Any) -> None:
    parsed = read(a_body(a_value(contacts=[contact], messages=[a_message()])))

    assert [made.path for made in parsed.rejects] == [f"{VALUE}.contacts[0]"]
    assert len(parsed.changes[0].items) == 1


@pytest.mark.parametrize("profile", [None, [], "Bia", {"name": 7}, {"name": ""}, {}])
def test_a_contact_without_a_readable_name_has_none(profile: Any) -> None:
    assert message(a_message(), contacts=[{"wa_id": "5511944440001", "profile": profile}]).person.name is None


def test_a_group_message_is_by_its_sender_in_the_group() -> None:
    made = message(MESSAGES["wamid.T17"])

    assert made.person == Person((("phone", "5511944440001"),))
    assert made.chat == Person((("group", "grp-1"),))


@pytest.mark.parametrize(
    ("system", "old", "aliases"),
    [
        ({"type": "user_changed_number", "wa_id": "2"}, "1", (("phone", "2"),)),
        ({"type": "customer_changed_number", "new_wa_id": "+2", "customer": "9"}, "1", (("phone", "2"),)),
        ({"type": "customer_changed_number", "new_wa_id": "2", "customer": "9"}, ..., (("phone", "2"),)),
        ({"type": "user_changed_number", "wa_id": "2", "user_id": "BR.2"}, "1", (("phone", "2"), ("bsuid", "BR.2"))),
        ({"type": "user_changed_user_id", "user_id": "BR.2", "wa_id": "1"}, "1", (("bsuid", "BR.2"),)),
        ({"type": "user_changed_number"}, "1", ()),
        ({"type": "customer_identity_changed", "wa_id": "2"}, "1", ()),
        ({"type": ["user_changed_number"]}, "1", ()),
        ("changed", "1", ()),
    ],
)
def test_a_system_message_adds_the_new_identity(system: Any, old: Any, aliases: Any) -> None:
    made = message(a_message(type="system", text=..., system=system, **{"from": old}))

    assert made.person == Person((("phone", "9" if old is ... else old),), None, aliases)


# -- statuses --------------------------------------------------------------------------------------------------------


def test_the_statuses_of_the_sheet() -> None:
    pricing = {"billable": True, "pricing_model": "PMP", "type": "regular", "category": "utility"}

    made = items(a_body(a_value(statuses=STATUSES)))

    def at(seconds: int) -> datetime:
        return datetime.fromtimestamp(seconds, UTC)

    path = f"{VALUE}.statuses"
    assert made == [
        Status(f"{path}[0]", "wamid.OUT1", "delivered", at(1788000100), callback_data="out:018f:1", pricing=pricing),
        Status(
            f"{path}[1]",
            "wamid.OUT2",
            "failed",
            at(1788000101),
            callback_data="out:018f:2",
            error_code="131047",
            error="Re-engagement message: more than 24 hours",
        ),
        Status(f"{path}[2]", "wamid.OUT3", "read", at(1788000102)),
        Status(f"{path}[3]", "wamid.OUT4", "read", at(1788000103), participant="5511944440001"),
    ]


@pytest.mark.parametrize("word", ["sent", "delivered", "read", "played", "failed", "deleted", "teleported"])
def test_every_status_word_is_kept_in_lower_case(word: str) -> None:
    assert status(status=word.upper()).status == word


def test_a_participant_may_have_only_a_user_id() -> None:
    assert status(recipient_participant_user_id="BR.1").participant == "BR.1"


def test_a_status_keeps_its_conversation() -> None:
    conversation = {"id": "c", "origin": {"type": "utility"}, "expiration_timestamp": "1788000000"}

    assert status(conversation=conversation).conversation == conversation


@pytest.mark.parametrize(
    ("errors", "code", "text"),
    [
        ([{"code": 1, "title": "T", "message": "M", "error_data": "plain"}], "1", "T: plain"),
        ([{"code": "1", "message": "M"}], "1", "M"),
        ([{"code": 1, "error_data": {"details": "D"}}], "1", "D"),
        ([{"code": [1], "title": 7, "error_data": [1]}], None, None),
        ([{"code": 1, "title": "T" * 5000}], "1", "T" * 1000),
        ([7], None, None),
        ([], None, None),
        ("x", None, None),
    ],
)
def test_an_error_has_code_and_text(errors: Any, code: str | None, text: str | None) -> None:
    made = status(status="failed", errors=errors)

    assert (made.error_code, made.error) == (code, text)


def test_callback_data_is_capped() -> None:
    assert status(biz_opaque_callback_data="x" * 600).callback_data == "x" * 512


@pytest.mark.parametrize("key", ["pricing", "conversation", "biz_opaque_callback_data"])
def test_extras_of_a_status_of_a_wrong_type_count_as_absent(key: str) -> None:
    assert getattr(status(**{key: [1]}), key.removeprefix("biz_opaque_")) is None


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"id": None}, "no id"),
        ({"id": ""}, "no id"),
        ({"id": 1.5}, "id is not text"),
        ({"id": True}, "id is not text"),
        ({"id": "x" * 513}, "id too long"),
        ({"status": None}, "no status"),
        ({"status": 7}, "no status"),
        ({"status": "x" * 33}, "status too long"),
        ({"recipient_participant_id": {}}, "recipient_participant_id is not text"),
        ({"pricing": {"deep": nested(70)}}, "nested too deeply"),
    ],
)
def test_a_bad_status_is_rejected(keys: dict[str, Any], reason: str) -> None:
    body = a_body(a_value(statuses=[{"id": "wamid.O", "status": "sent"} | keys]))

    assert reject(body) == Reject(f"{VALUE}.statuses[0]", reason)


# -- other fields ----------------------------------------------------------------------------------------------------

ACCOUNT_FIELDS = [
    "message_template_quality_update",
    "message_template_components_update",
    "template_category_update",
    "account_update",
    "account_review_update",
    "account_alerts",
    "phone_number_quality_update",
    "phone_number_name_update",
    "business_capability_update",
    "security",
    "business_username_updates",
    "flows",
    "payment_configuration_update",
    "partner_solutions",
    "automatic_events",
    "account_settings_update",
    "a_field_of_next_year",
]
NUMBER_FIELDS = [
    "user_preferences",
    "user_id_update",
    "smb_app_state_sync",
    "history",
    "calls",
    "group_lifecycle_update",
    "group_participants_update",
    "group_settings_update",
    "group_status_update",
    "messaging_handovers",
    "standby",
]


@pytest.mark.parametrize("field", ACCOUNT_FIELDS)
def test_an_account_field_is_a_notice_for_the_account(field: str) -> None:
    value = {"event": "SOMETHING", "number": 7}

    (change,) = read(a_body(value, field=field, time=1788000200)).changes

    assert (change.number, change.waba) == (None, WABA)
    (made,) = change.items
    assert isinstance(made, Notice)
    assert (made.path, made.type, made.payload) == (VALUE, field, value)
    assert made.at == datetime.fromtimestamp(1788000200, UTC)


@pytest.mark.parametrize("field", NUMBER_FIELDS)
def test_a_number_field_is_a_notice_for_the_number(field: str) -> None:
    value = a_value(messages=[a_message()], calls=[{"id": "wacid.1"}])

    (change,) = read(a_body(value, field=field)).changes

    assert (change.number, change.waba) == (NUMBER, WABA)
    (made,) = change.items
    assert isinstance(made, Notice)
    assert (made.type, made.payload, made.at) == (field, value, NOW)


def digest(value: dict[str, Any], **entry: Any) -> bytes:
    (made,) = items(a_body(value, **({"field": "account_update", "time": 1788000200} | entry)))
    assert isinstance(made, Notice)
    return made.digest


def test_the_digest_of_a_notice_is_the_same_when_it_is_sent_again() -> None:
    assert len(digest({"a": 1})) == 32
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})


@pytest.mark.parametrize("other", [{"time": 1788000201}, {"id": "7"}, {"field": "account_alerts"}])
def test_the_digest_of_a_notice_tells_entries_and_fields_apart(other: dict[str, Any]) -> None:
    assert digest({"a": 1}) != digest({"a": 1}, **other)
    assert digest({"a": 1}) != digest({"a": 2})


def a_template_status(**keys: Any) -> dict[str, Any]:
    return {
        "event": "APPROVED",
        "message_template_id": 594425479261596,
        "message_template_name": "pedido_enviado",
        "message_template_language": "pt_BR",
        "message_template_category": "UTILITY",
        "reason": None,
    } | keys


@pytest.mark.parametrize(("reason", "kept"), [(None, None), ("NONE", None), ("SCAM", "SCAM"), ([7], None)])
def test_a_template_verdict_is_a_template_status_and_a_notice(reason: Any, kept: str | None) -> None:
    value = a_template_status(reason=reason)

    (change,) = read(a_body(value, field="message_template_status_update", time=1788000200)).changes

    notice, made = change.items
    assert (change.number, change.waba) == (None, WABA)
    assert isinstance(notice, Notice)
    assert (notice.type, notice.payload) == ("message_template_status_update", value)
    assert made == TemplateStatus(
        VALUE, "pedido_enviado", "pt_BR", "approved", datetime.fromtimestamp(1788000200, UTC), "UTILITY", kept
    )


@pytest.mark.parametrize("key", ["event", "message_template_name", "message_template_language"])
def test_a_template_verdict_that_lacks_a_key_is_rejected_and_its_notice_kept(key: str) -> None:
    parsed = read(a_body(a_template_status(**{key: None}), field="message_template_status_update"))

    assert parsed.rejects == [Reject(VALUE, f"no {key}")]
    assert [type(item) for item in parsed.changes[0].items] == [Notice]


def test_an_echo_is_an_outgoing_message_to_its_recipient() -> None:
    echo = a_message(
        to="+5511944440001",
        to_user_id="BR.1",
        type="image",
        text=...,
        image={"id": "91"},
        **{"from": "5511955550100"},
    )
    value = a_value(message_echoes=[echo], contacts=[{"wa_id": "5511944440001", "profile": {"name": "Bia"}}])

    (change,) = read(a_body(value, field="smb_message_echoes")).changes

    person = Person((("bsuid", "BR.1"), ("phone", "5511944440001")), "Bia")
    assert change.number == NUMBER
    assert change.items == [
        Message(
            path=f"{VALUE}.message_echoes[0]",
            provider_id="wamid.A",
            direction="out",
            type="image",
            body={"image": {"id": "91"}},
            person=person,
            chat=person,
            at=datetime.fromtimestamp(1788000001, UTC),
            file=File("91", "image"),
        )
    ]


def test_an_echo_to_nobody_is_rejected() -> None:
    body = a_body(a_value(message_echoes=[a_message()]), field="smb_message_echoes")

    assert reject(body) == Reject(f"{VALUE}.message_echoes[0]", "no recipient")


def a_call(**keys: Any) -> dict[str, Any]:
    base = {
        "id": "wacid.1",
        "from": "5511944440001",
        "to": "5511955550100",
        "event": "connect",
        "timestamp": "1788000001",
        "direction": "USER_INITIATED",
        "session": {"sdp_type": "offer", "sdp": "v=0"},
    }
    return {key: value for key, value in (base | keys).items() if value is not ...}


def test_a_users_call_is_a_call_and_a_notice() -> None:
    contacts = [{"wa_id": "5511944440001", "user_id": "BR.1", "profile": {"name": "Bia"}}]
    value = a_value(calls=[a_call()], contacts=contacts)

    (change,) = read(a_body(value, field="calls")).changes

    notice, made = change.items
    assert change.number == NUMBER
    assert isinstance(notice, Notice)
    assert (notice.type, notice.payload) == ("calls", value)
    person = Person((("bsuid", "BR.1"), ("phone", "5511944440001")), "Bia")
    assert made == Called(f"{VALUE}.calls[0]", person, datetime.fromtimestamp(1788000001, UTC))


@pytest.mark.parametrize(
    "keys",
    [
        {"direction": "BUSINESS_INITIATED"},
        {"direction": ...},
        {"direction": ["USER_INITIATED"]},
        {"event": "terminate"},
        {"event": ...},
    ],
)
def test_what_else_is_said_of_calls_is_only_a_notice(keys: dict[str, Any]) -> None:
    (made,) = items(a_body(a_value(calls=[a_call(**keys)]), field="calls"))

    assert isinstance(made, Notice)


@pytest.mark.parametrize("value", [{"statuses": [{"id": "wacid.1", "type": "call", "status": "RINGING"}]}, {}])
def test_a_report_on_a_call_is_only_a_notice(value: dict[str, Any]) -> None:
    (made,) = items(a_body(a_value(**value), field="calls"))

    assert isinstance(made, Notice)


@pytest.mark.parametrize(
    ("calls", "path", "reason"),
    [
        ("ring", "calls", "not a list"),
        ([a_call(), "ring"], "calls[1]", "not an object"),
        ([a_call(), a_call(**{"from": ...})], "calls[1]", "no sender"),
        ([a_call(), a_call(**{"from": [1]})], "calls[1]", "from is not text"),
        ([a_call(), a_call(timestamp="yesterday")], "calls[1]", "no timestamp"),
        ([a_call(), a_call(timestamp=253_402_300_799)], "calls[1]", "no timestamp"),
    ],
)
def test_a_bad_call_is_rejected_alone_and_the_notice_kept(calls: Any, path: str, reason: str) -> None:
    parsed = read(a_body(a_value(calls=calls), field="calls"))

    assert parsed.rejects == [Reject(f"{VALUE}.{path}", reason)]
    kinds = [type(item) for item in parsed.changes[0].items]
    assert kinds == ([Notice] if path == "calls" else [Notice, Called])


def test_a_call_to_no_number_of_ours_is_only_a_notice() -> None:
    (made,) = items(a_body({"calls": [a_call()]}, field="calls"))

    assert isinstance(made, Notice)


# -- B1: nothing readable --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not JSON"),
        (b"hub.mode=subscribe", "not JSON"),
        (b'{"object":"whatsapp_business_account"', "not JSON"),
        (b"{} {}", "not JSON"),
        (b'{"a":NaN}', "not JSON"),
        (b'{"a":Infinity}', "not JSON"),
        (b'{"a":"\x00"}', "not JSON"),
        (b'{"a":"\\u12"}', "not JSON"),
        (b'{"a":"\\', "not JSON"),
        ('{"object":"é"}'.encode("utf-16"), "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"object":"\xff"}', "not UTF-8"),
        (b'{"\xff":1}', "not UTF-8"),
        (b'{"object":"\xed\xa0\x80"}', "not UTF-8"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"a":' + b"9" * 100_000 + b"}", "number out of range"),
        (b'{"a":1e999}', "number out of range"),
        (b'{"a":-1e999}', "number out of range"),
        (b"7", "not an object"),
        (b'"text"', "not an object"),
        (b"null", "not an object"),
        (b"[]", "not an object"),
        (b"{}", "no object name"),
        (b'{"object":7}', "no object name"),
        (b'{"object":"whatsapp_business_account"}', "no entry list"),
        (b'{"object":"whatsapp_business_account","entry":{}}', "no entry list"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_a_body_that_says_nothing_readable_is_rejected_whole(raw: bytes, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        parse(raw, NOW)

    assert str(caught.value) == reason


# -- B2: one bad element ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (7, "not an object"),
        (None, "not an object"),
        ([], "not an object"),
        (a_message(id=...), "no id"),
        (a_message(id=""), "no id"),
        (a_message(id=["x"]), "id is not text"),
        (a_message(id="x" * 5000), "id too long"),
        (a_message(**{"from": ...}), "no sender"),
        (a_message(**{"from": {}}), "from is not text"),
        (a_message(**{"from": "1" * 513}), "from too long"),
        (a_message(group_id=[]), "group_id is not text"),
        (a_message(type=7), "no type"),
        (a_message(type="x" * 65), "type too long"),
        (a_message(type="image", image={"id": "9" * 513}), "id too long"),
        (a_message(text=nested(70)), "nested too deeply"),
        (a_message(text=10**400), "number out of range"),
        (a_message(text=-(10**400)), "number out of range"),
    ],
)
def test_one_bad_message_among_good_ones_is_rejected_alone(bad: Any, reason: str) -> None:
    messages = [a_message(id="first"), bad, a_message(id="last")]

    parsed = read(a_body(a_value(messages=messages, statuses=STATUSES[:1])))

    assert parsed.rejects == [Reject(f"{VALUE}.messages[1]", reason)]
    (change,) = parsed.changes
    assert [item.path.removeprefix(f"{VALUE}.") for item in change.items] == [
        "messages[0]",
        "messages[2]",
        "statuses[0]",
    ]


@pytest.mark.parametrize(
    ("entry", "path", "reason"),
    [
        (7, "", "not an object"),
        ({}, "", "no changes list"),
        ({"id": [], "changes": []}, "", "id is not text"),
        ({"changes": {}}, ".changes", "not a list"),
        ({"changes": [7]}, ".changes[0]", "not an object"),
        ({"changes": [{"value": {}}]}, ".changes[0]", "no field"),
        ({"changes": [{"field": 7, "value": {}}]}, ".changes[0]", "no field"),
        ({"changes": [{"field": "x" * 65, "value": {}}]}, ".changes[0]", "field too long"),
        ({"changes": [{"field": "messages"}]}, ".changes[0].value", "not an object"),
        ({"changes": [{"field": "messages", "value": []}]}, ".changes[0].value", "not an object"),
        ({"changes": [{"field": "messages", "value": {}}]}, ".changes[0]", "no phone_number_id"),
        ({"changes": [{"field": "messages", "value": {"metadata": []}}]}, ".changes[0]", "no phone_number_id"),
        ({"changes": [{"field": "smb_message_echoes", "value": {}}]}, ".changes[0]", "no phone_number_id"),
        ({"changes": [{"field": "smb_message_echoes", "value": a_value()}]}, ".changes[0]", "no message_echoes list"),
        ({"changes": [{"field": "account_update", "value": {}}]}, ".changes[0]", "no account id"),
        (
            {"id": "7", "changes": [{"field": "history", "value": {"history": nested(70)}}]},
            ".changes[0].value",
            "nested too deeply",
        ),
        (
            {"changes": [{"field": "messages", "value": a_value(messages={"a": 1})}]},
            ".changes[0].value.messages",
            "not a list",
        ),
        (
            {"changes": [{"field": "messages", "value": a_value(errors=nested(70))}]},
            ".changes[0].value.errors",
            "nested too deeply",
        ),
    ],
)
def test_one_bad_entry_or_change_is_rejected_alone(entry: Any, path: str, reason: str) -> None:
    body = a_body(a_value(messages=[a_message()]))
    body["entry"].append(entry)

    parsed = read(body)

    assert parsed.rejects == [Reject(f"$.entry[1]{path}", reason)]
    assert [change.path for change in parsed.changes] == ["$.entry[0].changes[0]"]


def test_errors_that_cannot_be_kept_do_not_take_the_messages_along() -> None:
    value = a_value(messages=[a_message(), a_message(id="b")], errors=nested(70))

    parsed = read(a_body(value))

    assert parsed.rejects == [Reject(f"{VALUE}.errors", "nested too deeply")]
    assert len(parsed.changes[0].items) == 2


def test_an_account_without_id_is_fine_when_the_number_is_known() -> None:
    body = a_body(a_value(messages=[a_message()]), id=None)

    (change,) = read(body).changes

    assert (change.number, change.waba) == (NUMBER, None)


# -- B3: text that PostgreSQL cannot store ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("escaped", "kept"),
    [
        (r"a\u0000b", "a\ufffdb"),
        (r"\ud83d", "\ufffd"),
        (r"\uDE00\uD83D", "\ufffd\ufffd"),
        (r"\ud83d\ud83d\ude00", "\ufffd😀"),
        (r"\ud83d\ude00\ude00", "😀\ufffd"),
        (r"\ud83dx\ude00", "\ufffdx\ufffd"),
        (r"\ud83d\\ude00", "\ufffd\\ude00"),
        (r"\\ud83d \\u0000 \u0000", "\\ud83d \\u0000 \ufffd"),
        (r"\\\u0000 \\\\u0000", "\\\ufffd \\\\u0000"),
        (r"\ud83d\u0000", "\ufffd\ufffd"),
        (r"\/\"\n\u00e9 \ud800", '/"\né \ufffd'),
        (r"\u0001\u001b[31m", "\x01\x1b[31m"),
        ("\u202eoi\u200f", "\u202eoi\u200f"),
    ],
)
def test_text_that_cannot_be_stored_is_replaced(escaped: str, kept: str) -> None:
    raw = json.dumps(a_body(a_value(messages=[a_message(text={"body": "HERE"})]))).replace("HERE", escaped)

    parsed = parse(raw.encode(), NOW)

    assert parsed.rejects == []
    assert isinstance(made := parsed.changes[0].items[0], Message)
    assert made.body["text"]["body"] == kept


def test_ids_keys_and_names_are_cleaned_too() -> None:
    value = a_value(
        messages=[a_message(id="a\0b", **{"k\0": "\udc00"})],
        contacts=[{"wa_id": "5511944440001", "profile": {"name": "B\0ia\ud800"}}],
    )

    (made,) = items(a_body(value))

    assert made.provider_id == "a\ufffdb"
    assert made.person.name == "B\ufffdia\ufffd"
    assert made.body["k\ufffd"] == "\ufffd"


def test_a_text_of_100_kb_is_kept() -> None:
    assert message(a_message(text={"body": "x" * 100_000})).body == {"text": {"body": "x" * 100_000}}


# -- B4: times -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timestamp", ["1788000001", 1788000001, "1788000001000", 1788000001000])
def test_a_time_may_be_text_or_number_and_seconds_or_milliseconds(timestamp: Any) -> None:
    made = message(a_message(timestamp=timestamp))

    assert made.at == datetime.fromtimestamp(1788000001, UTC)
    assert "pombal" not in made.body


def test_milliseconds_are_kept() -> None:
    assert message(a_message(timestamp="1788000001250")).at.microsecond == 250_000


def test_an_old_time_is_believed() -> None:
    assert message(a_message(timestamp="1504902988")).at == datetime.fromtimestamp(1504902988, UTC)


ODD_TIMES: list[Any] = [
    ...,
    None,
    "",
    "yesterday",
    "-1",
    -1,
    0,
    "10" * 10,
    10**20,
    10**300,
    "9" * 4400,
    999_999_999_999,
    253_402_300_800_000,
    253_402_300_799,  # the last second that a date can have: what is due a day later could not be said
    1788000001.5,
    True,
    [],
    {},
    "1_788_000_001",
    " 1788000001",
    "١٧٨٨٠٠٠٠٠١",
]


@pytest.mark.parametrize("timestamp", ODD_TIMES)
def test_a_message_of_an_odd_time_has_the_received_time_and_says_so(timestamp: Any) -> None:
    made = message(a_message(timestamp=timestamp))

    assert made.at == NOW
    assert made.body == {"text": {"body": "oi"}, "pombal": {"odd_timestamp": True}}


@pytest.mark.parametrize("timestamp", ODD_TIMES[1:])
def test_a_status_or_notice_of_an_odd_time_has_the_received_time(timestamp: Any) -> None:
    (notice,) = items(a_body({"event": "X"}, field="account_update", time=timestamp))

    assert status(timestamp=timestamp).at == NOW
    assert notice.at == NOW


# -- any bytes at all ------------------------------------------------------------------------------------------------

BOUNDED = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)

EDGES: st.SearchStrategy[Any] = st.sampled_from(
    ["", "\0", "\ud800", "x" * 600, 0, -1, 10**20, 10**400, -(10**4000), 1e308, nested(63), nested(70), "1788000000000"]
)
KEYS = st.sampled_from(
    ["id", "from", "type", "image", "text", "system", "edit", "message", "errors", "code", "\0", "\udc00"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | EDGES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def full_bodies() -> list[Any]:
    """Every sample, and every branch of the parser at least once."""
    messages = [
        *MESSAGES.values(),
        a_message(type="system", system={"type": "user_changed_number", "wa_id": "2", "user_id": "BR.2"}),
        a_message(type="edit", edit={"message": {"type": "image", "image": {"id": "1"}}}),
        a_message(type="request_welcome"),
    ]
    contacts = [{"wa_id": "5511944440001", "user_id": "BR.1", "parent_user_id": "P", "profile": {"name": "Bia"}}]
    bodies = [
        sample("envelope"),
        a_body(a_value(messages=messages, contacts=contacts)),
        a_body(a_value(messages=[a_message()], statuses=STATUSES, errors=[{"code": 1}])),
        a_body(a_value(message_echoes=[a_message(to="1", to_user_id="BR.1")]), field="smb_message_echoes"),
        a_body(a_template_status(), field="message_template_status_update", time=1788000000),
        a_body(a_value(history=[{"threads": []}]), field="history", time=1788000000),
        a_body(a_value(calls=[a_call(), a_call(from_user_id="BR.1")], contacts=contacts), field="calls"),
    ]
    return copy.deepcopy(bodies)


def spots(value: Any) -> Iterator[Callable[[Any], None]]:
    """A setter for every place inside a JSON value."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield lambda new, key=key: value.__setitem__(key, new)  # type: ignore[misc]
        if isinstance(inner, dict | list):
            yield from spots(inner)


def check(raw: bytes) -> None:
    """Only Parsed or Rejected comes out, and all of it can be stored."""
    try:
        parsed = parse(raw, NOW)
    except Rejected:
        return
    text = msgspec.json.encode(parsed).decode()
    assert "\\u0000" not in text.replace("\\\\", "")
    json.loads(text)
    for change in parsed.changes:
        assert isinstance(change, Change)
        assert change.items
        assert change.number or change.waba
        for item in change.items:
            assert isinstance(item, Connection) or item.at.utcoffset() == timedelta(0)


@BOUNDED
@given(st.binary())
def test_any_bytes_are_parsed_or_rejected(raw: bytes) -> None:
    check(raw)


@BOUNDED
@given(JSON)
def test_any_json_is_parsed_or_rejected(value: Any) -> None:
    check(json.dumps(value).encode())


@BOUNDED
@given(st.data(), st.integers(0, len(full_bodies()) - 1))
def test_anything_anywhere_in_a_body_is_parsed_or_rejected(data: st.DataObject, which: int) -> None:
    body = full_bodies()[which]
    places = list(spots(body))

    for _ in range(data.draw(st.integers(1, 3))):
        places[data.draw(st.integers(0, len(places) - 1))](data.draw(JSON))

    check(json.dumps(body, ensure_ascii=data.draw(st.booleans())).encode(errors="surrogatepass"))


@BOUNDED
@given(st.data(), st.integers(0, len(full_bodies()) - 1))
def test_any_damage_to_a_body_is_parsed_or_rejected(data: st.DataObject, which: int) -> None:
    raw = bytearray(json.dumps(full_bodies()[which]).encode())
    damage = st.binary(max_size=3) | st.sampled_from([b"\\u0000", b"\\ud83d", b"\\", b'"', b"1e999", b"NaN", b"[" * 80])

    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw)))
        raw[start : start + data.draw(st.integers(0, 8))] = data.draw(damage)

    check(bytes(raw))


@BOUNDED
@given(st.lists(st.sampled_from(["\\", "\\\\", "\\u0000", "\\ud83d", "\\ude00", "u", "d83d", "\\n", "é"])))
def test_repair_agrees_with_a_decoder_that_takes_everything(parts: list[str]) -> None:
    raw = '{"object":"whatsapp_business_account","entry":[],"x":"' + "".join(parts) + '"}'
    try:
        json.loads(raw)
    except ValueError:
        with pytest.raises(Rejected):
            parse(raw.encode(), NOW)
    else:
        assert parse(raw.encode(), NOW) == Parsed([], [])
