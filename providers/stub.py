"""A provider for development: it takes everything, reaches nobody, and knows no host. Its session is a play.

`PAUSES` says how long each state of the play lasts; `pombal` steps through it as through a real gateway's answers. The
picture is a real QR code of a text without meaning.
"""

import io
from collections.abc import Mapping
from uuid import uuid4

import segno

from providers.instance import Hook, InstanceFault, Picture, Standing
from providers.outbound import Answer, Attachment, Outcome, Outgoing

# Seconds until what comes next: the first picture, somebody who scans it, and the phone that has told its contacts.
PAUSES = {"connecting": 1.0, "qrcode": 3.0, "authenticated": 1.0}
_SCALE, _BORDER = 8, 4  # pixels of a module, and modules of the quiet zone that scanners want


class StubSender:
    """Accepts every message, with an id of its own making."""

    async def send(self, message: Outgoing) -> Answer:
        if message.attachment is not None:
            async for _ in message.attachment.chunks:
                pass
        return Answer(Outcome.ACCEPTED, provider_id=f"stub-{uuid4().hex}")

    async def upload(self, file: Attachment) -> Answer:
        async for _ in file.chunks:
            pass
        return Answer(Outcome.ACCEPTED, provider_id=f"stub-{uuid4().hex}")


class Stub:
    """An instance without a gateway. How it stands is for its play to say, so here that is unknown."""

    host = ""

    async def status(self, deadline: float) -> Standing:
        return Standing(None, "stub")

    async def listed(self, deadline: float) -> Mapping[str, Standing]:
        return {}

    async def qr(self) -> Picture | None:
        return new_picture()

    async def restart(self) -> None:
        """Nothing to connect anew."""

    async def logout(self) -> None:
        """Nothing to end."""

    async def hook(self) -> Hook:
        return Hook("", is_enabled=False)

    async def set_hook(self, url: str) -> None:
        raise InstanceFault("rejected", "a stub channel has no gateway that could deliver events")


def new_picture() -> Picture:
    """A QR code, another one each time, as a real gateway's."""
    image = io.BytesIO()
    code = segno.make_qr(f"POMBAL-STUB:{uuid4().hex.upper()}", error="m")
    code.save(image, kind="png", scale=_SCALE, border=_BORDER)
    return Picture("image/png", image.getvalue())
