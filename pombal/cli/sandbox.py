"""The simulated providers: start them, or say something through those that run."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from pombal import garbage
from pombal.cli import as_json, table
from pombal.cli import say as tell
from pombal.errors import PombalError
from pombal.settings import data_folder, settings

_PORT = 9010


class SandboxAway(PombalError):
    """The sandbox did not do it; the message says why."""


def sandbox(given: Namespace) -> int:
    from sandbox.app import main

    garbage.settled()
    config = given.config or str(data_folder() / "sandbox.json")
    ports = {"--sip-port": given.sip_port, "--drachtio-port": given.drachtio_port}
    more = [word for option, port in ports.items() if port is not None for word in (option, port)]
    port = _PORT if given.port is None else given.port
    return main(["--port", str(port), "--config", config, *more])


def say(given: Namespace) -> int:
    """A text from a demo customer; prints the wamid, so that `pombal trace` finds it."""
    from sandbox import client

    answer = _asked(lambda url: client.say(url, given.channel, given.text), given)
    tell(f"{answer['wamid']}  answered {answer['status']}")
    return 0 if answer["accepted"] else 1


def traffic(given: Namespace) -> int:
    """Start a run of mixed traffic and wait for its end, with a line of progress each second."""
    import time

    from sandbox import client

    plan = {"bodies": given.bodies, "rate": given.rate, "seed": given.seed}
    begun = _asked(
        lambda url: client.traffic(url, [given.channel], **{k: v for k, v in plan.items() if v is not None}), given
    )
    while True:
        now = _asked(lambda url: client.progress(url, begun["id"], truth=True), given)
        tell(f"{now['state']}: {now['accepted']} of {now['bodies']} accepted, {now['pending']} pending")
        if now["state"] not in ("preparing", "running"):
            as_json(now)
            return 0 if now["state"] == "done" else 1
        time.sleep(1)  # a line a second for people; the sandbox works on by itself


def faults(given: Namespace) -> int:
    """Set one, or list them."""
    from sandbox import client

    if given.clear:
        _asked(client.clear_faults, given)
    if given.kind:
        names = ("channel", "to", "share", "count", "seconds", "code", "subcode", "http", "ms", "bytes", "location")
        more = {name: getattr(given, name) for name in names}
        _asked(lambda url: client.faults(url, given.kind, **more), given)
    return _faults_told(_asked(client.faults, given)["faults"], given)


def rules(given: Namespace) -> int:
    """Change what is given, and print the rules that hold then."""
    from sandbox import client

    if given.clear:
        _asked(client.clear_rules, given)
    names = ["channel", "window", "pair", "drop_ninth_digit", "check_media"]
    names += ["url_seconds", "media_seconds", "upload_seconds"]
    asked = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    if given.rate is not None:
        asked["rate"] = _number_or_off("--rate", given.rate, float)
    if given.media_bytes is not None:
        asked["media_bytes"] = _number_or_off("--media-bytes", given.media_bytes, int)
    statuses = {name: getattr(given, name) for name in ("delay", "lost", "shuffle") if getattr(given, name) is not None}
    if given.statuses is not None:
        statuses["words"] = [word for word in given.statuses.split(",") if word]
    if statuses:
        asked["statuses"] = statuses
    as_json(_asked(lambda url: client.rules(url, **asked), given))
    return 0


def calls(given: Namespace) -> int:
    """The latest ones, newest last."""
    from sandbox import client

    if given.clear:
        _asked(client.clear_calls, given)
    if given.summary:
        as_json(_asked(client.summary, given))
        return 0
    found = _asked(lambda url: client.calls(url, limit=given.limit, channel=given.channel), given)["calls"]
    if given.json:
        as_json(found)
        return 0
    columns = ("n", "channel", "to", "type", "outcome", "code", "http", "answered", "fault", "wamid")
    table([{column: call[column] for column in columns} for call in found], empty="nothing was sent")
    return 0


def media(given: Namespace) -> int:
    """The latest requests about files, newest last."""
    from sandbox import client

    if given.clear:
        _asked(client.clear_media, given)
    if given.summary:
        as_json(_asked(client.media_summary, given))
        return 0
    found = _asked(lambda url: client.media(url, limit=given.limit, kind=given.kind, id=given.id), given)["media"]
    if given.json:
        as_json(found)
        return 0
    columns = ("n", "kind", "id", "channel", "authorization", "http", "code", "bytes", "whole", "fault")
    table([{column: event[column] for column in columns} for event in found], empty="nothing was asked")
    return 0


# MegaAPI


def mega_say(given: Namespace) -> int:
    """A message from a demo customer; prints its id, so that `pombal trace` finds it."""
    from sandbox import client

    more = {"group": given.group, "from_me": given.from_me or None}
    answer = _asked(
        lambda url: client.mega_say(url, given.instance, given.text, kind=given.kind, from_=given.from_, **more), given
    )
    return _delivered(" ".join(answer["ids"]), answer)


def mega_connection(given: Namespace) -> int:
    """Change a status, and let the webhook tell of it."""
    from sandbox import client

    if given.silent:
        _asked(lambda url: client.mega_status(url, given.status, [given.instance]), given)
        tell(f"{given.instance} is {given.status}")
        return 0
    word = f"phone_{given.status}"
    answer = _asked(lambda url: client.mega_connection(url, given.instance, word, status=given.status), given)
    return _delivered(f"{given.instance} is {given.status}", answer)


def mega_instances(given: Namespace) -> int:
    """All of them."""
    from sandbox import client

    found = _asked(client.mega_instances, given)["instances"]
    if given.json:
        as_json(found)
        return 0
    columns = ("name", "instance_key", "status", "number", "webhook_enabled")
    rows = [{column: one[column] for column in columns} | {"webhook": bool(one["webhook_url"])} for one in found]
    table(rows, empty="there is no instance")
    return 0


def mega_calls(given: Namespace) -> int:
    """The latest ones, newest last."""
    from sandbox import client

    if given.clear:
        _asked(client.mega_clear_calls, given)
    if given.summary:
        as_json(_asked(client.mega_summary, given))
        return 0
    only = {"limit": given.limit, "place": given.place, "instance": given.instance}
    found = _asked(lambda url: client.mega_calls(url, **only), given)["calls"]
    if given.json:
        as_json(found)
        return 0
    columns = ("n", "place", "instance", "to", "type", "outcome", "reason", "http", "answered", "fault", "id")
    table([{column: call[column] for column in columns} for call in found], empty="nothing was asked")
    return 0


def mega_faults(given: Namespace) -> int:
    """Set one, or list them."""
    from sandbox import client

    if given.clear:
        _asked(client.mega_clear_faults, given)
    if given.kind:
        names = ("place", "instance", "to", "share", "count", "seconds", "http", "ms", "bytes", "word", "message")
        more = {name: getattr(given, name) for name in (*names, "retry_after", "location")}
        _asked(lambda url: client.mega_faults(url, given.kind, **more), given)
    return _faults_told(_asked(client.mega_faults, given)["faults"], given)


# Baileys gateways


def baileys_sessions(given: Namespace) -> int:
    """All sessions of all gateways."""
    from sandbox import client

    gateways = _asked(client.baileys_gateways, given)["gateways"]
    rows = []
    for one in gateways:
        rows += [{"gateway": one["name"], "dialect": one["dialect"], **session} for session in one["sessions"]]
    if given.json:
        as_json(rows)
        return 0
    columns = ("gateway", "dialect", "session", "state", "word", "number", "waiting", "starts", "stops", "qrs")
    table([{column: row[column] for column in columns} for row in rows], empty="there is no session")
    return 0


def baileys_say(given: Namespace) -> int:
    """A message from a demo customer; prints its id, so that `pombal trace` finds it."""
    from sandbox import client

    more = {"group": given.group, "from_me": given.from_me or None, "stub": given.stub, "from_": given.from_}
    where = (given.gateway, given.session, given.text)
    answer = _asked(lambda url: client.baileys_say(url, *where, kind=given.kind, **more), given)
    return _delivered(" ".join(answer["ids"]), answer)


def baileys_storm(given: Namespace) -> int:
    """Begin one, tell how those that were begun go on, or stop them."""
    from sandbox import client

    if given.stop:
        _asked(client.baileys_stop_storm, given)
    if given.kind:
        plan = {name: getattr(given, name) for name in ("contacts", "messages", "pace", "then_every", "also", "group")}
        _asked(lambda url: client.baileys_storm(url, given.gateway, given.session, given.kind, **plan), given)
    found = _asked(client.baileys_storms, given)["storms"]
    if given.json:
        as_json(found)
        return 0
    names = ("id", "gateway", "session", "kind", "state", "sent")
    counted = ("failed", "healed", "decrypted")
    rows = [{name: one[name] for name in names} | {name: len(one[name]) for name in counted} for one in found]
    table(rows, empty="there was no storm")
    return 0


def baileys_end(given: Namespace) -> int:
    """A connection ends with this code."""
    from sandbox import client

    answer = _asked(lambda url: client.baileys_end(url, given.gateway, given.session, given.code), given)
    tell(f"{given.session} is {answer['state']}")
    return 0


def baileys_scan(given: Namespace) -> int:
    """Somebody scans the code."""
    from sandbox import client

    _asked(lambda url: client.baileys_scan(url, given.gateway, given.session), given)
    tell(f"{given.session} is paired anew")
    return 0


def baileys_calls(given: Namespace) -> int:
    """The latest ones, newest last."""
    from sandbox import client

    if given.clear:
        _asked(client.baileys_clear_calls, given)
    only = {"limit": given.limit, "operation": given.operation}
    found = _asked(lambda url: client.baileys_calls(url, **only), given)["calls"]
    if given.json:
        as_json(found)
        return 0
    columns = ("n", "gateway", "session", "operation", "to", "outcome", "reason", "http", "answered", "fault", "id")
    table([{column: call[column] for column in columns} for call in found], empty="nothing was asked")
    return 0


def baileys_faults(given: Namespace) -> int:
    """Set one, or list them."""
    from sandbox import client

    if given.clear:
        _asked(client.baileys_clear_faults, given)
    if given.kind:
        names = ("place", "gateway", "session", "share", "count", "seconds", "http", "ms", "message", "retry_after")
        more = {name: getattr(given, name) for name in names}
        _asked(lambda url: client.baileys_faults(url, given.kind, **more), given)
    return _faults_told(_asked(client.baileys_faults, given)["faults"], given)


# SIP registrar


def sip_users(given: Namespace) -> int:
    """All of them, after adding one."""
    from sandbox import client

    if given.add is not None:
        new = {"name": given.add, "password": given.password, "auth_user": given.auth_user}
        _asked(lambda url: client.sip_users(url, **new), given)
    found = _asked(client.sip_users, given)["users"][: given.limit]
    if given.json:
        as_json(found)
        return 0
    columns = ("name", "registered", "registers", "last_code", "overlaps")
    rows = [{column: one[column] for column in columns} | {"gaps": len(one["gaps"])} for one in found]
    table(rows, empty="there is no account")
    return 0


def sip_habit(given: Namespace) -> int:
    """Set one, or list them."""
    from sandbox import client

    if given.clear:
        _asked(lambda url: client.sip_clear_habits(url, given.user), given)
    if given.keys:
        keys = dict(map(_key_and_value, given.keys))
        who = {"domain": given.domain, "next": given.next, "when": given.when}
        answer = _asked(lambda url: client.sip_habit(url, given.user, **who, **keys), given)
        if not (answer["is_known"] or given.json):
            tell(f"warning: the registrar has no account {given.user!r} (`pombal sandbox sip users --add`)")
    found = _asked(client.sip_habits, given)["habits"]
    if given.json:
        as_json(found)
        return 0
    known = ("id", "user", "domain", "next", "when", "met")
    rows: list[dict[str, object]] = [
        {
            "id": one["id"],
            "who": one.get("user") or one.get("domain") or "all",
            "when": one["when"],
            "next": one.get("next"),
            "met": one["met"],
            "does": " ".join(f"{key}={value}" for key, value in one.items() if key not in known),
        }
        for one in found
    ]
    table(rows, empty="it does what it should")
    return 0


def sip_bindings(given: Namespace) -> int:
    """Those that live, with the seconds that they still have."""
    import time

    from sandbox import client

    if given.user is not None:
        users = [_asked(lambda url: client.sip_state(url, given.user), given)]
    else:
        users = _asked(client.sip_users, given)["users"]
    found = [{"user": user["name"], **binding} for user in users for binding in user["bindings"]]
    if given.json:
        as_json(found)
        return 0
    columns = ("user", "contact", "source", "transport", "granted", "call_id", "cseq")
    rows = [
        {column: one[column] for column in columns} | {"left": round(one["expires_at"] - time.time())} for one in found
    ]
    table(rows, empty="nobody is registered")
    return 0


def sip_calls(given: Namespace) -> int:
    """The latest ones, newest last."""
    from sandbox import client

    if given.clear:
        _asked(client.sip_clear, given)
    if given.summary:
        as_json(_asked(client.sip_summary, given))
        return 0
    only = {"limit": given.limit, "user": given.user}
    found = _asked(lambda url: client.sip_transactions(url, **only), given)["transactions"]
    if given.json:
        as_json(found)
        return 0
    columns = ("n", "user", "method", "cseq", "transport", "source", "expires", "was_authorized", "retransmissions")
    rows = [
        {column: one[column] for column in columns}
        | {"codes": " ".join(map(str, one["codes"])), "complaints": ", ".join(one["complaints"])}
        for one in found
    ]
    table(rows, empty="nothing was asked")
    return 0


def sip_invite(given: Namespace) -> int:
    """A call, which is hung up as soon as somebody takes it."""
    from sandbox import client

    answer = _asked(lambda url: client.sip_invite(url, given.user, received=given.received or None), given)
    tell(f"{answer['request_uri']} at {answer['to']}: {answer['status'] or 'no answer'}")
    return 0 if answer["status"] is not None else 1


def _key_and_value(text: str) -> tuple[str, Any]:
    """`key=value`; a value is JSON if it can be, else a text."""
    import json

    key, equals, value = text.partition("=")
    if not equals:
        raise SandboxAway(f"a habit is key=value, such as code=503, not {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _delivered(told: str, answer: dict[str, Any]) -> int:
    if answer["delivery"] is None:
        tell(f"{told}  no webhook is set")
        return 1
    tell(f"{told}  answered {answer['status']}")
    return 0 if answer["accepted"] else 1


def _faults_told(found: list[dict[str, Any]], given: Namespace) -> int:
    if given.json:
        as_json(found)
        return 0
    rows: list[dict[str, object]] = [
        {
            "id": fault["id"],
            "kind": fault["kind"],
            "channel": fault.get("channel") or fault.get("instance") or fault.get("session") or "all",
            "met": fault["met"],
            "more": " ".join(
                f"{k}={v}" for k, v in fault.items() if k not in ("id", "kind", "channel", "instance", "met")
            ),
        }
        for fault in found
    ]
    table(rows, empty="nothing is set to go wrong")
    return 0


def _number_or_off(name: str, text: str, number: Callable[[str], float]) -> float | None:
    try:
        return None if text == "off" else number(text)
    except ValueError:
        raise SandboxAway(f"{name} is a number or `off`, not {text!r}") from None


def _asked(ask: Callable[[str], dict[str, Any]], given: Namespace) -> dict[str, Any]:
    import httpx

    from sandbox.client import SandboxError

    written = settings().sandbox_url if given.port is None else ""  # a port that was given is meant
    url = written or f"http://127.0.0.1:{_PORT if given.port is None else given.port}"
    try:
        return ask(url)
    except SandboxError as error:
        raise SandboxAway(f"the sandbox at {url}: {error}") from None
    except httpx.HTTPError as error:
        raise SandboxAway(f"no sandbox answers at {url} ({type(error).__name__}); `pombal up` starts one") from None
