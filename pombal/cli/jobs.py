"""Actors by hand: what there is, run one here, enqueue one."""

import inspect
import os
from argparse import Namespace
from typing import Any

import msgspec

from pombal import log
from pombal.cli import as_json, say, table
from pombal.errors import PombalError
from pombal.settings import settings, variable

# What `up` writes down, but for its broker.
_KEPT = (
    *("database_url", "database_owner_url", "secret_keys", "mode", "log_format"),
    *("whatsapp_graph_url", "media_allowed_networks", "whatsapp_stub_fast"),
)


class WrongJob(PombalError):
    """No such actor, or arguments it does not take."""


def actors(given: Namespace) -> int:
    import redis

    from workers import broker

    rows: list[dict[str, object]] = []
    for name, actor in sorted(broker.actors.items()):
        queue, options = actor.queue_name, actor.options
        row: dict[str, object] = {
            "actor": name,
            "queue": queue,
            "schedule": str(options["periodic"]) if "periodic" in options else None,
            "max_retries": options["max_retries"],
            "backoff": f"{options['min_backoff']}-{options['max_backoff']} ms",
        }
        try:
            client: Any = getattr(broker, "client", None)
            for state, suffix in (("waiting", ""), ("delayed", ".DQ"), ("dead", ".XQ")):
                row[state] = client.hlen(f"dramatiq:{queue}{suffix}.msgs") if client else None
        except redis.RedisError:
            row |= {"waiting": "?", "delayed": "?", "dead": "?"}
        rows.append(row)
    as_json(rows) if given.json else table(rows, empty="no actors")
    return 0


def run(given: Namespace) -> int:
    # Without a broker: what the job enqueues is found by the sweep. The rest is what every command has, also where `up`
    # has written it down, which it did together with a broker's address.
    os.environ |= {variable(name): str(value) for name in _KEPT if (value := getattr(settings(), name))}
    os.environ["REDIS_URL"] = "memory://"
    settings.cache_clear()
    log.setup()
    actor, args, kwargs = _job(given)
    actor.fn(*args, **kwargs)
    return 0


def send(given: Namespace) -> int:
    actor, args, kwargs = _job(given)
    message = actor.send(*args, **kwargs)
    say(message.message_id)
    return 0


def _job(given: Namespace) -> tuple[Any, list[Any], dict[str, Any]]:
    from workers import broker

    actor = broker.actors.get(given.actor)
    if actor is None:
        raise WrongJob(f"there is no actor {given.actor}; there are {', '.join(sorted(broker.actors))}")
    try:
        arguments = msgspec.json.decode(given.arguments)
    except msgspec.DecodeError as error:
        raise WrongJob(f"the arguments are not JSON: {error}") from None
    if not isinstance(arguments, dict | list):
        raise WrongJob("give the arguments as a JSON object or array")
    args, kwargs = (arguments, {}) if isinstance(arguments, list) else ([], arguments)
    try:
        inspect.signature(actor.fn).bind(*args, **kwargs)
    except TypeError as error:
        raise WrongJob(f"{given.actor} does not take these arguments: {error}") from None
    return actor, args, kwargs
