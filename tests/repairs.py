"""Sessions of a simulated Baileys gateway, failures of theirs, and their repair walked through in this process."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from models import Channel, RepairPause, SessionError, Tenant
from pombal import db
from pombal.cli.baileys import BaileysConfig
from pombal.cli.gateways import add_baileys_channel
from pombal.ids import uuid7
from pombal.settings import settings
from sandbox import client
from tests.factories import superuser
from tests.sandbox.baileys_servers import API_KEY, Baileys
from tests.workers.tools import until
from workers.session_fixer import session_fixer

JIDS = [f"55119444400{n:02d}@s.whatsapp.net" for n in range(1, 13)]
REFRESH = {"refresh_contact": "POST /whatsapp/{session}/refresh/{jid}"}

_CHANGING = ("start", "stop", "restart", "logout", "reset", "refresh_contact", "send")


def nobody_else() -> None:
    """No session and no repair of another test is in the way; what this one sets is read."""
    settings.cache_clear()
    with superuser() as connection:
        connection.execute("UPDATE channel SET kind = 'stub' WHERE kind = 'baileys'")
        for table in ("repair", "repair_pause", "session_look", "lease", "tick"):
            connection.execute(f"DELETE FROM {table}")  # noqa: S608 - ours


def a_session(
    its: Baileys,
    tenant: Tenant,
    *,
    gateway: str = "g1",
    session: str = "26",
    dialect: Literal["whaticket", "evolution"] = "whaticket",
    paths: dict[str, str] | None = None,
    **config: Any,
) -> Channel:
    """A channel, and its session, connected and with some contacts."""
    if gateway not in {one["name"] for one in client.baileys_gateways(its.url)["gateways"]}:
        its.gateway(gateway, dialect, api_key=API_KEY, paths=REFRESH if paths is None else paths)
    its.session(gateway, session, contacts=4)
    given: dict[str, Any] = {"paths": paths} if paths else {}
    made = BaileysConfig(gateway=dialect, session=session, host=its.host(gateway), api_key=API_KEY, **given)
    channel, _ = add_baileys_channel(tenant, f"{gateway}-{session}", made)
    quick = {"observe_seconds": 0.2, "cool_down_seconds": 0, **config}
    with superuser() as connection:
        connection.execute(
            "UPDATE channel SET config = config || %s::jsonb WHERE id = %s", [json.dumps(quick), channel.id]
        )
    return channel


def with_keys(its: Baileys, gateway: str = "g1") -> dict[str, Any]:
    """What a channel says whose keys may be touched."""
    auth = {"kind": "files", "folder": str(its.folder(gateway, "x").parent)}
    return {"auth": auth, "may_refresh_contacts": True, "may_drop_keys": True, "may_restore_creds": True}


def fail(
    channel: Channel,
    contacts: int = 8,
    count: int = 8,
    cause: str = "prekey",
    *,
    at: datetime | None = None,
    group: str = "",
    ids: Iterable[str] = (),
    jids: Sequence[str] = JIDS,
) -> None:
    """So many messages of so many contacts could not be decrypted, just now unless told; in a group, if one is named,
    and under these ids before those that are made up."""
    names = [*ids, *(uuid4().hex.upper() for _ in range(count))][:count]
    rows = [
        {
            "tenant_id": channel.tenant_id,
            "channel_id": channel.id,
            "jid": group or jids[n % contacts],
            "message_id": name,
            "participant": jids[n % contacts] if group else "",
            "cause": cause,
            "source": "webhook",
            "at": at or datetime.now(UTC),
        }
        for n, name in enumerate(names)
    ]
    with db.session([channel.tenant_id]) as s:
        SessionError.record(s, rows)


def arrive(channel: Channel, contacts: int = 4, ids: Iterable[str] = (), jids: Sequence[str] = JIDS) -> None:
    """One message of each of these contacts could be decrypted just now, under these ids, if some are given."""
    names = list(ids) or [uuid4().hex.upper() for _ in range(contacts)]
    with superuser() as connection:
        for jid, name in zip(jids, names, strict=False):
            given = {"t": channel.tenant_id, "c": channel.id, "v": jid.partition("@")[0], "n": uuid4(), "m": uuid4()}
            for order in (
                "INSERT INTO contact (tenant_id, id) VALUES (%(t)s, %(n)s)",
                "INSERT INTO contact_identity (tenant_id, channel_id, kind, value, contact_id)"
                " VALUES (%(t)s, %(c)s, 'phone', %(v)s, %(n)s) ON CONFLICT DO NOTHING",
                "INSERT INTO conversation (tenant_id, id, channel_id, contact_id)"
                " SELECT tenant_id, contact_id, channel_id, contact_id FROM contact_identity"
                " WHERE channel_id = %(c)s AND value = %(v)s ON CONFLICT DO NOTHING",
                "INSERT INTO message (tenant_id, id, channel_id, conversation_id, contact_id, direction, type, body,"
                " provider_id, status) SELECT tenant_id, %(m)s, channel_id, contact_id, contact_id, 'in', 'text',"
                " '{}', %(p)s, 'received' FROM contact_identity WHERE channel_id = %(c)s AND value = %(v)s",
            ):
                connection.execute(order, given | {"p": name})


def incident(channel: Channel) -> dict[str, Any]:
    """The newest one, with the steps that were acts in `acts`."""
    with superuser() as connection:
        found = connection.execute(
            "SELECT id, state, outcome, step, phase, steps, says, since, asked_for_qr, evidence, claim_token, names,"
            " wanted_step FROM repair WHERE channel_id = %s ORDER BY opened_at DESC LIMIT 1",
            [channel.id],
        )
        names = [column.name for column in found.description or ()]
        row = found.fetchone()
    assert row is not None, "no incident"
    told = dict(zip(names, row, strict=True))
    told["acts"] = [(one["step"], one["outcome"]) for one in told["steps"] if one["is_act"]]
    return told


def incidents() -> int:
    with superuser() as connection:
        (count,) = connection.execute("SELECT count(*) FROM repair").fetchone() or (0,)
    return int(count)


def go_on(channel: Channel) -> None:
    """Whatever waits falls due, and is worked on in this process."""
    with superuser() as connection:
        connection.execute(
            "UPDATE repair SET next_at = now() WHERE channel_id = %s AND claim_token IS NULL", [channel.id]
        )
    session_fixer.fn(str(channel.tenant_id), str(channel.id))


def walk(channel: Channel, **wanted: Any) -> dict[str, Any]:
    """Go on until the incident is as wanted."""
    told: dict[str, Any] = {}

    def is_there() -> bool:
        nonlocal told
        go_on(channel)
        told = incident(channel)
        return all(told[name] == value for name, value in wanted.items())

    try:
        until(is_there, f"the incident is {wanted}")
    except AssertionError:
        raise AssertionError(f"the incident is not {wanted}, but {told}") from None
    return told


def done(its: Baileys, gateway: str = "g1") -> list[tuple[str, str]]:
    """The calls that change something."""
    calls = its.calls(limit=1000, gateway=gateway)
    return [(one["session"], one["operation"]) for one in calls if one["operation"] in _CHANGING]


def tree(folder: Path) -> dict[str, str]:
    """Each file by its digest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def an_inbox_that_is_behind(channel: Channel, seconds: float) -> Iterator[None]:
    """Something that this session's gateway sent so long ago waits to be read meanwhile."""
    id_ = uuid7()
    with superuser() as connection:
        connection.execute(
            "INSERT INTO delivery (id, provider, channel_id, request_id, raw, received_at)"
            " VALUES (%s, 'baileys', %s, 'r', '', now() - make_interval(secs => %s))",
            [id_, channel.id, seconds],
        )
    yield
    with superuser() as connection:
        connection.execute("UPDATE delivery SET state = 'done' WHERE id = %s", [id_])


@contextmanager
def paused() -> Iterator[None]:
    """Nothing is begun meanwhile."""
    with db.session() as s:
        RepairPause.set(s, "all")
    yield
    with db.session() as s:
        RepairPause.end(s, "all")
