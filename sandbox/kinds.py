"""The kinds of faults in a line each. Apart from `sandbox.faults`, so that a command's `--help` costs nothing.

What a kind concerns, its *place*, is in its name: `resolve_…` the question where a file is, `download_…` its bytes,
`upload_…` a file that is handed in, all others the sending of messages. An outage is one everywhere.
"""

SENDING = {
    "code": "refused with Graph's error --code (131000)",
    "latency": "every answer comes --ms later (100); goes together with another fault",
    "hang_before": "not accepted, and never answered",
    "hang_after": "accepted, and never answered",
    "reset_before": "not accepted; the connection is reset",
    "reset_after": "accepted; the connection is reset before an answer",
    "garbage_before": "not accepted; the answer is half a JSON text",
    "garbage_after": "accepted; the answer is half a JSON text",
    "html": "not accepted; the answer is a page of HTML with status 502",
    "html_after": "accepted; the answer is a page of HTML with status 502",
    "empty": "accepted; the answer is empty",
    "drip": "accepted; the answer comes byte by byte, one each --ms (100)",
    "huge": "accepted; the answer has two megabytes",
    "gzip": "accepted; the answer is compressed, though nobody asked",
    "redirect": "not accepted; the answer leads elsewhere",
    "outage": "not accepted, like everything else: 503 with a page of HTML",
    "failed_status": "accepted; its one status is `failed` with --code (131026)",
}

ASKING = {
    "code": "refused with Graph's error --code (131000)",
    "latency": "every answer comes --ms later (100); goes together with another fault",
    "hang": "never answered",
    "reset": "the connection is reset instead of an answer",
    "garbage": "the answer is half a JSON text",
    "html": "the answer is a page of HTML with status --http (502)",
    "empty": "the answer is empty",
    "drip": "the answer comes byte by byte, one each --ms (100)",
    "huge": "the answer has two megabytes",
    "gzip": "the answer is compressed, though nobody asked",
    "redirect": "the answer leads to --location",
}

RESOLVING = {
    **ASKING,
    "gone": "refused like an id that is not there any more",
    "wrong_hash": "the SHA-256 that is told is another file's",
    "wrong_size": "the size that is told is one byte too many",
    "wrong_type": "the type that is told is text/html",
    "expired": "the URL has run out by the time it is told",
    "elsewhere": "the URL that is told is --location, or another host than the media's",
}

DOWNLOADING = {
    "status": "answered with --http (500) and nothing",
    "html": "a page of HTML with status --http (502); it may be 200",
    "latency": "every answer comes --ms later (100); goes together with another fault",
    "hang": "never answered",
    "wrong_hash": "one bit of the content is another",
    "wrong_type": "the Content-Type is text/html",
    "long_length": "the Content-Length is --bytes (1000) above what comes before the end",
    "short_length": "the Content-Length is --bytes (half of all) below what comes",
    "no_length": "no Content-Length, the content comes in chunks",
    "endless": "no Content-Length, and after the content something else without end",
    "drip": "the content comes --bytes (1) at a time, each --ms (100)",
    "stall": "after --bytes (half of all) nothing more comes",
    "close": "the connection ends after --bytes (half of all)",
    "reset": "the connection is reset after --bytes (half of all)",
    "gzip": "compressed, though nobody asked; with --bytes, so many zeros instead of the content",
    "redirect": "the answer leads to --location, or to another name of this host without a token",
}

KINDS = {
    **SENDING,
    **{f"resolve_{kind}": does for kind, does in RESOLVING.items()},
    **{f"download_{kind}": does for kind, does in DOWNLOADING.items()},
    **{f"upload_{kind}": does for kind, does in ASKING.items()},
}


def place(kind: str) -> str:
    """resolve, download, upload or send."""
    before, _, _ = kind.partition("_")
    return before if before in ("resolve", "download", "upload") else "send"


MEGAAPI_PLACES = ("status", "list", "send", "read", "media", "webhook", "session", "qr", "number")
"""What MegaAPI is asked for; `session` is a restart or a logout."""

MEGAAPI_ANYWHERE = {
    "latency": "every answer comes --ms later (100); goes together with another fault",
    "hang_before": "not done, and never answered",
    "hang_after": "done, and never answered",
    "reset_before": "not done; the connection is reset",
    "reset_after": "done; the connection is reset before an answer",
    "html403": "not done; Cloudflare's page of HTML with status 403",
    "html502": "not done; a page of HTML with status --http (502)",
    "html502_after": "done; a page of HTML with status --http (502)",
    "error_true": "not done; status 200 with `error: true` and --message",
    "error_true_after": "done, and yet status 200 with `error: true` and --message",
    "http400": "not done; 400 in JSON",
    "http401": "not done; 401 in JSON",
    "http403": "not done; 403 in JSON",
    "http404": "not done; 404 in JSON",
    "http429": "not done; 429 in JSON, with --retry-after",
    "http500": "not done; 500 in JSON",
    "garbage": "done; the answer is half a JSON text",
    "empty": "done; the answer is empty",
    "huge": "done; the answer has two megabytes more",
    "drip": "done; the answer comes byte by byte, one each --ms (100)",
    "redirect": "not done; the answer leads to --location",
    "outage": "not done; 503 with a page of HTML",
}

MEGAAPI_STATUS = {
    "missing_status": "an instance without its status",
    "unknown_word": "a status that is --word (syncing)",
}

MEGAAPI_MEDIA = {
    "bad_base64": "a character in the middle that is none of base64",
    "truncated": "the second half of the file is missing",
    "close": "the connection ends after half of the answer, or --bytes of it",
    "stall": "after half of the answer, or --bytes of it, nothing more comes",
    "wrong_hash": "one bit of the file is another",
    "wrong_mime": "the file is said to be text/html",
    "no_prefix": "base64 without `data:…;base64,` before it",
    "huge_base64": "no Content-Length, and after the file --bytes (1 GiB) more of base64",
    "slashes": "each slash is written as \\/",
}

MEGAAPI_KINDS = {
    **MEGAAPI_ANYWHERE,
    **MEGAAPI_STATUS,
    "missing_instance": "the status of no instance at all",
    "absent": "an instance is missing in the list",
    **MEGAAPI_MEDIA,
}


def megaapi_fits(kind: str, at: str) -> bool:
    """Whether a fault of MegaAPI's can be met at this place; `entry` is one of the list."""
    if kind in MEGAAPI_STATUS:
        return at in ("status", "entry")
    if kind in MEGAAPI_MEDIA:
        return at == "media"
    if kind in ("missing_instance", "absent"):
        return at == ("status" if kind == "missing_instance" else "entry")
    return at != "entry" and (kind, at) != ("huge", "media")  # that is `huge_base64`


BAILEYS_PLACES = (
    *("list", "state", "qr", "start", "stop", "restart", "logout", "reset", "health", "hook", "set_hook"),
    *("refresh_contact", "send", "read", "file"),
)
"""What a Baileys gateway is asked for."""

BAILEYS_KINDS = {
    **{
        kind: does
        for kind, does in MEGAAPI_ANYWHERE.items()
        if kind not in ("error_true", "error_true_after", "html403")
    },
    "http408": "not done; 408 in JSON",
    "http409": "not done; 409 in JSON",
    "http422": "not done; 422 in JSON",
    "http503": "not done; 503 in JSON",
    "wrong_json": "done; the answer is JSON of another shape",
}

BAILEYS_STORMS = {
    "retry": "no session record; each message comes again, decrypted",
    "prekey": "pre-keys are gone; a start of the socket heals",
    "ratchet": "few contacts went on without us; a fresh session from our side heals, or their files dropped",
    "derived": "many contacts did; only their files dropped while the socket is stopped heal",
    "sender_key": "a group's sender keys are wrong; dropping them while the socket is stopped heals",
    "identity": "credentials of another state; the right ones put back heal, or a person",
    "version": "each start ends with 405; nothing heals",
    "twin": "another process has the same credentials: 440 until it is told to stop",
    "logged_out": "the device was removed: 401, and a code after that",
    "duplicate": "messages are delivered twice; there is nothing to heal",
}

SIP_HABITS = {
    "code": "refused with this status, 300 to 699",
    "reason": "its words",
    "retry_after": "the seconds of its Retry-After, or any text",
    "redirect": "a Contact to go to, with 302 or `code`",
    "min_expires": "423 with Min-Expires for whoever asks for less; without `code`",
    "grant": "so many seconds, or any text",
    "grant_in": "where they are told: contact, header, both, both_differ or nowhere",
    "header": "what `Expires:` says",
    "others": 'bindings that are listed before ours: [{"contact": "<sip:a@b>", "expires": 60}]',
    "rewrite_contact": 'what is listed in place of ours: {"host": "203.0.113.9", "user": "x", "port": 5060}',
    "unlisted": "true: ours is not listed",
    "endless_401": "true: the right answer is refused too",
    "stale": "a right answer is refused, and said to be stale: always, or once for each nonce",
    "stale_silently": "the same without saying so",
    "wrong_password": "what a wrong answer gets: 403, or 401",
    "algorithms": 'a challenge each: ["SHA-256", "MD5"]',
    "one_line": "true: all challenges in one header line",
    "qop": "auth, auth-int, auth,auth-int or none",
    "scheme": "of challenges, in place of Digest",
    "realm": "of challenges",
    "opaque": "of challenges",
    "omit": 'parameters that challenges lack: ["realm"]',
    "proxy_auth": "true: 407 in place of 401",
    "nonce_newline": "in the middle of the nonce: folded, as is legal, or a bare line break",
    "silent": "so many datagrams of a transaction are not heard; or all",
    "delay": "seconds until it is decided",
    "provisional": "true: a 100 comes first",
    "malformed": "an odd reply before the good one: a kind of it, or several (one that is unknown names them)",
    "only": "true: the odd reply in place of the good one",
    "tcp_split": "replies come in pieces of so many bytes",
    "tcp_keep_alives": "true: CRLFs before each reply",
    "tcp_close": "the connection ends after a challenge, after an answer, or in place of one (request)",
}
