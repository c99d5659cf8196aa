"""The whole run in one process on a two-layer model, through the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONVERSATIONS, sharegpt
from peft import PeftModel
from quick_runs import command, losses, train
from quick_runs import seen as seen
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastchat_qlora.cli import main
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.loading.base_model import keep_cpu_weights_trainable
from fastchat_qlora.model.ops.cpu_products import has_bf16_kernels
from fastchat_qlora.training.callbacks.throughput import seconds_since_start

EXPECTED_FILES = {
    ".lock",
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "generation_config.json",
    "report.html",
    "tokenizer.json",
    "tokenizer_config.json",
    "train_results.json",
    "trainer_state.json",
    "training_args.json",
}


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"bf16": True},
        {"q_lora": True},
        {"q_lora": True, "bf16": True},
        {"q_lora": True, "bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"lora_target_modules": "all-linear", "use_dora": True},
        {"use_rslora": True, "lora_bias": "lora_only"},
        {"lora_bias": "all", "bf16": True},
        {"lora_bias": "all", "bf16": True, "q_lora": True},
        {"modules_to_save": "lm_head", "bf16": True},
        {"load_in_8bit": True, "bf16": True},
        {"lazy_preprocess": True, "padding_side": "left"},
        {"conv_template": "vicuna", "init_lora_weights": "gaussian"},
    ],
    ids=lambda flags: "-".join(f"{name}={value}" for name, value in flags.items()) or "default",
)
def test_only_the_adapter_changes(
    flags: dict[str, object], model_folder: Path, data_file: Path, tmp_path: Path, seen: dict[str, object]
) -> None:
    output = train(command(model_folder, data_file, tmp_path / "out", **flags))
    trainer, before = seen["trainer"], seen["before"]
    for name, parameter in trainer.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, f"{name} {'moved' if moved else 'did not move'}"
    assert {path.name for path in output.iterdir()} == EXPECTED_FILES
    saved = load_file(output / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert len(saved) == sum(parameter.requires_grad for parameter in trainer.model.parameters())
    history = losses(output)
    assert len(history) == 10 and history[-1] < history[0]


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_plain_peft_gives_the_trained_models_logits(
    quantized: bool, model_folder: Path, data_file: Path, tmp_path: Path, seen: dict[str, object]
) -> None:
    flags = {"q_lora": True} if quantized else {}
    output = train(command(model_folder, data_file, tmp_path / "out", lora_target_modules="all-linear", **flags))
    live = seen["trainer"].model.eval()
    base = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, quantization_config=live.config.quantization_config if quantized else None
    )
    keep_cpu_weights_trainable(base)  # bitsandbytes' CPU kernel for inference rounds to bf16; see base_model.py
    untrained = base(input_ids=torch.arange(3, 40)[None]).logits
    loaded = PeftModel.from_pretrained(base, output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("Who are you? I'm Pellico.", return_tensors="pt").input_ids
    row = {"cu_seq_lens_q": torch.tensor([0, ids.shape[1]], dtype=torch.int32), "max_length_q": ids.shape[1]}
    with torch.no_grad():
        difference = (live(input_ids=ids, **row).logits - loaded(input_ids=ids).logits).abs().max()
        changed = (untrained - loaded(input_ids=torch.arange(3, 40)[None]).logits).abs().max()
    assert difference < 1e-4
    assert changed > 1e-2, "the adapter does something"


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="names of instructions, as Linux gives them")
def test_bf16_kernels_need_instructions() -> None:
    instructions = set(Path("/proc/cpuinfo").read_text().split())
    assert not has_bf16_kernels() or instructions & {"avx512bw", "avx_ne_convert", "bf16"}


def test_results_count_real_tokens(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    output = train(command(model_folder, data_file, tmp_path / "out", max_steps=-1, num_train_epochs=2))
    tokenizer = AutoTokenizer.from_pretrained(output)
    records = json.loads(data_file.read_text(encoding="utf-8"))
    roles = {"human": "user", "gpt": "assistant"}
    real = supervised = 0
    for record in records:
        messages = [{"role": roles[t["from"]], "content": t["value"]} for t in record["conversations"]]
        text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")  # the turn has ended there
        real += len(tokenizer(text, add_special_tokens=False).input_ids)
        answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
        supervised += sum(len(tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers)
    results = json.loads((output / "train_results.json").read_text())
    assert (results["tokens"], results["supervised_tokens"]) == (2 * real, 2 * supervised)
    assert results["tokens_per_second"] > results["supervised_tokens_per_second"] > 0
    assert results["peak_memory_mib"] > 100
    assert 0 < results["time_to_first_step"] < seconds_since_start()


def test_accumulation_is_the_same_as_a_larger_batch(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    same = {"lora_dropout": 0, "max_steps": 4, "seed": 3}
    whole = train(command(model_folder, data_file, tmp_path / "a", per_device_train_batch_size=4, **same))
    parts = train(
        command(
            *(model_folder, data_file, tmp_path / "b"),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            **same,
        )
    )
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    tensors = load_file(whole / "adapter_model.safetensors")
    for name, tensor in load_file(parts / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-3, atol=1e-5)


def test_evaluation_on_start_repeats_none_of_a_resumed_run(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    flags: dict[str, object] = {"eval_split": 4, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    for steps in (1, 2):
        saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": steps}
        output = train(command(model_folder, data_file, tmp_path / "out", **flags, **saving))
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 1, 2]


def test_shorter_run_that_is_done_has_no_other_rates(
    model_folder: Path, data_file: Path, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    for steps in (2, 1):
        train(command(model_folder, data_file, tmp_path / "out", save_strategy="steps", max_steps=steps))
    assert "none was left to train" in notices.text and "from here on" not in notices.text


def test_evaluation_is_a_mean_over_tokens(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """It does not depend on the batches, and is in the results."""
    results = []
    for batch in (1, 3):
        output = tmp_path / str(batch)
        flags = {"eval_split": 4, "eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": batch}
        train(command(model_folder, data_file, output, q_lora=True, **flags))
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        assert len(evaluated) == 2 and evaluated[-1] < evaluated[0], (
            "in the middle and once at the end, and the loss falls on"
        )
        assert json.loads((output / "train_results.json").read_text())["eval_loss"] == evaluated[-1]
        results.append(evaluated)
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_run_resumes_from_its_last_checkpoint(
    model_folder: Path, data_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "lr_scheduler_type": "constant"}
    straight = train(command(model_folder, data_file, tmp_path / "straight", **flags))
    stopped = tmp_path / "stopped"
    train(command(model_folder, data_file, stopped, **flags | {"max_steps": 4}))
    (stopped / "checkpoint-9").mkdir()  # incomplete: a later number with nothing in it
    train(command(model_folder, data_file, stopped, **flags))
    assert len(losses(stopped)) == 8 and losses(stopped) == losses(straight)
    name = "adapter_model.safetensors"
    assert (stopped / name).read_bytes() == (straight / name).read_bytes()


def test_dynamic_rope_resumes_to_the_bit(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """transformers remembers the longest row of a process; the resumed one has not seen it."""
    folder = shutil.copytree(model_folder, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config["max_position_embeddings"] = 32
    (folder / "config.json").write_text(json.dumps(config))
    flags = {
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 1,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = train(command(folder, data_file, tmp_path / "whole", **flags, max_steps=6))
    for steps in (2, 6):
        parts = train(command(folder, data_file, tmp_path / "parts", **flags, max_steps=steps))
    assert losses(parts) == losses(whole)
    expected, found = (load_file(output / "adapter_model.safetensors") for output in (whole, parts))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_finished_run_started_again_changes_nothing(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    arguments = command(model_folder, data_file, tmp_path / "out", save_strategy="steps", save_steps=1, max_steps=2)
    output = train(arguments)
    names = ("adapter_model.safetensors", "train_results.json", "trainer_state.json")
    before = {name: (output / name).read_bytes() for name in names}
    train(arguments)
    assert {name: (output / name).read_bytes() for name in names} == before
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


ONE_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}


@pytest.fixture(scope="module")
def one_step(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train one step with a checkpoint; the data is beside the folder of the run."""
    folder = tmp_path_factory.mktemp("one_step")
    records = [sharegpt(turns, f"c{i}") for i, turns in enumerate(CONVERSATIONS * 3)]
    (folder / "data.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return train(command(model_folder, folder / "data.json", folder / "out", **ONE_STEP))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"q_lora": True}, r"quantization of the base model .*: kind none, .* then, kind nf4, double_quant True now"),
        ({"bf16": True}, r"compute dtype \(--bf16, --fp16\): float32 then, bfloat16 now"),
        ({"optim": "sgd"}, "--optim: adamw_torch then, sgd now"),
        ({"lora_r": 4, "lora_dropout": 0}, "--lora_r: 8 then, 4 now; --lora_dropout: 0.05 then, 0.0 now"),
        ({"learning_rate": 1e-3}, "--learning_rate: 0.01 then, 0.001 now"),
        (
            {"gradient_accumulation_steps": 2, "seed": 7},
            "--gradient_accumulation_steps: 1 then, 2 now; --seed: 42 then",
        ),
        ({"conv_template": "vicuna"}, r"chat template \(--conv_template\): "),
        ({"model_max_length": 64}, "--model_max_length: 512 then, 64 now"),
        ({"packing": True}, "--packing, tokens of a sequence: none then, 512 now"),
    ],
)
def test_checkpoint_of_other_settings_is_refused(
    changed: dict[str, Any], said: str, one_step: Path, model_folder: Path
) -> None:
    before = (one_step / "adapter_model.safetensors").read_bytes()
    given = command(model_folder, one_step.parent / "data.json", one_step, **ONE_STEP | changed | {"max_steps": 2})
    with pytest.raises(UserError, match=f"checkpoint-1: settings changed since this checkpoint .*{said}"):
        train(given)
    assert (one_step / "adapter_model.safetensors").read_bytes() == before


def test_biases_of_quantized_layers_resume(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """bitsandbytes keeps them in the compute dtype, whatever they are cast to."""
    flags = {"lora_bias": "all", "bf16": True, "q_lora": True, "save_strategy": "steps", "save_steps": 2}
    train(command(model_folder, data_file, tmp_path / "out", **flags, max_steps=2))
    train(command(model_folder, data_file, tmp_path / "out", **flags, max_steps=4))
    assert (tmp_path / "out" / "checkpoint-4").is_dir()


def test_adapter_that_lacks_tensors_is_refused(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT would only warn, and train missing tensors from random values."""
    first = train(command(model_folder, data_file, tmp_path / "first", max_steps=1))
    path = first / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "blocks.1"): tensor for name, tensor in load_file(path).items()}, path)
    code = main(["train", *command(model_folder, data_file, tmp_path / "second", lora_weight_path=first)])
    assert code == 2 and "4 tensors are not in it" in capsys.readouterr().err


def test_label_smoothing_changes_the_loss(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    first = [
        losses(
            train(command(model_folder, data_file, tmp_path / f"{share}", label_smoothing_factor=share, max_steps=1))
        )
        for share in (0, 0.3)
    ]
    assert first[0] != first[1]


def test_last_step_is_logged(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    output = train(command(model_folder, data_file, tmp_path / "out", logging_steps=500, max_steps=3))
    results = json.loads((output / "train_results.json").read_text())
    assert losses(output) == pytest.approx([results["train_loss"]])


def test_checkpoint_asked_for_must_exist(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--resume_from_checkpoint"):
        train(command(model_folder, data_file, tmp_path / "out", resume_from_checkpoint=True))


def test_untrained_adapter_ends_with_exit_code_1(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate near zero trains nothing: the saved adapter fails its check."""
    code = main(["train", *command(model_folder, data_file, tmp_path / "out", learning_rate=1e-320, max_steps=2)])
    assert code == 1
    assert "error:" in capsys.readouterr().err


def test_vicuna_template_is_saved_and_renders_the_training_prompt(
    model_folder: Path, data_file: Path, tmp_path: Path, seen: dict[str, object]
) -> None:
    output = train(command(model_folder, data_file, tmp_path / "out", conv_template="vicuna", max_steps=1))
    tokenizer = AutoTokenizer.from_pretrained(output)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, tokenize=True
    )["input_ids"]
    trained = seen["trainer"].train_dataset[0]["input_ids"]
    assert trained[: len(prompt)] == prompt


def test_dry_run_checks_and_loads_no_weights(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model's folder without weights is enough."""
    model = shutil.copytree(model_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    arguments = command(model, data_file, tmp_path / "out", dry_run=True)
    assert main(["train", *arguments]) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("Dry run: ")
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".lock"}
    assert main(["train", *arguments, "--lora_target_modules", "nothing"]) == 2


def test_data_is_not_read_for_a_tokenizer_that_does_not_fit_the_model(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(model_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 5}), encoding="utf-8")
    cache = tmp_path / "cache"
    assert main(["train", *command(model, data_file, tmp_path / "out", dry_run=True, cache_dir=cache)]) == 2
    assert "and the model embeddings for 5" in capsys.readouterr().err
    assert not cache.exists() and not (tmp_path / "out" / "rejected.jsonl").exists()
