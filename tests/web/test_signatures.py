"""Who sent it: only the app's secret over exactly these bytes (security-reliability.md S1-S3, S7)."""

import json
from collections.abc import Callable
from uuid import UUID

import httpx
import pytest

from models import App
from pombal import db
from pombal.ids import uuid7
from sandbox import meta
from tests.factories import Shop, a_shop, a_wamid, all_of, texts
from tests.web.process import Answer, Web, request


def kept(shop: Shop) -> list[bytes]:
    """The raw bodies kept for an app."""
    return of_app(shop.app.id)


def of_app(app_id: UUID) -> list[bytes]:
    with db.session() as s:
        return [row["raw"] for row in all_of(s, "SELECT raw FROM delivery WHERE app_id = :app", app=app_id)]


def posted(web: Web, path: str, raw: bytes, *signatures: str) -> Answer:
    fields = [("X-Hub-Signature-256", one) for one in signatures]
    return web.ask(request("POST", path, *fields, ("Content-Length", str(len(raw))), body=raw))


def shape(response: Answer) -> tuple[object, ...]:
    """All of an answer that a stranger could compare."""
    said = json.loads(response.body)["error"]
    fixed = (said["code"], said["message"], said["details"], len(said["request_id"]), len(said["timestamp"]))
    return response.status, sorted(response.headers), response.headers["content-length"], fixed


def test_a_signed_body_is_kept_as_it_came(web: Web) -> None:
    shop = a_shop()
    raw = texts(shop, a_wamid(), body="olá 😀 a/b")
    assert b"\\u00e1" in raw
    assert b"a\\/b" in raw

    response = web.post(shop, raw)

    assert (response.status_code, response.text) == (200, "EVENT_RECEIVED")
    assert kept(shop) == [raw]


def hex_of(raw: bytes, secret: str) -> str:
    return meta.sign(raw, secret).removeprefix("sha256=")


WRONG: dict[str, Callable[[bytes, str], list[str]]] = {
    "missing": lambda raw, secret: [],
    "empty": lambda raw, secret: [""],
    "only the prefix": lambda raw, secret: ["sha256="],
    "too short": lambda raw, secret: [meta.sign(raw, secret)[:-1]],
    "too long": lambda raw, secret: [meta.sign(raw, secret) + "0"],
    "without the prefix": lambda raw, secret: [hex_of(raw, secret)],
    "SHA-1 under the new name": lambda raw, secret: [meta.sign_sha1(raw, secret)],
    "upper case": lambda raw, secret: ["sha256=" + hex_of(raw, secret).upper()],
    "prefix in upper case": lambda raw, secret: ["SHA256=" + hex_of(raw, secret)],
    "another secret's": lambda raw, secret: [meta.sign(raw, "another secret")],
    "the empty secret's": lambda raw, secret: [meta.sign(raw, "")],
    "of other bytes": lambda raw, secret: [meta.sign(raw + b" ", secret)],
    "of the parsed body": lambda raw, secret: [meta.sign(json.dumps(json.loads(raw)).encode(), secret)],
    "twice, both right": lambda raw, secret: [meta.sign(raw, secret)] * 2,
    "twice, one right": lambda raw, secret: ["sha256=" + "0" * 64, meta.sign(raw, secret)],
    "two in one": lambda raw, secret: [meta.sign(raw, secret) + "," + meta.sign(raw, secret)],
    "not ASCII": lambda raw, secret: ["sha256=" + "\xe9" * 64],
    "ends in a byte that is not ASCII": lambda raw, secret: [meta.sign(raw, secret)[:-1] + "\xff"],
    "NUL bytes cannot be sent; tabs can": lambda raw, secret: ["sha256=\t" + hex_of(raw, secret)],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_signature_is_refused_and_nothing_is_kept(web: Web, name: str) -> None:
    shop = a_shop()
    raw = texts(shop, a_wamid())

    response = posted(web, shop.url, raw, *WRONG[name](raw, shop.app_secret))

    assert (response.status, response.code) == (401, "UNAUTHORIZED")
    assert kept(shop) == []


def test_the_legacy_header_proves_nothing(web: Web) -> None:
    shop = a_shop()
    raw = texts(shop, a_wamid())

    response = web.http.post(shop.url, content=raw, headers={"X-Hub-Signature": meta.sign_sha1(raw, shop.app_secret)})

    assert response.status_code == 401
    assert kept(shop) == []


def test_an_unknown_app_looks_like_a_bad_signature(web: Web, shop: Shop) -> None:
    raw = texts(shop, a_wamid())
    known = shape(posted(web, shop.url, raw, meta.sign(raw, "wrong")))

    for path in (
        "/webhooks/whatsapp/nobody",
        "/webhooks/whatsapp/" + "x" * 500,
        "/webhooks/whatsapp/%2e%2e",
        "/webhooks/whatsapp",
    ):
        assert shape(posted(web, path, raw, meta.sign(raw, "wrong"))) == known, path


def test_the_secret_is_chosen_by_the_url_never_by_the_body(web: Web) -> None:
    a, b = a_shop(), a_shop()
    about_b = texts(b, a_wamid())

    through_bs_door = posted(web, b.url, about_b, meta.sign(about_b, a.app_secret))
    through_as_door = posted(web, a.url, about_b, meta.sign(about_b, a.app_secret))

    assert through_bs_door.status == 401
    # Proven by A, whatever it says: kept under A's app, for the worker to put into quarantine (S4).
    assert through_as_door.status == 200
    assert (kept(a), kept(b)) == ([about_b], [])


def test_two_secrets_are_valid_while_one_is_being_rotated(web: Web) -> None:
    shop = a_shop(old_app_secret="the-secret-of-last-year")
    new, old, older = (texts(shop, a_wamid()) for _ in range(3))

    statuses = [
        posted(web, shop.url, new, meta.sign(new, shop.app_secret)).status,
        posted(web, shop.url, old, meta.sign(old, "the-secret-of-last-year")).status,
        posted(web, shop.url, older, meta.sign(older, "the-secret-before-that")).status,
    ]

    assert statuses == [200, 200, 401]
    assert sorted(kept(shop)) == sorted([new, old])
    signers = [line["secret"] for line in web.lines() if line.get("app_id") == str(shop.app.id)]
    assert signers == [0, 1]  # so that an operator sees when the old one is no longer in use


def an_app_without_secrets(slug: str) -> App:
    """The default app may be there already: other tests make channels of it."""
    with db.session() as s:
        app = s.scalars(App.by_slug(slug)).first() or App(id=uuid7(), slug=slug)
        app.seal(app_secrets=[], verify_token="")
        s.add(app)
    return app


@pytest.mark.parametrize("slug", ["bare", "default"])
def test_an_app_without_secrets_is_closed(web: Web, slug: str) -> None:
    app = an_app_without_secrets(slug)
    before = of_app(app.id)
    path = "/webhooks/whatsapp" + ("" if slug == "default" else f"/{slug}")
    raw = b'{"object":"whatsapp_business_account","entry":[]}'

    statuses = [
        posted(web, path, raw, *given).status for given in ([], [""], [meta.sign(raw, "")], ["sha256=" + "0" * 64])
    ]
    handshake = web.http.get(path, params={"hub.mode": "subscribe", "hub.verify_token": "", "hub.challenge": "x"})

    assert statuses == [401] * 4
    assert handshake.status_code == 403
    assert of_app(app.id) == before


def test_the_same_body_is_accepted_each_time(web: Web) -> None:
    """Meta signs no time, so a request can be sent again. That it has no second effect is the worker's part."""
    shop = a_shop()
    raw = texts(shop, a_wamid())

    assert [web.post(shop, raw).status_code for _ in range(3)] == [200] * 3
    assert kept(shop) == [raw] * 3


def test_whatever_a_proven_body_holds_it_is_accepted_and_kept_byte_by_byte(web: Web) -> None:
    """Anything but 200 would make Meta repeat it for seven days (B1)."""
    shop = a_shop()

    for name, raw in hostile_bodies(shop).items():
        response: httpx.Response = web.post(shop, raw)
        assert response.status_code == 200, name

    assert sorted(kept(shop)) == sorted(hostile_bodies(shop).values())


def hostile_bodies(shop: Shop) -> dict[str, bytes]:
    text = texts(shop, "wamid.fixed", body="@@")
    return {
        "empty": b"",
        "not JSON": b"<xml/>",
        "half": text[:-7],
        "bad UTF-8": b'{"a":"\xff\xfe"}',
        "UTF-16": text.decode().encode("utf-16"),
        "scalar": b"42",
        "null": b"null",
        "deep": b"[" * 100_000 + b"]" * 100_000,
        "digits": b'{"entry":' + b"9" * 100_000 + b"}",
        "NaN": b'{"entry":NaN}',
        "1e999": b'{"entry":1e999}',
        "wrong types": b'{"object":7,"entry":{"changes":"x"}}',
        "missing keys": b'{"entry":[{}]}',
        "NUL": text.replace(b"@@", b"\\u0000"),
        "a raw NUL": text.replace(b"@@", b"\x00"),
        "lone surrogate": text.replace(b"@@", b"\\ud800"),
        "control characters": text.replace(b"@@", b"\\u001b[31m\\r\\n"),
        "100 KB text": text.replace(b"@@", b"x" * 100_000),
        "right-to-left marks": text.replace(b"@@", "\u202e\u2066".encode()),
        "5 KB id": text.replace(b"wamid.fixed", b"w" * 5000),
        "all bytes": bytes(range(256)),
    }
