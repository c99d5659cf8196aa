"""The language and the layout of the code, held by rules that a machine can check; CONTRIBUTING.md states them."""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastchat_qlora"
sys.path.insert(0, str(ROOT / "scripts"))
from write_map import PAGE, insert_map  # noqa: E402

MODULES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}

VERBS = """
Add Answer Attach Audit Block Build Check Checkpoint Choose Clear Collect Compare Compute Convert Copy Count Create
Cut Defer Describe Disable Double Drop Escape Estimate Evaluate Extend Flush Generate Give Hold Ignore Keep Label
Leave Limit Load Log Make Mask Merge Move Open Pack Parse Plan Plot Prepare Preprocess Prevent Print Push Raise Read
Record Register Remove Render Replace Report Require Resolve Return Run Save Set Show Start Stop Switch Take Talk
Tokenize Train Unlink Wait Watch Write Yield
"""
"""First words of docstrings of functions: a new one is added here on purpose."""

NEVER = (
    r"learnt anew withheld withhold\w* outlines? spoken strangers' torn rehears\w* quantis\w* tokenis\w* normalis\w* "
    r"colour\w* initialis\w* serialis\w* optimis\w* behaviour\w* labell\w* favour\w* recognis\w* summaris\w*"
)
"""Words that are never right in code, messages or pages: British spelling, and words that only this project used."""

NEVER_SEVERAL = ("lean layers", "lean modules", "set aside", "goes on from", "go on from", "the house")

PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *PACKAGE.rglob("*.jinja"),
    *(ROOT / "findings").glob("*.md"),
]

MAX_FUNCTION_LINES = 50
MAX_MODULES = 9
MAX_TOP_MODULES = 2
MAX_PACKAGE_LINES = 27_700


class Function(NamedTuple):
    """A function of the package, with its place."""

    place: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    is_property: bool

    @property
    def lines(self) -> int:
        return (self.node.end_lineno or 0) - self.node.lineno + 1


def functions() -> Iterator[Function]:
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                decorators = {ast.unparse(one).rpartition(".")[2] for one in node.decorator_list}
                place = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                yield Function(place, node, bool(decorators & {"property", "cached_property"}))


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    first_words = {
        function.place: (ast.get_docstring(function.node) or "").split()[0]
        for function in functions()
        if ast.get_docstring(function.node) and not function.is_property
    }
    assert {place: word for place, word in first_words.items() if word.rstrip(".,;:") not in VERBS.split()} == {}


def test_functions_are_short() -> None:
    lengths = sorted(function.lines for function in functions())
    assert [function.place for function in functions() if function.lines > MAX_FUNCTION_LINES] == []
    assert lengths[len(lengths) // 2] <= 9


def test_the_package_stays_small() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES) <= MAX_PACKAGE_LINES


def test_packages_hold_few_modules() -> None:
    modules: dict[str, list[str]] = defaultdict(list)
    for path in MODULES:
        if path.name != "__init__.py":
            modules[str(path.parent.relative_to(ROOT))].append(path.name)
    top = modules.pop("fastchat_qlora")
    assert len(top) <= MAX_TOP_MODULES, top
    assert {package: names for package, names in modules.items() if len(names) > MAX_MODULES} == {}


def top_level_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from (one.id for one in ast.walk(target) if isinstance(one, ast.Name))


def test_a_top_level_name_has_one_meaning() -> None:
    places: dict[str, set[str]] = defaultdict(set)
    for path, tree in MODULES.items():
        for name in top_level_names(tree):
            places[name].add(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1 and name != "logger"} == {}


def test_modules_of_tests_differ_in_name() -> None:
    """pytest imports them by file name, so that two of one name are an error, but only when both are run."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in (ROOT / "tests").rglob("*.py"):
        places[path.name].append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_every_package_says_what_goes_in_and_out() -> None:
    missing = [path for path, tree in MODULES.items() if path.name == "__init__.py" and not ast.get_docstring(tree)]
    assert missing == []


NEVER_PATTERN = re.compile(rf"\b({'|'.join(NEVER.split())}|{'|'.join(NEVER_SEVERAL)})\b", re.IGNORECASE)


@pytest.mark.parametrize("path", [*MODULES, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_or_british_words(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [f"{number}: {line.strip()[:100]}" for number, line in enumerate(lines, 1) if NEVER_PATTERN.search(line)]
    assert found == []


def test_the_map_of_contributing_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert insert_map(page) == page, "run python scripts/write_map.py"


def test_places_that_contributing_names_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    places = re.findall(r"`([\w/]+\.py): ([\w.]+)`", text)
    assert len(places) > 20
    for path, name in places:
        file = next((root / path for root in (PACKAGE, ROOT) if (root / path).is_file()), None)
        assert file is not None, path
        definition = re.compile(
            rf"^ *((async )?def|class) {re.escape(name.rpartition('.')[2])}\b|^ *{name}\b.* = ", re.MULTILINE
        )
        assert definition.search(file.read_text(encoding="utf-8")), f"{path}: {name}"
