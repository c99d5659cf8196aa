"""What a report says of the machine, and how much memory a process takes. Nothing but the standard library."""

import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def read_memory(name: str) -> float:
    """A line of this process's memory account in MiB: VmRSS (resident now) or VmHWM (the most ever resident).

    Not ru_maxrss, which a new process takes over from the one that started it.
    """
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    assert found, f"no {name} in /proc/self/status"
    return int(found.group(1)) / 1024


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def name_processor() -> str:
    """The processor's name."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1) if found else platform.machine()


def describe_versions(versions: dict[str, str]) -> str:
    """Names and versions in one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def make_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table's lines; all columns but the first are aligned to the right if they hold numbers."""
    rows = list(rows)
    numeric = [bool(rows) and all(re.fullmatch(r"[\d,.\s-]+", row[i]) for row in rows) for i in range(len(headings))]
    rule = [("---:" if is_number else "---") for is_number in numeric]
    return [f"| {' | '.join(cells)} |" for cells in [headings, rule, *rows]]
