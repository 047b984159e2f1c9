"""No tenant can reach another's rows: not by a forgotten filter, a foreign id, or the next user of a connection."""

import os
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError

import models
from pombal import db
from pombal.ids import uuid7
from tests.factories import Shop, a_delivery, a_shop, a_wamid, all_of, rows, seen_by, superuser, texts
from workers import incoming_message

# Tables with a `tenant_id` that are read before anybody knows whose request it is.
WITHOUT_POLICY = {
    "app": "a webhook names its app; the tenant follows from it. Secrets in it are sealed, and it is never served",
    "route": "says to which tenant a number belongs; holds ids alone, and is never served",
    "lane": "the sweep looks for lanes of all tenants that need somebody; it holds ids, codes and times alone",
    "webhook_token": "a webhook names its channel by its token; hashes and ids alone, and never served",
    "sync_report": "a round over the whole fleet is nobody's; served by its id and its tenant together",
}
TENANTED = sorted(
    table.name
    for table in models.Base.metadata.sorted_tables
    if "tenant_id" in table.columns and table.name not in WITHOUT_POLICY
)
DENIED = "permission denied|must be owner|must be able to SET ROLE"


@pytest.fixture(scope="module")
def ours() -> Shop:
    return a_shop_with_a_message()


@pytest.fixture(scope="module")
def theirs() -> Shop:
    return a_shop_with_a_message()


def test_every_table_with_a_tenant_is_protected_even_from_its_owner() -> None:
    with superuser() as connection:
        found = connection.execute("""
            SELECT c.relname, c.relrowsecurity AND c.relforcerowsecurity,
                (SELECT count(*) FROM pg_policy WHERE polrelid = c.oid)
            FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid
            WHERE a.attname = 'tenant_id' AND c.relkind IN ('r', 'p') AND NOT c.relispartition
                AND c.relnamespace = 'public'::regnamespace
        """).fetchall()

    assert {name for name, is_forced, _ in found if not is_forced} == set(WITHOUT_POLICY)
    assert {name for name, is_forced, policies in found if is_forced and policies == 1} == set(TENANTED)


def test_every_tenants_key_begins_with_the_tenant() -> None:
    for table in models.Base.metadata.sorted_tables:
        if table.name in TENANTED and table.name != "dead_letter":  # its letters may be nobody's
            assert table.primary_key.columns.keys()[0] == "tenant_id", table.name


def test_every_row_that_names_another_names_its_tenant_too() -> None:
    for table in models.Base.metadata.sorted_tables:
        for constraint in table.foreign_key_constraints:
            if constraint.referred_table.name in TENANTED:
                assert constraint.column_keys[0] == "tenant_id", f"{table.name} → {constraint.referred_table.name}"


@pytest.mark.parametrize("table", TENANTED)
def test_without_a_tenant_a_query_without_a_filter_sees_nothing(table: str, ours: Shop, theirs: Shop) -> None:
    with db.session() as s:
        found = s.scalar(text(f"SELECT count(*) FROM {table} WHERE tenant_id IS NOT NULL"))  # noqa: S608 - our names

    assert found == 0


@pytest.mark.parametrize("table", TENANTED)
def test_with_one_tenant_a_query_without_a_filter_sees_its_rows_alone(table: str, ours: Shop, theirs: Shop) -> None:
    with seen_by(ours) as s:
        tenants = set(s.scalars(text(f"SELECT tenant_id FROM {table} WHERE tenant_id IS NOT NULL")))  # noqa: S608 - our names

    assert tenants <= {ours.tenant.id}
    if table in ("message", "contact", "conversation", "event", "channel"):
        assert tenants


def test_an_update_and_a_delete_without_a_filter_touch_no_other_tenant(ours: Shop, theirs: Shop) -> None:
    before = rows(theirs, "SELECT * FROM message")

    with seen_by(ours) as s, s.begin_nested() as savepoint:
        for order in ("UPDATE message SET type = 'x'", "DELETE FROM message"):
            assert s.execute(text(f"{order} RETURNING tenant_id")).scalars().all() == [ours.tenant.id]
        savepoint.rollback()

    assert rows(theirs, "SELECT * FROM message") == before != []


@pytest.mark.parametrize("seen", ["nobody", "another"])
def test_a_row_of_a_tenant_that_is_not_seen_cannot_be_written(seen: str, ours: Shop, theirs: Shop) -> None:
    insert = text("INSERT INTO contact (tenant_id, id) VALUES (:tenant, :id)")

    with (
        pytest.raises(DBAPIError, match="row-level security"),
        db.session([ours.tenant.id] if seen == "another" else []) as s,
    ):
        s.execute(insert, {"tenant": theirs.tenant.id, "id": uuid7()})


@pytest.mark.parametrize("table", ["contact_identity", "event", "message_status"])
def test_a_row_cannot_be_moved_to_another_tenant(table: str, ours: Shop, theirs: Shop) -> None:
    with superuser() as connection:
        connection.execute(
            "INSERT INTO message_status (tenant_id, channel_id, provider_id) VALUES (%s, %s, gen_random_uuid())",
            [ours.tenant.id, ours.channel.id],
        )

    with pytest.raises(DBAPIError, match="row-level security"), seen_by(ours) as s:
        s.execute(text(f"UPDATE {table} SET tenant_id = :t"), {"t": theirs.tenant.id})  # noqa: S608 - our names


def test_the_next_transaction_of_a_connection_sees_nothing_of_the_one_before(ours: Shop) -> None:
    with db.engine().connect() as connection:
        for end in (connection.commit, connection.rollback):
            connection.execute(
                text("SELECT set_config('app.tenant_ids', :ids, true)"), {"ids": f"{{{ours.tenant.id}}}"}
            )
            assert connection.scalar(text("SELECT count(*) FROM message")) == 1
            end()
            assert connection.scalar(text("SELECT count(*) FROM message")) == 0
            connection.rollback()


def test_a_batch_of_two_tenants_cannot_mix_them(ours: Shop, theirs: Shop) -> None:
    (contact,) = rows(theirs, "SELECT id FROM contact")
    both = [ours.tenant.id, theirs.tenant.id]

    with pytest.raises(IntegrityError), db.session(both) as s:
        s.execute(
            text(
                "INSERT INTO conversation (tenant_id, id, channel_id, contact_id) VALUES (:t, :id, :channel, :contact)"
            ),
            {"t": ours.tenant.id, "id": uuid7(), "channel": ours.channel.id, "contact": contact["id"]},
        )
    with pytest.raises(IntegrityError), db.session(both) as s:
        s.execute(
            text(
                "INSERT INTO template (tenant_id, channel_id, name, language, status, status_at)"
                " VALUES (:t, :channel, 'n', 'pt', 'approved', now())"
            ),
            {"t": ours.tenant.id, "channel": theirs.channel.id},
        )


def test_a_letter_is_seen_by_its_tenant_and_one_of_nobody_by_all(ours: Shop, theirs: Shop) -> None:
    keys = {name: f"test:{uuid4()}" for name in ("ours", "nobodys")}
    with superuser() as connection:
        for name, tenant in (("ours", ours.tenant.id), ("nobodys", None)):
            a_letter(connection, keys[name], tenant)

    query = "SELECT key FROM dead_letter WHERE key = ANY(:keys)"
    seen = {
        shop.tenant.slug: {row["key"] for row in rows(shop, query, keys=[*keys.values()])} for shop in (ours, theirs)
    }

    assert seen == {ours.tenant.slug: set(keys.values()), theirs.tenant.slug: {keys["nobodys"]}}


# -- the app's role --------------------------------------------------------------------------------------------------


def test_the_apps_role_has_no_power_over_the_policies() -> None:
    with db.session() as s:
        (role,) = all_of(
            s,
            "SELECT rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolreplication,"
            " (SELECT count(*) FROM pg_auth_members WHERE member = pg_roles.oid) AS memberships,"
            " (SELECT count(*) FROM pg_class WHERE relowner = pg_roles.oid) AS owned"
            " FROM pg_roles WHERE rolname = current_user",
        )

    assert not any(role.values())


@pytest.mark.parametrize(
    "order",
    [
        "SET ROLE pombal_owner",
        "SET ROLE postgres",
        "ALTER TABLE message DISABLE ROW LEVEL SECURITY",
        "ALTER TABLE message NO FORCE ROW LEVEL SECURITY",
        "DROP POLICY tenant_isolation ON message",
        "CREATE POLICY all_of_it ON message USING (true)",
        "ALTER ROLE pombal BYPASSRLS",
        "CREATE TABLE mine (id int)",
        "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "TRUNCATE message",
        "ALTER FUNCTION make_partitions(integer) SET search_path = public",
        "SELECT count(*) FROM event_default",  # a partition has no policy of its own
        "SELECT count(*) FROM delivery_default",
    ],
)
def test_the_apps_role_cannot_get_around_the_policies(order: str) -> None:
    with (
        psycopg.connect(os.environ["DATABASE_URL"]) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege, match=DENIED),
    ):
        connection.execute(order.encode())


def test_switching_row_security_off_raises_instead_of_showing_everything(ours: Shop) -> None:
    with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
        connection.execute("SET row_security = off")
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
            connection.execute("SELECT count(*) FROM message")


# -- makers ----------------------------------------------------------------------------------------------------------


def a_shop_with_a_message() -> Shop:
    shop = a_shop()
    incoming_message([str(a_delivery(shop, texts(shop, a_wamid())))])
    return shop


def a_letter(connection: psycopg.Connection[object], key: str, tenant: UUID | None) -> None:
    connection.execute(
        "INSERT INTO dead_letter (id, key, tenant_id, actor, queue, args, error, fingerprint)"
        " VALUES (%s, %s, %s, 'a', 'a', '{}', 'e', 'f')",
        [uuid7(), key, tenant],
    )
