"""The door for Baileys gateways: whose a body is, what is refused, and what is not kept of it."""

import json
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import WebhookToken
from pombal import db
from tests.baileys import Session, a_session, evolution, evolution_message, fazer, stub, upsert
from tests.factories import all_of
from tests.gateways import a_gateway, an_id, encoded
from tests.web.process import Answer, Web, request, running
from web.masked import without_secrets

MiB = 1024 * 1024
RAW = b'{"event":"x"}'


def kept(session: Session) -> list[bytes]:
    with db.session() as s:
        found = all_of(s, "SELECT raw FROM delivery WHERE channel_id = :c ORDER BY id", c=session.channel.id)
    return [row["raw"] for row in found]


def posted(web: Web, path: str, *fields: tuple[str, str], raw: bytes = RAW) -> Answer:
    return web.ask(request("POST", path, *fields, ("Content-Length", str(len(raw))), body=raw))


def shape(response: Answer) -> tuple[object, ...]:
    """All of an answer that a stranger could compare."""
    said = json.loads(response.body)["error"]
    fixed = (said["code"], said["message"], str(said["details"]), len(said["request_id"]), len(said["timestamp"]))
    return response.status, *sorted(response.headers), response.headers["content-length"], fixed


def test_a_body_with_the_channels_token_is_kept_wherever_the_token_stands(web: Web) -> None:
    session = a_session()
    bodies = [b'{"n":%d}' % n for n in range(6)]

    answers = [
        posted(web, session.url, raw=bodies[0]),
        posted(web, session.path, ("X-Webhook-Token", session.token), raw=bodies[1]),
        posted(web, session.path, ("X-Api-Key", session.token), raw=bodies[2]),
        posted(web, f"{session.path}/messages-upsert", ("x-api-key", session.token), raw=bodies[3]),
        posted(web, f"{session.path}/connection-update?token={session.token}", raw=bodies[4]),
        posted(web, f"{session.url}/messages-upsert", raw=bodies[5]),  # Evolution appends to the URL as it is
    ]

    assert [(one.status, one.body) for one in answers] == [(200, b"EVENT_RECEIVED")] * 6
    assert kept(session) == bodies
    with db.session() as s:
        found = all_of(s, "SELECT provider, app_id FROM delivery WHERE channel_id = :c", c=session.channel.id)
    assert found == [{"provider": "baileys", "app_id": None}] * 6


def test_every_wrong_proof_is_refused_alike_and_nothing_is_kept(web: Web) -> None:
    session, other, mega = a_session(), a_session(), a_gateway()
    key = ("X-Api-Key", session.token)
    refused: dict[str, tuple[str, list[tuple[str, str]]]] = {
        "no token": (session.path, []),
        "an empty one": (f"{session.path}?token=", []),
        "an empty one and an event": (f"{session.path}?token=/messages-upsert", []),
        "a wrong one": (f"{session.path}?token={'x' * 43}", []),
        "half of it": (session.url[:-5], []),
        "more than it": (session.url + "x", []),
        "bytes": (f"{session.path}?token=%ff%00%f0", []),
        "its hash": (f"{session.path}?token={WebhookToken.digest_of(session.token).hex()}", []),
        "another channel's": (f"{session.path}?token={other.token}", []),
        "of a channel of another kind": (f"{session.path}?token={mega.token}", []),
        "a channel that does not exist": (f"/api/webhooks/baileys/{uuid4()}?token={session.token}", []),
        "no channel's id": (f"/api/webhooks/baileys/%ff?token={session.token}", []),
        "its name": (f"/api/webhooks/baileys/{session.channel.name}?token={session.token}", []),
        "its tenant's": (f"/api/webhooks/baileys/{session.tenant.slug}?token={session.token}", []),
        "twice in the URL": (f"{session.url}&token={session.token}", []),
        "twice in headers": (session.path, [key, key]),
        "in two headers": (session.path, [key, ("X-Webhook-Token", session.token)]),
        "in both": (session.url, [key]),
        "as a bearer": (session.path, [("Authorization", f"Bearer {session.token}")]),
    }

    answers = {name: posted(web, path, *fields) for name, (path, fields) in refused.items()}

    assert {name: one.status for name, one in answers.items()} == dict.fromkeys(refused, 401)
    assert len({shape(one) for one in answers.values()}) == 1
    assert kept(session) == kept(other) == []


def test_a_file_may_come_inside_and_more_than_four_mebibytes_may_not(web: Web) -> None:
    session = a_session()

    assert posted(web, session.url, raw=b"x" * (4 * MiB)).status == 200

    for path in (session.url, session.path):
        declared = web.ask(request("POST", path, ("Content-Length", str(4 * MiB + 1))))
        assert (declared.status, declared.code) == (413, "PAYLOAD_TOO_LARGE")
    assert web.http.get(session.url).status_code == 405


def test_keys_proofs_and_codes_of_gateways_are_not_kept(web: Web) -> None:
    session, id_ = a_session(), an_id()
    code = {
        "qrcode": {"instance": session.name, "pairingCode": "WZYEH1YY", "code": "2@secret", "base64": "data:secret"}
    }
    bodies = [
        evolution_message(session.name, id_=id_, said={"conversation": 'o "code": "1" e "apikey": "2"'}),
        fazer("messages.upsert", upsert(stub(id_=id_))),
        evolution(session.name, "qrcode.updated", code),
    ]

    for body in bodies:
        assert posted(web, session.url, raw=encoded(body)).status == 200

    stored = kept(session)
    for word in (b"the-gateways-own-key", b"our-own-proof", b"what-fazer-was-told", b"WZYEH1YY", b"secret"):
        assert not any(word in raw for raw in stored)
    for body, raw in zip(bodies, stored, strict=True):
        hidden = {
            name: "*" * len(str(body[name])) for name in ("apikey", "destination", "webhookVerifyToken") if name in body
        }
        assert len(raw) == len(encoded(body))
        assert json.loads(raw) | {"data": body["data"]} == body | hidden
    assert [json.loads(raw)["data"] for raw in stored[:2]] == [body["data"] for body in bodies[:2]]


def test_a_token_is_in_no_line_and_neither_is_what_was_said(tmp_path: Path) -> None:
    session, id_, phone = a_session(), an_id(), "5511977778888"
    said = evolution_message(session.name, id_=id_, said={"conversation": "confidencial"}, remoteJid=f"{phone}@lid")

    with running(tmp_path / "web.log") as web:
        posted(web, session.url, raw=encoded(said))
        posted(web, f"{session.url}/messages-upsert", raw=encoded(stub("Bad MAC", id_=id_)))
        posted(web, session.path, ("X-Api-Key", session.token))
        posted(web, session.url + "x")
        web.http.get(session.url)
        accepted = [line for line in web.lines() if line["event"] == "webhook_received"]
        rejected = [line for line in web.lines() if line["event"] == "webhook_rejected"]
        log = web.log()

    for text in (session.token, session.name, "token=", "confidencial", phone, id_, "own-key", "Traceback"):
        assert text not in log, text
    assert [(line["provider"], line["channel_id"]) for line in accepted] == [("baileys", str(session.channel.id))] * 3
    assert [(line["provider"], line["outcome"]) for line in rejected] == [("baileys", "unsigned")]


# -- what is overwritten ---------------------------------------------------------------------------------------------

NAMES = st.sampled_from(
    ["apikey", "destination", "code", "qrcode", "text", 'x"apikey', 'apikey":"', "\\", "base64", "webhookVerifyToken"]
)
TEXTS = st.sampled_from(['"apikey":"x"', '\\"apikey\\":', "2@abc", "", '"qrcode":{', "é\u0001\\"]) | st.text(max_size=8)
BODIES = st.dictionaries(
    NAMES,
    st.recursive(
        TEXTS | st.none() | st.integers(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
        max_leaves=8,
    ),
    max_size=5,
)


def hidden(value: object, names: set[str]) -> object:
    if isinstance(value, list):
        return [hidden(one, names) for one in value]
    if not isinstance(value, dict):
        return value
    return {name: "*" if name in names and isinstance(one, str) else hidden(one, names) for name, one in value.items()}


def has_code(value: object) -> bool:
    if isinstance(value, dict):
        return isinstance(value.get("qrcode"), dict) or any(map(has_code, value.values()))
    return isinstance(value, list) and any(map(has_code, value))


@settings(max_examples=500, deadline=None)
@given(BODIES, st.booleans(), st.sampled_from([None, 1]))
def test_nothing_but_those_values_changes_in_any_body(body: object, is_ascii: bool, indent: int | None) -> None:
    raw = json.dumps(body, ensure_ascii=is_ascii, indent=indent).encode("utf-8", "surrogatepass")
    names = {"apikey", "destination", "qrcode", "webhookVerifyToken"} | (
        {"code", "base64"} if has_code(body) else set()
    )

    left = without_secrets(raw)

    assert len(left) == len(raw)
    found = json.loads(left.decode("utf-8", "surrogatepass"))
    assert hidden(found, names) == hidden(body, names)
    assert not any(name in names and set(text) - {"*"} for name, text in members(found))


def members(value: object) -> list[tuple[str, str]]:
    if isinstance(value, list):
        return [one for inner in value for one in members(inner)]
    if not isinstance(value, dict):
        return []
    own = [(name, one) for name, one in value.items() if isinstance(one, str)]
    return own + [one for inner in value.values() for one in members(inner)]


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe", b'{"apikey":"abc', b'{"apikey":', b'"apikey"' * 9, b"{" * 9_000])
def test_what_is_no_json_keeps_its_length(raw: bytes) -> None:
    assert len(without_secrets(raw)) == len(raw)
    assert b"abc" not in without_secrets(raw)


@pytest.mark.parametrize(
    ("raw", "left"),
    [
        (
            rb'{"\u0071r":"2@x","\u0061\u0070\u0069Ke\u0079":"k"}',
            rb'{"\u0071r":"***","\u0061\u0070\u0069Ke\u0079":"*"}',
        ),
        (rb'{"qrcode\u0073":"2@x","\\u0071r":"2@x","\u00e9":"q"}', None),
        (
            b'{"event":"qrcode","data":{"code":"2@x","base64":"y"}}',
            b'{"event":"qrcode","data":{"code":"***","base64":"*"}}',
        ),
        (b'{"data":{"code":"2@x"},"event" : "QRCODE_UPDATED"}', b'{"data":{"code":"***"},"event" : "QRCODE_UPDATED"}'),
        (b'{"event":"qr","data":"2@x"}', b'{"event":"qr","data":"***"}'),
        (b'{"event":"messages.upsert","data":{"code":"2","text":"\\"event\\":\\"qr\\""}}', None),
    ],
)
def test_a_code_is_overwritten_however_it_is_spelt_or_announced(raw: bytes, left: bytes | None) -> None:
    assert without_secrets(raw) == (left or raw)


def test_of_more_secrets_than_any_gateway_has_nothing_is_kept_and_not_each_is_looked_at() -> None:
    many = [{"qr": f"2@{n}"} for n in range(20_000)]
    raw = json.dumps(many).encode()

    left = without_secrets(raw)

    assert len(left) == len(raw)
    assert b"2@" not in left
    assert set(left[-len(raw) // 4 :]) == {ord("*")}  # as a whole: what comes behind costs nothing
    few = json.dumps(many[:9_000]).encode()
    assert [len(one["qr"]) for one in json.loads(without_secrets(few))] == [len(one["qr"]) for one in many[:9_000]]


def test_a_large_body_is_one_pass() -> None:
    for unit in (b'"apikey" ', b'"apikey":"\\', b'\\"apikey":"', b'"qrcode":{"code":"', b" " * 9):
        raw = unit * (4 * MiB // len(unit))
        assert len(without_secrets(raw)) == len(raw)
