"""Any command line ends with 0, or with 2 and one line that starts with `error:` and names a flag.

Command lines are drawn from the flags of the real parser: some correct, most wrong as people or scripts get them wrong.
They go through the real `main`, with `--dry_run True` at the end: everything is checked and prepared, and no weights
are loaded. CI runs the same two hundred each time. This runs a thousand others, with a seed of your choice:

    FAULTS_EXAMPLES=1000 pytest tests/faults/test_command_lines.py --hypothesis-seed=1
"""

import pytest
from command_lines import EXAMPLES, Folder, command_lines, complaint, run_command_line
from command_lines import folder as folder
from hypothesis import HealthCheck, given, settings


@settings(
    deadline=None,
    max_examples=EXAMPLES or 100,
    derandomize=not EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(line=command_lines())
def test_any_command_line_is_accepted_or_refused(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, line: tuple[list[str], list[str]]
) -> None:
    monkeypatch.setattr("fastchat_qlora.training.run.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    outcome = run_command_line(folder, *line)
    assert not (wrong := complaint(outcome, line[1])), f"{wrong}: {outcome}"


REFUSED = {
    "an old boolean without a word": ["--group_by_length", ""],
    "no object": ["--gradient_checkpointing_kwargs", '["x", "nan"]'],
    "single quotes": ["--gradient_checkpointing_kwargs", "{'a': 1}"],
    "a setting of something else": ["--accelerator_config", '{"min_lr": 1}'],
    "an object for a flag that could take none": ["--liger_kernel_config", "[]"],
    "an optimizer without a name": ["--optim", ""],
    "a reporter without a name": ["--report_to", ""],
    "a home of nobody": ["--output_dir", "~no_such_user/x"],
    "a name of other bytes": ["--output_dir", "\udcff"],
    "a number beyond C": ["--ddp_timeout", "1" * 31],
    "a launcher's flag without one": ["--deepspeed", '{"zero_optimization": {"stage": 2}}'],
}
"""Command lines that once ended in a traceback, or in an error without a flag."""


@pytest.mark.parametrize("given", REFUSED.values(), ids=REFUSED)
def test_earlier_finding_is_refused(folder: Folder, given: list[str]) -> None:
    outcome = run_command_line(folder, [], given)
    assert (outcome.code, complaint(outcome, given)) == (2, "")
