"""The README says what the program does."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

sys.path.insert(0, str(ROOT / "scripts"))
from flag_table import flag_table  # noqa: E402


def test_flag_table_is_current() -> None:
    assert flag_table() in README, "run python scripts/flag_table.py and put its output into the README"


def test_files_named_exist() -> None:
    """Scripts and configurations that the README names are there."""
    words = README.replace("`", " ").replace("(", " ").replace(")", " ").replace(",", " ").split()
    named = {
        word.partition(":")[0].rstrip(".")
        for word in words
        if word.startswith(("scripts/", "playground/", "data/", "docs/"))
    }
    assert {"scripts/quickstart.sh", "scripts/run_tests.sh"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
