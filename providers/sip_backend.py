"""The backend that outcomes of registrations are reported to, as a Drachtio controller did (sip-registration.md §1)."""

import asyncio
from datetime import datetime
from types import TracebackType
from typing import Self
from urllib.parse import quote

import httpx

from pombal.errors import PombalError
from pombal.times import zulu
from providers import guard

_SECONDS = 5.0  # after which a report has failed


class NotTold(PombalError):
    """A report that was not taken. `is_final`: the same report would be refused again."""

    def __init__(self, text: str, *, is_final: bool) -> None:
        super().__init__(text)
        self.is_final = is_final


class SipBackend:
    """`url` is the operator's own, so it may be anywhere; `key` goes nowhere else: redirects are not followed."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._client = httpx.AsyncClient(
            headers={"x-api-key": key},
            timeout=_SECONDS,
            verify=guard.ssl_context(),
            follow_redirects=False,
            trust_env=False,
            limits=httpx.Limits(max_connections=20),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def report(self, external_id: str, status: str, error: str | None, last_register_at: datetime | None) -> None:
        """Say how an account stands. Raises `NotTold`."""
        at = zulu(last_register_at, "seconds") if last_register_at else None
        body = {"registerStatus": status, "registerError": error, "lastRegisterAt": at}
        url = f"{self._url}/api/sip/provider-registration/{quote(external_id, safe='')}"
        try:
            async with (
                asyncio.timeout(_SECONDS),  # in all: httpx's own begins anew with each byte
                self._client.stream("PATCH", url, json=body) as answer,  # nobody reads what it says
            ):
                code = answer.status_code
        except (httpx.HTTPError, TimeoutError) as trouble:
            raise NotTold(f"the backend gave no answer: {type(trouble).__name__}", is_final=False) from trouble
        if not 200 <= code < 300:
            is_final = 300 <= code < 500 and code not in (408, 429)
            raise NotTold(f"the backend answered {code}", is_final=is_final)
