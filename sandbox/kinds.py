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
