"""The tree keeps its promises: queues, actors, folders, and what no line of it may do."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from pombal import metrics
from pombal.cli import parse
from pombal.cli.doctor import procfile_queues
from pombal.cli.fleet import ROOT, queues
from workers import broker

PRODUCT = ("workers", "web", "models", "providers", "pombal", "sandbox", "alembic")
FORBIDDEN_CALLS = {"eval", "exec", "compile"}
FORBIDDEN_NAMES = {"pickle", "marshal", "shelve", "yaml"}
FORBIDDEN_METHODS = {"flushall", "flushdb", "flush_all", "keys"}  # of a Redis that others may share
FREE_LABELS = {"id", "phone", "tenant", "wamid", "url", "path", "message_id", "request_id", "error"}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in PRODUCT:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield file.relative_to(ROOT), ast.parse(file.read_text())


def test_the_procfile_works_on_every_queue_and_on_no_other() -> None:
    assert sorted(procfile_queues()) == queues()


def test_a_misspelt_queue_in_the_procfile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    misspelt = (ROOT / "Procfile").read_text().replace("incoming_message", "incomingmessage")
    (tmp_path / "Procfile").write_text(misspelt)
    monkeypatch.setattr("pombal.cli.doctor.ROOT", tmp_path)

    assert sorted(procfile_queues()) != queues()


def test_every_worker_file_declares_the_actor_and_the_queue_of_its_name() -> None:
    for queue in queues():
        actor = broker.actors[queue]

        assert actor.queue_name == queue
        assert actor.fn.__module__ == f"workers.{queue}"
        assert {"max_retries", "min_backoff", "max_backoff", "throws"} <= set(actor.options)
    assert {actor.queue_name for actor in broker.actors.values() if actor.fn.__module__.startswith("workers.")} == set(
        queues()
    )


def test_the_migrations_folder_is_no_package_for_it_would_hide_the_library() -> None:
    assert not (ROOT / "alembic" / "__init__.py").exists()


def test_nothing_in_the_product_runs_what_somebody_else_wrote() -> None:
    found = []
    for file, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names}
                if isinstance(node, ast.ImportFrom) and node.module:
                    names.add(node.module.split(".")[0])
                found += [f"{file}:{node.lineno} imports {name}" for name in sorted(names & FORBIDDEN_NAMES)]
            elif isinstance(node, ast.Call):
                if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                    found.append(f"{file}:{node.lineno} calls {node.func.id}")
                if isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN_METHODS - {"keys"}:
                    found.append(f"{file}:{node.lineno} calls .{node.func.attr}")
                for keyword in node.keywords:
                    value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                    if (keyword.arg, value) in (("shell", True), ("verify", False)):
                        found.append(f"{file}:{node.lineno} passes {keyword.arg}={value!r}")

    assert found == []


def test_no_line_of_the_product_names_a_folder_of_somebodys_machine() -> None:
    machine = re.compile(r"/(?:home|root|Users|work)/\w")

    found = [str(file) for file, _ in sources() if machine.search((ROOT / file).read_text())]

    assert found == []


def test_metrics_are_named_alike_and_labelled_from_closed_sets() -> None:
    for family in metrics.REGISTRY.collect():
        assert family.name.startswith("pombal_"), family.name
        assert family.documentation.endswith("."), f"{family.name}: help text is a sentence"
    for metric in metrics.REGISTRY._names_to_collectors.values():
        assert not FREE_LABELS & set(metrics.labels_of(metric))


def commands_in(text: str) -> list[list[str]]:
    """The `python3 -m pombal …` command lines of a page, without those that stand for many (`…`, `·`)."""
    found = re.findall(r"python3? -m pombal ([^\n`#]+)", text)
    return [shlex.split(line) for line in found if "…" not in line and "·" not in line]


def test_every_command_that_the_readme_shows_exists() -> None:
    commands = commands_in((ROOT / "README.md").read_text())

    assert len(commands) > 5
    for command in commands:
        parse(command)  # exits with 2 where it does not understand


def test_the_readme_names_the_test_command_that_ci_runs() -> None:
    assert "python3 -m pombal test" in (ROOT / "README.md").read_text()
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_every_setting_of_the_environment_example_is_one_that_is_read() -> None:
    from pombal.settings import Settings, variable

    known = {variable(field) for field in Settings.__struct_fields__}
    named = set(re.findall(r"^#?([A-Z][A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))

    assert named <= known
