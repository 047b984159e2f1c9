"""One file over HTTP from a place that may be hostile: whole, unchanged and in bounds, or a `MediaFault`
(security-reliability.md M1-M6; whatsapp-cloud-api.md §12).

Where a connection may lead is the client's affair (`providers/guard.py`).
"""

import hashlib
from collections.abc import Mapping

import httpx

from providers import guard
from providers.media import HEAD, MediaFault, Received, Sink

_LEAST_SECONDS = 60.0
_LEAST_RATE = 512 * 1024  # bytes a second: whoever is slower is cut off at some time
_MOST_HOPS = 3
_MOST_WAIT = 3600.0
# What may go on to where a redirect leads: nothing that proves who we are.
_HARMLESS = frozenset({"accept", "user-agent"})
# Answers of success that do not carry a whole file.
_NOT_WHOLE = frozenset({204, 205, 206})


def allowance(size: int) -> float:
    """How long a file of so many bytes may take, in seconds."""
    return _LEAST_SECONDS + size / _LEAST_RATE


def download(
    client: httpx.Client,
    url: str,
    *,
    headers: Mapping[str, str],
    into: Sink,
    most_bytes: int,
    seconds: float,
    expected_bytes: int | None,
    expected_digest: bytes | None,
    may_redirect: bool,
) -> Received:
    """Write what is at `url` to `into`, and say what it was. Raises `MediaFault`, and the errors of `into.write`.

    `client` is one of `guard.client()`. `headers` go to `url` alone: a redirect is followed without them, at most 3
    times, and never from https to http. After a fault some bytes may have been written, at most `most_bytes`.
    """
    try:
        with guard.within(seconds):
            response = _answer(client, url, httpx.Headers(headers), may_redirect=may_redirect)
            try:
                received = _received(response, into, most_bytes)
            finally:
                response.close()
    except guard.BlockedAddress as blocked:
        raise MediaFault("blocked_address", str(blocked), is_final=True) from None
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        raise MediaFault("blocked_address", "not an address of a file", is_final=True) from None
    except httpx.TimeoutException:
        raise MediaFault("timeout", "it did not come in time") from None
    except httpx.ProtocolError:
        raise MediaFault("provider_error", "no proper answer came") from None
    except httpx.TransportError as error:  # of a guarded client its text is the name of an error's type
        raise MediaFault("unreachable", f"no connection ({error})") from None
    if expected_bytes is not None and received.size != expected_bytes:
        raise MediaFault("wrong_size", f"{received.size} bytes came, {expected_bytes} were announced")
    if expected_digest is not None and received.digest != expected_digest:
        raise MediaFault("wrong_hash", "its SHA-256 is not the one announced")
    return received


def _answer(client: httpx.Client, url: str, headers: httpx.Headers, *, may_redirect: bool) -> httpx.Response:
    """The answer that carries the file, its body unread. To be closed."""
    target = httpx.URL(url)
    for _ in range(1 + _MOST_HOPS):
        headers["Accept-Encoding"] = "identity"
        response = client.send(client.build_request("GET", target, headers=headers), stream=True)
        if 200 <= response.status_code < 300 and response.status_code not in _NOT_WHOLE:
            return response
        response.close()
        if response.next_request is None:
            raise _refusal(response)
        if not may_redirect:
            raise MediaFault("redirect", "it was to be had at this address, and is said to be at another")
        source, target = target, response.next_request.url
        if source.scheme == "https" and target.scheme != "https":
            raise guard.BlockedAddress("a redirect from https to something else")
        headers = httpx.Headers({name: value for name, value in headers.items() if name in _HARMLESS})
    raise MediaFault("redirect", f"more than {_MOST_HOPS} redirects")


def _refusal(response: httpx.Response) -> MediaFault:
    status = response.status_code
    if status in (404, 410):
        return MediaFault("not_found", f"it is not there (HTTP {status})")
    if status in (401, 403):
        return MediaFault("refused", f"it is not given to us (HTTP {status})")
    if 300 <= status < 400:
        return MediaFault("redirect", f"a redirect to nowhere (HTTP {status})")
    return MediaFault("provider_error", f"no file in the answer (HTTP {status})", wait=_asked_for(response))


def _asked_for(response: httpx.Response) -> float:
    """`Retry-After` in seconds, within reason; a date, or what is no number, counts as silence."""
    value = response.headers.get("retry-after", "").strip()
    return min(float(value), _MOST_WAIT) if value.isascii() and value.isdecimal() else 0.0


def _received(response: httpx.Response, into: Sink, most_bytes: int) -> Received:
    """The whole body, written and hashed on the way; size and digest are compared by the caller."""
    if response.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise MediaFault("encoded", "it came with a content-encoding, which was not asked for")
    declared = response.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most_bytes:  # h11 takes at most 20 digits
        raise _too_large(most_bytes)
    count, head, digest = 0, bytearray(), hashlib.sha256()
    try:
        for chunk in response.iter_raw():
            count += len(chunk)
            if count > most_bytes:
                raise _too_large(most_bytes)
            if len(head) < HEAD:
                head += chunk[: HEAD - len(head)]
            digest.update(chunk)
            into.write(chunk)
    except (httpx.NetworkError, httpx.RemoteProtocolError):
        raise MediaFault("cut_short", "the connection ended before the file did") from None
    return Received(count, digest.digest(), bytes(head), response.headers.get("content-type"))


def _too_large(most_bytes: int) -> MediaFault:
    return MediaFault("too_large", f"more than the {most_bytes} bytes that are taken", is_final=True)
