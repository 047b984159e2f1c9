"""What an account may be configured with: nothing that could end a header, a URI or a quoted string early.

Each check gives the value as it is to be kept, or raises `Rejected` with a sentence that does not repeat it
(security-reliability.md R6, R7).
"""

import re
from ipaddress import IPv6Address, ip_address

from pombal.errors import Rejected

_LONGEST = 255
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", re.ASCII)
_HOST_PORT = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::(\d{1,5}))?", re.ASCII)


def check_user(text: str) -> str:
    """The user of the address of record, which stands in URIs."""
    return _word(text, "user", refused='"<>@')


def check_auth_user(text: str) -> str:
    """The name that credentials are for; some providers want `user@domain`."""
    return _word(text, "authentication user", refused='"<>')


def check_password(text: str) -> str:
    """Only hashed, never sent: anything that can be typed on one line. Blanks at its ends are kept."""
    if not text or len(text) > _LONGEST:
        raise Rejected(f"the password must have 1 to {_LONGEST} characters")
    if not text.isprintable():
        raise Rejected("the password may not hold control characters or line ends")
    return text


def check_host(text: str) -> str:
    """A name or an address without a port; IPv6 is kept without brackets, a name in lower case."""
    host = text.strip(" ").lower().removesuffix(".")
    if not host:
        raise Rejected("the host may not be empty")
    if "/" in host or host.startswith(("sip:", "sips:")):
        raise Rejected("the host must be a name or an address, not a URL")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ip_address(bare)
    except ValueError:
        pass
    else:
        if isinstance(address, IPv6Address) and address.scope_id:
            raise Rejected("the host may not be an address of one network card only")
        return str(address)
    if re.fullmatch(r"[^:]+:\d+", host):
        raise Rejected("the host must be without a port: a port is given by itself")
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise Rejected("the host must be a name of letters, digits, dots and hyphens (others as xn--…), or an address")
    if labels[-1].isdigit():  # some resolvers take `1.2.3` or `0177.0.0.1` for an address
        raise Rejected("the host looks like an address, but is none")
    return host


def check_contact_host(text: str) -> str:
    """`host` or `host:port` that calls come to; an IPv6 address in brackets."""
    match = _HOST_PORT.fullmatch(text.strip(" "))
    if match is None:
        raise Rejected("the contact host must be a host, or a host and a port; an IPv6 address in brackets")
    host = check_host(match[1])
    port = f":{check_port(int(match[2]))}" if match[2] else ""
    return (f"[{host}]" if ":" in host else host) + port


def check_port(port: int) -> int:
    if not 0 < port < 65536:
        raise Rejected("a port is a number from 1 to 65535")
    return port


def _word(text: str, what: str, *, refused: str) -> str:
    if not text or len(text) > _LONGEST:
        raise Rejected(f"the {what} must have 1 to {_LONGEST} characters")
    if not text.isprintable() or any(char.isspace() or char in refused for char in text):
        raise Rejected(f"the {what} may not hold blanks, control characters, quotes or any of {refused[1:]}")
    return text
