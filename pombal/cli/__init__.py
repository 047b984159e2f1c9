"""`pombal …`: everything the fleet can be told from a terminal. Exit code 0 ok, 1 failed, 2 wrong usage.

One file per concern beside this one; each is imported only when its command runs, so that `--help` is quick and no
process loads what it does not use. This package is the one door upwards: it starts the tiers that import pombal.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import cache

import msgspec

from pombal import __version__, garbage
from pombal.errors import PombalError
from pombal.settings import data_folder
from sandbox.kinds import (
    BAILEYS_KINDS,
    BAILEYS_PLACES,
    BAILEYS_STORMS,
    KINDS,
    MEGAAPI_KINDS,
    MEGAAPI_PLACES,
    SIP_HABITS,
)

Setup = Callable[[argparse.ArgumentParser], None]
_NARROWEST = 24  # characters of a column that is cut


@cache
def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="pombal", description="Keeps a company's messaging channels alive.")
    top.add_argument("--version", action="version", version=f"pombal {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    up = _add(commands, "up", "up:up", "run everything here: servers, migrations, a demo tenant, sandbox, web, workers")
    up.add_argument("--port", type=int, default=8000, help="of the web tier (8000)")
    up.add_argument("--data", default=None, help="folder for the servers' data and the addresses (.pombal)")
    up.add_argument("--reset", action="store_true", help="delete that data first")
    up.add_argument(
        "--sandbox-port", type=int, default=None, help="of the simulated providers (9010, or a free one if it is taken)"
    )
    up.add_argument("--sip-port", type=int, default=None, help="of the simulated SIP registrar (likewise; 5070)")
    up.add_argument("--no-sandbox", action="store_true", help="without the simulated providers")
    up.add_argument(
        "--procs",
        default=None,
        help="only these, comma-separated (web,worker,media,upkeep,sessions,fixer,sip,follower,clock,sandbox)",
    )
    up.add_argument("--pg-port", type=int, default=None, help="also listen on this loopback port, with a password")
    up.add_argument("--redis-port", type=int, default=None, help="likewise for Valkey")

    test = _add(commands, "test", "test:test", "run the tests on embedded servers of their own")
    test.add_argument("--cov", action="store_true", help="measure coverage and hold it to its floors")
    test.epilog = "All other arguments are pytest's: pombal test -k signature -x"
    test.set_defaults(arguments=[])

    web = _add(commands, "web", "fleet:web", "one web process")
    web.add_argument("--port", type=int, default=None, help="$PORT, else 8000")
    web.add_argument("--host", default=None, help="$HOST, else 0.0.0.0")

    worker = _add(commands, "worker", "fleet:worker", "one worker process for these queues")
    worker.add_argument("queues", nargs="+", metavar="QUEUE")
    worker.add_argument("--processes", type=int, default=1, help="worker processes (1)")
    worker.add_argument("--threads", type=int, default=4, help="threads of each (4)")

    _add(commands, "clock", "fleet:clock", "ticks, sweep and reaper; two are safe")
    _add(commands, "migrate", "fleet:migrate", "alembic upgrade head")

    sandbox = _add(commands, "sandbox", "sandbox:sandbox", "the simulated providers, or a word to them")
    sandbox.add_argument("--port", type=int, default=None, help="of its control port (9010; a word: where `up` has it)")
    sandbox.add_argument("--config", default=None, help="apps and channels to play (.pombal/sandbox.json)")
    sandbox.add_argument("--drachtio-port", default=None, help="of a drachtio (none; 0: any)")
    sandbox.add_argument("--sip-port", default=None, help="of its SIP registrar (5070, or a free one; or `off`)")
    words = sandbox.add_subparsers(dest="word", metavar="WORD")
    say = _add(words, "say", "sandbox:say", "a customer writes a text")
    say.add_argument("text")
    traffic = _add(words, "traffic", "sandbox:traffic", "customers write a lot, mixed and shuffled")
    traffic.add_argument("--bodies", type=int, default=300)
    traffic.add_argument("--rate", type=float, default=None, help="bodies per second (as fast as they are accepted)")
    traffic.add_argument("--seed", type=int, default=None)
    for word in (say, traffic):
        word.add_argument("--channel", default="demo-meta")
    faults = _add(
        words, "faults", "sandbox:faults", "let things go wrong, list what is set, or mend it (--clear)", as_json=True
    )
    faults.add_argument("kind", nargs="?", choices=KINDS, metavar="KIND", help="one of those below; without it a list")
    faults.add_argument("--channel", default=None, help="only this one")
    faults.add_argument("--to", default=None, help="only this recipient; of media, only this id")
    faults.add_argument("--share", type=float, default=None, help="of the calls, 0 to 1 (1)")
    faults.add_argument("--count", type=int, default=None, help="ends after so many calls")
    faults.add_argument("--seconds", type=float, default=None, help="ends after this time")
    faults.add_argument("--code", type=int, default=None, help="Graph's error code, for `…code` and `failed_status`")
    faults.add_argument("--subcode", type=int, default=None, help="for `…code`")
    faults.add_argument("--http", type=int, default=None, help="status, for `…code`, `…status` and `…html`")
    faults.add_argument("--ms", type=int, default=None, help="for `…latency`, and between the pieces of a `…drip`")
    faults.add_argument("--bytes", type=int, default=None, help="of a `download_…`: how many before it goes wrong")
    faults.add_argument("--location", default=None, help="URL, for `…redirect` and `resolve_elsewhere`")
    faults.add_argument("--clear", action="store_true", help="remove all, before setting one if a kind is given")
    faults.formatter_class = argparse.RawDescriptionHelpFormatter
    faults.epilog = "\n".join(["kinds:", *(f"  {kind:<21} {does}" for kind, does in KINDS.items())])
    rules = _add(words, "rules", "sandbox:rules", "switch Meta's limits on and off, or show them")
    rules.add_argument("--channel", default=None, help="only this one")
    on_or_off = argparse.BooleanOptionalAction
    rules.add_argument("--window", action=on_or_off, default=None, help="24 hours from the customer's last message")
    rules.add_argument("--pair", action=on_or_off, default=None, help="one message to a customer each 6 s, 45 at once")
    rules.add_argument("--rate", default=None, help="messages a second for each number, or `off`")
    rules.add_argument("--statuses", default=None, metavar="WORDS", help="comma-separated, none of them with ''")
    rules.add_argument("--delay", type=float, nargs=2, default=None, metavar="S", help="fewest and most between them")
    rules.add_argument("--lost", type=float, default=None, help="share of the statuses that never come")
    rules.add_argument("--shuffle", action=on_or_off, default=None, help="statuses in any order")
    rules.add_argument("--drop-ninth-digit", action=on_or_off, default=None, help="of some Brazilian numbers' wa_id")
    rules.add_argument("--check-media", action=on_or_off, default=None, help="files are sent by ids of uploads only")
    rules.add_argument("--url-seconds", type=int, default=None, help="for which the URL of a file is good (300)")
    rules.add_argument("--media-seconds", type=float, default=None, help="for which a received id is good (7 days)")
    rules.add_argument("--upload-seconds", type=float, default=None, help="for which an upload's is good (30 days)")
    rules.add_argument("--media-bytes", default=None, help="the size of files that customers send, or `off`")
    rules.add_argument("--clear", action="store_true", help="first put everything back as it was at the start")
    calls = _add(words, "calls", "sandbox:calls", "what the simulated Meta was asked to send", as_json=True)
    calls.add_argument("--limit", type=int, default=20)
    calls.add_argument("--channel", default=None, help="only this one")
    calls.add_argument("--summary", action="store_true", help="counts instead")
    calls.add_argument("--clear", action="store_true", help="forget them, and set all counts to zero")
    media = _add(words, "media", "sandbox:media", "what the simulated Meta was asked about files", as_json=True)
    media.add_argument("--limit", type=int, default=20)
    media.add_argument("--kind", default=None, choices=("resolve", "download", "upload", "delete", "elsewhere"))
    media.add_argument("--id", default=None, help="only this file")
    media.add_argument("--summary", action="store_true", help="counts instead")
    media.add_argument("--clear", action="store_true", help="forget them, and set all counts to zero")
    mega = _group(words, "megaapi", "a word to the simulated MegaAPI")
    say = _add(mega, "say", "sandbox:mega_say", "a customer writes, or sends something of another kind")
    say.add_argument("text", nargs="?", default=None)
    say.add_argument("--kind", default=None, help="text, image, voice, document, location, poll, … (text)")
    say.add_argument("--from", dest="from_", default=None, help="digits, or a JID")
    say.add_argument("--group", default=None, help="JID of a group")
    say.add_argument("--from-me", action="store_true", help="typed on the company's own phone")
    connection = _add(mega, "connection", "sandbox:mega_connection", "an instance changes, and its webhook tells of it")
    connection.add_argument("status", help="connected, disconnected, or any other word")
    connection.add_argument("--silent", action="store_true", help="no webhook tells of it")
    for word in (say, connection):
        word.add_argument("--instance", default="demo-megaapi", help="name or key (demo-megaapi)")
    _add(mega, "instances", "sandbox:mega_instances", "the instances, and how they stand", as_json=True)
    calls = _add(mega, "calls", "sandbox:mega_calls", "what the simulated MegaAPI was asked", as_json=True)
    calls.add_argument("--limit", type=int, default=20)
    calls.add_argument("--place", default=None, choices=MEGAAPI_PLACES)
    calls.add_argument("--instance", default=None, help="only this one")
    calls.add_argument("--summary", action="store_true", help="counts instead")
    calls.add_argument("--clear", action="store_true", help="forget them, and set all counts to zero")
    faults = _add(
        mega, "faults", "sandbox:mega_faults", "let things go wrong, list them, or mend all (--clear)", as_json=True
    )
    faults.add_argument("kind", nargs="?", choices=MEGAAPI_KINDS, metavar="KIND", help="one of those below")
    faults.add_argument("--place", default=None, choices=MEGAAPI_PLACES, help="only there; else wherever it fits")
    faults.add_argument("--instance", default=None, help="only this one")
    faults.add_argument("--to", default=None, help="only this recipient's JID")
    faults.add_argument("--share", type=float, default=None, help="of the calls, 0 to 1 (1)")
    faults.add_argument("--count", type=int, default=None, help="ends after so many calls")
    faults.add_argument("--seconds", type=float, default=None, help="ends after this time")
    faults.add_argument("--http", type=int, default=None, help="status, for `html502…`")
    faults.add_argument("--ms", type=int, default=None, help="for `latency`, and between the pieces of a `drip`")
    faults.add_argument("--bytes", type=int, default=None, help="of a file: how many before it goes wrong, or more")
    faults.add_argument("--word", default=None, help="the status of `unknown_word`")
    faults.add_argument("--message", default=None, help="of `error_true` and `http…`")
    faults.add_argument("--retry-after", type=int, default=None, help="seconds, a header of what is refused")
    faults.add_argument("--location", default=None, help="URL, for `redirect`")
    faults.add_argument("--clear", action="store_true", help="remove all, before setting one if a kind is given")
    faults.formatter_class = argparse.RawDescriptionHelpFormatter
    faults.epilog = "\n".join(["kinds:", *(f"  {kind:<17} {does}" for kind, does in MEGAAPI_KINDS.items())])

    gateway = _group(words, "baileys", "a word to the simulated Baileys gateways")
    say = _add(gateway, "say", "sandbox:baileys_say", "a customer writes, or sends something of another kind")
    say.add_argument("text", nargs="?", default=None)
    say.add_argument("--kind", default=None, help="text, image, voice, document, location, poll, … (text)")
    say.add_argument("--from", dest="from_", default=None, help="digits, or a JID")
    say.add_argument("--group", default=None, help="JID of a group")
    say.add_argument("--from-me", action="store_true", help="typed on the company's own phone")
    say.add_argument("--stub", default=None, metavar="TEXT", help="undecryptable, with this error, such as Bad MAC")
    storm = _add(gateway, "storm", "sandbox:baileys_storm", "keys break and messages go on coming", as_json=True)
    storm.add_argument("kind", nargs="?", choices=BAILEYS_STORMS, metavar="KIND", help="one of those below")
    storm.add_argument("--contacts", type=int, default=None, help="how many (by the kind)")
    storm.add_argument("--messages", type=int, default=None, help="of the burst (12)")
    storm.add_argument("--pace", type=float, default=None, help="of them a second (20)")
    storm.add_argument("--then-every", type=float, default=None, help="seconds between later ones (0.2; 0: none)")
    storm.add_argument("--also", type=int, default=None, help="normal messages of others for each (0)")
    storm.add_argument("--group", default=None, help="JID of the group of a sender_key")
    storm.add_argument("--stop", action="store_true", help="no more messages of any; what is broken stays so")
    storm.formatter_class = argparse.RawDescriptionHelpFormatter
    storm.epilog = "\n".join(["kinds:", *(f"  {kind:<11} {does}" for kind, does in BAILEYS_STORMS.items())])
    end = _add(gateway, "end", "sandbox:baileys_end", "a connection ends")
    end.add_argument("code", type=int, help="as Baileys has it, such as 440, 401 or 515")
    scan = _add(gateway, "scan", "sandbox:baileys_scan", "somebody scans the QR code")
    for word in (say, storm, end, scan):
        word.add_argument("--gateway", default="demo", help="its name (demo)")
        word.add_argument("--session", default="1", help="as the gateway calls it (1)")
    _add(gateway, "sessions", "sandbox:baileys_sessions", "the sessions, and how they stand", as_json=True)
    calls = _add(gateway, "calls", "sandbox:baileys_calls", "what the simulated gateways were asked", as_json=True)
    calls.add_argument("--limit", type=int, default=20)
    calls.add_argument("--operation", default=None, choices=BAILEYS_PLACES)
    calls.add_argument("--clear", action="store_true", help="forget them")
    about = "let things go wrong, list them, or mend all (--clear)"
    faults = _add(gateway, "faults", "sandbox:baileys_faults", about, as_json=True)
    faults.add_argument("kind", nargs="?", choices=BAILEYS_KINDS, metavar="KIND", help="one of those below")
    faults.add_argument("--place", default=None, choices=BAILEYS_PLACES, help="only there; else anywhere")
    faults.add_argument("--gateway", default=None, help="only this one")
    faults.add_argument("--session", default=None, help="only this one")
    faults.add_argument("--share", type=float, default=None, help="of the calls, 0 to 1 (1)")
    faults.add_argument("--count", type=int, default=None, help="ends after so many calls")
    faults.add_argument("--seconds", type=float, default=None, help="ends after this time")
    faults.add_argument("--http", type=int, default=None, help="status, for `html502…`")
    faults.add_argument("--ms", type=int, default=None, help="for `latency`, and between the pieces of a `drip`")
    faults.add_argument("--message", default=None, help="of `http…`")
    faults.add_argument("--retry-after", type=int, default=None, help="seconds, a header of what is refused")
    faults.add_argument("--clear", action="store_true", help="nothing goes wrong any more")
    faults.formatter_class = argparse.RawDescriptionHelpFormatter
    faults.epilog = "\n".join(["kinds:", *(f"  {kind:<17} {does}" for kind, does in BAILEYS_KINDS.items())])

    sip = _group(words, "sip", "a word to the simulated SIP registrar")
    users = _add(sip, "users", "sandbox:sip_users", "its accounts and how they stand, or one more", as_json=True)
    users.add_argument("--add", default=None, metavar="NAME", help="with --password; or another password for one")
    users.add_argument("--password", default="s3cret", help="of the new one (s3cret)")
    users.add_argument("--auth-user", default=None, help="of its credentials, if it is another")
    users.add_argument("--limit", type=int, default=20)
    habit = _add(sip, "habit", "sandbox:sip_habit", "let it do so, list what it does, or end that", as_json=True)
    habit.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="such as code=503 retry_after=120, or silent=all")
    habit.add_argument("--user", default=None, help="only this account")
    habit.add_argument("--domain", default=None, help="only accounts that name this domain")
    habit.add_argument("--next", type=int, default=None, help="only the next so many transactions")
    habit.add_argument("--when", default=None, choices=("any", "first", "authorized"), help="which transactions")
    habit.add_argument("--clear", action="store_true", help="end the user's, or all, before setting one")
    habit.formatter_class = argparse.RawDescriptionHelpFormatter
    habit.epilog = "\n".join(["keys:", *(f"  {key:<16} {does}" for key, does in SIP_HABITS.items())])
    bindings = _add(sip, "bindings", "sandbox:sip_bindings", "where calls for the accounts go", as_json=True)
    bindings.add_argument("--user", default=None, help="only this account")
    calls = _add(sip, "calls", "sandbox:sip_calls", "what the simulated registrar was asked", as_json=True)
    calls.add_argument("--limit", type=int, default=20)
    calls.add_argument("--user", default=None, help="only this account")
    calls.add_argument("--summary", action="store_true", help="counts instead")
    calls.add_argument("--clear", action="store_true", help="forget them, and set all counts to zero")
    invite = _add(sip, "invite", "sandbox:sip_invite", "a call comes in for an account")
    invite.add_argument("user")
    invite.add_argument("--received", action="store_true", help="to where its REGISTER came from, not to its Contact")

    tenant = _group(commands, "tenant", "companies")
    create = _add(tenant, "create", "admin:create_tenant", "a new tenant", as_json=True)
    create.add_argument("slug")
    create.add_argument("--name", required=True)
    _add(tenant, "list", "admin:list_tenants", "all tenants", as_json=True)

    key = _group(commands, "key", "API keys")
    create = _add(key, "create", "admin:create_key", "a new key; it is shown once", as_json=True)
    create.add_argument("tenant")
    create.add_argument("--name", default="key")
    create.add_argument("--scope", action="append", help="may be repeated; all scopes by default")
    listing = _add(key, "list", "admin:list_keys", "a tenant's keys, and when they were last used", as_json=True)
    listing.add_argument("tenant")
    revoke = _add(key, "revoke", "admin:revoke_key", "end a key at once", as_json=True)
    revoke.add_argument("tenant")
    revoke.add_argument("id")

    app = _group(commands, "app", "Meta apps")
    rotate = _add(
        app,
        "rotate",
        "admin:rotate_app",
        "a new app secret, from standard input; the one before stays valid",
        as_json=True,
    )
    rotate.add_argument("slug", help="the last part of its webhook URL, or `default`")
    rotate.add_argument("--finish", action="store_true", help="nothing new: the one before is no longer valid")

    channel = _group(commands, "channel", "numbers on providers")
    create = _add(channel, "create", "admin:create_channel", "a new channel", as_json=True)
    create.add_argument("tenant")
    create.add_argument("kind", choices=["meta", "megaapi", "baileys", "stub"])
    create.add_argument("--name", required=True)
    create.add_argument(
        "--config",
        required=True,
        help='JSON, or - to read it from standard input. Of meta: "phone_number_id", "waba_id", to send "access_token" '
        'and what `channel set` takes, and for an app of its own "app_secret", "verify_token", "app". Of megaapi: '
        '"instance_key", "host" and "token" (MEGA_API_HOST, MEGA_API_TOKEN), and what `channel set` takes. Of baileys: '
        '"gateway" (whaticket, ticketz, evolution, waha, fazer), "session", "host" (BACKEND_URL), "api_key", and what '
        "`channel set` takes. Of stub: {}",
    )
    listing = _add(channel, "list", "admin:list_channels", "a tenant's channels", as_json=True)
    listing.add_argument("tenant")
    token = _add(channel, "token", "sending:token", "a new access token, from standard input; sending goes on with it")
    change = _add(channel, "set", "sending:change", "how a channel sends", as_json=True)
    change.add_argument(
        "--config",
        required=True,
        help='JSON, or - for standard input: "messages_per_second" (80; megaapi 5, baileys 2), "on_unknown" '
        '("once_more" or "ask"), "settle_seconds" (60), "default" (true: for requests that name no channel); '
        'of megaapi and baileys "silent_after_hours" (24; 0: never); of megaapi "token_kind" ("instance" or "host"); '
        'of baileys "paths", "observe_seconds" (120), "cool_down_seconds" (600), "auth", "store_url", '
        '"send_key", "log_name", and what a repair may do: '
        '"may_refresh_contacts", "may_drop_keys", "may_restore_creds" (false); null puts one back',
    )
    connect = _add(
        channel, "connect", "gateways:connect", "have a gateway deliver a channel's events to us", as_json=True
    )
    connect.add_argument("--url", required=True, help="our public address, such as https://pombal.example")
    connect.add_argument("--new-token", action="store_true", help="with a new token; then the old one is ended")
    restart = _add(channel, "restart", "gateways:restart", "let a gateway's session connect anew; its pairing is kept")
    logout = _add(channel, "logout", "gateways:logout", "end a pairing: it takes a new QR code to connect again")
    logout.add_argument("--yes", action="store_true", help="do not ask")
    qr = _add(channel, "qr", "gateways:qr", "the QR code to scan with the phone, as a picture")
    qr.add_argument("--out", default=None, metavar="FILE", help="where to (NAME-qr.png in this folder)")
    for word in (token, change, connect, restart, logout, qr):
        word.add_argument("tenant")
        word.add_argument("name", help="of the channel; or its id, or the end of it that `pombal lanes` shows")

    status = _add(channel, "status", "standing:status", "how the sessions of channels stand", as_json=True)
    status.add_argument("tenant", nargs="?", default=None, help="only this one's")
    status.add_argument("--check", action="store_true", help="ask their providers now; nothing is written")

    session = _group(commands, "session", "sessions of Baileys gateways: their errors and repairs")
    check = _add(session, "check", "sessions:check", "how sessions stand, and what is wrong with them", as_json=True)
    check.add_argument("--ask", action="store_true", help="ask their gateways now, as is done for a single channel")
    repair = _add(session, "repair", "sessions:repair", "repair a session now, or all that need it", as_json=True)
    repair.add_argument("--dry-run", action="store_true", help="tell what would be done and why; nothing is touched")
    repair.add_argument("--step", default=None, help="only this step of the ladder, by its number or name (docs)")
    repair.add_argument("--no-wait", action="store_true", help="do not wait for what comes of it")
    listing = _add(session, "history", "sessions:history", "incidents, steps and outcomes", as_json=True)
    listing.add_argument("--limit", type=_count(1_000), default=20)
    pause = _add(session, "pause", "sessions:pause", "begin no further step; one under way is finished")
    resume = _add(session, "resume", "sessions:resume", "end a pause")
    named = "TENANT/NAME, the channel's id or name, or the session's name at its gateway; or all"
    for word in (check, listing, pause, resume):
        word.add_argument("channel", nargs="?", default="all", help=named)
    repair.add_argument("channel", help=named)
    numbers = _add(session, "stats", "sessions:stats", "looks, incidents, and what came of them", as_json=True)
    numbers.add_argument("--days", type=_count(3_650), default=30)
    scan = _add(session, "scan", "session_logs:scan", "what logs tell of each session; no database", as_json=True)
    scan.add_argument("logs", nargs="+", metavar="LOG", help="a file, also .gz, or - for standard input")
    tail = _add(session, "follow", "session_logs:follow", "note what gateways write into their logs, until stopped")
    tail.add_argument("logs", nargs="*", metavar="LOG", help="a file, or a pattern in quotes; it may come later")
    tail.add_argument("--gateway", default=None, metavar="HOST", help="only channels of this one")
    tail.add_argument("--tenant", default=None, help="only this one's channels")
    tail.add_argument("--from-start", action="store_true", help="of logs that are new here: also what stands in them")
    tail.add_argument("--name", default="", help="tells followers of equal paths on several machines apart")
    for word, meaning in ((scan, "NAME"), (tail, "TENANT/NAME")):
        whose = word.add_mutually_exclusive_group()
        whose.add_argument(
            "--attribute",
            default=None,
            metavar="FIELD",
            help="of a record that names the session (whatsappId, session, …); `prefix`: the name before the bar",
        )
        whose.add_argument("--channel", default=None, metavar=meaning, help="the log is of this session alone")

    sip = _group(commands, "sip", "SIP accounts: their registration at providers")
    create = _add(sip, "create", "sip:create", "a new account, registered at once", as_json=True)
    create.add_argument("tenant")
    create.add_argument("--name", required=True)
    create.add_argument("--host", required=True, help="the provider's domain or address, without a port")
    create.add_argument("--username", required=True, help="the user of the address of record")
    create.add_argument("--port", type=_count(65_535), default=None, help="of the registrar or proxy (by DNS, or 5060)")
    create.add_argument("--transport", choices=["udp", "tcp", "tls"], default="udp", help="udp")
    create.add_argument("--proxy", default=None, metavar="HOST", help="that requests go to in place of --host")
    create.add_argument("--no-md5", action="store_true", help="refuse a registrar that offers MD5 alone")
    change = _add(sip, "change", "sip:change", "change an account; '' takes a value away. It is registered anew")
    change.epilog = (
        "Host, port, transport, proxy and username are what an account is: for another one of those create another "
        "account, then remove this one."
    )
    change.add_argument("--md5", action=on_or_off, default=None, help="whether a registrar may ask for MD5")
    for fixed in ("name", "host", "port", "transport", "proxy", "username"):  # which are refused with a reason
        change.add_argument(f"--{fixed}", default=None, help=argparse.SUPPRESS)
    for word, interval in ((create, 300), (change, None)):
        word.add_argument("--password-stdin", action="store_true", help="the password is on one line of standard input")
        word.add_argument("--auth-username", default=None, help="of the credentials, where it is not the username")
        word.add_argument(
            "--interval", type=_count(86_400, 60), default=interval, help="seconds that are asked for (300)"
        )
        word.add_argument(
            "--sender",
            choices=["auto", "direct", "drachtio", "external"],
            default=None,
            help="auto: drachtio where DRACHTIO_HOST is set, else direct; external: a controller, which tells us",
        )
        word.add_argument("--contact-host", default=None, metavar="HOST[:PORT]", help="that calls come to, if direct")
        word.add_argument("--target", default=None, metavar="URI", help="that dispatch sends its calls to: sip:…")
        word.add_argument("--external-id", default=None, help="its id at the backend that is told how it stands")
    listing = _add(sip, "list", "sip_standing:listing", "the accounts, and how each stands", as_json=True)
    listing.add_argument("tenant", nargs="?", default=None, help="only this one's")
    listing.add_argument("--status", choices=["pending", "registered", "failed"], default=None, help="only those")
    display = _add(sip, "show", "sip_standing:show", "all that is known of one account", as_json=True)
    register = _add(sip, "register", "sip:register", "register one now, and wait for what comes of it")
    register.add_argument("--dry-run", action="store_true", help="tell what would be done; only DNS is asked")
    register.add_argument("--allow-downgrade", action="store_true", help="forget which digest was accepted last")
    register.add_argument("--take-over", action="store_true", help="make an account of a controller ours")
    register.add_argument("--all", action="store_true", help="all that are enabled and ours, without waiting")
    register.add_argument("--host", default=None, help="with --all: only those with this host, or proxy")
    leave = _add(sip, "unregister", "sip:unregister", "end a binding, and begin none until `register`")
    for word in (register, leave):
        word.add_argument("--wait", type=_count(600, 0), default=40, metavar="SECONDS", help="0: do not wait (40)")
    remove = _add(sip, "remove", "sip:remove", "end its binding, then forget it")
    remove.add_argument("--yes", action="store_true", help="do not ask")
    for word in (change, display, register, leave, remove):
        nargs = "?" if word is register else None
        word.add_argument("account", nargs=nargs, help="TENANT/NAME, its name, its id, or the end of that")
        word.add_argument("--tenant", default=None, help="only this one's accounts")

    template = _group(commands, "template", "message templates, and what Meta thinks of them")
    sync = _add(template, "sync", "templates:sync", "ask Meta for all of them", as_json=True)
    sync.add_argument("tenant")
    sync.add_argument("--channel", default=None, help="only the account of this one")
    listing = _add(template, "list", "templates:listing", "what is known of them", as_json=True)
    listing.add_argument("tenant")

    lanes = _add(
        commands, "lanes", "lanes:lanes", "how sending goes on each channel; hold one, let it go on", as_json=True
    )
    lanes.add_argument("--tenant", default=None, help="only this one's")
    words = lanes.add_subparsers(dest="word", metavar="WORD")
    hold = _add(words, "hold", "lanes:hold", "send nothing more from a channel")
    hold.add_argument("--reason", default=None, help="for whoever asks why")
    resume = _add(words, "resume", "lanes:resume", "end any hold or pause of a channel, whoever set it")
    for word in (hold, resume):
        word.add_argument("channel", help="TENANT/NAME; or the id, or the end of it that `pombal lanes` shows")

    _add(commands, "actors", "jobs:actors", "every actor: queue, schedule, retries, what waits", as_json=True)
    for name, does in (("run", "run one actor here, without a broker"), ("send", "enqueue one job")):
        job = _add(commands, name, f"jobs:{name}", does)
        job.add_argument("actor")
        job.add_argument("arguments", metavar="JSON", help="an object of named arguments, or an array of arguments")

    trace = _add(commands, "trace", "trace:trace", "the story of one message, delivery or request", as_json=True)
    trace.add_argument("id", help="id of a message, an attempt, a delivery or a request, ours or the provider's")

    dead = _group(commands, "dead", "what was given up")
    listing = _add(dead, "list", "dead:listing", "open dead letters, grouped by cause with --grouped", as_json=True)
    listing.add_argument("--fingerprint", default=None)
    listing.add_argument("--grouped", action="store_true")
    listing.add_argument("--limit", type=int, default=50)
    show = _add(dead, "show", "dead:show", "one dead letter with its traceback", as_json=True)
    show.add_argument("id")
    for name, does in (("retry", "try again"), ("drop", "give up for good; rows and bodies stay")):
        act = _add(dead, name, f"dead:{name}", does)
        which = act.add_mutually_exclusive_group(required=True)
        which.add_argument("id", nargs="?")
        which.add_argument("--all", action="store_true")
        which.add_argument("--fingerprint")
        act.add_argument("--yes", action="store_true", help="do not ask before acting on more than one")

    _add(commands, "doctor", "doctor:doctor", "check versions, servers, keys, migrations, queues", as_json=True)
    return top


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as a namespace; wrong usage exits with 2."""
    if argv[:1] != ["test"]:
        return parser().parse_args(argv)
    ours = ("--cov", "-h", "--help")
    given = parser().parse_args(["test", *(argument for argument in argv[1:] if argument in ours)])
    given.arguments = [argument for argument in argv[1:] if argument not in ours]  # pytest's, in their order
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Without `argv` it is the process's own, and this all the process does."""
    if argv is not None:
        return _run(argv)
    garbage.starting()
    try:
        return _run(sys.argv[1:])
    finally:
        garbage.ending()


def _run(argv: Sequence[str]) -> int:
    arguments = parse(list(argv))
    module, _, function = arguments.does.partition(":")
    try:
        result: int = getattr(importlib.import_module(f"pombal.cli.{module}"), function)(arguments)
    except PombalError as error:
        print(f"pombal: {error}", file=sys.stderr)  # noqa: T201 - a command's output
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `pombal dead list | head`
        return 0
    except Exception as error:
        away = _away(error)
        if not away:
            raise
        print(f"pombal: {away}", file=sys.stderr)  # noqa: T201 - a command's output
        return 1
    return result


def _away(error: Exception) -> str:
    """One line for a store that does not answer; empty for any other error."""
    import redis  # only now, so that `--help` stays quick

    from pombal import db, log

    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return "Redis does not answer: see REDIS_URL"
    if db.is_store_trouble(error):
        return f"PostgreSQL does not answer, or not in time ({log.described(error)}): see DATABASE_URL"
    return ""


def say(line: str = "") -> None:
    """A command's output."""
    print(line, flush=True)  # noqa: T201 - this is the one place that prints


def as_json(value: object) -> None:
    say(msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2).decode())


def table(rows: list[dict[str, object]], *, empty: str, width: int | None = None) -> None:
    """Columns for people; `empty` is said when there is nothing. `width` cuts the last column so that lines fit."""
    if not rows:
        say(empty)
        return
    cells = [[str("" if v is None else v) for v in row.values()] for row in rows]
    heads = [name.upper() for name in rows[0]]
    widths = [max(len(line[n]) for line in [heads, *cells]) for n in range(len(heads))]
    if width is not None:
        room = max(width - sum(widths[:-1]) - 2 * len(widths[:-1]), _NARROWEST)
        cells = [[*line[:-1], line[-1] if len(line[-1]) <= room else line[-1][: room - 1] + "…"] for line in cells]
        widths[-1] = min(widths[-1], room)
    for line in [heads, *cells]:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def default_data() -> str:
    return str(data_folder())


def _count(most: int, fewest: int = 1) -> Callable[[str], int]:
    """A number from `fewest` to `most`, for argparse."""

    def count(text: str) -> int:
        if not text.isdecimal() or not fewest <= int(text[:12]) <= most:
            raise argparse.ArgumentTypeError(f"must be a number from {fewest} to {most}")
        return int(text)

    return count


def _add(
    to: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    does: str,
    help_: str,
    *,
    as_json: bool = False,
) -> argparse.ArgumentParser:
    made = to.add_parser(name, help=help_, description=help_)
    made.set_defaults(does=does)
    if as_json:
        made.add_argument("--json", action="store_true", help="print JSON")
    return made


def _group(
    to: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, help_: str
) -> "argparse._SubParsersAction[argparse.ArgumentParser]":
    made = to.add_parser(name, help=help_, description=help_)
    return made.add_subparsers(dest="what", metavar="WHAT", required=True)
