"""No process spends its start and its end on looking through what it imported; one that serves looks as usual."""

from tests.pombal.processes import output

USUAL = "import gc; print(*gc.get_threshold())"


def test_a_command_looks_through_what_it_imported_neither_on_its_way_nor_at_its_end() -> None:
    code = """
import gc, sys
from pombal.cli import main
sys.argv = ["pombal", "actors"]
assert main() == 0
print(gc.get_stats()[2]["collections"], gc.get_freeze_count() > 100_000)
"""

    assert output("-c", code).splitlines()[-1] == "0 True"


def test_a_command_that_others_call_leaves_their_garbage_alone() -> None:
    code = """
import gc
from pombal.cli import main
assert main(["actors"]) == 0
print(*gc.get_threshold(), gc.get_freeze_count())
"""

    assert output("-c", code).splitlines()[-1] == f"{output('-c', USUAL).strip()} 0"


def test_a_worker_process_that_has_booted_looks_as_usual_for_what_comes() -> None:
    code = """
import gc
from pombal import garbage
garbage.starting()
from pombal.middleware import Settled
from workers import broker
(settled,) = [one for one in broker.middleware if isinstance(one, Settled)]
settled.after_process_boot(broker)
print(*gc.get_threshold(), gc.get_freeze_count() > 100_000)
"""

    assert output("-c", code).splitlines()[-1] == f"{output('-c', USUAL).strip()} True"
