"""What keeps a process from starting, and how that is said (security-reliability.md C2)."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from pombal.errors import Misconfigured
from pombal.secrets import new_fernet_key
from pombal.settings import Settings, check_secrets, settings

KEY = new_fernet_key()
SECRET = "s3cr3t"
GOOD = {
    "POMBAL_SECRET_KEYS": KEY,
    "DATABASE_URL": f"postgres://pombal:{SECRET}@127.0.0.1:1/pombal",
    "REDIS_URL": f"redis://:{SECRET}@127.0.0.1:1/0",
    "PORT": "1",
}


def started(env: Mapping[str, str], folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Start a process with nothing but these variables, to its end."""
    given = {"PATH": os.environ["PATH"], "POMBAL_DATA": str(folder), **env}
    command = command or ("web",)
    return subprocess.run(
        [sys.executable, "-m", "pombal", *command], env=given, capture_output=True, text=True, timeout=60
    )


REFUSED = {
    "no keys": ({"POMBAL_SECRET_KEYS": ""}, "POMBAL_SECRET_KEYS is not set"),
    "a short key": ({"POMBAL_SECRET_KEYS": SECRET}, "POMBAL_SECRET_KEYS: key 1 is not a Fernet key"),
    "a bad second key": ({"POMBAL_SECRET_KEYS": f"{KEY},{SECRET}"}, "POMBAL_SECRET_KEYS: key 2 is not a Fernet key"),
    "a key of zeros": ({"POMBAL_SECRET_KEYS": "A" * 43 + "="}, "POMBAL_SECRET_KEYS: key 1 is not random"),
    "no database": ({"DATABASE_URL": ""}, "DATABASE_URL is not set"),
    "half a database": ({"DATABASE_URL": SECRET}, "DATABASE_URL is not the address of a PostgreSQL"),
    "another database": (
        {"DATABASE_URL": f"mysql://u:{SECRET}@h/x"},
        "DATABASE_URL is not the address of a PostgreSQL",
    ),
    "a database's port": (
        {"DATABASE_URL": f"postgres://u@h:{SECRET}/x"},
        "DATABASE_URL is not the address of a PostgreSQL",
    ),
    "no queue": ({"REDIS_URL": ""}, "REDIS_URL is not set"),
    "half a queue": ({"REDIS_URL": SECRET}, "REDIS_URL is not the address of a Redis"),
    "another queue": ({"REDIS_URL": f"amqp://{SECRET}"}, "REDIS_URL is not the address of a Redis"),
    "a queue's port": ({"REDIS_URL": f"redis://h:{SECRET}/0"}, "REDIS_URL is not the address of a Redis"),
    "a port in words": ({"PORT": SECRET}, "PORT has a value that cannot be used: expected `int`"),
    "no such port": ({"PORT": "99999"}, "PORT has a value that cannot be used: expected `int` <= 65535"),
    "no such level": ({"LOG_LEVEL": SECRET}, "LOG_LEVEL has a value that cannot be used: invalid enum value"),
    "no such format": ({"LOG_FORMAT": SECRET}, "LOG_FORMAT has a value that cannot be used: invalid enum value"),
    "no such mode": ({"POMBAL_MODE": SECRET}, "POMBAL_MODE has a value that cannot be used: invalid enum value"),
    "a short app secret": ({"WHATSAPP_APP_SECRET": SECRET}, "WHATSAPP_APP_SECRET is shorter than 32 characters"),
    "a short token": ({"METRICS_TOKEN": SECRET}, "METRICS_TOKEN is shorter than 32 characters"),
    "a token of one letter": ({"METRICS_TOKEN": "x" * 40}, "METRICS_TOKEN is not random"),
    "an example": ({"WHATSAPP_APP_SECRET": "0123" * 10}, "WHATSAPP_APP_SECRET is not random"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_process_refuses_to_start_and_says_why_in_one_line(tmp_path: Path, name: str) -> None:
    bad, reason = REFUSED[name]

    done = started(GOOD | bad, tmp_path)

    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert line.startswith("pombal: ")
    assert reason in line
    assert done.stdout == ""
    for value in (SECRET, KEY, *(v for v in bad.values() if v)):
        assert value not in done.stderr


@pytest.mark.parametrize("command", [("worker", "incoming_message"), ("clock",), ("migrate",), ("tenant", "list")])
def test_every_process_says_what_is_missing(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = started({"POMBAL_SECRET_KEYS": KEY}, tmp_path, *command)

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("pombal: DATABASE_URL is not set")


NOT_METAS = {
    "no address": ({"WHATSAPP_GRAPH_URL": "graph"}, "WHATSAPP_GRAPH_URL is not an http(s) address"),
    "another scheme": ({"WHATSAPP_GRAPH_URL": f"ftp://{SECRET}"}, "WHATSAPP_GRAPH_URL is not an http(s) address"),
    "tokens in the clear": (
        {"WHATSAPP_GRAPH_URL": f"http://{SECRET}.example"},
        "WHATSAPP_GRAPH_URL must be https in production: access tokens travel there",
    ),
    "no version": ({"WHATSAPP_API_VERSION": SECRET}, "WHATSAPP_API_VERSION must look like v26.0"),
}


@pytest.mark.parametrize("name", NOT_METAS)
def test_a_worker_that_cannot_send_refuses_to_start(tmp_path: Path, name: str) -> None:
    bad, reason = NOT_METAS[name]

    done = started(GOOD | bad, tmp_path, "worker", "incoming_message", "outgoing_message")

    assert done.returncode == 1
    assert done.stderr == f"pombal: {reason}\n"
    assert SECRET not in done.stderr


def test_where_to_send_has_a_default_and_may_be_anywhere_in_development(environment: pytest.MonkeyPatch) -> None:
    assert settings().require_graph() == ("https://graph.facebook.com", "v26.0")

    environment.setenv("WHATSAPP_GRAPH_URL", "http://127.0.0.1:9010")
    environment.setenv("WHATSAPP_API_VERSION", "v27.1")
    with pytest.raises(Misconfigured, match="https in production"):
        settings().require_graph()

    environment.setenv("POMBAL_MODE", "development")
    assert settings().require_graph() == ("http://127.0.0.1:9010", "v27.1")


def test_all_reasons_are_given_at_once() -> None:
    wrong = check_secrets(Settings(secret_keys="x", whatsapp_app_secret="x", metrics_token="x"))

    assert len(wrong) == 3


def test_short_secrets_are_for_development_only() -> None:
    given = Settings(secret_keys=KEY, metrics_token="short", whatsapp_app_secret="short")

    assert check_secrets(msgspec.structs.replace(given, mode="development")) == []
    assert len(check_secrets(given)) == 2


def test_production_is_what_nobody_asked_otherwise() -> None:
    assert Settings().is_production


def test_settings_do_not_show_themselves() -> None:
    given = Settings(database_url=SECRET, secret_keys=SECRET, metrics_token=SECRET, whatsapp_app_secret=SECRET)

    for shown in (repr(given), str(given), f"{given}", repr([given])):
        assert SECRET not in shown


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Nothing set; the settings are read anew in the test and after it."""
    for name in (
        "DATABASE_URL",
        "DATABASE_OWNER_URL",
        "REDIS_URL",
        "POMBAL_SECRET_KEYS",
        "LOG_FORMAT",
        "POMBAL_MODE",
        "PORT",
        "WHATSAPP_API_VERSION",
        "WHATSAPP_GRAPH_URL",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("POMBAL_DATA", str(tmp_path))
    read = settings.__wrapped__  # the process's own settings stay what they are
    monkeypatch.setattr(sys.modules[__name__], "settings", read)
    return monkeypatch


def test_hosts_that_say_postgres_are_understood(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("DATABASE_URL", "postgres://u:p@h:5432/d?sslmode=require")

    assert settings().require_database() == "postgresql://u:p@h:5432/d?sslmode=require"
    assert settings().require_database_owner() == "postgresql://u:p@h:5432/d?sslmode=require"


def test_the_owner_may_have_an_address_of_its_own(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("DATABASE_URL", "postgres://app@h/d")
    environment.setenv("DATABASE_OWNER_URL", "postgres://owner@h/d")

    assert settings().require_database_owner() == "postgresql://owner@h/d"


@pytest.mark.parametrize(
    "url", ["redis://h:6379/0", "rediss://:p@h/1", "unix:///tmp/v.sock?db=0", "unix://:p@/tmp/v.sock", "memory://"]
)
def test_every_kind_of_queue_is_understood(environment: pytest.MonkeyPatch, url: str) -> None:
    environment.setenv("REDIS_URL", url)

    assert settings().require_redis() == url


def test_what_up_wrote_down_is_read(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "env").write_text(
        "# made by up\nDATABASE_URL=postgresql://a@:5432/b?host=%2Fx\nPORT=8123\n\nnonsense\n"
    )

    assert settings().require_database() == "postgresql://a@:5432/b?host=%2Fx"
    assert settings().port == 8123


@pytest.mark.parametrize("name", ["DATABASE_URL", "REDIS_URL"])
def test_a_trial_runs_addresses_are_never_mixed_with_a_hosts_own(
    environment: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    (tmp_path / "env").write_text("DATABASE_OWNER_URL=postgresql://trial@/d\nPOMBAL_MODE=development\n")
    environment.setenv(name, "unix:///somewhere")

    assert settings().database_owner_url == ""
    assert settings().is_production


def test_the_environment_goes_before_what_was_written_down(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "env").write_text("PORT=1\nLOG_LEVEL=ERROR\n")
    environment.setenv("PORT", "2")
    environment.setenv("LOG_LEVEL", "")  # empty is unset

    assert (settings().port, settings().log_level) == (2, "ERROR")


def test_a_level_may_be_written_small(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LOG_LEVEL", "debug")

    assert settings().log_level == "DEBUG"


def test_a_missing_address_names_its_variable(environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(Misconfigured, match="DATABASE_URL is not set"):
        settings().require_database()
    with pytest.raises(Misconfigured, match="REDIS_URL is not set"):
        settings().require_redis()
