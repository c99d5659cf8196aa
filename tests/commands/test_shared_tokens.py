"""`plan` and `inspect` count what sequences share as the run computes it."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONVERSATIONS, sharegpt
from datasets import Dataset
from forked import succeed as run_forked
from tiny import make_model as make_tiny

from fastchat_qlora import cli
from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.data.batching.packing import get_column
from fastchat_qlora.data.batching.prefix_index import build_prefix_index
from fastchat_qlora.training.prefix_sharing import count_shared_tokens
from fastchat_qlora.training.setup import prepare_data

SYSTEM = "one two three four five six " * 20
STEP = 8  # conversations
FLAGS = f"--per_device_train_batch_size {STEP} --num_train_epochs 1 --lora_target_modules all-linear"


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    """Return different conversations behind one long system prompt."""
    path = tmp_path / "agents.json"
    records = [
        sharegpt([("system", SYSTEM), ("human", f"{number} of {turns[0][1]}"), *turns[1:]], f"c{number}")
        for number, turns in enumerate(CONVERSATIONS * 6)
        if turns[0][0] == "human"
    ]
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.fixture
def plan(model_folder: Path, agents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Plan with some flags and read the JSON."""

    def planned(flags: str, model: Path = model_folder) -> dict[str, Any]:
        output = tmp_path / "plan.json"
        argv = f"--model_name_or_path {model} --data_path {agents} --output {output} --device_memory_gib 1000 {flags}"
        assert cli.main(["plan", *shlex.split(argv)]) == 0, capsys.readouterr().err
        found: dict[str, Any] = json.loads(output.read_text())
        return found | {"text": capsys.readouterr().out}

    return planned


def read_lengths(model: Path, data: Path) -> np.ndarray[Any, Any]:
    """Return the lengths of all sequences, in order."""
    args = parse_args(f"--model_name_or_path {model} --data_path {data} --output_dir unused".split())
    lengths: np.ndarray[Any, Any] = get_column(
        prepare_data(args, None, output_dir=None, mode="preview").loaded.train.sequences, "length"
    )
    return lengths


def count_prefix(model: Path, data: Path, flags: str, plan: Any) -> int:
    """Return the tokens that all sequences share, in whole blocks, from what two in one step save."""
    first = plan(flags)
    saved = first["tokens"] - first["computed"]
    assert saved == first["shared"]["steps"], "a step is one pass"
    followers = len(read_lengths(model, data)) - first["schedule"]["steps_per_epoch"]
    assert saved % followers == 0 and saved // followers % 32 == 0
    return int(saved // followers)


@pytest.mark.parametrize(
    "flags", ["", "--packing True --model_max_length 512", "--share_prefixes False --packing True"]
)
def test_plan_counts_the_rows_and_steps_of_a_run_that_shares(
    flags: str, plan: Any, model_folder: Path, agents: Path, tmp_path: Path
) -> None:
    flags = f"{FLAGS} --per_device_train_batch_size 2 --micro_batch_tokens off {flags}"
    planned, output = plan(flags), tmp_path / "out"
    run_forked(
        f"train_lora.py --model_name_or_path {model_folder} --data_path {agents} --output_dir {output} {flags} "
        "--report_to none --save_strategy no"
    )
    state = json.loads((output / "trainer_state.json").read_text())
    results = json.loads((output / "train_results.json").read_text())
    assert planned["schedule"]["steps"] == state["max_steps"]
    assert planned["tokens"] == results["tokens"]
    computed = results.get("computed_tokens", results["tokens"])
    shares = "False" not in flags
    assert (computed < planned["tokens"]) == shares == (planned["computed"] < planned["tokens"])
    # The plan knows beginnings in blocks of 32 tokens only.
    assert computed <= planned["computed"] < computed + 32 * len(read_lengths(model_folder, agents))


def test_memory_and_time_are_those_of_computed_tokens(plan: Any, model_folder: Path, agents: Path) -> None:
    always = f"{FLAGS} --train_sampling_strategy sequential --micro_batch_tokens off --tokens_per_second 10"
    prefix, lengths = count_prefix(model_folder, agents, always, plan), read_lengths(model_folder, agents)
    steps = [lengths[start : start + STEP] for start in range(0, len(lengths), STEP)]
    computed = [int(step.sum()) - prefix * (len(step) - 1) for step in steps]
    planned = plan(always)
    assert planned["computed"] == sum(computed) and planned["pass_tokens"] == max(computed)
    assert planned["time"]["seconds"] == sum(computed) / 10
    alone = plan(f"{always} --share_prefixes False")
    assert alone["pass_tokens"] == np.sort(lengths)[-STEP:].sum() and alone["computed"] == alone["tokens"]
    assert alone["time"]["seconds"] == alone["tokens"] / 10
    (own, separate) = (one["devices"][0]["need"]["activations"] for one in (planned, alone))
    assert own / separate == pytest.approx(planned["pass_tokens"] / alone["pass_tokens"])


def test_passes_of_a_plan_follow_the_flag(plan: Any, model_folder: Path, agents: Path) -> None:
    whole = plan(FLAGS)  # a step is less than a pass
    limit = whole["pass_tokens"] // 2
    cut = plan(f"{FLAGS} --micro_batch_tokens {limit}")
    assert read_lengths(model_folder, agents).max() <= cut["pass_tokens"] <= limit
    assert whole["computed"] < cut["computed"] < cut["tokens"], "a prefix is computed in each pass"


def test_plan_of_a_model_that_carries_a_state(plan: Any, model_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = make_tiny("lfm2")
    model.config.save_pretrained(tmp_path / "recurrent")
    tokenizer.save_pretrained(tmp_path / "recurrent")
    planned = plan(f"{FLAGS} --packing True --model_max_length 512", tmp_path / "recurrent")
    alone = plan(f"{FLAGS} --packing True --model_max_length 512 --share_prefixes False")
    assert planned["sequences"] == alone["sequences"] and planned["computed"] == planned["tokens"]
    assert planned["shared"]["separation"] == "lfm2 has layers that carry a state from token to token"
    assert planned["shared"]["steps"] == alone["shared"]["steps"] > 0
    assert alone["shared"]["separation"] == "--share_prefixes False"


@pytest.mark.parametrize(
    ("flags", "ending"),
    [("", "one computation is enough"), ("--share_prefixes False", "computed again, --share_prefixes False")],
)
def test_inspect_says_what_sharing_saves(
    flags: str, ending: str, plan: Any, model_folder: Path, agents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = plan(FLAGS)["shared"]["steps"]
    argv = f"--model_name_or_path {model_folder} --data_path {agents} --num_examples 1 {FLAGS} {flags}"
    assert cli.main(["inspect", *argv.split()]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"shared prefixes {saved:,} tokens \(\d+%\) repeated in steps: {ending}", output)


def test_nothing_is_said_to_be_shared_where_nothing_is(
    model_folder: Path, data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = f"--model_name_or_path {model_folder} --data_path {data_file} --num_examples 1"
    assert cli.main(["inspect", *argv.split()]) == 0
    assert "none repeated in a step" in capsys.readouterr().out


def test_tokens_are_counted_within_conversations_and_within_steps(model_folder: Path, agents: Path) -> None:
    """Both sequences of the first conversation share 64 tokens; a third one shares 32 of them, in one step or not."""
    ids = [[*range(64), 1, 2], [*range(64), 3], [*range(32), 9, 9]]
    columns = {"input_ids": ids, "length": [len(one) for one in ids], "record": [0, 0, 1]}
    dataset = Dataset.from_dict(columns)
    for per_step, steps in ((2, 96), (1, 64)):
        flags = f"--model_name_or_path {model_folder} --data_path {agents} --output_dir unused"
        args = parse_args(f"{flags} --per_device_train_batch_size {per_step}".split())
        found = count_shared_tokens(dataset, build_prefix_index(dataset), args, "", 1)
        assert found == (sum(columns["length"]), 64, steps, "")
        assert found.describe().startswith(f"{steps} tokens (")
