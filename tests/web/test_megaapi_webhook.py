"""MegaAPI's webhooks are unsigned: a token in the URL is the proof (megaapi.md, security-reliability.md S6)."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import delete

from models import WebhookToken
from pombal import db
from tests.factories import all_of
from tests.gateways import Gateway, a_gateway, ack, an_id, connection, encoded, flat
from tests.web.process import Answer, Web, request, running
from tests.workers.tools import until
from web import remembered
from web.errors import Failure
from web.tokens import Door, Tokens

MiB = 1024 * 1024
RAW = b'{"instance_key":"x"}'


@pytest.fixture(scope="module")
def gateway() -> Gateway:
    return a_gateway()


def kept(gateway: Gateway) -> list[bytes]:
    with db.session() as s:
        found = all_of(s, "SELECT raw FROM delivery WHERE channel_id = :c ORDER BY id", c=gateway.channel.id)
    return [row["raw"] for row in found]


def posted(web: Web, path: str, *fields: tuple[str, str], raw: bytes = RAW) -> Answer:
    return web.ask(request("POST", path, *fields, ("Content-Length", str(len(raw))), body=raw))


def shape(response: Answer) -> tuple[object, ...]:
    """All of an answer that a stranger could compare."""
    said = json.loads(response.body)["error"]
    fixed = (said["code"], said["message"], str(said["details"]), len(said["request_id"]), len(said["timestamp"]))
    return response.status, *sorted(response.headers), response.headers["content-length"], fixed


def test_a_body_with_the_channels_token_is_kept_as_it_came(web: Web) -> None:
    gateway = a_gateway()
    bodies = [encoded(flat(gateway)), b"not JSON \xff\x00", b""]

    by_url = posted(web, gateway.url, raw=bodies[0])
    by_header = posted(web, gateway.path, ("X-Webhook-Token", gateway.token), raw=bodies[1])
    by_id = posted(web, f"/api/webhooks/whatsapp/{gateway.tenant.id}?a=b&token={gateway.token}", raw=bodies[2])

    assert [(one.status, one.body) for one in (by_url, by_header, by_id)] == [(200, b"EVENT_RECEIVED")] * 3
    assert kept(gateway) == bodies
    with db.session() as s:
        found = all_of(s, "SELECT provider, app_id FROM delivery WHERE channel_id = :c", c=gateway.channel.id)
    assert found == [{"provider": "megaapi", "app_id": None}] * 3


def test_every_wrong_proof_is_refused_alike_and_nothing_is_kept(web: Web) -> None:
    gateway, other = a_gateway(), a_gateway()
    header = ("X-Webhook-Token", gateway.token)
    refused: dict[str, tuple[str, list[tuple[str, str]]]] = {
        "no token": (gateway.path, []),
        "an empty one": (f"{gateway.path}?token=", []),
        "a wrong one": (f"{gateway.path}?token={'x' * 43}", []),
        "half of it": (gateway.url[:-5], []),
        "more than it": (gateway.url + "x", []),
        "in another case": (f"{gateway.path}?token={gateway.token.swapcase()}", []),
        "a huge one": (f"{gateway.path}?token={'x' * 9000}", []),
        "bytes": (f"{gateway.path}?token=%ff%00%f0", []),
        "its hash": (f"{gateway.path}?token={WebhookToken.digest_of(gateway.token).hex()}", []),
        "another tenant's": (f"{gateway.path}?token={other.token}", []),
        "a tenant that does not exist": (f"/api/webhooks/whatsapp/nobody?token={gateway.token}", []),
        "an id of nobody": (f"/api/webhooks/whatsapp/{uuid4()}?token={gateway.token}", []),
        "no tenant and no token": ("/api/webhooks/whatsapp/nobody", []),
        "an odd tenant": (f"/api/webhooks/whatsapp/%ff%2e%2e?token={gateway.token}", []),
        "the token's channel for a tenant": (f"/api/webhooks/whatsapp/{gateway.channel.id}?token={gateway.token}", []),
        "twice in the URL": (f"{gateway.url}&token={gateway.token}", []),
        "twice in headers": (gateway.path, [header, header]),
        "in both": (gateway.url, [header]),
        "under another name": (f"{gateway.path}?Token={gateway.token}", []),
        "as a bearer": (gateway.path, [("Authorization", f"Bearer {gateway.token}")]),
        "another's beside it": (f"{gateway.url}&token={other.token}", []),
    }

    answers = {name: posted(web, path, *fields) for name, (path, fields) in refused.items()}

    assert {name: one.status for name, one in answers.items()} == dict.fromkeys(refused, 401)
    assert len({shape(one) for one in answers.values()}) == 1
    assert kept(gateway) == kept(other) == []


def test_the_size_of_a_body_is_judged_before_its_proof(web: Web, gateway: Gateway) -> None:
    assert posted(web, gateway.url, raw=b"x" * MiB).status == 200

    for path in (gateway.url, gateway.path, "/api/webhooks/whatsapp/nobody"):
        declared = web.ask(request("POST", path, ("Content-Length", str(MiB + 1))))
        chunked = web.ask(
            request("POST", path, ("Transfer-Encoding", "chunked"), body=b"100001\r\n" + b"x" * (MiB + 1))
        )
        assert [(one.status, one.code) for one in (declared, chunked)] == [(413, "PAYLOAD_TOO_LARGE")] * 2


def test_an_encoded_body_and_another_method_are_refused(web: Web, gateway: Gateway) -> None:
    assert posted(web, gateway.url, ("Content-Encoding", "gzip")).status == 415
    assert web.http.get(gateway.url).status_code == 405


def test_a_channel_may_have_two_tokens_for_a_while(web: Web) -> None:
    gateway = a_gateway()
    row, second = WebhookToken.make(gateway.tenant.id, gateway.channel.id, gateway.instance)
    with db.session() as s:
        s.add(row)

    assert [posted(web, f"{gateway.path}?token={one}").status for one in (gateway.token, second)] == [200, 200]
    assert len(kept(gateway)) == 2


def test_a_token_is_in_no_line_and_neither_is_what_was_said(tmp_path: Path) -> None:
    gateway, id_, phone = a_gateway(), an_id(), "5511977778888"
    wrong = f"wrong{uuid4().hex}"
    said = flat(gateway, {"conversation": "mensagem confidencial"}, id_=id_, remoteJid=f"{phone}@s.whatsapp.net")

    with running(tmp_path / "web.log") as web:
        posted(web, gateway.url, raw=encoded(said))
        posted(web, gateway.url, raw=encoded(ack(gateway, id_, 3)))
        posted(web, gateway.url, raw=encoded(connection(gateway)))
        posted(web, gateway.path, ("X-Webhook-Token", gateway.token))
        posted(web, f"{gateway.path}?token={wrong}")
        posted(web, f"/api/webhooks/whatsapp/nobody?token={gateway.token}")
        posted(web, f"{gateway.url}&token={wrong}", ("X-Webhook-Token", gateway.token))
        posted(web, f"/api/webhooks/nowhere?token={gateway.token}")
        web.http.get(gateway.url)
        web.ask(request("POST", gateway.url, ("Content-Length", "-1")))
        web.ask(request("POST", gateway.url, ("Content-Length", str(9 * MiB))))
        accepted = [line for line in web.lines() if line["event"] == "webhook_received"]
        rejected = [line for line in web.lines() if line["event"] == "webhook_rejected"]
        log = web.log()
        counted = until(lambda: _counted(web, "pombal_webhook_seconds_count", 'provider="megaapi"'), "the numbers")

    for text in (gateway.token, wrong, gateway.instance, "token=", "confidencial", phone, id_, "Traceback"):
        assert text not in log, text
        assert text not in counted, text
    assert len(accepted) == 4
    for line in accepted:
        assert (line["provider"], line["outcome"]) == ("megaapi", "accepted")
        assert line["channel_id"] == str(gateway.channel.id)
        assert UUID(line["delivery_id"])
        assert line["seconds"] >= 0
    assert {(line["provider"], line["outcome"]) for line in rejected} == {
        ("megaapi", "unsigned"),
        ("megaapi", "too_large"),
    }
    assert 'pombal_webhook_requests_total{outcome="unsigned",provider="megaapi"}' in counted
    assert 'pombal_security_events_total{kind="bad_token"}' in counted


def _counted(web: Web, *parts: str) -> str:
    """All numbers, once those with these parts are among them."""
    text = web.http.get("/metrics").text
    return text if any(all(part in line for part in parts) for line in text.splitlines()) else ""


# -- the tokens that are remembered ----------------------------------------------------------------------------------


def ask(cache: Tokens, *texts: str | None) -> list[Door | None]:
    async def main() -> list[Door | None]:
        return [await cache.door(text) for text in texts]

    return asyncio.run(main())


def revoke(gateway: Gateway) -> None:
    with db.session() as s:
        s.execute(delete(WebhookToken).where(WebhookToken.channel_id == gateway.channel.id))


def test_a_revoked_token_stops_when_what_is_remembered_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway, cache = a_gateway(), Tokens()
    (door,) = ask(cache, gateway.token)
    assert door is not None
    assert door.channel_id == gateway.channel.id

    revoke(gateway)

    assert ask(cache, gateway.token) == [door]
    monkeypatch.setattr(remembered, "_KNOWN_FOR", 0.0)
    assert ask(cache, gateway.token) == [None]
    assert not cache._known


def test_guesses_do_not_fill_the_memory() -> None:
    cache = Tokens()

    assert ask(cache, None, "", *(uuid4().hex for _ in range(20))) == [None] * 22

    assert not cache._known


def test_while_postgres_does_not_answer_a_known_token_is_believed_and_another_is_told_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway, cache = a_gateway(), Tokens()
    (door,) = ask(cache, gateway.token)
    monkeypatch.setattr(remembered, "_KNOWN_FOR", 0.0)

    async def main(connection: psycopg.Connection[Any]) -> None:
        assert await cache.door(gateway.token) == door
        with pytest.raises(Failure) as failure:
            await cache.door("unknown")
        assert (failure.value.status, failure.value.headers) == (503, {"Retry-After": "5"})
        connection.rollback()  # or the threads that wait would keep the loop from ending

    with psycopg.connect(os.environ["POMBAL_TEST_SUPERUSER_URL"]) as connection:
        connection.execute("LOCK TABLE webhook_token IN ACCESS EXCLUSIVE MODE")
        asyncio.run(main(connection))

    assert ask(cache, gateway.token) == [door]
