"""Dead letters: read them, group them by cause, try again, or let go."""

import sys
from argparse import Namespace
from typing import Any
from uuid import UUID

import redis
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from models import DeadLetter, Delivery, Media, outgoing
from models.dead_letter import LetterState
from pombal import db
from pombal.broker import HardenedBroker
from pombal.cli import as_json, say, table
from pombal.cli.lanes import ring
from pombal.errors import PombalError


class NoLetter(PombalError):
    """Nothing to act on."""


def listing(given: Namespace) -> int:
    with db.session() as s:
        db.see_all(s)
        rows = _grouped(s) if given.grouped else _listed(s, given.fingerprint, given.limit)
        total = s.scalar(select(func.count()).select_from(DeadLetter).where(DeadLetter.state == LetterState.OPEN)) or 0
    if given.json:
        as_json(rows)
        return 0
    table(rows, empty="no dead letters")
    if not given.grouped and total > len(rows):
        say(f"{len(rows)} of {total}; --limit shows more, --grouped counts them by cause")
    return 0


def _listed(s: Session, fingerprint: str | None, limit: int) -> list[dict[str, object]]:
    return [
        {
            "id": row.id,
            "fingerprint": row.fingerprint,
            "actor": row.actor,
            "failures": row.failures,
            "count": row.count,
            "last": row.last_at.isoformat(timespec="seconds"),
            "tenant": row.tenant_id,
            "delivery": row.delivery_id,
            "message": row.message_id,
            "path": row.path,
            "error": row.error,
        }
        for row in s.scalars(DeadLetter.open_letters(fingerprint).limit(limit))
    ]


def _grouped(s: Session) -> list[dict[str, object]]:
    query = (
        select(
            DeadLetter.fingerprint,
            func.min(DeadLetter.actor).label("actor"),
            func.count().label("letters"),
            func.max(DeadLetter.last_at).label("last"),
            func.min(DeadLetter.error).label("error"),
        )
        .where(DeadLetter.state == LetterState.OPEN)
        .group_by(DeadLetter.fingerprint)
        .order_by(func.count().desc())
    )
    return [dict(row) for row in s.execute(query).mappings()]


def show(given: Namespace) -> int:
    with db.session() as s:
        db.see_all(s)
        row = s.get(DeadLetter, _id(given.id))
    if row is None:
        raise NoLetter("there is no such dead letter")
    values = {c.key: getattr(row, c.key) for c in DeadLetter.__table__.columns}
    if given.json:
        as_json(values)
        return 0
    for name, value in values.items():
        if value is not None and name != "traceback":
            say(f"{name:<12} {value}")
    if row.traceback:
        say(row.traceback)
    return 0


def retry(given: Namespace) -> int:
    """Make their rows pending again, or enqueue their jobs anew; a letter that fails again reopens."""
    from workers import broker  # imports the fleet

    chosen = _chosen(given, "retry")
    unsent = [row for row in chosen if _is_of_a_send(row)]
    others = [row for row in chosen if not _is_of_a_send(row)]
    unknown = [row for row in others if row.delivery_id is None and row.actor not in broker.actors]
    letters = [row for row in others if row not in unknown]
    deliveries = sorted({row.delivery_id for row in letters if row.delivery_id})
    for row in letters:
        if row.actor == "download_media" and row.tenant_id is not None:
            with db.session([row.tenant_id]) as s:
                Media.again(s, row.tenant_id, UUID(row.args["args"][1]))
    # The sweep rings for rows within seconds; jobs without a row have only this bell, so it rings before they close.
    for row in letters:
        if row.delivery_id is None:
            broker.actors[row.actor].send(*row.args["args"], **row.args["kwargs"])
    with db.session() as s:
        db.see_all(s)
        _close(s, letters, LetterState.RETRIED)
        Delivery.retry(s, deliveries)
        # The whole body is processed again, so whatever else was bad in it gets its say again too.
        again = update(DeadLetter).where(DeadLetter.delivery_id.in_(deliveries), DeadLetter.state == LetterState.OPEN)
        s.execute(again.values(state=LetterState.RETRIED))
    settled = _send_again(unsent)
    _forget_in_redis(letters)
    say(
        f"{len(letters) + len(unsent)} retried"
        + (f", {settled} of them had been settled meanwhile" if settled else "")
        + (f", {len(unknown)} left: no actor of that name here" if unknown else "")
    )
    return 0


def _is_of_a_send(row: DeadLetter) -> bool:
    """Of an outgoing message. A file's letter names its message too."""
    return row.message_id is not None and row.actor == "outgoing_message"


def _send_again(letters: list[DeadLetter]) -> int:
    """Queue their messages again and ring their lanes. Returns how many were failed or unknown no longer.

    Each in a commit of its own: a lane is locked before its messages, and these are of many lanes.
    """
    settled = 0
    for row in letters:
        assert row.message_id is not None and row.tenant_id is not None  # noqa: S101, PT018 - chosen for that
        with db.session([row.tenant_id]) as s:
            settled += not outgoing.again(s, row.tenant_id, row.message_id)
            _close(s, [row], LetterState.RETRIED)
    ring(*sorted({UUID(row.args["args"][0]) for row in letters}))
    return settled


def drop(given: Namespace) -> int:
    """Leave it at that. A message that stayed unknown has failed then, so that nobody waits for it any more."""
    letters = _chosen(given, "drop")
    for row in letters:
        if _is_of_a_send(row) and row.message_id is not None and row.tenant_id is not None:
            with db.session([row.tenant_id]) as s:
                outgoing.give_up(s, row.tenant_id, row.message_id)
    with db.session() as s:
        db.see_all(s)
        _close(s, letters, LetterState.DROPPED)
    _forget_in_redis(letters)
    say(f"{len(letters)} dropped")
    return 0


def _forget_in_redis(letters: list[DeadLetter]) -> None:
    """Dramatiq keeps its own copy for a week; it must not look as if it still waited for somebody."""
    from workers import broker  # imports the fleet

    jobs = {row.key.removeprefix("job:") for row in letters}
    rows = {str(row.delivery_id) for row in letters if row.delivery_id}

    def is_meant(message: dict[str, Any]) -> bool:
        match message:  # junk lies there too
            case {"message_id": str(id_)} if id_ in jobs:
                return True
            case {"args": [[str(row)], *_]}:
                return row in rows
        return False

    try:
        for queue in sorted({row.queue for row in letters}):
            if isinstance(broker, HardenedBroker):
                broker.forget_dead(queue, is_meant)
    except redis.RedisError:
        say("Redis is away: its own copies stay in the dead-letter queue until they expire")


def _close(s: Session, letters: list[DeadLetter], state: LetterState) -> None:
    ids = [row.id for row in letters]
    s.execute(update(DeadLetter).where(DeadLetter.id.in_(ids)).values(state=state))


def _chosen(given: Namespace, act: str) -> list[DeadLetter]:
    """The letters meant; says how many before acting on several, and asks where somebody can answer."""
    if not (given.all or given.id or given.fingerprint):  # `dead drop "$ID"` with nothing in it
        raise NoLetter("an empty id or fingerprint names nothing; --all names every one")
    query: Any = DeadLetter.open_letters(given.fingerprint)
    if given.id:
        query = query.where(DeadLetter.id == _id(given.id))
    with db.session() as s:
        db.see_all(s)
        letters = list(s.scalars(query))
    if not letters:
        raise NoLetter("no open dead letter matches")
    if not given.id:
        say(f"{len(letters)} dead letters to {act}")
        if not given.yes:
            if not sys.stdin.isatty():
                raise NoLetter("say --yes to act on all of them")
            if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
                raise NoLetter("nothing was done")
    return letters


def _id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise NoLetter(f"{text} is not an id") from None
