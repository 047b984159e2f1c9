"""Files through a fleet that is being hurt: each is stored as it was sent, or failed with a reason; nothing is half."""

import base64
import hashlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

from pombal.supervisor import LINUX
from sandbox import client
from tests.chaos.fleet import Fleet, until

pytestmark = pytest.mark.skipif(not LINUX, reason="processes are found through /proc")

# A tenth of what is asked goes wrong.
FAULTS: tuple[dict[str, Any], ...] = (
    {"kind": "resolve_code", "code": 1, "share": 0.01},
    {"kind": "resolve_html", "share": 0.01},
    {"kind": "resolve_reset", "share": 0.01},
    {"kind": "resolve_expired", "share": 0.01},
    {"kind": "download_status", "http": 500, "share": 0.01},
    {"kind": "download_close", "share": 0.01},
    {"kind": "download_reset", "share": 0.01},
    {"kind": "download_wrong_hash", "share": 0.01},
    {"kind": "download_short_length", "share": 0.01},
    {"kind": "download_gzip", "share": 0.01},
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    data = tmp_path_factory.mktemp("chaos") / "files"
    with Fleet(
        data, "--procs", "sandbox,web,worker,media,clock", PROMETHEUS_MULTIPROC_DIR=str(data.with_name("metrics"))
    ) as fleet:
        yield fleet.start()


def test_every_file_is_stored_whole_while_its_workers_are_killed(fleet: Fleet) -> None:
    meta = str(fleet.demo["sandbox"]["meta"])
    for n, fault in enumerate(FAULTS):
        client.faults(meta, seed=n, **fault)
    client.faults(meta, kind="download_latency", ms=50)
    sent: list[str] = []

    for round_ in range(5):
        for kind in ("image", "document", "audio", "video"):
            sent += client.send(meta, "demo-meta", kind, count=50)["wamids"]
        until(lambda half=sent[::2]: stored(fleet) >= len(half), "more are stored", 120)  # type: ignore[misc] # bound now
        if round_ == 2:
            fleet.redis().flushall()
        elif round_ in (1, 3):
            fleet.kill("media")
    client.clear_faults(meta)
    until(lambda: over(fleet) == len(sent), "all are over", 240, pause=0.5)

    states = dict(fleet.rows("SELECT state, count(*) FROM media GROUP BY state"))
    assert states == {"stored": len(sent)}
    everything_counts(fleet, sent)


def everything_counts(fleet: Fleet, sent: list[str]) -> None:
    """Messages = rows = what the provider says of each = files on the disk, byte for byte."""
    found = fleet.rows(
        """
        SELECT m.provider_id, f.sha256, encode(f.digest, 'hex'), file.key, file.bytes
        FROM media AS f JOIN message AS m ON m.id = f.message_id JOIN file ON file.digest = f.digest
        """
    )
    assert sorted(row[0] for row in found) == sorted(sent)
    root = fleet.data / "media"
    for _, claimed, digest, key, size in found:
        content = (root / key).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (digest, size)
        assert b64(claimed) == digest
    on_disk = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    kept = {name for name in on_disk if not re.fullmatch(r"\.incoming/[0-9a-f]{32}\.part", name)}
    assert kept == {row[3] for row in found}


def test_a_worker_that_is_asked_to_stop_gives_its_files_back(fleet: Fleet) -> None:
    meta = str(fleet.demo["sandbox"]["meta"])
    client.faults(meta, kind="download_drip", ms=200)
    sent = client.send(meta, "demo-meta", "image", count=6)["wamids"]
    until(lambda: claimed(fleet) == len(sent), "all are on their way")

    fleet.stop()

    fleet.start()  # with a simulated Meta that knows of no fault
    until(lambda: over(fleet) == total(fleet), "they are stored by the next one", 120)
    assert fleet.rows("SELECT count(*) FROM media WHERE state = 'stored' AND attempts = 1")[0][0] >= len(sent)


def b64(claimed: str) -> str:
    return base64.b64decode(claimed).hex()


def stored(fleet: Fleet) -> int:
    return int(fleet.rows("SELECT count(*) FROM media WHERE state = 'stored'")[0][0])


def over(fleet: Fleet) -> int:
    return int(fleet.rows("SELECT count(*) FROM media WHERE state <> 'pending'")[0][0])


def total(fleet: Fleet) -> int:
    return int(fleet.rows("SELECT count(*) FROM media")[0][0])


def claimed(fleet: Fleet) -> int:
    return int(fleet.rows("SELECT count(*) FROM media WHERE state = 'pending' AND claim_token IS NOT NULL")[0][0])
