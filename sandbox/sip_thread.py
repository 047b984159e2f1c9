"""The simulated registrar in a thread of its own, for tests and benchmarks that want it in their process."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar

import msgspec

from sandbox.config import SipUser
from sandbox.meta import JSON
from sandbox.sip import Registrar
from sandbox.sip_habits import SetHabit

T = TypeVar("T")
LOOK = 0.05  # seconds; bindings expire without a word


class SipThread:
    """A registrar on a port that serves UDP and TCP. Its methods may be called from any thread but its own."""

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        self.host, self.port = host, port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sip-registrar", daemon=True)
        self._news = threading.Condition()
        self._registrar = Registrar(self._notify)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def start(self) -> Self:
        """Raises OSError when the port is taken."""
        self._thread.start()
        try:
            self.port = self._run(self._registrar.open(self.host, self.port))
        except OSError:
            self._end()
            raise
        return self

    def stop(self) -> None:
        self._do(self._registrar.close)
        self._end()

    # Accounts

    def user(self, name: str = "5511999990000", password: str = "s3cret", **more: str | None) -> str:  # noqa: S107
        """An account, or another password for one; `more` are `auth_user`, `domain` and `realm`. Gives its name."""
        self._do(lambda: self._registrar.users.add(SipUser(name, password, **more)))
        return name

    def users(self, count: int, prefix: str = "u", password: str = "s3cret") -> list[str]:  # noqa: S107
        """Many; gives their names."""
        names = [f"{prefix}{i}" for i in range(count)]

        def add() -> None:
            for name in names:
                self._registrar.users.add(SipUser(name, password))

        self._do(add)
        return names

    def remove(self, name: str | None = None) -> None:
        """One account, or all, with whatever was bound and counted."""
        its = self._registrar.users
        self._do(its.clear if name is None else lambda: its.remove(name))

    def state(self, name: str) -> JSON:
        """As `GET /sip/users/{name}` tells it. Raises KeyError for nobody."""

        def state() -> JSON:
            user = self._registrar.users.find(name)
            if user is None:
                raise KeyError(name)
            return user.shown()

        return self._do(state)

    def forget(self, name: str | None = None) -> None:
        """Bindings are gone, of one account or of all."""
        self._do(lambda: self._registrar.forget(name))

    # Habits

    def habit(self, user: str | None = None, **keys: Any) -> int:
        """See `sandbox.sip_habits`; gives its id. Raises ValueError for what is none."""
        asked = msgspec.convert({"user": user, **keys}, SetHabit)
        return self._do(lambda: self._registrar.habits.set(asked).id)

    def clear_habits(self, user: str | None = None, *, id: int | None = None) -> None:
        """This user's, this one, or all."""
        self._do(lambda: self._registrar.habits.clear(user=user, id=id))

    # What was asked

    def journal(self, user: str | None = None, *, limit: int = 100_000, after: int | None = None) -> list[JSON]:
        return self._do(lambda: self._registrar.journal.listed(limit, user=user, after=after))

    def summary(self) -> JSON:
        return self._do(self._registrar.summary)

    def clear(self) -> None:
        """The journal and the counts."""
        self._do(self._registrar.journal.clear)

    def until(self, check: Callable[[], T], *, seconds: float = 10) -> T:
        """Wait until this is true, looking after each transaction and now and then; gives what it gave."""
        end = self._loop.time() + seconds
        while not (found := check()):
            left = end - self._loop.time()
            if left <= 0:
                raise TimeoutError(f"not so within {seconds} s; the latest transactions: {self.journal(limit=3)}")
            with self._news:
                self._news.wait(min(LOOK, left))
        return found

    # What happens to it, and through it

    def invite(self, name: str, *, received: bool = False, seconds: float = 5.0) -> JSON:
        """A call to the account's latest binding. Raises LookupError when there is no way to it."""
        return self._run(self._registrar.invite(name, received=received, seconds=seconds))

    def away(self) -> None:
        """Nobody listens on its port any more."""
        self._do(self._registrar.close)

    def back(self) -> None:
        """Again, on the same one."""
        self._run(self._registrar.come_back())

    def _notify(self) -> None:
        with self._news:
            self._news.notify_all()

    def _do(self, act: Callable[[], T]) -> T:
        async def run() -> T:
            return act()

        return self._run(run())

    def _run(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(30)

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
