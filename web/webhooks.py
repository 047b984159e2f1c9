"""Webhooks in: prove the sender on the raw bytes, commit the body, answer. Understanding it is the worker's job.

Any proven body is accepted, of whatever shape: an answer other than 200 would make Meta repeat it for seven days.
"""

import re
import time

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

from models.app import DEFAULT_SLUG
from pombal import log, metrics
from pombal.errors import Unreachable
from web.errors import Failure
from web.inbox import Inbox
from web.limits import Quota
from web.signatures import Apps, AppSecrets, MiB, is_token, read_body, signer

_log = log.get()
_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_META_LIMIT = 4 * MiB  # Meta sends up to 3 MB (whatsapp-cloud-api.md §4)
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
    began = time.monotonic()
    outcome = "error"
    try:
        app = await _app(request)
        raw = await read_body(request, _META_LIMIT)
        signed_by = signer(raw, _header(request, b"x-hub-signature-256"), app.secrets)
        if signed_by is None or app.app_id is None:
            raise Failure(401, "UNAUTHORIZED", "the signature does not match")
        inbox: Inbox = request.state.inbox
        id_ = await inbox.accept("meta", raw, request.scope["request_id"], app_id=app.app_id)
        outcome = "accepted"
    except Failure as failure:
        outcome = _OUTCOMES.get(failure.status, "error")
        if failure.status == 401:
            metrics.security_events.labels(kind="bad_signature").inc()
        if _rejections.allows():
            _log.warning("webhook_rejected", provider="meta", outcome=outcome, request_id=request.scope["request_id"])
        raise
    except Unreachable:
        outcome = "unavailable"
        raise
    except ClientDisconnect:
        outcome = "gone"
        raise
    finally:
        metrics.webhook_requests.labels(provider="meta", outcome=outcome).inc()
        metrics.webhook_seconds.labels(provider="meta").observe(time.monotonic() - began)
    _log.info(
        "webhook_received",
        provider="meta",
        delivery_id=str(id_),
        request_id=request.scope["request_id"],
        app_id=str(app.app_id),
        secret=signed_by,
        bytes=len(raw),
    )
    return PlainTextResponse("EVENT_RECEIVED")


_OUTCOMES = {401: "unsigned", 408: "too_slow", 413: "too_large", 415: "encoded", 503: "unavailable"}


async def _app(request: Request) -> AppSecrets:
    slug = request.path_params.get("app", DEFAULT_SLUG)
    apps: Apps = request.state.apps
    # What cannot be a slug is treated like one that does not exist.
    return await apps.get(slug if _SLUG.fullmatch(slug) else "-")


def _header(request: Request, name: bytes) -> bytes | None:
    values = [value for key, value in request.scope["headers"] if key == name]
    return values[0] if len(values) == 1 else None
