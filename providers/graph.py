"""Meta's Graph API: what we ask of it (whatsapp-cloud-api.md §9-§13). What it tells us is in `providers/meta.py`.

POST /{version}/{phone_number_id}/messages           send one message, or mark one as read
POST /{version}/{phone_number_id}/media               hand over a file that messages will name
GET  /{version}/{waba_id}/message_templates           the templates of an account, page by page
"""

import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from pombal.errors import Permanent, Rejected, Temporary, Unreachable
from providers import http, meta_errors
from providers.download import allowance
from providers.inbound import TemplateStatus
from providers.outbound import Answer, Attachment, Fault, Kind, Outcome, Outgoing, Scope
from providers.sniff import extension

_MAX_ID = 512
_PAGES = 50  # of 100 templates; an account has at most 250, or 6,000 when it is verified
_MOST_TRACE = 64
_UPLOAD_TRIES = 6  # of a file whose handing over came to no answer


class GraphSender:
    """The way out of one number. Never repeats a call by itself.

    A call ends after `deadline` seconds in all, an upload after what its size allows if that is not given.
    """

    def __init__(
        self,
        clients: http.Clients,
        base_url: str,
        version: str,
        *,
        number: str,
        token: str,
        deadline: float | None = None,
    ) -> None:
        self._clients = clients
        self._deadline = deadline
        self._url = f"{base_url.rstrip('/')}/{version}/{quote(number, safe='')}"
        self._has_token = bool(token)
        self._headers = {"Authorization": f"Bearer {token}"}

    async def send(self, message: Outgoing) -> Answer:
        """What became of the call. An answer that does not say so, whatever its status, is an unknown outcome."""
        if not self._has_token:
            return Answer(Outcome.REFUSED, fault=_NO_TOKEN)
        content = msgspec.json.encode(payload(message))
        try:
            async with self._clients.client() as client:
                headers = {**self._headers, "Content-Type": "application/json"}
                request = client.build_request("POST", f"{self._url}/messages", content=content, headers=headers)
                reply = await http.call(client, request, deadline=self._deadline or http.DEADLINE)
        except http.NoReply as error:
            outcome = Outcome.UNKNOWN if error.has_left else Outcome.NOT_SENT
            return Answer(outcome, http_status=error.status, why=error.why)
        return read(reply, has_link=_has_link(message))

    async def upload(self, file: Attachment) -> Answer:
        """Hand over a file, streamed (§12). Whatever leaves it open whether Meta has it is a refusal that may pass."""
        if not self._has_token:
            return Answer(Outcome.REFUSED, fault=_NO_TOKEN)
        before, after, headers = _form(file.mime_type)
        headers |= {**self._headers, "Content-Length": str(len(before) + file.size + len(after))}
        try:
            async with self._clients.client() as client:
                content = _around(before, file.chunks, after)
                url = f"{self._url}/media"
                request = client.build_request("POST", url, content=content, headers=headers, timeout=http.PATIENT)
                reply = await http.call(client, request, deadline=self._deadline or allowance(file.size))
        except http.NoReply as error:
            if error.has_left:
                return _no_upload(error.why, error.status)
            return Answer(Outcome.NOT_SENT, http_status=error.status, why=error.why)
        return read_upload(reply)


_NO_TOKEN = Fault(Kind.AUTH, Scope.CHANNEL, "no_token", "this channel has no access token")


def payload(message: Outgoing) -> dict[str, Any]:
    """The body of a send (§9). A phone goes into `to`, with its plus; a BSUID into `recipient` (§5)."""
    if message.type == "read":
        return {"messaging_product": "whatsapp", "status": "read", **message.body["read"]}
    whom = "to" if (message.recipient or "").startswith("+") else "recipient"
    return {
        "messaging_product": "whatsapp",
        "recipient_type": "individual",
        whom: message.recipient,
        "type": message.type,
        **message.body,
        "biz_opaque_callback_data": message.callback,
    }


def _form(mime_type: str) -> tuple[bytes, bytes, dict[str, str]]:
    """The form around a file's bytes, and its header (§12). The file has no name but what its type gives it."""
    boundary = secrets.token_hex(16)
    fields = "".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in (("messaging_product", "whatsapp"), ("type", mime_type))
    )
    part = f'Content-Disposition: form-data; name="file"; filename="file{extension(mime_type)}"'
    before = f"{fields}--{boundary}\r\n{part}\r\nContent-Type: {mime_type}\r\n\r\n"
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return before.encode(), f"\r\n--{boundary}--\r\n".encode(), headers


async def _around(before: bytes, chunks: AsyncIterator[bytes], after: bytes) -> AsyncIterator[bytes]:
    yield before
    async for chunk in chunks:
        yield chunk
    yield after


def read(reply: http.Reply, *, has_link: bool = False) -> Answer:
    """What Graph's answer to a send means."""
    body = _json(reply.body)
    error = body.get("error") if body else None
    if 200 <= reply.status < 300 and not isinstance(error, dict):
        return _accepted(reply, body)
    if reply.status >= 500 and not isinstance(error, dict):
        # A page of some machine on the way: it does not say how far the request came (§14).
        return Answer(Outcome.UNKNOWN, http_status=reply.status, why="an answer that is not Graph's")
    answer = _refused(reply, body, has_link=has_link)
    if answer.fault and answer.fault.kind is Kind.PERMANENT and answer.fault.code in _ABOUT_FILES:
        return msgspec.structs.replace(answer, fault=msgspec.structs.replace(answer.fault, is_about_file=True))
    return answer


# What Graph says to a message whose file it has not, or no longer, under that id; among other things (§12, §13).
_ABOUT_FILES = ("100", "131053")


def read_upload(reply: http.Reply) -> Answer:
    """What Graph's answer to an upload means."""
    body = _json(reply.body)
    error = body.get("error") if body else None
    if isinstance(error, dict) or not (200 <= reply.status < 300 or reply.status >= 500):
        return _refused(reply, body)
    id_ = (body or {}).get("id")
    if reply.status < 300 and isinstance(id_, str) and 0 < len(id_) <= _MAX_ID and "\0" not in id_:
        return Answer(Outcome.ACCEPTED, provider_id=id_, http_status=reply.status)
    return _no_upload("an answer that is not Graph's", reply.status)


def _no_upload(why: str, status: int | None) -> Answer:
    text = f"the file could not be handed over: {why}"
    fault = Fault(Kind.TRANSIENT, Scope.MESSAGE, "upload_failed", text, tries=_UPLOAD_TRIES, is_outage=True)
    return Answer(Outcome.REFUSED, http_status=status, fault=fault)


def _refused(reply: http.Reply, body: dict[str, Any] | None, *, has_link: bool = False) -> Answer:
    error = body.get("error") if body else None
    trace = error.get("fbtrace_id") if isinstance(error, dict) else None
    trace = trace[:_MOST_TRACE].replace("\0", "\ufffd") if isinstance(trace, str) else None
    if 300 <= reply.status < 400:
        fault = Fault(Kind.TRANSIENT, Scope.MESSAGE, f"http_{reply.status}", "a redirect, not followed", tries=3)
    elif body is None and reply.status not in (401, 403, 429):
        fault = Fault(Kind.TRANSIENT, Scope.MESSAGE, f"http_{reply.status}", "an answer that is not Graph's", tries=6)
    else:
        details = error if isinstance(error, dict) else None
        fault = meta_errors.fault(details, reply.status, reply.headers, has_link=has_link)
    return Answer(Outcome.REFUSED, http_status=reply.status, fault=fault, trace_id=trace)


def _accepted(reply: http.Reply, body: dict[str, Any] | None) -> Answer:
    if body is not None and body.get("success") is True:  # of a read receipt
        return Answer(Outcome.ACCEPTED, http_status=reply.status)
    messages = (body or {}).get("messages")
    first = messages[0] if isinstance(messages, list) and messages else None
    wamid = first.get("id") if isinstance(first, dict) else None
    if not isinstance(wamid, str) or not 0 < len(wamid) <= _MAX_ID or "\0" in wamid:
        return Answer(Outcome.UNKNOWN, http_status=reply.status, why="an answer without a message id")
    return Answer(
        Outcome.ACCEPTED,
        provider_id=wamid,
        identities=_identities((body or {}).get("contacts")),
        http_status=reply.status,
    )


def _identities(contacts: Any) -> tuple[tuple[str, str], ...]:
    """By what Meta knows the recipient: the canonical phone may lack the ninth digit we sent to (§5)."""
    contact = contacts[0] if isinstance(contacts, list) and contacts else None
    if not isinstance(contact, dict):
        return ()
    found = (("bsuid", contact.get("user_id")), ("phone", contact.get("wa_id")))
    return tuple((kind, v) for kind, v in found if isinstance(v, str) and 0 < len(v) <= _MAX_ID and "\0" not in v)


def _has_link(message: Outgoing) -> bool:
    media = message.body.get(message.type)
    return isinstance(media, dict) and "link" in media


def _json(raw: bytes) -> dict[str, Any] | None:
    try:
        value = msgspec.json.decode(raw)
    except (ValueError, RecursionError):  # not UTF-8 and not JSON are both ValueErrors
        return None
    return value if isinstance(value, dict) else None


async def templates(
    client: httpx.AsyncClient, base_url: str, version: str, *, waba_id: str, token: str
) -> list[TemplateStatus]:
    """All templates of an account with Meta's present verdict on each.

    Raises `Unreachable` when Meta does not answer, `Temporary` for what may pass, `Permanent` for a token or an id that
    Meta does not take, `Rejected` for an answer that cannot be understood.
    """
    url = f"{base_url.rstrip('/')}/{version}/{quote(waba_id, safe='')}/message_templates"
    found: list[TemplateStatus] = []
    after: str | None = None
    for _ in range(_PAGES):
        # The next page by its cursor: a ready-made `next` link could lead the token to any host.
        params = {"fields": "name,language,status,category", "limit": "100", **({"after": after} if after else {})}
        request = client.build_request("GET", url, params=params, headers={"Authorization": f"Bearer {token}"})
        asked_at = datetime.now(UTC)
        try:
            reply = await http.call(client, request)
        except http.NoReply as error:
            raise Unreachable(f"Meta gave no answer ({error.why})") from None
        body = _json(reply.body)
        if reply.status != 200 or body is None or not isinstance(body.get("data"), list):
            raise _failure(reply, body)
        found += [_template(element, asked_at) for element in body["data"]]
        paging = body.get("paging")
        cursors = paging.get("cursors") if isinstance(paging, dict) and paging.get("next") else None
        after = cursors.get("after") if isinstance(cursors, dict) else None
        if not isinstance(after, str) or not after:
            return found
    raise Rejected(f"more than {_PAGES} pages of templates")


def _failure(reply: http.Reply, body: dict[str, Any] | None) -> Exception:
    if body is None and reply.status >= 500:
        return Temporary(f"HTTP {reply.status} from a machine on the way")
    if body is None or reply.status == 200:
        return Rejected(f"HTTP {reply.status} with an answer that is not a list of templates")
    error = body.get("error")
    fault = meta_errors.fault(error if isinstance(error, dict) else None, reply.status, reply.headers)
    kind = Temporary if fault.kind in (Kind.TRANSIENT, Kind.THROTTLE) else Permanent
    return kind(f"Meta refuses: code {fault.code}")


def _template(element: Any, at: datetime) -> TemplateStatus:
    match element:
        case {"name": str(name), "language": str(language), "status": str(status)} if name and language and status:
            category = element.get("category")
            return TemplateStatus(
                path="$.data",
                name=name[:_MAX_ID],
                language=language[:_MAX_ID],
                status=status[:_MAX_ID].lower(),
                at=at,
                category=category if isinstance(category, str) else None,
            )
    raise Rejected("a template without name, language or status")
