"""Challenges of the simulated registrar, and whether an answer to one is right (sip-registration.md §4; RFC 7616)."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from typing import NamedTuple

from sandbox.sip_words import quoted

HASHES: dict[str, Callable[[bytes], "hashlib._Hash"]] = {
    "MD5": hashlib.md5,
    "SHA-256": hashlib.sha256,
    "SHA-512-256": lambda data: hashlib.new("sha512_256", data),
}
_NC = re.compile(r"[0-9a-f]{8}")
_SPACE = re.compile(r"\s+")


class Shape(NamedTuple):
    """How a challenge looks."""

    realm: str
    algorithms: tuple[str, ...] = ("MD5",)  # a challenge each; "" leaves the parameter out
    qop: str = "auth"  # "none" leaves it out
    scheme: str = "Digest"
    opaque: str = ""
    omit: tuple[str, ...] = ()
    newline: str = ""  # what is within the nonce


class Nonces:
    """Nonces that need no memory. One that followed a `stale` is marked, so that it is not called stale as well."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(16)

    def new(self, *, marked: bool = False) -> str:
        salt = ("2" if marked else "1") + secrets.token_hex(6)
        return salt + self._proof(salt)

    def is_ours(self, nonce: str) -> bool:
        return hmac.compare_digest(nonce[13:].encode(), self._proof(nonce[:13]).encode())

    def is_marked(self, nonce: str) -> bool:
        return nonce.startswith("2")

    def _proof(self, salt: str) -> str:
        return hashlib.blake2b(salt.encode(), key=self._secret, digest_size=6).hexdigest()


def challenges(shape: Shape, nonce: str, *, stale: bool = False) -> list[str]:
    """Values of WWW-Authenticate or Proxy-Authenticate."""
    half = len(nonce) // 2
    written = nonce[:half] + shape.newline + nonce[half:]
    made = []
    for algorithm in shape.algorithms:
        params = {"realm": quoted(shape.realm), "nonce": f'"{written}"'}
        if shape.opaque:
            params["opaque"] = quoted(shape.opaque)
        if stale:
            params["stale"] = "true"
        if algorithm:
            params["algorithm"] = algorithm
        if shape.qop != "none":
            params["qop"] = f'"{shape.qop}"'
        kept = ", ".join(f"{name}={value}" for name, value in params.items() if name not in shape.omit)
        made.append(f"{shape.scheme} {kept}")
    return made


def nonce_of(given: dict[str, str]) -> str:
    """The nonce that was answered, without the white space that a line break in it has become."""
    return _SPACE.sub("", given.get("nonce", ""))


def complaints(given: dict[str, str], uri: str, shape: Shape) -> list[str]:
    """What an answer breaks of RFC 7616, whatever its hash."""
    found = []
    if given.get("uri") != uri:
        found.append("the digest's uri is not the Request-URI")
    if given.get("algorithm", "") not in shape.algorithms:
        found.append("the algorithm is none that was offered, or is not echoed as it was")
    if shape.qop == "none" and "nc" in given:
        found.append("nc without a qop in the challenge")
    if shape.qop == "none" and "cnonce" in given and not given.get("algorithm", "").upper().endswith("-SESS"):
        found.append("cnonce without a qop in the challenge")
    if shape.qop != "none" and given.get("qop") not in shape.qop.split(","):
        found.append("the qop is none that was offered")
    if "qop" in given and not _NC.fullmatch(given.get("nc", "")):
        found.append("nc is not eight hexadecimal digits")
    if "qop" in given and not given.get("cnonce"):
        found.append("qop without a cnonce")
    if shape.opaque and given.get("opaque") != shape.opaque:
        found.append("opaque is not echoed")
    return found


def is_right(given: dict[str, str], method: str, user: str, password: str, body: bytes = b"") -> bool:
    """Whether the response is that of this password."""
    name = given.get("algorithm", "") or "MD5"
    session = name.upper().endswith("-SESS")
    function = HASHES.get(name.upper().removesuffix("-SESS"))
    if function is None or given.get("username") != user:
        return False

    def h(*parts: str) -> str:
        return function(":".join(parts).encode()).hexdigest()

    nonce, cnonce, qop = given.get("nonce", ""), given.get("cnonce", ""), given.get("qop", "")
    first = h(user, given.get("realm", ""), password)
    if session:
        first = h(first, nonce, cnonce)
    second = h(method, given.get("uri", ""))
    if qop == "auth-int":
        second = h(method, given.get("uri", ""), function(body).hexdigest())
    middle = [nonce, given.get("nc", ""), cnonce, qop] if qop else [nonce]
    return hmac.compare_digest(h(first, *middle, second).encode(), given.get("response", "").encode())
