"""Messages on their way out through a whole fleet, and the provider's journal to hold its rows against."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple
from uuid import uuid4

import httpx

from sandbox import client
from tests.chaos.fleet import Fleet, until

FINAL = ("sent", "delivered", "read")


class Way(NamedTuple):
    """A channel that a message can be asked for."""

    tenant_id: str
    api_key: str
    id: str
    name: str


class Campaign:
    """So many channels of a fleet, known to its simulated Meta; and what was asked of them."""

    def __init__(self, fleet: Fleet, *, tenants: int, channels: int, **config: Any) -> None:
        self.fleet = fleet
        self.sandbox = str(fleet.demo["sandbox"]["meta"])
        self.asked: dict[str, str] = {}  # text → message id
        self.order: dict[tuple[str, str], list[str]] = defaultdict(list)  # (channel, recipient) → texts as accepted
        self._shops = shops = fleet.shops(tenants, channels, **config)
        self.introduce()
        self.ways = [
            Way(shop["tenant_id"], shop["api_key"], channel["id"], channel["name"])
            for shop in shops
            for channel in shop["channels"]
        ]
        client.clear_calls(self.sandbox)

    def introduce(self) -> None:
        """Tell the simulated Meta of the channels: a fleet that starts writes its file anew."""
        file = self.fleet.data / "sandbox.json"
        config = json.loads(file.read_text())
        for shop in self._shops:
            channels = [
                {name: channel[name] for name in ("name", "phone_number_id", "waba_id")}
                | {"access_token": shop["secret"]}
                for channel in shop["channels"]
            ]
            url = f"{self.fleet.url}/webhooks/whatsapp/{shop['slug']}"
            secrets = {"app_secret": shop["secret"], "verify_token": shop["secret"]}
            config["apps"].append({"url": url, **secrets, "channels": channels})
        partial = file.with_suffix(".part")
        partial.write_text(json.dumps(config))
        partial.replace(file)

    def ask(self, way: Way, recipient: str, text: str, **more: Any) -> str:
        """Ask for a message until it is accepted, as a customer does who has an idempotency key; its id."""
        body = {"channel": way.id, "to": recipient, "type": "text", "text": text, **more}
        headers = {"Authorization": f"Bearer {way.api_key}", "Idempotency-Key": uuid4().hex}
        answer: list[str] = []

        def is_accepted() -> bool:
            try:
                said = self._http.post(f"{self.fleet.url}/api/v1/messages", json=body, headers=headers)
            except httpx.HTTPError:
                return False
            assert said.status_code in (202, 503), said.text
            if said.status_code == 202:
                answer.append(said.json()["message_id"])
            return said.status_code == 202

        until(is_accepted, "the message is accepted", 120)
        self.asked[text] = answer[0]
        self.order[way.name, recipient].append(text)
        return answer[0]

    def ask_for_many(self, count: int, recipients: int) -> None:
        """`count` texts over all channels, to so many people of each, one after another to each of them."""
        todo: dict[tuple[Way, str], list[str]] = defaultdict(list)
        for n in range(count):
            way = self.ways[n % len(self.ways)]
            todo[way, f"+55119{40_000_000 + n // len(self.ways) % recipients}"].append(f"m{n}")

        def in_order(item: tuple[tuple[Way, str], list[str]]) -> None:
            for text in item[1]:
                self.ask(*item[0], text)

        with self.connected(), ThreadPoolExecutor(8) as pool:
            list(pool.map(in_order, todo.items()))

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Within it messages can be asked for."""
        with httpx.Client(timeout=10, trust_env=False) as self._http:
            yield

    _http: httpx.Client

    @contextmanager
    def asking(self, count: int, recipients: int) -> Iterator[None]:
        """`ask_for_many` in the background; the end of the block waits for it."""
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(self.ask_for_many, count, recipients)
            yield
            asking.result()

    # ----------------------------------------------------------------------------------------------------- counting

    def states(self) -> Counter[str]:
        """How many of the messages asked for are in each status."""
        rows = self.fleet.rows(
            "SELECT status, count(*) FROM message WHERE id = ANY(%s::uuid[]) GROUP BY status", list(self.asked.values())
        )
        return Counter({status: count for status, count in rows})

    def is_over(self) -> bool:
        """Whether everything is sent, or left to an operator with a letter: no answer, twice, and no status either."""
        states = self.states()  # once: they move on while one looks
        return sum(states[status] for status in FINAL) + len(self.asked_about()) == len(self.asked)

    def asked_about(self) -> set[str]:
        """The texts of which nobody knows whether they were sent."""
        query = """
            SELECT m.body #>> '{text,body}' FROM message AS m JOIN dead_letter AS d ON d.message_id = m.id
            WHERE m.id = ANY(%s::uuid[]) AND m.status = 'unknown' AND m.due_at IS NULL AND d.state = 'open'
        """
        return {row[0] for row in self.fleet.rows(query, list(self.asked.values()))}

    def story(self) -> str:
        """Where it stands, for a test that waits in vain."""
        waiting = self.fleet.rows(
            """
            SELECT m.id, status, due_at - now(), attempts, tries, unknowns, error_code, c.name FROM message AS m
            JOIN channel AS c ON c.id = m.channel_id
            WHERE m.id = ANY(%s::uuid[]) AND m.status IN ('queued', 'sending', 'unknown', 'failed') LIMIT 10
            """,
            list(self.asked.values()),
        )
        lanes = self.fleet.rows("SELECT * FROM lane WHERE next_due_at IS NOT NULL OR token IS NOT NULL LIMIT 5")
        letters = self.fleet.rows("SELECT message_id, state, error, count, created_at, last_at FROM dead_letter")
        return f"{self.states()}\n{waiting}\n{lanes}\n{letters}"

    def everything_counts(self) -> dict[str, int]:
        """The provider's journal against our rows: each message once, but for answers that were hidden; in order."""
        calls = client.calls(self.sandbox, limit=100_000)["calls"]
        accepted = Counter(
            call["text"] for call in calls if call["outcome"] == "accepted" and call["text"] in self.asked
        )
        hidden = {
            text: count
            for text, count in self.fleet.rows(
                """
                SELECT m.body #>> '{text,body}', count(*) FROM attempt AS a JOIN message AS m
                    ON (m.tenant_id, m.id) = (a.tenant_id, a.message_id)
                WHERE m.id = ANY(%s::uuid[]) AND (a.outcome = 'unknown' OR a.settled_by = 'status') GROUP BY 1
                """,
                list(self.asked.values()),
            )
        }
        unsure = self.asked_about()
        lost = set(self.asked) - set(accepted) - unsure
        assert not lost, f"{len(lost)} were never accepted"
        doubled = {text: count for text, count in accepted.items() if count > 1}
        assert {t: n for t, n in doubled.items() if n > 1 + min(1, hidden.get(t, 0))} == {}
        rows = self.fleet.rows(
            "SELECT id::text, provider_id FROM message WHERE id = ANY(%s::uuid[])", list(self.asked.values())
        )
        rows = [row for row in rows if row[1] is not None]
        wamids = {call["wamid"]: call["text"] for call in calls if call["outcome"] == "accepted"}
        by_id = {id_: text for text, id_ in self.asked.items()}
        assert len(rows) == len(self.asked) - len(unsure)
        assert [id_ for id_, wamid in rows if wamids.get(wamid) != by_id[id_]] == []
        first: dict[tuple[str, str], list[str]] = defaultdict(list)
        for call in calls:
            key = (call["channel"], call["to"])
            if call["outcome"] == "accepted" and call["text"] in self.asked and call["text"] not in first[key]:
                first[key].append(call["text"])
        assert {key: [t for t in texts if t not in unsure] for key, texts in first.items()} == {
            key: [t for t in texts if t not in unsure] for key, texts in self.order.items()
        }
        return {"accepted": sum(accepted.values()), "doubled": len(doubled), "hidden": len(hidden), "calls": len(calls)}
