"""Ids that sort by birth."""

import threading
from datetime import UTC, datetime, timedelta
from uuid import RFC_4122, UUID

from pombal.ids import born, uuid7


def test_ids_grow_within_a_process_also_within_a_millisecond() -> None:
    made = [uuid7() for _ in range(10_000)]

    assert made == sorted(set(made))


def test_ids_of_several_threads_are_all_different_and_grow_in_each() -> None:
    made: list[list[UUID]] = [[] for _ in range(8)]
    threads = [threading.Thread(target=lambda ids=ids: ids.extend(uuid7() for _ in range(2_000))) for ids in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(ids == sorted(ids) for ids in made)
    assert len({id_ for ids in made for id_ in ids}) == 16_000


def test_an_id_is_a_uuid_of_version_seven() -> None:
    for id_ in (uuid7() for _ in range(1_000)):
        assert (id_.version, id_.variant) == (7, RFC_4122)


def test_an_id_tells_when_it_was_made() -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    made = [born(uuid7()) for _ in range(100)]

    assert before <= made[0] <= made[-1]
    assert made[-1] - before < timedelta(minutes=1)
    assert born(UUID("017f22e2-79b0-7cc3-98c4-dc0c0c07398f")) == datetime(2022, 2, 22, 19, 22, 22, tzinfo=UTC)
