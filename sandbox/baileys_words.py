"""The words and webhook bodies of each gateway's dialect (baileys-sessions.md §5).

A message is built once, as Baileys emits it, and each dialect wraps it in its own form. Whaticket and Ticketz have no
webhooks of their own: theirs are plain Baileys events beside the session's id.
"""

import json
import time
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from sandbox.meta import JSON

Dialect = Literal["whaticket", "ticketz", "evolution", "waha", "fazer"]
State = Literal["open", "connecting", "closed", "qr"]

_WHATICKET = {"open": "CONNECTED", "connecting": "OPENING", "closed": "DISCONNECTED", "qr": "qrcode"}
_STATES: dict[str, dict[str, str]] = {
    "whaticket": _WHATICKET,
    "ticketz": _WHATICKET,
    "evolution": {"open": "open", "connecting": "connecting", "closed": "close", "qr": "connecting"},
    "waha": {"open": "WORKING", "connecting": "STARTING", "closed": "STOPPED", "qr": "SCAN_QR_CODE"},
    "fazer": {"open": "open", "connecting": "connecting", "closed": "close", "qr": "connecting"},
}
_STATUSES = ("ERROR", "PENDING", "SERVER_ACK", "DELIVERY_ACK", "READ", "PLAYED")
_WAHA_ACKS = {-1: "ERROR", 0: "PENDING", 1: "SERVER", 2: "DEVICE", 3: "READ", 4: "PLAYED"}


class Who(NamedTuple):
    """The session that a webhook is of."""

    dialect: Dialect
    session: str
    name: str
    number: str
    api_key: str
    url: str  # where the webhook goes; Evolution tells it
    verify_token: str | None = None


class Ending(NamedTuple):
    """How a connection ended. `is_final`: the gateway does not connect again by itself."""

    code: int | None
    is_final: bool


def state(dialect: str, its_state: State, code: int | None = None) -> str:
    """The dialect's word; WAHA has another one for a session that failed."""
    return "FAILED" if dialect == "waha" and its_state == "closed" and code else _STATES[dialect][its_state]


def message(key: JSON, content: JSON | None, at: int, name: str, stub: str | None = None) -> JSON:
    """A message as Baileys emits it; with a stub's text it is one that could not be decrypted."""
    body: JSON = {"key": key, "messageTimestamp": at, "pushName": name, "broadcast": False}
    if stub is None:
        return {**body, "message": content}
    key = {"participant": "", "addressingMode": "pn", **key}
    return {**body, "key": key, "messageStubType": 2, "messageStubParameters": [stub]}


def upsert(who: Who, message: JSON, *, sent_here: bool = False, media_url: str | None = None) -> list[JSON]:
    """Webhooks of a message; `sent_here` by the API. None of one that the dialect drops."""
    is_stub = "messageStubType" in message
    match who.dialect:
        case "evolution":
            if is_stub:
                return []
            return [
                _evolution(who, "send.message" if sent_here else "messages.upsert", _evolution_message(who, message))
            ]
        case "waha":
            if is_stub:
                return []
            event = "message.any" if message["key"]["fromMe"] else "message"
            return [_waha(who, event, _waha_message(who, message, media_url))]
    return [_plain(who, "messages.upsert", {"messages": [message], "type": "append" if sent_here else "notify"})]


def update(who: Who, key: JSON, status: int) -> list[JSON]:
    """How far a message of ours has come, by Baileys' number."""
    match who.dialect:
        case "evolution":
            told = {"keyId": key["id"], "remoteJid": key["remoteJid"], "fromMe": key["fromMe"]}
            told |= {"participant": key.get("participant"), "status": _STATUSES[status], "instanceId": _id_of(who)}
            return [_evolution(who, "messages.update", told)]
        case "waha":
            chat, mine = _waha_jid(key["remoteJid"]), _waha_jid(f"{who.number}@s.whatsapp.net")
            told = {"id": _waha_id(key), "from": mine, "to": chat, "participant": key.get("participant")}
            told |= {"fromMe": key["fromMe"], "ack": status - 1, "ackName": _WAHA_ACKS[status - 1]}
            return [_waha(who, "message.ack", told)]
    return [_plain(who, "messages.update", [{"key": key, "update": {"status": status}}])]


def connection(who: Who, its_state: State, ending: Ending | None, qr: tuple[str, str] | None) -> list[JSON]:
    """That a connection opened, ended or waits for a code; `qr` is its text and its picture."""
    code = None if ending is None else ending.code
    match who.dialect:
        case "evolution":
            return _evolution_connection(who, its_state, ending, qr)
        case "waha":
            return [_waha(who, "session.status", {"name": who.session, "status": state("waha", its_state, code)})]
    told: JSON = {"connection": {"closed": "close", "qr": "connecting"}.get(its_state, its_state)}
    if qr is not None:
        told = {**told, "qrDataUrl": qr[1]} if who.dialect == "fazer" else {"qr": qr[0]}
    if code is not None:
        told["lastDisconnect"] = _boom(code)
    return [_plain(who, "connection.update", told)]


def quarantined(who: Who, quarantine: JSON) -> list[JSON]:
    """fazer-ai gives a number that is rejected again and again a rest."""
    return [_plain(who, "connection.update", {"error": "reconnect_loop_detected", "quarantine": quarantine})]


# Plain Baileys events


def _plain(who: Who, event: str, data: Any) -> JSON:
    if who.dialect == "fazer":
        return {"event": event, "data": data, "webhookVerifyToken": who.verify_token}
    session: str | int = int(who.session) if who.session.isdecimal() else who.session
    return {"event": event, "whatsappId": session, "data": data}


def _boom(code: int) -> JSON:
    output = {"statusCode": code, "payload": {"statusCode": code, "message": "Connection ended"}, "headers": {}}
    return {"error": {"data": None, "isBoom": True, "isServer": code >= 500, "output": output}, "date": _iso()}


# Evolution


def _evolution(who: Who, event: str, data: JSON) -> JSON:
    return {
        "event": event,
        "instance": who.session,
        "data": data,
        "destination": who.url,
        "date_time": _iso(),
        "sender": f"{who.number}@s.whatsapp.net",
        "server_url": "http://127.0.0.1:8080",
        "apikey": who.api_key,
    }


def _evolution_message(who: Who, message: JSON) -> JSON:
    content = dict(message["message"] or {})
    extended = content.get("extendedTextMessage")
    if isinstance(extended, dict):  # it rewrites these
        content["conversation"] = extended.get("text", "")
        del content["extendedTextMessage"]
    return {
        "key": message["key"],
        "pushName": message["pushName"],
        "status": "PENDING" if message["key"]["fromMe"] else "DELIVERY_ACK",
        "message": content,
        "contextInfo": extended.get("contextInfo") if isinstance(extended, dict) else None,
        "messageType": next((name for name in content if name != "messageContextInfo"), ""),
        "messageTimestamp": message["messageTimestamp"],
        "instanceId": _id_of(who),
        "source": "android",
    }


def _evolution_connection(who: Who, its_state: State, ending: Ending | None, qr: tuple[str, str] | None) -> list[JSON]:
    if qr is not None:
        code, picture = qr
        told = {"instance": who.session, "pairingCode": None, "code": code, "base64": picture}
        return [_evolution(who, "qrcode.updated", {"qrcode": told})]
    data: JSON = {"instance": who.session, "state": state("evolution", its_state)}
    if its_state == "open":
        data |= {"wuid": f"{who.number}@s.whatsapp.net", "profileName": who.name, "profilePictureUrl": None}
    data["statusReason"] = 200 if ending is None or ending.code is None else ending.code
    bodies = [_evolution(who, "connection.update", data)]
    if ending is not None and ending.is_final and ending.code is not None:
        closed: JSON = {"instance": who.session, "status": "closed", "disconnectionReasonCode": ending.code}
        closed["disconnectionObject"] = json.dumps(_boom(ending.code))
        bodies.insert(0, _evolution(who, "status.instance", closed))
    return bodies


# WAHA


def _waha(who: Who, event: str, payload: JSON) -> JSON:
    return {
        "id": f"evt_{time.time_ns():x}",
        "event": event,
        "session": who.session,
        "metadata": {},
        "me": {"id": f"{who.number}@c.us", "pushName": who.name},
        "payload": payload,
        "engine": "NOWEB",
        "environment": {"version": "2024.10.1", "engine": "NOWEB", "tier": "PLUS"},
    }


def _waha_message(who: Who, message: JSON, media_url: str | None) -> JSON:
    key, content = message["key"], message["message"] or {}
    mine, chat = _waha_jid(f"{who.number}@s.whatsapp.net"), _waha_jid(key["remoteJid"])
    body = content.get("conversation") or content.get("extendedTextMessage", {}).get("text")
    media = next((one for one in content.values() if isinstance(one, dict) and "mediaKey" in one), None)
    told = {
        "id": _waha_id(key),
        "timestamp": message["messageTimestamp"],
        "from": mine if key["fromMe"] else chat,
        "fromMe": key["fromMe"],
        "to": chat if key["fromMe"] else mine,
        "body": body if body is not None else (media or {}).get("caption", ""),
        "hasMedia": media is not None,
        "ack": 1 if key["fromMe"] else 2,
        "ackName": "SERVER" if key["fromMe"] else "DEVICE",
        "_data": message,
    }
    if key.get("participant"):
        told["participant"] = _waha_jid(key["participant"])
    if media is not None and media_url is not None:
        told["media"] = {"url": media_url, "mimetype": media["mimetype"], "filename": media.get("fileName")}
    return told


def _waha_id(key: JSON) -> str:
    author = f"_{_waha_jid(key['participant'])}" if key.get("participant") else ""
    return f"{'true' if key['fromMe'] else 'false'}_{_waha_jid(key['remoteJid'])}_{key['id']}{author}"


def _waha_jid(jid: str) -> str:
    return jid.replace("@s.whatsapp.net", "@c.us")


def _id_of(who: Who) -> str:
    return f"id-{who.session}"


def _iso() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
