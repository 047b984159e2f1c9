"""What a repair may do in a session's folder of Baileys files, and what it cannot be made to do."""

import json
import os
import resource
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from providers.authfiles import Files
from providers.authkeys import entry
from providers.authstore import FAULTS, StoreFault, store
from tests.providers.auth import OWN_ID, creds, cut_after, dumped, killed_before_each_step, run_alone, when

KEPT = {
    "creds.json": dumped(creds()),
    "pre-key-7.json": b'{"private":{},"public":{}}',
    "pre-key-40.json": b'{"private":{},"public":{}}',
    "app-state-sync-key-AAAAAJkM.json": b"{}",
    "app-state-sync-version-regular.json": b"{}",
    "lid-mapping-5511922220001.json": b'"300000000000001"',
    "lid-mapping-300000000000001_reverse.json": b'"5511922220001"',
    "identity-key-5511922220001.0.json": b"{}",
    "device-list-5511922220001.json": b"[]",
    "tctoken-300000000000001@lid.json": b"{}",
    "session-notes.txt": b"of a person",
}
ONE = [  # of one person, who has a mapping: under both forms, of 7.x and of 6.7
    "session-300000000000001.0.json",
    "session-300000000000001_1.0.json",
    "session-300000000000001_1.12.json",
    "session-5511922220001.0.json",
    "session-5511922220001.3.json",
]
OTHERS = ["session-55119222200011.0.json", "session-551192222000.0.json", "session-3000000000000012_1.0.json"]
GROUP = [
    "sender-key-120363000000000001@g.us--5511922220001--0.json",
    "sender-key-120363000000000001@g.us--300000000000001_1--3.json",
    "sender-key-memory-120363000000000001@g.us.json",
]
OTHER_GROUPS = [
    "sender-key-1203630000000000012@g.us--5511922220001--0.json",
    "sender-key-5511922220001-1600000000@g.us--5511922220001--0.json",
    "sender-key-memory-5511922220001-1600000000@g.us.json",
    "sender-key-status@broadcast--5511922220001--0.json",
]
DERIVED = [*ONE, *OTHERS, *GROUP, *OTHER_GROUPS]


def fill(root: Path, session: str = "26") -> Path:
    folder = root / session
    folder.mkdir(parents=True)
    for name, content in {**KEPT, **{name: f"record of {name}".encode() for name in DERIVED}}.items():
        (folder / name).write_bytes(content)
    return folder


def files(root: Path, session: str = "26", **more: Any) -> Files:
    return Files(str(root), session, **{"own_id": OWN_ID, "apart": 0.0, **more})


def held(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir()}


def everything(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """All files below a folder, to see that nothing was touched."""
    found = (one for one in root.rglob("*") if one.is_file() and not one.is_symlink())
    return {str(one): (one.stat().st_mtime_ns, one.stat().st_mode, one.read_bytes()) for one in found}


def fault_of(act: Callable[[], object]) -> str:
    with pytest.raises(StoreFault) as caught:
        act()
    assert caught.value.code in FAULTS
    assert not any(word in str(caught.value) for word in ("55119", "pytest", "noise", "creds-", "session-", "@"))
    return caught.value.code


# ----------------------------------------------------------------------------------------------------- what is named


@pytest.mark.parametrize("name", DERIVED)
def test_sessions_and_sender_keys_may_be_dropped(name: str) -> None:
    assert entry(name.removesuffix(".json")) is not None


@pytest.mark.parametrize(
    "name",
    [
        *KEPT,
        "session-../creds.json",
        "session-5511922220001.0/../creds.json",
        "session-5511922220001.json",
        "session-.0.json",
        "sender-key-memory-.json",
        "sender-key-120363000000000001@g.us.json",
        "session-5511922220001.0.json\n",
        "../26/session-5511922220001.0.json",
        "",
    ],
)
def test_all_else_is_refused_before_anything_is_done(tmp_path: Path, name: str) -> None:
    fill(tmp_path)
    before = everything(tmp_path)

    assert fault_of(lambda: files(tmp_path).drop([ONE[0], name], "r1")) == "refused"

    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "jid",
    [
        "5511922220001@s.whatsapp.net",
        "5511922220001:3@s.whatsapp.net",
        "300000000000001@lid",
        "300000000000001:12@lid",
    ],
)
def test_a_contact_is_found_under_both_forms_with_all_devices_and_nobody_else(tmp_path: Path, jid: str) -> None:
    fill(tmp_path)

    assert files(tmp_path).plan_contacts([jid, "120363000000000001@g.us", "nonsense"]) == ONE


def test_a_contact_without_a_mapping_is_found_under_the_form_that_is_known(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    (folder / "lid-mapping-5511922220001.json").write_bytes(b'"30000')  # cut off

    assert files(tmp_path).plan_contacts(["5511922220001@s.whatsapp.net"]) == ONE[3:]
    assert files(tmp_path).plan_contacts(["5511900000000@s.whatsapp.net"]) == []


def test_derived_keys_are_all_of_them_or_one_groups_sender_keys(tmp_path: Path) -> None:
    fill(tmp_path)
    one = files(tmp_path)

    assert one.plan_derived() == sorted(DERIVED)
    assert one.plan_derived(["120363000000000001@g.us"]) == sorted(GROUP)
    assert one.plan_derived([]) == []
    assert fault_of(lambda: one.plan_derived(["5511922220001@s.whatsapp.net"])) == "refused"


def test_a_plan_writes_nothing(tmp_path: Path) -> None:
    fill(tmp_path)
    before = everything(tmp_path)
    one = files(tmp_path)

    one.check()
    one.plan_contacts(["5511922220001@s.whatsapp.net"])
    one.plan_derived()
    one.plan_restore()

    assert everything(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["26"]


# ------------------------------------------------------------------------------------------------------ what is dropped


def test_what_is_dropped_is_in_the_backup_and_nothing_else_is_touched(tmp_path: Path) -> None:
    folder, neighbour = fill(tmp_path), fill(tmp_path, "2")
    before = everything(neighbour)

    assert files(tmp_path).drop([*ONE, "session-5511900000000.0.json"], "r1") == len(ONE)

    backup = tmp_path / ".pombal-backups" / "26" / "r1"
    told = json.loads((backup / "manifest.json").read_bytes())
    assert sorted(told["files"]) == ONE
    assert {name: (backup / name).read_bytes() for name in ONE} == {name: f"record of {name}".encode() for name in ONE}
    assert sorted(held(folder)) == sorted([*KEPT, *OTHERS, *GROUP, *OTHER_GROUPS])
    assert everything(neighbour) == before
    for one in (backup.parent.parent, backup.parent, backup):
        assert stat.S_IMODE(one.stat().st_mode) == 0o700
    assert {stat.S_IMODE(one.stat().st_mode) for one in backup.iterdir()} == {0o600}


def test_a_drop_may_be_repeated_and_says_the_same(tmp_path: Path) -> None:
    fill(tmp_path)
    one = files(tmp_path)
    assert one.drop(DERIVED, "r1") == len(DERIVED)
    before = everything(tmp_path)

    assert one.drop(DERIVED, "r1") == len(DERIVED)

    assert {name: found[2] for name, found in everything(tmp_path).items()} == {
        name: found[2] for name, found in before.items()
    }
    assert one.drop(DERIVED, "r2") == 0  # they are not in this backup
    assert one.drop([], "r3") == 0


def test_what_came_back_in_between_is_kept_beside_what_was_dropped_first(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    one = files(tmp_path)
    one.drop(ONE, "r1")
    (folder / ONE[0]).write_bytes(b"a new one")

    assert one.drop(ONE, "r1") == len(ONE)

    backup = tmp_path / ".pombal-backups" / "26" / "r1"
    assert (backup / ONE[0]).read_bytes() == f"record of {ONE[0]}".encode()
    assert (backup / f"{ONE[0]}~2").read_bytes() == b"a new one"


def test_what_is_written_while_it_is_copied_is_not_deleted(tmp_path: Path) -> None:
    folder = fill(tmp_path)

    last = tmp_path / ".pombal-backups" / "26" / "r1" / ONE[-1]
    when(
        lambda call: call == "fsync" and last.exists(), lambda: (folder / ONE[0]).write_bytes(b"by a socket that lives")
    )
    code = fault_of(lambda: files(tmp_path).drop(ONE, "r1"))
    sys.setprofile(None)

    assert code == "changed"
    assert set(ONE) <= set(held(folder))


def test_a_full_disk_takes_nothing_away(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    (folder / ONE[-1]).write_bytes(bytes(100_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        code = fault_of(lambda: files(tmp_path).drop(ONE, "r1"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert code == "no_space"
    assert set(ONE) <= set(held(folder))
    assert files(tmp_path).drop(ONE, "r1") == len(ONE)


def test_two_at_once_do_not_write(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    one, other = files(tmp_path), files(tmp_path)

    with one._backups.locked():
        assert fault_of(lambda: other.drop(ONE, "r1")) == "busy"
        assert fault_of(other.keep_creds) == "busy"

    assert set(ONE) <= set(held(folder))
    assert other.drop(ONE, "r1") == len(ONE)


def test_the_five_newest_backups_stay_and_what_is_not_ours(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    shelf = tmp_path / ".pombal-backups" / "26"
    for number in range(1, 9):
        (folder / ONE[0]).write_bytes(b"again %d" % number)
        files(tmp_path).drop(ONE[:1], f"r{number}")
        if number == 1:
            (shelf / "r1" / "notes.txt").write_text("of a person")
            (shelf / "of_a_person").mkdir()
            (shelf / "of_a_person" / "file").write_text("kept")
            (shelf / "begun").mkdir()  # killed before its first file

    assert sorted(os.listdir(shelf)) == ["of_a_person", "r1", "r4", "r5", "r6", "r7", "r8"]
    assert sorted(os.listdir(shelf / "r1")) == ["manifest.json", "notes.txt", ONE[0]]


def drop_killed_everywhere(root: str) -> None:
    number = 0
    folder = Path()

    def fresh() -> None:
        nonlocal number, folder
        number += 1
        folder = fill(Path(root) / str(number))
        for old in range(4):
            backup = folder.parent / ".pombal-backups" / "26" / f"old{old}"
            backup.mkdir(parents=True, mode=0o700)
            (backup / ONE[0]).write_bytes(b"older")
            (backup / "manifest.json").write_bytes(
                dumped({"what": "pombal session backup", "version": 1, "at": old, "files": {}})
            )
        for one in (folder.parent / ".pombal-backups", folder.parent / ".pombal-backups" / "26"):
            one.chmod(0o700)
        (folder.parent / ".pombal-backups" / "26" / "old3" / "manifest.json").rename(
            folder.parent / ".pombal-backups" / "26" / "old3" / "manifest.json~"
        )

    names = [*ONE[:2], *GROUP[2:]]

    def act() -> int:
        return files(folder.parent).drop(names, "r1")

    def check() -> None:
        now = held(folder)
        assert {name: now[name] for name in KEPT} == KEPT
        backup = folder.parent / ".pombal-backups" / "26" / "r1"
        for name in names:
            assert f"record of {name}".encode() in (
                now.get(name),
                backup.joinpath(name).read_bytes() if name not in now else b"",
            )
        assert act() == len(names)
        assert sorted(held(folder)) == sorted({*KEPT, *DERIVED} - set(names))
        assert {name: (backup / name).read_bytes() for name in names} == {n: f"record of {n}".encode() for n in names}
        assert not (backup / ".part").exists()

    assert killed_before_each_step(fresh, act, check) > 50


def test_a_drop_that_is_killed_between_any_two_steps_goes_on_and_loses_nothing(tmp_path: Path) -> None:
    run_alone("tests.providers.test_authfiles", "drop_killed_everywhere", str(tmp_path))


# --------------------------------------------------------------------------------------------------- where it may write


@pytest.mark.parametrize("session", ["../1", "1/2", "/etc", "", ".", "..", "a" * 65, "1\n", "é", None, 7])
def test_a_session_that_is_no_plain_name_is_refused(session: Any) -> None:
    config = {"session": session, "auth": {"kind": "files", "folder": "/srv/sessions"}}

    assert fault_of(lambda: store(config, {})) == "refused"
    assert fault_of(lambda: store({"session": "1", "auth": {**config["auth"], "name": session}}, {})) == "refused"


@pytest.mark.parametrize("folder", [None, "", "relative", "/", "//", "/srv/../etc", "/srv\0", 7])
def test_a_root_that_is_no_absolute_folder_is_refused(folder: Any) -> None:
    with pytest.raises(StoreFault) as caught:
        store({"session": "1", "auth": {"kind": "files", "folder": folder}}, {})
    assert caught.value.code == "misconfigured"


def test_the_store_of_a_channel_is_where_its_settings_say(tmp_path: Path) -> None:
    fill(tmp_path, "instance-7")
    backups = tmp_path / "backups"
    backups.mkdir()
    auth = {"kind": "files", "folder": str(tmp_path), "name": "instance-7", "backups": str(backups)}

    one = store({"session": "Loja", "auth": auth}, {}, OWN_ID)

    assert store({"session": "Loja"}, {}) is None
    assert one is not None
    one.check()
    assert one.drop(ONE, "r1") == len(ONE)
    assert sorted(os.listdir(backups / "instance-7" / "r1")) == ["manifest.json", *ONE]
    assert not (tmp_path / ".pombal-backups").exists()
    inside = {**auth, "backups": str(tmp_path / "instance-7" / "backups")}
    for wrong in ({**auth, "kind": "redis"}, inside, {**auth, "backups": "relative"}):
        assert fault_of(lambda wrong=wrong: store({"session": "Loja", "auth": wrong}, {})) == "misconfigured"  # type: ignore[misc]


def test_a_link_below_the_root_is_never_followed(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    real = fill(elsewhere)
    before = everything(elsewhere)
    root.mkdir()
    (root / "26").symlink_to(real)
    assert fault_of(lambda: files(root).drop(ONE, "r1")) == "refused"
    assert fault_of(files(root).check) == "refused"

    (root / "26").unlink()
    folder = fill(root)
    (folder / ONE[0]).unlink()
    (folder / ONE[0]).symlink_to(real / ONE[0])
    assert fault_of(lambda: files(root).drop(ONE, "r1")) == "refused"
    assert set(ONE) <= set(held(folder))

    (folder / "creds.json").unlink()
    (folder / "creds.json").symlink_to(real / "creds.json")
    assert fault_of(files(root).creds_are_broken) == "refused"
    assert fault_of(files(root).keep_creds) == "refused"

    for path in (".pombal-backups", ".pombal-backups/26"):
        other = fill(tmp_path / path.replace("/", "_"))
        (other.parent / path).parent.mkdir(exist_ok=True)
        (other.parent / path).symlink_to(real)
        assert fault_of(lambda other=other: files(other.parent).drop(ONE, "r1")) == "refused"  # type: ignore[misc]
        assert set(ONE) <= set(held(other))
    assert everything(elsewhere) == before


def test_a_pipe_in_a_files_place_does_not_hang_it(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    (folder / ONE[0]).unlink()
    os.mkfifo(folder / ONE[0])

    assert fault_of(lambda: files(tmp_path).drop(ONE, "r1")) == "refused"


def test_backups_that_others_could_read_are_refused(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    shelf = tmp_path / ".pombal-backups" / "26"
    shelf.mkdir(parents=True, mode=0o755)

    assert fault_of(lambda: files(tmp_path).drop(ONE, "r1")) == "refused"
    assert fault_of(files(tmp_path).check) == "refused"
    assert set(ONE) <= set(held(folder))


@pytest.mark.parametrize("backup", ["../r1", "", ".creds", "a/b"])
def test_a_backups_name_is_plain(tmp_path: Path, backup: str) -> None:
    folder = fill(tmp_path)

    assert fault_of(lambda: files(tmp_path).drop(ONE, backup)) == "refused"
    assert set(ONE) <= set(held(folder))


def test_what_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    assert fault_of(lambda: files(tmp_path).plan_derived()) == "missing"
    assert fault_of(files(tmp_path / "nowhere").check) == "missing"
    fill(tmp_path)
    assert fault_of(lambda: files(tmp_path).restore("creds-00000001-0123456789abcdef.json", "r1")) == "missing"


# ------------------------------------------------------------------------------------------------------- credentials

BROKEN = {
    "empty": b"",
    "zeros": bytes(4096),
    "cut early": dumped(creds())[:60],
    "cut late": dumped(creds())[:-20],
    "nothing": b"null",
    "of nobody": dumped({key: value for key, value in creds().items() if key != "me"}),
    "no noise key": dumped({key: value for key, value in creds().items() if key != "noiseKey"}),
    "too deep": b"[" * 100_000,
    "no text": b"\xff\xfe{}",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_credentials_are_known_and_replaced_by_those_that_were_kept(tmp_path: Path, content: bytes) -> None:
    folder = fill(tmp_path)
    one = files(tmp_path)
    assert one.keep_creds()
    assert not one.creds_are_broken()
    assert one.plan_restore() is None
    (folder / "creds.json").write_bytes(content)
    (folder / "creds.json").chmod(0o640)
    before = held(folder)

    assert one.creds_are_broken()
    name = one.plan_restore()
    assert name is not None
    one.restore(name, "r1")

    assert not one.creds_are_broken()
    # Pre-key 40 is there: numbers go on behind it, and it stays what the server hands out.
    expected = {**creds(), "nextPreKeyId": 41, "firstUnuploadedPreKeyId": 41}
    assert json.loads((folder / "creds.json").read_bytes()) == expected
    assert held(folder) == {**before, "creds.json": dumped(expected)}
    assert stat.S_IMODE((folder / "creds.json").stat().st_mode) == 0o640
    assert (tmp_path / ".pombal-backups" / "26" / "r1" / "creds.json").read_bytes() == content
    one.restore(name, "r1")  # nothing happens
    assert held(folder) == {**before, "creds.json": dumped(expected)}


def test_missing_credentials_come_back_with_the_mode_of_their_neighbours(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    for one in folder.iterdir():
        one.chmod(0o604)
    one_store = files(tmp_path)
    one_store.keep_creds()
    (folder / "creds.json").unlink()

    name = one_store.plan_restore()
    assert name is not None
    one_store.restore(name, "r1")

    assert stat.S_IMODE((folder / "creds.json").stat().st_mode) == 0o604
    assert not one_store.creds_are_broken()


def test_a_file_that_is_being_written_is_not_broken(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    (folder / "creds.json").write_bytes(b"")

    when(lambda call: call == "sleep", lambda: (folder / "creds.json").write_bytes(KEPT["creds.json"]))
    is_broken = files(tmp_path).creds_are_broken()
    sys.setprofile(None)

    assert not is_broken


NEW = creds(pairing=2)
OTHERS_CREDS = {
    "whole": dumped(NEW),
    "in the making": dumped({key: value for key, value in NEW.items() if key != "me"}),
    "cut behind the noise key": cut_after("noiseKey", NEW),
    "cut behind the registration": cut_after("registrationId", {**creds(), "registrationId": 999}),
    "of another device": cut_after("me", {**creds(), "me": {"id": f"{OWN_ID}:8@s.whatsapp.net"}}),
    "a later signed pre-key": cut_after("signedPreKey", creds(pre_key=2)),
}


@pytest.mark.parametrize("content", OTHERS_CREDS.values(), ids=OTHERS_CREDS)
def test_credentials_of_another_pairing_or_a_later_state_are_never_overwritten(tmp_path: Path, content: bytes) -> None:
    folder = fill(tmp_path)
    one = files(tmp_path)
    one.keep_creds()
    name = one._backups.newest()[0].name
    (folder / "creds.json").write_bytes(content)

    assert one.plan_restore() is None
    assert fault_of(lambda: one.restore(name, "r1")) == "refused"

    assert (folder / "creds.json").read_bytes() == content


def test_credentials_of_another_number_are_neither_kept_nor_restored(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    other = files(tmp_path, own_id="5511999990000")
    assert not other.keep_creds()
    files(tmp_path).keep_creds()
    name = other._backups.newest()[0].name
    (folder / "creds.json").write_bytes(b"")

    assert other.plan_restore() is None
    assert fault_of(lambda: other.restore(name, "r1")) == "refused"
    assert files(tmp_path, own_id=None).plan_restore() == name


def test_only_the_newest_state_is_ever_restored_also_when_its_copy_is_lost(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    one, shelf = files(tmp_path), tmp_path / ".pombal-backups" / "26" / ".creds"
    one.keep_creds()
    old = one._backups.newest()[0].name
    (folder / "creds.json").write_bytes(dumped(creds(pre_key=2)))
    one.keep_creds()
    (folder / "creds.json").write_bytes(dumped(creds(pre_key=2, nextPreKeyId=61)))
    one.keep_creds()
    first, second = one._backups.newest()
    (folder / "creds.json").write_bytes(b"")

    assert one.plan_restore() == first.name
    (shelf / first.name).write_bytes(b"")
    assert one.plan_restore() == second.name
    (shelf / second.name).write_bytes(b"")
    assert one.plan_restore() is None
    assert fault_of(lambda: one.restore(old, "r1")) == "missing"


def test_credentials_are_kept_when_they_are_news_and_three_of_them(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    one, shelf = files(tmp_path), tmp_path / ".pombal-backups" / "26" / ".creds"

    def keep(**more: Any) -> bool:
        (folder / "creds.json").write_bytes(dumped(creds(**more)))
        return one.keep_creds()

    assert keep()
    assert not keep()
    assert not keep(accountSyncCounter=4, lastAccountSyncTimestamp=1_788_000_000, routingInfo={"type": "Buffer"})
    assert [keep(nextPreKeyId=number) for number in (61, 91, 121, 151)] == [True] * 4
    assert not keep(me={})
    names = sorted(os.listdir(shelf))
    assert [name[:14] for name in names] == ["creds-00000003", "creds-00000004", "creds-00000005"]
    assert {stat.S_IMODE((shelf / name).stat().st_mode) for name in names} == {0o600}
    assert one._backups.newest()[0].creds.fields["nextPreKeyId"] == 151


def restore_killed_everywhere(root: str) -> None:
    number, folder = 0, Path()
    broken = dumped(creds())[:-30]

    def fresh() -> None:
        nonlocal number, folder
        number += 1
        folder = fill(Path(root) / str(number))
        files(folder.parent).keep_creds()
        (folder / "creds.json").write_bytes(broken)

    def act() -> None:
        one = files(folder.parent)
        one.restore(one._backups.newest()[0].name, "r1")

    def check() -> None:
        now = (folder / "creds.json").read_bytes()
        assert now == broken or json.loads(now)["me"] == creds()["me"]
        act()
        assert not files(folder.parent).creds_are_broken()
        assert (folder.parent / ".pombal-backups" / "26" / "r1" / "creds.json").read_bytes() == broken
        assert set(held(folder)) == {*KEPT, *DERIVED}

    assert killed_before_each_step(fresh, act, check) > 30


def test_a_restore_that_is_killed_between_any_two_steps_goes_on(tmp_path: Path) -> None:
    run_alone("tests.providers.test_authfiles", "restore_killed_everywhere", str(tmp_path))
