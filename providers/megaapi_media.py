"""Files at MegaAPI: the keys of a message become its bytes, decrypted, as base64 in a JSON answer (megaapi.md, "Media
download request").

POST /rest/instance/downloadMediaMessage/{key}    {"messageKeys": {…}} → {"error": …, "data": "data:<mime>;base64,…"}

The answer is read as it comes: the text of the file is decoded piece by piece, and only what is around it is kept.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec

from providers import guard, http
from providers.download import allowance
from providers.gateway_calls import EDGE_WAIT, THROTTLE_WAIT, is_edge_block, json_object, wait_of
from providers.inline import Decoder
from providers.media import MediaFault, Received, Sink, digest_of
from providers.megaapi import Place, is_error

_MOST_AROUND = 64 * 1024  # bytes of an answer that are not the file
_KEYS = ("mediaKey", "directPath", "url", "mimetype", "messageType")
_PATH = "/rest/instance/downloadMediaMessage/{key}"


class MegaMedia:
    """One file of one instance, by the keys that a webhook gave; `client` must be a guarded one."""

    def __init__(
        self,
        client: httpx.Client,
        host: str,
        instance_key: str,
        token: str,
        keys: Mapping[str, Any],
        *,
        sha256: str | None = None,
    ) -> None:
        self._client = client
        self._place = Place(host, instance_key, token)
        self._keys = {name: keys[name] for name in _KEYS if isinstance(keys.get(name), str)}
        self._claimed = digest_of(sha256)
        self.host = urlsplit(self._place.host).netloc if not self._place.wrong else ""

    def fetch(self, into: Sink, most_bytes: int) -> Received:
        """As `Source.fetch`. The type is the answer's, or else the one that the message named."""
        if self._place.wrong:
            raise MediaFault("misconfigured", self._place.wrong)
        if not self._place.has_token:
            raise MediaFault("no_token", "this channel has no token")
        try:
            with guard.within(allowance(most_bytes // 3 * 4)):
                received = self._asked(into, most_bytes)
        except guard.BlockedAddress:
            text = "the gateway's host leads to an address that is not public"
            raise MediaFault("blocked_address", text, is_final=True) from None
        except httpx.TimeoutException:
            raise MediaFault("timeout", "it did not come in time") from None
        except (httpx.ProtocolError, httpx.InvalidURL):
            raise MediaFault("provider_error", "no proper answer came") from None
        except httpx.TransportError as error:  # of a guarded client its text is the name of an error's type
            raise MediaFault("unreachable", f"no connection ({error})") from None
        if self._claimed is not None and received.digest != self._claimed:
            raise MediaFault("wrong_hash", "its SHA-256 is not the one that its message told")
        return received

    def _asked(self, into: Sink, most_bytes: int) -> Received:
        content = msgspec.json.encode({"messageKeys": self._keys})
        headers = {**self._place.headers, "Content-Type": "application/json"}
        url = self._place.url(_PATH)
        with self._client.stream("POST", url, content=content, headers=headers) as response:
            if response.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
                raise MediaFault("encoded", "it came with a content-encoding, which was not asked for")
            if not 200 <= response.status_code < 300:
                raise _refusal(response)
            answer = Answer(Decoder(into, most_bytes))
            try:
                for chunk in response.iter_raw():
                    answer.feed(chunk)
            except (httpx.NetworkError, httpx.RemoteProtocolError):
                raise MediaFault("cut_short", "the connection ended before the file did") from None
        received = answer.finished()
        return received._replace(content_type=received.content_type or self._keys.get("mimetype"))


class Answer:
    """An answer in JSON whose `data` goes to a decoder as it comes; the rest is kept, and judged at the end.

    `feed` and `finished` raise `MediaFault`.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._around = bytearray()  # the answer, with "" in place of its data
        self._depth = 0
        self._is_in_string = self._is_in_data = False
        self._is_escaped = False  # the next character, by the one before it
        self._string_at = 0  # where the last string begins in what is kept
        self._string = b""  # the last one, on the first level
        self._name = b""  # whose value comes next, on the first level
        self._has_data = False
        self._fault: MediaFault | None = None  # of the data, until it is known whether the answer is one of an error

    def feed(self, chunk: bytes) -> None:
        at = 0
        while at < len(chunk):
            at = self._decoded(chunk, at) if self._is_in_data else self._looked_at(chunk, at)

    def finished(self) -> Received:
        """The file, when the answer is a whole one and has a file in it."""
        body = json_object(bytes(self._around))
        if body is None:
            raise MediaFault("provider_error", "an answer that is not MegaAPI's")
        if is_error(body):
            raise MediaFault("rejected", "the gateway answered that it has no file")
        if not self._has_data and body.get("data") is not None:
            raise MediaFault("provider_error", "an answer whose data is no text")
        if self._fault:
            raise self._fault
        received = self._decoder.finished()
        if not received.size:
            raise MediaFault("rejected", "the gateway answered without a file")
        return received

    def _looked_at(self, chunk: bytes, at: int) -> int:
        """Keep what comes before the next data, and say where that begins."""
        end = min(len(chunk), at + _MOST_AROUND)
        for n in range(at, end):
            byte = chunk[n : n + 1]
            self._around += byte
            if self._is_in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif byte == b"\\":
                    self._is_escaped = True
                elif byte == b'"':
                    self._is_in_string = False
                    self._string = bytes(self._around[self._string_at : -1]) if self._depth == 1 else b""
            elif byte == b'"':
                if self._depth == 1 and self._name == b"data":
                    return self._at_data(n + 1)
                self._is_in_string, self._string_at = True, len(self._around)
            elif byte in b"{[":
                self._depth += 1
            elif byte in b"}]":
                self._depth -= 1
            elif self._depth == 1 and byte in b":,":
                self._name = self._string if byte == b":" else b""
        self._bound()
        return end

    def _at_data(self, start: int) -> int:
        if self._has_data:
            raise MediaFault("provider_error", "an answer with two files in it")
        self._bound()
        self._has_data = self._is_in_data = True
        return start

    def _decoded(self, chunk: bytes, at: int) -> int:
        """Give the data to the decoder, and say where it ends. Some write its `/` as `\\/`."""
        end = chunk.find(b'"', at)
        piece = chunk[at:] if end < 0 else chunk[at:end]
        has_half = False
        if self._is_escaped:
            piece = b"\\" + piece
        if b"\\" in piece:
            piece = piece.replace(b"\\/", b"/")
            if end < 0 and piece.endswith(b"\\"):
                piece, has_half = piece[:-1], True
        try:
            if b"\\" in piece:
                raise MediaFault("encoded", "it is not base64")
            self._decoder.feed(piece)
        except MediaFault as fault:
            if fault.code != "encoded":
                raise
            # It may be the text of an error: kept like the rest, so that the answer is understood to its end.
            self._fault = fault
            self._is_in_data, self._is_in_string, self._string_at = False, True, len(self._around)
            if self._is_escaped:
                self._around += b"\\"  # it came at the end of the chunk before
            return at
        self._is_escaped = has_half
        if end < 0:
            return len(chunk)
        self._around += b'"'
        self._is_in_data = False
        return end + 1

    def _bound(self) -> None:
        if len(self._around) > _MOST_AROUND:
            raise self._fault or MediaFault("provider_error", "an answer that is too long around its file")


def _refusal(response: httpx.Response) -> MediaFault:
    raw = bytearray()
    try:
        for chunk in response.iter_raw():
            raw += chunk
            if len(raw) > _MOST_AROUND:
                break
    except (httpx.NetworkError, httpx.RemoteProtocolError):
        raw.clear()  # its status says enough
    reply, status = http.Reply(response.status_code, response.headers, bytes(raw)), response.status_code
    if is_edge_block(reply):
        wait = wait_of(reply, EDGE_WAIT)
        return MediaFault("throttled", "the edge in front of the gateway turns us away (HTTP 403)", wait=wait)
    if status == 429:
        wait = wait_of(reply, THROTTLE_WAIT)
        return MediaFault("throttled", "the gateway wants fewer requests (HTTP 429)", wait=wait)
    if status in (401, 403):
        return MediaFault("refused", f"the token is refused (HTTP {status})")
    if status == 404:
        return MediaFault("not_found", "the gateway knows no such instance or file (HTTP 404)")
    if 300 <= status < 400:
        return MediaFault("redirect", f"the gateway sent us elsewhere (HTTP {status}), not followed")
    if status >= 500 or status == 408:
        return MediaFault("provider_error", f"the gateway answered HTTP {status}", wait=wait_of(reply, 0.0))
    return MediaFault("rejected", f"the gateway refused the request (HTTP {status})")
