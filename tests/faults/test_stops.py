"""Stops in each epoch of a run, with every order of its sequences and everything that steps on evaluations."""

from collections.abc import Callable
from pathlib import Path

import pytest
from stop_sweep import EVALUATIONS, SAMPLING, StoppedRun, read_outcome, run_stopped

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("in_the_project")]

# Each of the four strategies of order and of decision that went wrong; the others are the long form.
CORE = ("group_by_length, 1 processes", "batch_rebalance, 2 processes", "plateau, each step", "best, each epoch")
CASES = [
    pytest.param(
        case, first, id=f"{case.name}-{first}", marks=[] if case.name in CORE and not first else pytest.mark.matrix
    )
    for case in (*SAMPLING, *EVALUATIONS)
    for first in range(3)
]


@pytest.mark.parametrize(("case", "first"), CASES)
def test_run_stopped_in_each_epoch_is_the_run(
    case: StoppedRun, first: int, model_folder: Path, data: Path, tmp_path: Path, tally: Callable[[str, int, int], None]
) -> None:
    expected, found = map(read_outcome, run_stopped(case, first, model_folder, data, tmp_path))
    assert found == expected
    assert len({step for step, _ in expected["evaluations"]}) == len(expected["evaluations"]), "each step once"
    tally("SIGTERM, SIGINT and SIGKILL in three epochs of a run, by order and by what decides on evaluations", 3, 3)
