"""What we remember: one file per table, behaviour on the row. Alembic and tests rely on all being imported here."""

from models.api_key import ApiKey
from models.app import App
from models.attempt import Attempt, Outcome
from models.base import Base, Tenanted
from models.channel import Channel, ChannelKind, ChannelStatus, Route, RouteKind
from models.clockwork import Lease, Tick
from models.contact import Contact, ContactIdentity
from models.conversation import Conversation
from models.dead_letter import DeadLetter
from models.delivery import Delivery, DeliveryState
from models.event import Event, Seen
from models.file import File, MediaUpload
from models.gateway_log import LogPosition
from models.lane import Hold, Lane
from models.media import Media, MediaState
from models.message import Message, MessageStatus, StatusReport
from models.repair import Repair, RepairOutcome, RepairPause, RepairState
from models.session import SessionState, SessionWish, WaSession
from models.session_error import SessionEnd, SessionError, SessionLook
from models.sip_registration import RegisterStatus, SipRegistration, SipSender
from models.sync_report import ReportState, SyncReport
from models.template import Template
from models.tenant import Tenant
from models.webhook_token import WebhookToken

__all__ = [
    "ApiKey",
    "App",
    "Attempt",
    "Base",
    "Channel",
    "ChannelKind",
    "ChannelStatus",
    "Contact",
    "ContactIdentity",
    "Conversation",
    "DeadLetter",
    "Delivery",
    "DeliveryState",
    "Event",
    "File",
    "Hold",
    "Lane",
    "Lease",
    "LogPosition",
    "Media",
    "MediaState",
    "MediaUpload",
    "Message",
    "MessageStatus",
    "Outcome",
    "RegisterStatus",
    "Repair",
    "RepairOutcome",
    "RepairPause",
    "RepairState",
    "ReportState",
    "Route",
    "RouteKind",
    "Seen",
    "SessionEnd",
    "SessionError",
    "SessionLook",
    "SessionState",
    "SessionWish",
    "SipRegistration",
    "SipSender",
    "StatusReport",
    "SyncReport",
    "Template",
    "Tenant",
    "Tenanted",
    "Tick",
    "WaSession",
    "WebhookToken",
]
