"""README.md beside the adapter: its head, its content, and that its code runs."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCardData
from peft import LoraConfig
from stand_in import SMALL, make_model
from transformers import TrainerState

from fastchat_qlora.config.mixture import DataEntry
from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.data.dataset import LoadedData, SourceCounts, Splits
from fastchat_qlora.data.tokenization.build import RejectionSummary
from fastchat_qlora.model.loading.base_identity import BaseIdentity
from fastchat_qlora.model.quantization.base_quantization import BaseQuantization
from fastchat_qlora.training import run
from fastchat_qlora.training.report.charts import get_curve
from fastchat_qlora.training.report.model_card import VLLM_RANKS, _number, build_model_card, explain_vllm_refusal
from fastchat_qlora.training.report.report_data import RunSummary
from fastchat_qlora.training.setup import PreparedBase, PreparedData, PreparedRun


def train(model: Path, data: Path, output: Path, *flags: str) -> str:
    paths = f"--model_name_or_path {model} --data_path {data} --output_dir {output} --disable_tqdm True"
    settings = f"{paths} --max_steps 4 --learning_rate 1e-2 --logging_steps 1 --save_strategy no"
    run.train(parse_args([*settings.split(), *flags]))
    return (output / "README.md").read_text(encoding="utf-8")


def head(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def code(card: str) -> str:
    [block] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(block)


def table(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", card, re.MULTILINE))


@pytest.mark.parametrize(
    "flags",
    [
        ["--lora_r", "20", "--packing", "True"],
        ["--q_lora", "True", "--bf16", "True"],
        ["--load_in_8bit", "True", "--bf16", "True"],
    ],
)
def test_card_describes_the_run_and_its_code_runs(
    flags: list[str],
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also on a CPU for which bitsandbytes would pack the weights, at a width that it cannot pack."""
    model = tmp_path / "private" / "base model"
    shutil.copytree(model_folder, model)
    make_model(model, SMALL | {"num_key_value_heads": 1})  # k_proj has 16 rows
    data_file = data_file.rename(data_file.with_name("my conversations.json"))
    arguments = ["--model_name_or_path", str(model), "--data_path", str(data_file), "--eval_split", "2", *flags]
    card = train(Path("-"), Path("-"), tmp_path / "my-adapter", *arguments)
    output = tmp_path / "my-adapter"
    quantized = "--q_lora" in flags
    rounds = "rounds activations to 8 bits too, in evaluation only. Losses and answers of evaluation differ"
    assert caplog.text.count(rounds) == int("--load_in_8bit" in flags)
    tags = ["lora", "transformers", "fastchat-qlora", *(["qlora"] if quantized else [])]
    assert head(card) == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": tags}
    assert ModelCardData(**head(card)).to_dict() == head(card)
    assert str(tmp_path) not in card, "no folder of this machine"
    assert (
        f"# my-adapter\n\nA {'QLoRA' if quantized else 'LoRA'} adapter for the model in the folder `base model`" in card
    )
    assert re.search(
        r"^\| training \| <code>my conversations\.json</code> \| 12 \| 0 \| 0 \| 0 \| 10 \| ", card, re.MULTILINE
    )
    assert re.search(r"^\| evaluation, held out \| of these \|  \|  \|  \|  \| 2 \| ", card, re.MULTILINE)
    assert "A turn of the assistant ends with `<|im_end|>`" in card and "the tokenizer's chat template" in card
    facts, results = table(card), json.loads((output / "train_results.json").read_text())
    assert (facts["rank"], facts["alpha"]) == ("20" if flags[0] == "--lora_r" else "8", "16")
    assert (facts["learning rate"], facts["max_steps"], facts["held out for evaluation"]) == ("0.01", "4", "2.0")
    assert facts["evaluation loss"] == f"{results['eval_loss']:.4g}" and facts["steps"] == "4"
    assert facts["tokens"] == f"{results['tokens']:,}"
    assert "vllm serve 'base model' --enable-lora --lora-modules my-adapter=. --max-lora-rank " in card
    assert f"--max-lora-rank {32 if flags[0] == '--lora_r' else 8} " in card

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    monkeypatch.chdir(output)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code(card).replace("max_new_tokens=200", "max_new_tokens=3"), {})
    assert printed.getvalue().strip()


def card_of(name: str, tokenizer: Any, tmp_path: Path, *sources: SourceCounts, **lora: Any) -> str:
    """Return the card of a run that was not run: of a base model on the hub, with settings only."""
    data, rejected = tmp_path / "data.json", tmp_path / "rejected.jsonl"
    data.write_text("[{}]")
    rejected.write_text("")
    args = parse_args(f"--model_name_or_path {name} --data_path {data} --output_dir {tmp_path / 'out'}".split())
    columns = ("length", "supervised", "weight", "full_length", "turns", "thoughts", "record")
    empty = Dataset.from_dict({key: [] for key in columns})
    summary = RejectionSummary(read=5, rejected=5)
    loaded = LoadedData("--data_path", [str(data)], empty, summary, rejected, [], "the vicuna template", sources)
    base = PreparedBase(None, LoraConfig(**lora), BaseQuantization(), None, None, {})  # type: ignore[arg-type]
    identity = BaseIdentity(name, "0" * 40)
    known = {
        "base": base,
        "base_identity": identity,
        "data": PreparedData(tokenizer, Splits(loaded)),
        "train_dataset": empty,
        "stop_tokens": [],
    }
    prepared = PreparedRun(**dict.fromkeys(PreparedRun._fields) | known)
    trainer = SimpleNamespace(state=TrainerState(), best_step=None, adapter=torch.nn.Module())
    effective = SimpleNamespace(settings={"devices": "8 x cuda on my-host"})
    run_summary = RunSummary(trainer, args, prepared, effective)  # type: ignore[arg-type]
    return build_model_card("my adapter|`x", run_summary, {"steps": 1})


def test_base_on_the_hub_is_named_in_the_head(tokenizer: Any, tmp_path: Path) -> None:
    card = card_of("org/base", tokenizer, tmp_path)
    found = head(card)
    assert (found["base_model"], found["base_model_relation"]) == ("org/base", "adapter")
    assert found["tags"][0] == "base_model:adapter:org/base"
    assert (
        f"vllm serve org/base --revision {'0' * 40} --enable-lora --lora-modules my-adapter-x=. --max-lora-rank 8 "
        in card
    )
    assert "# my adapter__x\n" in card and "my-host" not in card and "stands for the folder" not in card


def test_parts_of_a_mixture_are_listed(tokenizer: Any, tmp_path: Path) -> None:
    sources = [
        SourceCounts("a", DataEntry("a.jsonl"), read=9, rejected=1, dropped=3),
        SourceCounts(
            "b", DataEntry("b|c.jsonl", max_samples=2, repeat=2.0), read=9, rejected=2, dropped=1, not_sampled=4
        ),
    ]
    card = card_of("org/base", tokenizer, tmp_path, *sources)
    assert re.search(r"^\| training \| \S+ \| 5 \| 5 \| 4 \| 4 \| 0 \| ", card, re.MULTILINE)
    listed = "- <code>b&#124;c.jsonl</code>: `max_samples=2,repeat=2`"
    assert f"\n\nUsed in part, or several times:\n\n{listed}\n\nConversations are" in card and "- `a" not in card


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "it is a DoRA adapter"),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, "it trains embed_tokens and lm_head in full"),
        (
            {"target_parameters": ["experts.down_proj", "o_proj.weight"]},
            "it is on weights of experts in one tensor, a form that vLLM takes for few models",
        ),
        ({"bias": "lora_only", "r": 600}, "it trains biases, and its rank is above 512"),
    ],
)
def test_adapter_that_vllm_refuses_is_to_be_merged(
    settings: dict[str, Any], reason: str, tokenizer: Any, tmp_path: Path
) -> None:
    assert explain_vllm_refusal(LoraConfig(**settings)) == reason
    card = card_of("org/base", tokenizer, tmp_path, **settings)
    assert f"does not take this adapter beside its base model, because {reason}." in card
    assert "--enable-lora" not in card and "vllm serve merged" in card


@pytest.mark.parametrize(("rank", "most"), [(1, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_rank_is_one_that_vllm_knows(rank: int, most: int, tokenizer: Any, tmp_path: Path) -> None:
    assert f"--max-lora-rank {most} " in card_of("org/base", tokenizer, tmp_path, r=rank) and most in VLLM_RANKS


def test_secrets_are_masked(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secretbase1")
    assert "secretbase1" not in card_of("org/secretbase1", tokenizer, tmp_path)


def test_best_step_is_named(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """If the last state is not the best, the adapter is an earlier one; the log keeps all measurements."""
    output = tmp_path / "out"
    best = "--eval_strategy steps --save_strategy steps --eval_steps 1 --save_steps 1 --load_best_model_at_end True"
    card = train(model_folder, data_file, output, *best.split(), "--eval_split", "3", "--learning_rate", "10")
    state = json.loads((output / "trainer_state.json").read_text())
    step = state["best_global_step"]
    assert step < 4, "this rate overshoots"
    assert table(card)["step of this adapter, with the best evaluation"] == str(step)
    page = (output / "report.html").read_text(encoding="utf-8")
    assert f"The adapter is that of step {step}, with the best evaluation." in page
    measured = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    curve = get_curve(state["log_history"], "eval_loss", "", "")
    assert curve.steps == [1, 2, 3, 4] and curve.values == measured[:4]


def test_metrics_of_the_last_process_are_left_out_after_resume(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    saves = ["--save_strategy", "steps", "--save_steps", "2"]
    whole = table(train(model_folder, data_file, output, *saves))
    shutil.rmtree(output / "checkpoint-4")
    for name in ("training_args.json", "train_results.json"):
        (output / name).unlink()
    went_on = table(train(model_folder, data_file, output, *saves))
    assert {*whole} - {*went_on} == {"mean loss", "tokens", "supervised tokens", "seconds"}
    assert whole["steps"] == went_on["steps"] == "4"


def test_failure_to_write_the_card_loses_nothing_else(
    model_folder: Path, data_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out" / "README.md").mkdir(parents=True)
    with contextlib.suppress(IsADirectoryError):
        train(model_folder, data_file, tmp_path / "out")
    assert "the model card cannot be written" in caplog.text
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"training_args.json", "train_results.json", "adapter_model.safetensors"} <= files
    assert not [name for name in files if name.endswith(".part")]


def test_large_numbers_are_written_out() -> None:
    assert [_number(value) for value in (23_680.4, 36_000, 2.71828, 0.00012346)] == [
        "23,680",
        "36,000",
        "2.718",
        "0.0001235",
    ]


def test_adapter_files_have_equal_permissions(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    train(model_folder, data_file, tmp_path / "out")
    modes = {(tmp_path / "out" / name).stat().st_mode for name in ("adapter_model.safetensors", "adapter_config.json")}
    assert len(modes) == 1


def test_finished_run_started_again_keeps_its_card(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    first = train(model_folder, data_file, tmp_path / "out", "--save_strategy", "steps", "--save_steps", "2")
    again = train(model_folder, data_file, tmp_path / "out", "--save_strategy", "steps", "--save_steps", "2")
    assert first == again
