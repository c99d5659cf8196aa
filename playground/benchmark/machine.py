"""The machine and the memory of a process, for reports. Only the standard library is imported."""

import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def read_memory(name: str) -> float:
    """Read this process's memory in MiB: VmRSS (resident now) or VmHWM (peak of resident memory).

    ru_maxrss would not do: a new process inherits it from the one that started it.
    """
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    assert found, f"no {name} in /proc/self/status"
    return int(found.group(1)) / 1024


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def name_processor() -> str:
    """Return the name of the processor."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1) if found else platform.machine()


def describe_versions(versions: dict[str, str]) -> str:
    """Return names and versions in one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def make_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; columns of numbers are aligned to the right."""
    rows = list(rows)
    numeric = [bool(rows) and all(re.fullmatch(r"[\d,.\s-]+", row[i]) for row in rows) for i in range(len(headings))]
    rule = [("---:" if is_number else "---") for is_number in numeric]
    return [f"| {' | '.join(cells)} |" for cells in [headings, rule, *rows]]
