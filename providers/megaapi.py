"""MegaAPI: one instance of WhatsApp Web at its host (megaapi.md, "Endpoints", "Responses"). Sending is in
`providers/megaapi_send.py`, files are in `providers/megaapi_media.py`.

GET    /rest/instance/{key}                  how it stands
GET    /rest/instance/list                   how all of the host's stand, with a token of the host
GET    /rest/instance/qrcode_base64/{key}    the QR code to scan
DELETE /rest/instance/{key}/restart          connect anew
DELETE /rest/instance/{key}/logout           end the pairing
GET    /rest/webhook/{key}                   where its events go
POST   /rest/webhook/{key}/configWebhook     where its events shall go

A tenant names the host, so every call goes by a guarded client (security-reliability.md M2).
"""

import re
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import quote

import msgspec

from pombal.errors import Rejected
from providers import http
from providers.gateway_calls import asked as answer
from providers.gateway_calls import json_object, picture, refusal, shown, start_of
from providers.gateway_calls import normal_host as normal_host  # it names the host in a channel of MegaAPI
from providers.instance import Hook, InstanceFault, Picture, Standing

_MOST_BYTES_OF_A_LIST = 8 * 1024 * 1024  # some 40,000 instances
_MOST_INSTANCES = 100_000
_STATUSES: dict[str, Literal["connected", "disconnected"]] = {"connected": "connected", "disconnected": "disconnected"}
_KEY = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LIST = "list"  # `GET /rest/instance/list` is another call; no other has its word where the key of one stands last
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")
_OWN_ID = re.compile(r"([0-9]{5,20})(?::[0-9]{1,4})?@(?:s\.whatsapp\.net|c\.us)")
_LOGGED_IN = "already logged in"
_UNKNOWN_INSTANCE = "instance not found"


def check_key(text: str) -> str:
    """The key of an instance as it may stand in a path (O6). Raises `Rejected`."""
    if not _KEY.fullmatch(text) or text in (".", ".."):
        raise Rejected("the instance key may have letters, digits, dots, hyphens and underscores, at most 128 in all")
    if text.lower() == _LIST:
        raise Rejected(f"no instance can have the key {_LIST!r}: what asks for it lists all instances of the host")
    return text


class Place:
    """Where the calls of one instance go, and with what. Whatever is wrong with that is `wrong`; then nothing is
    asked."""

    def __init__(self, host: str, instance_key: str, token: str) -> None:
        self.host, self.wrong = host, ""
        try:
            self.host = normal_host(host) if host else ""
            self._key = quote(check_key(instance_key), safe="")
        except Rejected as error:
            self.wrong = str(error)
        else:
            self.wrong = "" if self.host else "no host is configured for this channel"
        self.has_token = bool(token)
        if token and not _TOKEN.fullmatch(token):
            self.wrong = self.wrong or "the channel's token has a character that no token has"
        self.headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}

    def url(self, path: str) -> str:
        """`path` has `{key}` where the instance's stands."""
        return self.host + path.replace("{key}", self._key)


class MegaApi:
    """One instance; see `providers.instance.Instance`. Never repeats a call by itself."""

    def __init__(
        self, clients: http.Clients, host: str, instance_key: str, token: str, *, deadline: float = http.DEADLINE
    ) -> None:
        self._clients = clients
        self._place = Place(host, instance_key, token)
        self._deadline = deadline
        self.host = self._place.host

    async def status(self, deadline: float) -> Standing:
        body = understood(await self._call("GET", "/rest/instance/{key}", deadline=deadline))
        instance = body.get("instance")
        return standing(instance) if isinstance(instance, dict) else Standing(None)

    async def listed(self, deadline: float) -> Mapping[str, Standing]:
        reply = await self._call("GET", "/rest/instance/list", deadline=deadline, most_bytes=_MOST_BYTES_OF_A_LIST)
        body = understood(reply)
        found = next((body[name] for name in ("instances", "data") if isinstance(body.get(name), list)), None)
        if found is None or len(found) > _MOST_INSTANCES:
            raise InstanceFault("unreadable", "the gateway's list of instances has another form than is known")
        keyed = ((_first(element, "key", "instance_key"), element) for element in found if isinstance(element, dict))
        return {key: standing(element) for key, element in keyed if isinstance(key, str)}

    async def qr(self) -> Picture | None:
        reply = await self._call("GET", "/rest/instance/qrcode_base64/{key}")
        body = json_object(reply.body)
        if body is not None and reply.status < 500 and _LOGGED_IN in message_of(body).casefold():
            return None
        code = understood(reply).get("qrcode")
        if not isinstance(code, str) or not code:
            raise InstanceFault("unreadable", "the gateway's answer has no QR code in it")
        return picture(code)

    async def restart(self) -> None:
        understood(await self._call("DELETE", "/rest/instance/{key}/restart"))

    async def logout(self) -> None:
        understood(await self._call("DELETE", "/rest/instance/{key}/logout"))

    async def hook(self) -> Hook:
        body = understood(await self._call("GET", "/rest/webhook/{key}"))
        # Which object of the answer has it is not known.
        for place in (body, *(value for value in body.values() if isinstance(value, dict))):
            url, is_enabled = place.get("webhookUrl"), place.get("webhookEnabled")
            if url is None and "webhookUrl" in place:
                url = ""
            if isinstance(url, str):
                return Hook(url, is_enabled if isinstance(is_enabled, bool) else bool(url))
        raise InstanceFault("unreadable", "the gateway's answer does not say where events go")

    async def set_hook(self, url: str) -> None:
        asked = {"messageData": {"webhookUrl": url, "webhookEnabled": True}}
        understood(await self._call("POST", "/rest/webhook/{key}/configWebhook", asked))

    async def _call(
        self,
        method: str,
        path: str,
        asked: dict[str, Any] | None = None,
        *,
        deadline: float | None = None,
        most_bytes: int = http.MOST_BYTES,
    ) -> http.Reply:
        """The answer, whatever it is. Raises `InstanceFault` when there is none."""
        if self._place.wrong:
            raise InstanceFault("misconfigured", self._place.wrong)
        if not self._place.has_token:
            raise InstanceFault("misconfigured", "this channel has no token")
        content = msgspec.json.encode(asked) if asked is not None else None
        return await answer(
            self._clients,
            self._place,
            method,
            path,
            content,
            deadline=self._deadline if deadline is None else deadline,
            most_bytes=most_bytes,
        )


# ----------------------------------------------------------------------------------------------------- what they mean


def standing(instance: Mapping[str, Any]) -> Standing:
    """How an instance stands: two words are known, and nothing else says anything ("`status` values")."""
    word, user = instance.get("status"), instance.get("user")
    id_ = user.get("id") if isinstance(user, dict) else None
    match = _OWN_ID.fullmatch(id_) if isinstance(id_, str) else None
    own_id = match.group(1) if match else None
    if word is None:
        return Standing(None, own_id=own_id)
    if not isinstance(word, str):
        return Standing(None, shown(msgspec.json.encode(word).decode()), own_id)
    return Standing(_STATUSES.get(word), shown(word), own_id)


def understood(reply: http.Reply) -> dict[str, Any]:
    """The body of an answer of success. Raises `InstanceFault` for every other one, by status *and* `error`."""
    body = json_object(reply.body)
    if reply.status < 200 or reply.status >= 300:
        raise refusal(reply, message_of(body) if body is not None else None)
    if body is None:
        text = "the gateway's answer is not one of MegaAPI"
        raise InstanceFault("unreadable", text, raw=start_of(reply.body))
    if is_error(body):
        said = message_of(body)
        if said.strip().casefold() == _UNKNOWN_INSTANCE:
            raise InstanceFault("not_found", "the gateway knows no such instance", raw=shown(said))
        raise InstanceFault("rejected", "the gateway answered with an error", raw=shown(said))
    return body


def is_error(body: Mapping[str, Any]) -> bool:
    """Whether an answer says that it is one of failure; some spell it `erro`."""
    said = [body[name] for name in ("error", "erro") if name in body]
    return any(value not in (False, None, "", 0, "false") for value in said)


def message_of(body: Mapping[str, Any]) -> str:
    """The provider's own words; '' when there are none."""
    said = _first(body, "message", "error", "erro")
    return said if isinstance(said, str) else ""


def _first(body: Mapping[str, Any], *names: str) -> Any:
    return next((body[name] for name in names if isinstance(body.get(name), str)), None)
