"""Write docs/templates.md, the table of what becomes of real chat templates with all kinds of records.

python scripts/template_table.py          # write it: a minute or two
python scripts/template_table.py --check  # exit code 1 if it is not what would be written
"""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # as in the tests; read when torch is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
import trl  # noqa: E402
from pages import add_check_flag, write_or_check  # noqa: E402
from template_records import RECORDS  # noqa: E402
from template_sources import ARCHIVE, download_templates, read_templates  # noqa: E402
from template_sweep import TEMPLATE_FOLDER, Cell, Sweep  # noqa: E402

PAGE = ROOT / "docs" / "templates.md"
CODES = {
    "yes": "accepted",
    "on": "accepted in the mode with thoughts, which is chosen where the template's own leaves them out",
    "thoughts": "rejected: the template leaves out thoughts, in every mode and form of the record",
    "tools": "rejected: the template leaves out the tools, or the system's or a tool's message",
    "words": "rejected: the template leaves out the words, of some or all answers",
    "calls": "rejected: the template leaves out calls",
    "refuses": "rejected: the template refuses the record in every form",
    "wrong": "accepted, with sequences that are not what a server has",
    "no": "rejected, for the reason below, although the template itself can render it",
}
ACCEPTED = ("yes", "on")
LEFT_OUT = {"the tools or a message": "tools", "a thought": "thoughts", "words": "words", "a call": "calls"}

INTRO = """# Chat templates

Written by `scripts/template_table.py` from the tests with TRL {version} and {archive}; do not edit.

The chat templates that llama.cpp and TRL have, each with a small tokenizer that has the template's tokens, are tried on
{records} kinds of records. *Accepted* means, by the template and the tokenizer alone: before every supervised part a
sequence has the tokens of a server's prompt, those of the messages before it with the generation prompt; the part
decodes to the message, with its thought, words and calls; it ends at the first point where a server stops, and every
answer is supervised once.

Names that end in `_training` are TRL's twins of other templates with markers of what is the assistant's.
"""


class Row(dict[str, str]):
    """Record -> code, for one template."""

    @property
    def renderable(self) -> list[str]:
        """The records that the template itself can render."""
        return [kind for kind, code in self.items() if code in (*ACCEPTED, "wrong", "no")]


def get_code(cell: Cell) -> str:
    """Return the code of a cell."""
    if cell.judgment.faults:
        return "wrong"
    if cell.is_accepted:
        return "on" if cell.judgment.mode else "yes"
    if cell.refusal:
        return "refuses"
    return LEFT_OUT.get(cell.omission, "refuses") if cell.omission else "no"


def templates_page(cells: Mapping[str, Mapping[str, Cell]]) -> str:
    """Return the page as Markdown."""
    rows = {name: Row({kind: get_code(cell) for kind, cell in row.items()}) for name, row in cells.items()}
    reasons = [
        (name, kind, cells[name][kind].rejection or cells[name][kind].judgment.faults[0])
        for name, row in rows.items()
        for kind, code in row.items()
        if code in ("wrong", "no")
    ]
    kinds = [kind.replace("_", " ") for kind in RECORDS]
    parts = [
        INTRO.format(version=trl.__version__, archive=ARCHIVE, records=len(RECORDS)).strip(),
        describe_share(rows.values()),
        _table(["code", "meaning"], CODES.items()),
        _table(["template", *kinds], ([name, *row.values()] for name, row in rows.items())),
        "## Not accepted although the template renders them",
        _table(["template", "record", "reason"], reasons),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def describe_share(rows: Iterable[Row]) -> str:
    """Return a sentence on how many cells are accepted."""
    known = list(rows)
    accepted, renderable = count(known)
    return (
        f"Of {sum(map(len, known))} cells, the template itself can render {renderable}; of these, {accepted} are "
        f"accepted ({accepted / renderable:.1%})."
    )


def count(rows: Iterable[Row]) -> tuple[int, int]:
    """Return how many cells are accepted, and how many the template itself can render."""
    known = list(rows)
    accepted = sum(code in ACCEPTED for row in known for code in row.values())
    return accepted, sum(len(row.renderable) for row in known)


def _table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table whose first column is in code; messages of programs are plain text in it."""
    plain = ([re.sub(r"\s+", " ", cell).replace("|", "\\|").replace("`", "'") for cell in cells] for cells in rows)
    lines = [head, ["---"] * len(head), *([f"`{name}`", *cells] for name, *cells in plain)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def read_rows(page: str) -> dict[str, Row]:
    """Return the rows of a page by template."""
    lines = re.findall(r"^\| `((?:llama\.cpp|trl)/[^`]+)` \| (.+) \|$", page.partition("\n## ")[0], re.MULTILINE)
    return {name: Row(zip(RECORDS, codes.split(" | "), strict=True)) for name, codes in lines}


def run() -> dict[str, dict[str, Cell]]:
    """Return what becomes of each template and record."""
    download_templates(TEMPLATE_FOLDER)
    cells = {}
    for name, source in read_templates(TEMPLATE_FOLDER).items():
        sweep = Sweep(name, source)
        cells[name] = {kind: sweep.run(record) for kind, record in RECORDS.items()}
    return cells


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_check_flag(parser)
    args = parser.parse_args()
    write_or_check(PAGE, templates_page(run()), check=args.check)


if __name__ == "__main__":
    main()
