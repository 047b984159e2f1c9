"""Which step of the repair ladder comes next, and why: from evidence alone, without touching anything
(baileys-sessions.md §7, the table and "Map from class to first step"). Not a queue, hence the underscore.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from models.repair import Step
from models.session_error import Tally
from providers.gateway import Ability, SessionLook
from providers.undecrypted import Cause

FEW = 3  # contacts: their own sessions are broken, rather than all of them

_TWIN = 440

# Ends of connections that no repair cures, and what a person is told (baileys-sessions.md §6).
ENDS: Mapping[int, str] = {
    440: "another process uses the same credentials (440): find it and stop it; a repair would make it worse",
    405: "WhatsApp refuses the gateway's client version (405): upgrade or pin it; restarts and pairing do not help",
    401: "the phone has logged this session out (401): pair it again",
    411: "the account changed to another multi-device mode (411): pair it again",
    403: "WhatsApp has blocked this number (403): settle that on the phone before anything is started again",
    402: "the gateway does not reconnect after a 402: look at the account on the phone",
    406: "the gateway does not reconnect after a 406: look at the account on the phone",
}

# How a session stands that no repair opens, and what a person is told.
SHUT: Mapping[SessionLook, str] = {
    "qr": "the session asks for a QR code: pair it again",
    "closed": "the session is closed, and not by a repair: `pombal channel restart` opens it, if it should be",
}


class Means(NamedTuple):
    """What may and can be done to a session: by its gateway, and by the files or table of its keys, if it has opted
    in. `restarts_lose_pairing`: a restart made a session of this gateway ask for a QR code."""

    abilities: frozenset[Ability]
    has_store: bool = False
    may_refresh_contacts: bool = False
    may_drop_keys: bool = False
    may_restore_creds: bool = False
    restarts_lose_pairing: bool = False

    def lacks(self, step: Step) -> str | None:
        """Why this step cannot be made; None when it can."""
        can_stop = "stop" in self.abilities
        restarts = "restart" in self.abilities or can_stop
        match step:
            case Step.CONTACT_REFRESH:
                if "refresh_contact" in self.abilities:
                    return None
                return self._lacks_store(self.may_refresh_contacts, "refresh contacts")
            case Step.RESTART:
                if not restarts:
                    return "its gateway cannot restart a session with the pairing kept"
                if self.restarts_lose_pairing:
                    return "a restart made a session of this gateway ask for a QR code before"
            case Step.DROP_KEYS:
                return self._lacks_store(self.may_drop_keys, "drop keys")
            case Step.RESTORE_CREDS:
                return self._lacks_store(self.may_restore_creds, "restore credentials")
        return None

    def _lacks_store(self, is_allowed: bool, what: str) -> str | None:
        if not is_allowed:
            return f"the channel does not allow to {what}"
        if not self.has_store:
            return "the session's keys are not within reach"
        if "stop" not in self.abilities:
            return "its gateway cannot stop a session with the pairing kept"
        if self.restarts_lose_pairing:
            return "a restart made a session of this gateway ask for a QR code before"
        return None


class Choice(NamedTuple):
    """The step to make, why, and the milder ones that were left out: `(step, why)`."""

    step: Step
    why: str
    skipped: tuple[tuple[Step, str], ...] = ()


def path(tally: Tally, most: int) -> tuple[tuple[Step, ...], str]:
    """The steps for what was seen, the first first, and the reason in words. A person is the last of each. `most`: as
    many errors at once are no incident."""
    if tally.strong <= most:
        return (Step.RESTART, Step.PERSON), "lines of a log that name no message, and too few that do"
    few = tally.contacts <= FEW
    spread = f"{tally.contacts} contact{'s' * (tally.contacts != 1)}"
    main = tally.main_cause(named=True)
    if main == Cause.SENDER_KEY:
        return (Step.DROP_KEYS, Step.RESTART, Step.PERSON), f"group messages cannot be decrypted ({spread})"
    if main == Cause.OTHER:
        return (Step.RESTART, Step.PERSON), f"messages of {spread} cannot be decrypted, for a reason that is not known"
    if main == Cause.IDENTITY and tally.contacts > 1:
        restored = (Step.RESTORE_CREDS, Step.PERSON)
        return restored, f"first messages of {spread} do not open with our keys: the credentials are of another state"
    if main in (Cause.RATCHET, Cause.AHEAD, Cause.NO_SESSION) and few:
        steps = (Step.CONTACT_REFRESH, Step.RESTART, Step.DROP_KEYS, Step.PERSON)
        return steps, f"the keys of {spread} went apart"
    return (Step.RESTART, Step.DROP_KEYS, Step.PERSON), f"messages of {spread} cannot be decrypted ({main})"


def is_of_groups(tally: Tally) -> bool:
    """Whether only sender keys of groups are to be dropped: where most of the errors are theirs."""
    return tally.main_cause(named=True) == Cause.SENDER_KEY


def choose(tally: Tally, most: int, tried: Collection[str], means: Means) -> Choice:
    """The mildest step of the path that was not tried in this incident and can be made."""
    steps, why = path(tally, most)
    skipped: list[tuple[Step, str]] = []
    for step in steps:
        if step in tried:
            continue
        lacks = means.lacks(step)
        if lacks is None:
            return Choice(step, why if not tried else f"{why}; before: {', '.join(tried)}", tuple(skipped))
        skipped.append((step, lacks))
    return Choice(Step.PERSON, why, tuple(skipped))


def hopeless(ends: Collection[int], *, is_open: bool) -> str | None:
    """What a person is told when connections ended for a reason that no repair cures; None otherwise. Of one that is
    open again only a twin matters: two of them take turns."""
    return next((text for code, text in ENDS.items() if code in ends and (code == _TWIN or not is_open)), None)
