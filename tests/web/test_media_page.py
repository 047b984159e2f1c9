"""What docs/media.md says is so."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pombal.cli.fleet import ROOT
from pombal.settings import Settings, variable
from providers.media import FAULTS
from tests.web.files import KiB, MiB, a_customer, jpeg, pdf
from tests.web.process import Web
from web import accepted, shapes

PAGE = (ROOT / "docs" / "media.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
EXAMPLES = [line for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


def table(title: str) -> list[list[str]]:
    """The rows below a header that begins so, as cells."""
    lines = PAGE[PAGE.index(f"| {title} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def words(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_does_what_it_says(command: str, web: Web, tmp_path: Path) -> None:
    customer = a_customer(web)
    (tmp_path / "invoice.pdf").write_bytes(pdf())
    env = {"KEY": customer.key, "ID": str(customer.keeps(jpeg(5_000)))}
    command = command.replace("http://127.0.0.1:8000", str(web.http.base_url).rstrip("/")).replace(
        "curl ", "curl -fsS "
    )

    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")
    made = {path.name: path.stat().st_size for path in tmp_path.iterdir() if path.name != "invoice.pdf"}
    assert made in ({"photo": 5_000}, {"begin": 100}, {})
    assert made or "media_id" in done.stdout or "200 OK" in done.stdout


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_understood(example: str) -> None:
    assert shapes.asked(example.encode()).type in accepted.MOST_BYTES_OF


def test_each_code_has_its_line() -> None:
    assert {code for row in table("`error_code`") for code in words(row[0])} == FAULTS


def test_types_and_limits_are_those_of_the_code() -> None:
    units = {"KiB": KiB, "MiB": MiB}
    rows = {kind.strip("`"): (words(types), most.split()) for kind, types, most, *_ in table("kind")}

    assert {kind: int(most[0]) * units[most[1]] for kind, (_, most) in rows.items()} == accepted.MOST_BYTES_OF
    assert {type_: kind for kind, (types, _) in rows.items() for type_ in types} == accepted.KINDS


def test_each_variable_is_one_that_is_read() -> None:
    known = {variable(field) for field in Settings.__struct_fields__}

    assert {name for row in table("variable") for name in words(row[0])} <= known
