"""One lane's turns: what a commit writes down, and what goes next.

Table by table in the order that every transaction of the fleet keeps: identities, reports, the lane, uploads, attempts,
messages, conversations, events, dead letters; of gateways' channels the lane comes before the reports. Everything here
runs in a thread and opens transactions of its own; no call to a provider happens in one.
"""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeAlias, TypeVar
from uuid import UUID

from sqlalchemy import RowMapping
from sqlalchemy.orm import Session

from models import (
    Attempt,
    Channel,
    ChannelKind,
    ChannelStatus,
    ContactIdentity,
    Conversation,
    DeadLetter,
    Event,
    Hold,
    Lane,
    MediaUpload,
    Message,
    MessageStatus,
    StatusReport,
    outgoing,
)
from models.dead_letter import message_letter
from pombal import db, log, metrics
from pombal.ids import uuid7
from pombal.pace import Grant, Pace
from providers.outbound import Answer, Outcome, Quoted, Scope
from workers import _late, _parcels, _uploads, _verdicts
from workers._manners import manner
from workers._parcels import Parcel, Stored
from workers._uploads import Upload, Uploads, Waiter
from workers._verdicts import Heed, Verdict

_log = log.get()
T = TypeVar("T")

_RERUNS = 5
_MARGIN, _CATCH_UP = 0.95, 0.975  # of a number's rate is used, and after a stall: the provider counts by its own clock
_FEWEST, _MOST = 2, 64  # calls at once: at the start, and at most (more for a number with a high rate)
_SHALLOWEST, _DEEPEST = 4, 2_000  # messages looked at in one turn, beside those that there is room for
_OUTAGE = 5  # points (`_verdicts.misses`) after which only probes are sent
_SLOWEST = 0.1  # share of the rate
_RECOVERY, _RISE = 10.0, 1.25  # seconds without a throttle after which the share rises, and by how much
_MOST_RISES = 20  # from the slowest to the whole
_DISCONNECTED = "the channel's session is not connected"


class Work(NamedTuple):
    """One message under way."""

    id: UUID
    attempt_id: UUID
    conversation_id: UUID
    contact_id: UUID
    provider: str
    type: str
    body: dict[str, Any]
    recipient: str | None
    attempts: int
    tries: int
    throttles: int
    is_probe: bool
    begun_at: float  # on the monotonic clock
    files: tuple[str, ...] = ()  # of ours that it carries, by the provider's ids
    stored: Stored | None = None  # the one that goes along with it
    quoted: Quoted | None = None


Known: TypeAlias = Work | Waiter | RowMapping  # what tells a message and its latest attempt


class Plan(NamedTuple):
    """What follows from a turn: calls to make, each with its slot on the monotonic clock; and when to look again.

    `wait` in seconds, None for whenever something happens; `goes_on` is False when nothing may or need be sent.
    `uploads` are to be started, and `is_ours` is False when somebody else may have the lane by now.
    """

    begun: list[tuple[Work, float]]
    wait: float | None
    goes_on: bool
    uploads: list[Upload]
    is_ours: bool


class Look(NamedTuple):
    """What a line has for a lane: messages that may go next, whether there is more behind them, and those that were set
    aside until a file is up."""

    candidates: list[RowMapping]
    is_more: bool
    expected: list[tuple[Upload, Waiter]]


class Line:
    """A lane that this process holds, for one slice."""

    def __init__(self, lane: RowMapping, channel: Channel, token: UUID, pace: Pace) -> None:
        self._lane, self._token, self._pace_of = lane, token, pace
        self._tenant: UUID = lane["tenant_id"]
        self._id: UUID = lane["channel_id"]
        self._set_up(channel)
        self._share = _share(lane)
        self._misses: int = lane["misses"]
        self._window = 1.0 if lane["hold"] else float(_FEWEST)
        self._depth = _SHALLOWEST
        self._candidates: list[RowMapping] = []
        self._attempts: dict[UUID, UUID] = {}  # message → its next attempt, the same until a commit has begun it
        self.uploads = Uploads()

    def _set_up(self, channel: Channel) -> None:
        self.channel, config = channel, channel.config
        self.manner = manner(channel.kind)
        self._rate = float(config.get("messages_per_second", self.manner.rate))
        self._settle = timedelta(seconds=float(config.get("settle_seconds", outgoing.SETTLE_WAIT.total_seconds())))
        self._policy = str(config.get("on_unknown", self.manner.on_unknown))
        self._most = max(float(_MOST), self._rate / 2)

    @property
    def gap(self) -> float:
        """The fewest seconds between two calls, also when slots are made up for: below the limit even then."""
        return 1 / (self._rate * _CATCH_UP)

    @classmethod
    def take(cls, channel_id: UUID, token: UUID, pace: Pace) -> "Line | None":
        """The lane's line, if something is due in it that may be sent and nobody else has it."""

        def take(s: Session) -> "Line | bool":
            lane = Lane.take(s, channel_id, token)
            if lane is None:
                return False
            db.see(s, [lane["tenant_id"]])
            line = cls(lane, s.get_one(Channel, (lane["tenant_id"], channel_id)), token, pace)
            line._abandoned(s)
            if line._is_disconnected(line.channel):
                held = line._hold_disconnected(s)
                Lane.release(s, line._tenant, channel_id, token)
                return held
            look = line.look(s, int(line._window), is_held=lane["hold"] is not None)
            line._candidates = look.candidates
            line._expect(look.expected)
            return line

        taken = _in_one_commit([], take)
        if isinstance(taken, Line):
            return taken
        if taken:
            _say_disconnected(channel_id)
        return None

    @classmethod
    def decide_held(cls, tenant_id: UUID, channel_id: UUID, pace: Pace) -> None:
        """Nothing is sent from a lane that is held, but what became of what was sent is decided all the same."""

        def decide(s: Session) -> "Turn | None":
            lane = Lane.lock_in_doubt(s, channel_id)
            if lane is None:
                return None
            line = cls(lane, s.get_one(Channel, (tenant_id, channel_id)), uuid7(), pace)
            line._abandoned(s)
            turn = Turn(line, [])
            turn._decide_overdue(s)
            outgoing.wake(s, tenant_id, turn.left)
            Event.append(s, turn.events)
            DeadLetter.record(s, turn.letters)
            return turn

        turn = _in_one_commit([tenant_id], decide)
        for say in turn.said if turn is not None else ():
            say()

    def refresh(self) -> None:
        """Read the channel's settings anew, the lane staying ours; nothing is being sent in this moment."""

        def again(s: Session) -> tuple[Channel, bool]:
            is_ours = Lane.renew(s, self._id, self._token) is not None
            if is_ours:
                self._abandoned(s)  # as below
            channel = s.get_one(Channel, (self._tenant, self._id))
            return channel, is_ours and self._is_disconnected(channel) and self._hold_disconnected(s)

        channel, is_held = _in_one_commit([self._tenant], again)
        self._set_up(channel)
        if is_held:
            _say_disconnected(self._id)

    def _is_disconnected(self, channel: Channel) -> bool:
        return self.manner.has_session and channel.status == ChannelStatus.DISCONNECTED

    def _hold_disconnected(self, s: Session) -> bool:
        """Whoever found it out holds the lane, if there was one; true when it is news. Needs the lane's lock: who finds
        the session connected again has it locked after the channel's row, so that this is seen then, or is not done."""
        is_news = Lane.set_hold(s, self._id, Hold.DISCONNECTED, code="disconnected", reason=_DISCONNECTED)
        if is_news:
            payload = {"hold": Hold.DISCONNECTED, "code": "disconnected"}
            Event.append(s, [Event.row("channel_held", self._tenant, self._id, None, payload)])
        return is_news

    def release(self) -> bool:
        """Give the lane back; True when something is due in it."""

        def release(s: Session) -> bool:
            if Lane.renew(s, self._id, self._token) is None:
                return False
            self._abandoned(s)  # what a commit began whose answer was lost
            outgoing.bring_back(s, self._tenant, self.uploads.waiting())
            return Lane.release(s, self._tenant, self._id, self._token)

        return _in_one_commit([self._tenant], release)

    def refuse(self, reason: str) -> bool:
        """Nothing can be sent as the channel is set up: hold the lane with that reason, and give it back."""

        def refuse(s: Session) -> bool:
            if Lane.renew(s, self._id, self._token) is None:
                return False
            if Lane.set_hold(s, self._id, Hold.AUTH, code="misconfigured", reason=reason, is_probe=True):
                payload = {"hold": Hold.AUTH, "code": "misconfigured"}
                Event.append(s, [Event.row("channel_held", self._tenant, self._id, None, payload)])
            self._abandoned(s)
            outgoing.bring_back(s, self._tenant, self.uploads.waiting())
            return Lane.release(s, self._tenant, self._id, self._token)

        _log.error("channel_misconfigured", channel_id=str(self._id), error=reason)
        return _in_one_commit([self._tenant], refuse)

    def turn(
        self,
        done: list[tuple[Work, Answer]],
        *,
        under_way: Collection[Work],
        may_begin: bool,
        may_carry: bool = True,
        uploaded: Sequence[tuple[Upload, Answer]] = (),
    ) -> Plan:
        """Write the answers down, begin what may go, and pick the next candidates: one commit.

        `may_carry`: also messages that files go along with. It may be called again with the same answers after an error
        of the database.
        """
        asked = time.monotonic()
        in_flight = len(under_way)
        # A status may tell of a message before the answer of its call does: the next one waits for that all the same.
        busy = {work.conversation_id for work in under_way}
        berths = self._berths(under_way) if may_carry else 0
        grants = self._grants(in_flight, busy, berths) if may_begin else []
        turn = Turn(self, done, uploaded)
        lane, begun = _in_one_commit([self._tenant], lambda s: turn.write(s, grants, in_flight, may_begin, berths))
        turn.committed()
        self._attempts.clear()
        if lane is not None and turn.neighbours:
            self._pause_neighbours(lane, turn.neighbours)
        slots = [(work, asked + wait) for work, wait in begun]
        uploads = self.uploads.begin(only_probes=turn.is_held) if turn.may_send else []
        is_ours = lane is not None
        if not self._candidates:
            # All that was looked at is behind others, or waits for a file; there may be more of another kind after it.
            return Plan(slots, 0.0 if turn.is_more else None, turn.is_more, uploads, is_ours)
        room = self._window - in_flight - len(begun)
        berths = self._berths([*under_way, *(work for work, _ in begun)]) if may_carry else 0
        if not self.choice(self._candidates, busy, berths):
            room = 0
        full = [grant.wait for _, grant in grants if grant.full == "number"]
        wait = None if room < 1 else max(min(full), 0.005) if full else 0.0
        return Plan(slots, wait, True, uploads, is_ours)

    def look(self, s: Session, most: int, *, is_held: bool, ended: Collection[Upload] = ()) -> Look:
        """The oldest that may go next. Those whose file the provider has not are set aside until it has.

        Of a lane that is held one message is the probe, and so is its file if that has to go up first. `ended`: uploads
        that this same commit ends.
        """
        is_probing = self.uploads.is_probing(ended)
        rows, is_more = outgoing.due(s, self._tenant, self._id, most)
        if not self.manner.uploads:
            return Look(rows, is_more, [])
        in_time = [row for row in rows if not _parcels.is_too_late(row, self.manner)]
        needed = {row["id"]: outgoing.media_ids(row["body"]) for row in in_time}
        files = MediaUpload.of(s, self._tenant, self._id, sorted({id_ for ids in needed.values() for id_ in ids}))
        candidates: list[RowMapping] = []
        expected: list[tuple[Upload, Waiter]] = []
        for row in rows:
            known = [files[id_] for id_ in needed.get(row["id"], ()) if id_ in files]
            missing = next((file for file in known if file["provider_media_id"] is None), None)
            if missing is None:
                candidates.append(row)
            elif not is_held or not (candidates or expected or is_probing):
                expected.append((Upload.of(missing, is_probe=is_held), Waiter.of(row)))
        if is_held and (expected or is_probing):
            candidates, is_more = [], False
        room = self.uploads.room
        outgoing.set_aside(s, self._tenant, [waiter.id for _, waiter in expected[:room]], _uploads.SET_ASIDE)
        outgoing.set_aside(s, self._tenant, [waiter.id for _, waiter in expected[room:]], _uploads.SET_ASIDE_LONG)
        return Look(candidates, is_more, expected[:room])

    def _expect(self, expected: list[tuple[Upload, Waiter]]) -> None:
        for upload, waiter in expected:
            self.uploads.expect(upload, waiter)

    def _berths(self, under_way: Iterable[Work]) -> int:
        """How many more files may go along: there is always room for a message without."""
        taken = sum(work.stored is not None for work in under_way)
        return max(0, max(1, min(_uploads.AT_ONCE, int(self._window) - 1)) - taken)

    def choice(self, candidates: Iterable[RowMapping], busy: Collection[UUID], berths: int) -> list[RowMapping]:
        """Those that may go now, with at most so many files along."""
        chosen = []
        for row in candidates:
            if row["conversation_id"] in busy:
                continue
            if _parcels.carries(row, self.manner):
                berths -= 1
                if berths < 0:
                    continue
            chosen.append(row)
        return chosen

    def _grants(self, in_flight: int, busy: set[UUID], berths: int) -> list[tuple[RowMapping, Grant]]:
        """The candidates that there is room for, each with the leave of its number and its recipient."""
        room = max(0, int(self._window) - in_flight)
        chosen = self.choice(self._candidates, busy, berths)[:room]
        # A receipt is no message to somebody: the limit of its recipient does not count it.
        whom = [str(row["id"] if row["type"] == "read" else row["conversation_id"]) for row in chosen]
        number = str(self._lane["app_id"] or "") + ":" + str(self.channel.config.get("phone_number_id", self._id))
        per_second = self._rate * _MARGIN * self._share
        return list(zip(chosen, self._pace_of.grants(number, whom, per_second), strict=True))

    def _abandoned(self, s: Session) -> None:
        left = Attempt.abandoned(s, self._tenant, self._id, self._settle)
        Event.append(s, [outgoing.event(row, row["status"]) for row in left])

    def _pause_neighbours(self, lane: RowMapping, heed: Heed) -> None:
        """A limit of the account or the app was reached: all its lanes pause. Many rows, so a commit of their own."""
        if lane["app_id"] is None:
            return
        waba = lane["waba_id"] if heed.scope is Scope.WABA else None
        _in_one_commit(
            [],
            lambda s: Lane.pause_all(s, code=heed.code, seconds=heed.pause, app_id=lane["app_id"], waba_id=waba),
        )


class Turn:
    """One commit of a line, and what is said of it afterwards."""

    def __init__(
        self, line: Line, done: list[tuple[Work, Answer]], uploaded: Sequence[tuple[Upload, Answer]] = ()
    ) -> None:
        self._line, self._done, self._uploaded = line, done, uploaded
        self._tenant, self._id = line._tenant, line._id
        self._provider = line.channel.kind
        self._reset()

    def _reset(self) -> None:
        """A turn may run twice: after a deadlock, or when the database was away."""
        line = self._line
        self.events: list[dict[str, Any]] = []
        self.letters: list[dict[str, Any]] = []
        self.said: list[Callable[[], None]] = []  # log lines and counts, once it is committed
        self.left: set[UUID] = set()  # conversations that somebody left the line in
        self.neighbours: Heed | None = None
        self.stops = False
        self.is_more = False
        self.is_held = self.may_send = False
        self.expected: list[tuple[Upload, Waiter]] = []
        self.misses, self.share, self.window, self.depth = line._misses, line._share, line._window, line._depth

    def write(
        self, s: Session, grants: list[tuple[RowMapping, Grant]], in_flight: int, may_begin: bool, berths: int
    ) -> tuple[RowMapping | None, list[tuple[Work, float]]]:
        self._reset()
        unheard = list(self._line._attempts.values())  # of an earlier try of this commit, which may have succeeded
        accepted = [(work, answer) for work, answer in self._done if answer.outcome is Outcome.ACCEPTED]
        ContactIdentity.add(s, list(self._identities(accepted)))
        names = [(self._tenant, self._id, answer.provider_id) for _, answer in accepted if answer.provider_id]
        if self._provider == ChannelKind.META:
            StatusReport.touch(s, names)
            lane = Lane.renew(s, self._id, self._line._token)
        else:  # whoever writes down what a gateway tells has the lane first (workers/_effects.py)
            Lane.lock(s, [self._id])
            lane = Lane.renew(s, self._id, self._line._token)
            StatusReport.touch(s, names)
        if lane is None:  # the lease ran out: the answers are facts all the same
            Lane.lock(s, [self._id])
            Lane.expect(s, [{"tenant_id": self._tenant, "channel_id": self._id, "due_at": None}])
        else:
            self.share = _share(lane)
        self._note_uploads(s)
        self._record(s, accepted)
        if lane is not None:
            self._judge_uploads(s)
        self._heed(s, lane)
        begun: list[tuple[Work, float]] = []
        candidates: list[RowMapping] = []
        if lane is not None and may_begin and lane["may_send"] and not self.stops:
            self.may_send, self.is_held = True, lane["hold"] is not None
            begun = self._begin(s, grants, is_probe=self.is_held)
            ended = [upload for upload, _ in self._uploaded]
            if not self.is_held or not (begun or in_flight or self._line.uploads.is_probing(ended)):
                # In an outage others are the probes: a second silence would be the end of these.
                self._decide_overdue(s)
            outgoing.wake(s, self._tenant, self.left)
            self.left.clear()
            most = max(int(self.window) - in_flight - len(begun), self.depth)
            candidates, self.is_more, self.expected = self._line.look(s, most, is_held=self.is_held, ended=ended)
            # Many in a row to one recipient are set behind their first in ever larger steps; many with files are
            # looked past.
            left = berths - sum(work.stored is not None for work, _ in begun)
            is_stuck = self.is_more and not self._line.choice(candidates, (), left)
            self.depth = min(_DEEPEST, most * 4) if is_stuck else _SHALLOWEST
        made = {work.attempt_id for work, _ in begun}
        Attempt.never_left(s, self._tenant, [id_ for id_ in unheard if id_ not in made])
        outgoing.wake(s, self._tenant, self.left)
        if lane is not None and self.misses != lane["misses"]:
            Lane.missed(s, self._id, self.misses)
        Event.append(s, self.events)
        if lane is None:  # an answer that came late: somebody may have been asked meanwhile
            DeadLetter.settle(s, [work.id for work, _ in accepted])
        DeadLetter.record(s, self.letters)
        self._candidates = candidates
        return lane, begun

    def committed(self) -> None:
        """Say what the commit came to, and go on from its state."""
        line = self._line
        line._misses, line._share = self.misses, self.share
        line._window, line._depth, line._candidates = self.window, self.depth, self._candidates
        for upload, _ in self._uploaded:
            line.uploads.ended(upload)
        line._expect(self.expected)
        for say in self.said:
            say()

    # -- answers -----------------------------------------------------------------------------------------------------

    def _record(self, s: Session, accepted: list[tuple[Work, Answer]]) -> None:
        news = Attempt.end(s, self._tenant, [_ended(work, answer) for work, answer in self._done])
        self._adopt(s, [(work, answer) for work, answer in accepted if work.attempt_id in news])
        anew = self._once_more(s, news)
        self._put(
            s,
            [
                (work, anew.get(work.id) or _verdicts.verdict(answer, type_=work.type, tries=work.tries,
                                                              throttles=work.throttles, settle=self._line._settle,
                                                              is_probe=work.is_probe))
                for work, answer in self._done
                if answer.outcome is not Outcome.ACCEPTED and work.attempt_id in news
            ],
        )  # fmt: skip
        for _, answer in self._done:
            self._count(answer)

    def _once_more(self, s: Session, news: set[UUID]) -> dict[UUID, Verdict]:
        """Refused for good, but perhaps for a reason that can be mended: each of these is tried once more.

        The provider may have forgotten the files of some: so do we.
        """
        faults = [(work, answer.fault) for work, answer in self._done if work.attempt_id in news and answer.fault]
        lost = [(work, fault) for work, fault in faults if work.files and fault.is_about_file]
        MediaUpload.forget(s, self._tenant, self._id, [id_ for work, _ in lost for id_ in work.files])
        anew = {work.id: _verdicts.with_a_fresh_upload(fault) for work, fault in lost}
        anew |= {work.id: _verdicts.after_a_moment(fault) for work, fault in faults if fault.is_of_a_moment}
        before = outgoing.refused_before(s, self._tenant, list(anew))
        return {id_: verdict for id_, verdict in anew.items() if id_ not in before}

    def _note_uploads(self, s: Session) -> None:
        """What the provider calls the files it has taken."""
        taken = {upload.digest: answer.provider_id for upload, answer in self._uploaded if answer.provider_id}
        MediaUpload.keep(s, self._tenant, self._id, taken)

    def _judge_uploads(self, s: Session) -> None:
        """Who waited for a file goes on, or shares its failure: none of them was sent."""
        for upload, answer in self._uploaded:
            waiters = self._line.uploads.waiting_for(upload)
            if answer.outcome is Outcome.ACCEPTED:
                outgoing.bring_back(s, self._tenant, [waiter.id for waiter in waiters])
                continue
            self._put(
                s,
                [
                    (waiter, _verdicts.verdict(answer, type_=waiter.type, tries=waiter.tries,
                                               throttles=waiter.throttles, is_probe=upload.is_probe))
                    for waiter in waiters
                ],
            )  # fmt: skip
            self._count(answer)

    def _count(self, answer: Answer) -> None:
        """One more call that did not do what it was for."""
        if answer.outcome is not Outcome.ACCEPTED and answer not in _verdicts.OWN_TROUBLE:
            kind = answer.fault.kind if answer.fault else answer.outcome
            self.said.append(metrics.provider_errors.labels(self._provider, kind).inc)

    def _adopt(self, s: Session, accepted: list[tuple[Work, Answer]]) -> None:
        given = [
            {"id": work.id, "attempt_id": work.attempt_id, "provider_id": answer.provider_id}
            for work, answer in accepted
        ]
        works = {work.id: (work, answer) for work, answer in accepted}
        for row in outgoing.fold_echoes(s, self._tenant, given):
            payload = {"message_id": row["id"], "merged": row["echo_id"]}
            self.events.append(Event.row("message_merged", self._tenant, self._id, row["id"], payload))
        for row in outgoing.adopt(s, self._tenant, given):
            self.left.add(row["conversation_id"])
            work, answer = works[row["id"]]
            if row["is_adopted"]:
                self.events.append(outgoing.event(row, MessageStatus.SENT))
                self._say("sent", "message_sent", row)
            # (Its echo may have been taken for that of an attempt before it.)
            elif work.type != "read" and (row["provider_id"] is None or row["provider_id"] != answer.provider_id):
                self.said.append(metrics.double_sends.labels(self._provider).inc)
        keys = [(self._tenant, self._id, answer.provider_id) for _, answer in accepted if answer.provider_id]
        risen = Message.catch_up(s, keys)
        # That they are sent was said above.
        self.events += [outgoing.event(row, row["status"]) for row in risen if row["status"] != MessageStatus.SENT]
        events, letters = _late.try_again(s, risen, self.said.append)
        self.events += events
        self.letters += letters
        for work, _ in accepted:
            if work.type == "read":
                Conversation.was_read(s, self._tenant, self._id, work.body["read"]["message_id"])

    def _put(self, s: Session, verdicts: Sequence[tuple[Known, Verdict]]) -> None:
        """Move messages to where their verdicts say."""
        by_id: dict[UUID, Verdict] = {}
        given = []
        for message, verdict in verdicts:
            ids = _ids(message)
            by_id[ids["id"]] = verdict
            given.append(ids | {name: getattr(verdict, name) for name in _PUT_FIELDS})
        for row in outgoing.put(s, self._tenant, given):
            verdict = by_id[row["id"]]
            more = {"error_code": row["error_code"]} if row["error_code"] else {}
            self.events.append(outgoing.event(row, row["status"], **more))
            if row["status"] != MessageStatus.QUEUED and row["due_at"] is None:
                self.left.add(row["conversation_id"])
            if row["status"] == MessageStatus.FAILED:
                self._say("failed", "message_failed", row, code=row["error_code"])
            elif row["status"] == MessageStatus.UNKNOWN and row["due_at"] is not None:
                self._say("unknown", "message_unknown", row)
            if verdict.is_given_up:
                self.letters.append(message_letter(row, _why(row, verdict), verdict.error_code))

    def _say(self, outcome: str, event: str, row: RowMapping, **more: Any) -> None:
        labels = {"direction": "out", "provider": self._provider, "outcome": outcome}
        ids = {"message_id": str(row["id"]), "channel_id": str(self._id), "tenant_id": str(self._tenant)}

        def say() -> None:
            metrics.messages.labels(**labels).inc()
            _log.info(event, **ids, attempt=row["attempts"], **more)

        self.said.append(say)

    def _identities(self, accepted: list[tuple[Work, Answer]]) -> Any:
        """What the provider calls a recipient, beside what we called them: webhooks will use those names."""
        for work, answer in accepted:
            for kind, value in answer.identities:
                if value not in (work.recipient, _bare(work.recipient or "")):
                    yield self._tenant, self._id, kind, value, work.contact_id

    # -- the lane ----------------------------------------------------------------------------------------------------

    def _heed(self, s: Session, lane: RowMapping | None) -> None:
        """Holds, pauses, the pace and the number of calls at once, as the answers demand."""
        told = [(work, answer) for work, answer in self._done if answer not in _verdicts.OWN_TROUBLE]
        for work, answer in told:
            points = _verdicts.misses(answer)
            if points:
                # A message that fails again and again speaks for itself, and not for an outage.
                is_first = answer.outcome is not Outcome.REFUSED or work.tries == 0
                self.misses += points if is_first else 0
                # Two, so that one that hangs does not hold up all others; one while only probes may go.
                self.window = max(1.0 if work.is_probe else 2.0, self.window / 2)
            else:
                self.misses = 0
                self.window = min(self._line._most, self.window + 1)
        probe = next((answer for work, answer in told if work.is_probe), None)
        for upload, answer in self._uploaded:
            # One that succeeds is no proof that messages get through: it takes nothing back, and ends no hold.
            is_first = answer.outcome is not Outcome.REFUSED or self._is_first(upload)
            self.misses += _verdicts.misses(answer) if is_first else 0
            heed = _verdicts.heed(answer)
            if upload.is_probe and (_verdicts.misses(answer) or (heed and heed.hold)):
                probe = answer
        answers = [answer for _, answer in (*told, *self._uploaded)]
        heeds = [heed for answer in answers if (heed := _verdicts.heed(answer))]
        holds = [heed for heed in heeds if heed.hold]
        if holds:
            self._hold(s, holds[0], is_probe=probe is not None)
        elif probe is not None and lane is not None and lane["hold"] not in (None, Hold.OPERATOR, Hold.DISCONNECTED):
            # (An operator's hold that came while a probe was under way is the operator's to end.) What a status told
            # is told some time after acceptance: only the next probe is the proof that it was not told again.
            if _verdicts.misses(probe) or lane["is_hold_of_status"]:
                held = Heed(Hold(lane["hold"]), code=lane["hold_code"] or "", reason=lane["hold_reason"] or "")
                self._hold(s, held, is_probe=True)
            else:
                self._resume(s)
        elif self.misses >= _OUTAGE and lane is not None and not lane["hold"]:
            self._hold(s, Heed(Hold.OUTAGE, code="no_answer", reason="the provider does not answer"), is_probe=False)
        for heed in heeds:
            if heed.pause:
                self._pause(s, heed, lane)

    def _is_first(self, upload: Upload) -> bool:
        """Whether its failure is news, and not one more of messages that fail again and again."""
        return any(waiter.tries == 0 for waiter in self._line.uploads.waiting_for(upload))

    def _hold(self, s: Session, heed: Heed, *, is_probe: bool) -> None:
        self.stops = True
        hold = heed.hold or Hold.OUTAGE
        if Lane.set_hold(s, self._id, hold, code=heed.code, reason=heed.reason, is_probe=is_probe):
            payload = {"hold": hold, "code": heed.code}
            self.events.append(Event.row("channel_held", self._tenant, self._id, None, payload))

            def say() -> None:
                metrics.holds.labels(hold=hold).inc()
                _log.error("channel_held", channel_id=str(self._id), hold=hold, code=heed.code)
                if hold is Hold.DISCONNECTED:  # what a refused send said is to be known of the channel as well
                    from workers.status_sync import ask_soon  # which sends by way of this module

                    ask_soon(self._tenant, self._id)

            self.said.append(say)

    def _resume(self, s: Session) -> None:
        self.misses = 0
        Lane.resume(s, self._id)
        self.events.append(Event.row("channel_resumed", self._tenant, self._id, None, {}))
        self.said.append(lambda: _log.info("channel_resumed", channel_id=str(self._id)))

    def _pause(self, s: Session, heed: Heed, lane: RowMapping | None) -> None:
        self.stops = True
        calm = lane["calm"] if lane is not None else None
        if heed.is_too_fast and (calm is None or calm > 0):
            # Once for all that were under way when the first was refused, also within this turn.
            self.share = max(_SLOWEST, (self._line._share if lane is None else _share(lane)) / 2)
        Lane.pause(s, channel_id=self._id, code=heed.code, seconds=heed.pause, pace=self.share)
        if heed.scope in (Scope.WABA, Scope.APP):
            self.neighbours = heed

    # -- what goes next ----------------------------------------------------------------------------------------------

    def _begin(self, s: Session, grants: list[tuple[RowMapping, Grant]], *, is_probe: bool) -> list[tuple[Work, float]]:
        outgoing.delay(s, self._tenant, {row["id"]: grant.wait for row, grant in grants if grant.full == "pair"})
        free = [(row, grant.wait) for row, grant in grants if not grant.full]
        parcels, refused = _parcels.pack(s, self._tenant, self._id, self._line.manner, [row for row, _ in free])
        attempts = [{"message_id": id_, "attempt_id": self._line._attempts.setdefault(id_, uuid7())} for id_ in parcels]
        begun = Attempt.begin(s, self._tenant, self._id, attempts)
        self._put(s, refused)
        works = []
        for row, wait in free:
            if row["id"] not in begun:
                continue
            attempt_id, is_new = begun[row["id"]]
            works.append((self._work(row, attempt_id, parcels[row["id"]], is_probe=is_probe), wait))
            if is_new:
                self.events.append(outgoing.event(row, MessageStatus.SENDING, attempt=row["attempts"] + 1))
        return works

    def _work(self, row: RowMapping, attempt_id: UUID, parcel: Parcel, *, is_probe: bool) -> Work:
        if row["attempts"] == 0:
            waited = row["waited"]
            self.said.append(lambda: metrics.send_wait.labels(self._provider).observe(max(0.0, float(waited))))
        return Work(
            id=row["id"],
            attempt_id=attempt_id,
            conversation_id=row["conversation_id"],
            contact_id=row["contact_id"],
            provider=self._provider,
            type=row["type"],
            body=parcel.body,
            recipient=parcel.recipient,
            attempts=row["attempts"] + 1,
            tries=row["tries"],
            throttles=row["throttles"],
            is_probe=is_probe,
            begun_at=time.monotonic(),
            files=parcel.files,
            stored=parcel.stored,
            quoted=parcel.quoted,
        )

    def _decide_overdue(self, s: Session) -> None:
        """No status told in time what became of these: the channel's policy decides."""
        decided: list[tuple[Known, Verdict]] = []
        for row in outgoing.overdue(s, self._tenant, self._id):
            verdict = _verdicts.unanswered(unknowns=row["unknowns"], policy=self._line._policy)
            outcome = "asked" if verdict.is_given_up else "once_more"
            self.said.append(metrics.unknown_sends.labels(self._provider, outcome).inc)
            decided.append((row, verdict))
        self._put(s, decided)


_PUT_FIELDS = ("status", "delay", "tries", "throttles", "unknowns", "error_code", "error")


def _share(lane: RowMapping) -> float:
    """What a number may use of its rate: less since it was too fast, and more again the longer that is past."""
    calm = max(0.0, lane["calm"] or 0.0)
    return float(min(1.0, lane["pace"] * _RISE ** min(_MOST_RISES, int(calm / _RECOVERY))))


def _why(row: RowMapping, verdict: Verdict) -> str:
    """Why a message was given up, without the provider's words: they are in the message's row."""
    if verdict.error_code == "no_answer":
        return verdict.error or ""
    return f"refused {row['tries']} times, at last with code {verdict.error_code}"


def _say_disconnected(channel_id: UUID) -> None:
    metrics.holds.labels(hold=Hold.DISCONNECTED).inc()
    _log.error("channel_held", channel_id=str(channel_id), hold=Hold.DISCONNECTED, code="disconnected")


def _bare(recipient: str) -> str:
    return recipient.removeprefix("+").partition("@")[0]


def _ids(message: Known) -> dict[str, Any]:
    if isinstance(message, Work | Waiter):
        return {"id": message.id, "attempt_id": message.attempt_id}
    return {"id": message["id"], "attempt_id": message["attempt_id"]}


def _ended(work: Work, answer: Answer) -> dict[str, Any]:
    """The row of an attempt that ended."""
    fault = answer.fault
    return {
        "id": work.attempt_id,
        "outcome": answer.outcome,
        "provider_id": answer.provider_id,
        "http_status": answer.http_status,
        "error_class": fault.kind if fault else None,
        "error_scope": fault.scope if fault else None,
        "error_code": fault.code if fault else None,
        "error": fault.text if fault else answer.why or None,
        "trace_id": answer.trace_id,
    }


def _in_one_commit(tenants: list[UUID], work: Callable[[Session], T]) -> T:
    """Run in one transaction, and again after a deadlock."""
    for attempt in range(1, _RERUNS + 1):
        try:
            with db.session(tenants) as s:
                db.by_key(s)
                return work(s)
        except Exception as error:
            if not db.is_worth_rerunning(error) or attempt == _RERUNS:
                raise
    raise AssertionError("unreachable")
