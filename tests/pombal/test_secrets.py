"""Secrets at rest (security-reliability.md C1, C3)."""

import json
import os
import subprocess
import sys
from typing import Any
from uuid import UUID

import pytest
from psycopg import sql
from sqlalchemy import select

from models import ApiKey, App, Channel
from pombal import db
from pombal.cli import admin
from pombal.errors import Misconfigured
from pombal.ids import uuid7
from pombal.secrets import fingerprint, new_fernet_key, new_token, seal, unseal
from tests.factories import a_shop, a_tenant, seen_by, superuser

ROW = UUID(int=7)


def test_what_was_sealed_comes_back_for_its_own_row() -> None:
    assert unseal(ROW, seal(ROW, {"token": "olá", "n": [1, None]})) == {"token": "olá", "n": [1, None]}


def test_the_same_secret_looks_different_each_time_and_never_like_itself() -> None:
    first, second = seal(ROW, {"token": "s3cr3t"}), seal(ROW, {"token": "s3cr3t"})

    assert first != second
    assert b"s3cr3t" not in first


def test_a_ciphertext_copied_to_another_row_is_refused() -> None:
    with pytest.raises(Misconfigured, match="sealed for another row"):
        unseal(UUID(int=8), seal(ROW, {"token": "s3cr3t"}))


@pytest.mark.parametrize("place", [0, 1, 9, 20, 60, -1])
def test_a_changed_byte_is_refused(place: int) -> None:
    sealed = bytearray(seal(ROW, {"token": "s3cr3t"}))
    sealed[place] = ord("A") if sealed[place] != ord("A") else ord("B")

    with pytest.raises(Misconfigured, match="no key of POMBAL_SECRET_KEYS opens"):
        unseal(ROW, bytes(sealed))


def test_nonsense_is_refused_without_repeating_it() -> None:
    for nonsense in (b"", b"s3cr3t", b"\xff" * 100):
        with pytest.raises(Misconfigured) as caught:
            unseal(ROW, nonsense)
        assert "s3cr3t" not in str(caught.value)


def with_keys(keys: str, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program with these keys; `seal`, `unseal` and `ROW` are there."""
    head = "from uuid import UUID\nfrom pombal.secrets import seal, unseal\nROW = UUID(int=7)\n"
    env = {**os.environ, "POMBAL_SECRET_KEYS": keys}
    return subprocess.run([sys.executable, "-c", head + program], env=env, capture_output=True, text=True, timeout=60)


def test_keys_are_rotated_by_putting_the_new_one_first() -> None:
    old, new = new_fernet_key(), new_fernet_key()
    sealed = with_keys(old, "print(seal(ROW, {'t': 1}).decode())").stdout.strip()

    resealed = with_keys(f"{new}, {old}", f"print(seal(ROW, unseal(ROW, {sealed!r}.encode())).decode())").stdout.strip()

    assert json.loads(with_keys(new, f"print(unseal(ROW, {resealed!r}.encode())['t'])").stdout) == 1
    gone = with_keys(new, f"unseal(ROW, {sealed!r}.encode())")
    assert "no key of POMBAL_SECRET_KEYS opens the secrets of row" in gone.stderr


def test_without_a_key_nothing_is_sealed() -> None:
    done = with_keys("", "seal(ROW, {})")

    assert "POMBAL_SECRET_KEYS is not set" in done.stderr


def test_a_token_holds_256_random_bits() -> None:
    tokens = {new_token() for _ in range(50)}

    assert len(tokens) == 50
    assert all(len(token) >= 43 for token in tokens)
    assert len({fingerprint(token) for token in tokens}) == 50


def test_a_dump_of_the_rows_holds_no_secret() -> None:
    names = ("app_secret", "old_app_secret", "verify_token", "access_token")
    secrets: dict[str, Any] = {name: f"{name}-{uuid7().hex}" for name in names}
    shop = a_shop(**secrets)
    _, key = admin.add_key(shop.tenant.id, "a key")

    with superuser() as connection:
        tables = [row[0] for row in connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
        whole = sql.SQL("SELECT t::text FROM {} t")
        rows = [row for name in tables for row in connection.execute(whole.format(sql.Identifier(name)))]
    dump = "\n".join(row[0] for row in rows)

    assert str(shop.channel.id) in dump
    for name, secret in {**secrets, "api_key": key, "api_key's random part": key.split("_", 2)[2]}.items():
        for form in (secret, secret.encode().hex(), secret[8:]):
            assert form not in dump, name


def test_the_rows_give_their_secrets_back_to_us() -> None:
    shop = a_shop(app_secret="first-secret", old_app_secret="second-secret", access_token="a-token")

    with seen_by(shop) as s:
        app = s.get_one(App, shop.app.id)
        channel = s.scalars(select(Channel).where(Channel.id == shop.channel.id)).one()

    assert app.secrets() == {"app_secrets": ["first-secret", "second-secret"], "verify_token": shop.verify_token}
    assert channel.sealed is not None
    assert unseal(channel.id, channel.sealed) == {"access_token": "a-token"}


def test_of_a_key_only_its_hash_is_kept() -> None:
    tenant = a_tenant()
    key, shown = admin.add_key(tenant.id, "a key")

    assert key.hash == fingerprint(shown)
    assert len(key.hash) == 32
    assert ApiKey.tenant_named_in(shown) == tenant.id
    with db.session([tenant.id]) as s:
        assert s.scalars(ApiKey.presented(shown)).one().id == key.id
        assert s.scalars(ApiKey.presented(shown[:-1])).first() is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pombal_",
        "pombal_x",
        "x" * 80,
        "pombal_" + "g" * 32 + "_x",
        "pombal_" + "0" * 500,
        "Pombal_" + "0" * 40,
        "\x00",
        "é" * 50,
    ],
)
def test_what_is_not_shaped_like_a_key_names_no_tenant(text: str) -> None:
    assert ApiKey.tenant_named_in(text) is None
