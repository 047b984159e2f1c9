"""The database: one engine per process, and `session()`, the only place that commits.

A session sees the tenants it names and no others: row-level security compares each row's `tenant_id` with the setting
`app.tenant_ids` of the transaction (architecture.md, "Row-level security over a batch of several tenants").
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from pombal.settings import settings

# Nothing may hang for ever on a half-open connection or a held lock (security-reliability.md D7).
TIMEOUTS = "-c statement_timeout=15000 -c lock_timeout=5000 -c idle_in_transaction_session_timeout=30000"
CONNECT: dict[str, Any] = {
    "connect_timeout": 3,
    "keepalives": 1,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "options": TIMEOUTS,
}

# SQLSTATE classes that are the store's trouble, never the job's: connection, resources, operator, system.
_STORE_CLASSES = ("08", "53", "57", "58")
_LOCKED = "55P03"  # a lock held by somebody else
_STORE_STATES = {"25006", _LOCKED}  # the other: a replica after a failover
_RERUN_STATES = {"40001", "40P01"}  # serialization, deadlock: the same work succeeds when run again


@cache
def engine() -> Engine:
    """The engine of this process. Bound parameters never reach an exception text (security-reliability.md L3)."""
    return create_engine(
        settings().require_database(),
        pool_size=16,
        max_overflow=8,
        pool_timeout=3,
        pool_recycle=1800,
        hide_parameters=True,
        connect_args={**CONNECT, "application_name": "pombal"},
    )


@contextmanager
def session(tenants: Iterable[UUID] = ()) -> Iterator[Session]:
    """One transaction: commits at the end, rolls back on an error. Sees the given tenants' rows, by default none."""
    with Session(engine(), expire_on_commit=False) as s, s.begin():
        see(s, tenants)
        yield s


def see(s: Session, tenants: Iterable[UUID]) -> None:
    """Let the rest of this transaction see exactly these tenants. Call it before a savepoint: a rollback reverts it."""
    wanted = ",".join(str(t) for t in tenants)
    if wanted:
        s.execute(text("SELECT set_config('app.tenant_ids', :ids, true)"), {"ids": f"{{{wanted}}}"})


def by_key(s: Session) -> None:
    """For batches: let this transaction look rows up by their keys, whatever the statistics say.

    A statement's plan is made once per connection, often while its tables are small or empty; it would go on to read
    them whole when they have grown.
    """
    s.execute(_BY_KEY)


_BY_KEY = text("""
    SELECT set_config('enable_seqscan', 'off', true), set_config('enable_hashjoin', 'off', true),
        set_config('enable_mergejoin', 'off', true), set_config('enable_sort', 'off', true)
""")


def see_all(s: Session) -> None:
    """For operators' listings and fleet metrics: let this transaction see every tenant there is."""
    s.execute(
        text(
            "SELECT set_config('app.tenant_ids', coalesce((SELECT array_agg(id)::text FROM tenant), '{}'), true)",
        )
    )


def skips_policies(connection: Connection) -> bool:
    """Whether the role of this connection bypasses row-level security: the fleet must not run as such a one."""
    return bool(connection.scalar(text("SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user")))


def is_store_trouble(error: BaseException) -> bool:
    """Whether the store is away or overloaded: not the job's fault, try again without counting."""
    state = _sqlstate(error)
    return state in _STORE_STATES or state[:2] in _STORE_CLASSES or _lost_connection(error)


def is_too_slow(error: BaseException) -> bool:
    """Whether a statement ran into its time limit: the store's trouble, unless less of the same work gets through."""
    return _sqlstate(error) == "57014"


def is_locked(error: BaseException) -> bool:
    """Whether somebody else held a lock for longer than this transaction wanted to wait."""
    return _sqlstate(error) == _LOCKED


def is_worth_rerunning(error: BaseException) -> bool:
    """Whether the same transaction, run again at once, is expected to succeed (a deadlock)."""
    return _sqlstate(error) in _RERUN_STATES


def _sqlstate(error: BaseException) -> str:
    return getattr(getattr(error, "orig", error), "sqlstate", None) or ""


def _lost_connection(error: BaseException) -> bool:
    if isinstance(error, PoolTimeout):
        return True
    if isinstance(error, DBAPIError):
        if error.connection_invalidated:
            return True
        error = error.orig or error
    # psycopg's own client-side failures (refused, reset, closed) carry no SQLSTATE.
    return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) and not _sqlstate(error)
