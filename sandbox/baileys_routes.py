"""Which requests the gateways of each dialect know, and how each one refuses (baileys-sessions.md §5).

`connect` is start and QR code in one. Paths of the old system and of forks stand side by side where both are in use;
what a gateway's `paths` names comes first.
"""

import re
from functools import cache
from typing import Any, NamedTuple

from sandbox.answers import Answer
from sandbox.megaapi_faults import told

_TABLE = {
    "whaticket": """
        list            GET    /whatsapp
        state           GET    /whatsapp/{session}
        start           PUT    /whatsapp/{session}/start-session
        stop            PUT    /whatsapp/{session}/disconnect
        refresh_contact POST   /whatsapp/{session}/refresh/{jid}
        health          GET    /health
        send            POST   /api/messages/send
    """,
    "ticketz": """
        list            GET    /whatsapp
        state           GET    /whatsapp/{session}
        restart         GET    /whatsappsession/refresh/{session}
        reset           POST   /whatsappsession/{session}/reset
        start           POST   /whatsappsession/{session}
        reset           PUT    /whatsappsession/{session}
        logout          DELETE /whatsappsession/{session}
        health          GET    /
        health          GET    /health
        send            POST   /api/messages/send
    """,
    "evolution": """
        list            GET    /instance/fetchInstances
        state           GET    /instance/connectionState/{session}
        connect         GET    /instance/connect/{session}
        restart         POST   /instance/restart/{session}
        logout          DELETE /instance/logout/{session}
        reset           DELETE /instance/delete/{session}
        health          GET    /
        hook            GET    /webhook/find/{session}
        set_hook        POST   /webhook/set/{session}
        send            POST   /message/{what}/{session}
        read            POST   /chat/markMessageAsRead/{session}
    """,
    "waha": """
        list            GET    /api/sessions
        state           GET    /api/sessions/{session}
        set_hook        PUT    /api/sessions/{session}
        start           POST   /api/sessions/{session}/start
        stop            POST   /api/sessions/{session}/stop
        restart         POST   /api/sessions/{session}/restart
        logout          POST   /api/sessions/{session}/logout
        qr              GET    /api/{session}/auth/qr
        health          GET    /health
        health          GET    /ping
        file            GET    /api/files/{session}/{what}
        read            POST   /api/sendSeen
        send            POST   /api/{what}
    """,
    "fazer": """
        start           POST   /connections/{session}
        logout          DELETE /connections/{session}
        health          GET    /status
        send            POST   /connections/{session}/send-message
        read            POST   /connections/{session}/read-messages
    """,
}
OPEN = {("waha", "/ping"), ("whaticket", "/health"), ("ticketz", "/"), ("ticketz", "/health"), ("evolution", "/")}
"""Paths that ask for no key."""


class Route(NamedTuple):
    operation: str
    method: str
    pattern: re.Pattern[str]


class Found(NamedTuple):
    operation: str
    session: str | None = None
    jid: str | None = None
    what: str = ""


def find(dialect: str, paths: dict[str, str], method: str, path: str) -> Found:
    """What a request asks for; `elsewhere` when there is no such path."""
    path = path.rstrip("/") or "/"
    for route in (*_own(tuple(paths.items())), *_routes(dialect)):
        matched = route.pattern.fullmatch(path)
        if route.method == method and matched is not None:
            return Found(route.operation, **matched.groupdict())
    return Found("elsewhere")


def refusal(dialect: str, status: int, message: str, /, **more: Any) -> Answer:
    """An error as this gateway writes it."""
    match dialect:
        case "evolution":
            names = {400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 500: "Internal Server Error"}
            error = names.get(status, "Error")
            return told(
                status, {"status": status, "error": error, "response": {"message": more.get("list", [message])}}
            )
        case "waha":
            return told(status, {"message": message, "error": message, "statusCode": status, **more})
        case "fazer":
            return Answer(status, message.encode(), ((b"content-type", b"text/plain;charset=utf-8"),))
    return told(status, {"error": message})


NO_KEY = {"evolution": "Unauthorized", "waha": "Unauthorized", "fazer": "Unauthorized"}
NO_SESSION = {"evolution": 'The "{}" instance does not exist', "waha": "Session not found"}


@cache
def _routes(dialect: str) -> tuple[Route, ...]:
    lines = [line.split() for line in _TABLE[dialect].strip().splitlines()]
    return tuple(_route(operation, f"{method} {path}") for operation, method, path in lines)


@cache
def _own(paths: tuple[tuple[str, str], ...]) -> tuple[Route, ...]:
    names = {"text": "send", "image": "send", "video": "send", "audio": "send", "document": "send"}
    return tuple(_route(names.get(name, name), call) for name, call in paths)


def _route(operation: str, call: str) -> Route:
    method, _, path = call.partition(" ")
    escaped = re.escape(path.partition("?")[0].rstrip("/") or "/")
    pattern = re.sub(r"\\\{(session|jid|what)\\\}", r"(?P<\1>[^/]+)", escaped)
    return Route(operation, method, re.compile(pattern))
