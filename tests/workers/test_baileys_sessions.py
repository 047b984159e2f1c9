"""Sessions of Baileys gateways by the routes' wishes: connected, paired by a code, and logged out, in each dialect that
tells how a session stands. Against the simulated gateways."""

from collections.abc import Iterator

import pytest

from pombal.cli.baileys import BaileysConfig
from pombal.cli.gateways import add_baileys_channel
from tests.factories import a_tenant
from tests.sandbox.baileys_servers import API_KEY, Baileys, a_baileys
from tests.workers.test_sessions import Line, channel_of, elapse, step, told, wish_start, wish_stop
from workers.channel_session import LOOK, circuit

pytestmark = pytest.mark.usefixtures("queues", "_near_gateways")

PATHS = {"whaticket": {"logout": "DELETE /whatsappsession/{session}"}}  # that family's own has none
MANY_LOOKS = 20


@pytest.fixture(scope="module")
def its() -> Iterator[Baileys]:
    with a_baileys() as baileys:
        yield baileys


@pytest.mark.parametrize("dialect", ["whaticket", "ticketz", "evolution", "waha"])
def test_a_session_is_paired_by_a_code_and_ended_again(its: Baileys, dialect: str) -> None:
    gateway, session = dialect, "26"
    its.gateway(gateway, dialect, paths=PATHS.get(dialect, {}))
    its.session(gateway, session, paired=False, open=False)
    config = BaileysConfig(gateway=dialect, session=session, host=its.host(gateway), api_key=API_KEY)  # type: ignore[arg-type] # one of them
    config.paths = PATHS.get(dialect, {})
    tenant = a_tenant()
    channel, _ = add_baileys_channel(tenant, dialect, config)
    line = Line(tenant, channel)
    circuit.answered(its.host(gateway))

    def until_told(word: str) -> None:
        for _ in range(MANY_LOOKS):
            row = step(line)
            if word in told(line):
                return
            elapse(line, 2 * LOOK)
        raise AssertionError(f"{told(line)}, {row['error_code']}: {row['error']}")

    wish_start(line)
    until_told("picture")
    assert its.state(gateway, session) == "qr"
    its.scan(gateway, session)
    until_told("ready")
    assert channel_of(line)["status"] == "connected"

    wish_stop(line)
    until_told("disconnected")

    assert channel_of(line)["status"] == "disconnected"
    assert its.state(gateway, session) != "open"
