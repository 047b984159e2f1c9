"""Every error code of Meta's that can meet a send, and what it asks for (whatsapp-cloud-api.md §13, §14).

The one place where codes are told apart. What is not listed goes by HTTP status: `is_transient` or a 5xx is transient,
429 a throttle of the number, 401 and 403 a matter of access, any other 4xx is permanent.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from providers.outbound import Fault, Kind, Scope

_TRIES = 6  # of a transient refusal that may be the message's own: with the back-off of the lane, half a minute
_LONG = 20  # … of one that is the provider's trouble: half an hour
_MOST_TEXT = 1_000
_LONGEST_WAIT = 3600.0  # seconds; who asks for more is asked again after that


class Rule(NamedTuple):
    kind: Kind
    scope: Scope
    tries: int = 0
    wait: float = 0.0
    is_outage: bool = False


_PERMANENT = Rule(Kind.PERMANENT, Scope.MESSAGE)
_OUTAGE = Rule(Kind.TRANSIENT, Scope.MESSAGE, _LONG, is_outage=True)
_ACCESS = Rule(Kind.AUTH, Scope.CHANNEL)

RULES: dict[int, Rule] = {
    # the token, permissions, and the standing of app, account and number: a person mends them
    **dict.fromkeys((0, 3, 10, 104, 190, *range(200, 300), 131005), _ACCESS),
    **dict.fromkeys((33, 368, 131031, 131037, 131045, 133000, 133005, 133006, 133010, 134102), _ACCESS),
    **dict.fromkeys((131042, 134011), Rule(Kind.PAYMENT, Scope.CHANNEL)),
    # too many
    4: Rule(Kind.THROTTLE, Scope.APP, wait=60),
    80007: Rule(Kind.THROTTLE, Scope.WABA, wait=60),
    130429: Rule(Kind.THROTTLE, Scope.NUMBER),
    131056: Rule(Kind.THROTTLE, Scope.PAIR),
    131048: Rule(Kind.THROTTLE, Scope.NUMBER, wait=900),  # spam limit: hours, and an operator should look
    131064: Rule(Kind.THROTTLE, Scope.WABA, wait=3600),  # days
    **dict.fromkeys((613, 131208, 138013), Rule(Kind.THROTTLE, Scope.NUMBER, wait=60)),
    **dict.fromkeys((133008, 133009, 133016), Rule(Kind.THROTTLE, Scope.NUMBER, wait=300)),
    132069: Rule(Kind.THROTTLE, Scope.MESSAGE, wait=360),  # a throttled flow: ten an hour
    # try again
    1: Rule(Kind.TRANSIENT, Scope.MESSAGE, 3, is_outage=True),
    **dict.fromkeys((2, 131016, 133004), _OUTAGE),
    131000: Rule(Kind.TRANSIENT, Scope.MESSAGE, 5, is_outage=True),
    131057: Rule(Kind.TRANSIENT, Scope.NUMBER, _TRIES, wait=60),  # maintenance: the throughput is being raised
    133015: Rule(Kind.TRANSIENT, Scope.NUMBER, _TRIES, wait=300),
    134101: Rule(Kind.TRANSIENT, Scope.MESSAGE, _TRIES, wait=600),
    135000: Rule(Kind.TRANSIENT, Scope.MESSAGE, 2),
    # never
    **dict.fromkeys((100, 130403, 130472, 130497, 131008, 131009, 131021, 131026, 131030, 131047, 131049), _PERMANENT),
    **dict.fromkeys((131050, 131051, 131052, 131055, 131062, 131063, 131020, 131041, 131059), _PERMANENT),
    **dict.fromkeys((*range(131200, 131208), *range(131209, 131300)), _PERMANENT),
    **dict.fromkeys((132000, 132001, 132005, 132007, 132008, 132012, 132015, 132016, 132018, 132068), _PERMANENT),
    **dict.fromkeys((134100, 137000), _PERMANENT),
}

# Of calls, blocks, usernames, templates and signup: not on the way of a send, so no reason to hold one (§13).
_ELSEWHERE = (
    range(138000, 138019), range(139000, 140000), range(147000, 148000), range(2388000, 2389000),
    range(2494000, 2495000), range(2593107, 2593109),
)  # fmt: skip

# Meta could not fetch the link, or did not like the file: only the first may pass (§13).
_LINK = Rule(Kind.TRANSIENT, Scope.MESSAGE, 3)


def fault(
    error: Mapping[str, Any] | None, http_status: int, headers: Mapping[str, str], *, has_link: bool = False
) -> Fault:
    """The fault behind Graph's `error` object, or behind a refusal without one. Any shape of it is taken."""
    error = error or {}
    code = _code(error.get("code"))
    rule = RULES.get(code) if code is not None else None
    if code == 131053:
        rule = _LINK if has_link else _PERMANENT
    if code == 100 and error.get("error_subcode") == 33 and error.get("type") == "GraphMethodException":
        rule = _ACCESS  # the object of the URL, our number, is gone or not for this token: no message's fault
    if rule is None and code is not None and any(code in codes for codes in _ELSEWHERE):
        rule = _PERMANENT
    if rule is None:
        rule = _by_status(http_status, error.get("is_transient") is True)
    wait = max(rule.wait, _asked_for(headers)) if rule.kind in (Kind.THROTTLE, Kind.TRANSIENT) else 0.0
    return Fault(
        rule.kind,
        rule.scope,
        str(code) if code is not None else f"http_{http_status}",
        _text(error) or f"HTTP {http_status}",
        rule.tries,
        is_outage=rule.is_outage,
        wait=min(wait, _LONGEST_WAIT),
    )


def late_fault(code: str, text: str) -> Fault:
    """The fault behind a `failed` status, of which only the code and the text are kept: the same table (§14)."""
    return fault({"code": code, "message": text}, 400, {})


def _by_status(http_status: int, is_transient: bool) -> Rule:
    if http_status >= 500:
        return _OUTAGE
    if is_transient:
        return Rule(Kind.TRANSIENT, Scope.MESSAGE, _TRIES)
    if http_status == 429:
        return RULES[130429]
    return _ACCESS if http_status in (401, 403) else _PERMANENT


def _code(value: Any) -> int | None:
    if type(value) is str and value.isascii() and value.isdecimal() and len(value) < 10:
        return int(value)
    return value if type(value) is int else None


def _text(error: Mapping[str, Any]) -> str:
    """`message`, and the details beside it: an object, or at times a plain string (§13)."""
    data = error.get("error_data")
    details = data.get("details") if isinstance(data, dict) else data
    parts = [part for part in (error.get("message"), details) if type(part) is str and part]
    return ": ".join(parts)[:_MOST_TEXT].replace("\0", "\ufffd")


def _asked_for(headers: Mapping[str, str]) -> float:
    """`Retry-After` in seconds; a date, or what is no number, counts as silence."""
    value = headers.get("retry-after", "")
    return float(value) if value.isascii() and value.isdecimal() and len(value) < 7 else 0.0
