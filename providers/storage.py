"""Where the bytes of media are kept: a folder, or a bucket that speaks S3 (security-reliability.md M7, M10, M11, T8).

MEDIA_URL says where: `file:///absolute/folder`, or `s3://bucket/prefix` with the extra `s3` installed. The bucket's
address, region and keys come from the AWS_* variables that every S3 tool reads.

A file is written to a spool first and gets its final name only when it is whole and on the disk: whatever kills the
process leaves all of it under that name, or nothing. Its name is made of the tenant, the hash of its content and an
ending by its sniffed type; nothing that a sender wrote is part of it, and nothing of another shape is ever opened.
"""

import errno
import os
import re
import stat
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit
from uuid import UUID, uuid4

from pombal.errors import Misconfigured, Temporary
from pombal.settings import settings

if TYPE_CHECKING:
    from obstore.store import S3Store

CHUNK = 256 * 1024  # bytes handed out at once
_LEAST_FREE = 256 * 1024 * 1024  # the database may live on the same disk
_LOOK_EVERY = 8 * 1024 * 1024  # bytes written before the free space is looked at again
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_MOST_REMEMBERED = 65_536  # folders, of at most some 100 bytes each

_KEY = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/([0-9a-f]{2})/(\2[0-9a-f]{62}\.[a-z0-9]{1,5})")
_SPOOL = re.compile(r"[0-9a-f]{32}\.part")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"(?!\.{1,2}(/|$))[A-Za-z0-9_.-]+(/(?!\.{1,2}(/|$))[A-Za-z0-9_.-]+)*")

# Against a bucket. A call that moves little must end soon, so that an endpoint which is gone is noticed; a part of an
# upload may take its time, and only follows after such a call was answered.
_CONNECT = timedelta(seconds=4)
_QUICK = timedelta(seconds=10)
_SLOW = timedelta(seconds=60)
_KEEP_TRYING = timedelta(seconds=5)
_RANGE = 1024 * 1024  # read at once, so that a slow reader holds no connection open
_PART = 5 * 1024 * 1024  # the least that S3 takes
_PARTS_AT_ONCE = 2


class StorageUnavailable(Temporary):
    """The storage cannot be used now: full, away, not writable. `why` names the trouble, never a path, key or host."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the media storage cannot be used: {why}")
        self.why = why


class Missing(Exception):
    """Nothing is kept under this key."""


class Storage(Protocol):
    """Keeps files by key. Safe to use from several threads and processes at once."""

    where: str  # "file" or "s3", for metrics

    def spool(self) -> "Spool":
        """A place to write a new file to; to be used in a `with` block. Raises `StorageUnavailable`."""

    def keep(self, spool: "Spool", key: str) -> None:
        """Make what was written durable under its key. Safe to repeat. Raises `StorageUnavailable`."""

    def read(self, key: str, start: int = 0, end: int | None = None) -> Generator[bytes, None, None]:
        """The bytes from `start` up to `end`, or to the file's end, in pieces of at most `CHUNK`.

        The file is found and opened before this returns. Raises `Missing` and `StorageUnavailable`; so may each piece.
        """

    def size(self, key: str) -> int | None:
        """Bytes kept under this key; None when there is nothing. Raises `StorageUnavailable`."""

    def delete(self, key: str) -> None:
        """Forget a file; nothing happens when there is none. Raises `StorageUnavailable`."""

    def sweep(self, older_than: timedelta) -> int:
        """Remove spools that nobody has written to for so long; how many. Raises `StorageUnavailable`."""


@cache
def storage() -> Storage:
    """The storage of this process. Raises `Misconfigured`, and `StorageUnavailable` when its folder cannot be made.

    Not to be called before a fork: the threads of a bucket's client would stay behind.
    """
    return connect(settings().require_media())


def connect(url: str, *, least_free: int = _LEAST_FREE) -> Storage:
    """The storage at an address like MEDIA_URL's. No new spool is given out below `least_free` bytes of disk space.

    Raises `Misconfigured` and `StorageUnavailable`.
    """
    try:
        parts = urlsplit(url)
        place, path = parts.netloc, unquote(parts.path)
    except ValueError:
        parts = None
    if parts is None or parts.query or parts.fragment or "\0" in path:
        raise Misconfigured("MEDIA_URL must be file:///absolute/folder or s3://bucket/prefix")
    if parts.scheme == "file" and not place and path.startswith("/") and path.strip("/"):
        return Folder(Path(path), least_free=least_free)
    prefix = path.strip("/")
    if parts.scheme == "s3" and _BUCKET.fullmatch(place) and (not prefix or _PREFIX.fullmatch(prefix)):
        return Bucket(place, prefix, least_free=least_free)
    raise Misconfigured("MEDIA_URL must be file:///absolute/folder or s3://bucket/prefix")


def key_of(tenant_id: UUID, digest: bytes, extension: str) -> str:
    """The one key of a content: `{tenant}/{first two hex digits}/{SHA-256 in hex}{extension}`. Raises `ValueError`."""
    name = f"{digest.hex()}{extension}"
    return "/".join(_parts(f"{tenant_id}/{name[:2]}/{name}"))


class Spool:
    """A file on its way in, for one thread at a time. It is gone at the end of the `with` block unless it was kept."""

    def __init__(self, folder: int, path: Path, least_free: int) -> None:
        """Takes over the descriptor of the folder."""
        self.path = path
        self.size = 0
        self._folder = folder
        self._least_free = least_free
        self._looked_at = 0
        how = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file: int | None = os.open(path.name, how, 0o600, dir_fd=folder)

    def write(self, chunk: bytes) -> None:
        """Add bytes. Raises `StorageUnavailable`."""
        if self._file is None:
            raise ValueError("this spool is closed")
        rest = memoryview(chunk)
        try:
            while rest:
                done = os.write(self._file, rest)
                self.size += done
                rest = rest[done:]
            if self.size - self._looked_at >= _LOOK_EVERY:
                self._looked_at = self.size
                _require_space(self._file, self._least_free)
        except OSError as error:
            raise StorageUnavailable(_named(error)) from None

    def close(self) -> None:
        """The end of it: closed, and removed where it is still under its own name."""
        if self._file is None:
            return
        os.close(self._file)
        self._file = None
        # Where even this fails, `sweep` removes it later.
        with suppress(OSError):
            os.unlink(self.path.name, dir_fd=self._folder)
        os.close(self._folder)

    def _move(self, folder: int, name: str) -> None:
        if self._file is None:
            raise ValueError("this spool is closed")
        os.fsync(self._file)
        os.replace(self.path.name, name, src_dir_fd=self._folder, dst_dir_fd=folder)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Spools:
    """The folder that new files are written to first."""

    def __init__(self, root: Path, name: str, *, least_free: int, is_shared: bool = False) -> None:
        """`is_shared`: others may write to `root` too, so the folder in it must be seen to be ours."""
        self._root, self._name = root, name
        self._least_free, self._is_shared = least_free, is_shared

    def new(self) -> Spool:
        with _faults(), self._opened(make=True) as folder:
            _require_space(folder, self._least_free)
            path = self._root / self._name / f"{uuid4().hex}.part"
            mine = os.dup(folder)
            try:
                return Spool(mine, path, self._least_free)
            except OSError:
                os.close(mine)
                raise

    def sweep(self, older_than: timedelta) -> int:
        count, before = 0, time.time() - older_than.total_seconds()
        with _faults(), suppress(FileNotFoundError), self._opened() as folder:
            for name in os.listdir(folder):
                if _SPOOL.fullmatch(name):
                    with suppress(FileNotFoundError):  # its owner has just finished
                        if os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime < before:
                            os.unlink(name, dir_fd=folder)
                            count += 1
        return count

    @contextmanager
    def _opened(self, *, make: bool = False) -> Iterator[int]:
        with _opened(self._root) as root, _below(root, self._name, make=make) as folder:
            found = os.fstat(folder)
            if self._is_shared and (found.st_uid != os.geteuid() or found.st_mode & 0o077):
                raise StorageUnavailable("the folder for temporary files belongs to somebody else")
            yield folder


class Folder:
    """Files in a folder: `{root}/{tenant}/{two digits}/{hash}{ending}`. No symlink below the root is followed (M11)."""

    where = "file"

    def __init__(self, root: Path, *, least_free: int = _LEAST_FREE) -> None:
        self._root = root
        self._spools = _Spools(root, ".incoming", least_free=least_free)
        self._durable: set[tuple[str, ...]] = set()  # folders that are known to outlive a power cut
        with _faults():
            new = [one for one in (root, *root.parents) if not one.exists()]
            root.parent.mkdir(parents=True, exist_ok=True)
            root.mkdir(mode=0o700, exist_ok=True)
            for one in new:
                with _opened(one.parent) as above:
                    os.fsync(above)

    def spool(self) -> Spool:
        return self._spools.new()

    def keep(self, spool: Spool, key: str) -> None:
        tenant, digits, name = _parts(key)
        with _faults(), _opened(self._root) as root, ExitStack() as stack:
            folder = root
            for path in (tenant,), (tenant, digits):
                above, folder = folder, stack.enter_context(_below(folder, path[-1], make=True))
                self._make_durable(above, path, folder)
            if _size_in(folder, name) != spool.size:
                spool._move(folder, name)
            # Also where the file was there: whoever wrote it may not have come so far.
            os.fsync(folder)
        spool.close()

    def _make_durable(self, above: int, path: tuple[str, ...], folder: int) -> None:
        # Somebody else may have made it a moment ago and not have flushed it yet. The folder's own number is part of
        # what is remembered: it may have been removed and made again.
        found = (*path, str(os.fstat(folder).st_ino))
        if found not in self._durable:
            os.fsync(above)
            if len(self._durable) >= _MOST_REMEMBERED:
                self._durable.clear()
            self._durable.add(found)

    def read(self, key: str, start: int = 0, end: int | None = None) -> Generator[bytes, None, None]:
        _check_range(start, end)
        return _begun(self._chunks(key, start, end))

    def _chunks(self, key: str, start: int, end: int | None) -> Generator[bytes, None, None]:
        with _faults(), self._found(key) as file:
            size = os.fstat(file).st_size
            end = size if end is None else min(end, size)
            yield b""
            while start < end:
                chunk = os.pread(file, min(CHUNK, end - start), start)
                if not chunk:
                    raise StorageUnavailable("a file became shorter")
                start += len(chunk)
                yield chunk

    def size(self, key: str) -> int | None:
        try:
            with _faults(), self._found(key) as file:
                return os.fstat(file).st_size
        except Missing:
            return None

    @contextmanager
    def _found(self, key: str) -> Iterator[int]:
        *folders, name = _parts(key)
        with _opened(self._root) as folder, ExitStack() as stack:
            try:
                for one in folders:
                    folder = stack.enter_context(_below(folder, one))
                # O_NONBLOCK: opening a named pipe would wait for a writer.
                how = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                file = os.open(name, how, dir_fd=folder)
            except FileNotFoundError:
                raise Missing from None
            stack.callback(os.close, file)
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise StorageUnavailable("something that is no file is in a file's place")
            yield file

    def delete(self, key: str) -> None:
        *folders, name = _parts(key)
        with _faults(), _opened(self._root) as folder, ExitStack() as stack, suppress(FileNotFoundError):
            for one in folders:
                folder = stack.enter_context(_below(folder, one))
            os.unlink(name, dir_fd=folder)
            os.fsync(folder)

    def sweep(self, older_than: timedelta) -> int:
        return self._spools.sweep(older_than)


class Bucket:
    """Files in a bucket: `{prefix}/{tenant}/{two digits}/{hash}{ending}`. Spools wait in the system's temporary folder.

    An object appears whole or not at all, and S3 checks each body against the hash it is signed with. What an upload
    that broke off leaves behind is invisible; a lifecycle rule of the bucket (AbortIncompleteMultipartUpload) frees it.
    """

    where = "s3"

    def __init__(self, bucket: str, prefix: str = "", *, least_free: int = _LEAST_FREE) -> None:
        """Connects to nothing yet. Raises `Misconfigured`."""
        name = f"pombal-{os.geteuid()}"
        self._spools = _Spools(Path(tempfile.gettempdir()), name, least_free=least_free, is_shared=True)
        self._prefix = f"{prefix}/" if prefix else ""
        self._quick = _client(bucket, _QUICK)
        self._slow = _client(bucket, _SLOW)

    def spool(self) -> Spool:
        return self._spools.new()

    def keep(self, spool: Spool, key: str) -> None:
        import obstore

        name = self._name(key)
        if self._size_if_told(name) != spool.size:
            with _faults_of_bucket():
                obstore.put(self._slow, name, spool.path, chunk_size=_PART, max_concurrency=_PARTS_AT_ONCE)
            if self._size(name) != spool.size:
                raise StorageUnavailable("a stored file has another size")
        spool.close()

    def read(self, key: str, start: int = 0, end: int | None = None) -> Generator[bytes, None, None]:
        _check_range(start, end)
        return _begun(self._chunks(self._name(key), start, end))

    def _chunks(self, name: str, start: int, end: int | None) -> Generator[bytes, None, None]:
        import obstore

        size = self._size(name)
        if size is None:
            raise Missing
        end = size if end is None else min(end, size)
        yield b""
        while start < end:
            until = min(start + _RANGE, end)
            with _faults_of_bucket(may_miss=True):
                block = memoryview(obstore.get_range(self._quick, name, start=start, end=until))
            if len(block) != until - start:
                raise StorageUnavailable("a file became shorter")
            for at in range(0, len(block), CHUNK):
                yield bytes(block[at : at + CHUNK])
            start = until

    def size(self, key: str) -> int | None:
        return self._size(self._name(key))

    def delete(self, key: str) -> None:
        import obstore

        with suppress(Missing), _faults_of_bucket(may_miss=True):
            obstore.delete(self._quick, self._name(key))

    def sweep(self, older_than: timedelta) -> int:
        return self._spools.sweep(older_than)

    def _name(self, key: str) -> str:
        return self._prefix + "/".join(_parts(key))

    def _size(self, name: str) -> int | None:
        import obstore

        try:
            with _faults_of_bucket(may_miss=True):
                return obstore.head(self._quick, name)["size"]
        except Missing:
            pass
        # An answer to HEAD has no body to tell a bucket that is not there from a file that is not there; GET's has.
        try:
            with _faults_of_bucket(may_miss=True):
                return obstore.get(self._quick, name, options={"range": (0, 1)}).meta["size"]
        except Missing:
            return None

    def _size_if_told(self, name: str) -> int | None:
        """None also where nobody says whether it is there: AWS answers 403 to a key that may not list."""
        try:
            return self._size(name)
        except StorageUnavailable as error:
            if error.why.startswith("PermissionDenied"):
                return None
            raise


def _client(bucket: str, timeout: timedelta) -> "S3Store":
    try:
        from obstore.exceptions import BaseError
        from obstore.store import S3Store
    except ImportError:
        raise Misconfigured("MEDIA_URL is s3://…: install pombal[s3]") from None
    try:
        return S3Store(
            bucket,
            # One file at a time: not every S3 knows the other way of deleting.
            disable_bulk_delete=True,
            client_options={
                "allow_http": _may_be_plain(),
                "allow_invalid_certificates": False,
                "connect_timeout": _CONNECT,
                "timeout": timeout,
                "user_agent": "pombal",
            },
            retry_config={"max_retries": 3, "retry_timeout": _KEEP_TRYING},
        )
    except (BaseError, ValueError) as error:
        raise Misconfigured(f"one of the AWS_ variables cannot be used ({type(error).__name__})") from None


def _may_be_plain() -> bool:
    """Whether the endpoint is spoken to without TLS: on this machine, or where AWS_ALLOW_HTTP asks for it."""
    # Read here and not in the settings: these variables are those of every S3 tool, and obstore reads them itself.
    is_asked = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")
    is_plain = False
    for name in "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT":
        try:
            parts = urlsplit(os.environ.get(name) or "https://")
            host = parts.hostname or ""
        except ValueError:
            raise Misconfigured(f"{name} is not an http(s) address") from None
        if parts.scheme == "http" and (is_asked or _is_here(host)):
            is_plain = True
        elif parts.scheme != "https":
            raise Misconfigured(f"{name} must be an https address (http: AWS_ALLOW_HTTP=true, or on this machine)")
    return is_plain


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _faults() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageUnavailable(_named(error)) from None


@contextmanager
def _faults_of_bucket(*, may_miss: bool = False) -> Iterator[None]:
    """Turn obstore's errors into ours: their text holds addresses and keys. `may_miss`: no such file is `Missing`."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError) as error:
        code = re.search(r"<Code>([A-Za-z]{1,40})</Code>", str(error))
        said = code[1] if code else ""
        if may_miss and isinstance(error, FileNotFoundError) and said != "NoSuchBucket":
            raise Missing from None
        kind = type(error).__name__.removesuffix("Error")
        raise StorageUnavailable(f"{kind} {said}".rstrip()) from None


def _named(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, type(error).__name__)


def _require_space(file: int, least: int) -> None:
    found = os.fstatvfs(file)
    if found.f_bavail * found.f_frsize < least:
        raise StorageUnavailable(f"less than {least // 1024 // 1024} MiB of the disk are free")


def _parts(key: str) -> tuple[str, str, str]:
    found = _KEY.fullmatch(key)
    if found is None:
        raise ValueError("not a key of the media storage")
    return found[1], found[2], found[3]


def _check_range(start: int, end: int | None) -> None:
    if start < 0 or (end is not None and end < start):
        raise ValueError("a range must not end before it begins")


def _begun(chunks: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
    """Run it up to its first, empty piece: the file is open then, and closed with the generator in any case."""
    next(chunks)
    return chunks


@contextmanager
def _opened(root: Path) -> Iterator[int]:
    """The descriptor of the root. A root that is not there is trouble (not mounted?), never a missing file."""
    try:
        folder = os.open(root, _FOLDER)
    except OSError as error:
        raise StorageUnavailable(_named(error)) from None
    try:
        yield folder
    finally:
        os.close(folder)


@contextmanager
def _below(above: int, name: str, *, make: bool = False) -> Iterator[int]:
    """The descriptor of a folder in a folder, opened without following a link."""
    try:
        folder = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=above)
    except FileNotFoundError:
        if not make:
            raise
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=above)
        folder = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=above)
    try:
        yield folder
    finally:
        os.close(folder)


def _size_in(folder: int, name: str) -> int | None:
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
