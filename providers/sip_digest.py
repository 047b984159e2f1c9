"""Digest credentials for REGISTER: which challenge to answer, and the answer (RFC 7616, RFC 8760).

Of what a registrar offers the strongest is answered, MD5 only where the account allows it, and nothing weaker than what
was accepted before. Facts: sip-registration.md §4, security-reliability.md R2.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from providers.sip_message import Response, pieces_outside_quotes

_HASHES: Mapping[str, Callable[[bytes], str]] = {
    "md5": lambda data: hashlib.md5(data, usedforsecurity=False).hexdigest(),
    "sha-256": lambda data: hashlib.sha256(data).hexdigest(),
    "sha-512-256": lambda data: hashlib.new("sha512_256", data).hexdigest(),
}
_STRENGTH = {"md5": 1, "sha-256": 2, "sha-512-256": 3}
_CANONICAL = {"md5": "MD5", "sha-256": "SHA-256", "sha-512-256": "SHA-512-256"}

_LONGEST = 4096  # bytes of what an answer repeats: realm, nonce and opaque
_MOST_CHALLENGES = 20  # of a response that are looked at
_MOST_PARAMS = 40  # of a challenge

_WORD = r"[\w!%'*+.`~-]+"
_PARAM = re.compile(rf'(?:({_WORD})[ \t]+)?({_WORD})[ \t]*=[ \t]*("(?:[^"\\]|\\.)*"|[^\s"]*)', re.ASCII | re.DOTALL)
_SCHEME = re.compile(_WORD, re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Refused(Exception):
    """No challenge is answered; the text says why. It may quote the registrar: clean it before showing it."""


@dataclass(frozen=True)
class Challenge:
    """One challenge of a 401 or 407. Its repr shows no nonce."""

    scheme: str
    is_proxy: bool
    params: Mapping[str, str] = field(repr=False)  # names in lower case, values unquoted
    is_whole: bool = True  # False: something in it could not be understood, perhaps its algorithm

    @property
    def realm(self) -> str:
        return self.params.get("realm", "")

    @property
    def nonce(self) -> str:
        return self.params.get("nonce", "")

    @property
    def is_stale(self) -> bool:
        return self.params.get("stale", "").lower() == "true"

    @property
    def algorithm(self) -> str:
        """Its usual spelling, `-sess` included: what an account keeps to know the weakest it answers."""
        base = _base(self._given_algorithm)
        return _CANONICAL.get(base, base) + ("-sess" if self._has_session_key else "")

    @property
    def answer_header(self) -> str:
        return "Proxy-Authorization" if self.is_proxy else "Authorization"

    @property
    def strength(self) -> int:
        """0: not an algorithm of ours."""
        return strength(self._given_algorithm)

    @property
    def has_qop(self) -> bool:
        return bool(self.params.get("qop", "").strip(" \t,"))

    def problem(self) -> str | None:
        """Why it cannot be answered at all; None where it can."""
        if self.scheme.lower() != "digest":
            return f"authentication scheme {self.scheme} is not supported"
        if not self.is_whole:
            return "the challenge cannot be understood"
        if not self.strength:
            return f"digest algorithm {self._given_algorithm} is not supported"
        if self.has_qop and "auth" not in self._qops:
            return f"digest qop {', '.join(self._qops)} is not supported"
        if "nonce" not in self.params or "realm" not in self.params:
            return "the challenge has no nonce or no realm"
        if sum(len(self.params.get(name, "").encode()) for name in ("realm", "nonce", "opaque")) > _LONGEST:
            return "the challenge is too long"
        if any(_CONTROL.search(value) or "\ufffd" in value for value in self.params.values()):
            return "the challenge holds control characters or is not UTF-8"
        return None

    @property
    def _given_algorithm(self) -> str:
        return self.params.get("algorithm", "") or "MD5"

    @property
    def _has_session_key(self) -> bool:
        return self._given_algorithm.lower().endswith("-sess")

    @property
    def _qops(self) -> list[str]:
        return [qop.strip().lower() for qop in self.params.get("qop", "").split(",") if qop.strip()]


def challenges(response: Response) -> list[Challenge]:
    """What a 401 (WWW-Authenticate) or 407 (Proxy-Authenticate) asks for, topmost first, whatever the scheme: 20 at
    most."""
    is_proxy = response.status == 407
    found: list[Challenge] = []
    for line in response.all("proxy-authenticate" if is_proxy else "www-authenticate"):
        if len(found) < _MOST_CHALLENGES:
            found += _challenges(line, is_proxy, _MOST_CHALLENGES - len(found))
    return found


def choose(offered: Sequence[Challenge], *, allows_md5: bool, known: str | None) -> Challenge:
    """The strongest challenge that may be answered, the topmost of equals. `known`: the algorithm accepted last.

    Raises `Refused`.
    """
    sound = [challenge for challenge in offered if challenge.problem() is None]
    if not sound:
        problem = offered[0].problem() if offered else None
        raise Refused(problem or "credentials are asked for without a challenge")
    best = max(sound, key=lambda challenge: challenge.strength)
    if known and best.strength < strength(known):
        raise Refused(f"only {best.algorithm} is offered, but {known} was used before: not downgraded")
    if best.strength == _STRENGTH["md5"] and not allows_md5:
        raise Refused("only MD5 is offered, and the account does not allow it")
    return best


def strength(algorithm: str) -> int:
    """Larger is stronger; 0 for what is not an algorithm of ours."""
    return _STRENGTH.get(_base(algorithm), 0)


def answer(
    challenge: Challenge, *, user: str, password: str, uri: str, cnonce: str, nc: int = 1, method: str = "REGISTER"
) -> str:
    """The value of `challenge.answer_header`. `nc` counts the answers to this nonce; `cnonce` is fresh and random."""
    digest = _HASHES[_base(challenge._given_algorithm)]

    def hashed(*parts: str) -> str:
        return digest(":".join(parts).encode())

    count = f"{nc:08x}"
    secret = hashed(user, challenge.realm, password)
    if challenge._has_session_key:
        secret = hashed(secret, challenge.nonce, cnonce)
    action = hashed(method, uri)
    if challenge.has_qop:
        response = hashed(secret, challenge.nonce, count, cnonce, "auth", action)
    else:
        response = hashed(secret, challenge.nonce, action)

    params = [
        ("username", _quoted(user)),
        ("realm", _quoted(challenge.realm)),
        ("nonce", _quoted(challenge.nonce)),
        ("uri", _quoted(uri)),
        ("response", _quoted(response)),
    ]
    if given := challenge.params.get("algorithm"):  # `algorithm=""` would not be a word
        params.append(("algorithm", given))
    if challenge.has_qop or challenge._has_session_key:
        params.append(("cnonce", _quoted(cnonce)))
    if "opaque" in challenge.params:
        params.append(("opaque", _quoted(challenge.params["opaque"])))
    if challenge.has_qop:
        params += [("qop", "auth"), ("nc", count)]
    return "Digest " + ", ".join(f"{name}={value}" for name, value in params)


def _challenges(line: str, is_proxy: bool, most: int) -> list[Challenge]:
    """One header line taken apart: a piece `Scheme name=value` begins the next challenge, `name=value` goes on with it.

    What cannot be understood ends the line, and spoils the challenge that it stands in.
    """
    found: list[Challenge] = []
    params: dict[str, str] = {}  # of the last one found
    for piece in pieces_outside_quotes(line, ","):
        param = _PARAM.fullmatch(piece)
        scheme = param[1] if param else piece
        if scheme is not None and _SCHEME.fullmatch(scheme):
            if len(found) >= most:
                break
            params = {}
            found.append(Challenge(scheme, is_proxy, params))
        if param and found and len(params) < _MOST_PARAMS:
            params.setdefault(param[2].lower(), _unquoted(param[3]))
        elif param or not _SCHEME.fullmatch(piece):
            if found:
                found[-1] = replace(found[-1], is_whole=False)
            break
    return found


def _base(algorithm: str) -> str:
    return algorithm.lower().removesuffix("-sess")


def _unquoted(value: str) -> str:
    return re.sub(r"\\(.)", r"\1", value[1:-1], flags=re.DOTALL) if value.startswith('"') else value


def _quoted(value: str) -> str:
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
