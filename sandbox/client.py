"""Thin calls to a running sandbox, for a command line or a script.

`control_url` is the address of the control port, such as `http://127.0.0.1:9010`. Every function returns the answer's
JSON as described in `sandbox.app` and raises SandboxError when the sandbox refuses; httpx.HTTPError means that it is
not there.
"""

import ssl
from base64 import b64encode
from functools import cache
from typing import Any
from urllib.parse import quote

import httpx

JSON = dict[str, Any]


class SandboxError(Exception):
    """The sandbox refused; `code` is its word for why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def say(control_url: str, channel: str, text: str, *, from_: str | None = None, name: str | None = None) -> JSON:
    """A customer writes one text."""
    return _call("POST", control_url, "/meta/say", channel=channel, text=text, name=name, **{"from": from_})


def send(
    control_url: str,
    channel: str,
    type: str,
    *,
    object: Any = None,
    count: int | None = None,
    from_: str | None = None,
) -> JSON:
    """Messages of any type in one body."""
    return _call(
        "POST", control_url, "/meta/send", channel=channel, type=type, object=object, count=count, **{"from": from_}
    )


def status(control_url: str, channel: str, wamid: str, status: str, **more: Any) -> JSON:
    """What became of an outgoing message; `more` are `to`, `at` and `extra`."""
    return _call("POST", control_url, "/meta/status", channel=channel, wamid=wamid, status=status, **more)


def field(control_url: str, channel: str, field: str, value: JSON | None = None) -> JSON:
    """Any other webhook field."""
    return _call("POST", control_url, "/meta/field", channel=channel, field=field, value=value)


def raw(
    control_url: str,
    channel: str,
    *,
    body: str | None = None,
    base64: str | None = None,
    signature: str | None = None,
) -> JSON:
    """Any bytes with a good, bad, no or old signature."""
    return _call("POST", control_url, "/meta/raw", channel=channel, body=body, base64=base64, signature=signature)


def handshake(control_url: str, channel: str, *, verify_token: str | None = None) -> JSON:
    """The verification of the callback URL."""
    return _call("POST", control_url, "/meta/handshake", channel=channel, verify_token=verify_token)


def traffic(control_url: str, channels: list[str] | None = None, **plan: Any) -> JSON:
    """Start a run; `plan` are the other keys of `POST /meta/traffic`. Follow it with `progress`."""
    return _call("POST", control_url, "/meta/traffic", channels=channels, **plan)


def progress(control_url: str, run_id: str, *, truth: bool = False) -> JSON:
    """How far a run is."""
    return _call("GET", control_url, f"/meta/traffic/{run_id}" + ("?truth=1" if truth else ""))


def cancel(control_url: str, run_id: str) -> JSON:
    """End a run."""
    return _call("DELETE", control_url, f"/meta/traffic/{run_id}")


def journal(control_url: str, *, limit: int = 50) -> JSON:
    """The latest deliveries."""
    return _call("GET", control_url, f"/meta/journal?limit={limit}")


def rules(control_url: str, channel: str | None = None, **rules: Any) -> JSON:
    """Change Graph's rules, the keys of `POST /meta/rules`; None is a value here. Answers those that hold."""
    return _ask("POST", control_url, "/meta/rules", rules if channel is None else {"channel": channel, **rules})


def clear_rules(control_url: str) -> JSON:
    """Every rule as it was at the start, windows closed, nothing used up of any rate."""
    return _call("DELETE", control_url, "/meta/rules")


def faults(control_url: str, kind: str | None = None, **more: Any) -> JSON:
    """Let something of this kind go wrong; `more` are the other keys of `POST /meta/faults`. Without a kind: a list."""
    return _call("POST" if kind else "GET", control_url, "/meta/faults", **more, kind=kind)


def clear_faults(control_url: str) -> JSON:
    """Nothing goes wrong any more."""
    return _call("DELETE", control_url, "/meta/faults")


def calls(control_url: str, *, limit: int = 100_000, channel: str | None = None, after: int | None = None) -> JSON:
    """The calls Graph got, newest last."""
    asked = {"limit": limit, "channel": channel, "after": after}
    query = httpx.QueryParams({key: value for key, value in asked.items() if value is not None})
    return _call("GET", control_url, f"/meta/calls?{query}")


def summary(control_url: str) -> JSON:
    """Counts of those calls."""
    return _call("GET", control_url, "/meta/calls/summary")


def clear_calls(control_url: str) -> JSON:
    """Forget them."""
    return _call("DELETE", control_url, "/meta/calls")


def media(
    control_url: str, *, limit: int = 100_000, kind: str | None = None, id: str | None = None, after: int | None = None
) -> JSON:
    """The requests about files, newest last; the kinds are resolve, download, upload, delete and elsewhere."""
    asked = {"limit": limit, "kind": kind, "id": id, "after": after}
    query = httpx.QueryParams({key: value for key, value in asked.items() if value is not None})
    return _call("GET", control_url, f"/meta/media?{query}")


def media_summary(control_url: str) -> JSON:
    """Counts of those that have ended."""
    return _call("GET", control_url, "/meta/media/summary")


def clear_media(control_url: str) -> JSON:
    """Forget them; the files stay."""
    return _call("DELETE", control_url, "/meta/media")


def add_media_file(control_url: str, mime_type: str, content: bytes | None = None, **more: Any) -> JSON:
    """A file to serve, of these bytes or made; `more` are the other keys of `POST /meta/media-files`.

    The answer's `object` can be sent: `send(control_url, channel, "image", object=answer["object"])`.
    """
    given = None if content is None else b64encode(content).decode()
    return _call("POST", control_url, "/meta/media-files", mime_type=mime_type, base64=given, **more)


def media_files(control_url: str) -> JSON:
    """Those, then the uploads, with how often each was resolved, and downloaded as a whole."""
    return _call("GET", control_url, "/meta/media-files")


def clear_media_files(control_url: str) -> JSON:
    """Forget them, and which files were deleted."""
    return _call("DELETE", control_url, "/meta/media-files")


# MegaAPI, as told in `sandbox.megaapi_control`


def mega_instances(control_url: str, *, status: str | None = None, limit: int = 100_000) -> JSON:
    """The instances, and how many there are of each status."""
    return _call("GET", control_url, _with_query("/megaapi/instances", status=status, limit=limit))


def mega_add(control_url: str, instances: list[JSON] | None = None, **bulk: Any) -> JSON:
    """These instances, or with `count` many: `bulk` are the other keys of `POST /megaapi/instances`."""
    return _call("POST", control_url, "/megaapi/instances", instances=instances, **bulk)


def mega_remove(control_url: str, instance: str | None = None) -> JSON:
    """There is no such instance any more; without a name, none of those that were added."""
    return _call("DELETE", control_url, _with_query("/megaapi/instances", instance=instance))


def mega_status(control_url: str, status: str, instances: list[str] | None = None, *, emit: bool = False) -> JSON:
    """A status for these instances, or for all; with `emit` webhooks tell of it."""
    return _call("POST", control_url, "/megaapi/status", status=status, instances=instances, emit=emit)


def mega_flap(control_url: str, instance: str, every: float, *, emit: bool = True) -> JSON:
    """Connected and disconnected by turns; every 0 seconds ends it."""
    return _call("POST", control_url, "/megaapi/flap", instance=instance, every=every, emit=emit)


def mega_scan(control_url: str, instance: str) -> JSON:
    """Somebody scans the QR code."""
    return _call("POST", control_url, "/megaapi/scan", instance=instance)


def mega_connection(control_url: str, instance: str, word: str, **more: Any) -> JSON:
    """A `connection_update` that says this word; `more` are `form` and `status`."""
    return _call("POST", control_url, "/megaapi/connection", instance=instance, word=word, **more)


def mega_say(
    control_url: str,
    instance: str,
    text: str | None = None,
    *,
    kind: str | None = None,
    from_: str | None = None,
    **more: Any,
) -> JSON:
    """A message of this kind; `more` are the other keys of `POST /megaapi/say`."""
    given = {"instance": instance, "text": text, "kind": kind, "from": from_, **more}
    return _call("POST", control_url, "/megaapi/say", **given)


def mega_ack(control_url: str, instance: str, id: str, status: int | str, **more: Any) -> JSON:
    """How far a message of ours has come; `more` are `to`, `participant` and `form`."""
    return _call("POST", control_url, "/megaapi/ack", instance=instance, id=id, status=status, **more)


def mega_raw(control_url: str, instance: str, **content: Any) -> JSON:
    """Any bytes to its webhook, given as `body` or `base64`, with a `content_type`."""
    return _call("POST", control_url, "/megaapi/raw", instance=instance, **content)


def mega_rules(control_url: str, instance: str | None = None, **rules: Any) -> JSON:
    """Change what follows a message, the keys of `POST /megaapi/rules`. Answers the rules that hold."""
    return _call("POST", control_url, "/megaapi/rules", instance=instance, **rules)


def mega_clear_rules(control_url: str) -> JSON:
    """Every rule as it was at the start."""
    return _call("DELETE", control_url, "/megaapi/rules")


def mega_faults(control_url: str, kind: str | None = None, **more: Any) -> JSON:
    """Let something of this kind go wrong; `more` are the other keys of `POST /megaapi/faults`. Without: a list."""
    return _call("POST" if kind else "GET", control_url, "/megaapi/faults", **more, kind=kind)


def mega_clear_faults(control_url: str) -> JSON:
    """Nothing goes wrong any more."""
    return _call("DELETE", control_url, "/megaapi/faults")


def mega_calls(control_url: str, *, limit: int = 100_000, **only: Any) -> JSON:
    """What it was asked, newest last; `only` are `place`, `instance` and `after`."""
    return _call("GET", control_url, _with_query("/megaapi/calls", limit=limit, **only))


def mega_summary(control_url: str) -> JSON:
    """Counts of those calls, and of the webhooks."""
    return _call("GET", control_url, "/megaapi/calls/summary")


def mega_clear_calls(control_url: str) -> JSON:
    """Forget them."""
    return _call("DELETE", control_url, "/megaapi/calls")


def mega_journal(control_url: str, *, limit: int = 50) -> JSON:
    """The latest webhooks."""
    return _call("GET", control_url, _with_query("/megaapi/journal", limit=limit))


# Baileys gateways, as told in `sandbox.baileys_control`


def baileys_gateways(control_url: str) -> JSON:
    """The gateways, their sessions and how those stand."""
    return _call("GET", control_url, "/control/baileys/gateways")


def baileys_add(control_url: str, name: str, dialect: str, **more: Any) -> JSON:
    """One more; `more` are the other keys of a gateway in the configuration."""
    return _call("POST", control_url, "/control/baileys/gateways", name=name, dialect=dialect, **more)


def baileys_remove(control_url: str, gateway: str | None = None, session: str | None = None) -> JSON:
    """There is no such session, or gateway, any more; without names, none at all."""
    return _call("DELETE", control_url, _with_query("/control/baileys/gateways", gateway=gateway, session=session))


def baileys_add_session(
    control_url: str,
    gateway: str,
    session: str,
    *,
    webhook_token: str | None = None,
    token_in_header: bool = False,
    **more: Any,
) -> JSON:
    """A number at this gateway; `more` are the other keys of a session in the configuration.

    The token goes with each webhook: in its query, or as an `x-api-key` in a header.
    """
    url = more.get("webhook_url")
    if webhook_token is not None and token_in_header:
        more["webhook_header"] = {"x-api-key": webhook_token, **more.get("webhook_header", {})}
    elif webhook_token is not None and url is not None:
        more["webhook_url"] = str(httpx.URL(url).copy_merge_params({"token": webhook_token}))
    return _call("POST", control_url, "/control/baileys/sessions", gateway=gateway, session=session, **more)


def baileys_session(control_url: str, gateway: str, session: str) -> JSON:
    """How one stands, and how often it was started, stopped and asked for a code."""
    return _call("GET", control_url, _with_query("/control/baileys/session", gateway=gateway, session=session))


def baileys_habits(control_url: str, gateway: str, session: str | None = None, **habits: Any) -> JSON:
    """What this session, or all of the gateway's, do wrong from now on; of `down` None is a value."""
    given = {"gateway": gateway, **({} if session is None else {"session": session}), **habits}
    return _ask("POST", control_url, "/control/baileys/habits", given)


def baileys_end(control_url: str, gateway: str, session: str, code: int, *, reconnects: bool | None = None) -> JSON:
    """The connection ends with this code."""
    given = {"gateway": gateway, "session": session, "code": code, "reconnects": reconnects}
    return _call("POST", control_url, "/control/baileys/end", **given)


def baileys_scan(control_url: str, gateway: str, session: str) -> JSON:
    """Somebody scans the code: a new pairing."""
    return _call("POST", control_url, "/control/baileys/scan", gateway=gateway, session=session)


def baileys_unpair(control_url: str, gateway: str, session: str) -> JSON:
    """WhatsApp removes the device."""
    return _call("POST", control_url, "/control/baileys/unpair", gateway=gateway, session=session)


def baileys_twin(control_url: str, gateway: str, session: str, running: bool = True, *, every: float = 0.5) -> JSON:
    """Another process has the same credentials, or is told to stop."""
    given = {"gateway": gateway, "session": session, "running": running, "every": every}
    return _call("POST", control_url, "/control/baileys/twin", **given)


def baileys_break(control_url: str, gateway: str, session: str, what: str, **more: Any) -> JSON:
    """Keys are lost or wrong, as after a crash; `more` are `contacts` and `group`."""
    return _call("POST", control_url, "/control/baileys/break", gateway=gateway, session=session, what=what, **more)


def baileys_storm(control_url: str, gateway: str, session: str, kind: str, **plan: Any) -> JSON:
    """Something breaks and messages go on coming; `plan` are the other keys of `POST /control/baileys/storms`."""
    return _call("POST", control_url, "/control/baileys/storms", gateway=gateway, session=session, kind=kind, **plan)


def baileys_storms(control_url: str) -> JSON:
    """What became of the messages of each storm."""
    return _call("GET", control_url, "/control/baileys/storms")


def baileys_storm_progress(control_url: str, id: int) -> JSON:
    """What became of the messages of this one."""
    found: JSON = _call("GET", control_url, _with_query("/control/baileys/storms", id=id))["storms"][0]
    return found


def baileys_stop_storm(control_url: str, id: int | None = None) -> JSON:
    """No more messages of this storm, or of any."""
    return _call("DELETE", control_url, _with_query("/control/baileys/storms", id=id))


def baileys_say(
    control_url: str,
    gateway: str,
    session: str,
    text: str | None = None,
    *,
    kind: str | None = None,
    from_: str | None = None,
    **more: Any,
) -> JSON:
    """A message comes in; `more` are the other keys of `POST /control/baileys/say`."""
    given = {"gateway": gateway, "session": session, "text": text, "kind": kind, "from": from_, **more}
    return _call("POST", control_url, "/control/baileys/say", **given)


def baileys_ack(control_url: str, gateway: str, session: str, id: str, status: int, **more: Any) -> JSON:
    """How far a message has come, in Baileys' numbers; `more` are `to` and `participant`."""
    given = {"gateway": gateway, "session": session, "id": id, "status": status, **more}
    return _call("POST", control_url, "/control/baileys/ack", **given)


def baileys_connection(control_url: str, gateway: str, session: str, **more: Any) -> JSON:
    """A webhook says how it stands; `more` are `code` and `quarantine`."""
    return _call("POST", control_url, "/control/baileys/connection", gateway=gateway, session=session, **more)


def baileys_raw(control_url: str, gateway: str, session: str, **content: Any) -> JSON:
    """Any bytes to its webhook, given as `body` or `base64`, with a `content_type`."""
    return _call("POST", control_url, "/control/baileys/raw", gateway=gateway, session=session, **content)


def baileys_log(control_url: str, gateway: str, action: str, **more: Any) -> JSON:
    """Something happens to the log, or in it; `more` are `session`, `count`, `lines` and `plan`."""
    return _call("POST", control_url, "/control/baileys/log", gateway=gateway, action=action, **more)


def baileys_rules(control_url: str, gateway: str | None = None, **rules: Any) -> JSON:
    """Change what follows a message; None is a value here. Answers the rules that hold."""
    given = rules if gateway is None else {"gateway": gateway, **rules}
    return _ask("POST", control_url, "/control/baileys/rules", given)


def baileys_faults(control_url: str, kind: str | None = None, **more: Any) -> JSON:
    """Let something of this kind go wrong; `more` are the other keys of `POST /control/baileys/faults`."""
    return _call("POST" if kind else "GET", control_url, "/control/baileys/faults", **more, kind=kind)


def baileys_clear_faults(control_url: str) -> JSON:
    """Nothing goes wrong any more."""
    return _call("DELETE", control_url, "/control/baileys/faults")


def baileys_calls(control_url: str, *, limit: int = 100_000, **only: Any) -> JSON:
    """What was asked, newest last, and counts; `only` are `gateway`, `session`, `operation` and `after`."""
    return _call("GET", control_url, _with_query("/control/baileys/calls", limit=limit, **only))


def baileys_clear_calls(control_url: str) -> JSON:
    """Forget them, and what was done to folders."""
    return _call("DELETE", control_url, "/control/baileys/calls")


def baileys_touches(control_url: str, gateway: str | None = None, session: str | None = None) -> JSON:
    """Files of sessions' folders that somebody deleted, changed or added."""
    return _call("GET", control_url, _with_query("/control/baileys/touches", gateway=gateway, session=session))


def baileys_journal(control_url: str, *, limit: int = 50) -> JSON:
    """The latest webhooks."""
    return _call("GET", control_url, _with_query("/control/baileys/journal", limit=limit))


def sip(control_url: str) -> JSON:
    """Where the SIP registrar is, and its counts."""
    return _call("GET", control_url, "/sip")


def sip_summary(control_url: str) -> JSON:
    """Its counts."""
    return _call("GET", control_url, "/sip/summary")


def sip_users(control_url: str, **given: Any) -> JSON:
    """New accounts: `name` and `password`, or `count`, `prefix` and `password`; without anything, those there are."""
    if not given:
        return _call("GET", control_url, _with_query("/sip/users", limit=100_000))
    return _call("POST", control_url, "/sip/users", **given)


def sip_remove(control_url: str, name: str | None = None) -> JSON:
    """One account is gone, or all that were added."""
    return _call("DELETE", control_url, _with_query("/sip/users", name=name))


def sip_state(control_url: str, name: str) -> JSON:
    """What an account has bound, and when it had nothing bound."""
    return _call("GET", control_url, f"/sip/users/{quote(name, safe='')}")


def sip_habit(control_url: str, user: str | None = None, **keys: Any) -> JSON:
    """The registrar does so to this user, to a `domain`, or to everybody; see `sandbox.sip_habits`."""
    return _call("POST", control_url, "/sip/habits", user=user, **keys)


def sip_habits(control_url: str) -> JSON:
    """Those that are set."""
    return _call("GET", control_url, "/sip/habits")


def sip_clear_habits(control_url: str, user: str | None = None, *, id: int | None = None) -> JSON:
    """This user's, this one, or all."""
    return _call("DELETE", control_url, _with_query("/sip/habits", user=user, id=id))


def sip_transactions(control_url: str, *, limit: int = 100_000, **only: Any) -> JSON:
    """What it was asked, newest last; `only` are `user` and `after`."""
    return _call("GET", control_url, _with_query("/sip/transactions", limit=limit, **only))


def sip_clear(control_url: str) -> JSON:
    """Forget those, and all counts."""
    return _call("DELETE", control_url, "/sip/transactions")


def sip_invite(control_url: str, user: str, **more: Any) -> JSON:
    """A call comes in for its binding; `more` are `received` and `seconds`."""
    return _call("POST", control_url, "/sip/invite", user=user, **more)


def sip_away(control_url: str, away: bool = True) -> JSON:
    """The registrar goes, or is there again."""
    return _call("POST", control_url, "/sip/away", away=away)


def sip_forget(control_url: str, user: str | None = None) -> JSON:
    """Bindings are gone, as after its restart."""
    return _call("POST", control_url, "/sip/forget", user=user)


def sip_drachtio(control_url: str) -> JSON:
    """Where drachtio is, if the sandbox has one, and who is connected."""
    return _call("GET", control_url, "/sip/drachtio")


def sip_drachtio_habits(control_url: str, **changes: Any) -> JSON:
    """It does so; see `sandbox.drachtio_habits`. Without anything it does what it should."""
    return _ask("POST" if changes else "DELETE", control_url, "/sip/drachtio/habits", changes or None)


def sip_drachtio_requests(control_url: str, *, limit: int = 1000) -> JSON:
    """What it was asked to send."""
    return _call("GET", control_url, _with_query("/sip/drachtio/requests", limit=limit))


def sip_drachtio_invites(control_url: str, *, limit: int = 1000) -> JSON:
    """The calls that came in there."""
    return _call("GET", control_url, _with_query("/sip/drachtio/invites", limit=limit))


def sip_drachtio_away(control_url: str, away: bool = True) -> JSON:
    """Its control port is closed, or open again."""
    return _call("POST", control_url, "/sip/drachtio/away", away=away)


def health(control_url: str) -> JSON:
    """Whether it is alive, and its channels."""
    return _call("GET", control_url, "/health")


def _with_query(path: str, **asked: Any) -> str:
    query = httpx.QueryParams({key: value for key, value in asked.items() if value is not None})
    return f"{path}?{query}"


def _call(method: str, control_url: str, path: str, **body: Any) -> JSON:
    return _ask(method, control_url, path, {key: value for key, value in body.items() if value is not None} or None)


def _ask(method: str, control_url: str, path: str, body: JSON | None) -> JSON:
    # Longer than the 5 s that the sandbox waits for a 200.
    with httpx.Client(timeout=30, trust_env=False, verify=_certificates()) as http:
        response = http.request(method, control_url.rstrip("/") + path, json=body)
    answer: JSON = response.json()
    if response.is_error:
        raise SandboxError(answer["error"]["code"], answer["error"]["message"])
    return answer


@cache
def _certificates() -> ssl.SSLContext:
    # Reading them takes longer than a whole call.
    return ssl.create_default_context()
