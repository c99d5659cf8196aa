"""Write the table of other programs' settings into docs/migration.md, from fastchat_qlora/config/peer_flags.json.

python scripts/peer_table.py
"""

from collections import defaultdict
from pathlib import Path

from fastchat_qlora.config.flag_parsing import read_peer_table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "migration.md"
MARK = "<!-- This table is written by scripts/peer_table.py. -->\n"
LIBRARIES = ("PEFT", "transformers")  # their names are typed in commands of the programs


def build_page(page: str) -> str:
    """Return the page with the current table at its end."""
    peers = {name: entry for name, entry in read_peer_table()["peers"].items() if name not in LIBRARIES}
    names: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    dropped: dict[str, list[str]] = defaultdict(list)
    for peer, entry in peers.items():
        for name, given in entry["flags"].items():
            use = given if isinstance(given, str) else given[0]
            for word in use.split():
                names[f"`--{word}`".replace("=", " ")][peer].append(f"`{name}`")
            if not use:
                dropped[peer].append(f"`{name}`")
    heads = [f"{peer} {entry['version']}" for peer, entry in peers.items()]
    rows = [["here", *heads], ["---"] * (len(peers) + 1)]
    rows += [[flag, *(", ".join(names[flag][peer]) for peer in peers)] for flag in sorted(names)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lists = [f"- {peer}: {', '.join(found)}." for peer, found in dropped.items()]
    text = "\n".join(
        [*lines, "", "Without a flag here, because it is not needed or not supported; the error says which:", ""]
    )
    return page.partition(MARK)[0] + MARK + "\n" + text + "\n" + "\n".join(lists) + "\n"


if __name__ == "__main__":
    PAGE.write_text(build_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{PAGE} is written.")
