import base64
import json
from random import Random

import pytest

from sandbox import meta

NUMBER = meta.Number("880011223344556", "700100200300400")


def test_bytes_are_escaped_like_meta() -> None:
    raw = meta.encode({"body": "olá 😀 a/b"})

    assert raw == rb'{"body":"ol\u00e1 \ud83d\ude00 a\/b"}'
    assert json.loads(raw) == {"body": "olá 😀 a/b"}


def test_the_signature_is_the_documented_hmac() -> None:
    # RFC 4231, test case 2
    assert meta.sign(b"what do ya want for nothing?", "Jefe") == (
        "sha256=5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    )


def test_a_wamid_looks_like_one_of_metas_and_is_new_each_time() -> None:
    rng = Random(1)  # noqa: S311 - test data

    ids = {meta.new_wamid(rng, "5511944440001") for _ in range(100)}

    assert len(ids) == 100
    assert all(wamid.startswith("wamid.HBgNNTUxMTk0NDQ0MDAwMR") for wamid in ids)
    assert all(base64.b64decode(wamid.removeprefix("wamid."), validate=True) for wamid in ids)


@pytest.mark.parametrize("type_", meta.MESSAGE_TYPES)
def test_every_type_has_examples_with_the_common_keys(type_: str) -> None:
    for variant in range(len(meta.examples(type_, "wamid.X"))):
        message = meta.message(type_, "wamid.X", "5511944440001", 1788000000, variant=variant)

        assert message["type"] == type_
        assert message["id"] == "wamid.X"
        assert message["timestamp"] == "1788000000"
        assert message["from"] == "5511944440001"
        assert type_ in message or type_ == "request_welcome"


def test_media_of_two_messages_have_two_ids() -> None:
    ids = {meta.message("image", wamid, "5511944440001", 1)["image"]["id"] for wamid in ("wamid.A", "wamid.B")}

    assert len(ids) == 2


def test_a_type_without_example_needs_content() -> None:
    with pytest.raises(ValueError, match="no example of a message of type 'hologram'"):
        meta.message("hologram", "wamid.X", "5511944440001", 1)

    assert meta.message("hologram", "wamid.X", "5511944440001", 1, {"a": 1})["hologram"] == {"a": 1}


def test_someone_who_hides_the_phone_is_known_by_bsuid_alone() -> None:
    bsuid = meta.user_id("5511944440001")

    message = meta.text_message("wamid.X", bsuid, "oi", 1)

    assert "from" not in message
    assert message["from_user_id"] == bsuid
    assert meta.contact(bsuid) == {"user_id": bsuid}
    assert "recipient_id" not in meta.status("wamid.X", "read", 1, bsuid)


def test_metadata_is_on_number_fields_only() -> None:
    assert meta.change(NUMBER, "history")["value"]["metadata"]["phone_number_id"] == NUMBER.phone_number_id
    assert "metadata" not in meta.change(NUMBER, "account_update")["value"]


def test_a_failed_status_says_why() -> None:
    assert meta.status("wamid.X", "failed", 1, "5511944440001")["errors"][0]["code"] == 131047


def test_a_field_without_example_needs_a_value() -> None:
    with pytest.raises(ValueError, match="no example of field 'weather'"):
        meta.change(NUMBER, "weather")

    assert meta.change(NUMBER, "weather", {"a": 1}) == {"field": "weather", "value": {"a": 1}}
