"""What an operator types about sending: lanes, tokens, settings, templates, and the story of what was not sent."""

import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import pytest

from models import DeadLetter, Lane, Template
from models.attempt import callback_of
from models.dead_letter import letter
from pombal import db
from pombal.broker import redis_client
from pombal.cli.doctor import procfile_queues
from pombal.supervisor import LINUX
from sandbox import client, config
from tests import factories
from tests.chaos.fleet import Fleet
from tests.factories import Shop
from tests.pombal.breakable import Servers
from tests.pombal.processes import output, until
from tests.pombal.test_cli import NOWHERE, Terminal, doctor, one_line
from tests.sandbox.servers import a_meta
from tests.workers.sending import (
    TOKEN,
    Meta,
    a_number_at_meta,
    attempts,
    configure,
    lane,
    make_due,
    message,
    queue,
    send,
    statuses,
)

pytestmark = pytest.mark.usefixtures("queues")

A_RATE = "messages_per_second must be a number above 0 and at most 100000"


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys)


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meta]:
    with a_number_at_meta(monkeypatch) as meta:
        yield meta


def shown(terminal: Terminal, shop: Shop) -> dict[str, Any]:
    (row,) = terminal.json("lanes", "--tenant", shop.tenant.slug)
    found: dict[str, Any] = row
    return found


def rung() -> list[str]:
    """The channels whose bell lies in the queue."""
    with redis_client() as connection:
        bodies: Any = connection.hvals("dramatiq:outgoing_message.msgs")
    return [msgspec.json.decode(body)["args"][0] for body in bodies]


def events(shop: Shop) -> list[str]:
    query = "SELECT type FROM event WHERE type LIKE 'channel_%' ORDER BY id"
    return [row["type"] for row in factories.rows(shop, query)]


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


# ---------------------------------------------------------------------------------------------------------- lanes


def test_a_lane_is_shown_with_what_waits_in_it(terminal: Terminal, meta: Meta) -> None:
    shop = meta.shop
    queue(shop, "one", "two")
    queue(shop, "later", not_before=datetime.now(UTC) + timedelta(hours=1))

    before = shown(terminal, shop)
    send(shop)
    after = shown(terminal, shop)

    assert (before["tenant"], before["channel"], before["id"]) == (
        shop.tenant.slug,
        shop.channel.name,
        str(shop.channel.id),
    )
    assert (before["state"], before["queued"], before["scheduled"], before["unknown"]) == ("due", 2, 1, 0)
    assert before["oldest_seconds"] >= 0
    assert (after["state"], after["queued"], after["scheduled"], after["sending"]) == ("idle", 0, 1, 0)
    assert (after["oldest_seconds"], after["sent_last_minute"], after["lease_seconds"]) == (None, 2, None)
    assert (after["hold"], after["paused_until"], after["pace"]) == (None, None, 1.0)


def test_lanes_are_shown_of_one_tenant_or_of_all(terminal: Terminal, meta: Meta) -> None:
    silent = factories.a_shop()
    queue(meta.shop, "one")

    everyone = terminal.json("lanes")

    assert [row["id"] for row in everyone].count(str(meta.shop.channel.id)) == 1
    assert str(silent.channel.id) not in [row["id"] for row in everyone]  # nothing was ever to be sent there
    assert terminal("lanes", "--tenant", silent.tenant.slug) == "no lanes: nothing was ever to be sent\n"
    said = terminal("lanes", "--tenant", meta.shop.tenant.slug)
    assert f"{meta.shop.tenant.slug}/{meta.shop.channel.name}" in said
    assert terminal.refused("lanes", "--tenant", "nobody") == "there is no tenant nobody"


def test_a_lane_that_somebody_has_is_sending(terminal: Terminal, meta: Meta) -> None:
    queue(meta.shop, "one")
    with db.session() as s:
        assert Lane.take(s, meta.shop.channel.id, uuid4())

    row = shown(terminal, meta.shop)

    assert row["state"] == "sending"
    assert 0 < row["lease_seconds"] <= 15


def test_a_refused_token_is_a_hold_with_its_reason(terminal: Terminal, meta: Meta) -> None:
    client.rules(meta.url, access_token="another")
    queue(meta.shop, "one", "two")

    send(meta.shop)

    row = shown(terminal, meta.shop)
    assert (row["state"], row["hold"]["kind"], row["hold"]["code"], row["queued"]) == ("held", "auth", "190", 2)
    assert row["hold"]["since"] < row["hold"]["next_probe_at"]
    assert row["hold"]["text"]
    assert "auth 190 since " in terminal("lanes", "--tenant", meta.shop.tenant.slug)


def test_a_pause_is_shown_until_it_is_over(terminal: Terminal, meta: Meta) -> None:
    client.faults(meta.url, kind="code", code=130429, count=1)
    queue(meta.shop, "one")
    send(meta.shop)

    row = shown(terminal, meta.shop)
    assert (row["state"], row["pause_code"]) == ("paused", "130429")
    assert "by 130429" in terminal("lanes", "--tenant", meta.shop.tenant.slug)

    make_due(meta.shop)
    row = shown(terminal, meta.shop)
    assert (row["state"], row["paused_until"], row["pause_code"]) == ("due", None, None)


@pytest.mark.parametrize("by", ["id", "name"])
def test_an_operator_holds_a_channel_and_lets_it_go_on(terminal: Terminal, meta: Meta, by: str) -> None:
    shop = meta.shop
    name = str(shop.channel.id) if by == "id" else f"{shop.tenant.slug}/{shop.channel.name}"
    queue(shop, "one")

    assert terminal("lanes", "hold", name, "--reason", "a campaign\ngone wrong") == "held\n"
    send(shop)
    make_due(shop)
    send(shop)

    assert meta.calls() == []
    row = shown(terminal, shop)
    assert (row["state"], row["hold"]["kind"], row["hold"]["text"]) == ("held", "operator", "a campaign gone wrong")
    assert (row["hold"]["code"], row["hold"]["next_probe_at"]) == (None, None)
    assert terminal("lanes", "hold", name) == "an operator holds it already\n"
    assert rung() == []

    assert terminal("lanes", "resume", name) == "resumed\n"
    assert rung() == [str(shop.channel.id)]
    send(shop)

    assert meta.accepted() == ["one"]
    assert events(shop) == ["channel_held", "channel_resumed"]
    assert terminal("lanes", "resume", name) == "nothing held it\n"
    assert events(shop) == ["channel_held", "channel_resumed"]


def test_a_channel_can_be_held_before_anything_was_to_be_sent(terminal: Terminal, meta: Meta) -> None:
    name = f"{meta.shop.tenant.slug}/{meta.shop.channel.name}"

    terminal("lanes", "hold", name)
    queue(meta.shop, "one")
    send(meta.shop)

    assert meta.calls() == []
    assert statuses(meta.shop) == ["queued"]


def test_a_channel_that_is_not_there_is_neither_held_nor_resumed(terminal: Terminal) -> None:
    shop = factories.a_shop()

    assert terminal.refused("lanes", "hold", str(uuid4())) == "there is no such channel"
    assert terminal.refused("lanes", "hold", "sales") == "sales is neither a channel's id nor TENANT/NAME"
    assert terminal.refused("lanes", "resume", "nobody/sales") == "there is no tenant nobody"
    assert terminal.refused("lanes", "resume", f"{shop.tenant.slug}/x") == f"{shop.tenant.slug} has no channel x"
    assert "500" in terminal.refused("lanes", "hold", str(shop.channel.id), "--reason", "x" * 501)
    assert "usage: pombal lanes hold" in terminal.misused("lanes", "hold")


@pytest.mark.parametrize("part", [slice(-8, None), slice(-4, None), slice(0, 20)])
def test_a_channel_is_known_by_a_part_of_its_id(terminal: Terminal, part: slice) -> None:
    shop = factories.a_shop()
    id_ = shop.channel.id.hex[part]

    assert terminal("lanes", "hold", id_) == "held\n"
    assert lane(shop)["hold"] == "operator"
    assert terminal("lanes", "resume", id_.upper()) == "resumed\n"
    assert "on_unknown: ask" in terminal("channel", "set", shop.tenant.slug, id_, "--config", '{"on_unknown": "ask"}')


def test_a_part_of_several_ids_is_nobodys(terminal: Terminal) -> None:
    shop = factories.a_shop()
    factories.a_shop(shop.tenant)
    part = shop.channel.id.hex[:4]  # the hour of its birth
    several = f"several channels' ids begin or end with {part}: give more of it, or TENANT/NAME"

    assert terminal.refused("lanes", "hold", part) == several
    assert terminal.refused("channel", "set", shop.tenant.slug, part, "--config", "{}") == several
    assert terminal.refused("lanes", "hold", "abc") == "abc is neither a channel's id nor TENANT/NAME"
    foreign = factories.a_shop().channel.id.hex[-10:]
    said = terminal.refused("channel", "set", shop.tenant.slug, foreign, "--config", "{}")
    assert said == f"{shop.tenant.slug} has no channel {foreign}"


def why(terminal: Terminal, shop: Shop) -> str:
    head, line = terminal("lanes", "--tenant", shop.tenant.slug).splitlines()
    return line[head.index("WHY") :]


def test_the_last_word_of_a_line_is_cut_to_the_terminal(
    terminal: Terminal, meta: Meta, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "a campaign gone wrong " * 10
    terminal("lanes", "hold", str(meta.shop.channel.id), "--reason", reason)
    assert reason.strip() in why(terminal, meta.shop)  # whole, where another program reads it

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    assert max(len(line) for line in terminal("lanes", "--tenant", meta.shop.tenant.slug).splitlines()) == 160
    assert why(terminal, meta.shop).endswith("…")
    assert shown(terminal, meta.shop)["hold"]["text"] == reason.strip()
    monkeypatch.setenv("COLUMNS", "40")
    assert len(why(terminal, meta.shop)) == 24


def test_a_number_with_a_rate_of_its_own_shows_it(terminal: Terminal, meta: Meta) -> None:
    queue(meta.shop, "one")
    assert shown(terminal, meta.shop)["messages_per_second"] == 80
    assert " of " not in terminal("lanes", "--tenant", meta.shop.tenant.slug)

    configure(meta.shop, messages_per_second=20)

    assert shown(terminal, meta.shop)["messages_per_second"] == 20
    assert "0/s of 20" in terminal("lanes", "--tenant", meta.shop.tenant.slug)


def test_a_number_that_was_too_fast_says_why_it_is_slower(terminal: Terminal, meta: Meta) -> None:
    client.faults(meta.url, kind="code", code=130429, count=1)
    queue(meta.shop, "one")
    send(meta.shop)
    make_due(meta.shop)

    row = shown(terminal, meta.shop)
    assert row["pace"] < 1
    assert (row["pause_code"], row["last_pause_code"]) == (None, "130429")
    assert re.fullmatch(r"at \d+% of its rate after 130429, rising", why(terminal, meta.shop))


def test_calls_without_an_answer_are_told_before_they_are_an_outage(terminal: Terminal, meta: Meta) -> None:
    client.faults(meta.url, kind="garbage_before", count=2)
    queue(meta.shop, "one", "two")
    send(meta.shop)

    misses = shown(terminal, meta.shop)["misses"]
    assert misses > 0
    assert why(terminal, meta.shop) == f"no good answer to the last calls (misses: {misses}): few at a time"


def test_an_unknown_message_that_waits_for_an_operator_leads_to_its_letter(terminal: Terminal, meta: Meta) -> None:
    row = given_up(meta)

    assert shown(terminal, meta.shop)["unknown_for_operator"] == 1
    assert "1 unknown: see `pombal dead list`" in why(terminal, meta.shop)

    terminal("dead", "drop", str(row["id"]))
    assert shown(terminal, meta.shop)["unknown_for_operator"] == 0
    assert "dead list" not in why(terminal, meta.shop)


def test_a_number_that_is_not_there_is_a_reason_too(terminal: Terminal, meta: Meta) -> None:
    queue(meta.shop, "one")
    held = (
        "UPDATE lane SET hold = 'auth', hold_code = '100', hold_reason = 'No', held_at = now(), next_probe_at = now()"
    )
    factories.rows(meta.shop, f"{held} WHERE channel_id = :id RETURNING 1", id=meta.shop.channel.id)

    assert re.match(r"auth 100 since \S+ \(or the phone_number_id is wrong\); .* — No$", why(terminal, meta.shop))


def test_a_channel_goes_on_although_redis_cannot_be_told(meta: Meta) -> None:
    name = f"{meta.shop.tenant.slug}/{meta.shop.channel.name}"
    queue(meta.shop, "one")
    output("-m", "pombal", "lanes", "hold", name)

    said = output("-m", "pombal", "lanes", "resume", name, env={"REDIS_URL": NOWHERE})

    assert said == "Redis is away: the sweep rings when it is back\nresumed\n"
    assert lane(meta.shop)["hold"] is None


# ------------------------------------------------------------------------------------------------ tokens, settings


def test_a_new_token_ends_the_hold_of_the_old_one(
    terminal: Terminal, meta: Meta, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop, new = meta.shop, "EAAB-the-next-token"
    client.rules(meta.url, access_token=new)
    queue(shop, "one", "two")
    send(shop)
    assert lane(shop)["hold"] == "auth"

    typed(monkeypatch, f"{new}\n")
    assert terminal("channel", "token", shop.tenant.slug, shop.channel.name).startswith("sealed; sending is tried")
    assert rung() == [str(shop.channel.id)]
    send(shop)

    assert meta.accepted() == ["one", "two"]
    assert shown(terminal, shop)["state"] == "idle"
    assert events(shop) == ["channel_held", "channel_resumed"]
    with factories.superuser() as connection:
        (kept,) = connection.execute("SELECT sealed FROM channel WHERE id = %s", [shop.channel.id]).fetchall()
    assert new.encode() not in kept[0]


def test_a_new_token_does_not_end_an_operators_hold(
    terminal: Terminal, meta: Meta, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(meta.shop, "one")
    terminal("lanes", "hold", str(meta.shop.channel.id))

    typed(monkeypatch, f"{TOKEN}\n")
    assert terminal("channel", "token", meta.shop.tenant.slug, meta.shop.channel.name) == "sealed\n"
    send(meta.shop)

    assert meta.calls() == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "shorter than 8"),
        ("short\n", "shorter than 8"),
        ("EAAB-ção-ção", "ASCII"),
        ("EAAB" * 2000, "4096"),
        ("Bearer EAAB-the-token\n", "has a blank in it"),
        ("EAAB-half-a-\ntoken\n", "has a blank in it"),
    ],
)
def test_a_token_that_no_header_can_carry_is_refused(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    shop = factories.a_shop()
    typed(monkeypatch, text)

    said = terminal.refused("channel", "token", shop.tenant.slug, shop.channel.name)

    assert reason in said
    assert "EAAB" not in said
    with factories.seen_by(shop) as s:
        assert factories.all_of(s, "SELECT sealed FROM channel") == [{"sealed": None}]


def test_settings_of_sending_are_changed_one_by_one_and_put_back(terminal: Terminal) -> None:
    shop = factories.a_shop()

    def change(config: str) -> dict[str, Any]:
        made: dict[str, Any] = terminal.json("channel", "set", shop.tenant.slug, shop.channel.name, "--config", config)
        (listed,) = terminal.json("channel", "list", shop.tenant.slug)
        assert made["config"] == listed["config"]
        return {name: value for name, value in listed["config"].items() if name not in ("phone_number_id", "waba_id")}

    assert change('{"messages_per_second": 500, "on_unknown": "ask"}') == {
        "messages_per_second": 500,
        "on_unknown": "ask",
    }
    assert change('{"settle_seconds": 90.5}') == {
        "messages_per_second": 500,
        "on_unknown": "ask",
        "settle_seconds": 90.5,
    }
    assert change('{"messages_per_second": null, "on_unknown": null, "settle_seconds": null}') == {}
    assert "phone_number_id: " in terminal("channel", "set", shop.tenant.slug, shop.channel.name, "--config", "{}")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ('{"messages_per_second": 0}', f"--config: {A_RATE}"),
        ('{"messages_per_second": 100001}', f"--config: {A_RATE}"),
        ('{"messages_per_second": "80"}', f"--config: {A_RATE}"),
        ('{"settle_seconds": 0.5}', "--config: settle_seconds must be a number from 1 to 3600"),
        ('{"settle_seconds": 3601}', "--config: settle_seconds must be a number from 1 to 3600"),
        ('{"on_unknown": "maybe"}', "on_unknown must be once_more or ask"),
        ('{"on_unknown": 1}', "--config: on_unknown must be a text"),
        ('{"default": "yes"}', "--config: default must be true or false"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(terminal: Terminal, config: str, reason: str) -> None:
    shop = factories.a_shop()

    assert terminal.refused("channel", "set", shop.tenant.slug, shop.channel.name, "--config", config) == reason

    given = {"phone_number_id": uuid4().hex, "waba_id": "2", "app_secret": uuid4().hex} | json.loads(config)
    create = ("channel", "create", shop.tenant.slug, "meta", "--name", "more", "--config", json.dumps(given))
    assert terminal.refused(*create) == reason


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            '{"waba_id": "5"}',
            "--config: waba_id is not known here; there are messages_per_second, on_unknown, settle_seconds, default",
        ),
        ("[]", "--config: must be an object"),
        ("{", '--config is not JSON; it looks like {"messages_per_second": 80}'),
        ("\udcff", '--config is not JSON; it looks like {"messages_per_second": 80}'),
    ],
)
def test_settings_that_are_none_are_refused(terminal: Terminal, config: str, reason: str) -> None:
    shop = factories.a_shop()

    assert terminal.refused("channel", "set", shop.tenant.slug, shop.channel.name, "--config", config) == reason


def test_what_a_channel_needs_is_named(terminal: Terminal) -> None:
    create = ("channel", "create", factories.a_tenant().slug, "meta", "--name", "more", "--config")

    assert terminal.refused(*create, '{"waba_id": "5"}') == "--config: phone_number_id is required"
    assert terminal.refused(*create, '{"waba_id": 5}') == "--config: waba_id must be a text"
    assert terminal.refused(*create, "?").endswith('it looks like {"phone_number_id": "…", "waba_id": "…"}')


def test_a_channel_is_created_with_its_settings(terminal: Terminal) -> None:
    tenant = factories.a_tenant()
    given = {"phone_number_id": "1", "waba_id": "2", "app_secret": uuid4().hex, "messages_per_second": 1000}

    terminal("channel", "create", tenant.slug, "meta", "--name", "c", "--config", json.dumps(given))

    (listed,) = terminal.json("channel", "list", tenant.slug)
    assert listed["config"] == {"phone_number_id": "1", "waba_id": "2", "messages_per_second": 1000}


def test_a_tenant_has_one_default_channel_at_most(terminal: Terminal) -> None:
    first = factories.a_shop(default=True)
    second, third = factories.a_shop(first.tenant), factories.a_shop(first.tenant, default=True)

    def defaults() -> list[str]:
        listed = terminal.json("channel", "list", first.tenant.slug)
        return [row["name"] for row in listed if row["config"].get("default")]

    assert defaults() == [third.channel.name]
    terminal("channel", "set", first.tenant.slug, second.channel.name, "--config", '{"default": true}')
    assert defaults() == [second.channel.name]
    terminal("channel", "set", first.tenant.slug, second.channel.name, "--config", '{"default": false}')
    assert defaults() == []


# ------------------------------------------------------------------------------------------------------- templates


def template(name: str, status: str = "APPROVED", language: str = "pt_BR") -> config.Template:
    return config.Template(name, language, status, "UTILITY")


def known(terminal: Terminal, shop: Shop) -> dict[tuple[str, str], str]:
    rows = terminal.json("template", "list", shop.tenant.slug)
    return {(row["channel"], row["name"]): row["status"] for row in rows}


def test_templates_are_asked_for_once_per_account_and_known_on_all_its_channels(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = (*(template(f"t{n}") for n in range(120)), template("promo", "REJECTED"))
    shop = factories.a_shop(access_token=TOKEN)
    beside = factories.a_shop(shop.tenant, waba_id=shop.number.waba_id)  # has no token of its own
    with a_number_at_meta(monkeypatch, shop, templates=listed):
        (made,) = terminal.json("template", "sync", shop.tenant.slug)

        assert (made["waba_id"], made["channels"]) == (
            shop.number.waba_id,
            sorted([shop.channel.name, beside.channel.name]),
        )
        assert (made["templates"], made["error"]) == ({"approved": 120, "rejected": 1}, None)
        found = known(terminal, shop)
        assert len(found) == 242
        assert found[(beside.channel.name, "promo")] == "rejected"
        assert "rejected" in terminal("template", "sync", shop.tenant.slug, "--channel", shop.channel.name)


def test_a_template_that_is_no_longer_listed_is_deleted(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = factories.a_shop(access_token=TOKEN)
    verdict = {"tenant_id": shop.tenant.id, "channel_id": shop.channel.id, "language": "pt_BR", "category": None}
    now = datetime.now(UTC)
    with factories.seen_by(shop) as s:
        Template.heard(
            s,
            [
                verdict | {"name": "gone", "status": "approved", "reason": None, "status_at": now},
                verdict | {"name": "kept", "status": "rejected", "reason": "TAG_CONTENT_MISMATCH", "status_at": now},
                # Told by a webhook while the question was under way: newer than the answer.
                verdict
                | {"name": "young", "status": "approved", "reason": None, "status_at": now + timedelta(hours=1)},
            ],
        )
    with a_number_at_meta(monkeypatch, shop, templates=(template("kept", "REJECTED"),)):
        terminal("template", "sync", shop.tenant.slug)

    rows = {row["name"]: row for row in terminal.json("template", "list", shop.tenant.slug)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "gone": "deleted",
        "kept": "rejected",
        "young": "approved",
    }
    assert rows["kept"]["reason"] == "TAG_CONTENT_MISMATCH"


def test_an_account_that_refuses_does_not_keep_the_others_from_being_asked(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = factories.a_shop(access_token=TOKEN)
    refused = factories.a_shop(good.tenant, access_token="EAAB-an-old-token")
    silent = factories.a_shop(good.tenant)
    channels = [
        config.Channel(
            name=shop.channel.name,
            phone_number_id=shop.number.phone_number_id,
            waba_id=shop.number.waba_id,
            access_token=TOKEN,
            templates=(template("hello"),),
        )
        for shop in (good, refused, silent)
    ]
    with a_meta(*channels) as url:
        monkeypatch.setenv("WHATSAPP_GRAPH_URL", url)
        said = output("-m", "pombal", "template", "sync", good.tenant.slug, code=1)

    *told, last = said.splitlines()
    assert one_line(last + "\n") == (
        f"{refused.channel.name}: Meta refuses: code 190; "
        f"{silent.channel.name}: no access token: see `pombal channel token`"
    )
    assert len(told) == 2  # the head of the table, and the account that answered
    assert known(terminal, good) == {(good.channel.name, "hello"): "approved"}


def test_a_meta_that_is_away_is_said_in_one_line(terminal: Terminal) -> None:
    shop = factories.a_shop(access_token=TOKEN)

    said = output(
        "-m", "pombal", "template", "sync", shop.tenant.slug, env={"WHATSAPP_GRAPH_URL": "http://127.0.0.1:9"}, code=1
    )

    assert one_line(said).startswith(f"{shop.channel.name}: Meta gave no answer")
    assert "Traceback" not in said
    assert terminal("template", "list", shop.tenant.slug).startswith("no templates are known")


# ----------------------------------------------------------------------------------------------- trace, dead letters


def test_a_sent_message_tells_its_story_by_any_of_its_ids(terminal: Terminal, meta: Meta) -> None:
    (id_,) = queue(meta.shop, "one")
    request_id = uuid4().hex
    factories.rows(meta.shop, "UPDATE message SET request_id = :r WHERE id = :id RETURNING 1", r=request_id, id=id_)
    send(meta.shop)
    (attempt,) = attempts(meta.shop, id_)

    ids = (str(id_), request_id, attempt["provider_id"], str(attempt["id"]), callback_of(attempt["id"]))
    stories = [terminal.json("trace", wanted) for wanted in ids]

    story = stories[0]
    assert all(other["message"] == story["message"] for other in stories)
    assert [row["status"] for row in story["message"]] == ["sent"]
    assert [(row["number"], row["outcome"]) for row in story["attempt"]] == [(1, "accepted")]
    assert story["lane"] == []
    assert len(story["event"]) == 2
    assert "request_digest" not in story["message"][0]


def test_a_message_that_was_sent_twice_is_found_by_either_id_of_the_provider(terminal: Terminal, meta: Meta) -> None:
    client.faults(meta.url, kind="garbage_after", count=1)
    (id_,) = queue(meta.shop, "one")
    send(meta.shop)
    make_due(meta.shop)
    send(meta.shop)  # once more, since nobody told what became of it
    first, second = [call["wamid"] for call in meta.calls()]
    told = "UPDATE attempt SET provider_id = :p WHERE message_id = :id AND number = 1 RETURNING 1"
    factories.rows(meta.shop, told, p=first, id=id_)  # as a late status would

    by_first, by_second = terminal.json("trace", first), terminal.json("trace", second)

    assert by_first["message"] == by_second["message"]
    assert [row["number"] for row in by_first["attempt"]] == [1, 2]
    assert [row["outcome"] for row in by_first["attempt"]] == ["unknown", "accepted"]


def test_a_message_that_waits_says_what_holds_it(terminal: Terminal, meta: Meta) -> None:
    (id_,) = queue(meta.shop, "one")
    terminal("lanes", "hold", str(meta.shop.channel.id), "--reason", "a campaign gone wrong")

    (row,) = terminal.json("trace", str(id_))["lane"]

    assert (row["state"], row["hold"], row["hold_reason"]) == ("held", "operator", "a campaign gone wrong")
    assert "a campaign gone wrong" in terminal("trace", str(id_))


def given_up(meta: Meta) -> dict[str, Any]:
    """The letter of a message of which nobody knows whether it was sent."""
    configure(meta.shop, on_unknown="ask")
    client.faults(meta.url, kind="garbage_before", count=1)
    (id_,) = queue(meta.shop, "one")
    send(meta.shop)
    make_due(meta.shop)
    send(meta.shop)
    (row,) = factories.rows(meta.shop, "SELECT * FROM dead_letter WHERE message_id = :id", id=id_)
    assert message(meta.shop, id_)["status"] == "unknown"
    return row


def test_a_message_that_was_given_up_is_sent_again(terminal: Terminal, meta: Meta) -> None:
    row = given_up(meta)
    story = terminal.json("trace", str(row["message_id"]))
    assert [one["id"] for one in story["dead letter"]] == [str(row["id"])]
    listed = terminal.json("dead", "list", "--fingerprint", row["fingerprint"])
    assert str(row["message_id"]) in [one["message"] for one in listed]

    assert terminal("dead", "retry", str(row["id"])) == "1 retried\n"

    assert message(meta.shop, row["message_id"])["status"] == "queued"
    assert rung() == [str(meta.shop.channel.id)]
    send(meta.shop)
    assert meta.accepted() == ["one"]
    assert factories.rows(meta.shop, "SELECT state FROM dead_letter WHERE message_id IS NOT NULL") == [
        {"state": "retried"}
    ]


def test_a_message_that_was_settled_meanwhile_is_not_sent_again(terminal: Terminal, meta: Meta) -> None:
    row = given_up(meta)
    sent = "UPDATE message SET status = 'delivered' WHERE id = :id RETURNING 1"
    factories.rows(meta.shop, sent, id=row["message_id"])

    said = terminal("dead", "retry", str(row["id"]))

    assert said == "1 retried, 1 of them had been settled meanwhile\n"
    send(meta.shop)
    assert len(meta.calls()) == 1
    assert factories.rows(meta.shop, "SELECT state FROM dead_letter WHERE message_id IS NOT NULL") == [
        {"state": "retried"}
    ]


def test_a_dropped_message_has_failed(terminal: Terminal, meta: Meta) -> None:
    row = given_up(meta)

    assert terminal("dead", "drop", str(row["id"])) == "1 dropped\n"

    assert message(meta.shop, row["message_id"])["status"] == "failed"
    assert rung() == []
    assert factories.rows(meta.shop, "SELECT state FROM dead_letter WHERE message_id IS NOT NULL") == [
        {"state": "dropped"}
    ]


def test_letters_of_messages_and_of_jobs_are_retried_together(terminal: Terminal, meta: Meta) -> None:
    row = given_up(meta)
    with factories.superuser() as connection:
        connection.execute("UPDATE dead_letter SET state = 'dropped' WHERE id <> %s", [row["id"]])
    delivery = factories.a_delivery(meta.shop, b"not JSON")
    with db.session() as s:
        DeadLetter.record(
            s,
            [
                letter(key=f"d:{delivery}", actor="incoming_message", args=[[]], error="bad", delivery_id=delivery),
                letter(key=f"job:{uuid4()}", actor="outgoing_message", args=[str(meta.shop.channel.id)], error="bad"),
                letter(key=f"job:{uuid4()}", actor="fly", args=[], error="bad"),
            ],
        )

    said = terminal("dead", "retry", "--all", "--yes")

    assert said == "4 dead letters to retry\n3 retried, 1 left: no actor of that name here\n"
    assert rung() == [str(meta.shop.channel.id)] * 2
    assert factories.delivery(delivery).state == "pending"
    assert message(meta.shop, row["message_id"])["status"] == "queued"


# ------------------------------------------------------------------------------------------------------------ keys


def test_keys_are_listed_without_their_text(terminal: Terminal) -> None:
    tenant = factories.a_tenant()
    assert terminal("key", "list", tenant.slug) == "no keys\n"
    made = terminal.json("key", "create", tenant.slug, "--name", "shop", "--scope", "messages:send")
    old = terminal.json("key", "create", tenant.slug, "--name", "old")
    terminal("key", "revoke", tenant.slug, old["id"])

    first, second = terminal.json("key", "list", tenant.slug)

    assert (first["id"], first["name"], first["scopes"]) == (made["id"], "shop", ["messages:send"])
    assert (first["last_used_at"], first["revoked_at"]) == (None, None)
    assert second["revoked_at"]
    said = terminal("key", "list", tenant.slug)
    assert re.search(r"shop +never +messages:send\n", said)
    assert made["api_key"] not in said


# ---------------------------------------------------------------------------------------------------- doctor, worker


def test_what_is_left_to_people_is_a_note(servers: Servers) -> None:
    servers.sql("DELETE FROM dead_letter")  # other tests leave theirs
    servers.sql(
        "INSERT INTO dead_letter (id, key, actor, queue, args, error, fingerprint)"
        " VALUES (gen_random_uuid(), 'x', 'a', 'a', '{}', 'bad', 'f')"
    )
    try:
        found = json.loads(output("-m", "pombal", "doctor", "--json", env=servers.env))
    finally:
        servers.sql("DELETE FROM dead_letter WHERE key = 'x'")

    notes = [row["what"] for row in found if row["level"] == "note"]
    assert notes == ["1 dead letter is open (`pombal dead list --grouped`)"]


def test_channels_that_cannot_send_are_named(servers: Servers) -> None:
    slug = f"t{uuid4().hex[:12]}"
    given = {"phone_number_id": "1", "waba_id": "2", "app_secret": uuid4().hex}
    create = ("channel", "create", slug, "meta", "--name", "sales", "--config", json.dumps(given))
    output("-m", "pombal", "tenant", "create", slug, "--name", "A", env=servers.env)
    try:
        output("-m", "pombal", *create, env=servers.env)
        output("-m", "pombal", "lanes", "hold", f"{slug}/sales", env=servers.env)

        found = doctor(servers.env, code=0)
    finally:
        servers.sql("DELETE FROM tenant WHERE slug = %s", slug)

    assert found["warning"] == [
        f"no access token, so nothing can be sent (`pombal channel token`): {slug}/sales",
        f"sending is held (`pombal lanes`): {slug}/sales (operator)",
    ]


def test_an_address_that_is_not_metas_is_found(servers: Servers) -> None:
    url = {**servers.env, "WHATSAPP_GRAPH_URL": "graph.facebook.com"}
    version = {**servers.env, "WHATSAPP_API_VERSION": "26"}

    assert doctor(url, code=1)["error"] == ["WHATSAPP_GRAPH_URL is not an http(s) address"]
    assert doctor(version, code=1)["error"] == ["WHATSAPP_API_VERSION must look like v26.0"]
    assert "messages are sent through graph.facebook.com, version v26.0" in doctor(servers.env, code=0)["ok"]


def test_the_procfile_serves_what_is_sent() -> None:
    assert "outgoing_message" in procfile_queues()


def by_hand(meta: Meta, folder: Path, argument: str, code: int = 0) -> str:
    """What `pombal run outgoing_message` prints in a terminal that knows nothing but the folder of `up`."""
    names = ("DATABASE_URL", "DATABASE_OWNER_URL", "REDIS_URL", "POMBAL_SECRET_KEYS", "POMBAL_MODE")
    written = {name: os.environ[name] for name in names} | {"WHATSAPP_GRAPH_URL": meta.url}
    (folder / "env").write_text("".join(f"{name}={value}\n" for name, value in written.items()))
    bare = dict.fromkeys(written, "") | {"POMBAL_DATA": str(folder)}
    return output("-m", "pombal", "run", "outgoing_message", json.dumps([argument]), env=bare, code=code)


def test_a_lane_is_sent_from_by_hand_with_the_addresses_that_up_wrote_down(meta: Meta, tmp_path: Path) -> None:
    queue(meta.shop, "one")

    by_hand(meta, tmp_path, str(meta.shop.channel.id))

    assert (meta.accepted(), statuses(meta.shop)) == (["one"], ["sent"])


def test_what_is_no_channels_id_is_refused_in_one_line(meta: Meta, tmp_path: Path) -> None:
    assert one_line(by_hand(meta, tmp_path, "nonsense", code=1)) == "not the id of a channel"


# -------------------------------------------------------------------------------------------------------------- up


@pytest.mark.skipif(not LINUX, reason="processes are found through /proc")
def test_up_lets_anybody_send_with_one_line(tmp_path: Path) -> None:
    with Fleet(tmp_path / "up", "--procs", "sandbox,web,worker,clock").start() as fleet:
        printed = fleet.output.partition("try, in a second terminal in this folder:\n\n")[2].split("\n\n")[1]
        curl, lanes = re.findall(r"^  \S.*(?:\n    .*)*", printed, re.MULTILINE)
        demo = fleet.demo
        channel = demo["tenants"][0]["channels"][0]

        queued = posted(fleet, curl)
        until(lambda: client.calls(demo["sandbox"]["meta"])["calls"])

        (call,) = client.calls(demo["sandbox"]["meta"])["calls"]
        assert (call["to"], call["outcome"]) == ("+5511944440001", "accepted")
        until(lambda: status(fleet, queued) == "read")  # the simulated Meta tells what became of it
        assert "demo/demo-meta" in fleet.shell(lanes)
        (played,) = json.loads((fleet.data / "sandbox.json").read_text())["apps"]
        assert played["channels"][0]["access_token"] == channel["access_token"]
        assert f"WHATSAPP_GRAPH_URL={demo['sandbox']['meta']}\n" in (fleet.data / "env").read_text()

        # As a folder is left by a version that could not send.
        fleet.rows("UPDATE channel SET sealed = NULL WHERE id = %s RETURNING 1", channel["id"])
        fleet.stop()
        del demo["tenants"][0]["channels"][0]["access_token"]
        (fleet.data / "demo.json").write_text(json.dumps(demo))
        fleet.start()

        posted(fleet, curl)
        until(lambda: client.calls(fleet.demo["sandbox"]["meta"])["calls"])
        assert [call["outcome"] for call in client.calls(fleet.demo["sandbox"]["meta"])["calls"]] == ["accepted"]
        assert fleet.demo["tenants"][0]["channels"][0]["access_token"]
        fleet.stop()


def posted(fleet: Fleet, curl: str) -> str:
    """The id of a message that was queued by a printed command."""
    if shutil.which("curl"):
        said = fleet.shell(curl)
        assert "202 Accepted" in said
        return str(json.loads(said.splitlines()[-1])["message_id"])
    words = shlex.split(curl)
    headers = dict(words[n + 1].split(": ", 1) for n, word in enumerate(words) if word == "-H")
    answer = httpx.post(words[2], content=words[words.index("-d") + 1], headers=headers, trust_env=False)
    assert answer.status_code == 202
    return str(answer.json()["message_id"])


def status(fleet: Fleet, id_: str) -> str:
    (row,) = fleet.rows("SELECT status FROM message WHERE id = %s", id_)
    return str(row[0])
