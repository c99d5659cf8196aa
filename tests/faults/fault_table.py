"""What the tests of faults share: how much is tried, and a table of what was.

bash scripts/faults.sh        # the long form of all of them, which writes docs/reliability.md
"""

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
"""Whether to try as much as is promised, rather than what fits into every CI run."""

PAGE = ROOT / "docs" / "reliability.md"
MARK = "<!-- the table below is written by scripts/faults.sh -->"


class Tried(NamedTuple):
    """A fault, how often it was tried and how often the program did what it should, and the test that tries it."""

    fault: str
    tried: int
    survived: int
    test: str


_tried: list[Tried] = []


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[[str, int, int], None]:
    """Write down what was tried, for the table."""

    def note(fault: str, tried: int, survived: int) -> None:
        name = request.node.nodeid.removeprefix("tests/faults/").partition("[")[0]
        _tried.append(Tried(fault, tried, survived, name))

    return note


@pytest.fixture
def how_many() -> Callable[[int, int], int]:
    """The first number in a CI run, the second in the long form."""
    return lambda quick, long: long if LONG else quick


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what one of several pytest processes has written down."""
    _tried.extend(Tried(*row) for row in getattr(node, "workeroutput", {}).get("tried", ()))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the table, in the long form; one of several processes hands over its part of it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = [list(row) for row in _tried]
        return
    if not LONG or not _tried:
        return
    rows = [
        (tried.fault, str(tried.tried), str(tried.survived), f"`{tried.test}`")
        for tried in sorted(_tried, key=lambda tried: tried.test)
    ]
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
    """Paths such as playground/deepspeed_config_s2.json are found."""
    monkeypatch.chdir(ROOT)
    yield
