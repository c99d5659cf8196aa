"""Write the map of the package in CONTRIBUTING.md from the first lines of its docstrings.

python scripts/write_map.py
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- written by scripts/write_map.py -->", "<!-- end of the map -->"
DESCRIPTION_COLUMN = 34


def describe_package(package: Path = ROOT / "fastchat_qlora") -> str:
    """Return the tree of the package's modules, each with the first line of its docstring."""
    return "\n".join(["```", *_describe(package, ""), "```"])


def _describe(folder: Path, indent: str) -> Iterator[str]:
    yield _line(f"{indent}{folder.name}/", folder / "__init__.py")
    modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    yield from (_line(f"{indent}  {path.name}", path) for path in modules)
    for path in sorted(path for path in folder.iterdir() if (path / "__init__.py").exists()):
        yield from _describe(path, f"{indent}  ")


def _line(name: str, module: Path) -> str:
    first = (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    return f"{name:<{DESCRIPTION_COLUMN}} {first}".rstrip()


def insert_map(page: str) -> str:
    """Return the page with the map between its two markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{describe_package()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(insert_map(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{PAGE} is written.")
