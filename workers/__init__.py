"""The fleet: one file = one queue = one actor of that name. Importing this package declares them all."""

from pombal.broker import broker
from workers.download_media import download_media
from workers.incoming_message import incoming_message
from workers.outgoing_message import outgoing_message

__all__ = ["broker", "download_media", "incoming_message", "outgoing_message"]
