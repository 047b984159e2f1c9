"""The door: prove the sender, check the shape, commit, enqueue, answer. `app` is the ASGI application."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypedDict

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pombal import metrics
from pombal.ids import uuid7
from pombal.settings import settings
from web import errors, health, media, messages, sessions, sip, status, sync, uploads, webhooks
from web.inbox import Inbox
from web.outbox import Outbox
from web.signatures import Apps
from web.tokens import Tokens

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class State(TypedDict):
    inbox: Inbox
    outbox: Outbox
    apps: Apps
    tokens: Tokens


class RequestId:
    """`X-Request-ID` in and out: the caller's if it is harmless, else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == errors.REQUEST_ID), b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid7().hex.encode()
        scope["request_id"] = request_id.decode()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (errors.REQUEST_ID, request_id)]
            await send(message)

        await self._app(scope, receive, named)


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[State]:
    publisher = metrics.Publisher().start()
    inbox = Inbox(settings().require_database())
    inbox.start()
    outbox = Outbox()
    outbox.start()
    try:
        yield {"inbox": inbox, "outbox": outbox, "apps": Apps(), "tokens": Tokens()}
    finally:
        await inbox.stop()
        await outbox.stop()
        publisher.stop()


app = Starlette(
    routes=[
        Route("/webhooks/whatsapp", webhooks.meta, methods=["POST"]),
        Route("/webhooks/whatsapp/{app}", webhooks.meta, methods=["POST"]),
        Route("/webhooks/whatsapp", webhooks.meta_handshake, methods=["GET"]),
        Route("/webhooks/whatsapp/{app}", webhooks.meta_handshake, methods=["GET"]),
        Route("/api/webhooks/whatsapp/{organization}", webhooks.megaapi, methods=["POST"]),
        Route("/api/webhooks/baileys/{channel}", webhooks.baileys, methods=["POST"]),
        Route("/api/webhooks/baileys/{channel}/{event}", webhooks.baileys, methods=["POST"]),
        Route("/api/v1/messages", messages.send, methods=["POST"]),
        Route("/api/v1/messages/{id}", messages.message, methods=["GET"]),
        Route("/api/v1/messages/{id}", messages.cancel, methods=["DELETE"]),
        Route("/api/messages/send", messages.send_the_old_way, methods=["POST"]),
        Route("/api/v1/media", uploads.upload, methods=["POST"]),
        Route("/api/v1/media/{id}", media.media, methods=["GET"]),
        Route("/api/v1/whatsapp/session/start", sessions.start, methods=["POST"]),
        Route("/api/v1/whatsapp/session/status", sessions.status, methods=["GET"]),
        Route("/api/v1/whatsapp/session/qr", sessions.qr, methods=["GET"]),
        Route("/api/v1/whatsapp/session", sessions.stop, methods=["DELETE"]),
        Route("/api/v1/whatsapp/messages", sessions.send, methods=["POST"]),
        Route("/api/v1/channels", status.channels),
        Route("/api/v1/channels/{id}", status.channel),
        Route("/api/sync-instance-status", sync.differences, methods=["GET"]),
        Route("/api/sync-instance-status", sync.apply, methods=["POST"]),
        Route("/api/sync-instance-status/{id}", sync.report, methods=["GET"]),
        Route("/api/cron/sync-status", sync.cron, methods=["GET", "POST"]),
        Route("/api/sip/provider-registration", sip.registrations, methods=["GET"]),
        Route("/api/sip/provider-registration/{id}", sip.registration, methods=["GET"]),
        Route("/api/sip/provider-registration/{id}", sip.tell, methods=["PATCH"]),
        Route("/api/sip/dispatch", sip.dispatch, methods=["GET"]),
        Route("/health", health.health),
        Route("/ready", health.ready),
        Route("/metrics", health.fleet_metrics),
    ],
    middleware=[Middleware(RequestId)],
    exception_handlers=errors.HANDLERS,
    lifespan=lifespan,
)
# A redirect would be built from the Host header, which anybody may choose; and nobody who posts here follows one.
app.router.redirect_slashes = False
