"""Shared parts of the fault tests: how much is tried, and the table of results.

bash scripts/faults.sh        # the long form of all of them, which writes docs/reliability.md
"""

import ast
import os
import platform
import sys
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "playground" / "benchmark"))
from machine import cores, describe_versions, make_table, name_processor

LONG = os.environ.get("FAULTS") == "long"
"""Whether to run the long form of the tests, rather than the form for every CI run."""

PAGE = ROOT / "docs" / "reliability.md"
MARK = "<!-- the table below is written by scripts/faults.sh -->"


class Tried(NamedTuple):
    """A fault, the number of tries, the number that went as promised, and the test."""

    fault: str
    tried: int
    survived: int
    test: str


_tried: list[Tried] = []
_counted: dict[str, list[bool]] = {}

COUNTED = ("test_command_lines.py", "test_security")
"""Beginnings of the names of files whose tests are one fault each, or FAULTS_EXAMPLES of them."""


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[[str, int, int], None]:
    """Return a function that records a fault for the table."""

    def note(fault: str, tried: int, survived: int) -> None:
        name = request.node.nodeid.removeprefix("tests/faults/").partition("[")[0]
        _tried.append(Tried(fault, tried, survived, name))

    return note


@pytest.fixture
def how_many() -> Callable[[int, int], int]:
    """Return a function of two numbers: the first for a CI run, the second for the long form."""
    return lambda quick, long: long if LONG else quick


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect what one of several pytest processes has recorded."""
    _tried.extend(Tried(*row) for row in getattr(node, "workeroutput", {}).get("tried", ()))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count the tests of files without a tally; several pytest processes report to one."""
    file, _, test = report.nodeid.partition("::")
    if report.when == "call" and Path(file).name.startswith(COUNTED):
        number = int(os.environ.get("FAULTS_EXAMPLES", "1")) if test.startswith("test_any_") else 1
        _counted.setdefault(file, []).extend([report.passed] * number)


def _rows() -> Iterator[tuple[str, str, str, str]]:
    """Yield the rows of this pytest run, and those of other tests on the page."""
    for file, passed in _counted.items():
        summary = (ast.get_docstring(ast.parse((ROOT / file).read_text("utf-8"))) or "").partition("\n")[0]
        yield summary.rstrip("."), str(len(passed)), str(sum(passed)), f"`{Path(file).name}`"
    for tried in _tried:
        yield tried.fault, str(tried.tried), str(tried.survived), f"`{tried.test}`"
    done = {Path(file).name for file in _counted} | {tried.test.partition("::")[0] for tried in _tried}
    for line in PAGE.read_text("utf-8").partition(MARK)[2].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[3].startswith("`") and cells[3].strip("`").partition("::")[0] not in done:
            yield cells[0], cells[1], cells[2], cells[3]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the table, in the long form; one of several processes hands over its part."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = [list(row) for row in _tried]
        return
    if not LONG or not (_tried or _counted):
        return
    rows = sorted(_rows(), key=lambda row: row[3])
    libraries = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed", "datasets")
    versions = describe_versions({name: version(name) for name in libraries})
    lines = [
        MARK,
        "",
        f"{date.today()}, {cores()} cores of {name_processor()}, Python {platform.python_version()}, {versions}.",
        "",
        *make_table(("fault", "tried", "as promised", "test"), rows),
        "",
    ]
    before = PAGE.read_text("utf-8").partition(MARK)[0]
    PAGE.write_text(before + "\n".join(lines), encoding="utf-8")


@pytest.fixture
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Change to the root, for paths such as playground/deepspeed_config_s2.json."""
    monkeypatch.chdir(ROOT)
    yield
