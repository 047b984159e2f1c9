"""An operator has all SIP accounts registered at once, as after an outage."""

from collections.abc import Iterator

import pytest

from models import Tenant
from pombal.cli import main
from tests.factories import a_tenant
from tests.pombal.test_cli_sip import Here
from tests.sip.accounts import Account, an_account, nearby

pytestmark = pytest.mark.usefixtures("queues")


@pytest.fixture(autouse=True)
def _inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody else's account is there."""
    with nearby(monkeypatch):
        yield


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


@pytest.fixture
def tenant() -> Tenant:
    return a_tenant()


def waiting(tenant: Tenant, host: str, **columns: str) -> Account:
    account = an_account(host, None, "5511999990000", tenant_id=tenant.id)
    account.set(next_refresh_at="now() + interval '50 minutes'", last_outcome="'permanent'", **columns)
    return account


def is_due(account: Account) -> bool:
    row = account.row()
    return row["next_refresh_at"] is not None and row["next_refresh_at"] <= row["now"]


def test_all_that_are_enabled_and_ours_are_due_and_counted(terminal: Here, tenant: Tenant) -> None:
    ours = [waiting(tenant, "one.example"), waiting(a_tenant(), "two.example")]
    bound = waiting(tenant, "one.example", register_status="'registered'", expires_at="now() + interval '1 hour'")
    others = [waiting(tenant, "one.example", is_enabled="false"), waiting(tenant, "one.example", sender="'external'")]

    said = terminal("sip", "register", "--all")

    assert said.startswith("3 accounts are due now; a worker begins 30 a second of each host")
    assert [is_due(account) for account in [*ours, bound, *others]] == [True, True, True, False, False]
    assert [account.row()["revision"] for account in ours] == [0, 0], "what is under way is not made again"


def test_all_of_a_host_or_of_a_proxy_or_of_a_tenant_are_due_and_no_others(terminal: Here, tenant: Tenant) -> None:
    here, there = waiting(tenant, "one.example"), waiting(tenant, "two.example")
    behind, elsewhere = waiting(tenant, "three.example", proxy="'one.example'"), waiting(a_tenant(), "one.example")

    said = terminal("sip", "register", "--all", "--host", "One.Example", "--tenant", tenant.slug)

    assert said.startswith("2 accounts are due now")
    assert [is_due(account) for account in (here, behind, there, elsewhere)] == [True, True, False, False]
    assert terminal("sip", "register", "--all", "--host", "two.example").startswith("1 account is due now")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--all", "--host", "nobody.example"], "no account is enabled and ours with the host nobody.example"),
        (["--all", "trunk"], "--all goes with --host and --tenant alone"),
        (["--all", "--dry-run"], "--all goes with --host and --tenant alone"),
        (["--host", "one.example", "trunk"], "--host goes with --all"),
        ([], "say which account, or --all"),
    ],
)
def test_what_goes_not_with_all_is_refused(
    tenant: Tenant, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    account = waiting(tenant, "one.example")

    assert main(["sip", "register", *words]) == 1

    assert why in capsys.readouterr().err
    assert not is_due(account)
