"""A file behind a link that a tenant or a message supplied: hostile until proven otherwise (security-reliability.md
M2)."""

import httpx

from providers.download import allowance, download
from providers.media import Received, Sink, digest_of


def _host(url: str) -> str:
    try:
        return httpx.URL(url).host
    except httpx.InvalidURL:  # `download` says so
        return ""


class Link:
    """One file at an address of anybody's choice; `client` must be a guarded one (`providers/guard.py`)."""

    def __init__(self, client: httpx.Client, url: str, *, sha256: str | None = None) -> None:
        self.host = _host(url)
        self._client = client
        self._url = url
        self._claimed = digest_of(sha256)

    def fetch(self, into: Sink, most_bytes: int) -> Received:
        """As `Source.fetch`. Redirects are followed, and each address is checked like the first."""
        return download(
            self._client,
            self._url,
            headers={},
            into=into,
            most_bytes=most_bytes,
            seconds=allowance(most_bytes),
            expected_bytes=None,
            expected_digest=self._claimed,
            may_redirect=True,
        )
