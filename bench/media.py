"""Files a second and megabytes a second into the storage, beside a plain `httpx` stream to disk, in the same run.

    python bench/media.py [--seconds 6] [--threads 8] [--repeat 3] [--sizes 10000 1000000 50000000] [--memory]

A server of its own process hands out random bytes from memory over loopback. `plain` reads a file with `httpx` and
writes it down: no hash, no limit, no fsync, no final name. `checked` is `providers.download` into a spool, and
`stored` adds what a folder as storage does: fsync, rename, fsync of the folder. Each runs in turn on the same threads
for the same time.

`--memory`: how much the memory of a process grows while it fetches and stores one file of 100 MB.
"""

import argparse
import hashlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import httpx

from providers import guard
from providers.download import allowance, download
from providers.sniff import extension, sniff
from providers.storage import Storage, connect, key_of

_LARGE = 100_000_000
_TENANT = uuid4()

SERVER = """
import os, socket, sys, threading
block = os.urandom(1024 * 1024)

def serve(connection):
    with connection:
        while True:
            request = b""
            while b"\\r\\n\\r\\n" not in request:
                piece = connection.recv(65536)
                if not piece:
                    return
                request += piece
            size = int(request.split(b" ")[1].strip(b"/"))
            connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % size)
            while size:
                piece = memoryview(block)[:size]
                connection.sendall(piece)
                size -= len(piece)

listener = socket.create_server(("127.0.0.1", 0), backlog=128)
print(listener.getsockname()[1], flush=True)
while True:
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=serve, args=(connection,), daemon=True).start()
"""

Fetch = Callable[[int], None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6, help="of each variant")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 1_000_000, 50_000_000])
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="pombal-bench-"))
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = f"http://127.0.0.1:{int(server.stdout.readline())}"
    try:
        if given.memory:
            memory(url, folder)
        else:
            compare(url, folder, given)
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder)
    return 0


def compare(url: str, folder: Path, given: argparse.Namespace) -> None:
    variants = {"plain": plain(url, folder), "checked": checked(url, folder), "stored": stored(url, folder)}
    for fetch in variants.values():
        fetch(10_000)  # connected, imported
    print("| bytes | variant | files/s | MB/s | of plain |\n|---|---|---|---|---|")
    for size in given.sizes:
        rates: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(given.repeat):
            for name, fetch in variants.items():
                rates[name].append(rate(fetch, size, given.threads, given.seconds))
        base = statistics.median(rates["plain"])
        for name, found in rates.items():
            one = statistics.median(found)
            print(f"| {size:,} | {name} | {one:,.1f} | {one * size / 1e6:,.0f} | {one / base:.2f} |", flush=True)


def rate(fetch: Fetch, size: int, threads: int, seconds: float) -> float:
    """Files a second over so many threads; what is under way at the end counts with its time."""
    end, done, lock = time.monotonic() + seconds, 0, threading.Lock()

    def work(_: int) -> None:
        nonlocal done
        while time.monotonic() < end:
            fetch(size)
            with lock:
                done += 1

    began = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return done / (time.monotonic() - began)


def plain(url: str, folder: Path) -> Fetch:
    client = httpx.Client(trust_env=False)

    def fetch(size: int) -> None:
        path = folder / uuid4().hex
        with client.stream("GET", f"{url}/{size}") as response, path.open("wb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
        path.unlink()

    return fetch


def checked(url: str, folder: Path) -> Fetch:
    client = _client()

    def fetch(size: int) -> None:
        path = folder / uuid4().hex
        with path.open("wb", buffering=0) as file:
            _download(client, f"{url}/{size}", file, size)
        path.unlink()

    return fetch


def stored(url: str, folder: Path) -> Fetch:
    client, storage = _client(), connect(f"file://{folder / 'media'}", least_free=0)
    return lambda size: _store(client, storage, f"{url}/{size}", size)


def _client() -> httpx.Client:
    return guard.client(guarded=False, ports=None, schemes={"http"})


def _store(client: httpx.Client, storage: Storage, url: str, size: int) -> None:
    with storage.spool() as spool:
        received = _download(client, url, spool, size)
        # A digest of its own for every file: each has to be stored, as files of customers differ.
        digest = hashlib.sha256(received.digest + uuid4().bytes).digest()
        key = key_of(_TENANT, digest, extension(sniff(received.head)))
        storage.keep(spool, key)
    storage.delete(key)


def _download(client, url, into, size):  # type: ignore[no-untyped-def] # as `download`
    return download(
        client,
        url,
        headers={},
        into=into,
        most_bytes=max(size, 1) + 1,
        seconds=allowance(size),
        expected_bytes=size,
        expected_digest=None,
        may_redirect=False,
    )


def memory(url: str, folder: Path) -> None:
    client, storage = _client(), connect(f"file://{folder / 'media'}", least_free=0)
    _store(client, storage, f"{url}/10000", 10_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _store(client, storage, f"{url}/{_LARGE}", _LARGE)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{_LARGE:,} bytes fetched and stored: {grown / 1024:.1f} MiB more memory at its peak")


if __name__ == "__main__":
    sys.exit(main())
