"""What an operator types about SIP accounts: made, looked at, registered, un-registered, changed, removed."""

import io
import itertools
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import RowMapping, select

from models import RegisterStatus, SipRegistration, Tenant
from pombal import db
from pombal.cli import doctor_sip, main
from pombal.cli.fleet import ROOT
from pombal.secrets import unseal
from pombal.settings import settings
from sandbox.sip_thread import SipThread
from tests import factories
from tests.chaos.fleet import Fleet, until
from tests.pombal.test_cli import Terminal
from tests.sandbox.drachtio_servers import SECRET, a_drachtio
from tests.sandbox.sip_servers import a_registrar
from tests.sip.accounts import a_registering_worker, nearby

pytestmark = pytest.mark.usefixtures("queues")

PASSWORD = "pa55 of the trunk"
LINUX = sys.platform == "linux"
_numbers = itertools.count(5511_9100_0001)


class Here(Terminal):
    """One in whose process a worker may be, whose lines go to standard error."""

    def __call__(self, *arguments: str) -> str:
        self._capsys.readouterr()
        code = main(arguments)
        out, err = self._capsys.readouterr()
        assert code == 0, out + err
        assert all(line.startswith("{") for line in err.splitlines()), err
        return out


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Here(capsys)


@pytest.fixture
def tenant() -> Tenant:
    return factories.a_tenant()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Whose changes are settings; registrars on this machine may be reached. Nobody else's account is due."""
    with nearby(monkeypatch):
        yield monkeypatch


@pytest.fixture(scope="module")
def provider() -> Iterator[SipThread]:
    with a_registrar() as running:
        yield running


def type_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def create(tenant: Tenant, name: str = "trunk", *more: str, host: str = "sip.example") -> tuple[str, ...]:
    given = ("--name", name, "--host", host, "--username", "5511999990000", "--password-stdin")
    return "sip", "create", tenant.slug, *given, *more


def at(provider: SipThread, *more: str) -> tuple[str, ...]:
    """For a create at this registrar."""
    return ("--port", str(provider.port), *more)


@pytest.fixture
def account(
    terminal: Terminal, tenant: Tenant, provider: SipThread, environment: pytest.MonkeyPatch
) -> tuple[str, str]:
    """The name and the user of one that the registrar knows, and nobody has registered yet."""
    user = str(next(_numbers))
    provider.user(user, PASSWORD)
    type_in(environment, f"{PASSWORD}\n")
    words = ("--name", "trunk", "--host", "127.0.0.1", "--username", user, "--password-stdin")
    terminal("sip", "create", tenant.slug, *words, *at(provider))
    return f"{tenant.slug}/trunk", user


def row(tenant: Tenant, name: str = "trunk") -> RowMapping:
    with factories.seen_by(tenant) as s:
        (found,) = SipRegistration.listing(s, tenant_id=tenant.id, name=name)
    return found


def password(tenant: Tenant, name: str = "trunk") -> str:
    query = select(SipRegistration.sealed).where(SipRegistration.name == name, SipRegistration.tenant_id == tenant.id)
    with factories.seen_by(tenant) as s:
        sealed = s.scalars(query).one()
    return str(unseal(row(tenant, name)["id"], sealed)["password"])


def write(tenant: Tenant, **values: str) -> None:
    """As nobody would, to make what takes hours be so now."""
    with factories.superuser() as connection:
        for name, value in values.items():
            connection.execute(f"UPDATE sip_registration SET {name} = {value} WHERE tenant_id = %s", [tenant.id])  # noqa: S608


# ------------------------------------------------------------------------------------------------------------- making


def test_an_account_has_what_was_said_of_it_and_is_due_at_once(
    terminal: Terminal, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    type_in(monkeypatch, f" {PASSWORD} \r\n")
    more = ["--auth-username", "5511@sip.example", "--proxy", "Edge.Example", "--port", "5080", "--transport", "tcp"]
    more += ["--interval", "600", "--target", "sip:acme@x.sip.livekit.cloud;transport=tcp", "--no-md5"]
    said = terminal.json(*create(tenant, "trunk", *more, "--external-id", "17", "--contact-host", "203.0.113.7:5060"))

    found = row(tenant)
    assert said["id"] == str(found["id"])
    assert said["contact_user"] == found["contact_token"]
    wanted = {
        "host": "sip.example",
        "username": "5511999990000",
        "auth_username": "5511@sip.example",
        "proxy": "edge.example",
        "port": 5080,
        "transport": "tcp",
        "interval": 600,
        "sender": "auto",
        "contact_host": "203.0.113.7:5060",
        "target": "sip:acme@x.sip.livekit.cloud;transport=tcp",
        "allows_md5": False,
        "external_id": "17",
        "is_enabled": True,
        "status": "pending",
    }
    assert {name: found[name] for name in wanted} == wanted
    assert found["next_refresh_at"] <= found["now"]
    assert password(tenant) == f" {PASSWORD} "
    type_in(monkeypatch, "another\n")
    assert terminal.refused(*create(tenant)) == f"{tenant.slug} has a SIP account of that name already"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--host", "sip:sip.example"),
        ("--host", "https://sip.example/"),
        ("--host", "sip.example\r\nVia: x"),
        ("--host", "sip.example:5060"),
        ("--host", ""),
        ("--username", "5511\r\nContact: <sip:evil@evil.example>"),
        ("--username", '5511"'),
        ("--username", "5511@sip.example"),
        ("--username", ""),
        ("--auth-username", 'a", realm="x'),
        ("--proxy", "10.1"),
        ("--contact-host", "sbc.example>;expires=0"),
        ("--target", "sip:a@b\r\nX: y"),
        ("--target", "https://livekit.example"),
        ("--target", "<sip:a@b>"),
        ("--target", "sip:a@"),
        ("--external-id", "../../admin"),
        ("--external-id", ".."),
        ("--name", "a/b"),
        ("--name", "a\nb"),
        ("--name", "-a"),
        ("--name", ""),
    ],
)
def test_what_could_end_a_header_or_lead_elsewhere_is_refused(
    terminal: Terminal, tenant: Tenant, monkeypatch: pytest.MonkeyPatch, option: str, value: str
) -> None:
    type_in(monkeypatch, f"{PASSWORD}\n")

    said = terminal.refused(*create(tenant, "trunk", f"{option}={value}"))

    assert len(value) < 5 or value not in said
    assert terminal("sip", "list", tenant.slug) == "no SIP accounts\n"


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("", "there is no password"),
        ("\nsecond line\n", "there is no password"),
        ("first of them\nsecond\n", "more than one line"),
        ("x" * 2000, "more than 1024 characters"),
        ("tab\tin it\n", "control characters"),
        ("nul\0in it\n", "control characters"),
        ("escape\x1b[2J\n", "control characters"),
    ],
)
def test_a_password_that_cannot_be_one_is_refused_without_being_said(
    terminal: Terminal, tenant: Tenant, monkeypatch: pytest.MonkeyPatch, typed: str, reason: str
) -> None:
    type_in(monkeypatch, typed)

    said = terminal.refused(*create(tenant))

    assert reason in said
    assert len(typed) < 10 or typed.strip() not in said


@pytest.mark.parametrize("option", ["--interval=59", "--interval=86401", "--port=0", "--transport=ws", "--sender=me"])
def test_numbers_out_of_their_range_are_wrong_usage(terminal: Terminal, tenant: Tenant, option: str) -> None:
    assert "usage: pombal sip create" in terminal.misused(*create(tenant, "trunk", option))


@pytest.mark.skipif(not LINUX, reason="processes are read through /proc")
def test_a_password_is_in_no_list_of_processes_and_in_no_output(tenant: Tenant, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pombal", *create(tenant, "trunk", "--sender", "direct")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    seen = (Path("/proc") / str(process.pid) / "cmdline").read_bytes()
    seen += (Path("/proc") / str(process.pid) / "environ").read_bytes()

    said, _ = process.communicate(f"{PASSWORD}\n".encode(), timeout=60)

    assert process.returncode == 0, said
    assert PASSWORD.encode() not in seen + said
    assert password(tenant) == PASSWORD


# ----------------------------------------------------------------------------------------------- registered by a worker


def test_one_is_registered_shown_unregistered_and_removed(
    terminal: Terminal, tenant: Tenant, provider: SipThread, account: tuple[str, str]
) -> None:
    name, user = account
    with a_registering_worker():
        said = terminal("sip", "register", "trunk", "--tenant", tenant.slug)
        assert f"{name}: registered for 300 s by udp/127.0.0.1:{provider.port}; next try " in said
        assert provider.state(user)["registered"]

        shown = terminal("sip", "show", name)
        found = row(tenant)
        assert re.search(r"^status: +registered$", shown, re.MULTILINE)
        assert re.search(r"^next try: .*, in \d min \d+ s: to refresh the binding before it ends$", shown, re.MULTILINE)
        assert re.search(r"^binding ends: .* \(granted 300 s, asked for 300 s\)$", shown, re.MULTILINE)
        assert re.search(rf"^calls come to: +sip:{found['contact_token']}@127\.0\.0\.1", shown, re.MULTILINE)
        assert re.search(rf"registered +200 +\d.*udp/127.0.0.1:{provider.port}", shown)
        assert re.search(r"^sent by: +direct, which bound it; next too — DRACHTIO_HOST is not set", shown, re.MULTILINE)
        as_json = terminal.json("sip", "show", str(found["id"]))
        assert (as_json["status"], as_json["sent_by"], as_json["tenant"]) == ("registered", "direct", tenant.slug)
        assert (as_json["bound_by"], as_json["contact_user"]) == ("direct", found["contact_token"])
        assert [one["outcome"] for one in as_json["history"]][-1] == "registered"
        times = [as_json[one] for one in ("created_at", "expires_at", "last_attempt_at")] + [
            as_json["history"][-1]["at"]
        ]
        assert all(re.fullmatch(r"[\d-]{10}T[\d:]{8}\.\d{3}Z", at) for at in times), times
        (listed,) = terminal.json("sip", "list", tenant.slug, "--status", "registered")
        assert (listed["name"], listed["tenant"], listed["status"]) == ("trunk", tenant.slug, "registered")
        line = terminal("sip", "list").splitlines()[1]
        assert line.split()[:3] == [name, found["id"].hex[-8:], "registered"]
        assert PASSWORD not in shown + str(as_json) + str(listed) + line
        assert user not in str(listed) + line

        assert terminal("sip", "unregister", name).endswith(f"{name}: un-registered\n")
        assert not provider.state(user)["registered"]
        assert "never: it is disabled" in terminal("sip", "show", name)
        assert "disabled" in terminal("sip", "list", tenant.slug)

        assert f"{name}: registered for" in terminal("sip", "register", name)
        assert terminal.refused("sip", "remove", name) == "say --yes to remove it"
        ends = row(tenant)["expires_at"]
        gone = terminal("sip", "remove", name, "--yes")
        assert gone.startswith("removed, and the name is free; its binding is being ended")
        assert f"at most until {ends:%Y-%m-%dT%H:%M:%S}Z" in gone
        provider.until(lambda: not provider.state(user)["registered"])
    assert terminal("sip", "list", tenant.slug) == "no SIP accounts\n"
    assert terminal.refused("sip", "show", name) == "there is no SIP account trunk"


def test_a_refusal_is_told_with_its_code_and_the_next_try(
    terminal: Terminal,
    tenant: Tenant,
    account: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, user = account
    type_in(monkeypatch, "another than it knows\n")
    terminal("sip", "change", name, "--password-stdin")

    with a_registering_worker():
        assert main(["sip", "register", name]) == 1
        said = capsys.readouterr().out

        assert f"{name}: not registered: 403 " in said
        assert re.search(r"next try .*, in [^:]+: it was refused, so providers are asked seldom", said)
        assert user not in said
        assert "failed" in terminal("sip", "list", tenant.slug)
        type_in(monkeypatch, f"{PASSWORD}\n")
        assert terminal("sip", "change", name, "--password-stdin") == "changed; it is registered anew\n"
        assert f"{name}: registered for" in terminal("sip", "register", name)


def test_what_nobody_works_on_is_given_up_in_time_and_the_wish_stays(
    terminal: Terminal, tenant: Tenant, account: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    name, _ = account

    assert main(["sip", "register", name, "--wait", "1"]) == 1

    assert f"{name}: nothing came of it in 1 s. It goes on" in capsys.readouterr().out
    assert row(tenant)["asked_at"] is not None
    write(tenant, next_refresh_at="now() - interval '20 seconds'")
    assert "does a worker of sip_refresh run?" in terminal("sip", "show", name)
    assert "late by 20 s" in terminal("sip", "list", tenant.slug)
    assert terminal("sip", "register", name, "--wait", "0").startswith("asked for: ")


def test_an_earlier_attempt_is_told_as_that_and_its_error_is_not_the_answer(
    terminal: Terminal, tenant: Tenant, provider: SipThread, account: tuple[str, str]
) -> None:
    name, user = account
    provider.habit(user, code=503, delay=5, next=1)

    with a_registering_worker():
        provider.until(lambda: row(tenant)["last_attempt_at"] is not None)
        said = terminal("sip", "register", name)

    assert said.startswith(f"{name}: it is to be registered\n{name}: an earlier attempt is under way; ")
    assert "503" not in said.replace(name, "")  # which is made of random digits
    assert f"{name}: registered for 300 s" in said


def test_an_earlier_attempt_that_does_not_end_is_not_waited_for_without_an_end(
    tenant: Tenant,
    account: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pombal.cli.sip._MORE", 0)
    write(tenant, claimed_until="now() + interval '1 hour'", last_attempt_at="now()", register_error="'403 of before'")

    for word in ("register", "unregister"):
        assert main(["sip", word, account[0], "--wait", "1"]) == 1
        said = capsys.readouterr().out
        assert said.startswith(f"{account[0]}: it is to be ")
        assert re.search(r"nothing came of it in \d+ s: an earlier attempt is under way; ", said)
        assert ": 403 " not in said
        assert "running?" not in said


def test_who_stops_waiting_leaves_the_wish(
    terminal: Terminal,
    tenant: Tenant,
    account: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)

    assert main(["sip", "register", account[0]]) == 130

    assert "it goes on: " in capsys.readouterr().out
    assert row(tenant)["asked_at"] is not None


def test_an_account_of_a_controller_is_left_alone_until_it_is_taken_over(
    terminal: Terminal, tenant: Tenant, provider: SipThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, name = str(next(_numbers)), f"{tenant.slug}/theirs"
    provider.user(user, PASSWORD)
    words = ("--host", "127.0.0.1", "--username", user, "--sender", "external", *at(provider))
    said = terminal("sip", "create", tenant.slug, "--name", "theirs", *words)
    assert "its controller says how it stands" in said

    with a_registering_worker():
        assert terminal.refused("sip", "register", name).endswith("stop it there, then say --take-over")
        assert "has no password" in terminal.refused("sip", "register", name, "--take-over")
        assert "has no password" in terminal.refused("sip", "change", name, "--sender", "auto")
        assert "un-register it there" in terminal.refused("sip", "unregister", name)
        assert "never by us" in terminal("sip", "show", name)
        write(tenant, last_attempt_at="now()")
        shown = terminal("sip", "show", name)
        assert "last told: " in shown
        assert "last attempt" not in shown
        assert shown.endswith("no attempts: nothing is sent from here\n")
        type_in(monkeypatch, f"{PASSWORD}\n")
        terminal("sip", "change", name, "--password-stdin")
        assert provider.journal(user) == []

        assert f"{name}: registered for" in terminal("sip", "register", name, "--take-over")

    assert row(tenant, "theirs")["sender"] == "auto"
    assert "nothing is sent from here any more" in terminal("sip", "change", name, "--sender", "external")
    terminal("sip", "remove", name, "--yes")
    with db.session([tenant.id]) as s:
        assert s.scalars(select(SipRegistration.id).where(SipRegistration.tenant_id == tenant.id)).all() == []


def test_a_downgrade_is_allowed_by_hand_alone(terminal: Terminal, tenant: Tenant, account: tuple[str, str]) -> None:
    name, _ = account
    write(tenant, algorithm="'SHA-256'")

    with a_registering_worker():
        assert main(["sip", "register", name]) == 1
        assert row(tenant)["algorithm"] == "SHA-256"
        assert f"{name}: registered for" in terminal("sip", "register", name, "--allow-downgrade")

    assert row(tenant)["algorithm"] == "MD5"


# ------------------------------------------------------------------------------------------------------- named, changed


def test_a_name_of_several_tenants_needs_one(
    terminal: Terminal, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = factories.a_tenant()
    for one in (tenant, other):
        type_in(monkeypatch, f"{PASSWORD}\n")
        terminal(*create(one))
    id_ = str(row(tenant)["id"])

    assert terminal.refused("sip", "show", "trunk").startswith("several tenants have an account of that name: ")
    for words in (("trunk", "--tenant", tenant.slug), (f"{tenant.slug}/trunk",), (id_,), (id_[-12:],)):
        assert terminal.json("sip", "show", *words)["id"] == id_
    assert terminal.refused("sip", "show", f"{other.slug}/trunk", "--tenant", tenant.slug).endswith(tenant.slug)
    assert terminal.refused("sip", "show", "nothing\x1b[2J") == "there is no SIP account of that name"
    for nothing in ("", " ", f"{tenant.slug}/"):
        assert terminal.refused("sip", "show", nothing).startswith("say which account: ")


def test_a_change_is_registered_anew_and_an_empty_word_takes_a_value_away(
    terminal: Terminal, tenant: Tenant, account: tuple[str, str]
) -> None:
    name, _ = account
    before = row(tenant)
    words = ("--interval", "600", "--target", "sip:a@b.example", "--external-id", "9", "--no-md5", "--sender", "direct")

    terminal("sip", "change", name, *words, "--contact-host", "sbc.example", "--auth-username", "someone")
    changed = row(tenant)
    terminal("sip", "change", name, "--target=", "--external-id=", "--contact-host=", "--auth-username=", "--md5")

    assert (changed["interval"], changed["sender"], changed["target"]) == (600, "direct", "sip:a@b.example")
    assert (changed["external_id"], changed["allows_md5"]) == ("9", False)
    assert (changed["contact_host"], changed["auth_username"]) == ("sbc.example", "someone")
    assert changed["revision"] == before["revision"] + 1
    after = row(tenant)
    assert [after[one] for one in ("target", "external_id", "contact_host", "auth_username")] == [None] * 4
    assert after["allows_md5"]
    assert terminal.refused("sip", "change", name) == "nothing is to be changed: say what"
    for option in ("--name", "--host", "--username", "--transport", "--proxy", "--port"):
        assert "create another account, then remove this one" in terminal.refused("sip", "change", name, option, "x")
    same = terminal("sip", "change", name, "--interval", "600", "--target=", "--md5")
    assert same == "nothing changes: it is so already, and is not registered anew\n"
    assert row(tenant)["revision"] == after["revision"]
    assert password(tenant) == PASSWORD


def test_an_account_that_a_controller_took_is_sent_as_before_once_it_is_taken_over(
    terminal: Terminal, tenant: Tenant, account: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = account
    monkeypatch.setenv("DRACHTIO_HOST", "drachtio.example")  # to which `auto` would give it
    terminal("sip", "change", name, "--sender", "direct")
    id_ = row(tenant)["id"]
    with db.session([tenant.id]) as s:
        for _ in range(2):
            failed, no = RegisterStatus.FAILED, None
            assert SipRegistration.told(s, tenant.id, id_, status=failed, error=no, last_register_at=no, expires_at=no)

    assert row(tenant)["sender"] == "external"
    assert "its controller; direct after --take-over" in terminal("sip", "show", name)
    assert "the worker itself, since the account says so" in terminal(
        "sip", "register", name, "--dry-run", "--take-over"
    )
    assert "direct sends it again" in terminal("sip", "register", name, "--take-over", "--wait", "0")
    assert row(tenant)["sender"] == "direct"

    terminal("sip", "change", name, "--sender", "drachtio")
    terminal("sip", "change", name, "--sender", "external")
    terminal("sip", "register", name, "--take-over", "--wait", "0")
    assert row(tenant)["sender"] == "drachtio", "also where an operator had given it away"


def test_what_drachtio_bound_and_what_was_odd_is_shown_in_words(
    terminal: Terminal, tenant: Tenant, account: tuple[str, str]
) -> None:
    name, _ = account
    entry = """[{"at": "2026-01-02T03:04:05.678+00:00", "outcome": "registered", "code": 200, "seconds": 0.1,
        "notes": ["1 other contact is bound", "our contact is listed more than once"]}]"""
    bound = {"register_status": "'registered'", "expires_at": "now() + interval '4 minutes'", "granted": "300"}
    later = {"next_refresh_at": "now() + interval '5 minutes'", "last_outcome": "'registered'"}
    write(tenant, contact="'sip:p0@localhost;transport=udp'", history=f"'{entry}'", **bound, **later)

    shown, as_json = terminal("sip", "show", name), terminal.json("sip", "show", name)

    assert re.search(r"^calls come to: +drachtio$", shown, re.MULTILINE)
    assert "sent by:          drachtio, which bound it; next direct — DRACHTIO_HOST is not set in this shell; " in shown
    assert shown.rstrip().endswith("1 other contact is bound; our contact is listed more than once")
    assert ": to register it again, once its binding has ended" in shown
    assert (as_json["bound_by"], as_json["sent_by"]) == ("drachtio", "direct")
    assert as_json["history"][0]["at"] == "2026-01-02T03:04:05.678Z"
    assert as_json["history"][0]["notes"][0] == "1 other contact is bound"


def test_a_new_account_that_cannot_go_well_is_made_with_a_warning(
    terminal: Terminal, tenant: Tenant, account: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other, (_, user) = factories.a_tenant(), account

    def made(name: str, *words: str) -> list[str]:
        type_in(monkeypatch, f"{PASSWORD}\n")
        found: list[str] = terminal.json(*create(other, name, *words))["warnings"]
        return found

    (double,) = made("a", f"--username={user}", "--host=127.0.0.1")
    assert double.startswith("there is an account of that user at that host already")
    assert tenant.slug not in double
    (shut,) = made("b", "--host=10.11.12.13")
    assert shut.startswith("10.11.12.13 is not public, nor in SIP_ALLOWED_NETWORKS of this shell")
    assert made("c", "--proxy=127.0.0.1", "--host=10.11.12.14") == []
    type_in(monkeypatch, f"{PASSWORD}\n")
    assert "\nwarning: there is an account of that user" in terminal(*create(other, "d", "--host=10.11.12.13"))


# ---------------------------------------------------------------------------------------------------------- foretold


def test_a_dry_run_tells_all_and_touches_nothing(
    terminal: Terminal, tenant: Tenant, provider: SipThread, account: tuple[str, str]
) -> None:
    name, user = account
    before = row(tenant)

    said = terminal("sip", "register", name, "--dry-run")

    assert "the worker itself, since DRACHTIO_HOST is not set here." in said
    assert "by the settings of this shell: what a worker does, its own environment decides." in said
    assert f"REGISTER goes by UDP to 127.0.0.1:{provider.port}" in said
    assert "    REGISTER sip:127.0.0.1 SIP/2.0" in said
    assert "    Expires: 300" in said
    assert before["contact_token"] in said
    assert "registered anew after 230 to 240 s" in said
    assert "tried again after 54 to 66 min" in said
    assert PASSWORD not in said
    assert "Authorization" not in said
    assert provider.journal(user) == []
    same = {name: value for name, value in before.items() if name != "now"}
    assert {name: value for name, value in row(tenant).items() if name != "now"} == same


def test_a_dry_run_tells_what_is_in_the_way(
    terminal: Terminal,
    tenant: Tenant,
    account: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def dry(*more: str) -> tuple[int, str]:
        settings.cache_clear()
        return main(["sip", "register", account[0], "--dry-run", *more]), capsys.readouterr().out

    write(tenant, is_enabled="false", claimed_until="now() + interval '1 minute'", algorithm="'SHA-256'")
    code, said = dry()
    assert code == 0
    assert "It is disabled" in said
    assert "A worker is at it now" in said
    assert "Nothing weaker than SHA-256" in said
    assert "Nothing weaker" not in dry("--allow-downgrade")[1]

    write(tenant, sender="'external'")
    code, said = dry()
    assert (code, "Nothing would be sent: a controller registers it" in said) == (1, True)
    assert dry("--take-over")[0] == 0

    write(tenant, sender="'drachtio'")
    assert dry()[0] == 1
    monkeypatch.setenv("DRACHTIO_HOST", "drachtio.example")
    monkeypatch.setenv("DRACHTIO_SECRET", SECRET)
    code, said = dry()
    assert code == 0
    assert "would send it, from its own udp address" in said
    assert SECRET not in said

    write(tenant, sender="'direct'", host="'10.11.12.13'")
    code, said = dry()
    assert code == 1
    assert "Nothing would be sent: 10.11.12.13 leads to an address that is not public" in said


# ------------------------------------------------------------------------------------------------------------- doctor


def found_by_doctor() -> list[str]:
    settings.cache_clear()
    return [f"{level}: {what}" for level, what in doctor_sip.findings()]


def test_nothing_is_to_be_said_of_no_accounts() -> None:
    assert found_by_doctor() == []


def test_doctor_finds_accounts_that_are_late_lapsed_failed_or_doubled(
    terminal: Terminal, tenant: Tenant, account: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, user = account
    assert found_by_doctor() == []
    write(tenant, host="'sip.example'")
    assert [line.partition(", where")[0] for line in found_by_doctor()] == [
        "warning: their calls come to the worker's own address"
    ]
    monkeypatch.setenv("SIP_CONTACT", "sbc.example")
    assert found_by_doctor() == []

    write(tenant, next_refresh_at="now() - interval '20 seconds'")
    late = "warning: due for 15 seconds, and nobody has taken them: does a worker of sip_refresh run?"
    assert found_by_doctor() == [f"{late}: {name}"]

    write(tenant, next_refresh_at="now() + interval '1 hour'", register_status="'failed'", last_status_code="403")
    assert found_by_doctor() == [f"warning: not registered (`pombal sip show`): {name} (403)"]

    write(tenant, register_status="'registered'", expires_at="now() - interval '1 second'")
    assert found_by_doctor() == [
        f"error: expired without a refresh, and nobody has written it down: is a clock running?: {name}"
    ]

    write(tenant, expires_at="now() + interval '1 minute'", external_id="'17'", report_error="'it answered 500'")
    assert found_by_doctor() == [
        "ok: 1 SIP account is registered",
        f"warning: the backend does not take reports (`pombal sip show`): {name}",
    ]

    write(tenant, report_error="NULL")
    note = f"note: external ids, and no backend to tell (SIP_BACKEND_URL, SIP_BACKEND_KEY): {name}"
    assert found_by_doctor()[1:] == [note]
    write(tenant, reported_at="now()")
    assert found_by_doctor()[1:] == [], "the workers have a backend"

    write(tenant, external_id="NULL", host="'10.11.12.13'")
    type_in(monkeypatch, f"{PASSWORD}\n")
    terminal(*create(tenant, "again", f"--username={user}", host="10.11.12.13"))
    said = found_by_doctor()
    both = f"{tenant.slug}/again, {name}"
    assert f"warning: the registrar's address is not public, nor in SIP_ALLOWED_NETWORKS: {both}" in said
    assert f"warning: one user of one provider, several accounts; its calls ring at each: {both}" in said
    assert user not in "".join(said)


def test_doctor_knows_by_a_binding_that_workers_have_what_this_shell_lacks(
    tenant: Tenant, account: tuple[str, str]
) -> None:
    write(tenant, sender="'drachtio'", host="'10.11.12.13'")
    assert [line.partition(":")[0] for line in found_by_doctor()] == ["error", "warning"]

    contact = "'sip:p0@localhost;transport=udp'"
    write(tenant, register_status="'registered'", expires_at="now() + interval '1 minute'", contact=contact)
    assert found_by_doctor() == ["ok: 1 SIP account is registered"]


def test_doctor_finds_a_host_whose_accounts_need_more_starts_than_a_worker_makes(
    tenant: Tenant, account: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIP_STARTS_PER_SECOND", "1")
    assert found_by_doctor() == []
    write(tenant, interval="1")

    (said,) = found_by_doctor()

    assert said.startswith("warning: 127.0.0.1: its accounts (1) need 1.2 starts a second, and a worker makes 1 ")


def test_doctor_tells_settings_that_do_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIP_BACKEND_URL", "https://backend.example")
    monkeypatch.setenv("DRACHTIO_SECRET", SECRET)
    said = found_by_doctor()
    assert said[0].startswith("warning: SIP_BACKEND_URL is set and SIP_BACKEND_KEY is not")
    assert said[1].startswith("warning: DRACHTIO_SECRET is set and DRACHTIO_HOST is not")

    monkeypatch.setenv("SIP_BACKEND_KEY", "key")
    monkeypatch.setenv("SIP_ALLOWED_NETWORKS", "all")
    monkeypatch.setenv("SIP_CONTACT", "sip:sbc.example")
    assert [line.partition(" must")[0] for line in found_by_doctor()][:2] == [
        "error: SIP_ALLOWED_NETWORKS",
        "error: SIP_CONTACT: the contact host",
    ]


def test_doctor_knocks_at_drachtio(tenant: Tenant, account: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    write(tenant, next_refresh_at="now() - interval '20 seconds'")
    monkeypatch.setenv("DRACHTIO_HOST", "127.0.0.1")
    with a_drachtio() as standin:
        monkeypatch.setenv("DRACHTIO_PORT", str(standin.port))
        monkeypatch.setenv("DRACHTIO_SECRET", SECRET)
        well = found_by_doctor()
        monkeypatch.setenv("DRACHTIO_SECRET", "not-the-right-one")
        shut = found_by_doctor()
        monkeypatch.setenv("DRACHTIO_SECRET", "cymru")
        known = found_by_doctor()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        monkeypatch.setenv("DRACHTIO_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("DRACHTIO_SECRET", SECRET)
    away = found_by_doctor()

    assert re.match(r"ok: drachtio \S+ lets us in; it sends from udp/127\.0\.0\.1:\d+", well[0])
    assert well[1].endswith(f"does a worker of sip_refresh run?: {tenant.slug}/trunk")
    assert [len(shut), len(away), known] == [1, 1, []], "accounts that wait for drachtio are not the worker's fault"
    assert shut[0].startswith("error: drachtio: ")
    assert "(DRACHTIO_HOST, DRACHTIO_PORT, DRACHTIO_SECRET)" in away[0]
    assert "not-the-right-one" not in shut[0]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SIP_ALLOWED_NETWORKS", "all", "SIP_ALLOWED_NETWORKS"),
        ("SIP_NAMESERVER", "somewhere else", "SIP_NAMESERVER"),
        ("SIP_CONTACT", "sip:sbc.example", "SIP_CONTACT: the contact host"),
        ("SIP_BACKEND_URL", "backend.internal:8080", "SIP_BACKEND_URL is not an http(s) address"),
    ],
)
def test_a_worker_whose_settings_cannot_be_right_does_not_start_and_names_them(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIP_BACKEND_KEY", "key")
    monkeypatch.setenv(name, value)
    settings.cache_clear()

    assert main(["worker", "sip_refresh"]) != 0

    assert said in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- up


@pytest.mark.skipif(not LINUX, reason="processes are found through /proc")
def test_up_has_an_account_that_is_registered(tmp_path: Path) -> None:
    with Fleet(tmp_path / "up", "--procs", "sandbox,web,sip").start() as fleet:
        (account,) = fleet.demo["tenants"][0]["sip"]
        show = re.findall(r"^  (.* sip show demo-sip)$", fleet.output, re.MULTILINE)[0]

        until(lambda: re.search(r"^status: +registered$", fleet.shell(show), re.MULTILINE), "it is registered")

        query = "SELECT register_status, port FROM sip_registration WHERE id = %s"
        ((status, port),) = fleet.rows(query, account["id"])
        assert (status, f"127.0.0.1:{port}") == ("registered", fleet.demo["sandbox"]["sip"])
        assert account["password"] not in fleet.output + fleet.shell(show)
        fleet.stop()
