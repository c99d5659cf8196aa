"""Every flag that is accepted does what it says, or is refused before loading."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from string import Template

import pytest
import torch
from effects import Elsewhere, FlagRun, OnDevice
from flag_effects import TRIALS, Trial
from forked import Run
from launching import free_port
from observe import FILE
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.config.parser import build_parser
from fastchat_qlora.data.batching.collator import Collator
from fastchat_qlora.training.trainer import LoraTrainer

ROOT = Path(__file__).resolve().parents[2]
QUICK = (
    "--model_name_or_path $model --data_path $data --output_dir $out --cache_dir $cache --lora_target_modules "
    "all-linear --per_device_train_batch_size 2 --learning_rate 1e-3 --logging_steps 1 --max_steps 4 --save_strategy "
    "no --use_cpu True"
)
RUN = [trial for trial in TRIALS if not isinstance(trial.effect, Elsewhere | OnDevice)]

Start = Callable[..., FlagRun]


def name(trial: Trial) -> str:
    return " ".join(filter(None, [trial.given, trial.beside, f"x{trial.processes}" if trial.processes > 1 else ""]))


@pytest.fixture(scope="module")
def start(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Return a function that runs flags of a trial; the same ones without a flag of their own run once."""
    cache = tmp_path_factory.mktemp("cache")
    finished: dict[tuple[str, int, str], FlagRun] = {}

    def run(trial: Trial, *, with_flag: bool) -> FlagRun:
        key = (trial.beside, trial.processes, trial.before)
        if not with_flag and key in finished:
            return finished[key]
        out = tmp_path_factory.mktemp("run") / "out"
        base = finished[key].folder if with_flag else out
        paths = {"model": model_folder, "data": data, "eval": data, "out": out, "cache": cache, "base": base}
        given = f"--{trial.given}" if with_flag else ""
        environment = {"PREPARE": "observe:install", "OBSERVED": str(out.parent / FILE)}
        log = out.parent / "log.txt"
        for flags in ([trial.before] if trial.before else []) + [f"{trial.beside} {given}"]:
            words = [Template(word).substitute(paths) for word in f"{QUICK} {flags}".split()]
            ended = Run(words, log, processes=trial.processes, **environment).wait(240)
        run = FlagRun(next((code for code in ended.codes if code), 0), ended.said, out)
        if not with_flag:
            finished[key] = run
        return run

    return run


def check(trial: Trial, start: Start) -> None:
    base = start(trial, with_flag=False)
    run = start(trial, with_flag=True)
    trial.effect.check(run, base)
    shutil.rmtree(run.folder.parent)


@pytest.mark.parametrize("trial", [trial for trial in RUN if trial.core], ids=name)
def test_flag_that_had_no_effect_or_a_wrong_one(trial: Trial, start: Start) -> None:
    check(trial, start)


@pytest.mark.matrix
@pytest.mark.parametrize("trial", [trial for trial in RUN if not trial.core], ids=name)
def test_flag_has_its_effect(trial: Trial, start: Start) -> None:
    check(trial, start)


HUB_FLAGS = "--hub_model_id org/name --hub_token secret --hub_revision next --hub_private_repo True"
PUSHES = {
    "": [("out", None), ("out", None)],
    HUB_FLAGS: [("out", None), ("out", None)],
    "--hub_strategy end": [("out", None)],
    "--hub_strategy checkpoint": [("out", None), ("checkpoint-2", "last-checkpoint"), ("out", None)],
    "--hub_strategy all_checkpoints": [("out", None), ("checkpoint-2", "checkpoint-2"), ("out", None)],
    "--hub_always_push True": [("out", None), ("out", None), ("out", None)],  # the first is never seen to be done
}


@pytest.mark.matrix
@pytest.mark.parametrize("flags", PUSHES, ids=lambda flags: flags or "every_save")
def test_pushes_follow_the_flags_of_the_hub(flags: str, model_folder: Path, data: Path, tmp_path: Path) -> None:
    paths = {"model": model_folder, "data": data, "out": tmp_path / "out", "cache": tmp_path / "cache"}
    command = f"{QUICK} --push_to_hub True --save_strategy steps --save_steps 2 {flags}"
    observed = {"PREPARE": "observe:push_to_a_recorder", "OBSERVED": str(tmp_path / FILE)}
    ended = Run(Template(command).substitute(paths).split(), tmp_path / "log.txt", **observed).wait()
    assert ended.codes == [0], ended.said
    created, *uploads = json.loads((tmp_path / FILE).read_text())
    assert [(upload["folder"], upload["path_in_repo"]) for upload in uploads] == PUSHES[flags]
    assert [upload["run_as_future"] for upload in uploads] == [True] * (len(uploads) - 1) + [False]
    named = flags == HUB_FLAGS
    name, token, revision = ("org/name", "secret", "next") if named else ("me/out", None, None)
    assert {(each["repo_id"], each["token"], each["revision"]) for each in uploads} == {(name, token, revision)}
    assert (created["repo_id"], created["private"]) == (("org/name", True) if named else ("out", None))


def run_on_machines(arguments: str, paths: dict[str, Path], folder: Path) -> list[FlagRun]:
    """Run one process on each of two machines, which share no folder."""
    port, runs = str(free_port()), []
    for rank in range(2):
        out = folder / str(rank) / "out"
        own = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": port}
        words = Template(f"{QUICK} {arguments}").substitute(paths | {"out": out}).split()
        runs.append((Run(words, out.parent / "log.txt", MASTER_ADDR="127.0.0.1", **own), out))
    ended = [run.wait() for run, _ in runs]
    return [FlagRun(end.codes[0], end.said, out) for end, (_, out) in zip(ended, runs, strict=True)]


@pytest.mark.matrix
def test_each_machine_saves_and_logs_as_asked(model_folder: Path, data: Path, tmp_path: Path) -> None:
    paths = {"model": model_folder, "data": data, "cache": tmp_path / "cache"}
    saving = "--save_on_each_node True --save_strategy steps --save_steps 2 --log_level info"
    first, second = run_on_machines(saving, paths, tmp_path / "each")
    assert (first.code, second.code) == (0, 0), second.said
    assert first.adapter == second.adapter
    assert {"checkpoint-2/rng_state_1.pth", "checkpoint-2/optimizer.pt", "checkpoint-2/manifest.json"} <= second.files()
    assert "***** Running training *****" in second.said
    first, second = run_on_machines("--log_on_each_node False --log_level info", paths, tmp_path / "one")
    assert (first.code, second.code) == (0, 0), second.said
    assert "***** Running training *****" in first.said and "***** Running training *****" not in second.said
    assert second.files() == set()


@pytest.mark.matrix
def test_passes_become_smaller_until_they_fit(model_folder: Path, data: Path, tmp_path: Path) -> None:
    paths = {"model": model_folder, "data": data, "out": tmp_path / "out", "cache": tmp_path / "cache"}
    flags = (
        "--auto_find_batch_size True --include_num_input_tokens_seen non_padding --save_strategy steps --save_steps 2 "
        "--micro_batch_tokens off"
    )
    observed = {"PREPARE": "observe:run_out_of_memory", "OBSERVED": str(tmp_path / FILE)}
    for steps in (4, 6):
        words = Template(f"{QUICK} {flags} --max_steps {steps}").substitute(paths).split()
        ended = Run(words, tmp_path / "log.txt", **observed).wait()
        assert ended.codes == [0], ended.said
        assert "2 x 1 accumulated x 1 processes = 2 conversations a step, 1 conversations a pass" in ended.said
    run = FlagRun(0, ended.said, paths["out"])
    assert [entry["step"] for entry in run.log if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert {
        len(batch)
        for step in json.loads((tmp_path / FILE).with_suffix(".0.json").read_text())["order"]
        for batch in step
    } == {1}


def test_filter_leaves_non_finite_losses_out_of_evaluations(
    model_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(model_folder)
    sound = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [7, 8], "labels": [7, 8]}]
    broken = {"input_ids": [5, 300, 6], "labels": [5, 300, 6]}
    model.get_input_embeddings().weight.data[300] = torch.inf
    adapted, collator = (
        get_peft_model(model, LoraConfig(target_modules=["q_proj"])),
        Collator(tokenizer, padding_free=False),
    )

    def evaluate(rows: list[dict[str, list[int]]], *, filters: bool) -> float:
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, logging_nan_inf_filter=filters)
        trainer = LoraTrainer(
            model=adapted, args=args, eval_dataset=rows, data_collator=collator, processing_class=tokenizer
        )
        return trainer.evaluate()["eval_loss"]

    alone = evaluate(sound, filters=False)
    assert evaluate([*sound, broken], filters=True) == pytest.approx(alone, rel=1e-6)
    assert math.isnan(evaluate([*sound, broken], filters=False))
    assert math.isnan(evaluate([broken], filters=True))


def test_every_flag_has_been_tried() -> None:
    flags = {action.dest for action in build_parser()._actions} - {"help"}
    assert sorted(flags ^ {trial.flag for trial in TRIALS}) == []


def test_trials_elsewhere_are_there() -> None:
    for trial in TRIALS:
        if isinstance(trial.effect, Elsewhere):
            file, _, test = trial.effect.test.partition("::")
            text = (ROOT / file).read_text(encoding="utf-8")
            assert f"def {test}(" in text if test else trial.flag in text, trial
