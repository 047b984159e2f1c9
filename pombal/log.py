"""How a line is written: one event per line, key-value fields, JSON in production.

Events are constant names in the past tense; fields are ids and counts, never a message text, a phone number, a
provider's message id or a secret (security-reliability.md L1). Exceptions are written without their message unless it
is one of ours: a database error quotes the row it choked on.
"""

import contextlib
import logging
import sys
import threading
import traceback
import warnings
from types import TracebackType
from typing import Any

import msgspec
import structlog
from structlog.typing import EventDict, WrappedLogger

from pombal.errors import PombalError
from pombal.settings import settings

_LONGEST_LINE = 8 * 1024  # bytes, security-reliability.md L2
_LONGEST_FIELD = 2_000  # characters
_LONGEST_EVENT = 1_000  # … of one that is still too long: escaped, a control character takes six bytes

# What library loggers say at INFO is theirs, not an operator's.
_QUIET = ("httpx", "httpcore", "uvicorn.access", "alembic", "periodiq", "dramatiq")


def redacted(error: BaseException) -> str:
    """A traceback for people: frames and types of the whole chain; messages only of pombal's own errors."""
    parts = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        frames = traceback.extract_tb(current.__traceback__)[-12:]
        lines = [f"  {_short(frame.filename)}:{frame.lineno} in {frame.name}" for frame in frames]
        parts.append("\n".join([*lines, described(current)]))
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\ncaused by\n".join(parts)


def described(error: BaseException) -> str:
    """The error in one line: its type, its SQLSTATE if it has one, and its message if that is ours."""
    name = type(error).__name__
    state = getattr(getattr(error, "orig", error), "sqlstate", None)
    if isinstance(error, PombalError):
        return f"{name}: {error}"
    return f"{name} (SQLSTATE {state})" if state else name


def setup() -> None:
    """Send structlog and the standard library's loggers down one pipe to standard error, as the settings say."""
    wanted = settings()
    level = getattr(logging, wanted.log_level)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _redact_exception,
    ]
    if wanted.log_format == "json":
        render: Any = _as_json
    else:
        render = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=_no_exception)
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_StandardError,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared[:3], _clip_foreign],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _redact_exception, render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    _close_the_side_doors()


def get(**fields: Any) -> Any:
    """A logger; `fields` are on each of its lines."""
    return structlog.get_logger(**fields)


def _close_the_side_doors() -> None:
    """Python itself writes crashes, warnings and bad log calls to standard error, with every value in them."""
    logging.raiseExceptions = False
    if sys.excepthook is sys.__excepthook__:  # and not a debugger's or a test runner's
        sys.excepthook = _crashed
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _thread_crashed
    if not sys.warnoptions:  # whoever asked for warnings gets them as they are
        warnings.showwarning = _warned


def _crashed(kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    get().error("process_crashed", exc_info=error)


def _thread_crashed(given: threading.ExceptHookArgs) -> None:
    if given.exc_value is not None and not isinstance(given.exc_value, SystemExit):
        get().error("thread_crashed", thread=given.thread.name if given.thread else None, exc_info=given.exc_value)


def _warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    get().warning("python_warned", category=category.__name__, at=f"{_short(filename)}:{lineno}")


def _redact_exception(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    given = event.pop("exc_info", None)
    if given is True:
        given = sys.exc_info()[1]
    elif isinstance(given, tuple):
        given = given[1]
    if isinstance(given, BaseException):
        event["exception"] = redacted(given)
    for name, value in event.items():
        if isinstance(value, BaseException):
            event[name] = described(value)
    return event


def _clip_foreign(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    text = str(event["event"])[:_LONGEST_FIELD]
    # Beside an exception asyncio lists its context, in which the exception's message stands again.
    event["event"] = text.partition("\n")[0] if event.get("exc_info") else text
    return event


def _as_json(_: WrappedLogger, __: str, event: EventDict) -> str:
    line = _encoded(event)
    if len(line) > _LONGEST_LINE:
        line = _encoded({k: v[:_LONGEST_FIELD] if isinstance(v, str) else v for k, v in event.items()})
    if len(line) > _LONGEST_LINE:
        kept = {k: event[k] for k in ("level", "timestamp") if k in event}
        line = _encoded({"event": str(event.get("event"))[:_LONGEST_EVENT], **kept})
    return line.decode()


def _encoded(event: EventDict) -> bytes:
    try:
        return msgspec.json.encode(event, enc_hook=_shown)
    except Exception:  # a lone surrogate, a circle, a failing `__str__`: a line must not fail what it tells about
        return msgspec.json.encode({_plain(name): _plain(value) for name, value in event.items()})


def _shown(value: Any) -> str:
    return described(value) if isinstance(value, BaseException) else str(value)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    return value.encode(errors="replace").decode() if isinstance(value, str) else f"<{type(value).__name__}>"


def _no_exception(*_: Any) -> None:
    """The redacted text is a field already."""


def _short(filename: str) -> str:
    return "/".join(filename.replace("\\", "/").split("/")[-2:])


class _StandardError:
    """Writes to whatever `sys.stderr` is now: Dramatiq swaps it for a pipe when a worker process boots."""

    def __init__(self, *_: Any) -> None: ...

    def msg(self, message: str) -> None:
        try:
            sys.stderr.write(message + "\n")
        except OSError:
            # The pipe's reader (Dramatiq's master) is gone. A line with nowhere to go must not fail the job.
            if sys.__stderr__ is not None:
                with contextlib.suppress(OSError):
                    sys.__stderr__.write(message + "\n")

    debug = info = warning = error = critical = exception = log = msg
