"""One person (or group), and each identity that a channel knows them by.

A message is matched by the strongest identity it carries: BSUID first, then phone in both Brazilian spellings
(whatsapp-cloud-api.md §5). The identity row is the one arbiter between two workers that meet somebody new at once;
a contact row is written only by the one that won.
"""

from datetime import datetime
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy import ForeignKeyConstraint, Index, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated, Tenanted, belongs_to, given_rows, id_column, rows
from pombal.ids import uuid7

_Key: TypeAlias = tuple[UUID, UUID, str, str]  # tenant, channel, kind, value of an identity


class Contact(Tenanted, Dated, Base):
    __tablename__ = "contact"
    __table_args__ = (ForeignKeyConstraint(["tenant_id"], ["tenant.id"], ondelete="CASCADE"),)

    id: Mapped[UUID] = id_column()
    name: Mapped[str | None]
    named_at: Mapped[datetime | None]  # time of the message that carried the name: a newer one wins


class ContactIdentity(Tenanted, Dated, Base):
    __tablename__ = "contact_identity"
    __table_args__ = (
        belongs_to("channel", "channel_id", ondelete="CASCADE"),
        # Checked at commit: the identity is taken first, its contact is inserted only by who took it.
        belongs_to("contact", "contact_id", ondelete="CASCADE", deferrable=True, initially="DEFERRED"),
        # Not led by the tenant: the planner, as long as it has no statistics, would use that for `_FIND` as well.
        Index("ix_contact_identity_contact_id", "contact_id", "tenant_id"),
    )

    channel_id: Mapped[UUID] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str] = mapped_column(primary_key=True)
    contact_id: Mapped[UUID]

    @staticmethod
    def owners(s: Session, keys: set[_Key]) -> dict[_Key, UUID]:
        """The contacts of those identities that somebody has."""
        if not keys:
            return {}
        found = s.execute(_FIND, given_rows([_key_row(key) for key in sorted(keys)]))
        return {(row.tenant_id, row.channel_id, row.kind, row.value): row.contact_id for row in found}

    @staticmethod
    def jids(s: Session, tenant_id: UUID, channel_id: UUID, phones: set[str]) -> dict[str, str]:
        """How WhatsApp really spells these phones (digits), as far as somebody was seen under one of their spellings.

        A Brazilian number that was registered without the ninth digit is reached without it only.
        """
        if not phones:
            return {}
        spelt = {phone: [value for _, value in spellings("phone", phone)] for phone in phones}
        keys = {(tenant_id, channel_id, "jid", value) for values in spelt.values() for value in values}
        found = {row.value: row.created_at for row in s.execute(_SEEN, given_rows([_key_row(k) for k in sorted(keys)]))}
        seen = {phone: [value for value in values if value in found] for phone, values in spelt.items()}
        # Of two the later one counts: a number may be registered anew.
        return {phone: max(values, key=lambda value: found[value]) for phone, values in seen.items() if values}

    @staticmethod
    def add(s: Session, given: list[tuple[UUID, UUID, str, str, UUID]]) -> None:
        """Note more identities of contacts: `(tenant, channel, kind, value, contact)`. One that is taken stays so."""
        keys = {
            (tenant_id, channel_id, *spelt): contact_id
            for tenant_id, channel_id, kind, value, contact_id in given
            for spelt in spellings(kind, value)
        }
        if keys:
            rows_ = [_key_row(key) | {"contact_id": keys[key]} for key in sorted(keys)]
            s.execute(_ADD, given_rows(rows_))


def spellings(kind: str, value: str) -> list[tuple[str, str]]:
    """An identity in every spelling that names the same person, the given one first.

    WhatsApp ids of Brazilian mobiles come with or without the ninth digit: 55, two digits of area, an optional 9,
    then eight digits of which the first is 6 to 9 (dependencies.md, "Brazilian ninth digit").
    """
    if kind == "phone" and value.isdecimal() and value.startswith("55"):
        if len(value) == 13 and value[4] == "9" and value[5] in "6789":
            return [(kind, value), (kind, value[:4] + value[5:])]
        if len(value) == 12 and value[4] in "6789":
            return [(kind, value), (kind, f"{value[:4]}9{value[4:]}")]
    return [(kind, value)]


class Meeting:
    """Finds or makes the contacts behind a batch of people, in few statements.

    Give it everybody with `meet`, then `settle`; `whom` then tells each one's contact.
    """

    def __init__(self) -> None:
        self._people: list[tuple[UUID, UUID, list[tuple[str, str]], list[tuple[str, str]], str | None, datetime]] = []
        self._contact_of: dict[_Key, UUID] = {}

    def meet(
        self,
        tenant_id: UUID,
        channel_id: UUID,
        identities: tuple[tuple[str, str], ...],
        aliases: tuple[tuple[str, str], ...],
        name: str | None,
        at: datetime,
    ) -> None:
        """Somebody wrote or was written to at `at`. `identities` strongest first; `aliases` are theirs from now on."""
        strong = [spelt for kind, value in identities for spelt in spellings(kind, value)]
        weak = [spelt for kind, value in aliases for spelt in spellings(kind, value)]
        self._people.append((tenant_id, channel_id, strong, weak, name, at))

    def all_of(self, tenant_id: UUID, channel_id: UUID, identities: tuple[tuple[str, str], ...]) -> list[UUID]:
        """Every contact that has one of these identities, once settled: there may be two, who are one person."""
        keys = [(tenant_id, channel_id, *identity) for identity in identities]
        return list(dict.fromkeys(self._contact_of[key] for key in keys if key in self._contact_of))

    def whom(self, tenant_id: UUID, channel_id: UUID, identities: tuple[tuple[str, str], ...]) -> UUID:
        """The contact of somebody who was met, once settled."""
        return self._contact_of[(tenant_id, channel_id, *identities[0])]

    def settle(self, s: Session) -> None:
        """Look up, take what is free, and write the contacts that are new or have a newer name."""
        keys = {(t, c, *i) for t, c, strong, weak, _, _ in self._people for i in (*strong, *weak)}
        if not keys:
            return
        names: dict[tuple[UUID, UUID], tuple[str | None, datetime | None]] = {}
        for row in s.execute(_FIND, given_rows([_key_row(key) for key in sorted(keys)])):
            self._contact_of[(row.tenant_id, row.channel_id, row.kind, row.value)] = row.contact_id
            names[(row.tenant_id, row.contact_id)] = (row.name, row.named_at)
        wanted: dict[_Key, UUID] = {}
        telling: set[_Key] = set()  # who has one of these has met somebody whom we take for new
        for tenant_id, channel_id, strong, weak, _, _ in self._people:
            mine = [(tenant_id, channel_id, *i) for i in strong]
            contact_id = next((self._contact_of[k] for k in mine if k in self._contact_of), None) or uuid7()
            for key in (*mine, *((tenant_id, channel_id, *i) for i in weak)):
                if key not in self._contact_of:
                    self._contact_of[key] = wanted[key] = contact_id
                    if key in mine and (tenant_id, contact_id) not in names:
                        telling.add(key)
        self._take(s, wanted, telling)
        self._name(s, names)

    def _take(self, s: Session, wanted: dict[_Key, UUID], telling: set[_Key]) -> None:
        if not wanted:
            return
        given = [_key_row(key) | {"contact_id": wanted[key]} for key in sorted(wanted)]
        moved: dict[UUID, UUID] = {}
        for row in s.execute(_TAKE, given_rows(given)):
            key = (row.tenant_id, row.channel_id, row.kind, row.value)
            if row.contact_id != wanted[key]:  # another batch met this person a moment earlier
                self._contact_of[key] = row.contact_id
                if key in telling:
                    moved[wanted[key]] = row.contact_id
        for ours, theirs in moved.items():
            lost = [key for key, contact_id in self._contact_of.items() if contact_id == ours]
            self._contact_of.update(dict.fromkeys(lost, theirs))
            s.execute(_MOVE, {"tenant_id": lost[0][0] if lost else None, "ours": ours, "theirs": theirs})

    def _name(self, s: Session, known: dict[tuple[UUID, UUID], tuple[str | None, datetime | None]]) -> None:
        latest: dict[tuple[UUID, UUID], tuple[datetime, str | None]] = {}
        for tenant_id, channel_id, strong, _, name, at in self._people:
            key = (tenant_id, self._contact_of[(tenant_id, channel_id, *strong[0])])
            if key not in latest or (
                name and (latest[key][1] is None or (at, name) > (latest[key][0], latest[key][1]))
            ):
                latest[key] = (at, name)
        given = []
        for (tenant_id, contact_id), (at, name) in sorted(latest.items()):
            old_name, old_at = known.get((tenant_id, contact_id), (None, None))
            is_news = (
                name is not None and name != old_name and (old_at is None or (old_at, old_name or "") < (at, name))
            )
            if is_news or (tenant_id, contact_id) not in known:
                named_at = at if name is not None else None
                given.append({"tenant_id": tenant_id, "id": contact_id, "name": name, "named_at": named_at})
        if given:
            s.execute(_WRITE, given_rows(given))


def _key_row(key: _Key) -> dict[str, Any]:
    return dict(zip(("tenant_id", "channel_id", "kind", "value"), key, strict=True))


_GIVEN_KEYS = rows(tenant_id="uuid", channel_id="uuid", kind="text", value="text")

# Key by key, whatever the statistics say: the tables are empty when this is planned first, and a join would be planned
# to read all identities of the batch's tenants. OFFSET 0 keeps the planner from making a join of it after all.
_FIND = text(f"""
    SELECT i.tenant_id, i.channel_id, i.kind, i.value, i.contact_id, c.name, c.named_at
    FROM {_GIVEN_KEYS}
    CROSS JOIN LATERAL (
        SELECT * FROM contact_identity AS i
        WHERE (i.tenant_id, i.channel_id, i.kind, i.value)
            = (given.tenant_id, given.channel_id, given.kind, given.value)
        OFFSET 0
    ) AS i
    CROSS JOIN LATERAL (
        SELECT name, named_at FROM contact AS c WHERE (c.tenant_id, c.id) = (i.tenant_id, i.contact_id) OFFSET 0
    ) AS c
""")

_SEEN = text(f"""
    SELECT i.value, i.created_at FROM {_GIVEN_KEYS}
    CROSS JOIN LATERAL (
        SELECT * FROM contact_identity AS i
        WHERE (i.tenant_id, i.channel_id, i.kind, i.value)
            = (given.tenant_id, given.channel_id, given.kind, given.value)
        OFFSET 0
    ) AS i
""")

# Always returns the contact that has the identity: ours if it was free, else the one that was faster.
_TAKE = text(f"""
    INSERT INTO contact_identity AS i (tenant_id, channel_id, kind, value, contact_id)
    SELECT * FROM {rows(tenant_id="uuid", channel_id="uuid", kind="text", value="text", contact_id="uuid")}
    ORDER BY tenant_id, channel_id, kind, value
    ON CONFLICT (tenant_id, channel_id, kind, value) DO UPDATE SET contact_id = i.contact_id
    RETURNING i.tenant_id, i.channel_id, i.kind, i.value, i.contact_id
""")

_ADD = text(f"""
    INSERT INTO contact_identity (tenant_id, channel_id, kind, value, contact_id)
    SELECT * FROM {rows(tenant_id="uuid", channel_id="uuid", kind="text", value="text", contact_id="uuid")}
    ORDER BY tenant_id, channel_id, kind, value
    ON CONFLICT DO NOTHING
""")

_MOVE = text("UPDATE contact_identity SET contact_id = :theirs WHERE tenant_id = :tenant_id AND contact_id = :ours")

_WRITE = text(f"""
    INSERT INTO contact AS c (tenant_id, id, name, named_at)
    SELECT * FROM {rows(tenant_id="uuid", id="uuid", name="text", named_at="timestamptz")}
    ORDER BY tenant_id, id
    ON CONFLICT (tenant_id, id) DO UPDATE SET name = excluded.name, named_at = excluded.named_at
    WHERE c.named_at IS NULL OR (c.named_at, c.name) < (excluded.named_at, excluded.name)
""")
