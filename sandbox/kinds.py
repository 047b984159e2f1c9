"""The kinds of faults in a line each. Apart from `sandbox.faults`, so that a command's `--help` costs nothing."""

KINDS = {
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
