"""Files of messages: fetched in time, checked, stored once, or failed with a reason (security-reliability.md §9)."""

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from dramatiq.errors import Retry
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

import providers
from models import Media, MediaState
from models.media import AT_ONCE
from pombal import db
from pombal.settings import settings
from providers.storage import storage
from sandbox import client
from sandbox import meta as meta_says
from tests.factories import a_wamid, body_of, rows, superuser
from tests.workers.sending import TOKEN, Meta, a_number_at_meta
from tests.workers.tools import another_number, deliveries, run
from workers import download_media
from workers.download_media import circuit, ring_media

JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01" + bytes(range(256)) * 20 + b"\xff\xd9"
DRIVE = "C:"
PDF = b"%PDF-1.7\n" + b"1 0 obj <<>> endobj\n" * 50 + b"%%EOF\n"


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, queues: None) -> Iterator[Meta]:
    """A number at a simulated Meta, and a storage of its own."""
    monkeypatch.setenv("MEDIA_URL", f"file://{tmp_path}/media")
    with superuser() as connection:
        connection.execute("DELETE FROM media")
    with a_number_at_meta(monkeypatch) as meta:
        storage.cache_clear()
        yield meta
    storage.cache_clear()


def a_file(meta: Meta, content: bytes = JPEG, mime_type: str = "image/jpeg", kind: str = "image", **more: Any) -> UUID:
    """A customer sends a file; the id of its row, which is pending."""
    return files(meta, [client.add_media_file(meta.url, mime_type, content, **more)["object"]], kind)[0]


def files(meta: Meta, objects: list[dict[str, Any]], kind: str = "image", at: float | None = None) -> list[UUID]:
    """One message for each object, in one webhook each; the ids of their rows in that order."""
    wamids = [a_wamid() for _ in objects]
    sent_at = int(time.time() if at is None else at)
    bodies = [
        body_of(
            meta.shop,
            {
                "messages": [meta_says.message(kind, wamid, f"55119{44440000 + n}", sent_at, content)],
                "contacts": [meta_says.contact(f"55119{44440000 + n}", "Bia")],
            },
        )
        for n, (wamid, content) in enumerate(zip(wamids, objects, strict=True))
    ]
    run(deliveries(meta.shop, bodies))
    found = rows(meta.shop, "SELECT m.provider_id, f.id FROM media f JOIN message m ON m.id = f.message_id")
    ids = {row["provider_id"]: row["id"] for row in found}
    return [ids[wamid] for wamid in wamids]


def fetch(meta: Meta, id_: UUID, *, times: int = 1) -> None:
    """Jobs for this file, each as when its time has come."""
    for _ in range(times):
        due_now(meta)
        try:
            download_media(str(meta.shop.tenant.id), str(id_))
        except Retry:
            continue


def due_now(meta: Meta) -> None:
    with db.session([meta.shop.tenant.id]) as s:
        s.execute(text("UPDATE media SET next_attempt_at = now() WHERE state = 'pending'"))


def file(meta: Meta, id_: UUID) -> dict[str, Any]:
    query = """
        SELECT media.*, file.key, file.bytes, file.mime_type AS found,
            extract(epoch FROM next_attempt_at - now()) AS wait
        FROM media LEFT JOIN file USING (tenant_id, digest) WHERE media.id = :id
    """
    (row,) = rows(meta.shop, query, id=id_)
    return row


def stored_bytes(meta: Meta, id_: UUID) -> bytes:
    return b"".join(storage().read(file(meta, id_)["key"]))


def on_disk(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "media").rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------------------------- what goes well


def test_a_file_is_stored_as_it_was_sent(meta: Meta, tmp_path: Path) -> None:
    id_ = a_file(meta)

    fetch(meta, id_)

    row = file(meta, id_)
    assert (row["state"], row["found"], row["bytes"], row["attempts"]) == (
        MediaState.STORED,
        "image/jpeg",
        len(JPEG),
        1,
    )
    assert row["digest"] == hashlib.sha256(JPEG).digest()
    assert stored_bytes(meta, id_) == JPEG
    assert row["key"].startswith(f"{meta.shop.tenant.id}/")
    assert row["key"].endswith(".jpg")
    assert len(on_disk(tmp_path)) == 1


def test_listeners_are_told_of_a_stored_file(meta: Meta) -> None:
    id_ = a_file(meta)

    fetch(meta, id_)

    (event,) = rows(meta.shop, "SELECT * FROM event WHERE type = 'media_stored'")
    assert event["payload"] == {"media_id": str(id_), "mime_type": "image/jpeg", "bytes": len(JPEG)}
    assert event["message_id"] == file(meta, id_)["message_id"]


def test_the_webhook_rings_for_its_file(meta: Meta) -> None:
    from workers import broker

    id_ = a_file(meta)

    assert broker.do_qsize("download_media") == 1  # type: ignore[union-attr] # the tests' broker has a Redis
    assert not ring_media()  # it was rung for just now
    assert file(meta, id_)["state"] == MediaState.PENDING


def test_the_sweep_rings_for_a_file_whose_bell_was_lost(meta: Meta) -> None:
    a_file(meta)
    with superuser() as connection:
        connection.execute("UPDATE media SET next_ring_at = now() - interval '1 second'")

    assert ring_media() == 1
    assert ring_media() == 0
    assert ring_media(at_once=True) == 1  # Redis was wiped


def test_the_same_file_from_a_hundred_contacts_is_stored_once(meta: Meta, tmp_path: Path) -> None:
    told = client.add_media_file(meta.url, "image/jpeg", JPEG)["object"]
    ids = files(meta, [told] * 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda id_: download_media(str(meta.shop.tenant.id), str(id_)), ids))

    assert {row["state"] for row in rows(meta.shop, "SELECT state FROM media")} == {MediaState.STORED}
    assert len(rows(meta.shop, "SELECT * FROM file")) == len(on_disk(tmp_path)) == 1


def test_two_tenants_with_the_same_file_have_one_each(meta: Meta, tmp_path: Path) -> None:
    fetch(meta, a_file(meta))
    with pytest.MonkeyPatch.context() as patch, a_number_at_meta(patch) as other:
        fetch(other, a_file(other))

    assert len(on_disk(tmp_path)) == 2


def test_a_file_that_vanished_from_the_storage_is_stored_again_by_the_next_message(meta: Meta) -> None:
    first = a_file(meta)
    fetch(meta, first)
    storage().delete(file(meta, first)["key"])

    fetch(meta, a_file(meta))

    assert stored_bytes(meta, first) == JPEG


def test_one_job_goes_on_with_what_else_is_due(meta: Meta) -> None:
    ids = files(meta, [client.add_media_file(meta.url, "image/jpeg", JPEG + bytes([n]))["object"] for n in range(5)])

    download_media(str(meta.shop.tenant.id), str(ids[0]))

    assert {row["state"] for row in rows(meta.shop, "SELECT state FROM media")} == {MediaState.STORED}


def test_the_newest_comes_first_but_after_what_is_about_to_expire(meta: Meta) -> None:
    day, now = 86_400, time.time()
    ages = {"old": 3 * day, "urgent": 6.5 * day, "new": 60}
    ids = {}
    for name, age in ages.items():
        told = client.add_media_file(meta.url, "image/jpeg", JPEG + name.encode())["object"]
        ids[name] = files(meta, [told], at=now - age)[0]

    taken = []
    with db.session([meta.shop.tenant.id]) as s:
        for _ in ids:
            row = Media.claim(s, meta.shop.tenant.id, UUID(int=1))
            assert row is not None
            taken.append(next(name for name, id_ in ids.items() if id_ == row["id"]))

    assert taken == ["urgent", "new", "old"]


def test_a_tenant_has_only_so_many_downloads_at_once(meta: Meta) -> None:
    told = client.add_media_file(meta.url, "image/jpeg", JPEG)["object"]
    files(meta, [told] * (AT_ONCE + 3))

    claimed = []
    for n in range(AT_ONCE + 3):
        with db.session([meta.shop.tenant.id]) as s:
            claimed.append(Media.claim(s, meta.shop.tenant.id, UUID(int=n)))

    assert sum(row is not None for row in claimed) == AT_ONCE


# -------------------------------------------------------------------------------------------- what providers do to us


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"kind": "download_status", "http": 500}, "provider_error"),
        ({"kind": "download_status", "http": 403}, "refused"),
        ({"kind": "download_status", "http": 404}, "not_found"),
        ({"kind": "download_html"}, "provider_error"),
        ({"kind": "download_html", "http": 200}, "wrong_size"),
        ({"kind": "download_wrong_hash"}, "wrong_hash"),
        ({"kind": "download_close"}, "cut_short"),
        ({"kind": "download_reset"}, "cut_short"),
        ({"kind": "download_short_length"}, "wrong_size"),
        ({"kind": "download_long_length"}, "cut_short"),
        ({"kind": "download_gzip"}, "encoded"),
        ({"kind": "download_redirect"}, "redirect"),
        ({"kind": "resolve_code", "code": 190}, "refused"),
        ({"kind": "resolve_code", "code": 1}, "provider_error"),
        ({"kind": "resolve_html"}, "provider_error"),
        ({"kind": "resolve_garbage"}, "provider_error"),
        ({"kind": "resolve_reset"}, "unreachable"),
        ({"kind": "resolve_huge"}, "provider_error"),
        ({"kind": "resolve_empty"}, "provider_error"),
        ({"kind": "resolve_gone"}, "gone"),
        ({"kind": "resolve_code", "code": 100}, "rejected"),
        ({"kind": "resolve_wrong_hash"}, "wrong_hash"),
        ({"kind": "resolve_wrong_size"}, "wrong_size"),
        ({"kind": "resolve_elsewhere"}, "foreign_host"),
        ({"kind": "resolve_redirect"}, "provider_error"),
    ],
    ids=lambda given: "-".join(map(str, given.values())) if isinstance(given, dict) else given,
)
def test_what_goes_wrong_is_named_and_tried_again(meta: Meta, tmp_path: Path, fault: dict[str, Any], code: str) -> None:
    id_ = a_file(meta)
    client.faults(meta.url, **fault)

    fetch(meta, id_)

    row = file(meta, id_)
    assert (row["state"], row["error_code"], row["attempts"]) == (MediaState.PENDING, code, 1)
    assert on_disk(tmp_path) == []

    client.clear_faults(meta.url)
    fetch(meta, id_)
    assert (file(meta, id_)["state"], stored_bytes(meta, id_)) == (MediaState.STORED, JPEG)


def test_a_url_that_ran_out_on_the_way_is_asked_for_anew(meta: Meta) -> None:
    id_ = a_file(meta)
    client.faults(meta.url, kind="resolve_expired", count=1)

    fetch(meta, id_)

    assert file(meta, id_)["state"] == MediaState.STORED
    assert len(client.media(meta.url, kind="resolve")["media"]) == 2


def test_the_token_goes_nowhere_else(meta: Meta) -> None:
    id_ = a_file(meta)
    for kind in ("resolve_elsewhere", "download_redirect", "resolve_redirect"):
        client.clear_faults(meta.url)
        client.faults(meta.url, kind=kind)
        fetch(meta, id_)

    assert client.media(meta.url, kind="elsewhere")["media"] == []


def test_what_was_told_wrong_five_times_has_failed_with_a_letter(meta: Meta) -> None:
    id_ = a_file(meta)
    client.faults(meta.url, kind="download_wrong_hash")

    fetch(meta, id_, times=5)

    row = file(meta, id_)
    assert (row["state"], row["error_code"], row["attempts"]) == (MediaState.FAILED, "wrong_hash", 5)
    (letter,) = rows(meta.shop, "SELECT * FROM dead_letter WHERE key = :key", key=f"media:{id_}")
    assert (letter["actor"], letter["state"], letter["failures"]) == ("download_media", "open", 5)
    (event,) = rows(meta.shop, "SELECT * FROM event WHERE type = 'media_failed'")
    assert event["payload"]["error_code"] == "wrong_hash"


def test_a_failed_file_can_be_tried_again(meta: Meta) -> None:
    id_ = a_file(meta)
    client.faults(meta.url, kind="download_wrong_hash")
    fetch(meta, id_, times=5)
    client.clear_faults(meta.url)

    with db.session([meta.shop.tenant.id]) as s:
        assert Media.again(s, meta.shop.tenant.id, id_)
    fetch(meta, id_)

    assert (file(meta, id_)["state"], file(meta, id_)["error_code"]) == (MediaState.STORED, None)


def test_waits_grow_and_end_at_the_deadline(meta: Meta) -> None:
    id_ = a_file(meta)
    client.faults(meta.url, kind="download_status", http=500)

    waits = []
    for _ in range(4):
        fetch(meta, id_)
        waits.append(float(file(meta, id_)["wait"]))
    assert waits == sorted(waits)
    assert waits[0] < 2 < 25 < waits[2] < 60 < waits[3] < 180

    with superuser() as connection:
        connection.execute("UPDATE media SET deadline = now() + interval '20 seconds' WHERE id = %s", [id_])
    fetch(meta, id_)
    assert float(file(meta, id_)["wait"]) < 21
    with superuser() as connection:
        connection.execute("UPDATE media SET deadline = now() WHERE id = %s", [id_])
    fetch(meta, id_)
    row = file(meta, id_)
    assert (row["state"], row["error_code"]) == (MediaState.FAILED, "expired")
    assert "provider_error" in row["error"]


def test_the_first_failures_are_tried_again_by_the_queue(meta: Meta) -> None:
    id_ = a_file(meta)
    client.faults(meta.url, kind="download_status", http=500)

    for _ in range(2):
        due_now(meta)
        with pytest.raises(Retry):
            download_media(str(meta.shop.tenant.id), str(id_))
    due_now(meta)
    download_media(str(meta.shop.tenant.id), str(id_))  # from now on its row waits

    assert file(meta, id_)["attempts"] == 3


def test_a_channel_without_a_token_says_so(meta: Meta) -> None:
    id_ = a_file(meta)
    with superuser() as connection:
        connection.execute("UPDATE channel SET sealed = NULL WHERE id = %s", [meta.shop.channel.id])

    fetch(meta, id_)

    assert file(meta, id_)["error_code"] == "no_token"


def by_link(meta: Meta, link: str) -> UUID:
    """A pending file that is to be had at a link, as gateways name them."""
    id_ = a_file(meta)
    with superuser() as connection:
        query = "UPDATE media SET link = %s, provider_media_id = NULL, sha256 = NULL WHERE id = %s"
        connection.execute(query, [link, id_])
    return id_


def test_a_link_to_a_place_inside_is_not_followed(meta: Meta) -> None:
    id_ = by_link(meta, "https://169.254.169.254/latest/meta-data/")

    fetch(meta, id_)

    row = file(meta, id_)
    assert (row["state"], row["error_code"], row["attempts"]) == (MediaState.FAILED, "blocked_address", 1)


def test_a_link_into_a_network_of_the_operators_is_followed(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDIA_ALLOWED_NETWORKS", "127.0.0.0/8, ::1/128")
    settings.cache_clear()
    providers._guarded.cache_clear()
    try:
        id_ = by_link(meta, f"{meta.url}/health")
        fetch(meta, id_)
    finally:
        providers._guarded().close()
        providers._guarded.cache_clear()

    assert file(meta, id_)["state"] == MediaState.STORED


def test_an_oversized_file_fails_at_once_and_without_a_trace(meta: Meta, tmp_path: Path) -> None:
    id_ = files(meta, [client.add_media_file(meta.url, "image/webp", size=6 * 2**20)["object"]], "sticker")[0]

    fetch(meta, id_)

    assert (file(meta, id_)["state"], file(meta, id_)["error_code"]) == (MediaState.FAILED, "too_large")
    assert client.media(meta.url, kind="download")["media"] == []  # its size was told
    assert on_disk(tmp_path) == []


def test_an_endless_file_is_cut_off(meta: Meta, tmp_path: Path) -> None:
    id_ = a_file(meta, b"RIFF\x00\x00\x00\x00WEBPVP8 " + bytes(100), "image/webp", "sticker")
    client.faults(meta.url, kind="download_endless")

    fetch(meta, id_)

    assert file(meta, id_)["error_code"] == "too_large"
    assert on_disk(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "claimed", "found", "ending"),
    [
        (b"<!DOCTYPE html><script>alert(1)</script>", "image/jpeg", "text/html", ".bin"),
        (PDF, "image/jpeg", "application/pdf", ".pdf"),
        (bytes(200), "image/jpeg", "application/octet-stream", ".bin"),
    ],
)
def test_a_file_that_lies_about_its_type_is_kept_as_what_it_is_and_flagged(
    meta: Meta, content: bytes, claimed: str, found: str, ending: str
) -> None:
    id_ = a_file(meta, content, claimed)

    fetch(meta, id_)

    row = file(meta, id_)
    assert (row["state"], row["found"], row["is_mislabelled"]) == (MediaState.STORED, found, True)
    assert row["key"].endswith(ending)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", f"{DRIVE}\\x", "a\r\nb", "x" * 10_000, ".htaccess", "x.php", "\u202egpj.exe", "a\0b"]
)
def test_a_hostile_name_is_data_alone(meta: Meta, tmp_path: Path, name: str) -> None:
    id_ = a_file(meta, PDF, "application/pdf", "document", filename=name)

    fetch(meta, id_)

    (path,) = on_disk(tmp_path)
    assert path.name == f"{hashlib.sha256(PDF).hexdigest()}.pdf"
    assert file(meta, id_)["state"] == MediaState.STORED


# ------------------------------------------------------------------------------------------------- what we do to us


def test_a_storage_that_is_away_costs_no_attempt_and_no_message(meta: Meta, tmp_path: Path) -> None:
    id_ = a_file(meta)
    (tmp_path / "media").write_text("a file where the folder should be")

    fetch(meta, id_, times=3)

    row = file(meta, id_)
    assert (row["state"], row["error_code"], row["attempts"]) == (MediaState.PENDING, "storage_unavailable", 0)
    assert 20 < float(row["wait"]) < 60

    (tmp_path / "media").unlink()
    fetch(meta, id_)
    assert file(meta, id_)["state"] == MediaState.STORED


def test_a_tenant_over_its_quota_waits(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(meta, a_file(meta))
    monkeypatch.setenv("MEDIA_QUOTA", "1000")
    settings.cache_clear()
    second = a_file(meta, PDF, "application/pdf", "document")

    fetch(meta, second)
    assert (file(meta, second)["error_code"], file(meta, second)["attempts"]) == ("quota_reached", 0)

    monkeypatch.setenv("MEDIA_QUOTA", "1000000")
    settings.cache_clear()
    fetch(meta, second)
    assert file(meta, second)["state"] == MediaState.STORED


def test_a_storage_that_stays_away_is_asked_twice_a_minute(meta: Meta, tmp_path: Path) -> None:
    ids = files(meta, [client.add_media_file(meta.url, "image/jpeg", JPEG)["object"]] * 8)
    (tmp_path / "media").write_text("a file where the folder should be")
    try:
        for id_ in ids:
            fetch(meta, id_)
        codes = {row["error_code"] for row in rows(meta.shop, "SELECT error_code FROM media")}
    finally:
        circuit.answered("storage")

    assert "paused" in codes
    assert all(row["attempts"] == 0 for row in rows(meta.shop, "SELECT attempts FROM media"))


@pytest.mark.parametrize("quota", ["1", "0"])
def test_what_nobody_counts_outlives_the_deadline(meta: Meta, monkeypatch: pytest.MonkeyPatch, quota: str) -> None:
    first, id_ = a_file(meta), a_file(meta, PDF, "application/pdf", "document")
    with superuser() as connection:
        connection.execute("UPDATE media SET next_attempt_at = now() + interval '1 day' WHERE id = %s", [id_])
    download_media(str(meta.shop.tenant.id), str(first))
    with superuser() as connection:
        connection.execute("UPDATE media SET deadline = now() WHERE id = %s", [id_])
    monkeypatch.setenv("MEDIA_QUOTA", "1")
    settings.cache_clear()
    fetch(meta, id_)
    assert (file(meta, id_)["state"], file(meta, id_)["error_code"]) == (MediaState.PENDING, "quota_reached")
    assert float(file(meta, id_)["wait"]) > 100

    monkeypatch.setenv("MEDIA_QUOTA", "0")
    settings.cache_clear()
    fetch(meta, id_)
    assert file(meta, id_)["state"] == MediaState.STORED


def test_trouble_of_the_database_is_no_crash_of_the_file(meta: Meta) -> None:
    id_ = a_file(meta)
    with superuser() as connection:
        connection.execute("""
            CREATE FUNCTION in_trouble() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'lock_not_available'; END $$
        """)
        connection.execute("CREATE TRIGGER in_trouble BEFORE INSERT ON file EXECUTE FUNCTION in_trouble()")
    try:
        for _ in range(7):
            due_now(meta)
            with pytest.raises(OperationalError):
                download_media(str(meta.shop.tenant.id), str(id_))
    finally:
        with superuser() as connection:
            connection.execute("DROP TRIGGER in_trouble ON file")
            connection.execute("DROP FUNCTION in_trouble")

    assert (file(meta, id_)["attempts"], file(meta, id_)["crashes"]) == (0, 0)
    fetch(meta, id_)
    assert file(meta, id_)["state"] == MediaState.STORED


def test_secrets_that_no_key_opens_are_the_operators_to_mend(meta: Meta) -> None:
    id_ = a_file(meta)
    with superuser() as connection:
        row = connection.execute("SELECT sealed FROM channel WHERE id = %s", [meta.shop.channel.id]).fetchone()
        assert row is not None
        connection.execute("UPDATE channel SET sealed = 'nonsense' WHERE id = %s", [meta.shop.channel.id])

    fetch(meta, id_, times=10)

    found = file(meta, id_)
    assert (found["state"], found["error_code"], found["attempts"]) == (MediaState.PENDING, "misconfigured", 0)
    assert "SECRET" not in found["error"]
    with superuser() as connection:
        connection.execute("UPDATE channel SET sealed = %s WHERE id = %s", [row[0], meta.shop.channel.id])
    fetch(meta, id_)
    assert file(meta, id_)["state"] == MediaState.STORED


def test_claims_at_once_keep_to_the_limit(meta: Meta) -> None:
    told = client.add_media_file(meta.url, "image/jpeg", JPEG)["object"]
    files(meta, [told] * 24)
    tenant = meta.shop.tenant.id

    def claimed(n: int) -> bool:
        with db.session([tenant]) as s:
            return Media.claim(s, tenant, UUID(int=n)) is not None

    with ThreadPoolExecutor(12) as pool:
        assert sum(pool.map(claimed, range(24))) == AT_ONCE


def test_a_flood_of_one_tenant_keeps_no_bell_from_another(meta: Meta) -> None:
    told = client.add_media_file(meta.url, "image/jpeg", JPEG)["object"]
    files(meta, [told] * 30)
    with pytest.MonkeyPatch.context() as patch, a_number_at_meta(patch) as other:
        files(other, [client.add_media_file(other.url, "image/jpeg", JPEG)["object"]], at=time.time() - 6 * 86_400)
        with superuser() as connection:
            connection.execute("UPDATE media SET next_ring_at = now() - interval '1 second'")

        with db.session() as s:
            db.see_all(s)
            rung = [tenant for tenant, _ in Media.to_ring(s)]

    assert rung.count(other.shop.tenant.id) == 1
    assert rung.count(meta.shop.tenant.id) == AT_ONCE


def test_a_new_token_takes_files_from_those_who_ask_with_the_old_one(meta: Meta) -> None:
    id_ = a_file(meta)
    tenant = meta.shop.tenant.id
    with db.session([tenant]) as s:
        slow = Media.claim(s, tenant, UUID(int=1), id_)
        assert slow is not None

    with db.session([tenant]) as s:
        assert Media.wake(s, tenant, meta.shop.channel.id) == 1
    with db.session([tenant]) as s:
        assert not Media.put_back(s, slow, 20_000, code="refused", error="")
    fetch(meta, id_)

    assert file(meta, id_)["state"] == MediaState.STORED


@pytest.mark.parametrize("at", [0, 253_370_000_000])
def test_a_time_that_cannot_be_true_leaves_a_week(meta: Meta, at: float) -> None:
    told = client.add_media_file(meta.url, "image/jpeg", JPEG)["object"]
    (id_,) = files(meta, [told], at=at)

    days = (file(meta, id_)["deadline"] - datetime.now(UTC)).total_seconds() / 86_400
    assert 6.9 < days <= 7


def test_a_claim_that_ran_out_is_taken_over_and_its_first_holder_writes_nothing(meta: Meta) -> None:
    id_ = a_file(meta)
    tenant = meta.shop.tenant.id
    with db.session([tenant]) as s:
        slow = Media.claim(s, tenant, UUID(int=1), id_)
    assert slow is not None
    with db.session([tenant]) as s:
        assert Media.claim(s, tenant, UUID(int=2), id_) is None

    fetch(meta, id_)

    with db.session([tenant]) as s:
        assert not Media.extend(s, [slow])
        assert not Media.failed(s, slow, code="timeout", error="")
        assert not Media.put_back(s, slow, 1, code="timeout", error="")
    assert file(meta, id_)["state"] == MediaState.STORED


def test_a_file_that_ends_its_process_every_time_is_given_up(meta: Meta) -> None:
    id_ = a_file(meta)
    tenant = meta.shop.tenant.id
    for n in range(5):
        due_now(meta)
        with db.session([tenant]) as s:
            assert Media.claim(s, tenant, UUID(int=n), id_)

    fetch(meta, id_)

    assert (file(meta, id_)["state"], file(meta, id_)["error_code"]) == (MediaState.FAILED, "crashed")


def test_a_host_that_does_not_answer_is_left_alone(meta: Meta) -> None:
    told = client.add_media_file(meta.url, "image/jpeg", JPEG)["object"]
    ids = files(meta, [told] * 8)
    client.faults(meta.url, kind="resolve_reset")

    for id_ in ids:
        fetch(meta, id_)

    codes = [row["error_code"] for row in rows(meta.shop, "SELECT error_code FROM media")]
    assert "paused" in codes
    before = len(client.media(meta.url, kind="resolve")["media"])
    fetch(meta, ids[0], times=3)
    assert len(client.media(meta.url, kind="resolve")["media"]) == before


def test_one_bad_file_does_not_speak_for_its_host(meta: Meta) -> None:
    bad = a_file(meta)
    client.faults(meta.url, kind="resolve_reset", to=file(meta, bad)["provider_media_id"])
    fetch(meta, bad, times=7)

    good = a_file(meta, PDF, "application/pdf", "document")
    fetch(meta, good)

    assert file(meta, good)["state"] == MediaState.STORED
    assert file(meta, bad)["error_code"] == "unreachable"


def test_a_new_token_wakes_the_files_of_its_channel(meta: Meta) -> None:
    id_ = a_file(meta)
    client.faults(meta.url, kind="resolve_code", code=190)
    fetch(meta, id_, times=4)
    assert float(file(meta, id_)["wait"]) > 60
    client.clear_faults(meta.url)

    with db.session([meta.shop.tenant.id]) as s:
        assert Media.wake(s, meta.shop.tenant.id, meta.shop.channel.id) == 1
    download_media(str(meta.shop.tenant.id), str(id_))

    assert file(meta, id_)["state"] == MediaState.STORED


def test_no_line_tells_the_token_the_id_or_the_name(meta: Meta, capfd: pytest.CaptureFixture[str]) -> None:
    told = client.add_media_file(meta.url, "application/pdf", PDF, filename="of Bia Souza.pdf")["object"]
    (id_,) = files(meta, [told], "document")
    client.faults(meta.url, kind="download_wrong_hash", count=1)

    fetch(meta, id_, times=2)

    printed = "".join(capfd.readouterr())
    assert "media_stored" in printed
    for secret in (TOKEN, told["id"], "Bia", meta.url):
        assert secret not in printed


def test_a_second_number_of_the_tenant_fetches_with_its_own_token(meta: Meta) -> None:
    other = another_number(meta.shop)

    assert other.tenant.id == meta.shop.tenant.id  # its channel has no token here
    with superuser() as connection:
        id_ = a_file(meta)
        connection.execute("UPDATE media SET channel_id = %s WHERE id = %s", [other.channel.id, id_])
    fetch(meta, id_)

    assert file(meta, id_)["error_code"] == "no_token"
