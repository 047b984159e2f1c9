"""The fleet: one file = one queue = one actor of that name. Importing this package declares them all."""

from pombal.broker import broker
from workers.channel_session import channel_session
from workers.download_media import download_media
from workers.incoming_message import incoming_message
from workers.outgoing_message import outgoing_message
from workers.session_fixer import session_fixer
from workers.sip_refresh import sip_refresh
from workers.status_sync import status_sync

__all__ = [
    "broker",
    "channel_session",
    "download_media",
    "incoming_message",
    "outgoing_message",
    "session_fixer",
    "sip_refresh",
    "status_sync",
]
