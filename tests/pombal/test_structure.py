"""What holds for the tree as a whole: names that must agree, and what must be nowhere."""

import argparse
import ast
import contextlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Counter, Gauge, Histogram

from pombal import metrics
from pombal.cli import parse, parser
from pombal.cli.doctor import procfile_queues
from pombal.cli.fleet import ROOT, queues
from pombal.settings import Settings, variable
from workers import broker

PRODUCT = ("alembic", "models", "pombal", "providers", "sandbox", "web", "workers")


def sources(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


# ------------------------------------------------------------------------------------------- queues and their files


def test_each_queue_has_a_procfile_line_and_each_line_a_queue() -> None:
    assert sorted(procfile_queues()) == queues()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("worker: python -m pombal worker incoming_mesage", ["incoming_mesage"]),
        ("worker: LOG_FORMAT=json python -m pombal worker a b --threads 8 --processes 2", ["a", "b"]),
        ("web: python -m pombal web", []),
    ],
)
def test_a_misspelt_queue_in_a_procfile_is_seen(tmp_path: Path, line: str, found: list[str]) -> None:
    (tmp_path / "Procfile").write_text(f"# comment\nrelease: python -m pombal migrate\n{line}\n")

    assert procfile_queues(tmp_path / "Procfile") == found


def test_the_procfile_starts_what_there_is() -> None:
    lines = (ROOT / "Procfile").read_text().splitlines()

    commands = {line.partition(": ")[0]: line.partition(": ")[2].split() for line in lines}

    assert {"release", "web", "worker", "clock"} <= set(commands)
    for words in commands.values():
        assert words[:3] == ["python", "-m", "pombal"]
        assert parse(words[3:]).command in ("migrate", "web", "worker", "session", "clock")


@pytest.mark.parametrize("queue", queues())
def test_a_queue_is_a_file_is_an_actor_with_its_policy_in_sight(queue: str) -> None:
    actor = broker.actors[queue]

    assert actor.queue_name == queue
    assert actor.fn.__module__ == f"workers.{queue}"
    declared = declarations(ROOT / "workers" / f"{queue}.py")[queue]
    assert {"queue", "max_retries", "min_backoff", "max_backoff"} <= declared


def test_every_actor_is_on_its_files_queue_and_says_how_often_it_may_fail() -> None:
    for queue in queues():
        for name, declared in declarations(ROOT / "workers" / f"{queue}.py").items():
            assert broker.actors[name].queue_name == queue
            assert {"queue", "max_retries"} <= declared


def declarations(file: Path) -> dict[str, set[str]]:
    """The actors of a file, and the names of the arguments that they are declared with."""
    found = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "actor":
                    found[node.name] = {keyword.arg for keyword in call.keywords if keyword.arg}
    return found


def test_only_pombal_declares_actors() -> None:
    """An actor of Dramatiq's own decorator binds to whatever broker is set at that moment."""
    for file in sources(*PRODUCT):
        if name_of(file) != "pombal/broker.py":
            assert not re.search(r"from dramatiq import .*\bactor\b|dramatiq\.actor\(", file.read_text()), name_of(file)


def test_schedules_fire_on_every_day_they_name() -> None:
    """periodiq's Sunday is 7; a 0 never fires."""
    for actor in broker.actors.values():
        if "periodic" in actor.options:
            assert 0 not in actor.options["periodic"].dow or len(actor.options["periodic"].dow) == 8


# --------------------------------------------------------------------------------------------- what must be nowhere


FORBIDDEN_CALLS = {"eval", "exec", "pickle.loads", "pickle.load", "yaml.load", "os.system", "os.popen"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "shelve", "marshal", "yaml", "telnetlib"}
FORBIDDEN_COMMANDS = {"flushall", "flushdb", "keys"}


def offences(source: str) -> Iterator[str]:
    """What in this source loads code from data, runs a shell, trusts any certificate, or wipes a Redis."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.partition(".")[0] in FORBIDDEN_MODULES:
                yield node.module
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FORBIDDEN_CALLS or called.partition(".")[0] in FORBIDDEN_MODULES:
                yield called
            if called.rpartition(".")[2] in ("flushall", "flushdb"):
                yield called
            for keyword in node.keywords:
                value = ast.unparse(keyword.value)
                if (keyword.arg, value) in {("shell", "True"), ("verify", "False"), ("check_hostname", "False")}:
                    yield f"{keyword.arg}={value}"
            if called.rpartition(".")[2] == "execute_command" and node.args:
                command = ast.unparse(node.args[0]).strip("'")
                if command.lower() in FORBIDDEN_COMMANDS:
                    yield command


@pytest.mark.parametrize("file", sources(*PRODUCT), ids=name_of)
def test_nothing_loads_code_from_data_or_wipes_a_redis(file: Path) -> None:
    assert not list(offences(file.read_text()))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "import yaml\nyaml.load(text)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(text, shell=True)",
        "httpx.get(url, verify=False)",
        "client.flushall()",
        "client.flushdb(asynchronous=True)",
        "client.execute_command('FLUSHALL')",
    ],
)
def test_such_things_would_be_seen(source: str) -> None:
    assert list(offences(source))


PERSONAL = re.compile(r"/(home|Users|root)/\w|[A-Z]:\\\\")


def test_no_file_knows_anybodys_machine() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    texts = [
        ROOT / name for name in tracked if Path(name).suffix in (".py", ".md", ".toml", ".mako", "") and "/" in name
    ]

    assert [name_of(file) for file in texts if file != Path(__file__) and PERSONAL.search(file.read_text())] == []
    assert PERSONAL.search("cd /home/ana/pombal")


def test_alembics_folder_is_no_package() -> None:
    """With an `__init__.py` it would hide the installed alembic."""
    assert not (ROOT / "alembic" / "__init__.py").exists()
    assert sorted(file.name for file in (ROOT / "tests").rglob("*") if file.is_dir() and is_test_folder(file)) == []


def is_test_folder(folder: Path) -> bool:
    """A folder of tests that is no package, so that its name would hide the fleet's of the same name."""
    return any(folder.glob("test_*.py")) and not (folder / "__init__.py").exists()


# ---------------------------------------------------------------------------------------------------------- metrics


LABELS = {
    "actor", "channel_kind", "class", "direction", "hold", "kind", "operation", "outcome", "provider", "queue", "state",
    "status", "step", "tier",
}  # fmt: skip


def test_metrics_are_named_alike_and_their_labels_come_from_closed_sets() -> None:
    found = [one for one in vars(metrics).values() if isinstance(one, Counter | Gauge | Histogram)]

    assert len(found) > 10
    for metric in found:
        assert metric._name.startswith("pombal_"), metric._name
        assert metric._documentation.endswith("."), metric._name
        assert set(metrics.labels_of(metric)) <= LABELS, metric._name
        assert not isinstance(metric, Histogram) or metric._name.endswith(("_seconds", "_rows", "_bytes")), metric._name


def test_metrics_are_declared_in_one_file() -> None:
    for file in sources(*PRODUCT):
        if name_of(file) != "pombal/metrics.py":
            assert not re.search(r"\b(Counter|Gauge|Histogram|Summary)\(\s*[\"']", file.read_text()), name_of(file)


# ------------------------------------------------------------------------------------------------------------- words


def commands_in(page: str) -> list[str]:
    return re.findall(r"(?:^|`)(?:python3? -m )?pombal ((?!…)[a-z][^`\n#]*)", page, re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "SECURITY.md"])
def test_each_command_on_a_page_exists(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for line in commands_in((ROOT / page).read_text()):
        words = shlex.split(line)
        assert is_command(words), line
        # A single word may be a group (`pombal dead`): talk about it, and no command to type. Nor is a placeholder one.
        if len(words) > 1 and not re.search(r"[A-Z]{2}|…|·", line):
            with contextlib.suppress(SystemExit):
                parse(words)
            assert capsys.readouterr().err == "", line


def test_the_readme_names_the_test_command_that_ci_runs() -> None:
    assert "python3 -m pombal test" in (ROOT / "README.md").read_text()
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_every_setting_of_the_environment_example_is_one_that_is_read() -> None:
    known = {variable(field) for field in Settings.__struct_fields__}
    named = set(re.findall(r"^#?([A-Z][A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))

    assert len(named) > 5
    assert named <= known


def is_command(words: list[str]) -> bool:
    (choices,) = [a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return words[0] in choices


def test_such_a_page_is_read() -> None:
    page = "Say `pombal fly` or\npython3 -m pombal dead list\n`pombal trace ID`"

    assert commands_in(page) == ["fly", "dead list", "trace ID"]


def test_the_command_line_starts_without_the_fleet() -> None:
    """`--help` is quick, and a host's process loads only what it runs."""
    code = "import sys, pombal.cli; pombal.cli.parser(); print(*sys.modules)"

    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert "pombal.cli" in said.stdout.split()
    assert not {"sqlalchemy", "dramatiq", "redis", "workers"} & set(said.stdout.split())
