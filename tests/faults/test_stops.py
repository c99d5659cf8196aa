"""Stops in each epoch of a run, with every order of its sequences and everything that steps on evaluations."""

from collections.abc import Callable
from pathlib import Path

import pytest
from stop_sweep import CORE, EVALUATIONS, SAMPLING, StoppedRun, read_outcome, run_stopped

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("in_the_project")]

CASES = [
    *(pytest.param(case, 0, id=case.name) for case in CORE),
    *(
        pytest.param(case, first, id=f"{case.name}-{first}", marks=pytest.mark.matrix)
        for case in (*SAMPLING, *EVALUATIONS)
        for first in range(3)
    ),
]


@pytest.mark.parametrize(("case", "first"), CASES)
def test_run_stopped_in_each_epoch_is_the_run(
    case: StoppedRun, first: int, model_folder: Path, data: Path, tmp_path: Path, tally: Callable[[str, int, int], None]
) -> None:
    expected, found = map(read_outcome, run_stopped(case, first, model_folder, data, tmp_path))
    assert found == expected
    assert len({step for step, _ in expected["evaluations"]}) == len(expected["evaluations"]), "each step once"
    tally("SIGTERM, SIGINT and SIGKILL in three epochs of a run, by order and by what decides on evaluations", 3, 3)
