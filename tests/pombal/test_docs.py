"""What docs/ says of sending is what the API takes."""

import json
import re

import pytest

from pombal.cli.fleet import ROOT
from sandbox.kinds import KINDS
from web import shapes

PAGE = (ROOT / "docs" / "sending.md").read_text()
EXAMPLES = [line for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_understood(example: str) -> None:
    example = re.sub(r'"not_before": "[^"]*"', '"not_before": "2026-01-01T09:00:00-03:00"', example)
    understand = shapes.asked_the_old_way if "content" in json.loads(example) else shapes.asked

    assert understand(example.encode()).type == json.loads(example)["type"]


def test_each_type_has_an_example() -> None:
    given = [json.loads(example) for example in EXAMPLES]

    assert {one["type"] for one in given} == set(shapes.TYPES)
    assert {one["interactive"]["type"] for one in given if one["type"] == "interactive"} == {
        shape.__struct_config__.tag for shape in shapes.Interactive.__args__
    }


def test_the_faults_it_names_exist() -> None:
    assert set(re.findall(r"sandbox faults ([a-z_]+)", PAGE)) <= set(KINDS)
