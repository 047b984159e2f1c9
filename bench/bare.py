"""The ceiling: the same server, and an application that reads the body and answers. Nothing is checked or kept.

python bench/bare.py PORT
"""

import sys

from starlette.types import Message, Receive, Scope, Send

from web.server import serve

_START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-length", b"14"), (b"content-type", b"text/plain; charset=utf-8")],
}
_BODY: Message = {"type": "http.response.body", "body": b"EVENT_RECEIVED"}


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        for step in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{step}.complete"})
        return
    while (await receive()).get("more_body"):
        pass
    await send(_START)
    await send(_BODY)


if __name__ == "__main__":
    serve(app, "127.0.0.1", int(sys.argv[1]))
