"""Webhook traffic from a seed, together with what a correct receiver must have kept of it.

The bodies have the faults of the real thing (whatsapp-cloud-api.md §4, §15): batches over several numbers, repeats,
disorder, statuses before their message, customers without a phone number, bodies that are no webhook at all. The same
arguments give the same bytes, always.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from types import MappingProxyType

from sandbox import meta
from sandbox.meta import JSON, LOOKASIDE, MediaHost, Number

Key = tuple[str, str]
"""(phone_number_id, wamid): what makes a message the same message (§4)."""

START = 1_788_000_000  # unix seconds

_NAMES = ("Bia Prado", "João Conceição", "Zoë Müller", "Ana Luz", "Ítalo Brandão", "李小龍")
_TEXTS = ("Bom dia", "Olá! Já saiu o pedido 44/2026?", "Quanto é à vista?", "Obrigado 😀", "ok", "linha 1\nlinha 2")
_PATHS = (
    ("sent",),
    ("sent", "delivered"),
    ("sent", "delivered", "read"),
    ("sent", "read"),  # Meta skips `delivered` when a message is read at once (§4)
    ("sent", "delivered", "read", "played"),
    ("sent", "failed"),
    ("failed",),
)
# `request_welcome` is withdrawn and only acknowledged, so it could not be looked for afterwards (§6).
_TYPES = tuple(type for type in meta.MESSAGE_TYPES if type != "request_welcome")


@dataclass
class Truth:
    """What was sent, repeats counted once."""

    incoming: dict[Key, str] = field(default_factory=dict)
    """Every incoming message and its type."""
    outgoing: set[Key] = field(default_factory=set)
    """Every message echoed from the business's phone app."""
    statuses: dict[Key, str] = field(default_factory=dict)
    """The highest status sent for an outgoing message, in the order of `meta.STATUSES`."""
    malformed: int = 0
    """Distinct bodies that are no webhook."""
    malformed_bodies: int = 0
    """The same with their repeats."""
    media: dict[str, str] = field(default_factory=dict)
    """The id of every file in an incoming message, and the phone_number_id that got it."""


@dataclass
class Traffic:
    """Raw bodies in the order to send them, and the truth about them."""

    bodies: list[bytes]
    truth: Truth


def mixed(
    seed: int,
    bodies: int = 300,
    *,
    numbers: Sequence[tuple[str, str] | Number],
    contacts: int = 200,
    duplicates: float = 0.2,
    malformed: float = 0.01,
    per_body: tuple[int, int] = (1, 50),
    statuses_for: Sequence[Key] = (),
    shuffle: bool = True,
    start: int = START,
    media_hosts: Mapping[str, MediaHost] = MappingProxyType({}),
) -> Traffic:
    """Exactly `bodies` bodies for the `numbers` (phone_number_id, waba_id) of one Meta app.

    contacts       how many customers write; one in ten hides the phone number
    duplicates     share (0..0.5) of bodies that repeat another one byte for byte, and also the share of elements that
                   repeat an element of an earlier batch
    malformed      share (0..0.5) of bodies that are no webhook; they may be repeated too. One body at least is good
    per_body       fewest and most messages, echoes and statuses in one body
    statuses_for   outgoing messages made elsewhere that shall get statuses as well
    shuffle        false keeps statuses behind their message and in order
    start          unix seconds of the first message; changes no id
    media_hosts    for each phone_number_id, where the files that it gets can be had; else at the real address

    Every outgoing message gets one status or more. Raises ValueError when `statuses_for` does not fit in.
    """
    rng = Random(seed)  # noqa: S311 - test data
    known = [Number(*number) for number in numbers]
    broken = min(round(bodies * malformed), bodies - 1)
    repeated = min(round(bodies * duplicates), bodies - broken - 1)
    sizes = [rng.randint(*per_body) for _ in range(bodies - broken - repeated)]
    repeats = round(sum(sizes) * duplicates)
    people = _customers(rng, contacts)
    hosts = {number: media_hosts.get(number.phone_number_id, LOOKASIDE) for number in known}
    elements = _elements(rng, sum(sizes) - repeats, hosts, people, statuses_for, start)
    truth = _truth(elements)

    if shuffle:
        rng.shuffle(elements)
    distinct = [_body(batch) for batch in _batches(rng, sizes, elements)]
    bad = [_malformed(rng, distinct) for _ in range(broken)]
    distinct += bad
    sent = distinct + [rng.choice(distinct) for _ in range(repeated)]
    known_bad = set(bad)
    truth.malformed = len(known_bad)
    truth.malformed_bodies = sum(raw in known_bad for raw in sent)
    if shuffle:
        rng.shuffle(sent)
    return Traffic(sent, truth)


def one_message(
    seed: int, n: int, numbers: Sequence[tuple[str, str] | Number], contacts: int = 200, start: int = START
) -> Iterator[bytes]:
    """`n` bodies of one text message each, all different, ten for each second from `start` on."""
    rng = Random(seed)  # noqa: S311 - test data
    known = [Number(*number) for number in numbers]
    people = _customers(rng, contacts)
    for i in range(n):
        customer = rng.choice(people)
        message = meta.text_message(
            meta.new_wamid(rng, customer.address), customer.address, rng.choice(_TEXTS), start + i // 10
        )
        yield _body([_Element(rng.choice(known), "messages", message, meta.contact(customer.address, customer.name))])


@dataclass(frozen=True)
class _Customer:
    address: str  # phone number, or BSUID where the phone is hidden
    name: str


@dataclass(frozen=True)
class _Element:
    """One message, echo or status, with the contact that travels beside it."""

    number: Number
    list: str  # the key under `value` that holds it
    item: JSON
    contact: JSON | None = None

    @property
    def key(self) -> Key:
        return self.number.phone_number_id, self.item["id"]


def _customers(rng: Random, count: int) -> list[_Customer]:
    people = []
    for _ in range(count):
        phone = f"55{rng.choice((11, 21, 48, 81))}9{rng.randrange(10**8):08d}"
        address = meta.user_id(phone) if rng.random() < 0.1 else phone
        people.append(_Customer(address, rng.choice(_NAMES)))
    return people


def _elements(
    rng: Random,
    count: int,
    hosts: Mapping[Number, MediaHost],
    people: list[_Customer],
    statuses_for: Sequence[Key],
    start: int,
) -> list[_Element]:
    """`count` different elements in order of time, about two in three of them incoming messages."""
    numbers = list(hosts)
    by_id = {number.phone_number_id: number for number in numbers}
    elements: list[_Element] = []
    for phone_number_id, wamid in statuses_for:
        number = by_id[phone_number_id]
        elements += _statuses(rng, rng.choice(_PATHS), number, wamid, rng.choice(people), start)
    if len(elements) > count:
        raise ValueError(f"{len(elements)} statuses do not fit into {count} elements: ask for more bodies")
    while len(elements) < count:
        at = start + len(elements) // 10
        number, customer, path = rng.choice(numbers), rng.choice(people), rng.choice(_PATHS)
        room_for_echo = count - len(elements) > len(path)
        if room_for_echo and rng.random() < 0.15:
            wamid = meta.new_wamid(rng, customer.address, outgoing=True)
            echo = meta.echo(wamid, number, customer.address, rng.choice(_TEXTS), at)
            elements.append(_Element(number, "message_echoes", echo))
            elements += _statuses(rng, path, number, wamid, customer, at)
        else:
            elements.append(_incoming(rng, number, customer, at, hosts[number]))
    return elements


def _incoming(rng: Random, number: Number, customer: _Customer, at: int, media_host: MediaHost) -> _Element:
    wamid = meta.new_wamid(rng, customer.address)
    extra: JSON = {"context": rng.choice(meta.CONTEXTS)} if rng.random() < 0.1 else {}
    if rng.random() < 0.02:
        extra["referral"] = meta.REFERRAL
    if rng.random() < 0.6:
        message = meta.message("text", wamid, customer.address, at, {"body": rng.choice(_TEXTS)}, **extra)
    else:
        variant = rng.randrange(12)
        type_ = rng.choice(_TYPES)
        message = meta.message(type_, wamid, customer.address, at, variant=variant, media_host=media_host, **extra)
    return _Element(number, "messages", message, meta.contact(customer.address, customer.name))


def _statuses(
    rng: Random, path: tuple[str, ...], number: Number, wamid: str, customer: _Customer, at: int
) -> Iterator[_Element]:
    for step, word in enumerate(path):
        item = meta.status(wamid, word, at + step, customer.address)
        # Meta leaves the contact out on `failed`, and anyone may miss it elsewhere (§7).
        beside = meta.contact(customer.address) if word != "failed" and rng.random() < 0.8 else None
        yield _Element(number, "statuses", item, beside)


def _truth(elements: list[_Element]) -> Truth:
    truth = Truth()
    for element in elements:
        if element.list == "messages":
            type_ = truth.incoming[element.key] = element.item["type"]
            if type_ in meta.MEDIA_TYPES:
                truth.media[element.item[type_]["id"]] = element.number.phone_number_id
        elif element.list == "message_echoes":
            truth.outgoing.add(element.key)
        else:
            word = element.item["status"]
            truth.statuses[element.key] = max(word, truth.statuses.get(element.key, word), key=meta.STATUSES.index)
    return truth


def _batches(rng: Random, sizes: list[int], elements: list[_Element]) -> Iterator[list[_Element]]:
    """Deal the elements out to batches of these sizes; the places that are left over repeat an earlier element."""
    places = sum(sizes)
    # Never the first place: nothing is there to repeat yet.
    repeats = set(rng.sample(range(1, places), places - len(elements)))
    dealt = 0
    place = 0
    for size in sizes:
        batch = []
        for _ in range(size):
            if place in repeats:
                batch.append(elements[rng.randrange(dealt)])
            else:
                batch.append(elements[dealt])
                dealt += 1
            place += 1
        yield batch


def _body(batch: list[_Element]) -> bytes:
    """One body: an entry for each WABA, in it a change for each number and field."""
    groups: dict[Number, list[_Element]] = {}
    for element in batch:
        groups.setdefault(element.number, []).append(element)
    entries: dict[str, list[JSON]] = {}
    for number, elements in groups.items():
        changes = entries.setdefault(number.waba_id, [])
        echoes = [element.item for element in elements if element.list == "message_echoes"]
        if echoes:
            changes.append(meta.change(number, "smb_message_echoes", {"message_echoes": echoes}))
        others = [element for element in elements if element.list != "message_echoes"]
        if others:
            changes.append(meta.change(number, "messages", _messages_value(others)))
    return meta.encode(meta.envelope(meta.entry(waba_id, changes) for waba_id, changes in entries.items()))


def _messages_value(elements: list[_Element]) -> JSON:
    contacts: dict[str, JSON] = {}
    value: JSON = {}
    for element in elements:
        if element.contact is not None:
            # One contact for each person; the one with a profile, which comes with a message, says more.
            contacts[element.contact["user_id"]] = contacts.get(element.contact["user_id"], {}) | element.contact
        value.setdefault(element.list, []).append(element.item)
    return {"contacts": list(contacts.values())} | value if contacts else value


def _malformed(rng: Random, bodies: list[bytes]) -> bytes:
    """A body that no reader can take for a webhook, different each time."""
    n = rng.getrandbits(48)
    whole = rng.choice(bodies)
    account = "whatsapp_business_account"
    return rng.choice(
        (
            b"this is not JSON %d" % n,
            whole[: rng.randrange(1, len(whole))],
            b"%d" % n,
            b'"%d"' % n,
            b'{"object":"%d\xff\xfe"}' % n,
            meta.encode([n]),
            meta.encode({"object": account, "entry": n}),
            meta.encode({"object": account, "entry": [n]}),
            meta.encode({"object": account, "entry": [{"id": "1", "changes": str(n)}]}),
            meta.encode({"object": account, "entry": [{"id": "1", "changes": [{"field": "messages", "value": n}]}]}),
        )
    )
