"""Files of our own on their way out: handed to the provider once, before the messages that name them.

Against a simulated Meta, over sockets, or a Graph that answers when the test wants it to.
"""

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from models import Channel, File, Hold, Lane, Media, MediaState, outgoing
from pombal import db, metrics
from pombal.ids import uuid7
from pombal.pace import Pace, client_for_pace
from pombal.settings import settings
from providers.outbound import Answer, Outcome
from providers.sniff import extension
from providers.storage import key_of, storage
from sandbox import client
from sandbox.files import make
from tests.factories import Shop, a_shop, rows
from tests.pombal.processes import running
from tests.sandbox.servers import serve
from tests.workers.lost_commits import lost_commits
from tests.workers.sending import (
    SOMEBODY,
    TOKEN,
    Meta,
    a_number_at_meta,
    another_process,
    attempts,
    configure,
    events,
    finish,
    graph_is_at,
    lane,
    lease_runs_out,
    letters,
    make_due,
    message,
    queue,
    send,
    statuses,
)
from tests.workers.tools import another_number, in_background, until
from workers import _lanes, _uploads
from workers._line import Line
from workers.outgoing_message import lanes as lanes_of_the_worker

pytestmark = pytest.mark.usefixtures("queues")

OTHER = "+5511944440002"
PATIENCE = 60.0


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A storage of the test's own."""
    monkeypatch.setenv("MEDIA_URL", f"file://{tmp_path}/media")
    settings.cache_clear()
    storage.cache_clear()
    yield tmp_path / "media"
    storage.cache_clear()
    settings.cache_clear()


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meta]:
    with a_number_at_meta(monkeypatch) as meta:
        configure(meta.shop, messages_per_second=1_000)
        yield meta


def people(count: int) -> list[str]:
    return [f"+55119{n:08}" for n in range(62_000_000, 62_000_000 + count)]


def a_file(shop: Shop, seed: str = "a", mime_type: str = "image/jpeg", size: int | None = None) -> UUID:
    """A stored file, as `POST /api/v1/media` leaves it; its media id."""
    content, tenant, id_ = make(mime_type, seed, size), shop.tenant.id, uuid7()
    key = key_of(tenant, content.digest, extension(mime_type))
    with storage().spool() as spool:
        for chunk in content.chunks():
            spool.write(chunk)
        storage().keep(spool, key)
    kept = {"tenant_id": tenant, "digest": content.digest, "key": key, "bytes": content.size, "mime_type": mime_type}
    with db.session([tenant]) as s:
        File.keep(s, kept)
        s.add(
            Media(
                tenant_id=tenant,
                id=id_,
                kind=mime_type.partition("/")[0],
                state=MediaState.STORED,
                digest=content.digest,
                deadline=datetime.now(UTC),
            )
        )
    return id_


def queue_image(shop: Shop, media_id: UUID, to: str = SOMEBODY, **more: Any) -> UUID:
    (id_,) = queue(shop, to=to, image={"media_id": str(media_id), **more})
    return id_


def uploads(meta: Meta) -> list[dict[str, Any]]:
    """What was handed to the provider, in its order."""
    found: list[dict[str, Any]] = client.media(meta.url, kind="upload")["media"]
    return found


def taken(shop: Shop) -> list[dict[str, Any]]:
    """What we know of the provider's files."""
    return rows(shop, "SELECT * FROM media_upload WHERE channel_id = :channel", channel=shop.channel.id)


def outcomes(shop: Shop, id_: UUID) -> list[str]:
    return [attempt["outcome"] for attempt in attempts(shop, id_)]


# -- once ------------------------------------------------------------------------------------------------------------


def test_the_file_goes_up_and_then_the_message_names_it(meta: Meta) -> None:
    seconds = count_of_uploads()
    media_id = a_file(meta.shop, size=700_000)
    id_ = queue_image(meta.shop, media_id, caption="A caixa")

    send(meta.shop)

    (upload,) = uploads(meta)
    content = make("image/jpeg", "a", 700_000)
    assert (upload["mime_type"], upload["bytes"], upload["sha256"]) == (
        "image/jpeg",
        content.size,
        content.digest.hex(),
    )
    assert (message(meta.shop, id_)["status"], outcomes(meta.shop, id_)) == ("sent", ["accepted"])
    assert events(meta.shop, id_)[-2:] == ["sending", "sent"]
    (row,) = taken(meta.shop)
    assert row["provider_media_id"] == upload["id"]
    assert timedelta(days=28, hours=23) < row["expires_at"] - datetime.now(UTC) < timedelta(days=29)
    (listed,) = client.media_files(meta.url)["files"]
    assert listed["filename"] == "file.jpg"
    assert message(meta.shop, id_)["body"] == {"image": {"media_id": str(media_id), "caption": "A caixa"}}
    assert (lane(meta.shop)["token"], seconds()) == (None, 1)


def count_of_uploads() -> Callable[[], float]:
    total = metrics.provider_seconds.labels(provider="meta", operation="upload")

    def now() -> float:
        (found,) = [one.value for metric in total.collect() for one in metric.samples if one.name.endswith("_count")]
        return float(found)

    before = now()
    return lambda: now() - before


def test_twenty_messages_with_the_same_file_upload_it_once_and_so_does_a_later_one(meta: Meta) -> None:
    client.faults(meta.url, kind="upload_latency", ms=300)
    media_id = a_file(meta.shop)
    for whom in people(20):
        queue_image(meta.shop, media_id, to=whom)

    send(meta.shop)
    queue_image(meta.shop, media_id)
    send(meta.shop)

    assert statuses(meta.shop) == ["sent"] * 21
    assert len(uploads(meta)) == 1
    assert {attempt["number"] for attempt in rows(meta.shop, "SELECT number FROM attempt")} == {1}


def test_a_content_is_one_file_whatever_id_it_came_under_but_each_channel_uploads_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shop = a_shop(access_token=TOKEN)
    with a_number_at_meta(monkeypatch, shop) as meta:
        for _ in range(2):
            queue_image(shop, a_file(shop))

        send(shop)

        assert (statuses(shop), len(uploads(meta)), len(taken(shop))) == (["sent", "sent"], 1, 1)
        other = another_number(shop, access_token=TOKEN)
        queue(other, to=OTHER, image={"media_id": str(a_file(shop))})
        send(other)
        assert taken(other) == []  # that number is not at this Meta: it may not use the first one's


def test_what_customers_sent_can_be_sent_on(meta: Meta) -> None:
    media_id = a_file(meta.shop, mime_type="application/pdf")
    with db.session([meta.shop.tenant.id]) as s:
        order = "UPDATE media SET channel_id = :channel, provider_media_id = '4711' WHERE id = :id"
        s.execute(text(order), {"channel": meta.shop.channel.id, "id": media_id})
    queue(meta.shop, document={"media_id": str(media_id), "filename": "nota.pdf"})

    send(meta.shop)

    assert (statuses(meta.shop), [one["mime_type"] for one in uploads(meta)]) == (["sent"], ["application/pdf"])


def test_headers_of_templates_and_of_buttons_carry_files_too(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    ids = [str(a_file(meta.shop, seed)) for seed in "abc"]
    cards = [
        {"card_index": n, "components": [{"type": "header", "parameters": [{"type": "image", "image": part}]}]}
        for n, part in enumerate([{"media_id": ids[1]}, {"media_id": ids[2]}, {"id": "1037543291543636"}])
    ]
    header = {"type": "header", "parameters": [{"type": "image", "image": {"media_id": ids[0]}}]}
    components = [header, {"type": "carousel", "cards": cards}]
    template = {"name": "summer", "language": {"code": "pt_BR"}, "components": components}
    action = {"buttons": [], "media_id": "none of ours"}
    buttons = {"type": "button", "header": {"type": "image", "image": {"media_id": ids[0]}}, "action": action}
    with a_slow_graph(meta.shop, seen) as graph, graph_is_at(monkeypatch, graph.url):
        graph.may_take.set()
        queue(meta.shop, to=SOMEBODY, template=template)
        queue(meta.shop, to=OTHER, interactive=buttons)

        send(meta.shop)

    assert (statuses(meta.shop), graph.uploads) == (["sent", "sent"], 3)
    known = {row["digest"]: row["provider_media_id"] for row in taken(meta.shop)}
    one, two, three = (known[make("image/jpeg", seed).digest] for seed in "abc")
    by_type = {body["type"]: body for body in seen}
    sent = by_type["template"]["template"]["components"]
    assert sent[0]["parameters"][0]["image"] == {"id": one}
    assert [card["components"][0]["parameters"][0]["image"] for card in sent[1]["cards"]] == [
        {"id": two},
        {"id": three},
        {"id": "1037543291543636"},
    ]
    assert by_type["interactive"]["interactive"] == buttons | {"header": {"type": "image", "image": {"id": one}}}


# -- ids that ran out ------------------------------------------------------------------------------------------------


def test_an_id_with_less_than_a_day_left_is_not_used(meta: Meta) -> None:
    media_id = a_file(meta.shop)
    queue_image(meta.shop, media_id)
    send(meta.shop)
    (first,) = taken(meta.shop)
    with db.session([meta.shop.tenant.id]) as s:
        s.execute(text("UPDATE media_upload SET expires_at = now() + interval '23 hours'"))

    queue_image(meta.shop, media_id)
    send(meta.shop)

    (second,) = taken(meta.shop)
    assert (statuses(meta.shop), len(uploads(meta))) == (["sent", "sent"], 2)
    assert second["provider_media_id"] != first["provider_media_id"]


def test_an_id_that_the_provider_forgot_is_replaced_once(meta: Meta) -> None:
    media_id = a_file(meta.shop)
    queue_image(meta.shop, media_id)
    send(meta.shop)
    client.clear_media_files(meta.url)
    ids = [queue_image(meta.shop, media_id, to=whom) for whom in people(5)]

    send(meta.shop)
    finish(meta.shop)

    assert statuses(meta.shop) == ["sent"] * 6
    assert len(uploads(meta)) == 2
    refused = [id_ for id_ in ids if outcomes(meta.shop, id_) == ["refused", "accepted"]]
    assert refused  # and whoever came later found the new one
    assert all(outcomes(meta.shop, id_) == ["accepted"] for id_ in ids if id_ not in refused)
    assert lane(meta.shop)["hold"] is None


@pytest.mark.parametrize("code", [100, 131053])
def test_a_message_that_is_refused_with_a_fresh_file_as_well_fails(meta: Meta, code: int) -> None:
    client.faults(meta.url, kind="code", code=code, http=400)
    id_ = queue_image(meta.shop, a_file(meta.shop))

    finish(meta.shop)

    stored = message(meta.shop, id_)
    assert (stored["status"], stored["error_code"]) == ("failed", str(code))
    assert (outcomes(meta.shop, id_), len(uploads(meta))) == (["refused"] * 2, 2)
    assert taken(meta.shop) == []


def test_a_message_without_a_file_of_ours_is_not_tried_again_for_such_a_refusal(meta: Meta) -> None:
    (id_,) = queue(meta.shop, image={"id": "1037543291543636"})

    finish(meta.shop)

    assert (message(meta.shop, id_)["status"], outcomes(meta.shop, id_), uploads(meta)) == ("failed", ["refused"], [])


# -- uploads that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "upload_code", "code": 131000, "http": 500},
        {"kind": "upload_code", "code": 2, "http": 503},
        {"kind": "upload_reset"},
        {"kind": "upload_html"},
        {"kind": "upload_garbage"},
        {"kind": "upload_empty"},
        {"kind": "upload_gzip"},
        {"kind": "upload_huge"},
        {"kind": "upload_redirect", "location": "http://127.0.0.1:9/"},
    ],
    ids=lambda fault: str(fault.get("code", fault["kind"])),
)
def test_a_failure_that_may_pass_is_tried_again_and_the_message_is_sent_once(meta: Meta, fault: dict[str, Any]) -> None:
    client.faults(meta.url, **fault, count=2)
    id_ = queue_image(meta.shop, a_file(meta.shop))

    send(meta.shop)
    waiting = message(meta.shop, id_)
    assert (waiting["status"], waiting["attempts"], waiting["tries"]) == ("queued", 0, 1)
    assert waiting["due_at"] > datetime.now(UTC) - timedelta(seconds=60)
    assert waiting["error_code"] is not None

    finish(meta.shop)

    stored = message(meta.shop, id_)
    assert (stored["status"], stored["error_code"], outcomes(meta.shop, id_)) == ("sent", None, ["accepted"])
    assert len([one for one in meta.calls() if one["outcome"] == "accepted"]) == 1
    assert letters(meta.shop) == []


def test_an_upload_that_always_fails_fails_its_messages_and_an_operator_hears_of_it(meta: Meta) -> None:
    client.faults(meta.url, kind="upload_html")
    ids = [queue_image(meta.shop, a_file(meta.shop), to=whom) for whom in people(2)]

    for _ in range(60):
        make_due(meta.shop)
        probe_at_once(meta.shop)
        send(meta.shop)
        if set(statuses(meta.shop)) == {"failed"}:
            break

    assert statuses(meta.shop) == ["failed"] * 2
    assert {message(meta.shop, id_)["error_code"] for id_ in ids} == {"upload_failed"}
    assert (meta.calls(), len(letters(meta.shop))) == ([], 2)


def probe_at_once(shop: Shop) -> None:
    """A hold ends, as an operator would have it."""
    with db.session() as s:
        Lane.resume(s, shop.channel.id)


def test_what_the_provider_will_never_take_fails_all_that_wait_for_it_and_lets_others_pass(meta: Meta) -> None:
    client.faults(meta.url, kind="upload_code", code=131053, http=400)
    media_id = a_file(meta.shop)
    ids = [queue_image(meta.shop, media_id, to=whom) for whom in people(20)]
    (after,) = queue(meta.shop, "depois", to=people(1)[0])

    send(meta.shop)
    send(meta.shop)

    assert {(message(meta.shop, id_)["status"], message(meta.shop, id_)["error_code"]) for id_ in ids} == {
        ("failed", "131053")
    }
    assert len(uploads(meta)) == 1
    assert (message(meta.shop, after)["status"], meta.accepted()) == ("sent", ["depois"])


def test_a_refused_token_holds_the_lane_and_one_upload_at_a_time_probes(meta: Meta) -> None:
    client.rules(meta.url, access_token="EAAB-another")
    ids = [queue_image(meta.shop, a_file(meta.shop, str(n)), to=whom) for n, whom in enumerate(people(3))]

    send(meta.shop)
    held = lane(meta.shop)
    assert (held["hold"], held["hold_code"], held["token"]) == ("auth", "190", None)
    before = len(uploads(meta))
    make_due(meta.shop)
    send(meta.shop)

    assert len(uploads(meta)) == before + 1
    still = lane(meta.shop)
    assert (still["hold"], still["probes"]) == ("auth", held["probes"] + 1)
    assert still["next_probe_at"] > datetime.now(UTC) + timedelta(seconds=20)
    assert {(message(meta.shop, id_)["tries"], message(meta.shop, id_)["attempts"]) for id_ in ids} == {(0, 0)}
    client.clear_rules(meta.url)
    client.rules(meta.url, statuses={"words": []})
    finish(meta.shop)
    assert (statuses(meta.shop), lane(meta.shop)["hold"]) == (["sent"] * 3, None)


def test_a_limit_of_the_number_pauses_the_lane_and_costs_no_try(meta: Meta) -> None:
    client.faults(meta.url, kind="upload_code", code=130429, http=429, count=1)
    id_ = queue_image(meta.shop, a_file(meta.shop))

    send(meta.shop)
    paused = lane(meta.shop)
    stored = message(meta.shop, id_)
    assert (paused["pause_code"], stored["status"], stored["tries"]) == ("130429", "queued", 0)

    finish(meta.shop)
    assert statuses(meta.shop) == ["sent"]


def test_a_provider_that_cannot_be_reached_costs_nothing_and_is_an_outage(
    meta: Meta, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [queue_image(meta.shop, a_file(meta.shop, str(n)), to=whom) for n, whom in enumerate(people(4))]
    with graph_is_at(monkeypatch, "http://127.0.0.1:9"):
        send(meta.shop)

        assert lane(meta.shop)["hold"] == "outage"
        for _ in range(3):
            make_due(meta.shop)
            send(meta.shop)

        found = [message(meta.shop, id_) for id_ in ids]
        assert {(one["status"], one["tries"], one["attempts"]) for one in found} == {("queued", 0, 0)}
    finish(meta.shop)
    assert (statuses(meta.shop), lane(meta.shop)["hold"]) == (["sent"] * 4, None)


def test_an_operators_hold_lets_no_file_up(meta: Meta) -> None:
    queue_image(meta.shop, a_file(meta.shop))
    with db.session() as s:
        Lane.set_hold(s, meta.shop.channel.id, Hold.OPERATOR, code=None, reason="on holiday")
    make_due(meta.shop)

    send(meta.shop)

    assert (uploads(meta), statuses(meta.shop)) == ([], ["queued"])


# -- the storage -----------------------------------------------------------------------------------------------------


def test_a_storage_that_is_away_is_waited_for_without_end(meta: Meta, folder: Path) -> None:
    id_ = queue_image(meta.shop, a_file(meta.shop))
    (other,) = queue(meta.shop, "um", to=OTHER)
    folder.rename(folder.with_name("elsewhere"))

    for _ in range(8):
        make_due(meta.shop)
        send(meta.shop)

    waiting = message(meta.shop, id_)
    assert (waiting["status"], waiting["tries"], waiting["error_code"]) == ("queued", 0, "storage_unavailable")
    assert (message(meta.shop, other)["status"], lane(meta.shop)["hold"]) == ("sent", None)
    folder.with_name("elsewhere").rename(folder)
    finish(meta.shop)
    assert (message(meta.shop, id_)["status"], message(meta.shop, id_)["error"]) == ("sent", None)


@pytest.mark.parametrize("change", ["removed", "cut off", "longer"])
def test_a_file_that_the_storage_lost_or_changed_fails_its_message(meta: Meta, folder: Path, change: str) -> None:
    id_ = queue_image(meta.shop, a_file(meta.shop, size=600_000))
    (stored,) = [path for path in folder.rglob("*.jpg") if path.is_file()]
    if change == "removed":
        stored.unlink()
    else:
        content = stored.read_bytes()
        stored.write_bytes(content[:-1] if change == "cut off" else content + b"x")

    finish(meta.shop)

    found = message(meta.shop, id_)
    assert (found["status"], found["error_code"], found["attempts"]) == ("failed", "file_missing", 0)
    assert (meta.calls(), taken(meta.shop)) == ([], [])


def test_a_file_whose_row_is_gone_fails_its_message(meta: Meta) -> None:
    media_id = a_file(meta.shop)
    id_ = queue_image(meta.shop, media_id)
    with db.session([meta.shop.tenant.id]) as s:
        s.execute(text("DELETE FROM media WHERE id = :id"), {"id": media_id})

    finish(meta.shop)

    assert (message(meta.shop, id_)["status"], message(meta.shop, id_)["error_code"]) == ("failed", "file_missing")


def test_a_message_whose_24_hours_are_over_uploads_nothing(meta: Meta) -> None:
    id_ = queue_image(meta.shop, a_file(meta.shop))
    with db.session([meta.shop.tenant.id]) as s:
        s.execute(text("UPDATE conversation SET window_until = now() - interval '1 minute'"))

    finish(meta.shop)

    assert (message(meta.shop, id_)["error_code"], uploads(meta)) == ("131047", [])


# -- while a file goes up --------------------------------------------------------------------------------------------


class SlowGraph:
    """Takes files when the test lets it, and messages at once."""

    def __init__(self, seen: list[dict[str, Any]]) -> None:
        self.url = ""
        self.may_take = threading.Event()
        self.uploads = self.now = self.most = 0
        self.seen = seen
        self.tokens: list[str] = []

    async def media(self, request: Request) -> Response:
        self.uploads, self.now = self.uploads + 1, self.now + 1
        self.most = max(self.most, self.now)
        id_ = f"file-{self.uploads}"
        try:
            async for _ in request.stream():
                pass
            await asyncio.to_thread(self.may_take.wait, PATIENCE)
        finally:
            self.now -= 1
        return JSONResponse({"id": id_})

    async def messages(self, request: Request) -> Response:
        self.seen.append(await request.json())
        self.tokens.append(request.headers["authorization"])
        return JSONResponse({"messaging_product": "whatsapp", "messages": [{"id": f"wamid.{uuid4().hex}"}]})

    def texts(self) -> list[str]:
        """Of a file, its id."""
        return [body["text"]["body"] if "text" in body else body["image"]["id"] for body in list(self.seen)]


@contextmanager
def a_slow_graph(shop: Shop, seen: list[dict[str, Any]]) -> Iterator[SlowGraph]:
    graph = SlowGraph(seen)
    routes = [
        Route("/{version}/{number}/media", graph.media, methods=["POST"]),
        Route("/{version}/{number}/messages", graph.messages, methods=["POST"]),
    ]
    with serve(Starlette(routes=routes)) as graph.url:
        yield graph
        graph.may_take.set()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Shop, SlowGraph]]:
    shop = a_shop(access_token=TOKEN)
    configure(shop, messages_per_second=1_000)
    with a_slow_graph(shop, []) as graph, graph_is_at(monkeypatch, graph.url):
        yield shop, graph


def test_others_go_on_and_the_order_of_a_conversation_stays(slow: tuple[Shop, SlowGraph]) -> None:
    shop, graph = slow
    queue(shop, "antes")
    id_ = queue_image(shop, a_file(shop))
    queue(shop, "depois")
    queue(shop, "outro", to=OTHER)
    sending = in_background(partial(send, shop))

    until(lambda: graph.uploads and len(graph.texts()) == 2, "the file, and what need not wait for it")
    (late,) = queue(shop, "mais um", to=people(1)[0])
    lanes_of_the_worker.wake(shop.channel.id)
    until(lambda: len(graph.texts()) == 3, "what was queued meanwhile")
    assert sorted(graph.texts()) == ["antes", "mais um", "outro"]
    until(lambda: message(shop, late)["status"] == "sent", "its answer to be written down")
    assert message(shop, id_)["status"] == "queued"
    graph.may_take.set()
    sending()

    assert graph.texts()[3:] == ["file-1", "depois"]
    assert (set(statuses(shop)), graph.uploads) == ({"sent"}, 1)


def test_a_lane_outlives_its_slices_while_a_file_goes_up(
    slow: tuple[Shop, SlowGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept, with its settings read anew; nobody else begins the upload a second time."""
    monkeypatch.setattr(_lanes, "_SLICE", 0.3)
    monkeypatch.setattr(_lanes, "_ALONE", 0.3)
    refreshed = []
    refresh = Line.refresh

    def noted(line: Line) -> None:
        refreshed.append(line)
        refresh(line)

    monkeypatch.setattr(Line, "refresh", noted)
    shop, graph = slow
    queue_image(shop, a_file(shop))
    sending = in_background(partial(send, shop))
    until(lambda: len(refreshed) > 2, "a few slices")
    token = lane(shop)["token"]

    with db.session([shop.tenant.id]) as s:
        s.get_one(Channel, (shop.tenant.id, shop.channel.id)).seal({"access_token": "EAAB-new"})
    so_far = len(refreshed)
    until(lambda: len(refreshed) > so_far + 1, "another slice")
    queue(shop, "outro", to=OTHER)
    with another_process() as (there, _):
        there.wake(shop.channel.id).result(PATIENCE)
    until(graph.texts, "the message")

    assert (graph.texts(), graph.tokens) == (["outro"], ["Bearer EAAB-new"])
    assert token is not None
    assert lane(shop)["token"] == token
    graph.may_take.set()
    sending()
    assert (statuses(shop), graph.uploads, lane(shop)["token"]) == (["sent", "sent"], 1, None)


def test_four_files_go_up_at_a_time_and_the_rest_follows(slow: tuple[Shop, SlowGraph]) -> None:
    shop, graph = slow
    other = another_number(shop, access_token=TOKEN)
    for n, whom in enumerate(people(12)):
        queue_image(shop if n % 3 else other, a_file(shop, str(n)), to=whom)
    sending = [in_background(partial(send, one)) for one in (shop, other)]
    until(lambda: graph.now == 4, "four uploads")
    queue(shop, "um")
    lanes_of_the_worker.wake(shop.channel.id)
    until(graph.texts, "a message beside them")
    assert graph.now == 4

    graph.may_take.set()
    for one in sending:
        one()

    assert (graph.most, graph.uploads, set(statuses(shop))) == (4, 12, {"sent"})


def test_while_a_file_goes_up_as_a_probe_nothing_else_is_tried(
    slow: tuple[Shop, SlowGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop, graph = slow
    looks: list[Line] = []
    look = Line.look

    def noted(line: Line, *args: Any, **more: Any) -> Any:
        looks.append(line)
        return look(line, *args, **more)

    monkeypatch.setattr(Line, "look", noted)
    for n, whom in enumerate(people(3)):
        queue_image(shop, a_file(shop, str(n)), to=whom)
    queue(shop, "um")
    with db.session() as s:
        Lane.set_hold(s, shop.channel.id, Hold.AUTH, code="190", reason="of this test")
    make_due(shop)
    sending = in_background(partial(send, shop))
    until(lambda: graph.now, "the upload")
    before = len(looks)

    until(lambda: len(looks) >= before + 3, "a few looks")

    assert (graph.uploads, graph.texts(), lane(shop)["hold"]) == (1, [], "auth")
    graph.may_take.set()
    sending()
    assert (set(statuses(shop)), lane(shop)["hold"]) == ({"sent"}, None)
    assert graph.texts()[0] == "file-1"


def test_a_message_may_be_cancelled_while_its_file_goes_up(slow: tuple[Shop, SlowGraph]) -> None:
    shop, graph = slow
    id_ = queue_image(shop, a_file(shop))
    sending = in_background(partial(send, shop))
    until(lambda: graph.now, "the upload")

    with db.session([shop.tenant.id]) as s:
        assert outgoing.cancel(s, shop.tenant.id, id_) == ("cancelled", True)
    graph.may_take.set()
    sending()

    assert (statuses(shop), graph.texts(), len(taken(shop))) == (["cancelled"], [], 1)


def test_a_process_that_stops_lets_another_begin_anew(slow: tuple[Shop, SlowGraph]) -> None:
    shop, graph = slow
    id_ = queue_image(shop, a_file(shop, size=3_000_000))
    with another_process() as (there, _):
        done = there.wake(shop.channel.id)
        until(lambda: graph.now, "the upload")
        there.stop()
        done.result(PATIENCE)

    left = message(shop, id_)
    assert (left["status"], left["attempts"], lane(shop)["token"]) == ("queued", 0, None)
    assert left["due_at"] <= datetime.now(UTC)
    graph.may_take.set()
    send(shop)
    assert (statuses(shop), len(graph.texts())) == (["sent"], 1)


def test_a_holder_that_lost_its_lane_lets_its_uploads_go(slow: tuple[Shop, SlowGraph]) -> None:
    shop, graph = slow
    queue_image(shop, a_file(shop))
    with another_process() as (there, _):
        done = there.wake(shop.channel.id)
        until(lambda: graph.now, "the upload")

        lease_runs_out(shop)
        done.result(PATIENCE)

    assert graph.now == 1  # the provider is still taking its time
    graph.may_take.set()
    make_due(shop)
    send(shop)
    assert (statuses(shop), len(graph.texts())) == (["sent"], 1)


def test_more_than_can_be_remembered_come_back_by_themselves(
    slow: tuple[Shop, SlowGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_uploads, "_MOST_WAITING", 3)
    shop, graph = slow
    media_id = a_file(shop)
    for whom in people(10):
        queue_image(shop, media_id, to=whom)
    queue(shop, "um")
    sending = in_background(partial(send, shop))
    until(lambda: graph.now and graph.texts(), "the upload, and a message beside it")

    graph.may_take.set()
    sending()
    assert statuses(shop).count("sent") >= 4
    finish(shop)

    assert (set(statuses(shop)), graph.uploads, len(graph.texts())) == ({"sent"}, 1, 11)


def test_a_lane_that_only_waits_for_a_file_is_looked_at_twice_a_second(
    slow: tuple[Shop, SlowGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop, graph = slow
    looks: list[float] = []
    look = Line.look

    def noted(line: Line, *args: Any, **more: Any) -> Any:
        looks.append(time.monotonic())
        return look(line, *args, **more)

    monkeypatch.setattr(Line, "look", noted)
    for whom in people(5):
        queue_image(shop, a_file(shop), to=whom)
    sending = in_background(partial(send, shop))
    until(lambda: graph.now, "the upload")
    before = len(looks)

    until(lambda: len(looks) >= before + 4, "a few looks")

    assert looks[-1] - looks[before] > 1
    graph.may_take.set()
    sending()
    assert set(statuses(shop)) == {"sent"}


# -- deaths ----------------------------------------------------------------------------------------------------------


def test_a_process_that_is_killed_while_a_file_goes_up_leaves_nothing_in_doubt(meta: Meta, tmp_path: Path) -> None:
    client.faults(meta.url, kind="upload_hang", count=1)
    id_ = queue_image(meta.shop, a_file(meta.shop))
    job = ("-m", "pombal", "run", "outgoing_message", f'["{meta.shop.channel.id}"]')
    env = {"WHATSAPP_GRAPH_URL": meta.url, "MEDIA_URL": settings().media_url}
    with running(*job, env=env, log=tmp_path / "child.log") as child:
        until(lambda: uploads(meta) or not child.alive(), "the upload")
        assert child.alive(), child.text()
        child.tell_group(signal.SIGKILL)
        child.code()

    lease_runs_out(meta.shop)
    finish(meta.shop)

    assert (message(meta.shop, id_)["status"], outcomes(meta.shop, id_)) == ("sent", ["accepted"])
    assert len(meta.calls()) == 1


def test_a_process_that_dies_between_the_upload_and_the_send_has_saved_the_next_one_the_upload(meta: Meta) -> None:
    id_ = queue_image(meta.shop, a_file(meta.shop))
    line = Line.take(meta.shop.channel.id, uuid4(), Pace(client_for_pace(settings().require_redis())))
    assert line is not None
    plan = line.turn([], under_way=[], may_begin=True)
    (upload,) = plan.uploads
    assert (plan.begun, upload.digest) == ([], make("image/jpeg", "a").digest)
    answer = Answer(Outcome.ACCEPTED, provider_id=by_hand(meta))
    line.turn([], under_way=[], may_begin=False, uploaded=[(upload, answer)])

    lease_runs_out(meta.shop)
    send(meta.shop)

    assert (message(meta.shop, id_)["status"], outcomes(meta.shop, id_)) == ("sent", ["accepted"])
    assert len(uploads(meta)) == 1


def by_hand(meta: Meta) -> str:
    """Hand the file to Meta, and say what it calls it."""
    url = f"{meta.url}/v25.0/{meta.shop.number.phone_number_id}/media"
    given = b"".join(make("image/jpeg", "a").chunks())
    answer = httpx.post(
        url,
        headers={"Authorization": f"Bearer {TOKEN}"},
        data={"messaging_product": "whatsapp", "type": "image/jpeg"},
        files={"file": ("file.jpg", given, "image/jpeg")},
    )
    return str(answer.raise_for_status().json()["id"])


@pytest.mark.parametrize("n", range(1, 9))
def test_a_commit_whose_answer_is_lost_neither_doubles_nor_loses(
    meta: Meta, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    media_id = a_file(meta.shop)
    for whom in people(3):
        queue_image(meta.shop, media_id, to=whom)
    with lost_commits(monkeypatch) as cut:
        cut.lose(n)
        send(meta.shop)

    finish(meta.shop)

    assert statuses(meta.shop) == ["sent"] * 3
    assert client.summary(meta.url)["accepted"] == 3


def test_no_log_line_and_no_row_of_the_lane_names_token_file_or_recipient(
    meta: Meta, capsys: pytest.CaptureFixture[str]
) -> None:
    client.faults(meta.url, kind="upload_code", code=131000, http=500, count=1)
    client.faults(meta.url, kind="upload_reset", count=1)
    media_id = a_file(meta.shop)
    queue_image(meta.shop, media_id, caption="segredo")

    finish(meta.shop)

    said = capsys.readouterr()
    assert "message_sent" in said.out + said.err
    digest, number = make("image/jpeg", "a").digest.hex(), meta.shop.number.phone_number_id
    for word in (TOKEN, uploads(meta)[-1]["id"], "segredo", SOMEBODY[1:], digest, number):
        assert word not in said.out + said.err
