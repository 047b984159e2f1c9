"""Keys and secrets: what is stored proves them and does not tell them."""

from uuid import uuid4

import pytest

from models import ApiKey, App, Channel
from models.api_key import SCOPES
from pombal.cli import admin
from pombal.errors import Misconfigured
from tests.factories import a_shop, a_tenant, rows, seen_by, superuser


def test_a_key_is_found_by_its_text_by_its_own_tenant_alone() -> None:
    tenant, other = a_tenant(), a_tenant()
    key, text = admin.add_key(tenant.id, "shop", ("messages:send",))

    assert ApiKey.tenant_named_in(text) == tenant.id
    with seen_by(tenant) as s:
        assert s.scalars(ApiKey.presented(text)).one().id == key.id
        assert s.scalars(ApiKey.presented(text + "x")).first() is None
    with seen_by(other) as s:
        assert s.scalars(ApiKey.presented(text)).first() is None


def test_a_revoked_key_is_no_key() -> None:
    tenant = a_tenant()
    _, text = admin.add_key(tenant.id, "shop")
    with superuser() as connection:
        connection.execute("UPDATE api_key SET revoked_at = now() WHERE tenant_id = %s", [tenant.id])

    with seen_by(tenant) as s:
        assert s.scalars(ApiKey.presented(text)).first() is None


def test_the_text_of_a_key_is_nowhere_in_its_row() -> None:
    tenant = a_tenant()
    key, text = ApiKey.make(tenant.id, "shop")

    secret = text.split("_", 2)[2]  # it may have an underscore of its own

    assert secret.encode() not in key.hash
    assert key.scopes == list(SCOPES)


@pytest.mark.parametrize("text", ["", "pombal_", "pombal_xyz", "other_0192a3b4c5d67e8f_x", "pombal_" + "0" * 300])
def test_what_is_not_shaped_like_a_key_names_no_tenant(text: str) -> None:
    assert ApiKey.tenant_named_in(text) is None


def test_a_key_allows_its_scopes_and_an_admins_key_all() -> None:
    assert ApiKey(scopes=["messages:send"]).allows("messages:send")
    assert not ApiKey(scopes=["messages:send"]).allows("messages:read")
    assert ApiKey(scopes=["admin"]).allows("sip:manage")


def test_secrets_are_sealed_to_their_row() -> None:
    shop = a_shop(access_token="EAAG-very-secret")

    app, stranger = shop.app, App(id=uuid4(), slug="x", sealed=shop.app.sealed)

    assert app.secrets() == {"app_secrets": [shop.app_secret], "verify_token": shop.verify_token}
    assert shop.channel.secrets() == {"access_token": "EAAG-very-secret"}
    assert Channel(id=uuid4()).secrets() == {}
    with pytest.raises(Misconfigured, match="another row"):
        stranger.secrets()
    (stored,) = rows(shop, "SELECT sealed, config FROM channel")
    assert b"very-secret" not in stored["sealed"]
    assert "very-secret" not in str(stored["config"])
