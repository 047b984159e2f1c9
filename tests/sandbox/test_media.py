"""Files at the simulated Meta: where they are, their bytes, what goes wrong with them, and files handed in."""

import base64
import gzip
import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from sandbox import client, files, meta
from sandbox.config import Channel
from sandbox.meta import JSON
from tests.sandbox.servers import LEAVES, Receiver, a_meta
from tests.sandbox.test_app import ended, only_value
from tests.sandbox.test_graph import CUSTOMER, accepted, refused

SHOP = Channel("shop", "880011223344556", "700100200300400", "5511955550199", "token-1")
OTHER = Channel("other", "880011223344557", "700100200300401", "5511955550198", "token-2")
BEARER = {"Authorization": "Bearer token-1"}
OTHERS_BEARER = {"Authorization": "Bearer token-2"}
MB = 2**20
GONE = (400, 100, 33)


@pytest.fixture(scope="module")
def running(there: Receiver) -> Iterator[str]:
    with a_meta(SHOP, OTHER, webhook_url=there.url) as address:
        yield address


@pytest.fixture
def control(running: str, there: Receiver) -> str:
    """A sandbox as good as new, which sends no statuses."""
    client.clear_faults(running)
    client.clear_rules(running)
    client.rules(running, statuses={"words": []})
    idle(running)
    client.clear_media(running)
    client.clear_media_files(running)
    client.clear_calls(running)
    there.accepted.clear()
    return running


@pytest.fixture
def graph(control: str) -> Iterator[httpx.Client]:
    """A client of the shop."""
    with httpx.Client(base_url=f"{control}/v25.0", headers=BEARER, trust_env=False) as http:
        yield http


def idle(control: str) -> None:
    """Wait until the sandbox has noticed that every client is served or gone."""
    while client.media_summary(control)["in_flight"]:
        pass


def a_file(control: str, there: Receiver, type_: str = "image", channel: str = "shop", **more: Any) -> JSON:
    """What a webhook says of a file that a customer has just sent."""
    client.send(control, channel, type_, **more)
    said: JSON = only_value(there.accepted[-1])["messages"][0][type_]
    return said


def resolved(graph: httpx.Client, id_: str, number: str | None = SHOP.phone_number_id) -> JSON:
    return accepted(graph.get(f"/{id_}", params={"phone_number_id": number} if number else {}))


def gone(answer: httpx.Response) -> tuple[int, int, int]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["error_subcode"]


def sha256(answer: httpx.Response) -> str:
    return hashlib.sha256(answer.content).hexdigest()


def events(control: str, kind: str) -> list[JSON]:
    idle(control)
    found: list[JSON] = client.media(control, kind=kind)["media"]
    return found


def last(control: str, kind: str) -> JSON:
    return events(control, kind)[-1]


def a_part(content: bytes = b"x", mime_type: str = "image/jpeg", **fields: str) -> dict[str, Any]:
    data = {"messaging_product": "whatsapp", "type": mime_type} | fields
    return {"data": data, "files": {"file": ("a.bin", content, mime_type)}}


def uploaded(graph: httpx.Client, content: bytes = b"x", mime_type: str = "image/jpeg") -> str:
    answer = accepted(graph.post(f"/{SHOP.phone_number_id}/media", **a_part(content, mime_type)))
    id_: str = answer["id"]
    return id_


def sent(graph: httpx.Client, id_: str, type_: str = "image", **more: Any) -> httpx.Response:
    body = {"messaging_product": "whatsapp", "to": CUSTOMER, "type": type_, type_: {"id": id_}}
    return graph.post(f"/{SHOP.phone_number_id}/messages", json=body, **more)


# What a customer sends


@pytest.mark.parametrize("type_", meta.MEDIA_TYPES)
def test_a_file_in_a_webhook_is_what_the_webhook_says(
    graph: httpx.Client, control: str, there: Receiver, type_: str
) -> None:
    said = a_file(control, there, type_)

    found = resolved(graph, said["id"])
    got = graph.get(found["url"])

    assert (found["messaging_product"], found["id"], found["mime_type"]) == ("whatsapp", said["id"], said["mime_type"])
    assert found["sha256"] == base64.b64decode(said["sha256"]).hex() == sha256(got)
    assert found["file_size"] == len(got.content) == int(got.headers["content-length"])
    assert got.headers["content-type"] == said["mime_type"]
    assert got.content == b"".join(files.make(said["mime_type"], said["id"]).chunks())


def test_the_url_in_a_webhook_is_good_too(graph: httpx.Client, control: str, there: Receiver) -> None:
    said = a_file(control, there)

    got = graph.get(said["url"])

    assert said["url"].startswith(f"{control}/media/whatsapp_business/attachments/?mid={said['id']}&ext=")
    assert sha256(got) == base64.b64decode(said["sha256"]).hex()


def test_every_file_of_a_run_is_served(graph: httpx.Client, control: str, there: Receiver) -> None:
    run_id = client.traffic(control, ["shop", "other"], bodies=20, seed=3, malformed=0, per_body=[5, 9])["id"]
    ended(control, run_id)
    changes = [change for raw in there.accepted for entry in json.loads(raw)["entry"] for change in entry["changes"]]
    values = [change["value"] for change in changes]
    told = {
        message[message["type"]]["id"]: (value["metadata"]["phone_number_id"], message[message["type"]])
        for value in values
        for message in value.get("messages", [])
        if message["type"] in meta.MEDIA_TYPES
    }

    for id_, (number, said) in told.items():
        bearer = BEARER if number == SHOP.phone_number_id else OTHERS_BEARER
        assert sha256(graph.get(said["url"], headers=bearer)) == base64.b64decode(said["sha256"]).hex()
        strange = OTHER.phone_number_id if number == SHOP.phone_number_id else SHOP.phone_number_id
        theirs = OTHERS_BEARER if number == SHOP.phone_number_id else BEARER
        assert gone(graph.get(f"/{id_}?phone_number_id={strange}", headers=theirs)) == GONE
    assert len({number for number, _ in told.values()}) == 2
    summary = client.media_summary(control)
    assert (summary["files"], summary["by_file_max"]) == (len(told), 1)


def test_a_file_that_another_program_tells_of_is_served_to_who_asks_first(graph: httpx.Client) -> None:
    said = meta.message("video", "wamid.ELSEWHERE", "5511944440001", 1_788_000_000)["video"]

    found = resolved(graph, said["id"])

    assert sha256(graph.get(found["url"])) == found["sha256"] == base64.b64decode(said["sha256"]).hex()
    other = graph.get(f"/{said['id']}?phone_number_id={OTHER.phone_number_id}", headers=OTHERS_BEARER)
    assert gone(other) == GONE


def test_ids_of_all_types_are_told_apart() -> None:
    ids = {type_: meta.media_id(type_, "wamid.X") for type_ in meta.MEDIA_TYPES}

    assert len(set(ids.values())) == len(ids)
    assert {type_: meta.media_type(id_) for type_, id_ in ids.items()} == {type_: type_ for type_ in ids}
    assert [meta.media_type(id_) for id_ in ("9", "910059999999999", "919000000000000", "x")] == [None] * 4


# Who may have it


@pytest.mark.parametrize("headers", [{"Authorization": ""}, {"Authorization": "Bearer wrong"}])
def test_nothing_is_to_be_had_without_the_channels_token(
    graph: httpx.Client, control: str, there: Receiver, headers: dict[str, str]
) -> None:
    id_ = a_file(control, there)["id"]
    url = resolved(graph, id_)["url"]
    jpeg = a_part()

    asked = graph.get(f"/{id_}", headers=headers)
    deleted = graph.delete(f"/{id_}", headers=headers)
    handed_in = graph.post(f"/{SHOP.phone_number_id}/media", headers=headers, **jpeg)
    got = graph.get(url, headers=headers)

    assert [refused(answer) for answer in (asked, deleted, handed_in)] == [(401, 190)] * 3
    assert (got.status_code, got.content) == (401, b"")
    resolved(graph, id_)


@pytest.mark.parametrize("number", [OTHER.phone_number_id, "123"])
def test_a_file_is_not_there_for_another_number(
    graph: httpx.Client, control: str, there: Receiver, number: str
) -> None:
    id_ = a_file(control, there)["id"]
    bearer = OTHERS_BEARER if number == OTHER.phone_number_id else BEARER

    answer = graph.get(f"/{id_}", params={"phone_number_id": number}, headers=bearer)

    assert gone(answer) == GONE
    assert f"Object with ID '{id_}' does not exist" in answer.json()["error"]["message"]
    resolved(graph, id_, None)


def test_an_id_that_is_not_there_is_graphs_error_100(graph: httpx.Client) -> None:
    assert gone(graph.get("/123456")) == GONE
    assert gone(graph.delete("/123456")) == GONE
    assert gone(graph.post("/123456")) == GONE


def test_only_a_urls_own_hash_counts(graph: httpx.Client, control: str, there: Receiver) -> None:
    mine, other = (resolved(graph, a_file(control, there)["id"])["url"] for _ in range(2))
    proof = parse_qs(urlsplit(mine).query)["hash"][0]
    expires = parse_qs(urlsplit(mine).query)["ext"][0]

    wrong = [
        mine.replace(proof, parse_qs(urlsplit(other).query)["hash"][0]),
        mine.replace(proof, "é"),
        mine.replace(f"&hash={proof}", ""),
        mine.replace(expires, str(int(expires) + 1)),
        mine.replace(expires, "soon"),
        mine.replace("mid=9", "mid=8"),
    ]

    assert [graph.get(url).status_code for url in wrong] == [404] * len(wrong)
    assert graph.get(mine).status_code == 200
    assert graph.post(mine).status_code == 405


def test_a_url_runs_out_and_is_told_anew(graph: httpx.Client, control: str, there: Receiver) -> None:
    client.rules(control, "shop", url_seconds=0)
    said = a_file(control, there)

    assert graph.get(said["url"]).status_code == 404
    assert graph.get(resolved(graph, said["id"])["url"]).status_code == 404

    client.rules(control, url_seconds=1000)
    assert graph.get(resolved(graph, said["id"])["url"]).status_code == 200


def test_an_id_runs_out(graph: httpx.Client, control: str, there: Receiver) -> None:
    said = a_file(control, there)
    url = resolved(graph, said["id"])["url"]

    client.rules(control, media_seconds=0)

    assert gone(graph.get(f"/{said['id']}")) == GONE
    assert graph.get(url).status_code == 404


def test_a_deleted_file_is_gone(graph: httpx.Client, control: str, there: Receiver) -> None:
    said = a_file(control, there)

    answer = graph.delete(f"/{said['id']}?phone_number_id={SHOP.phone_number_id}")

    assert accepted(answer) == {"success": True}
    assert gone(graph.get(f"/{said['id']}")) == GONE
    assert graph.get(said["url"]).status_code == 404
    assert (last(control, "delete")["id"], client.media_summary(control)["deletes"]) == (said["id"], 1)


# Any size, any content


def test_files_can_have_any_size(graph: httpx.Client, control: str, there: Receiver) -> None:
    client.rules(control, media_bytes=3 * MB + 1)
    said = a_file(control, there, "document")
    client.rules(control, media_bytes=None)  # what was sent stays as large as it was

    found = resolved(graph, said["id"])
    with graph.stream("GET", found["url"]) as got:
        pieces = list(got.iter_raw())

    assert found["file_size"] == sum(map(len, pieces)) == 3 * MB + 1
    assert hashlib.sha256(b"".join(pieces)).hexdigest() == found["sha256"]
    assert base64.b64decode(said["sha256"]).hex() == found["sha256"]


def test_a_file_of_ones_own_is_served_and_counted(graph: httpx.Client, control: str, there: Receiver) -> None:
    added = client.add_media_file(control, "image/jpeg", b"<html>", channel="shop", filename="../x.php", id="77")
    said = a_file(control, there, "document", object=added["object"])

    got = [graph.get(resolved(graph, "77")["url"]) for _ in range(2)]

    assert added["id"] == said["id"] == "77"
    assert (said["filename"], said["mime_type"]) == ("../x.php", "image/jpeg")
    assert [one.content for one in got] == [b"<html>"] * 2
    assert graph.get(said["url"]).content == b"<html>"
    (file,) = client.media_files(control)["files"]
    assert (file["id"], file["resolved"], file["downloaded"], file["file_size"]) == ("77", 2, 3, 6)


def test_a_made_file_is_as_its_size_and_seed_say(graph: httpx.Client, control: str) -> None:
    one, same, other = (
        client.add_media_file(control, "application/pdf", size=MB, seed=seed, channel="shop") for seed in (1, 1, 2)
    )

    found = [resolved(graph, added["id"]) for added in (one, same, other)]

    assert found[0]["sha256"] == found[1]["sha256"] != found[2]["sha256"]
    got = graph.get(found[0]["url"])
    assert (len(got.content), sha256(got)) == (MB, found[0]["sha256"])
    assert len({one["id"], same["id"], other["id"]}) == 3


def test_an_empty_file_is_served(graph: httpx.Client, control: str) -> None:
    url = client.add_media_file(control, "text/plain", b"")["object"]["url"]

    got = graph.get(url)

    assert (got.status_code, got.content, got.headers["content-length"]) == (200, b"", "0")
    assert last(control, "download")["whole"] is True


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"channel": "nobody"}, "no channel 'nobody'"),
        ({"size": 1}, "the smallest file"),
        ({"content": b"x", "size": 9}, "either base64"),
        ({"id": "../x"}, "regex"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(control: str, asked: dict[str, Any], reason: str) -> None:
    with pytest.raises(client.SandboxError, match=reason):
        client.add_media_file(control, "image/jpeg", **asked)

    assert client.media_files(control) == {"files": []}


def test_what_is_not_base64_is_refused(control: str) -> None:
    answer = httpx.post(f"{control}/meta/media-files", json={"mime_type": "image/jpeg", "base64": "?"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "INVALID_PAYLOAD")


# The journal


def test_the_journal_tells_what_was_asked_and_given(graph: httpx.Client, control: str, there: Receiver) -> None:
    id_ = a_file(control, there)["id"]
    found = resolved(graph, id_)
    graph.get(found["url"])
    graph.get(found["url"], headers={"Authorization": ""})

    resolve, whole, bare = (client.media(control)["media"][i] for i in range(3))

    assert (resolve["kind"], resolve["id"], resolve["channel"], resolve["http"]) == ("resolve", id_, "shop", 200)
    assert (whole["kind"], whole["id"], whole["channel"], whole["http"]) == ("download", id_, "shop", 200)
    assert (whole["bytes"], whole["whole"], whole["answered"], whole["authorization"]) == (
        found["file_size"],
        True,
        True,
        True,
    )
    assert (bare["http"], bare["bytes"], bare["whole"], bare["authorization"]) == (401, 0, False, False)
    assert [event["n"] for event in client.media(control, after=resolve["n"])["media"]] == [whole["n"], bare["n"]]
    assert client.media(control, kind="resolve", id="1") == {"media": []}
    assert client.media(control, limit=1)["media"] == [bare]
    assert client.media_summary(control) == {
        "resolves": 1,
        "downloads": 2,
        "whole": 1,
        "files": 1,
        "by_file_max": 1,
        "bytes": found["file_size"],
        "elsewhere": 0,
        "uploads": 0,
        "uploaded_bytes": 0,
        "deletes": 0,
        "by_fault": {},
        "in_flight": 0,
    }
    assert "token-1" not in json.dumps(client.media(control))


def test_a_client_that_stops_reading_has_not_had_it_all(graph: httpx.Client, control: str) -> None:
    url = client.add_media_file(control, "video/mp4", size=64 * MB)["object"]["url"]

    with graph.stream("GET", url) as got:
        next(got.iter_raw())

    event = last(control, "download")
    assert (event["http"], event["whole"], event["answered"]) == (200, False, False)
    assert event["bytes"] < 64 * MB


# Uploads


def test_an_upload_can_be_sent_by_its_number_alone(graph: httpx.Client, control: str) -> None:
    content = b"".join(files.make("image/png", "a", 100_001).chunks()) + b"\r\n--\r\n\r\n"

    id_ = uploaded(graph, content, "image/png")

    event = last(control, "upload")
    assert (event["id"], event["channel"], event["bytes"], event["whole"]) == (id_, "shop", len(content), True)
    assert (event["mime_type"], event["sha256"]) == ("image/png", hashlib.sha256(content).hexdigest())
    accepted(sent(graph, id_))
    body = {"messaging_product": "whatsapp", "to": CUSTOMER, "type": "image", "image": {"id": id_}}
    other = graph.post(f"/{OTHER.phone_number_id}/messages", json=body, headers=OTHERS_BEARER)
    assert refused(other) == (400, 100)
    assert other.json()["error"]["message"] == (
        "(#100) Param image['id'] is not a valid whatsapp business account media attachment ID"
    )


def test_an_upload_can_be_read_back(graph: httpx.Client) -> None:
    id_ = uploaded(graph, b"\0\xff\r\n" * 1000, "audio/ogg; codecs=opus")

    found = resolved(graph, id_)
    got = graph.get(found["url"])

    assert got.content == b"\0\xff\r\n" * 1000
    assert (found["mime_type"], found["sha256"]) == ("audio/ogg; codecs=opus", sha256(got))
    assert gone(graph.get(f"/{id_}?phone_number_id={OTHER.phone_number_id}", headers=OTHERS_BEARER)) == GONE


def test_an_upload_runs_out(graph: httpx.Client, control: str) -> None:
    client.rules(control, upload_seconds=0)

    id_ = uploaded(graph)

    assert refused(sent(graph, id_)) == (400, 100)
    assert gone(graph.get(f"/{id_}")) == GONE


def test_a_deleted_upload_cannot_be_sent(graph: httpx.Client) -> None:
    id_ = uploaded(graph)
    accepted(sent(graph, id_))

    accepted(graph.delete(f"/{id_}?phone_number_id={SHOP.phone_number_id}"))

    assert refused(sent(graph, id_)) == (400, 100)


def test_a_file_is_sent_as_what_it_is(graph: httpx.Client) -> None:
    assert refused(sent(graph, uploaded(graph, mime_type="image/webp"), "image")) == (400, 131053)


def test_ids_of_received_files_cannot_be_sent_unless_the_rule_is_off(
    graph: httpx.Client, control: str, there: Receiver
) -> None:
    id_ = a_file(control, there)["id"]

    assert refused(sent(graph, id_)) == (400, 100)

    client.rules(control, check_media=False)
    accepted(sent(graph, id_))


@pytest.mark.parametrize(
    ("mime_type", "most"),
    [
        ("image/jpeg", 5 * MB),
        ("image/webp", 100 * 1024),
        ("audio/aac", 16 * MB),
        ("video/3gpp", 16 * MB),
    ],
)
def test_each_kind_has_its_largest_size(graph: httpx.Client, mime_type: str, most: int) -> None:
    too_large = graph.post(f"/{SHOP.phone_number_id}/media", **a_part(bytes(most + 1), mime_type))
    empty = graph.post(f"/{SHOP.phone_number_id}/media", **a_part(b"", mime_type))

    assert refused(too_large) == refused(empty) == (400, 131053)
    uploaded(graph, bytes(most), mime_type)


def test_an_animated_sticker_may_be_larger(graph: httpx.Client) -> None:
    animated = b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\x02"

    uploaded(graph, animated.ljust(500 * 1024), "image/webp")
    answer = graph.post(f"/{SHOP.phone_number_id}/media", **a_part(animated.ljust(500 * 1024 + 1), "image/webp"))

    assert refused(answer) == (400, 131053)


def test_a_document_is_larger_than_any_other_file(graph: httpx.Client, control: str) -> None:
    uploaded(graph, bytes(17 * MB), "application/pdf")

    assert client.media_summary(control)["uploaded_bytes"] == 17 * MB


def test_a_body_has_a_largest_size(graph: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox.media.MAX_UPLOAD", MB)

    answer = graph.post(f"/{SHOP.phone_number_id}/media", **a_part(bytes(MB), "image/jpeg"))

    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (a_part(mime_type="image/gif"), "Received file of type 'image/gif'"),
        (a_part(type="image/gif"), "Received file of type 'image/gif'"),
        (a_part(type="image/png"), "Invalid parameter"),
        ({**a_part(), "files": {"file": ("a.jpg", b"x", "application/octet-stream")}}, "application/octet-stream'"),
        (a_part(messaging_product="sms"), "must be one of {WHATSAPP}"),
        ({"data": {"messaging_product": "whatsapp"}, "files": {"file": b"x"}}, "type is required"),
        ({"files": {"type": b"image/jpeg"}}, "messaging_product is required"),
        ({"data": {"messaging_product": "whatsapp"}}, "Invalid parameter"),
        ({"content": b"--b\r\n\r\nx", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}, "Invalid"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, "Invalid"),
    ],
)
def test_an_upload_that_is_wrong_is_refused(
    graph: httpx.Client, control: str, request_: dict[str, Any], reason: str
) -> None:
    answer = graph.post(f"/{SHOP.phone_number_id}/media", **request_)

    assert refused(answer) == (400, 100)
    assert reason in answer.json()["error"]["message"]
    event = last(control, "upload")
    assert (event["code"], event["bytes"], event["whole"]) == (100, 0, False)
    assert client.media_files(control) == {"files": []}


def test_an_upload_to_nobodys_number_is_refused(graph: httpx.Client) -> None:
    assert gone(graph.post("/123/media", **a_part())) == GONE


# What goes wrong when a file is looked for


def test_a_resolve_is_refused_with_any_code(graph: httpx.Client, control: str, there: Receiver) -> None:
    id_ = a_file(control, there)["id"]
    client.faults(control, "resolve_code", code=4, http=429, retry_after=9, count=1)
    client.faults(control, "resolve_gone", count=1)

    limited, not_there = graph.get(f"/{id_}"), graph.get(f"/{id_}")

    assert (refused(limited), limited.headers["retry-after"]) == ((429, 4), "9")
    assert gone(not_there) == GONE
    assert [event["code"] for event in events(control, "resolve")] == [4, 100]
    resolved(graph, id_)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("resolve_html", 502),
        ("resolve_garbage", 200),
        ("resolve_empty", 200),
        ("resolve_redirect", 302),
        ("outage", 503),
    ],
)
def test_an_answer_tells_nothing_of_a_file(
    graph: httpx.Client, control: str, there: Receiver, kind: str, status: int
) -> None:
    id_ = a_file(control, there)["id"]
    client.faults(control, kind, count=1)

    answer = graph.get(f"/{id_}")

    assert answer.status_code == status
    with pytest.raises(json.JSONDecodeError):
        answer.json()
    event = last(control, "resolve")
    assert (event["http"], event["fault"], event["answered"]) == (status, kind, True)
    resolved(graph, id_)


def test_an_answer_about_a_file_is_huge_or_slow_or_compressed(
    graph: httpx.Client, control: str, there: Receiver
) -> None:
    id_ = a_file(control, there)["id"]
    for kind in ("huge", "drip", "gzip"):
        client.faults(control, f"resolve_{kind}", count=1, ms=0)

    huge, slow, packed = (graph.get(f"/{id_}") for _ in range(3))
    client.faults(control, "resolve_latency", count=1, ms=1)
    late = graph.get(f"/{id_}")

    assert len(huge.content) > MB
    assert slow.json().keys() == packed.json().keys() == late.json().keys()
    assert packed.headers["content-encoding"] == "gzip"
    idle(control)
    assert client.media_summary(control)["by_fault"] == {
        "resolve_drip": 1,
        "resolve_gzip": 1,
        "resolve_huge": 1,
        "resolve_latency": 1,
    }


@pytest.mark.parametrize(("kind", "error"), [("resolve_hang", httpx.ReadTimeout), ("resolve_reset", httpx.ReadError)])
def test_no_answer_comes_about_a_file(
    graph: httpx.Client, control: str, there: Receiver, kind: str, error: type[Exception]
) -> None:
    id_ = a_file(control, there)["id"]
    client.faults(control, kind)

    with pytest.raises(error):
        graph.get(f"/{id_}", timeout=LEAVES)

    event = last(control, "resolve")
    assert (event["http"], event["answered"]) == (None, False)


def test_what_is_told_of_a_file_is_not_true(graph: httpx.Client, control: str, there: Receiver) -> None:
    id_ = a_file(control, there)["id"]
    true = resolved(graph, id_)
    for kind in ("wrong_hash", "wrong_size", "wrong_type"):
        client.faults(control, f"resolve_{kind}", count=1)

    hash_, size, type_ = (resolved(graph, id_) for _ in range(3))

    assert (hash_["sha256"] != true["sha256"], hash_["file_size"]) == (True, true["file_size"])
    assert (size["sha256"], size["file_size"]) == (true["sha256"], true["file_size"] + 1)
    assert (type_["mime_type"], type_["file_size"]) == ("text/html", true["file_size"])


def test_a_url_runs_out_between_the_two(graph: httpx.Client, control: str, there: Receiver) -> None:
    id_ = a_file(control, there)["id"]
    client.faults(control, "resolve_expired", count=1)

    first, second = resolved(graph, id_)["url"], resolved(graph, id_)["url"]

    assert (graph.get(first).status_code, graph.get(second).status_code) == (404, 200)


def test_a_url_leads_to_another_host(graph: httpx.Client, control: str, there: Receiver) -> None:
    id_ = a_file(control, there)["id"]
    client.faults(control, "resolve_elsewhere", count=1)
    client.faults(control, "resolve_elsewhere", location="http://169.254.169.254/latest", count=1)

    near, far = resolved(graph, id_)["url"], resolved(graph, id_)["url"]

    assert urlsplit(near).hostname == "localhost"
    assert far == "http://169.254.169.254/latest"
    graph.get(near)
    assert last(control, "elsewhere")["authorization"] is True


# What goes wrong with the bytes


@pytest.fixture
def file(control: str) -> JSON:
    """One of a million bytes."""
    added: JSON = client.add_media_file(control, "image/jpeg", size=1_000_000, channel="shop")["object"]
    return added


def had(control: str) -> tuple[int, bool, str]:
    event = last(control, "download")
    return event["bytes"], event["whole"], event["fault"]


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ({"kind": "download_status"}, 500),
        ({"kind": "download_status", "http": 404}, 404),
        ({"kind": "download_status", "http": 401}, 401),
        ({"kind": "download_status", "http": 503, "retry_after": 7}, 503),
        ({"kind": "download_html"}, 502),
        ({"kind": "download_html", "http": 200}, 200),
        ({"kind": "outage"}, 503),
    ],
)
def test_something_else_comes_instead_of_the_file(
    graph: httpx.Client, control: str, file: JSON, fault: dict[str, Any], status: int
) -> None:
    client.faults(control, **fault, count=1)

    answer = graph.get(file["url"])

    assert answer.status_code == status
    assert answer.headers.get("retry-after") == (str(fault["retry_after"]) if "retry_after" in fault else None)
    assert ("DOCTYPE" in answer.text) is (fault["kind"] != "download_status")
    assert had(control) == (0, False, fault["kind"])
    assert len(graph.get(file["url"]).content) == 1_000_000


def test_one_bit_is_another(graph: httpx.Client, control: str, file: JSON) -> None:
    true = graph.get(file["url"]).content
    client.faults(control, "download_wrong_hash")

    changed = graph.get(file["url"]).content

    assert (len(changed), changed[:-1], changed[-1]) == (1_000_000, true[:-1], true[-1] ^ 1)
    assert had(control) == (1_000_000, False, "download_wrong_hash")


def test_the_type_is_another(graph: httpx.Client, control: str, file: JSON) -> None:
    client.faults(control, "download_wrong_type")

    got = graph.get(file["url"])

    assert got.headers["content-type"] == "text/html"
    assert sha256(got) == base64.b64decode(file["sha256"]).hex()
    assert had(control) == (1_000_000, True, "download_wrong_type")


@pytest.mark.parametrize(("more", "claimed"), [({}, 1_001_000), ({"bytes": 10}, 1_000_010)])
def test_a_length_promises_more_than_there_is(
    graph: httpx.Client, control: str, file: JSON, more: JSON, claimed: int
) -> None:
    client.faults(control, "download_long_length", **more)

    with graph.stream("GET", file["url"]) as got:
        assert got.headers["content-length"] == str(claimed)
        with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
            got.read()

    assert had(control) == (1_000_000, False, "download_long_length")


@pytest.mark.parametrize(("more", "claimed"), [({}, 500_000), ({"bytes": 10}, 999_990), ({"bytes": 2_000_000}, 0)])
def test_a_length_promises_less_than_comes(
    graph: httpx.Client, control: str, file: JSON, more: JSON, claimed: int
) -> None:
    client.faults(control, "download_short_length", **more, count=1)

    got = graph.get(file["url"])

    assert (got.headers["content-length"], len(got.content)) == (str(claimed), claimed)
    assert len(graph.get(file["url"]).content) == 1_000_000  # on another connection
    assert events(control, "download")[0]["whole"] is False


def test_a_file_comes_without_a_length(graph: httpx.Client, control: str, file: JSON) -> None:
    client.faults(control, "download_no_length")

    got = graph.get(file["url"])

    assert ("content-length" in got.headers, got.headers["transfer-encoding"]) == (False, "chunked")
    assert sha256(got) == base64.b64decode(file["sha256"]).hex()
    assert had(control) == (1_000_000, True, "download_no_length")


def test_a_file_never_ends(graph: httpx.Client, control: str, file: JSON) -> None:
    client.faults(control, "download_endless")
    count = 0

    with graph.stream("GET", file["url"]) as got:
        assert "content-length" not in got.headers
        for piece in got.iter_raw():
            count += len(piece)
            if count > 5_000_000:
                break

    assert had(control)[0] >= count
    assert last(control, "download")["whole"] is False


def test_a_file_drips(graph: httpx.Client, control: str) -> None:
    url = client.add_media_file(control, "text/plain", b"0123456789")["object"]["url"]
    client.faults(control, "download_drip", bytes=4, ms=0)

    with graph.stream("GET", url) as got:
        content = b"".join(got.iter_raw())

    assert content == b"0123456789"
    assert had(control) == (10, True, "download_drip")


def test_a_dripping_file_need_not_be_waited_for(graph: httpx.Client, control: str, file: JSON) -> None:
    client.faults(control, "download_drip", ms=3_600_000)

    with pytest.raises(httpx.ReadTimeout):
        graph.get(file["url"], timeout=LEAVES)

    assert had(control) == (0, False, "download_drip")


@pytest.mark.parametrize(("more", "count"), [({}, 500_000), ({"bytes": 10}, 10), ({"bytes": 0}, 0)])
def test_a_file_stalls(graph: httpx.Client, control: str, file: JSON, more: JSON, count: int) -> None:
    client.faults(control, "download_stall", **more)
    pieces: list[bytes] = []

    with graph.stream("GET", file["url"], timeout=LEAVES) as got, pytest.raises(httpx.ReadTimeout):
        pieces.extend(got.iter_raw())

    assert sum(map(len, pieces)) == count
    assert had(control) == (count, False, "download_stall")


def test_a_file_never_begins(graph: httpx.Client, control: str, file: JSON) -> None:
    client.faults(control, "download_hang")

    with pytest.raises(httpx.ReadTimeout):
        graph.get(file["url"], timeout=LEAVES)

    assert last(control, "download")["http"] is None


@pytest.mark.parametrize(("more", "count"), [({}, 500_000), ({"bytes": 10}, 10)])
def test_a_connection_ends_early(graph: httpx.Client, control: str, file: JSON, more: JSON, count: int) -> None:
    client.faults(control, "download_close", **more)
    pieces: list[bytes] = []

    with graph.stream("GET", file["url"]) as got, pytest.raises(httpx.RemoteProtocolError):
        pieces.extend(got.iter_raw())

    assert sum(map(len, pieces)) == count
    assert had(control) == (count, False, "download_close")


def test_a_connection_is_reset(graph: httpx.Client, control: str, file: JSON) -> None:
    client.faults(control, "download_reset", bytes=10)

    with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        graph.get(file["url"])

    assert had(control) == (10, False, "download_reset")


def test_a_file_comes_compressed(graph: httpx.Client, control: str, file: JSON) -> None:
    client.faults(control, "download_gzip", count=1)
    client.faults(control, "download_gzip", bytes=50_000_000)

    with graph.stream("GET", file["url"], headers={"Accept-Encoding": "identity"}) as got:
        packed = b"".join(got.iter_raw())
    with graph.stream("GET", file["url"]) as bomb:
        zeros = b"".join(bomb.iter_raw())

    assert got.headers["content-encoding"] == bomb.headers["content-encoding"] == "gzip"
    assert hashlib.sha256(gzip.decompress(packed)).digest() == base64.b64decode(file["sha256"])
    assert len(zeros) < 100_000
    assert len(gzip.decompress(zeros)) == 50_000_000
    assert last(control, "download")["whole"] is False


def test_a_redirect_shows_whether_the_token_is_carried(graph: httpx.Client, control: str, file: JSON) -> None:
    client.faults(control, "download_redirect")

    answer = graph.get(file["url"])
    carried = graph.get(answer.headers["location"])
    followed = graph.get(file["url"], follow_redirects=True)  # httpx drops it for another host

    assert answer.status_code == 302
    assert urlsplit(answer.headers["location"]).hostname == "localhost"
    assert sha256(carried) == sha256(followed) == base64.b64decode(file["sha256"]).hex()
    assert [(event["authorization"], event["path"]) for event in events(control, "elsewhere")] == [
        (True, "/media/elsewhere/"),
        (False, "/media/elsewhere/"),
    ]
    assert had(control) == (0, False, "download_redirect")
    assert client.media_summary(control)["elsewhere"] == 2


def test_a_redirect_leads_where_it_is_told(graph: httpx.Client, control: str, file: JSON) -> None:
    there = "http://10.0.0.1/a?b=c"
    client.faults(control, "download_redirect", location=there)

    assert graph.get(file["url"]).headers["location"] == there


def test_any_path_of_the_media_host_is_journaled(graph: httpx.Client, control: str) -> None:
    assert graph.get(f"{control}/media/any/where").status_code == 404

    event = last(control, "elsewhere")
    assert (event["path"], event["id"], event["authorization"]) == ("/media/any/where", None, True)


# Uploads that go wrong


def test_an_upload_whose_answer_is_lost_is_kept(graph: httpx.Client, control: str) -> None:
    client.faults(control, "upload_html", count=1)

    assert graph.post(f"/{SHOP.phone_number_id}/media", **a_part()).status_code == 502

    (file,) = client.media_files(control)["files"]
    accepted(sent(graph, file["id"]))
    assert last(control, "upload")["fault"] == "upload_html"


@pytest.mark.parametrize(
    ("fault", "status"), [({"kind": "upload_code", "code": 131053}, 400), ({"kind": "outage"}, 503)]
)
def test_an_upload_that_is_refused_is_not_kept(
    graph: httpx.Client, control: str, fault: dict[str, Any], status: int
) -> None:
    client.faults(control, **fault)

    assert graph.post(f"/{SHOP.phone_number_id}/media", **a_part()).status_code == status

    assert client.media_files(control) == {"files": []}


# Which requests meet which fault


def test_faults_are_met_at_their_place_alone(graph: httpx.Client, control: str, file: JSON) -> None:
    for kind in ("html", "upload_html", "download_html", "resolve_html"):
        client.faults(control, kind, count=1)

    answers = [graph.get(f"/{file['id']}") for _ in range(2)]
    answers += [graph.get(file["url"]) for _ in range(2)]
    answers += [graph.post(f"/{SHOP.phone_number_id}/media", **a_part()) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [502, 200] * 3
    assert [fault["kind"] for fault in client.faults(control)["faults"]] == ["html"]


def test_a_fault_is_for_one_file_or_one_channel(graph: httpx.Client, control: str, file: JSON) -> None:
    other = client.add_media_file(control, "image/png", channel="shop")["object"]
    client.faults(control, "download_status", to=file["id"])
    client.faults(control, "download_html", channel="other")

    answers = [graph.get(one["url"]).status_code for one in (file, other)]

    assert answers == [500, 200]


def test_the_same_seed_meets_the_same_requests(graph: httpx.Client, control: str, file: JSON) -> None:
    runs = []
    for seed in (1, 1, 2):
        client.clear_faults(control)
        client.faults(control, "download_status", share=0.5, seed=seed)
        runs.append([graph.get(file["url"]).status_code for _ in range(40)])

    assert runs[0] == runs[1] != runs[2]
    assert 0 < runs[0].count(500) < 40


def test_what_is_refused_anyway_meets_no_fault(graph: httpx.Client, control: str, file: JSON) -> None:
    client.faults(control, "download_status", count=1)
    client.faults(control, "resolve_html", count=1)

    assert graph.get(file["url"], headers={"Authorization": ""}).status_code == 401
    assert gone(graph.get("/123")) == GONE

    assert [fault["met"] for fault in client.faults(control)["faults"]] == [0, 0]


def test_latencies_delay_and_add_up(graph: httpx.Client, control: str, file: JSON) -> None:
    client.faults(control, "download_latency", ms=1)
    client.faults(control, "download_latency", ms=3_600_000, count=1)

    with pytest.raises(httpx.ReadTimeout):
        graph.get(file["url"], timeout=LEAVES)

    assert last(control, "download")["http"] is None
    assert graph.get(file["url"]).status_code == 200
    assert last(control, "download")["fault"] == "download_latency"


def test_numbers_of_requests_rise(graph: httpx.Client, control: str, file: JSON) -> None:
    for _ in range(3):
        graph.get(file["url"])

    assert all(one["n"] < other["n"] for one, other in pairwise(events(control, "download")))


def test_the_sandbox_ends_though_a_file_never_does() -> None:
    with httpx.Client(headers=BEARER, trust_env=False) as http:
        with a_meta(SHOP) as control:
            url = client.add_media_file(control, "image/png", channel="shop")["object"]["url"]
            client.faults(control, "download_endless")
            answer = http.send(http.build_request("GET", url), stream=True)

        with pytest.raises(httpx.TransportError):
            answer.read()
