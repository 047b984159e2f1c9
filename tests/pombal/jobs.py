"""Test actors, on queues of their own, for a real worker: `dramatiq tests.pombal.jobs -Q errands -p 1 -t 4`.

What a job did is appended to the file that `POMBAL_TEST_EFFECTS` names, out of reach of the faults that tests cause.
"""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import redis
from dramatiq.middleware import TimeLimitExceeded
from sqlalchemy import text

from pombal import db
from pombal.broker import actor, broker
from pombal.errors import Permanent

__all__ = ["broker"]

PRIVATE = "5511944440001 said Olá"


@actor(queue="errands", max_retries=2, min_backoff=50, max_backoff=100)
def note(id_: str) -> None:
    did(id_)


@actor(queue="errands", max_retries=2, min_backoff=50, max_backoff=100)
def fails(id_: str) -> None:
    did(id_)
    raise RuntimeError(PRIVATE)


@actor(queue="errands", max_retries=2, min_backoff=50, max_backoff=100)
def refuses(id_: str) -> None:
    did(id_)
    raise Permanent("it cannot be done")


@actor(queue="errands", max_retries=1, min_backoff=50, max_backoff=100)
def fails_without(id_: str, file: str) -> None:
    """Fails as long as the file is not there."""
    did(id_)
    if not Path(file).exists():
        raise RuntimeError(PRIVATE)
    did(f"{id_} done")


@actor(queue="errands", max_retries=3, min_backoff=50, max_backoff=100)
def fails_once_after(id_: str, file: str) -> None:
    """Waits for the file, fails the first time, and is done the second."""
    did(id_)
    wait_for(file)
    if f"{id_} tried" not in effects():
        did(f"{id_} tried")
        raise RuntimeError(PRIVATE)
    did(f"{id_} done")


@actor(queue="errands", max_retries=0)
def waits(id_: str, file: str) -> None:
    did(id_)
    wait_for(file)
    did(f"{id_} done")


@actor(queue="errands", max_retries=0)
def asks_its_database(id_: str) -> None:
    did(id_)
    with db.session() as s:
        s.execute(text("SELECT 1"))
    did(f"{id_} done")


@actor(queue="errands", max_retries=0)
def asks_postgres(id_: str, url: str) -> None:
    did(id_)
    psycopg.connect(url).close()
    did(f"{id_} done")


@actor(queue="errands", max_retries=0)
def asks_redis(id_: str, url: str) -> None:
    did(id_)
    with redis.Redis.from_url(url) as client:
        client.set("full", "of it")
    did(f"{id_} done")


@actor(queue="doomed", max_retries=0)
def is_on_a_doomed_queue(id_: str) -> None:
    did(id_)


@actor(queue="doomed", max_retries=0)
def ends_its_thread(id_: str) -> None:
    """The thread that ran this dies as soon as it waits for the next job."""
    did(id_)
    strike_when(SystemExit, lambda names: "process_message" not in names)


@actor(queue="doomed", max_retries=0)
def is_struck_while_given_up(id_: str) -> None:
    """Its time limit, so to speak, falls into the hook that writes its dead letter, while its statement waits.

    Not anywhere in that hook: Python itself can be struck between taking a lock and remembering that it did.
    """
    with db.session() as s:
        s.execute(text("SELECT 1"))  # connected, so that the only wait of the hook is for its statements
    did(id_)
    strike_when(TimeLimitExceeded, lambda names: {"_give_up", "record", "wait"} <= names, then=f"{id_} struck")
    raise Permanent("it cannot be done")


def strike_when(error: type[BaseException], condition: Callable[[set[str]], bool], then: str = "") -> None:
    """Raise an error in this thread from outside, as Dramatiq's time limit does, once its call stack fits."""
    target = threading.get_ident()

    def strike() -> None:
        while not condition(calls_of(target)):
            time.sleep(0.005)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(target), ctypes.py_object(error))
        if then:
            did(then)

    threading.Thread(target=strike, daemon=True).start()


def calls_of(thread: int) -> set[str]:
    names, frame = set(), sys._current_frames().get(thread)
    while frame:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return names


def wait_for(file: str) -> None:
    while not Path(file).exists():
        time.sleep(0.02)


def did(what: str) -> None:
    with Path(os.environ["POMBAL_TEST_EFFECTS"]).open("a") as file:
        file.write(f"{what}\n")


def effects() -> list[str]:
    return Path(os.environ["POMBAL_TEST_EFFECTS"]).read_text().splitlines()
