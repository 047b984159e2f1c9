"""A bucket keeps what a folder keeps: asked of a real S3 server (SeaweedFS) over a socket."""

import hashlib
import http.server
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import obstore
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from obstore.store import S3Store

from pombal.errors import Misconfigured
from providers import storage as module
from providers.storage import Missing, Storage, StorageUnavailable, connect
from tests.pombal.processes import until
from tests.providers.test_storage import CONTENT, Contract, descriptors, keep, key_for, read, written

WEED = Path(sys.executable).with_name("weed")
SECRET = "a-secret-that-nobody-may-see"
ADMIN_SECRET = "of-the-bucket's-owner"

pytestmark = pytest.mark.skipif(not WEED.exists(), reason="there is no wheel of SeaweedFS for this machine")


@dataclass
class Server:
    """An S3 server with the bucket `media`, which the key `POMBAL` may read and write, and `READER` only read."""

    port: int
    admin: S3Store

    def objects(self) -> set[str]:
        return {one["path"] for page in obstore.list(self.admin) for one in page}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    for _ in range(4):  # somebody else may take one of its ports before it does
        with a_server(tmp_path_factory.mktemp("s3")) as started:
            if started:
                yield started
                return
    raise AssertionError("the S3 server does not start")


@contextmanager
def a_server(folder: Path) -> Iterator[Server | None]:
    """None when it ended before it answered."""
    keys = [
        an_identity("OWNER", ADMIN_SECRET, "Admin", "Read", "Write", "List"),
        an_identity("POMBAL", SECRET, "Read", "Write", "List"),
        an_identity("READER", SECRET, "Read"),
    ]
    (folder / "keys.json").write_text(json.dumps({"identities": keys}))
    (folder / "data").mkdir()
    with ExitStack() as stack:
        ports = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(8)]
    names = [f"{name}{end}" for name in ("master", "volume", "filer", "s3") for end in (".port", ".port.grpc")]
    options = {
        **dict(zip(names, ports, strict=True)),
        "dir": folder / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 64,
        "volume.max": 100,
        "volume.minFreeSpace": 0,
        "filer": "true",
        "s3": "true",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.iam": "false",
        "s3.config": folder / "keys.json",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [WEED, "-logtostderr=true", "server", *(f"-{name}={value}" for name, value in options.items())],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    port = int(options["s3.port"])
    admin = S3Store(
        "media",
        endpoint=f"http://127.0.0.1:{port}",
        access_key_id="OWNER",
        secret_access_key=ADMIN_SECRET,
        region="us-east-1",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )

    def made() -> bool:
        with suppress(obstore.exceptions.BaseError):
            return bool(obstore.put(admin, "made", b""))  # the owner's first file makes the bucket
        return False

    try:
        until(lambda: process.poll() is not None or made(), why=lambda: (folder / "log").read_text())
        yield None if process.poll() is not None else Server(port, admin)
    finally:
        process.send_signal(signal.SIGKILL)  # it takes its time over anything else
        process.wait()
        for one in ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{one}.sock"):  # noqa: S108 - where it puts them
                left.unlink()
        shutil.rmtree(folder / "data")


def an_identity(key: str, secret: str, *actions: str) -> dict[str, object]:
    return {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Says where the bucket is, and with which key it is opened, as a host would."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "POMBAL")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return lambda url: monkeypatch.setenv("AWS_ENDPOINT_URL", url)


class TestBucket(Contract):
    @pytest.fixture
    def prefix(self) -> str:
        """Each test's own."""
        return f"files/{uuid4()}"

    @pytest.fixture
    def storage(self, server: Server, endpoint: Callable[[str], None], prefix: str) -> Storage:
        endpoint(f"http://127.0.0.1:{server.port}")
        return connect(f"s3://media/{prefix}/", least_free=0)

    @pytest.fixture
    def spools(self, temporary: Path) -> Path:
        return temporary / f"pombal-{os.geteuid()}"

    def test_files_lie_under_the_prefix(self, storage: Storage, server: Server, prefix: str) -> None:
        key = keep(storage, CONTENT)

        assert f"{prefix}/{key}" in server.objects()
        assert storage.where == "s3"

    def test_a_bucket_may_be_used_without_a_prefix(self, storage: Storage, server: Server) -> None:
        key = keep(connect("s3://media", least_free=0), b"at the top")

        assert key in server.objects()
        assert storage.size(key) is None

    def test_what_is_there_is_not_written_again(self, storage: Storage, server: Server, prefix: str) -> None:
        key = keep(storage, CONTENT)
        before = obstore.head(server.admin, f"{prefix}/{key}")["last_modified"]
        same_size = bytes(len(CONTENT))
        obstore.put(server.admin, f"{prefix}/{key}", same_size)

        keep(storage, CONTENT)

        assert obstore.head(server.admin, f"{prefix}/{key}")["last_modified"] >= before
        assert read(storage, key) == same_size

    def test_what_is_there_in_part_is_replaced(self, storage: Storage, server: Server, prefix: str) -> None:
        key = keep(storage, CONTENT)
        obstore.put(server.admin, f"{prefix}/{key}", CONTENT[:1000])

        keep(storage, CONTENT)

        assert read(storage, key) == CONTENT

    def test_a_file_of_several_parts_comes_back_whole(self, storage: Storage) -> None:
        content = CONTENT * 13

        key = keep(storage, content)

        assert hashlib.sha256(read(storage, key)).hexdigest() == key[40:104]
        assert read(storage, key, 5 * 1024 * 1024 - 2, 5 * 1024 * 1024 + 2) == content[5242878:5242882]

    def test_a_file_that_vanishes_while_it_is_read_is_missing(self, storage: Storage) -> None:
        key = keep(storage, CONTENT * 2)
        with closing(storage.read(key)) as chunks:
            next(chunks)
            storage.delete(key)

            with pytest.raises(Missing):
                list(chunks)

    def test_a_bucket_that_is_not_there_is_trouble_and_not_a_missing_file(self, storage: Storage) -> None:
        elsewhere = connect("s3://mediaa/files", least_free=0)
        key = key_for(CONTENT)

        for use in elsewhere.read, elsewhere.size, elsewhere.delete, lambda _: keep(elsewhere, CONTENT):
            with pytest.raises(StorageUnavailable, match="NoSuchBucket"):
                use(key)

    @pytest.mark.parametrize(("key", "secret"), [("POMBAL", "another"), ("NOBODY", SECRET)])
    def test_keys_that_are_refused_are_trouble_and_nothing_of_them_is_told(
        self, storage: Storage, monkeypatch: pytest.MonkeyPatch, key: str, secret: str
    ) -> None:
        name = keep(storage, CONTENT)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        refused = connect("s3://media/files", least_free=0)

        for use in refused.read, refused.size, refused.delete, lambda _: keep(refused, CONTENT):
            with pytest.raises(StorageUnavailable) as caught:
                use(name)
            assert caught.value.why.startswith("PermissionDenied")
            assert not [word for word in (key, secret, "127.0.0.1", "media/", name) if word in caught.value.why]
            assert caught.value.__cause__ is None
            assert caught.value.__suppress_context__

    def test_a_key_that_may_only_read_can_read(self, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        key = keep(storage, CONTENT)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "READER")
        reader = connect(f"s3://media/{storage._prefix}", least_free=0)  # type: ignore[attr-defined]

        assert read(reader, key) == CONTENT
        with pytest.raises(StorageUnavailable, match="PermissionDenied AccessDenied"):
            keep(reader, CONTENT[1:])

    def test_an_upload_that_breaks_off_leaves_no_file(
        self, storage: Storage, server: Server, endpoint: Callable[[str], None], prefix: str, spools: Path
    ) -> None:
        content = CONTENT * 20
        with a_relay(server.port, most_bytes=12_000_000) as port:
            endpoint(f"http://127.0.0.1:{port}")
            cut = connect(f"s3://media/{prefix}", least_free=0)

            with pytest.raises(StorageUnavailable):
                keep(cut, content)

        assert storage.size(key_for(content)) is None
        assert not [name for name in server.objects() if name.startswith(prefix)]
        assert not list(spools.iterdir())
        assert read(storage, keep(storage, content)) == content

    def test_a_download_that_breaks_off_goes_on_or_says_so(
        self, storage: Storage, server: Server, endpoint: Callable[[str], None], prefix: str
    ) -> None:
        key = keep(storage, CONTENT * 4)
        with a_relay(server.port, most_bytes=2_000_000) as port:
            endpoint(f"http://127.0.0.1:{port}")
            chunks = connect(f"s3://media/{prefix}", least_free=0).read(key)

            with pytest.raises(StorageUnavailable):
                list(chunks)

    def test_a_folder_for_spools_that_is_not_ours_alone_is_refused(self, storage: Storage, spools: Path) -> None:
        storage.spool().close()
        spools.chmod(0o755)
        with pytest.raises(StorageUnavailable, match="somebody else"):
            storage.spool()

        spools.rmdir()
        spools.symlink_to(spools.parent)
        with pytest.raises(StorageUnavailable, match=r"ENOTDIR|ELOOP"):
            storage.spool()

    def test_little_space_is_left_to_others(self, storage: Storage) -> None:
        with pytest.raises(StorageUnavailable, match="free"):
            connect("s3://media", least_free=2**60).spool()


# ----------------------------------------------------------------------------------------------- servers that are away


@contextmanager
def a_relay(port: int, *, most_bytes: int) -> Iterator[int]:
    """A port that leads to the server's, until so many bytes have passed: then it is dead."""
    rest = most_bytes
    lock = threading.Lock()
    open_ones: list[socket.socket] = []
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def cut() -> None:
            for one in [listener, *open_ones]:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()

        def pump(source: socket.socket, target: socket.socket) -> None:
            nonlocal rest
            with suppress(OSError):
                while data := source.recv(65536):
                    with lock:
                        rest -= len(data)
                        if rest < 0:
                            cut()
                            return
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    here, _ = listener.accept()
                    there = socket.create_connection(("127.0.0.1", port))
                    open_ones.extend((here, there))
                    for source, target in (here, there), (there, here):
                        threads.append(threading.Thread(target=pump, args=(source, target)))
                        threads[-1].start()

        threads = [threading.Thread(target=accept)]
        threads[0].start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            with lock:
                cut()
            for thread in threads:
                thread.join()


def test_an_endpoint_that_is_gone_is_trouble_soon() -> None:
    """By what the constants add up to; the tests below see that they hold, with smaller ones."""
    assert (module._KEEP_TRYING + module._QUICK).total_seconds() <= 15


@pytest.mark.parametrize("how", ["refuses", "drops", "is silent", "hangs up", "talks nonsense"])
def test_an_endpoint_that_does_not_answer_is_trouble(
    how: str, endpoint: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CONNECT", timedelta(milliseconds=400))
    monkeypatch.setattr(module, "_QUICK", timedelta(milliseconds=800))
    monkeypatch.setattr(module, "_KEEP_TRYING", timedelta(milliseconds=500))
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0 if how == "drops" else 16))
        port = listener.getsockname()[1]
        if how == "refuses":
            listener.close()
        if how == "drops":
            for _ in range(3):  # nobody accepts them, and the kernel lets no more in
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.1", port))
        if how in ("hangs up", "talks nonsense"):
            stack.enter_context(answering(listener, b"" if how == "hangs up" else b"SSH-2.0-OpenSSH_9.2\r\n\r\n"))
        endpoint(f"http://127.0.0.1:{port}")
        storage = connect("s3://media/files", least_free=0)
        key = key_for(CONTENT)

        for use in storage.read, storage.size, storage.delete, lambda _: keep(storage, CONTENT):
            with pytest.raises(StorageUnavailable) as caught:
                use(key)
            assert caught.value.why == "Generic"


@contextmanager
def answering(listener: socket.socket, answer: bytes, tls: ssl.SSLContext | None = None) -> Iterator[list[bytes]]:
    """Says this to everybody and hangs up; yields what it was asked, in the clear."""
    asked: list[bytes] = []
    done = threading.Event()

    def serve() -> None:
        listener.settimeout(0.1)
        while not done.is_set():
            with suppress(OSError):  # a timeout among them
                plain, _ = listener.accept()
                plain.settimeout(10)
                with plain, tls.wrap_socket(plain, server_side=True) if tls else plain as connection:
                    asked.append(connection.recv(65536))
                    connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield asked
    finally:
        done.set()
        thread.join()


def test_no_descriptor_is_left_behind_by_a_dead_endpoint(
    endpoint: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEEP_TRYING", timedelta(milliseconds=100))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}")
    storage = connect("s3://media/files", least_free=0)

    def fail() -> None:
        with pytest.raises(StorageUnavailable):
            keep(storage, CONTENT)

    fail()
    before = descriptors()
    for _ in range(3):
        fail()

    assert descriptors() < before + 3


def test_a_key_that_may_not_list_can_keep(endpoint: Callable[[str], None]) -> None:
    """AWS answers 403, not 404, when such a key asks for what is not there."""
    kept: dict[str, bytes] = {}

    class Answers(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.reply(200 if self.path in kept else 403, kept.get(self.path, b""))

        def do_GET(self) -> None:
            self.reply(403, b"<Error><Code>AccessDenied</Code></Error>")

        def do_PUT(self) -> None:
            kept[self.path] = self.rfile.read(int(self.headers["content-length"]))
            self.reply(200, b"")

        def reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Last-Modified", "Sun, 22 Nov 2026 12:00:00 GMT")
            self.send_header("ETag", '"x"')
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as answers:
        thread = threading.Thread(target=answers.serve_forever)
        thread.start()
        try:
            endpoint(f"http://127.0.0.1:{answers.server_address[1]}")
            storage = connect("s3://media/files", least_free=0)
            with written(storage, CONTENT) as spool:
                storage.keep(spool, key_for(CONTENT))
            with pytest.raises(StorageUnavailable, match="PermissionDenied"):
                storage.size(key_for(b"another"))
        finally:
            answers.shutdown()
            thread.join()

    assert kept == {f"/media/files/{key_for(CONTENT)}": CONTENT}


# --------------------------------------------------------------------------------------------------- what is not done


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"])
@pytest.mark.parametrize(
    "url", ["http://s3.example.com", "http://192.0.2.7:9000", "ftp://localhost", "localhost:1", "http://[x"]
)
def test_keys_do_not_travel_in_the_clear(
    endpoint: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, name: str, url: str
) -> None:
    monkeypatch.setenv(name, url)

    with pytest.raises(Misconfigured, match=name):
        connect("s3://media")


@pytest.mark.parametrize(
    "url", ["https://s3.example.com", "http://localhost:1", "http://127.8.0.1:1", "http://[::1]:1"]
)
def test_they_do_on_this_machine_or_under_tls(endpoint: Callable[[str], None], url: str) -> None:
    endpoint(url)

    assert connect("s3://media")


def test_they_do_where_it_is_asked_for(endpoint: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint("http://minio.internal:9000")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")

    assert connect("s3://media")


def test_a_certificate_that_nobody_vouches_for_is_never_accepted(
    endpoint: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_KEEP_TRYING", timedelta(milliseconds=100))
    monkeypatch.setenv("AWS_ALLOW_INVALID_CERTIFICATES", "true")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(a_certificate(tmp_path / "certificate.pem"))
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, answering(listener, b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", tls) as asked:
        endpoint(f"https://localhost:{listener.getsockname()[1]}")

        with pytest.raises(StorageUnavailable):
            connect("s3://media").size(key_for(CONTENT))

    assert asked == []


def a_certificate(path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


def test_a_variable_that_cannot_be_used_is_refused_without_its_value(
    endpoint: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_UNSIGNED_PAYLOAD", "perhaps-a-secret")

    with pytest.raises(Misconfigured, match="AWS_") as caught:
        connect("s3://media")

    assert "secret" not in str(caught.value)
