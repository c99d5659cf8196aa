"""A run may be killed at any moment, any number of times."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fault_table import LONG
from kill_sweep import CASES, Case, sweep

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("in_the_project")]


@pytest.mark.parametrize("case", [case for case in CASES if case.is_quick or LONG], ids=lambda case: case.name)
def test_killed_run_ends_with_the_same_adapter(
    case: Case,
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    how_many: Callable[[int, int], int],
    tally: Callable[[str, int, int], None],
) -> None:
    several = case.processes > 1
    kills = how_many(3 if several else 5, 10 if several else 50)
    outcome = sweep(case, kills, model_folder, data, tmp_path)
    assert outcome.problems == []
    assert outcome.kills.total() >= kills and outcome.equal == outcome.completed > 0
    moments = ", ".join(f"{count} {where}" for where, count in sorted(outcome.kills.items()))
    tally(
        f"SIGKILL, {case.name} ({moments}); {outcome.completed} runs, each with the same adapter byte for byte",
        outcome.kills.total(),
        outcome.kills.total(),
    )
