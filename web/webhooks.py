"""Webhooks in: prove the sender on the raw bytes, commit the body, answer. Understanding it is the worker's job.

Any proven body is accepted, of whatever shape: an answer other than 200 would make Meta repeat it for seven days.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

from models.app import DEFAULT_SLUG
from pombal import log, metrics
from pombal.errors import Unreachable
from web.errors import Failure
from web.inbox import Inbox
from web.limits import Quota
from web.masked import without_secrets
from web.signatures import Apps, AppSecrets, MiB, is_token, read_body, signer
from web.tokens import Tokens, presented, presented_to_baileys

_log = log.get()
_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_META_LIMIT = 4 * MiB  # Meta sends up to 3 MB (whatsapp-cloud-api.md §4)
_GATEWAY_LIMIT = 1 * MiB  # one message each, its file left out (megaapi.md, "Webhooks")
_BAILEYS_LIMIT = 4 * MiB  # of some gateways a file may come inside
_rejections = Quota(per_second=10)


async def meta_handshake(request: Request) -> Response:
    """Meta asks whether this URL is ours: the challenge back as it came, or 403 (whatsapp-cloud-api.md §1)."""
    asked = request.query_params
    app = await _app(request)
    if asked.get("hub.mode") == "subscribe" and is_token(asked.get("hub.verify_token", ""), app.verify_token):
        return PlainTextResponse(asked.get("hub.challenge", ""), headers={"X-Content-Type-Options": "nosniff"})
    metrics.webhook_requests.labels(provider="meta", outcome="handshake_refused").inc()
    raise Failure(403, "FORBIDDEN", "the verify token does not match")


async def meta(request: Request) -> Response:
    """Meta delivers a batch of messages and statuses; only a 200 stops it from sending again."""
    with _received(request, "meta", refused="bad_signature") as line:
        app = await _app(request)
        raw = await read_body(request, _META_LIMIT)
        signed_by = signer(raw, _header(request, b"x-hub-signature-256"), app.secrets)
        if signed_by is None or app.app_id is None:
            raise Failure(401, "UNAUTHORIZED", "the signature does not match")
        inbox: Inbox = request.state.inbox
        id_ = await inbox.accept("meta", raw, request.scope["request_id"], app_id=app.app_id)
        line |= {"delivery_id": str(id_), "app_id": str(app.app_id), "secret": signed_by, "bytes": len(raw)}
    return PlainTextResponse("EVENT_RECEIVED")


async def megaapi(request: Request) -> Response:
    """A MegaAPI instance delivers one event, proven by the token of its channel in the URL or in `x-webhook-token`.

    A missing, wrong or repeated token, a tenant that does not exist and one that the token is not of: all the same 401.
    """
    with _received(request, "megaapi", refused="bad_token") as line:
        tokens: Tokens = request.state.tokens
        door = await tokens.door(presented(request))
        raw = await read_body(request, _GATEWAY_LIMIT)
        if door is None or not door.opens_for(request.path_params["organization"]):
            raise Failure(401, "UNAUTHORIZED", "the token does not match")
        inbox: Inbox = request.state.inbox
        id_ = await inbox.accept("megaapi", raw, request.scope["request_id"], channel_id=door.channel_id)
        line |= {"delivery_id": str(id_), "channel_id": str(door.channel_id), "bytes": len(raw)}
    return PlainTextResponse("EVENT_RECEIVED")


async def baileys(request: Request) -> Response:
    """A Baileys gateway delivers what one session of it heard, proven by the token of its channel: in the URL, in
    `x-webhook-token` or in `x-api-key`. Gateways that name the event at the end of the path may.

    A missing, wrong or repeated token, a channel that does not exist and one that the token is not of: the same 401.
    """
    with _received(request, "baileys", refused="bad_token") as line:
        tokens: Tokens = request.state.tokens
        door = await tokens.door(presented_to_baileys(request))
        raw = await read_body(request, _BAILEYS_LIMIT)
        if door is None or not door.is_of(request.path_params["channel"]):
            raise Failure(401, "UNAUTHORIZED", "the token does not match")
        inbox: Inbox = request.state.inbox
        kept = without_secrets(raw)
        id_ = await inbox.accept("baileys", kept, request.scope["request_id"], channel_id=door.channel_id)
        line |= {"delivery_id": str(id_), "channel_id": str(door.channel_id), "bytes": len(raw)}
    return PlainTextResponse("EVENT_RECEIVED")


@contextmanager
def _received(request: Request, provider: str, *, refused: str) -> Iterator[dict[str, Any]]:
    """Count, time and log what becomes of a webhook. The block adds to the line of one that it accepts.

    `refused` is the kind of security event that a 401 is.
    """
    began = time.monotonic()
    request_id = request.scope["request_id"]
    outcome = "error"
    line: dict[str, Any] = {}
    try:
        yield line
        outcome = "accepted"
    except Failure as failure:
        outcome = _OUTCOMES.get(failure.status, "error")
        if failure.status == 401:
            metrics.security_events.labels(kind=refused).inc()
        if _rejections.allows():
            _log.warning("webhook_rejected", provider=provider, outcome=outcome, request_id=request_id)
        raise
    except Unreachable:
        outcome = "unavailable"
        raise
    except ClientDisconnect:
        outcome = "gone"
        raise
    finally:
        seconds = time.monotonic() - began
        metrics.webhook_requests.labels(provider=provider, outcome=outcome).inc()
        metrics.webhook_seconds.labels(provider=provider).observe(seconds)
    line |= {"provider": provider, "outcome": outcome, "seconds": round(seconds, 4), "request_id": request_id}
    _log.info("webhook_received", **line)


_OUTCOMES = {401: "unsigned", 408: "too_slow", 413: "too_large", 415: "encoded", 503: "unavailable"}


async def _app(request: Request) -> AppSecrets:
    slug = request.path_params.get("app", DEFAULT_SLUG)
    apps: Apps = request.state.apps
    # What cannot be a slug is treated like one that does not exist.
    return await apps.get(slug if _SLUG.fullmatch(slug) else "-")


def _header(request: Request, name: bytes) -> bytes | None:
    values = [value for key, value in request.scope["headers"] if key == name]
    return values[0] if len(values) == 1 else None
