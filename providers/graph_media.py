"""Files at Meta: an id becomes a URL that lives five minutes, and the URL gives the bytes (whatsapp-cloud-api.md §12).

GET    /{version}/{media_id}?phone_number_id=…        where the file is, its size and hash
GET    the url of that answer, with the same token    the bytes
"""

from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import httpx
import msgspec

from providers import guard, meta_errors
from providers.download import allowance, download
from providers.media import MediaFault, Received, Sink, digest_of
from providers.outbound import Kind

_RESOLVE_SECONDS = 20.0
_MOST_BYTES = 64 * 1024  # of the answer that tells the URL
_AGAIN = 2  # downloads after each other: the URL of the first may have run out
_THROTTLED = 60.0  # seconds, when the provider does not say how long
_GONE = (100, 33)  # code and subcode of an id that has expired, or is another account's


class GraphMedia:
    """One file of one number, by the id that a webhook gave."""

    def __init__(
        self,
        client: httpx.Client,
        base_url: str,
        version: str,
        *,
        number: str,
        token: str,
        media_id: str,
        hosts: Sequence[str],
        sha256: str | None = None,
    ) -> None:
        self.host = urlsplit(base_url).netloc
        self._client = client
        self._base_url = base_url.rstrip("/")
        self._url = f"{self._base_url}/{version}/{quote(media_id, safe='')}"
        self._number = number
        self._token = token
        self._hosts = hosts
        self._claimed = digest_of(sha256)

    def fetch(self, into: Sink, most_bytes: int) -> Received:
        """As `Source.fetch`. The URL is asked for anew when it leads nowhere, once; nothing was written then."""
        if not self._token:
            raise MediaFault("no_token", "this channel has no access token")
        for turn in range(1, _AGAIN + 1):
            place = self._resolve()
            if place.size is not None and place.size > most_bytes:
                raise MediaFault("too_large", f"{place.size} bytes, at most {most_bytes} are taken", is_final=True)
            try:
                return download(
                    self._client,
                    place.url,
                    headers=self._authorization,
                    into=into,
                    most_bytes=most_bytes,
                    seconds=allowance(place.size or most_bytes),
                    expected_bytes=place.size,
                    expected_digest=place.digest,
                    may_redirect=False,  # the token would have to stay behind, and nothing is given without it
                )
            except MediaFault as fault:
                if fault.code != "not_found" or turn == _AGAIN:
                    raise
        raise AssertionError("unreachable")

    @property
    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"}

    def _resolve(self) -> "Place":
        try:
            with (
                guard.within(_RESOLVE_SECONDS),
                self._client.stream(
                    "GET", self._url, params={"phone_number_id": self._number}, headers=self._authorization
                ) as response,
            ):
                raw = bytearray()
                for chunk in response.iter_raw():
                    raw += chunk
                    if len(raw) > _MOST_BYTES:
                        raise MediaFault("provider_error", "the answer about the file is too long")
        except httpx.TimeoutException:
            raise MediaFault("timeout", "the provider did not say in time where the file is") from None
        except (httpx.HTTPError, httpx.InvalidURL, guard.BlockedAddress):  # the last two: of a wrong WHATSAPP_GRAPH_URL
            raise MediaFault("unreachable", "the provider could not be asked where the file is") from None
        return self._place(response, bytes(raw))

    def _place(self, response: httpx.Response, raw: bytes) -> "Place":
        try:
            body = msgspec.json.decode(raw)
        except (ValueError, RecursionError):  # not UTF-8 and not JSON are both ValueErrors
            body = None
        if response.status_code != 200:
            raise _refusal(response, body)
        match body:
            case {"url": str(url)} if self._may_have_the_token(url):
                found = digest_of(body["sha256"]) if isinstance(body.get("sha256"), str) else None
                if found and self._claimed and found != self._claimed:
                    raise MediaFault("wrong_hash", "the provider has another file than its webhook told of")
                size = body.get("file_size")
                if isinstance(size, str) and size.isascii() and size.isdecimal() and len(size) < 16:
                    size = int(size)
                is_size = isinstance(size, int) and not isinstance(size, bool) and size >= 0
                return Place(url, size if is_size else None, self._claimed or found)
            case {"url": str()}:
                raise MediaFault("foreign_host", "it is at a host that may not see the token (WHATSAPP_MEDIA_HOSTS)")
        raise MediaFault("provider_error", "an answer that does not say where the file is")

    def _may_have_the_token(self, url: str) -> bool:
        """An allow-listed host by https (M1), or the API's own address, which has it already."""
        try:
            given, own = urlsplit(url), urlsplit(self._base_url)
            port, host = given.port, (given.hostname or "").lower()
        except ValueError:
            return False
        if given.username is not None or given.password is not None:
            return False
        if (given.scheme, host, port) == (own.scheme, own.hostname, own.port):
            return True
        return given.scheme == "https" and port in (None, 443) and any(_matches(host, one) for one in self._hosts)


class Place(NamedTuple):
    """Where a file is for the next five minutes, and what the provider says of it."""

    url: str
    size: int | None
    digest: bytes | None


def _matches(host: str, pattern: str) -> bool:
    """`*.example.org` is any name below it, and not itself."""
    if pattern.startswith("*."):
        return host.endswith(pattern[1:]) and len(host) > len(pattern) - 1
    return host == pattern


def _refusal(response: httpx.Response, body: Any) -> MediaFault:
    status, error = response.status_code, body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        if status in (401, 403):
            return MediaFault("refused", f"the token is refused (HTTP {status})")
        return MediaFault("provider_error", f"the provider answered HTTP {status}")
    if (error.get("code"), error.get("error_subcode")) == _GONE:
        return MediaFault("gone", "the provider knows no such file: forgotten, or another account's")
    fault = meta_errors.fault(error, status, response.headers)
    code = {
        Kind.TRANSIENT: "provider_error",
        Kind.THROTTLE: "throttled",
        Kind.AUTH: "refused",
        Kind.PAYMENT: "refused",
        Kind.PERMANENT: "rejected",
    }[fault.kind]
    wait = max(fault.wait, _THROTTLED) if fault.kind is Kind.THROTTLE else fault.wait
    return MediaFault(code, f"the provider answered HTTP {status}, code {fault.code}", wait=wait)
