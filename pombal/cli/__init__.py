"""`pombal …`: everything the fleet can be told from a terminal. Exit code 0 ok, 1 failed, 2 wrong usage.

One file per concern beside this one; each is imported only when its command runs, so that `--help` is quick and no
process loads what it does not use. This package is the one door upwards: it starts the tiers that import pombal.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

import msgspec

from pombal import __version__
from pombal.errors import PombalError
from pombal.settings import data_folder

Setup = Callable[[argparse.ArgumentParser], None]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="pombal", description="Keeps a company's messaging channels alive.")
    top.add_argument("--version", action="version", version=f"pombal {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    up = _add(commands, "up", "up:up", "run everything here: servers, migrations, a demo tenant, sandbox, web, workers")
    up.add_argument("--port", type=int, default=8000, help="of the web tier (8000)")
    up.add_argument("--data", default=None, help="folder for the servers' data and the addresses (.pombal)")
    up.add_argument("--reset", action="store_true", help="delete that data first")
    up.add_argument("--no-sandbox", action="store_true", help="without the simulated providers")
    up.add_argument("--procs", default=None, help="only these, comma-separated (web,worker,clock,sandbox)")
    up.add_argument("--pg-port", type=int, default=None, help="also listen on this loopback port, with a password")
    up.add_argument("--redis-port", type=int, default=None, help="likewise for Valkey")

    test = _add(commands, "test", "test:test", "run the tests on embedded servers of their own")
    test.add_argument("--cov", action="store_true", help="measure coverage and hold it to its floors")
    test.epilog = "All other arguments are pytest's: pombal test -k signature -x"
    test.set_defaults(arguments=[])

    web = _add(commands, "web", "fleet:web", "one web process")
    web.add_argument("--port", type=int, default=None, help="$PORT, else 8000")
    web.add_argument("--host", default=None, help="$HOST, else 0.0.0.0")

    worker = _add(commands, "worker", "fleet:worker", "one worker process for these queues")
    worker.add_argument("queues", nargs="+", metavar="QUEUE")
    worker.add_argument("--processes", type=int, default=1, help="worker processes (1)")
    worker.add_argument("--threads", type=int, default=4, help="threads of each (4)")

    _add(commands, "clock", "fleet:clock", "ticks, sweep and reaper; two are safe")
    _add(commands, "migrate", "fleet:migrate", "alembic upgrade head")

    sandbox = _add(commands, "sandbox", "sandbox:sandbox", "the simulated providers, or a word to them")
    sandbox.add_argument("--port", type=int, default=9010, help="of its control port (9010)")
    sandbox.add_argument("--config", default=None, help="apps and channels to play (.pombal/sandbox.json)")
    words = sandbox.add_subparsers(dest="word", metavar="WORD")
    say = _add(words, "say", "sandbox:say", "a customer writes a text")
    say.add_argument("text")
    traffic = _add(words, "traffic", "sandbox:traffic", "customers write a lot, mixed and shuffled")
    traffic.add_argument("--bodies", type=int, default=300)
    traffic.add_argument("--rate", type=float, default=None, help="bodies per second (as fast as they are accepted)")
    traffic.add_argument("--seed", type=int, default=None)
    for word in (say, traffic):
        word.add_argument("--channel", default="demo-meta")

    tenant = _group(commands, "tenant", "companies")
    create = _add(tenant, "create", "admin:create_tenant", "a new tenant", as_json=True)
    create.add_argument("slug")
    create.add_argument("--name", required=True)
    _add(tenant, "list", "admin:list_tenants", "all tenants", as_json=True)

    key = _group(commands, "key", "API keys")
    create = _add(key, "create", "admin:create_key", "a new key; it is shown once", as_json=True)
    create.add_argument("tenant")
    create.add_argument("--name", default="key")
    create.add_argument("--scope", action="append", help="may be repeated; all scopes by default")
    revoke = _add(key, "revoke", "admin:revoke_key", "end a key at once", as_json=True)
    revoke.add_argument("tenant")
    revoke.add_argument("id")

    app = _group(commands, "app", "Meta apps")
    rotate = _add(
        app,
        "rotate",
        "admin:rotate_app",
        "a new app secret, from standard input; the one before stays valid",
        as_json=True,
    )
    rotate.add_argument("slug", help="the last part of its webhook URL, or `default`")
    rotate.add_argument("--finish", action="store_true", help="nothing new: the one before is no longer valid")

    channel = _group(commands, "channel", "numbers on providers")
    create = _add(channel, "create", "admin:create_channel", "a new channel", as_json=True)
    create.add_argument("tenant")
    create.add_argument("kind", choices=["meta"])
    create.add_argument("--name", required=True)
    create.add_argument(
        "--config",
        required=True,
        help='JSON: "phone_number_id", "waba_id", and for an app of its own "app_secret", "verify_token", "app"',
    )
    listing = _add(channel, "list", "admin:list_channels", "a tenant's channels", as_json=True)
    listing.add_argument("tenant")

    _add(commands, "actors", "jobs:actors", "every actor: queue, schedule, retries, what waits", as_json=True)
    for name, does in (("run", "run one actor here, without a broker"), ("send", "enqueue one job")):
        job = _add(commands, name, f"jobs:{name}", does)
        job.add_argument("actor")
        job.add_argument("arguments", metavar="JSON", help="an object of named arguments, or an array of arguments")

    trace = _add(commands, "trace", "trace:trace", "the story of one message, delivery or request", as_json=True)
    trace.add_argument("id", help="message id, provider's message id, delivery id or request id")

    dead = _group(commands, "dead", "what was given up")
    listing = _add(dead, "list", "dead:listing", "open dead letters, grouped by cause with --grouped", as_json=True)
    listing.add_argument("--fingerprint", default=None)
    listing.add_argument("--grouped", action="store_true")
    listing.add_argument("--limit", type=int, default=50)
    show = _add(dead, "show", "dead:show", "one dead letter with its traceback", as_json=True)
    show.add_argument("id")
    for name, does in (("retry", "try again"), ("drop", "give up for good; rows and bodies stay")):
        act = _add(dead, name, f"dead:{name}", does)
        which = act.add_mutually_exclusive_group(required=True)
        which.add_argument("id", nargs="?")
        which.add_argument("--all", action="store_true")
        which.add_argument("--fingerprint")
        act.add_argument("--yes", action="store_true", help="do not ask before acting on more than one")

    _add(commands, "doctor", "doctor:doctor", "check versions, servers, keys, migrations, queues", as_json=True)
    return top


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as a namespace; wrong usage exits with 2."""
    if argv[:1] != ["test"]:
        return parser().parse_args(argv)
    ours = ("--cov", "-h", "--help")
    given = parser().parse_args(["test", *(argument for argument in argv[1:] if argument in ours)])
    given.arguments = [argument for argument in argv[1:] if argument not in ours]  # pytest's, in their order
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = parse(list(sys.argv[1:] if argv is None else argv))
    module, _, function = arguments.does.partition(":")
    try:
        result: int = getattr(importlib.import_module(f"pombal.cli.{module}"), function)(arguments)
    except PombalError as error:
        print(f"pombal: {error}", file=sys.stderr)  # noqa: T201 - a command's output
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `pombal dead list | head`
        return 0
    except Exception as error:
        away = _away(error)
        if not away:
            raise
        print(f"pombal: {away}", file=sys.stderr)  # noqa: T201 - a command's output
        return 1
    return result


def _away(error: Exception) -> str:
    """One line for a store that does not answer; empty for any other error."""
    import redis  # only now, so that `--help` stays quick

    from pombal import db, log

    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return "Redis does not answer: see REDIS_URL"
    if db.is_store_trouble(error):
        return f"PostgreSQL does not answer, or not in time ({log.described(error)}): see DATABASE_URL"
    return ""


def say(line: str = "") -> None:
    """A command's output."""
    print(line, flush=True)  # noqa: T201 - this is the one place that prints


def as_json(value: object) -> None:
    say(msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2).decode())


def table(rows: list[dict[str, object]], *, empty: str) -> None:
    """Columns for people; `empty` is said when there is nothing."""
    if not rows:
        say(empty)
        return
    cells = [[str("" if v is None else v) for v in row.values()] for row in rows]
    heads = [name.upper() for name in rows[0]]
    widths = [max(len(line[n]) for line in [heads, *cells]) for n in range(len(heads))]
    for line in [heads, *cells]:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def default_data() -> str:
    return str(data_folder())


def _add(
    to: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    does: str,
    help_: str,
    *,
    as_json: bool = False,
) -> argparse.ArgumentParser:
    made = to.add_parser(name, help=help_, description=help_)
    made.set_defaults(does=does)
    if as_json:
        made.add_argument("--json", action="store_true", help="print JSON")
    return made


def _group(
    to: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, help_: str
) -> "argparse._SubParsersAction[argparse.ArgumentParser]":
    made = to.add_parser(name, help=help_, description=help_)
    return made.add_subparsers(dest="what", metavar="WHAT", required=True)
