import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import httpx
import pytest

from sandbox import client, meta
from sandbox.config import Channel, Template
from sandbox.meta import JSON
from tests.sandbox.servers import SECRET, Receiver, a_meta

TEMPLATES = (
    Template("pedido_enviado", "pt_BR"),
    Template("pedido_enviado", "en", status="PENDING"),
    Template("promo", "pt_BR", status="PAUSED", category="MARKETING"),
    Template("velho", "pt_BR", status="DISABLED"),
    Template("codigo", "pt_BR", category="AUTHENTICATION"),
)
SHOP = Channel("shop", "880011223344556", "700100200300400", "5511955550199", "token-1", TEMPLATES)
OTHER = Channel("other", "880011223344557", "700100200300401")
CUSTOMER = "+5511944440001"
BSUID = "BR.90000000000000001"
AT_ONCE = {"delay": [0, 0]}


@pytest.fixture(scope="module")
def running(there: Receiver) -> Iterator[str]:
    with a_meta(SHOP, OTHER, webhook_url=there.url) as address:
        yield address


@pytest.fixture
def control(running: str, there: Receiver) -> str:
    """A sandbox as good as new; statuses of earlier tests are out."""
    client.clear_faults(running)
    client.clear_rules(running)
    statuses_are_out(running)
    client.clear_calls(running)
    client.rules(running, statuses={"words": []})
    there.accepted.clear()
    return running


@pytest.fixture
def graph(control: str) -> Iterator[httpx.Client]:
    """A client of the shop's number."""
    headers = {"Authorization": "Bearer token-1"}
    with httpx.Client(base_url=f"{control}/v25.0/{SHOP.phone_number_id}", headers=headers, trust_env=False) as http:
        yield http


def statuses_are_out(control: str) -> None:
    while client.summary(control)["statuses"]["waiting"] or client.journal(control, limit=1)["pending"]:
        pass


def a_text(to: str = CUSTOMER, body: str = "Pedido confirmado", **more: Any) -> JSON:
    return {"messaging_product": "whatsapp", "to": to, "type": "text", "text": {"body": body}, **more}


def a_template(name: str, language: str, **more: Any) -> JSON:
    template = {"name": name, "language": {"code": language}}
    return {"messaging_product": "whatsapp", "type": "template", "template": template} | (more or {"to": CUSTOMER})


def accepted(answer: httpx.Response) -> JSON:
    assert answer.status_code == 200, answer.text
    body: JSON = answer.json()
    return body


def refused(answer: httpx.Response) -> tuple[int, int]:
    return answer.status_code, answer.json()["error"]["code"]


def until_refused(send: Callable[[], httpx.Response]) -> tuple[int, httpx.Response]:
    """How many calls were accepted before the first refusal, and that one."""
    for so_far in count():
        answer = send()
        if answer.status_code != 200:
            return so_far, answer
    raise AssertionError("it takes everything")


def statuses(there: Receiver) -> list[JSON]:
    entries = [entry for raw in there.accepted for entry in json.loads(raw)["entry"]]
    changes = [change for entry in entries for change in entry["changes"]]
    return [status for change in changes for status in change["value"].get("statuses", [])]


# Accepted calls


def test_a_message_is_accepted_under_a_new_wamid(graph: httpx.Client, control: str) -> None:
    first = accepted(graph.post("/messages", json=a_text(biz_opaque_callback_data="out:1")))
    second = accepted(graph.post("/messages", json=a_text()))

    assert first["messaging_product"] == "whatsapp"
    assert first["contacts"] == [{"input": CUSTOMER, "wa_id": CUSTOMER[1:], "user_id": meta.user_id(CUSTOMER[1:])}]
    assert first["messages"][0].keys() == {"id"}
    assert first["messages"][0]["id"].startswith("wamid.")
    assert first["messages"][0]["id"] != second["messages"][0]["id"]
    one, other = client.calls(control)["calls"]
    assert one["wamid"] == first["messages"][0]["id"]
    assert (one["channel"], one["to"], one["type"], one["text"]) == ("shop", CUSTOMER, "text", "Pedido confirmado")
    assert (one["callback"], other["callback"]) == ("out:1", None)
    assert (one["outcome"], one["http"], one["answered"]) == ("accepted", 200, True)


@pytest.mark.parametrize(
    "message",
    [
        {"type": "image", "image": {"link": "https://x.example/a.jpg"}},
        {"type": "document", "document": {"link": "https://x.example/a.pdf", "filename": "a.pdf", "caption": "c"}},
        {"type": "location", "location": {"latitude": -27.5, "longitude": "-48.5"}},
        {"type": "contacts", "contacts": [{"name": {"formatted_name": "Ana Luz"}}]},
        {"type": "reaction", "reaction": {"message_id": "wamid.1", "emoji": ""}},
        {"type": "interactive", "interactive": {"type": "button", "action": {"buttons": []}}},
        {"text": {"body": "x" * 4096}, "context": {"message_id": "wamid.1"}, "recipient_type": "individual"},
    ],
    ids=lambda message: message.get("type", "text"),
)
def test_every_type_is_taken(graph: httpx.Client, message: JSON) -> None:
    accepted(graph.post("/messages", json={"messaging_product": "whatsapp", "to": CUSTOMER, **message}))


def test_statuses_follow_signed_with_the_callers_mark(graph: httpx.Client, control: str, there: Receiver) -> None:
    client.rules(control, statuses=AT_ONCE)

    message = accepted(graph.post("/messages", json=a_text(biz_opaque_callback_data="out:018f:1")))["messages"][0]

    statuses_are_out(control)
    seen = statuses(there)
    assert [status["status"] for status in seen] == ["sent", "delivered", "read"]
    assert {status["id"] for status in seen} == {message["id"]}
    assert {status["biz_opaque_callback_data"] for status in seen} == {"out:018f:1"}
    assert {status["recipient_id"] for status in seen} == {CUSTOMER[1:]}
    assert {status["recipient_user_id"] for status in seen} == {meta.user_id(CUSTOMER[1:])}
    assert ["pricing" in status for status in seen] == [True, True, False]
    assert seen[0]["pricing"]["category"] == "service"
    (value,) = (json.loads(raw)["entry"][0]["changes"][0]["value"] for raw in there.accepted)
    assert value["metadata"]["phone_number_id"] == SHOP.phone_number_id
    assert value["contacts"] == [{"wa_id": CUSTOMER[1:], "user_id": meta.user_id(CUSTOMER[1:])}]
    assert there.headers[-1]["x-hub-signature-256"] == meta.sign(there.accepted[0], SECRET)


def test_a_customer_without_a_phone_is_reached_by_recipient(graph: httpx.Client, control: str, there: Receiver) -> None:
    client.rules(control, statuses=AT_ONCE)
    message = a_text() | {"recipient": BSUID}
    del message["to"]

    answer = accepted(graph.post("/messages", json=message))

    assert answer["contacts"] == [{"input": BSUID, "user_id": BSUID}]
    statuses_are_out(control)
    assert {status["recipient_user_id"] for status in statuses(there)} == {BSUID}
    assert not any("recipient_id" in status for status in statuses(there))


def test_a_bsuid_in_to_is_accepted_and_never_heard_of_again(graph: httpx.Client, control: str, there: Receiver) -> None:
    client.rules(control, statuses=AT_ONCE)

    lost = accepted(graph.post("/messages", json=a_text(to=BSUID)))["messages"][0]["id"]
    sent = accepted(graph.post("/messages", json=a_text()))["messages"][0]["id"]

    statuses_are_out(control)
    assert lost.startswith("wamid.")
    assert {status["id"] for status in statuses(there)} == {sent}


def test_a_read_message_is_marked_and_is_no_message(graph: httpx.Client, control: str, there: Receiver) -> None:
    client.rules(control, statuses=AT_ONCE)
    read = {"messaging_product": "whatsapp", "status": "read", "message_id": "wamid.1"}

    plain = graph.post("/messages", json=read)
    typing = graph.post("/messages", json=read | {"typing_indicator": {"type": "text"}})
    wrong = graph.post("/messages", json=read | {"status": "seen"})

    assert accepted(plain) == accepted(typing) == {"success": True}
    assert refused(wrong) == (400, 100)
    assert refused(graph.post("/messages", json=read | {"message_id": ""})) == (400, 131008)
    assert refused(graph.post("/messages", json=read | {"typing_indicator": {}})) == (400, 131009)
    summary = client.summary(control)
    assert (summary["calls"], summary["accepted"], summary["reads"]) == (5, 0, 2)
    assert summary["statuses"]["waiting"] == 0


@pytest.mark.parametrize(
    ("to", "wa_id"),
    [
        ("+5548955550002", "554855550002"),
        ("+554855550002", "554855550002"),
        ("+5511955550002", "5511955550002"),
        ("+351912345678", "351912345678"),
    ],
)
def test_some_brazilian_numbers_lose_their_ninth_digit(graph: httpx.Client, control: str, to: str, wa_id: str) -> None:
    assert accepted(graph.post("/messages", json=a_text(to)))["contacts"][0]["wa_id"] == to[1:]

    client.rules(control, drop_ninth_digit=True)

    assert accepted(graph.post("/messages", json=a_text(to)))["contacts"][0]["wa_id"] == wa_id


# Refused calls


@pytest.mark.parametrize("header", [{}, {"Authorization": ""}, {"Authorization": "Basic token-1"}])
def test_without_a_bearer_nothing_is_sent(graph: httpx.Client, header: dict[str, str]) -> None:
    del graph.headers["Authorization"]

    answer = graph.post("/messages", json=a_text(), headers=header)

    assert refused(answer) == (401, 190)
    assert answer.json()["error"]["type"] == "OAuthException"
    assert answer.json()["error"]["fbtrace_id"]


def test_a_token_can_be_changed_while_it_runs(graph: httpx.Client, control: str) -> None:
    assert refused(graph.post("/messages", json=a_text(), headers={"Authorization": "Bearer token-2"})) == (401, 190)

    shown = client.rules(control, "shop", access_token="token-2")

    assert refused(graph.post("/messages", json=a_text())) == (401, 190)
    accepted(graph.post("/messages", json=a_text(), headers={"Authorization": "Bearer token-2"}))
    assert "token-2" not in str(shown)
    client.rules(control, "shop", access_token=None)
    accepted(graph.post("/messages", json=a_text()))


def test_a_number_without_a_token_takes_any(control: str) -> None:
    url = f"{control}/v25.0/{OTHER.phone_number_id}/messages"

    accepted(httpx.post(url, json=a_text(), headers={"Authorization": "Bearer whatever"}))

    assert refused(httpx.post(url, json=a_text())) == (401, 190)


def test_an_unknown_number_does_not_exist(graph: httpx.Client, control: str) -> None:
    answer = graph.post(f"{control}/v25.0/123/messages", json=a_text())

    assert refused(answer) == (400, 100)
    assert answer.json()["error"]["error_subcode"] == 33
    assert client.calls(control)["calls"][0]["channel"] is None


def test_there_is_nothing_to_get_where_messages_go(graph: httpx.Client) -> None:
    assert graph.get("/messages").json()["error"]["message"].startswith("Unsupported get request. ")


TEXT = a_text()


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ([], 100),
        ({}, 100),
        (TEXT | {"messaging_product": "signal"}, 100),
        (TEXT | {"type": "hologram"}, 100),
        (TEXT | {"type": 5}, 100),
        (TEXT | {"recipient_type": "crowd"}, 100),
        (TEXT | {"to": None}, 131008),
        (TEXT | {"to": "5511944440001"}, 131009),
        (TEXT | {"to": "+55 11 94444-0001"}, 131009),
        (TEXT | {"to": 5511944440001}, 131009),
        (TEXT | {"to": None, "recipient": "+5511944440001"}, 131009),
        (TEXT | {"to": "+" + SHOP.display_phone_number}, 131021),
        (TEXT | {"context": {}}, 131009),
        (TEXT | {"biz_opaque_callback_data": "x" * 513}, 100),
        (TEXT | {"text": None}, 131008),
        (TEXT | {"text": "oi"}, 100),
        (TEXT | {"text": {"body": ""}}, 131008),
        (TEXT | {"text": {"body": "x" * 4097}}, 100),
        (TEXT | {"type": "image"}, 131008),
        (TEXT | {"type": "image", "image": {}}, 131008),
        (TEXT | {"type": "image", "image": {"id": "1", "link": "https://x.example"}}, 131009),
        (TEXT | {"type": "video", "video": {"id": 5}}, 131009),
        (TEXT | {"type": "video", "video": {"id": "5", "caption": "x" * 1025}}, 100),
        (TEXT | {"type": "location", "location": {"latitude": 5}}, 131008),
        (TEXT | {"type": "location", "location": {"latitude": 91, "longitude": 5}}, 131009),
        (TEXT | {"type": "location", "location": {"latitude": "north", "longitude": 5}}, 131009),
        (TEXT | {"type": "contacts", "contacts": {}}, 100),
        (TEXT | {"type": "contacts", "contacts": []}, 131009),
        (TEXT | {"type": "contacts", "contacts": [{"name": {}}]}, 131008),
        (TEXT | {"type": "reaction", "reaction": {"emoji": "👍"}}, 131008),
        (TEXT | {"type": "reaction", "reaction": {"message_id": "wamid.1"}}, 131008),
        (TEXT | {"type": "interactive", "interactive": {"action": {}}}, 131008),
        (TEXT | {"type": "interactive", "interactive": {"type": "list"}}, 131008),
        (TEXT | {"type": "template", "template": {"language": {"code": "en"}}}, 131008),
        (TEXT | {"type": "template", "template": {"name": "promo", "language": "en"}}, 131008),
        (TEXT | {"type": "template", "template": {"name": "a", "language": {"code": "b"}, "components": {}}}, 131009),
    ],
)
def test_a_wrong_shape_is_refused(graph: httpx.Client, control: str, message: object, code: int) -> None:
    assert refused(graph.post("/messages", json=message)) == (400, code)

    assert client.summary(control)["by_code"] == {str(code): 1}


@pytest.mark.parametrize(("content", "status"), [(b"{", 400), (b'"\xff"', 400), (b'"' + b"x" * 2**21 + b'"', 413)])
def test_what_is_no_message_is_refused(graph: httpx.Client, content: bytes, status: int) -> None:
    assert graph.post("/messages", content=content).status_code == status


# Rules


@pytest.mark.parametrize(
    ("name", "language", "refusal"),
    [
        ("pedido_enviado", "en", (404, 132001)),
        ("pedido_enviado", "pt_PT", (404, 132001)),
        ("nobody", "pt_BR", (404, 132001)),
        ("promo", "pt_BR", (400, 132015)),
        ("velho", "pt_BR", (400, 132016)),
    ],
)
def test_only_an_approved_template_is_sent(
    graph: httpx.Client, name: str, language: str, refusal: tuple[int, int]
) -> None:
    good = accepted(graph.post("/messages", json=a_template("pedido_enviado", "pt_BR")))

    assert good["messages"][0]["message_status"] == "accepted"
    assert refused(graph.post("/messages", json=a_template(name, language))) == refusal


def test_where_no_templates_are_listed_any_exists(control: str) -> None:
    url = f"{control}/v25.0/{OTHER.phone_number_id}/messages"

    accepted(httpx.post(url, json=a_template("any", "xx"), headers={"Authorization": "Bearer t"}))


def test_a_code_is_not_sent_to_a_bsuid(graph: httpx.Client) -> None:
    accepted(graph.post("/messages", json=a_template("codigo", "pt_BR")))

    assert refused(graph.post("/messages", json=a_template("codigo", "pt_BR", recipient=BSUID))) == (400, 131062)


def test_outside_the_window_only_a_template_passes(graph: httpx.Client, control: str) -> None:
    client.rules(control, window=True)

    assert refused(graph.post("/messages", json=a_text())) == (400, 131047)
    accepted(graph.post("/messages", json=a_template("pedido_enviado", "pt_BR")))
    client.say(control, "other", "oi", from_=CUSTOMER[1:])
    client.send(control, "shop", "reaction", from_=CUSTOMER[1:])
    assert refused(graph.post("/messages", json=a_text())) == (400, 131047)

    client.send(control, "shop", "image", from_=CUSTOMER[1:])

    accepted(graph.post("/messages", json=a_text()))
    by_id = a_text() | {"to": None, "recipient": meta.user_id(CUSTOMER[1:])}
    accepted(graph.post("/messages", json=by_id))
    assert refused(graph.post("/messages", json=a_text("+5511944440002"))) == (400, 131047)


def test_the_window_is_the_same_with_and_without_the_ninth_digit(graph: httpx.Client, control: str) -> None:
    client.rules(control, window=True, drop_ninth_digit=True)

    client.say(control, "shop", "oi", from_="554899990001")

    accepted(graph.post("/messages", json=a_text("+5548999990001")))


def test_a_pair_may_have_45_at_once(graph: httpx.Client, control: str) -> None:
    client.rules(control, pair=True)

    so_far, answer = until_refused(lambda: graph.post("/messages", json=a_text()))

    assert so_far >= 45
    assert refused(answer) == (400, 131056)
    accepted(graph.post("/messages", json=a_text("+5511944440002")))
    client.rules(control, "shop", pair=False)
    accepted(graph.post("/messages", json=a_text()))


def test_a_number_has_a_rate(graph: httpx.Client, control: str) -> None:
    client.rules(control, rate=3)

    so_far, answer = until_refused(lambda: graph.post("/messages", json=a_text()))

    assert so_far >= 3
    assert refused(answer) == (400, 130429)
    summary = client.summary(control)
    assert summary["rate_refusals"] == {"shop": 1}
    assert 3 <= summary["busiest_second"]["shop"] <= so_far
    client.rules(control, rate=None)
    accepted(graph.post("/messages", json=a_text()))


def test_the_newest_rule_wins(control: str) -> None:
    client.rules(control, "shop", rate=5, window=True)
    shown = client.rules(control, rate=7)

    assert shown["rules"]["rate"] == 7
    assert shown["channels"]["shop"]["rate"] == 7
    assert shown["channels"]["shop"]["window"] is True
    assert client.rules(control, "shop", rate=9)["channels"]["shop"]["rate"] == 9
    assert client.clear_rules(control) == httpx.get(f"{control}/meta/rules").json()
    assert client.clear_rules(control)["channels"] == {}


def test_rules_of_nobody_are_refused(control: str) -> None:
    with pytest.raises(client.SandboxError, match="no channel 'nobody'"):
        client.rules(control, "nobody", window=True)
    with pytest.raises(client.SandboxError, match="rate"):
        client.rules(control, rate=0)


# Statuses


def test_statuses_can_be_lost_or_come_twice(graph: httpx.Client, control: str, there: Receiver) -> None:
    client.rules(control, statuses=AT_ONCE | {"lost": 1})
    graph.post("/messages", json=a_text())
    client.rules(control, statuses=AT_ONCE | {"words": ["delivered", "played"], "duplicates": 1})
    graph.post("/messages", json=a_text())

    statuses_are_out(control)

    assert Counter(status["status"] for status in statuses(there)) == {"delivered": 2, "played": 2}


def test_a_failure_can_be_the_rule(graph: httpx.Client, control: str, there: Receiver) -> None:
    client.rules(control, statuses=AT_ONCE | {"words": ["sent", "failed"], "shuffle": True})

    graph.post("/messages", json=a_text())

    statuses_are_out(control)
    by_word = {status["status"]: status for status in statuses(there)}
    assert by_word.keys() == {"sent", "failed"}
    assert by_word["failed"]["errors"][0]["code"] == 131026


def test_many_statuses_share_bodies_and_each_comes_once(graph: httpx.Client, control: str, there: Receiver) -> None:
    client.rules(control, statuses={"delay": [0, 0.01], "shuffle": True})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: graph.post("/messages", json=a_text(body=str(n))), range(400)))

    statuses_are_out(control)
    wamids = [accepted(answer)["messages"][0]["id"] for answer in answers]
    expected = Counter((wamid, word) for wamid in wamids for word in ("sent", "delivered", "read"))
    assert Counter((status["id"], status["status"]) for status in statuses(there)) == expected
    assert len(there.accepted) < 600
    for raw in there.accepted:
        for entry in json.loads(raw)["entry"]:
            assert sum(len(change["value"]["statuses"]) for change in entry["changes"]) <= 200


# The list of templates


def test_templates_come_in_pages(control: str) -> None:
    url = f"{control}/v25.0/{SHOP.waba_id}/message_templates?limit=2"
    seen = []
    while url:
        page = accepted(httpx.get(url, headers={"Authorization": "Bearer token-1"}))
        assert len(page["data"]) <= 2
        seen += page["data"]
        url = page["paging"].get("next")

    assert [(one["name"], one["language"], one["status"], one["category"]) for one in seen] == [
        (one.name, one.language, one.status, one.category) for one in TEMPLATES
    ]
    assert len({one["id"] for one in seen}) == len(TEMPLATES)


def test_a_cursor_is_enough_to_go_on(control: str) -> None:
    url, bearer = f"{control}/v25.0/{SHOP.waba_id}/message_templates", {"Authorization": "Bearer token-1"}

    first = accepted(httpx.get(url, params={"limit": 3}, headers=bearer))
    cursor = first["paging"]["cursors"]["after"]
    rest = accepted(httpx.get(url, params={"after": cursor}, headers=bearer))

    assert len(rest["data"]) == 2
    assert "next" not in rest["paging"]
    end = accepted(httpx.get(url, params={"after": rest["paging"]["cursors"]["after"]}, headers=bearer))
    assert end == {"data": []}
    assert refused(httpx.get(url, params={"after": "?"}, headers=bearer)) == (400, 100)
    assert refused(httpx.get(url, params={"limit": "0"}, headers=bearer)) == (400, 100)


def test_templates_are_for_those_who_may_see_them(control: str) -> None:
    url = f"{control}/v25.0/{SHOP.waba_id}/message_templates"

    assert refused(httpx.get(url)) == (401, 190)
    assert refused(httpx.get(url, headers={"Authorization": "Bearer token-2"})) == (401, 190)
    nobody = httpx.get(f"{control}/v25.0/1/message_templates", headers={"Authorization": "Bearer t"})
    assert nobody.json()["error"]["error_subcode"] == 33
    others = httpx.get(f"{control}/v25.0/{OTHER.waba_id}/message_templates", headers={"Authorization": "Bearer t"})
    assert accepted(others) == {"data": []}


# The journal


def test_the_journal_is_read_in_parts(graph: httpx.Client, control: str) -> None:
    for n in range(5):
        graph.post("/messages", json=a_text(body=str(n)))
    url = f"{control}/v25.0/{OTHER.phone_number_id}/messages"
    httpx.post(url, json=a_text(body="other"), headers={"Authorization": "Bearer t"})

    def texts(**asked: Any) -> list[str]:
        return [call["text"] for call in client.calls(control, **asked)["calls"]]

    first = client.calls(control)["calls"][0]["n"]
    assert texts() == ["0", "1", "2", "3", "4", "other"]
    assert texts(limit=2) == ["4", "other"]
    assert texts(limit=2, channel="shop") == ["3", "4"]
    assert texts(limit=2, after=first) == ["1", "2"]
    assert texts(after=first + 3, channel="other") == ["other"]
    assert texts(after=first + 100) == []
    with pytest.raises(client.SandboxError, match="1 to 100000"):
        client.calls(control, limit=0)
    with pytest.raises(client.SandboxError, match="after is the number"):
        client.calls(control, after=-1)


def test_a_cleared_journal_counts_on(graph: httpx.Client, control: str) -> None:
    graph.post("/messages", json=a_text())
    before = client.calls(control)["calls"][-1]["n"]

    client.clear_calls(control)

    assert client.calls(control) == {"calls": []}
    assert client.summary(control)["accepted"] == 0
    graph.post("/messages", json=a_text())
    assert [call["n"] for call in client.calls(control, after=before)["calls"]] == [before + 1]


def test_the_summary_tells_repeats(graph: httpx.Client, control: str) -> None:
    for callback, text in (("a", "um"), ("a", "um"), ("b", "um"), ("c", "dois")):
        graph.post("/messages", json=a_text(body=text, biz_opaque_callback_data=callback))
    graph.post("/messages", json=[])

    summary = client.summary(control)

    assert (summary["calls"], summary["accepted"], summary["refused"]) == (5, 4, 1)
    assert (summary["by_callback_max"], summary["by_text_max"], summary["texts"]) == (2, 3, 2)
    assert summary["by_code"] == {"100": 1}
    assert summary["max_in_flight_per_recipient"] == 1
    assert summary["in_flight"] == 0


def test_an_unreadable_configuration_leaves_no_number(tmp_path: Any) -> None:
    from sandbox.app import create_app
    from tests.sandbox.servers import serve

    with serve(create_app(tmp_path / "none.json")) as control:
        url = f"{control}/v25.0/{SHOP.phone_number_id}/messages"

        assert refused(httpx.post(url, json=a_text(), headers={"Authorization": "Bearer token-1"})) == (400, 100)
