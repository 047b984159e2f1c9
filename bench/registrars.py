"""Simulated registrars on 127.0.0.1, 127.0.0.2 and so on, all on one port and in one process (for `sip.py`).

    python bench/registrars.py HOSTS ACCOUNTS

Account uN is at host N modulo HOSTS. Prints the port; then answers each line that it reads: `summary` with the sums of
all of them, `arrivals` with what came since it was asked last, `[user, at, was_authorized, was_granted]` each.
"""

import asyncio
import json
import sys
from collections import Counter
from typing import Any

from sandbox.config import SipUser
from sandbox.sip import Registrar

PASSWORD = "s3cret"  # noqa: S105 - of nobody
TRIES = 20


async def opened(hosts: int) -> list[Registrar]:
    """On one port that is free at each of the addresses."""
    for _ in range(TRIES):
        registrars = [Registrar() for _ in range(hosts)]
        try:
            port = await registrars[0].open("127.0.0.1", 0)
            for n, one in enumerate(registrars[1:], 2):
                await one.open(f"127.0.0.{n}", port)
        except OSError:
            for one in registrars:
                one.close()
        else:
            return registrars
    raise SystemExit("no port is free at all addresses")


def summary(registrars: list[Registrar]) -> dict[str, int]:
    names = ("registered", "gaps", "overlaps", "transactions", "retransmissions", "complaints")
    total: Counter[str] = Counter()
    for one in registrars:
        told = one.summary()
        total.update({name: told[name] for name in names})
        total["granted"] += sum(user.granted for user in one.users)
        total["refused"] += sum(n for code, n in told["codes"].items() if code not in ("200", "401"))
    return {name: total[name] for name in (*names, "granted", "refused")}


def arrivals(registrars: list[Registrar], seen: list[int]) -> list[Any]:
    found = []
    for n, one in enumerate(registrars):
        for entry in one.journal.listed(1_000_000, after=seen[n]):
            if entry["ended"] is None:
                break
            seen[n] = entry["n"]
            found.append((entry["user"], entry["at"], entry["was_authorized"], 200 in entry["codes"]))
    return found


async def main() -> None:
    hosts, accounts = int(sys.argv[1]), int(sys.argv[2])
    registrars = await opened(hosts)
    for n in range(accounts):
        registrars[n % hosts].users.add(SipUser(f"u{n}", PASSWORD))
    print(registrars[0].port, flush=True)
    asked, seen = asyncio.StreamReader(), [0] * hosts
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(asked), sys.stdin)
    while line := (await asked.readline()).strip():
        print(json.dumps(summary(registrars) if line == b"summary" else arrivals(registrars, seen)), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
