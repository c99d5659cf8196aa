"""Objects that Trainer builds after loading the weights are tried before."""

import pytest
import torch

from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.errors import UserError
from fastchat_qlora.training.preflight import run_preflight, warn_of_schedule


@pytest.fixture
def required(required: list[str]) -> list[str]:
    return [*required, "--use_cpu"]


SCHEDULES = {
    "a name of another schedule": (["--lr_scheduler_kwargs", '{"min_lr": 0.1}'], ["min_lr", "linear", "has none"]),
    "what the run gives": (["--lr_scheduler_kwargs", '{"num_training_steps": 3}'], ["num_training_steps", "linear"]),
    "no number": (
        ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"num_cycles": "a"}'],
        ["--lr_scheduler_type cosine", "num_cycles", "'a'"],
    ),
    "a setting is missing": (
        ["--lr_scheduler_type", "warmup_stable_decay"],
        ["--lr_scheduler_type warmup_stable_decay", "--lr_scheduler_kwargs may set num_decay_steps"],
    ),
    "one of two is missing": (
        ["--lr_scheduler_type", "cosine_with_min_lr"],
        ["--lr_scheduler_type cosine_with_min_lr", "min_lr_rate"],
    ),
    "a reduction to more": (
        ["--lr_scheduler_type", "greedy", "--learning_rate", "1e-4", "--eval_strategy", "epoch", "--eval_split", "4"],
        ["--lr_scheduler_type greedy", "min_lr of 0.001 is above --learning_rate 0.0001", '{"min_lr": 0}'],
    ),
}
OTHERS = {
    "no such backend": (["--torch_compile_backend", "fast"], ["--torch_compile_backend fast", "inductor"]),
    "no such mode": (["--torch_compile_mode", "fast"], ["--torch_compile_mode fast", "reduce-overhead"]),
    "no hub": (["--push_to_hub"], ["--push_to_hub True", "log in"]),
    "no name on the hub": (["--push_to_hub", "--hub_model_id", "a//b"], ["--hub_model_id a//b"]),
}


@pytest.mark.parametrize(("given", "expected"), [*SCHEDULES.values(), *OTHERS.values()], ids=[*SCHEDULES, *OTHERS])
def test_unusable_settings_fail_early(required: list[str], given: list[str], expected: list[str]) -> None:
    args = parse_args([*required, *given]).training
    with pytest.raises(UserError) as caught:
        run_preflight(args)
    assert [text for text in expected if text not in str(caught.value)] == [], caught.value


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--lr_scheduler_type", "constant", "--warmup_steps", "5"],
        ["--lr_scheduler_type", "cosine", "--warmup_ratio", "0.03"],
        ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr_rate": "0.1"}'],
        ["--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": 10}'],
        ["--lr_scheduler_type", "inverse_sqrt", "--max_steps", "1"],
        ["--optim", "adafactor"],
        ["--optim", "paged_adamw_8bit"],
        ["--optim", "sgd", "--optim_args", "momentum=0.9,nesterov=True"],
        ["--torch_compile"],
    ],
    ids=lambda given: " ".join(given),
)
def test_usable_settings_pass(required: list[str], given: list[str]) -> None:
    """They draw no random numbers."""
    before = torch.random.get_rng_state()
    run_preflight(parse_args([*required, *given]).training)
    assert torch.equal(torch.random.get_rng_state(), before)


UNFITTING = {
    "only rises": (
        ["--warmup_steps", "100"],
        "--warmup_steps 100: the run has 6 steps, so that the learning rate only rises",
    ),
    "rises to the end": (["--warmup_steps", "6"], "so that the learning rate only rises"),
    "no warm-up": (
        ["--lr_scheduler_type", "constant", "--warmup_steps", "0.1"],
        "--warmup_steps 0.1: ignored: --lr_scheduler_type constant has no warm-up",
    ),
    "too many stages": (
        [
            *("--lr_scheduler_type", "warmup_stable_decay", "--warmup_steps", "2"),
            *("--lr_scheduler_kwargs", '{"num_decay_steps": 5}'),
        ],
        "with the warm-up its stages have 7 steps, and the run has 6,",
    ),
}


@pytest.mark.parametrize(("given", "expected"), UNFITTING.values(), ids=UNFITTING)
def test_schedule_that_does_not_fit_the_run_is_logged(
    required: list[str], given: list[str], expected: str, notices: pytest.LogCaptureFixture
) -> None:
    args = parse_args([*required, *given, "--max_steps", "6"]).training
    warn_of_schedule(args, 6)
    assert [expected in record.message for record in notices.records] == [True], notices.text


@pytest.mark.parametrize("given", [[], ["--warmup_steps", "5"], ["--lr_scheduler_type", "constant"]])
def test_schedule_that_fits_is_not(required: list[str], given: list[str], notices: pytest.LogCaptureFixture) -> None:
    warn_of_schedule(parse_args([*required, *given, "--max_steps", "6"]).training, 6)
    assert not notices.records


@pytest.mark.parametrize(("steps", "expected"), [("4", []), ("100", ["so that the learning rate only rises"])])
def test_warmup_of_a_schedule_free_optimizer_needs_no_schedule(
    steps: str, expected: list[str], required: list[str], notices: pytest.LogCaptureFixture
) -> None:
    """It counts --warmup_steps itself."""
    args = parse_args([*required, "--lr_scheduler_type", "constant", "--warmup_steps", steps]).training
    args.optim = "schedule_free_adamw"  # whose package may not be installed
    warn_of_schedule(args, 6)
    assert [text in record.message for text, record in zip(expected, notices.records, strict=True)] == [True] * len(
        expected
    )
