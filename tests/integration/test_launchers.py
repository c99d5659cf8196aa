"""The published commands as a user types them, on the CPU, with two processes if they take several."""

import json
import shlex
from pathlib import Path

import forked
import pytest
import torch
from adapters import assert_same_adapter
from launching import QUICK, launch, losses, succeed
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.integration


def assert_adapter_works(output: Path, model_folder: Path) -> None:
    """Assert that plain PEFT loads the adapter, in full shapes and fp32, and that it changes the model's answer."""
    saved = load_file(output / "adapter_model.safetensors")
    config = json.loads((output / "adapter_config.json").read_text())
    assert all(config["r"] in tensor.shape and tensor.dtype == torch.float32 for tensor in saved.values())
    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, output)(input_ids=ids).logits
    assert torch.isfinite(after).all() and (before - after).abs().max() > 1e-3


@pytest.fixture(scope="module")
def alone(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return losses of one process with batch 4, fp32 LoRA."""
    output = tmp_path_factory.mktemp("alone") / "out"
    forked.succeed(
        f"python train_lora.py --model_name_or_path {model_folder} --data_path {data} --output_dir {output} {QUICK} "
        "--per_device_train_batch_size 4"
    )
    assert_adapter_works(output, model_folder)
    return losses(output)


TWO_PROCESSES = {
    "ddp": "torchrun --nproc_per_node 2 --master_port {port} train_lora.py",
    "zero2": "deepspeed --num_accelerators 2 --master_port {port} train_lora.py "
    "--deepspeed playground/deepspeed_config_s2.json",
}


def test_two_ranks_with_batch_2_are_one_with_batch_4(
    alone: list[float], model_folder: Path, data: Path, tmp_path: Path, port: int
) -> None:
    output = tmp_path / "out"
    said = succeed(
        f"{TWO_PROCESSES['ddp'].format(port=port)} --model_name_or_path {model_folder} --data_path {data} "
        f"--output_dir {output} {QUICK} --per_device_train_batch_size 2"
    )
    assert losses(output) == pytest.approx(alone, rel=1e-4)
    assert_adapter_works(output, model_folder)
    assert said.count("Padding token:") == 1, "what is said is said once"
    results = json.loads((output / "train_results.json").read_text())
    assert results["tokens"] > results["supervised_tokens"] > 0


def test_masters_are_saved(model_folder: Path, data: Path, tmp_path: Path, port: int) -> None:
    """DeepSpeed computes with an adapter rounded to bf16."""
    output = tmp_path / "out"
    forked.succeed(
        f"{TWO_PROCESSES['zero2'].format(port=port)} --model_name_or_path {model_folder} --data_path {data} "
        f"--output_dir {output} {QUICK} --per_device_train_batch_size 2 --q_lora True --bf16 True"
    )
    assert len(losses(output)) == 4
    assert_adapter_works(output, model_folder)
    saved = load_file(output / "adapter_model.safetensors").values()
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in saved), "masters, not rounded values"


def test_evaluation_does_not_depend_on_the_ranks(model_folder: Path, data: Path, tmp_path: Path, port: int) -> None:
    """Of seven sequences on two ranks one is repeated for even batches, and must not count twice.

    Nor do losses by source depend on them.
    """
    records = json.loads(data.read_text())
    for name, part in {"first": records[:20], "second": records[20:]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    entries = f"{tmp_path / 'first.json'}#share=0.9 {tmp_path / 'second.json'}#repeat=1.6"
    results, histories, rows = {}, {}, {"one": 4, "two": 2}
    for name, launcher in {"one": "python train_lora.py", "two": TWO_PROCESSES["ddp"].format(port=port)}.items():
        forked.succeed(
            f"{launcher} --model_name_or_path {model_folder} --data_path {entries} {QUICK} "
            f"--output_dir {tmp_path / name} --eval_split 7 "
            f"--per_device_eval_batch_size 2 --per_device_train_batch_size {rows[name]}"
        )
        results[name] = json.loads((tmp_path / name / "train_results.json").read_text())
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        logged = [{key: loss for key, loss in entry.items() if key.startswith("loss")} for entry in history]
        histories[name] = [losses for losses in logged if losses]
    for key in ("eval_loss", "eval_first_loss", "eval_second_loss", "train_loss"):
        assert results["two"][key] == pytest.approx(results["one"][key], rel=1e-5), key
    assert {key for losses in histories["one"] for key in losses} == {"loss", "loss/first", "loss/second"}
    for one, two in zip(histories["one"], histories["two"], strict=True):
        assert two == pytest.approx(one, rel=1e-4)


# FastChat's docs/training.md and scripts/train_lora.sh, with other paths, steps and hardware flags (--tf32, --fp16,
# the number of devices).
FASTCHAT_QLORA = """
deepspeed --num_accelerators 2 --master_port {port} train_lora.py
    --model_name_or_path {model} --lora_r 8 --lora_alpha 16 --lora_dropout 0.05 --data_path {data} --bf16 True
    --output_dir {output} --num_train_epochs 1 --per_device_train_batch_size 1 --per_device_eval_batch_size 1
    --gradient_accumulation_steps 1 --evaluation_strategy "no" --save_strategy "steps" --save_steps 12
    --save_total_limit 100 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine"
    --logging_steps 1 --model_max_length 2048 --q_lora True --deepspeed playground/deepspeed_config_s2.json
"""
FASTCHAT_LORA = """
deepspeed --num_accelerators 2 --master_port {port} train_lora.py
    --model_name_or_path {model} --lora_r 8 --lora_alpha 16 --lora_dropout 0.05 --data_path {data}
    --output_dir {output} --num_train_epochs 1 --per_device_train_batch_size 2 --per_device_eval_batch_size 2
    --gradient_accumulation_steps 1 --evaluation_strategy "steps" --eval_steps 100 --save_strategy "steps"
    --save_steps 6 --save_total_limit 2 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03
    --lr_scheduler_type "cosine" --logging_strategy "steps" --logging_steps 1 --model_max_length 2048 --q_lora False
    --deepspeed playground/deepspeed_config_s2.json --gradient_checkpointing True --lora_weight_path {adapter}
    --flash_attn False
"""


def test_fastchats_commands_train(model_folder: Path, data: Path, tmp_path: Path, port: int) -> None:
    """QLoRA first, then LoRA from its adapter."""
    first, second = tmp_path / "qlora", tmp_path / "lora"
    said = succeed(FASTCHAT_QLORA.format(port=port, model=model_folder, data=data, output=first, adapter=""))
    assert said.count("--evaluation_strategy no:") == 1 and said.count("--warmup_ratio 0.03:") == 1
    assert len(losses(first)) == 15 and (first / "checkpoint-12").is_dir()
    assert_adapter_works_though_barely_trained(first)
    said = forked.succeed(FASTCHAT_LORA.format(port=port, model=model_folder, data=data, output=second, adapter=first))
    assert "nothing to evaluate on" in said
    assert len(losses(second)) == 8
    assert {path.name for path in second.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before), "it went on from there"
    assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in before), "and not from elsewhere"


def assert_adapter_works_though_barely_trained(output: Path) -> None:
    saved = load_file(output / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)


def test_run_resumes_under_zero_2(model_folder: Path, data: Path, tmp_path: Path, port: int) -> None:
    """A second start resumes from the checkpoint of the first, and ends as an uninterrupted run."""
    command = (
        f"{TWO_PROCESSES['zero2'].format(port=port)} --model_name_or_path {model_folder} --data_path {data} "
        "--logging_steps 1 --learning_rate 1e-2 --lora_dropout 0 --disable_tqdm True --save_steps 2 "
        "--lr_scheduler_type constant --per_device_train_batch_size 2"
    )
    forked.succeed(f"{command} --output_dir {tmp_path / 'straight'} --max_steps 4")
    forked.succeed(f"{command} --output_dir {tmp_path / 'stopped'} --max_steps 2")
    said = succeed(f"{command} --output_dir {tmp_path / 'stopped'} --max_steps 4")
    assert said.count("Resuming from") == 1
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    assert_same_adapter(tmp_path / "stopped", tmp_path / "straight")
    assert [*Path("/dev/shm").glob(f"*{port}*")] == [], "memory is left for ever"


RECORD = (
    '() { if [[ " $* " == *" train_lora.py "* ]]; then printf "%s\\0" {0} "$@" > "$CALL"; else command {0} "$@"; fi; }'
)
"""A function of bash in the place of a launcher: it records a run, which a forked process then makes."""


@pytest.mark.parametrize(
    "script", ["train_lora.sh", "train_qlora.sh", "train_qlora_torchrun.sh", "train_lora_zero3.sh"]
)
def test_scripts_train(script: str, model_folder: Path, data: Path, tmp_path: Path) -> None:
    """The launchers themselves start in the tests above and below."""
    output, call = tmp_path / "out", tmp_path / "call"
    recorders = {f"BASH_FUNC_{name}%%": RECORD.replace("{0}", name) for name in ("python", "torchrun", "deepspeed")}
    paths = {"MODEL": str(model_folder), "DATA": str(data), "OUTPUT": str(output), "CALL": str(call)}
    more = "--max_steps 2 --save_strategy no --learning_rate 1e-2"
    succeed(f"bash scripts/{script} {more}", **paths, **recorders)
    words = call.read_text().split("\0")[:-1]
    assert words[0] == {"train_qlora_torchrun.sh": "torchrun", "train_lora_zero3.sh": "deepspeed"}.get(script, "python")
    forked.succeed(shlex.join(words))
    assert_adapter_works(output, model_folder)


@pytest.mark.parametrize("slow_rank", [pytest.param(None, marks=pytest.mark.matrix), "0", "1"])
def test_mistake_is_reported_once(slow_rank: str | None, model_folder: Path, tmp_path: Path, port: int) -> None:
    """Any process may find it first: a launcher ends every process as soon as one has failed."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        f"import os, sys, time\nif os.environ.get('RANK') == {slow_rank!r}: time.sleep(5)\n", encoding="utf-8"
    )
    done = launch(
        f"{TWO_PROCESSES['ddp'].format(port=port)} --model_name_or_path {model_folder} "
        f"--data_path {tmp_path / 'missing.json'} --output_dir {tmp_path / 'out'}",
        PYTHONPATH=str(slow),
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and len(lines) == 1
    assert "local rank" not in lines[0] and "--data_path" in lines[0] and "missing.json" in lines[0]


def test_exit_codes(model_folder: Path, tmp_path: Path) -> None:
    command = f"python train_lora.py --model_name_or_path {model_folder} --output_dir {tmp_path / 'out'}"
    done = launch(command)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "--data_path" in errors[0] and "Traceback" not in done.stderr
    assert launch("fastchat-qlora --version").returncode == 0
