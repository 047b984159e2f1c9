"""`pombal session follow` as a process: killed, told to stop, and with a database that goes away."""

import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from pombal.ids import uuid7
from tests.pombal.processes import Running, running, until
from tests.providers.gateway_logs import Gateway, as_json

if TYPE_CHECKING:
    from tests.pombal.breakable import Servers

SESSION = "26"


class Shop:
    """A channel in databases that may be broken, and the log of its gateway."""

    def __init__(self, servers: "Servers", folder: Path) -> None:
        self.servers, self.log = servers, folder / "gateway.log"
        self.output = folder / "follower.log"
        self.tenant, self.channel = uuid7(), uuid7()
        self.slug = f"t{self.tenant.hex[-12:]}"
        self.gateway = Gateway(self.tenant.int, at=datetime.now(UTC) - timedelta(hours=1))
        config = msgspec.json.encode({"gateway": "whaticket", "host": "http://127.0.0.1:9", "session": SESSION})
        servers.sql("INSERT INTO tenant (id, slug, name) VALUES (%s, %s, 'A shop')", self.tenant, self.slug)
        servers.sql(
            "INSERT INTO channel (tenant_id, id, kind, name, config) VALUES (%s, %s, 'baileys', 'c', %s)",
            *(self.tenant, self.channel, config.decode()),
        )
        self.log.touch()

    def follower(self) -> Any:
        words = ("session", "follow", str(self.log), "--attribute", "whatsappId", "--tenant", self.slug)
        return running("-m", "pombal", *words, env=self.servers.env, log=self.output)

    def fail(self, count: int) -> set[str]:
        """Write so many failures; returns their messages' ids."""
        made = [self.gateway.event(SESSION, self.gateway.contact(), "ratchet") for _ in range(count)]
        with self.log.open("ab") as file:
            for _, lines in made:
                file.write("".join(f"{text}\n" for line in lines for text in as_json(line)).encode())
        return {event.id for event, _ in made}

    def rows(self) -> dict[str, int]:
        found = self.servers.sql("SELECT message_id, times FROM session_error WHERE channel_id = %s", self.channel)
        return {row["message_id"]: row["times"] for row in found}

    def tells(self, wanted: set[str], follower: Running) -> None:
        until(lambda: not follower.alive() or len(self.rows()) >= len(wanted), why=follower.text)
        assert self.rows() == dict.fromkeys(wanted, 1), follower.text()[-2000:]


@pytest.fixture
def shop(servers: "Servers", tmp_path: Path) -> Iterator[Shop]:
    made = Shop(servers, tmp_path)
    yield made
    servers.sql("DELETE FROM tenant WHERE id = %s", made.tenant)  # others look at these servers too
    servers.sql("DELETE FROM log_position WHERE path LIKE %s", f"%{made.log}")
    servers.clear("session_fixer")


def test_a_follower_that_is_killed_again_and_again_tells_everything_once(shop: Shop) -> None:
    """Each of them is killed as soon as it has noted something more, and the log goes on, and is rotated."""
    ids: set[str] = set()
    for n in range(4):
        with shop.follower() as follower:
            if n == 0:
                follower.says("log_followed")
            ids |= shop.fail(60)
            before = len(shop.rows())
            until(lambda: len(shop.rows()) > before or not follower.alive(), why=follower.text)  # noqa: B023 - of this round
            follower.tell_group(signal.SIGKILL)
            follower.code()
        ids |= shop.fail(60)
        if n % 2:
            shop.log.rename(shop.log.with_name(f"gateway.log.{n}"))
        ids |= shop.fail(60)

    with shop.follower() as follower:
        shop.tells(ids, follower)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_follower_ends_when_it_is_told_to(shop: Shop, number: signal.Signals) -> None:
    with shop.follower() as follower:
        follower.says("log_followed")
        os.kill(follower.pid, number)

        assert follower.code(seconds=20) == 0
        assert "follower_stopped" in follower.text()


def test_a_follower_of_nothing_waits_until_it_is_told_to_stop(shop: Shop) -> None:
    """As where a Procfile starts it and nobody has said which logs there are."""
    with running("-m", "pombal", "session", "follow", env=shop.servers.env, log=shop.output) as follower:
        follower.says("no_log_yet")
        os.kill(follower.pid, signal.SIGTERM)

        assert follower.code(seconds=20) == 0


def test_a_follower_waits_for_the_database_and_loses_nothing(shop: Shop) -> None:
    with shop.follower() as follower:
        follower.says("log_followed")
        ids = shop.fail(20)
        shop.tells(ids, follower)

        shop.servers.postgres.kill()
        try:
            ids |= shop.fail(20)
            follower.says("database_away")
        finally:
            shop.servers.postgres.restart()
        ids |= shop.fail(20)

        shop.tells(ids, follower)
        follower.says("database_back")


def test_nothing_of_the_log_is_in_what_the_follower_says(shop: Shop) -> None:
    with shop.follower() as follower:
        follower.says("log_followed")
        ids = shop.fail(3)
        with shop.log.open("a") as file:
            file.write("".join(f"{line}\n" for line in shop.gateway.dump()))
        stranger = shop.gateway.event("999", shop.gateway.contact(), "prekey")[1][-1]
        with shop.log.open("a") as file:
            file.write("".join(f"{text}\n" for text in as_json(stranger)))
        follower.says("session_of_no_channel")
        shop.tells(ids, follower)

        text = follower.text()
    assert "Buffer" not in text
    for id_ in ids:
        assert id_ not in text
    assert "@s.whatsapp.net" not in text
    assert "@lid" not in text
