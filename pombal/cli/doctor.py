"""What an operator should know before trusting this installation, and what to do about it."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit
from uuid import UUID

import redis
from sqlalchemy import func, literal, select, text
from sqlalchemy.exc import DBAPIError

from pombal import db
from pombal.cli import as_json, parser, say
from pombal.cli.fleet import ROOT, queues
from pombal.errors import Misconfigured, Rejected
from pombal.settings import check_secrets, settings

_MOST_NAMES = 10
_LATE = timedelta(minutes=15)


class Finding(NamedTuple):
    level: Literal["ok", "note", "warning", "error"]
    what: str


def doctor(given: Namespace) -> int:
    """Exit code 1 when there is an error; warnings and notes alone are 0."""
    findings = [*_python(), *_secrets(), *_graph(), *_gateways(), *_postgres(), *_redis(), *_storage(), *_procfile()]
    if given.json:
        as_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            say(f"{finding.level:<8} {finding.what}")
    return 1 if any(finding.level == "error" for finding in findings) else 0


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("ok" if sys.version_info >= (3, 11) else "error", f"Python {version} (3.11 or newer is needed)")


def _secrets() -> Iterator[Finding]:
    wrong = check_secrets(settings())
    yield from (Finding("error", line) for line in wrong)
    if not wrong:
        yield Finding("ok", "secrets are set and strong enough")


def _graph() -> Iterator[Finding]:
    try:
        base_url, version = settings().require_graph()
    except Misconfigured as error:
        yield Finding("error", str(error))
        return
    yield Finding("ok", f"messages are sent through {urlsplit(base_url).hostname}, version {version}")


def _gateways() -> Iterator[Finding]:
    """Whether what stands in for a channel's own host and token can be used."""
    from providers.megaapi import normal_host

    host, has_token = settings().mega_api_host, bool(settings().mega_api_token)
    if host:
        try:
            normal_host(host)
        except Rejected as error:
            yield Finding("error", f"MEGA_API_HOST: {error}")
            return
        yield Finding("ok", "MEGA_API_HOST is set" + ("" if has_token else "; MEGA_API_TOKEN is not"))
    elif has_token:
        yield Finding("warning", "MEGA_API_TOKEN is set and used nowhere: it goes to MEGA_API_HOST alone")
    try:
        settings().require_media_networks()
    except Misconfigured as error:
        yield Finding("error", str(error))


def _storage() -> Iterator[Finding]:
    """Whether files can be kept: one is written and given up, and the place is asked for one."""
    from providers.storage import StorageUnavailable, key_of, storage

    try:
        with storage().spool() as spool:
            spool.write(b"doctor")
        storage().size(key_of(UUID(int=0), bytes(32), ".bin"))  # of a file that nobody has: a bucket must be asked
    except (Misconfigured, StorageUnavailable) as error:
        yield Finding("error", f"{error} (MEDIA_URL)")
        return
    yield Finding("ok", f"files can be kept ({storage().where})")
    if settings().is_production and not settings().media_url:
        yield Finding("warning", "MEDIA_URL is not set: files are in .pombal/media of this host, and gone with it")


def _postgres() -> Iterator[Finding]:
    try:
        with db.engine().connect() as connection:
            number = int(connection.scalar(text("SHOW server_version_num")) or 0)
            level: Literal["ok", "error"] = "ok" if number >= 140000 else "error"
            yield Finding(level, f"PostgreSQL {number // 10000}.{number % 10000} (14 or newer is needed)")
            if db.skips_policies(connection):
                yield Finding("error", "the role of DATABASE_URL bypasses row-level security: use another")
            else:
                yield Finding("ok", "the app's role is bound by row-level security")
            migrations = _migrations(connection.scalar(text("SELECT to_regclass('alembic_version')")) is not None)
            yield migrations
            if migrations.level == "error":
                return  # the tables to look into may not be there
            tomorrow = "'delivery_' || to_char(now() AT TIME ZONE 'UTC' + interval '1 day', 'YYYYMMDD')"
            if connection.scalar(text(f"SELECT to_regclass({tomorrow})")) is None:
                yield Finding("warning", "tomorrow's partition of delivery is not made yet: is a clock running?")
            if not check_secrets(settings()):
                yield from _unreadable_secrets()
                yield from _without_token()
            yield from _held()
            yield from _not_synced()
            yield from _left_to_people()
        if not check_secrets(settings()):
            yield from _baileys()
            yield from _sip()
    except Misconfigured as error:
        yield Finding("error", str(error))
    except DBAPIError as error:
        if not db.is_store_trouble(error):
            raise
        yield Finding("error", "PostgreSQL does not answer: see DATABASE_URL")


def _migrations(has_any: bool) -> Finding:
    from web.health import newest_migration

    if has_any:
        with db.session() as s:
            version = s.scalar(text("SELECT version_num FROM alembic_version"))
        if version == newest_migration():
            return Finding("ok", f"migrations are current ({version})")
    return Finding("error", "migrations are not current: run `pombal migrate`")


def _unreadable_secrets() -> Iterator[Finding]:
    from models import App
    from models.app import DEFAULT_SLUG

    with db.session() as s:
        for app in s.query(App).order_by(App.slug):
            try:
                kept = app.secrets()
            except Misconfigured as error:
                yield Finding("error", str(error))
                continue
            if not kept["app_secrets"] and not (app.slug == DEFAULT_SLUG and settings().whatsapp_app_secret):
                yield Finding("error", f"app {app.slug} has no secret: its webhooks are all refused")


def _without_token() -> Iterator[Finding]:
    from models import Channel, ChannelKind, Tenant

    default_host = _default_host()
    missing, homeless = [], []
    by_instance: dict[tuple[str, str], list[str]] = {}
    with db.session() as s:
        db.see_all(s)
        joined = select(Channel, Tenant.slug).join(Tenant, Tenant.id == Channel.tenant_id)
        kinds = (ChannelKind.META, ChannelKind.MEGAAPI)
        for channel, slug in s.execute(joined.where(Channel.kind.in_(kinds)).order_by(Tenant.slug, Channel.name)):
            name = f"{slug}/{channel.name}"
            try:
                secrets = channel.secrets()
            except Misconfigured as error:
                yield Finding("error", str(error))
                continue
            if channel.kind == ChannelKind.META:
                missing += [] if secrets.get("access_token") else [name]
                continue
            host = channel.config.get("host") or default_host
            if not host:
                homeless.append(name)
            elif not (secrets.get("token") or settings().mega_api_token):
                missing.append(name)
            by_instance.setdefault((host, channel.config.get("instance_key", "")), []).append(name)
    if missing:
        yield Finding("warning", f"no access token, so nothing can be sent (`pombal channel token`): {some(missing)}")
    if homeless:
        yield Finding("warning", f"no host, and MEGA_API_HOST is not set: {some(homeless)}")
    for names in by_instance.values():
        if len(names) > 1:
            yield Finding("warning", f"one instance, several channels; its events go to one of them: {some(names)}")


def _baileys() -> Iterator[Finding]:
    from pombal.cli import doctor_baileys  # which needs what is here

    yield from doctor_baileys.findings()


def _sip() -> Iterator[Finding]:
    from pombal.cli import doctor_sip  # which needs what is here

    yield from doctor_sip.findings()


def _default_host() -> str:
    """MEGA_API_HOST as channels have theirs; as it is where it cannot be used, which is a finding of its own."""
    from providers.megaapi import normal_host

    given = settings().mega_api_host
    try:
        return normal_host(given) if given else ""
    except Rejected:
        return given


def _held() -> Iterator[Finding]:
    from models import Lane, Tenant

    with db.session() as s:
        db.see_all(s)
        slugs = {row.id: row.slug for row in s.execute(select(Tenant.id, Tenant.slug))}
        held = [
            f"{slugs[row['tenant_id']]}/{row['name']} ({' '.join(filter(None, (row['hold'], row['hold_code'])))})"
            for row in Lane.overview(s)
            if row["hold"]
        ]
    if held:
        yield Finding("warning", f"sending is held (`pombal lanes`): {some(held)}")


def _not_synced() -> Iterator[Finding]:
    """Whether anybody asks gateways how their channels stand: a round is due every five minutes."""
    from models import Channel, Lease, standing
    from models.sync_report import LEASE

    with db.session() as s:
        db.see_all(s)
        ours = select(func.count(), func.min(Channel.created_at)).where(Channel.kind.in_(standing.POLLED))
        count, since = s.execute(ours).one()
        since = s.scalar(select(Lease.done_at).where(Lease.name == LEASE)) or since
        is_late = count and s.scalar(select(literal(since) < func.now() - _LATE))
    if is_late:
        what = f"no round over {count} channel{'' if count == 1 else 's'} ended for {_LATE.seconds // 60} minutes"
        yield Finding("warning", f"{what}: are a clock and a worker of status_sync running?")


def _left_to_people() -> Iterator[Finding]:
    """What is sound and nevertheless wants to be looked at."""
    from models import DeadLetter, Lane
    from models.dead_letter import LetterState

    with db.session() as s:
        db.see_all(s)
        letters = s.scalar(select(func.count()).select_from(DeadLetter).where(DeadLetter.state == LetterState.OPEN))
        unknown = Lane.waiting(s).unknown
    if letters:
        yield Finding("note", f"{letters} dead {_plural('letter', letters)} open (`pombal dead list --grouped`)")
    if unknown:
        what = f"{unknown} {_plural('message', unknown)} unknown: sent, perhaps; a status settles it, or somebody does"
        yield Finding("note", f"{what} (`pombal lanes`, `pombal dead list`)")


def _plural(word: str, number: int) -> str:
    return f"{word} is" if number == 1 else f"{word}s are"


def some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _redis() -> Iterator[Finding]:
    try:
        if settings().require_redis() == "memory://":
            yield Finding("warning", "REDIS_URL is memory://: jobs stay in this process")
            return
        from pombal.broker import redis_client  # needs the address when it is imported

        client = redis_client()
        version = str(client.info("server").get("redis_version", "?"))
        number = version.split(".")[0]
        yield Finding("ok" if number.isdecimal() and int(number) >= 6 else "error", f"Redis or Valkey {version} (≥ 6)")
        try:
            policy = client.config_get("maxmemory-policy").get("maxmemory-policy", "unknown")
            aof = client.config_get("appendonly").get("appendonly", "unknown")
        except redis.ResponseError:  # hosted ones forbid CONFIG
            yield Finding("warning", "cannot read Redis' configuration: it must be noeviction, with AOF on")
            return
        if policy == "noeviction":
            yield Finding("ok", "maxmemory-policy is noeviction")
        else:
            yield Finding("error", f"maxmemory-policy is {policy}: whole queues may vanish; set noeviction")
        if aof == "yes":
            yield Finding("ok", "appendonly is on")
        else:
            yield Finding("warning", "appendonly is off: after a crash of Redis the sweep rings again, seconds later")
    except Misconfigured as error:
        yield Finding("error", str(error))
    except redis.RedisError:
        yield Finding("error", "Redis does not answer: see REDIS_URL (webhooks are accepted all the same)")


def _procfile() -> Iterator[Finding]:
    named = procfile_queues()
    unknown, missing = sorted(set(named) - set(queues())), sorted(set(queues()) - set(named))
    if unknown:
        yield Finding("error", f"Procfile names queues that do not exist: {', '.join(unknown)}")
    if missing:
        yield Finding("error", f"no Procfile line works on: {', '.join(missing)}")
    if not unknown and not missing:
        yield Finding("ok", "the Procfile's queues are the fleet's")


def procfile_queues(file: Path = ROOT / "Procfile") -> list[str]:
    """The queues that a Procfile's worker lines name."""
    commands = [line.partition(": ")[2].split() for line in file.read_text().splitlines()]
    workers = [words[words.index("worker") :] for words in commands if "worker" in words]
    return [queue for words in workers for queue in parser().parse_args(words).queues]
