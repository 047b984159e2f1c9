"""One process of the fleet, as a Procfile starts it."""

import os
import sys
from argparse import Namespace
from pathlib import Path
from urllib.parse import urlsplit

from pombal import garbage, log
from pombal.errors import Misconfigured, Rejected
from pombal.settings import require_secrets, settings

ROOT = Path(__file__).resolve().parent.parent.parent


def queues() -> list[str]:
    """The queues that exist: one file of `workers/` each."""
    return sorted(file.stem for file in (ROOT / "workers").glob("[a-z]*.py"))


def web(given: Namespace) -> int:
    settings().require_media()
    _ready("web_started")
    from web import app
    from web.server import serve

    garbage.settled()
    serve(app, given.host or settings().host, given.port or settings().port)
    return 0


def worker(given: Namespace) -> int:
    unknown = sorted(set(given.queues) - set(queues()))
    if unknown:  # Dramatiq would start and wait for ever without a word
        raise Misconfigured(f"there is no queue {unknown[0]}; there are {', '.join(queues())}")
    if "outgoing_message" in given.queues:
        settings().require_graph()
    if "download_media" in given.queues:
        settings().require_graph()
        settings().require_media()
        settings().require_media_networks()
    if "sip_refresh" in given.queues:
        settings().require_sip_networks()
        settings().require_sip_nameserver()
        settings().require_sip_backend()
        _require_sip_contact()
    _ready("worker_started")
    # Not the broker: its process id is per worker process, so it must be made after the fork.
    from dramatiq import cli

    arguments = ["workers", "--queues", *given.queues, "--processes", str(given.processes)]
    arguments += ["--threads", str(given.threads), "--worker-shutdown-timeout", "20000", "--skip-logging"]
    # The master hears no signal while it waits for its children to boot, and one that a signal ended never tells it.
    # It waits only to start other forks, and there are none.
    arguments += ["--worker-fork-timeout", "100"]
    sys.path.insert(0, str(ROOT))
    # main returns nothing on some paths; its exit code is in what it raises or returns.
    parsed = cli.make_argument_parser().parse_args(arguments)  # type: ignore[no-untyped-call] # Dramatiq's
    return cli.main(parsed) or 0  # type: ignore[no-untyped-call] # Dramatiq's


def _require_sip_contact() -> None:
    from providers.sip_words import check_contact_host

    try:
        check_contact_host(settings().sip_contact or "localhost")
    except Rejected as error:
        raise Misconfigured(f"SIP_CONTACT: {error}") from None


def clock(given: Namespace) -> int:
    settings().require_sip_backend()
    _ready("clock_starting")
    import workers  # noqa: F401 - declares the actors that tick
    from pombal.clock import main

    garbage.settled()
    return main()


def migrate(given: Namespace) -> int:
    upgrade()
    return 0


def upgrade() -> None:
    """`alembic upgrade head`, from whatever folder."""
    from alembic import command
    from alembic.config import Config

    command.upgrade(Config(toml_file=str(ROOT / "pyproject.toml")), "head")


def _ready(event: str) -> None:
    """Refuse to start with weak secrets or a role that row-level security does not bind; say where the servers are."""
    log.setup()
    require_secrets()
    given = settings()
    refuse_powerful_role()
    log.get().info(
        event,
        pid=os.getpid(),
        mode=given.mode,
        database=urlsplit(given.require_database()).hostname or "local socket",
        redis=urlsplit(given.require_redis()).hostname or "local socket",
    )


def refuse_powerful_role() -> None:
    """Raises `Misconfigured` when the app's role skips policies. A database that is away is no reason to stay down."""
    from sqlalchemy.exc import DBAPIError

    from pombal import db

    try:
        with db.engine().connect() as connection:
            powerful = db.skips_policies(connection)
    except DBAPIError as error:
        if not db.is_store_trouble(error):
            raise
        log.get().warning("database_away_at_start", error=log.described(error))
        return
    finally:
        # Processes that are forked from here must not inherit an open connection: they would read each other's answers.
        db.engine().dispose()
    if powerful:
        raise Misconfigured("the role of DATABASE_URL is a superuser or bypasses row-level security: use another")
