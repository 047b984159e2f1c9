"""How fast a number may send: so many a second in all, and one every few seconds to the same recipient after a burst.

Both are GCRA ("a leaky bucket as a meter"): one timestamp each, in Redis, by Redis's own clock, so that every worker
shares them. A grant is a *slot*: the time to wait before the call, so that calls leave evenly and not in bunches. While
Redis is away the process paces by itself: a lane has one holder, so that comes to nearly the same.
"""

import os
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import redis

from pombal import log

HORIZON = 0.25  # seconds: how far ahead slots are given
PAIR_SECONDS, PAIR_BURST = 6.0, 45  # to one recipient (whatsapp-cloud-api.md §10)
_PATIENCE = 0.25  # seconds that Redis has for an answer
_RETRY = 5.0  # … and seconds it is left alone when it gave none

_log = log.get()

# All times in microseconds. KEYS: the number's, then one per recipient. ARGV: interval of the number, horizon, interval
# of a pair, tolerance of a pair. Answers one number each: a wait (0 and more) for a slot, or -1 - the wait for the
# number's turn, or -10^15 - the wait for the pair's.
_LUA = """
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local step, horizon, pair_step, tolerance = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local slot = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now)
local answer = {}
for i = 2, #KEYS do
    local pair = math.max(tonumber(redis.call('GET', KEYS[i]) or 0), now)
    if pair - now > tolerance then
        answer[#answer + 1] = string.format('%.0f', -1e15 - (pair - now - tolerance))
    elseif slot - now > horizon then
        answer[#answer + 1] = string.format('%.0f', -1 - (slot - now - horizon))
    else
        answer[#answer + 1] = string.format('%.0f', slot - now)
        slot = slot + step
        redis.call('SET', KEYS[i], string.format('%.0f', pair + pair_step),
            'PX', math.ceil((pair + pair_step - now) / 1000) + 1000)
    end
end
redis.call('SET', KEYS[1], string.format('%.0f', slot), 'PX', math.ceil((slot - now) / 1000) + 60000)
return answer
"""


class Grant(NamedTuple):
    """What one message may do: be sent in `wait` seconds, or ask again after them since its number or pair is full."""

    wait: float
    full: str = ""  # `number` or `pair`


class Pace:
    """The limits of a process's lanes. Thread-safe."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._script = client.register_script(_LUA)
        self._away_until = 0.0
        self._local = LocalPace()

    def grants(self, number: str, recipients: Sequence[str], per_second: float) -> list[Grant]:
        """A grant for each message to these recipients, in this order. Names are ids of ours, never phone numbers."""
        if not recipients:
            return []
        if time.monotonic() >= self._away_until:
            keys = [f"pombal:pace:{number}", *(f"pombal:pace:{number}:{recipient}" for recipient in recipients)]
            steps = [1e6 / per_second, HORIZON * 1e6, PAIR_SECONDS * 1e6, PAIR_SECONDS * (PAIR_BURST - 1) * 1e6]
            try:
                answer = self._script(keys=keys, args=[f"{step:.0f}" for step in steps])
                return [_read(int(value)) for value in answer]
            except redis.RedisError as error:
                self._away_until = time.monotonic() + _RETRY
                _log.warning("pace_not_shared", error=log.described(error))
        return self._local.grants(number, recipients, per_second)


def client_for_pace(url: str) -> redis.Redis:
    """A client that gives up fast: a send must not wait for a limit."""
    if url == "memory://":  # the stub broker has no server; nothing listens here, and the process paces by itself
        url = f"unix://{os.devnull}"
    return redis.Redis.from_url(url, socket_timeout=_PATIENCE, socket_connect_timeout=_PATIENCE)


def _read(value: int) -> Grant:
    if value >= 0:
        return Grant(value / 1e6)
    if value > -(10**15):
        return Grant((-1 - value) / 1e6, "number")
    return Grant((-(10**15) - value) / 1e6, "pair")


class LocalPace:
    """The same rule within one process."""

    def __init__(self) -> None:
        self._next: dict[str, float] = {}
        self._lock = threading.Lock()

    def grants(self, number: str, recipients: Sequence[str], per_second: float) -> list[Grant]:
        now, tolerance = time.monotonic(), PAIR_SECONDS * (PAIR_BURST - 1)
        with self._lock:
            if len(self._next) > 100_000:
                self._next = {key: at for key, at in self._next.items() if at > now}
            slot = max(self._next.get(number, 0.0), now)
            answer = []
            for recipient in recipients:
                key = f"{number}:{recipient}"
                pair = max(self._next.get(key, 0.0), now)
                if pair - now > tolerance:
                    answer.append(Grant(pair - now - tolerance, "pair"))
                elif slot - now > HORIZON:
                    answer.append(Grant(slot - now - HORIZON, "number"))
                else:
                    answer.append(Grant(slot - now))
                    slot += 1 / per_second
                    self._next[key] = pair + PAIR_SECONDS
            self._next[number] = slot
            return answer
