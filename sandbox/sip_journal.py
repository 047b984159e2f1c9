"""What the simulated registrar was asked: a transaction for each branch, and counts."""

from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import islice

from sandbox.meta import JSON

KEPT = 20_000  # transactions


@dataclass(eq=False, slots=True)
class Transaction:
    """A request with all its retransmissions.

    user            of To
    expires         that were asked for, as written; None: nothing said
    codes           of its answers, provisional ones too
    overlapped      it came while another of its user was not answered
    complaints      rules of the protocol that the request breaks
    """

    n: int
    at: float
    user: str
    domain: str
    method: str
    call_id: str
    from_tag: str
    cseq: int
    branch: str
    transport: str
    source: str
    expires: str | None
    contact: str | None
    was_authorized: bool
    user_agent: str
    ended: float | None = None
    codes: list[int] = field(default_factory=list)
    algorithm: str | None = None
    retransmissions: int = 0
    overlapped: bool = False
    complaints: list[str] = field(default_factory=list)

    def shown(self) -> JSON:
        return {name: getattr(self, name) for name in self.__slots__}


class Journal:
    """The latest ones, and counts of all."""

    def __init__(self) -> None:
        self._last = 0
        self.clear()

    def clear(self) -> None:
        self._transactions: deque[Transaction] = deque(maxlen=KEPT)
        self._codes: Counter[int] = Counter()
        self.transactions = self.overlaps = self.retransmissions = self.complaints = 0
        self.dropped: Counter[str] = Counter()

    def next(self) -> int:
        self._last += 1
        return self._last

    def begin(self, transaction: Transaction) -> None:
        self.transactions += 1
        self._transactions.append(transaction)

    def answered(self, transaction: Transaction, code: int) -> None:
        transaction.codes.append(code)
        self._codes[code] += 1

    def listed(self, limit: int, *, user: str | None = None, after: int | None = None) -> list[JSON]:
        """The latest ones, newest last; or the first after number `after`."""
        fitting = (one for one in self._transactions if user in (None, one.user))
        if after is not None:
            return [one.shown() for one in islice((one for one in fitting if one.n > after), limit)]
        return [one.shown() for one in deque(fitting, maxlen=limit)]

    def summary(self) -> JSON:
        return {
            "transactions": self.transactions,
            "codes": {str(code): count for code, count in sorted(self._codes.items())},
            "retransmissions": self.retransmissions,
            "overlaps": self.overlaps,
            "complaints": self.complaints,
            "dropped": dict(self.dropped),
        }
