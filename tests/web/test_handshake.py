"""Meta asks whether a URL is ours (whatsapp-cloud-api.md §1)."""

import json
from typing import Any

import httpx
import pytest

from tests.factories import Shop, a_shop
from tests.web.process import Web


def asked(web: Web, path: str, token: str, challenge: str = "1158201444", mode: str = "subscribe") -> httpx.Response:
    query = {"hub.mode": mode, "hub.challenge": challenge, "hub.verify_token": token}
    return web.http.get(path, params=query)


def error(response: httpx.Response) -> dict[str, Any]:
    """The error without what differs each time."""
    said: dict[str, Any] = json.loads(response.content)["error"]
    return {key: value for key, value in said.items() if key not in ("request_id", "timestamp")}


def test_the_right_token_gets_its_challenge_back(web: Web, shop: Shop) -> None:
    response = asked(web, shop.url, shop.verify_token)

    assert (response.status_code, response.content) == (200, b"1158201444")


@pytest.mark.parametrize(
    "challenge", ["", "007", "<script>alert(1)</script>", "olá 😀", "a\r\nSet-Cookie: x=1", "1" * 3000]
)
def test_a_challenge_comes_back_as_inert_text_byte_by_byte(web: Web, shop: Shop, challenge: str) -> None:
    response = asked(web, shop.url, shop.verify_token, challenge)

    assert response.content == challenge.encode()
    assert response.headers["content-type"].startswith("text/plain")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "set-cookie" not in response.headers


def test_a_wrong_token_is_refused_without_an_echo(web: Web, shop: Shop) -> None:
    for token in ("", "x", shop.verify_token[:-1], shop.verify_token + "x", shop.verify_token.upper(), "é\x00😀"):
        response = asked(web, shop.url, token, "<b>echo</b>")

        assert response.status_code == 403, token
        assert "echo" not in response.text


def test_another_mode_is_refused(web: Web, shop: Shop) -> None:
    for mode in ("", "unsubscribe", "SUBSCRIBE"):
        assert asked(web, shop.url, shop.verify_token, mode=mode).status_code == 403, mode


def test_a_handshake_without_parameters_is_refused(web: Web, shop: Shop) -> None:
    assert web.http.get(shop.url).status_code == 403


def test_each_app_has_its_own_token(web: Web, shop: Shop) -> None:
    other = a_shop()

    assert asked(web, other.url, shop.verify_token).status_code == 403
    assert asked(web, other.url, other.verify_token).status_code == 200


def test_the_default_app_does_not_know_the_tokens_of_others(web: Web, shop: Shop) -> None:
    for token in ("", shop.verify_token):
        assert asked(web, "/webhooks/whatsapp", token).status_code == 403


def test_an_unknown_app_looks_like_a_wrong_token(web: Web, shop: Shop) -> None:
    known = asked(web, shop.url, "wrong")

    for path in ("/webhooks/whatsapp/nobody", "/webhooks/whatsapp/-", "/webhooks/whatsapp/%00", "/webhooks/whatsapp/É"):
        unknown = asked(web, path, "wrong")
        assert (unknown.status_code, error(unknown)) == (known.status_code, error(known)), path
        assert unknown.headers.keys() == known.headers.keys()


def test_an_app_that_is_made_while_we_run_can_be_verified_at_once(web: Web) -> None:
    slug = "made-later"
    assert asked(web, f"/webhooks/whatsapp/{slug}", "x").status_code == 403

    made = a_shop(app=slug)

    assert asked(web, made.url, made.verify_token).status_code == 200
