"""Sample prompts before and after training: answered as by a server, and without any effect on the training."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Padding, conversation, make_base, make_trainer, our_peft
from forked import command as given
from forked import succeed
from quick_runs import command, losses, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastchat_qlora.cli import main
from fastchat_qlora.model.attention.attention import PER_CONVERSATION
from fastchat_qlora.training.callbacks import sample_generations
from fastchat_qlora.training.callbacks.sample_generations import MAX_NEW_TOKENS, STATE_KEY, generate_greedily

ASKED = ["--sample_prompts", "Who are you?", "Count."]


def kept(checkpoint: Path) -> dict[str, str]:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return state["stateful_callbacks"][STATE_KEY]["attributes"]


@pytest.mark.parametrize("layout", ["end to end", "padded on the right", "padded on the left"])
def test_answers_equal_generate(layout: str, tmp_path: Path) -> None:
    """Prompts whose answers end at different tokens are in one batch; the mode of the model is restored."""
    attention = PER_CONVERSATION if layout == "end to end" else None
    trainer = make_trainer(our_peft(make_base("llama", attention)), tmp_path, layout)
    prompts = [conversation(length, seed)["input_ids"] for seed, length in enumerate((7, 12, 3))]
    plain = make_trainer(our_peft(make_base("llama")), tmp_path).adapter.eval()
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = plain.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=[5, 6]
        )[0, len(prompt) :].tolist()
        expected.append(made[:-1] if made[-1] in (5, 6) else made)
    for was_training in (True, False):
        trainer.model.train(was_training)
        assert generate_greedily(trainer, prompts, {5, 6}, max_new_tokens=20) == expected
        assert trainer.model.training == was_training
    assert generate_greedily(trainer, [], {5}) == []
    assert isinstance(trainer.data_collator._pad.tokenizer, Padding)


@pytest.mark.parametrize("flags", [{}, {"q_lora": True, "bf16": True}], ids=["lora", "qlora"])
def test_sample_prompts_do_not_change_training(
    flags: dict[str, Any], model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """Bit for bit, with dropout and evaluations. The answers are those of the base model and of the adapter."""
    more = flags | {
        "max_steps": 4,
        "eval_split": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
    }
    plain = train(command(model_folder, data_file, tmp_path / "plain", **more))
    asked = train([*command(model_folder, data_file, tmp_path / "asked", **more), *ASKED])
    assert losses(asked) == losses(plain)
    name = "adapter_model.safetensors"
    assert (asked / name).read_bytes() == (plain / name).read_bytes()
    assert kept(asked / "checkpoint-4").keys() == {*ASKED[1:]}


def test_answers_before_training_are_the_base_models(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    flags = {"max_steps": 1, "save_strategy": "steps"}
    output = train([*command(model_folder, data_file, tmp_path / "out", **flags), *ASKED])
    tokenizer = AutoTokenizer.from_pretrained(output)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    for prompt, answer in kept(output / "checkpoint-1").items():
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
        made = base.generate(**ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=ends)
        text = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert answer == text


def test_resumed_run_knows_the_answers_before_training(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    flags = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    output = tmp_path / "out"
    train([*command(model_folder, data_file, output, **flags, max_steps=2), *ASKED])
    before = kept(output / "checkpoint-2")
    train([*command(model_folder, data_file, output, **flags, max_steps=4), *ASKED])
    assert kept(output / "checkpoint-4") == before


ONE_STEP = "--max_steps 1 --save_steps 1 --learning_rate 1e-2 --use_cpu True --bf16 True --sample_prompts Who? Where?"


@pytest.fixture(scope="module")
def alone(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the answers of one process."""
    output = tmp_path_factory.mktemp("alone") / "out"
    words = given(model_folder, data, output, ONE_STEP, f"--cache_dir {output.parent / 'cache'}")
    assert main(["train", *words]) == 0
    return kept(output / "checkpoint-1")


@pytest.mark.parametrize(
    ("strategy", "flags"),
    [
        pytest.param("torchrun --nproc_per_node 2", "", marks=pytest.mark.matrix),
        pytest.param("torchrun --nproc_per_node 2", "--fsdp True", marks=pytest.mark.matrix),
        ("deepspeed --num_accelerators 2", "--deepspeed playground/deepspeed_config_s3.json"),
    ],
    ids=["DDP", "FSDP2", "ZeRO-3"],
)
def test_strategies_give_the_same_answers(
    strategy: str, flags: str, alone: dict[str, str], model_folder: Path, data: Path, tmp_path: Path
) -> None:
    """A sharded model generates the same answers as one process."""
    words = " ".join(given(model_folder, data, tmp_path / "out", ONE_STEP, flags))
    succeed(f"{strategy} train_lora.py {words}")
    assert kept(tmp_path / "out" / "checkpoint-1") == alone != {}
    after = answers_after(tmp_path / "out")
    assert len(after) == 2 and not any(answer.startswith("(") for answer in after)


def answers_after(output: Path) -> list[str]:
    """Return the text of the page in place of the answers."""
    page = (output / "report.html").read_text(encoding="utf-8")
    return re.findall(r"<h4>after</h4><p>(.*?)</p>", page, re.DOTALL)


def test_processes_give_up_together(model_folder: Path, data: Path, tmp_path: Path) -> None:
    """If one fails at a prompt after training, none waits for it, and the run ends well."""
    words = " ".join(given(model_folder, data, tmp_path / "out", ONE_STEP))
    said = succeed(
        f"torchrun --nproc_per_node 2 train_lora.py {words}", 100, PREPARE="planted:no_answers_after_on_rank_1"
    )
    assert "2 prompts have no answer after training (another process of the run has failed at it)" in said
    reason = "(failed: another process of the run has failed at it)"
    assert answers_after(tmp_path / "out") == [reason, reason]


def test_prompts_added_later_are_answered_after_training(
    model_folder: Path, data_file: Path, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    """A new prompt has no answer of the base model."""
    flags = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    output = tmp_path / "out"
    train([*command(model_folder, data_file, output, **flags, max_steps=2), *ASKED])
    before = kept(output / "checkpoint-2")
    train([*command(model_folder, data_file, output, **flags, max_steps=4), *ASKED, "And why?"])
    assert kept(output / "checkpoint-4") == before
    assert "--sample_prompts: 1 of 3 were added after training began" in notices.text
    shown = re.findall(r"<h4>(before|after)</h4><p>(.*?)</p>", (output / "report.html").read_text(), re.DOTALL)
    assert [text == "(not generated)" for _, text in shown] == [False] * 4 + [True, False]


def failing(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let the prompts fail at the `at`-th time, as on a full device."""
    real = sample_generations._compute_last_logits
    calls: list[int] = []

    def ask(trainer: Any, forward: Any, rows: list[list[int]]) -> torch.Tensor:
        calls.append(trainer.state.global_step)
        if len({*calls}) == at:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return real(trainer, forward, rows)

    monkeypatch.setattr(sample_generations, "_compute_last_logits", ask)


def test_failure_after_training_loses_nothing(
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The failure is logged once and shown on the page, and all files are there."""
    failing(monkeypatch, at=2)
    output = tmp_path / "out"
    assert main(["train", *command(model_folder, data_file, output, max_steps=2), *ASKED]) == 0
    said = capsys.readouterr().err
    assert said.count("CUDA out of memory") == 1
    assert "2 prompts have no answer after training (CUDA out of memory. Tried to allocate 2 GiB)" in said
    assert {"adapter_model.safetensors", "train_results.json", "README.md"} <= {path.name for path in output.iterdir()}
    page = (output / "report.html").read_text(encoding="utf-8")
    assert 'class="status done"' in page
    assert page.count("<h4>after</h4><p>(failed: CUDA out of memory. Tried to allocate 2 GiB)</p>") == 2


def test_failure_before_training_stops_the_run(
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(monkeypatch, at=1)
    assert main(["train", *command(model_folder, data_file, tmp_path / "out", max_steps=2), *ASKED]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: --sample_prompts: the model cannot generate before training (CUDA out of memory.")


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["Hi", " "], "--sample_prompts '': a prompt is empty; give it a text, or drop the flag"),
        (
            ["Hi", "Say no"],
            "--sample_prompts 'Say no' (number 2): the chat template refuses it (not that); give another prompt",
        ),
        (["Hi", "a\udcff"], "--sample_prompts: a prompt is not UTF-8"),
        (
            ["one two " * 300],
            f"--sample_prompts '{'one two ' * 7}one ' (number 1): has ",
        ),
    ],
)
def test_unusable_prompt_is_refused(
    prompts: list[str],
    said: str,
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error comes before the weights are loaded, in a dry run too."""
    template = model_folder / "chat_template.jinja"
    before = template.read_text(encoding="utf-8")
    refusal = "{%- for m in messages if m.content == 'Say no' %}{{ raise_exception('not that') }}{% endfor -%}"
    try:
        template.write_text(refusal + before, encoding="utf-8")
        arguments = command(model_folder, data_file, tmp_path / "out", dry_run=True)
        assert main(["train", *arguments, "--sample_prompts", *prompts]) == 2
    finally:
        template.write_text(before, encoding="utf-8")
    errors = capsys.readouterr().err
    assert said in errors and errors.count("error:") == 1 and "sequence length is longer" not in errors
