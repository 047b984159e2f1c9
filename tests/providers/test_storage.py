"""What is kept comes back whole, from a folder; `test_s3.py` asks the same of a bucket."""

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pombal.cli.fleet import ROOT
from pombal.errors import Misconfigured, Temporary
from providers.storage import CHUNK, Missing, Spool, Storage, StorageUnavailable, connect, key_of
from tests.pombal.processes import output, running

TENANT = UUID("0198c0de-0000-7000-8000-000000000001")
CONTENT = bytes(range(256)) * 4000  # four chunks, the last of them short
EVER = timedelta(days=-1)  # older than a moment in the future: all


def key_for(content: bytes, tenant: UUID = TENANT) -> str:
    return key_of(tenant, hashlib.sha256(content).digest(), ".bin")


def written(storage: Storage, content: bytes) -> Spool:
    """A spool with this content; a test leaves its `with` block as it likes."""
    with ExitStack() as stack:
        spool = stack.enter_context(storage.spool())
        for start in range(0, len(content), 100_000):
            spool.write(content[start : start + 100_000])
        stack.pop_all()
    return spool


def keep(storage: Storage, content: bytes, tenant: UUID = TENANT) -> str:
    key = key_for(content, tenant)
    with written(storage, content) as spool:
        storage.keep(spool, key)
    return key


def read(storage: Storage, key: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join(storage.read(key, start, end))


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


class Contract:
    """What every storage does. A class below it brings a fixture `storage`, and one `spools`: where it writes first."""

    def test_what_was_kept_can_be_read_back(self, storage: Storage) -> None:
        key = keep(storage, CONTENT)

        assert storage.size(key) == len(CONTENT)
        pieces = list(storage.read(key))
        assert b"".join(pieces) == CONTENT
        assert max(map(len, pieces)) <= CHUNK

    @pytest.mark.parametrize(
        ("start", "end"),
        [
            *((0, 1), (1, 2), (CHUNK - 1, CHUNK + 1), (CHUNK, None), (1_023_999, None), (1_024_000, None), (5, 5)),
            *((3, 10**12), (10**12, None), (10**12, 10**12 + 1), (0, 0)),
        ],
    )
    def test_a_part_can_be_read_alone(self, storage: Storage, start: int, end: int | None) -> None:
        key = keep(storage, CONTENT)

        assert read(storage, key, start, end) == CONTENT[start:end]

    @pytest.mark.parametrize(("start", "end"), [(-1, None), (2, 1), (0, -1)])
    def test_a_part_that_cannot_be_is_refused(self, storage: Storage, start: int, end: int | None) -> None:
        with pytest.raises(ValueError, match="range"):
            storage.read(key_for(CONTENT), start, end)

    def test_an_empty_file_is_a_file(self, storage: Storage) -> None:
        key = keep(storage, b"")

        assert storage.size(key) == 0
        assert read(storage, key) == b""

    def test_what_is_not_there_is_missing_and_no_trouble(self, storage: Storage) -> None:
        keep(storage, b"another")  # so that its folders are there
        for key in key_for(CONTENT), key_for(CONTENT, uuid4()):
            assert storage.size(key) is None
            with pytest.raises(Missing):
                storage.read(key)
            storage.delete(key)

    def test_what_was_deleted_is_gone_and_may_come_back(self, storage: Storage) -> None:
        key = keep(storage, CONTENT)
        storage.delete(key)
        assert storage.size(key) is None

        assert keep(storage, CONTENT) == key
        assert read(storage, key) == CONTENT

    def test_tenants_do_not_share_a_file(self, storage: Storage) -> None:
        mine, theirs = keep(storage, CONTENT), keep(storage, CONTENT, uuid4())
        storage.delete(theirs)

        assert read(storage, mine) == CONTENT

    def test_what_was_not_kept_leaves_nothing(self, storage: Storage, spools: Path) -> None:
        with written(storage, CONTENT) as spool:
            assert [path.name for path in spools.iterdir()] == [spool.path.name]

        assert not list(spools.iterdir())
        assert storage.size(key_for(CONTENT)) is None
        with pytest.raises(ValueError, match="closed"):
            spool.write(b"more")

    def test_nobody_else_may_read_a_spool(self, storage: Storage, spools: Path) -> None:
        with written(storage, CONTENT) as spool:
            assert stat.S_IMODE(spool.path.stat().st_mode) == 0o600
            assert stat.S_IMODE(spools.stat().st_mode) == 0o700

    def test_writers_of_one_content_at_once_all_succeed(self, storage: Storage, spools: Path) -> None:
        together = threading.Barrier(8)

        def write(_: int) -> str:
            with written(storage, CONTENT) as spool:
                together.wait()
                storage.keep(spool, key_for(CONTENT))
            return key_for(CONTENT)

        with ThreadPoolExecutor(8) as threads:
            assert set(threads.map(write, range(8))) == {key_for(CONTENT)}

        assert read(storage, key_for(CONTENT)) == CONTENT
        assert not list(spools.iterdir())

    def test_abandoned_spools_are_swept_and_others_are_not(self, storage: Storage, spools: Path) -> None:
        assert storage.sweep(EVER) == 0  # before there is a folder for them
        with written(storage, b"young") as young, written(storage, b"old") as old:
            os.utime(old.path, (0, 0))
            (spools / "notes.txt").write_text("of somebody")
            os.utime(spools / "notes.txt", (0, 0))

            assert storage.sweep(timedelta(hours=1)) == 1

            assert {path.name for path in spools.iterdir()} == {young.path.name, "notes.txt"}
            # Its writer may be alive after all: it fails, and tries again.
            if storage.where == "file":
                with pytest.raises(StorageUnavailable, match="ENOENT"):
                    storage.keep(old, key_for(b"old"))

    def test_no_descriptor_is_left_behind(self, storage: Storage) -> None:
        def use_it() -> None:
            key = keep(storage, CONTENT)
            list(storage.read(key))
            keep(storage, CONTENT[:-1])
            storage.read(key)
            next(storage.read(key))
            half = storage.read(key)
            next(half)
            half.close()
            for absent in key_for(b"?"), key_for(b"?", uuid4()):
                with pytest.raises(Missing):
                    storage.read(absent)
                assert storage.size(absent) is None
                storage.delete(absent)
            storage.sweep(EVER)

        use_it()
        before = descriptors()
        for _ in range(10):
            use_it()

        assert descriptors() < before + 5  # a pool may have grown by a connection or two

    @pytest.mark.parametrize("key", ["", "a", "../../etc/passwd", "/etc/passwd", ".incoming/x", key_for(b"") + "\n"])
    def test_only_keys_are_opened(self, storage: Storage, key: str) -> None:
        with written(storage, CONTENT) as spool:
            for use in storage.read, storage.size, storage.delete, lambda key: storage.keep(spool, key):
                with pytest.raises(ValueError, match="not a key"):
                    use(key)

    def test_a_hundred_megabytes_need_little_memory(self, storage: Storage, tmp_path: Path) -> None:
        """In a process of its own; more than the transfer's own buffers would be the file itself."""
        asked = output("-c", LARGE, storage_url(storage), env={"TMPDIR": str(tmp_path)})

        assert int(asked) < 40 * 1024, asked


LARGE = r"""
import hashlib, re, resource, sys, uuid
from pathlib import Path
from providers.storage import connect, key_of

def most():
    status = Path("/proc/self/status")
    if status.exists():  # on Linux a process begins with its parent's `ru_maxrss`
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

def through(pieces):
    content, whole = b"0123456789abcdef" * 65536, hashlib.sha256()
    key = key_of(uuid.uuid4(), hashlib.sha256(str(pieces).encode()).digest(), ".bin")
    with storage.spool() as spool:
        for _ in range(pieces):
            spool.write(content)
            whole.update(content)
        storage.keep(spool, key)
    back = hashlib.sha256()
    for chunk in storage.read(key):
        back.update(chunk)
    assert back.digest() == whole.digest()

storage = connect(sys.argv[1], least_free=0)
through(1)
before = most()
through(100)
print(most() - before)
"""


def storage_url(storage: Storage) -> str:
    root = getattr(storage, "_root", None)
    return f"file://{root}" if root else "s3://media/large"


class TestFolder(Contract):
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return tmp_path / "kept" / "media"

    @pytest.fixture
    def storage(self, root: Path) -> Storage:
        return connect(f"file://{root}", least_free=0)

    @pytest.fixture
    def spools(self, root: Path) -> Path:
        return root / ".incoming"

    def test_files_lie_under_their_tenant_for_us_alone(self, storage: Storage, root: Path) -> None:
        key = keep(storage, CONTENT)

        assert key.startswith(f"{TENANT}/{key[37:39]}/{key[37:39]}")
        assert (root / key).read_bytes() == CONTENT
        assert stat.S_IMODE((root / key).stat().st_mode) == 0o600
        for folder in root, root / str(TENANT), (root / key).parent:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    def test_what_is_there_is_not_written_again(self, storage: Storage, root: Path) -> None:
        key = keep(storage, CONTENT)
        before = (root / key).stat()

        keep(storage, CONTENT)

        assert ((root / key).stat().st_ino, (root / key).stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def test_what_is_there_in_part_is_replaced(self, storage: Storage, root: Path) -> None:
        key = keep(storage, CONTENT)
        os.truncate(root / key, 1000)

        keep(storage, CONTENT)

        assert read(storage, key) == CONTENT

    def test_a_file_that_shrinks_while_it_is_read_is_trouble(self, storage: Storage, root: Path) -> None:
        key = keep(storage, CONTENT)
        chunks = storage.read(key)
        next(chunks)
        os.truncate(root / key, CHUNK)

        with pytest.raises(StorageUnavailable):
            next(chunks)

    def test_a_folder_that_is_not_there_is_trouble_and_not_a_missing_file(self, storage: Storage, root: Path) -> None:
        """A disk that is not mounted must not look like files that are lost."""
        key = keep(storage, CONTENT)
        spool = written(storage, CONTENT)
        root.rename(root.with_name("away"))

        for use in storage.read, storage.size, storage.delete, lambda key: storage.keep(spool, key):
            with pytest.raises(StorageUnavailable) as caught:
                use(key)
            assert str(caught.value) == "the media storage cannot be used: ENOENT"
        for again in storage.spool, lambda: storage.sweep(EVER):
            with pytest.raises(StorageUnavailable, match="ENOENT"):
                again()
        spool.close()
        root.with_name("away").rename(root)
        assert read(storage, key) == CONTENT

    def test_folders_that_somebody_removed_are_made_again(self, storage: Storage, root: Path) -> None:
        key = keep(storage, CONTENT)
        (root / key).unlink()
        (root / key).parent.rmdir()
        (root / str(TENANT)).rmdir()
        (root / ".incoming").rmdir()

        keep(storage, CONTENT)

        assert read(storage, key) == CONTENT

    @pytest.mark.parametrize("levels", [1, 2])
    def test_a_link_in_place_of_a_folder_leads_nowhere(
        self, storage: Storage, root: Path, tmp_path: Path, levels: int
    ) -> None:
        key = keep(storage, CONTENT)
        linked = root / "/".join(key.split("/")[:levels])
        outside = tmp_path / "outside"
        linked.rename(outside)
        linked.symlink_to(outside)
        before = {path: path.stat().st_mtime_ns for path in outside.rglob("*")}

        for use in storage.read, storage.size, storage.delete:
            with pytest.raises(StorageUnavailable, match=r"ENOTDIR|ELOOP"):
                use(key)
        with pytest.raises(StorageUnavailable, match=r"ENOTDIR|ELOOP"):
            keep(storage, CONTENT)

        assert {path: path.stat().st_mtime_ns for path in outside.rglob("*")} == before

    def test_a_link_in_place_of_a_file_leads_nowhere(self, storage: Storage, root: Path, tmp_path: Path) -> None:
        key = keep(storage, CONTENT)
        secret = tmp_path / "secret"
        secret.write_bytes(b"of the host")
        (root / key).unlink()
        (root / key).symlink_to(secret)

        for use in storage.read, storage.size:
            with pytest.raises(StorageUnavailable, match="ELOOP"):
                use(key)
        keep(storage, CONTENT)  # takes the link's place

        assert read(storage, key) == CONTENT
        assert not (root / key).is_symlink()
        assert secret.read_bytes() == b"of the host"

    def test_a_link_in_place_of_the_spools_is_refused(self, storage: Storage, root: Path, tmp_path: Path) -> None:
        (root / ".incoming").symlink_to(tmp_path)

        with pytest.raises(StorageUnavailable, match=r"ENOTDIR|ELOOP"):
            storage.spool()
        with pytest.raises(StorageUnavailable, match=r"ENOTDIR|ELOOP"):
            storage.sweep(EVER)

    def test_the_root_itself_may_be_a_link(self, tmp_path: Path) -> None:
        """Where it leads is the operator's choice."""
        (tmp_path / "disk").mkdir()
        (tmp_path / "media").symlink_to(tmp_path / "disk")
        storage = connect(f"file://{tmp_path / 'media'}", least_free=0)

        assert read(storage, keep(storage, CONTENT)) == CONTENT

    def test_something_else_in_a_files_place_is_neither_waited_for_nor_removed(
        self, storage: Storage, root: Path
    ) -> None:
        pipe, folder = keep(storage, b"pipe"), keep(storage, b"folder")
        for key in pipe, folder:
            (root / key).unlink()
        os.mkfifo(root / pipe)
        (root / folder).mkdir()

        for key in pipe, folder:
            for use in storage.read, storage.size:
                with pytest.raises(StorageUnavailable):
                    use(key)
        with pytest.raises(StorageUnavailable, match="EISDIR"):
            keep(storage, b"folder")

    def test_a_spool_can_be_kept_once(self, storage: Storage) -> None:
        spool = written(storage, CONTENT)
        storage.keep(spool, key_for(CONTENT))

        with pytest.raises(ValueError, match="closed"):
            storage.keep(spool, key_for(b"another"))

    def test_little_space_is_left_to_others(self, root: Path) -> None:
        storage = connect(f"file://{root}", least_free=2**60)

        with pytest.raises(StorageUnavailable, match="free"):
            storage.spool()


# ------------------------------------------------------------------------------------------------- disks that are full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system of some MiB, or mounts it again with other options."""
    place = tmp_path / "disk"

    def mount(options: str) -> Path:
        place.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("file systems cannot be mounted here")
        return place

    yield mount
    while place.is_mount():
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_loses_nothing_and_takes_more_once_there_is_space(small_disk: Callable[..., Path]) -> None:
    disk = small_disk("size=2m")
    storage = connect(f"file://{disk}/media", least_free=0)
    first, second = keep(storage, CONTENT), CONTENT + bytes(100_000)

    with pytest.raises(StorageUnavailable) as caught:
        keep(storage, second)

    assert caught.value.why == "ENOSPC"
    assert str(disk) not in str(caught.value)
    assert caught.value.__cause__ is None
    assert isinstance(caught.value, Temporary)
    assert storage.size(key_for(second)) is None
    assert not list((disk / "media" / ".incoming").iterdir())
    assert read(storage, first) == CONTENT
    storage.delete(first)
    assert read(storage, keep(storage, second)) == second


def test_a_file_may_not_use_up_the_space_of_others(small_disk: Callable[..., Path]) -> None:
    disk = small_disk("size=64m")
    storage = connect(f"file://{disk}/media", least_free=32 * 1024 * 1024)

    with storage.spool() as spool:

        def fill() -> None:
            while spool.size < 60 * 1024 * 1024:
                spool.write(CONTENT)

        with pytest.raises(StorageUnavailable, match="free"):
            fill()

    assert spool.size < 48 * 1024 * 1024
    keep(storage, CONTENT)  # it gave the space back


def test_a_disk_that_may_not_be_written_is_trouble_but_can_be_read(small_disk: Callable[..., Path]) -> None:
    disk = small_disk("size=8m")
    storage = connect(f"file://{disk}/media", least_free=0)
    key = keep(storage, CONTENT)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    with pytest.raises(StorageUnavailable, match="EROFS"):
        storage.spool()
    with pytest.raises(StorageUnavailable, match="EROFS"):
        storage.delete(key)
    assert read(storage, key) == CONTENT
    with pytest.raises(StorageUnavailable, match="EROFS"):
        connect(f"file://{disk}/another")


def test_a_limit_of_the_process_is_trouble_like_a_full_disk(tmp_path: Path) -> None:
    program = """
import resource, sys
from providers.storage import StorageUnavailable, connect
storage = connect(sys.argv[1], least_free=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with storage.spool() as spool:
    try:
        spool.write(bytes(99_999))
        spool.write(bytes(2))
    except StorageUnavailable as error:
        print(error.why, spool.size)
"""

    assert output("-c", program, f"file://{tmp_path}/media").split() == ["EFBIG", "100000"]
    assert not list((tmp_path / "media" / ".incoming").iterdir())


def test_a_root_that_cannot_be_made_is_trouble(tmp_path: Path) -> None:
    (tmp_path / "media").write_text("a file")

    for place in "media", "media/below":
        with pytest.raises(StorageUnavailable, match=r"EEXIST|ENOTDIR"):
            connect(f"file://{tmp_path}/{place}")


# -------------------------------------------------------------------------------------------------------- sudden deaths


WRITER = """
import hashlib, itertools, signal, sys, uuid
from providers.storage import connect, key_of
storage = connect(sys.argv[1], least_free=0)
for n in itertools.count():
    content = str(n).encode() * 4_000_000
    with storage.spool() as spool:
        for start in range(0, len(content), 65536):
            spool.write(content[start : start + 65536])
        if sys.argv[2] == "forever":
            print("writing", flush=True)
            while spool.size < 50_000_000:
                spool.write(content)
            signal.pause()
        storage.keep(spool, key_of(uuid.UUID(int=n % 7), hashlib.sha256(content).digest(), ".bin"))
"""


def final_files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*.bin") if path.is_file()]


def test_a_writer_killed_while_it_writes_leaves_no_file(tmp_path: Path) -> None:
    root = tmp_path / "media"
    with running("-c", WRITER, f"file://{root}", "forever", env={}, log=tmp_path / "log") as writer:
        writer.says("writing")
        writer.process.send_signal(signal.SIGKILL)
        writer.code()

    assert not final_files(root)
    assert len(list((root / ".incoming").iterdir())) == 1
    assert connect(f"file://{root}", least_free=0).sweep(EVER) == 1
    assert not list((root / ".incoming").iterdir())


def test_writers_killed_as_soon_as_a_name_appears_leave_whole_files(tmp_path: Path) -> None:
    root = tmp_path / "media"
    for enough in 2, 4, 6:
        with running("-c", WRITER, f"file://{root}", "many", env={}, log=tmp_path / "log") as writer:
            while len(final_files(root)) < enough:  # without a pause: the very moment counts
                assert writer.alive(), writer.text()
            writer.process.send_signal(signal.SIGKILL)
            assert writer.code() == -signal.SIGKILL

    found = final_files(root)
    assert len(found) >= 6
    for path in found:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem


# ----------------------------------------------------------------------------------------------------- keys, addresses


@given(st.uuids(), st.binary(min_size=32, max_size=32), st.sampled_from([".jpg", ".bin", ".docx", ".3gp"]))
def test_a_key_is_made_of_tenant_and_content_alone(tenant: UUID, digest: bytes, extension: str) -> None:
    key = key_of(tenant, digest, extension)

    assert key == f"{tenant}/{digest.hex()[:2]}/{digest.hex()}{extension}"
    assert key == os.path.normpath(key)


@given(
    st.binary(max_size=40) | st.binary(min_size=32, max_size=32),
    st.text(max_size=8) | st.from_regex(r"\.[a-z0-9./\\]+", fullmatch=True),
)
@example(bytes(32), "")
@example(bytes(32), ".php/../x")
@example(bytes(32), ".jpg\n")
@example(bytes(32), ".jpg\0")
@example(bytes(32), ".jpg.php")
@example(bytes(32), ".jpegs2")
@example(bytes(31), ".jpg")
def test_no_key_is_made_of_anything_else(digest: bytes, extension: str) -> None:
    is_good = len(digest) == 32 and 2 <= len(extension) <= 6 and extension[0] == "."
    is_good = is_good and all(sign in "abcdefghijklmnopqrstuvwxyz0123456789" for sign in extension[1:])
    if is_good:
        assert key_of(TENANT, digest, extension)
    else:
        with pytest.raises(ValueError, match="not a key"):
            key_of(TENANT, digest, extension)


@given(st.text() | st.from_regex(rf"{TENANT}/[0-9a-f/.]+/?[0-9a-f]+", fullmatch=True))
@example(f"{TENANT}/00/{'0' * 64}")
@example(f"{TENANT}/01/{'0' * 64}.bin")  # not where it belongs
@example(f"{TENANT}/00/../{'0' * 64}.bin")
@example(f"{TENANT}/00/{'0' * 64}.bin/")
@example(f"../{TENANT}/00/{'0' * 64}.bin")
@example(f"{str(TENANT).upper()}/00/{'0' * 64}.bin")
@example(f"{TENANT}/00/{'٠' * 64}.bin")
def test_whatever_else_is_given_opens_nothing(key: str) -> None:
    storage = connect((ROOT / "tests").as_uri(), least_free=0)  # nothing is written there

    for use in storage.size, storage.read, storage.delete:
        with pytest.raises(ValueError, match="not a key"):
            use(key)


@pytest.mark.parametrize(
    "url",
    [
        *("", "media", "/var/media", "file://", "file:///", "file://host/media", "file:relative", "file:///a?b"),
        *("file:///a#b", "file:///a%00b", "http://bucket", "s3://", "s3:///prefix", "s3://UPPER/x", "s3://b/x"),
        *("s3://user:pw@bucket/x", "s3://bucket/../other", "s3://bucket/a/./b", "s3://bucket/a//b", "s3://bucket/a b"),
        *("s3://bucket?x", "s3://[x"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(Misconfigured, match="MEDIA_URL must be"):
        connect(url)


def test_an_address_may_be_encoded(tmp_path: Path) -> None:
    folder = tmp_path / "média de #1"

    connect(folder.as_uri(), least_free=0)

    assert folder.is_dir()


def test_a_bucket_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in "obstore", "obstore.exceptions", "obstore.store":
        monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(Misconfigured, match=r"install pombal\[s3\]"):
        connect("s3://bucket/prefix")


def test_a_folder_needs_nothing_of_a_bucket(tmp_path: Path) -> None:
    program = """
import sys
from providers.storage import storage
print(storage().where, storage() is storage(), "obstore" in sys.modules)
"""

    assert output("-c", program, env={"MEDIA_URL": f"file://{tmp_path}/m"}).split() == ["file", "True", "False"]


def test_the_name_of_the_trouble_is_all_that_is_told() -> None:
    assert str(StorageUnavailable(errno.errorcode[errno.EDQUOT])) == "the media storage cannot be used: EDQUOT"
