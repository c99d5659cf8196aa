"""Pages that a script writes whole, and that a check compares with what would be written."""

import argparse
import sys
from pathlib import Path


def add_check_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag --check."""
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is not current")


def write_or_check(page: Path, text: str, *, check: bool) -> None:
    """Write a page, or exit with code 1 if it has another text."""
    if not check:
        page.write_text(text, encoding="utf-8")
        print(f"{page} is written.")
    elif not page.is_file() or page.read_text(encoding="utf-8") != text:
        sys.exit(f"{page} is not current: run python scripts/{Path(sys.argv[0]).name}")
