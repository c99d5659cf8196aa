"""`plan` counts steps and tokens, estimates the memory of a device, and proposes the cheapest change that fits."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from forked import succeed as run_forked
from quantized_bases import publish
from stand_in import SMALL, make_model

from fastchat_qlora import cli
from fastchat_qlora.commands.plan.estimate import count_devices_up_to
from fastchat_qlora.model.estimates import flops

ALL_LINEAR = "--lora_target_modules all-linear"
ENOUGH_MEMORY = "--device_memory_gib 1000"
ONE_CONVERSATION = "--per_device_train_batch_size 1"


@pytest.fixture
def plan(model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Plan with some flags and read the JSON."""

    def planned(flags: str = "", model: Path = model_folder) -> dict[str, Any]:
        output = tmp_path / "plan.json"
        argv = f"--model_name_or_path {model} --data_path {data} --output {output} {flags}"
        assert cli.main(["plan", *shlex.split(argv)]) == 0, capsys.readouterr().err
        found: dict[str, Any] = json.loads(output.read_text())
        return found

    return planned


def given_estimate(planned: dict[str, Any]) -> dict[str, Any]:
    """The estimate for the given strategy."""
    return next(one for one in planned["devices"] if one["strategy"] == planned["given"])


@pytest.mark.parametrize(
    "flags",
    [
        "--per_device_train_batch_size 4",
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 4 --num_train_epochs 2",
        f"--packing True --model_max_length 128 --per_device_train_batch_size 1 {ALL_LINEAR}",
        "--eval_split 7 --max_steps 5 --save_steps 2 --lora_r 4",
    ],
)
def test_plan_matches_a_run(flags: str, plan: Any, model_folder: Path, data: Path, tmp_path: Path) -> None:
    planned = plan(f"{flags} {ENOUGH_MEMORY}")
    output = tmp_path / "out"
    run_forked(
        f"train_lora.py --model_name_or_path {model_folder} --data_path {data} --output_dir {output} {flags} "
        "--report_to none --logging_steps 1 --learning_rate 1e-2"
    )
    state = json.loads((output / "trainer_state.json").read_text())
    results = json.loads((output / "train_results.json").read_text())
    effective = json.loads((output / "training_args.json").read_text())["effective"]
    assert planned["schedule"]["steps"] == state["max_steps"]
    if planned["schedule"]["epochs"] == int(planned["schedule"]["epochs"]):
        assert planned["tokens"] * planned["schedule"]["epochs"] == results["tokens"]
        assert planned["supervised"] * planned["schedule"]["epochs"] == results["supervised_tokens"]
    assert effective["adapter"].startswith(f"{sum(planned['trainable'].values()):,} parameters")
    assert planned["disk"]["checkpoints"] == len([*output.glob("checkpoint-*")])
    header = 5_000  # names and shapes
    size = (output / "adapter_model.safetensors").stat().st_size
    assert planned["disk"]["adapter"] == pytest.approx(size, abs=header)
    measured = plan(f"{flags} {ENOUGH_MEMORY} --speed_from {output}")["time"]
    assert measured["tokens_per_second"] == results["tokens_per_second"]
    tokens = planned["tokens"] * planned["schedule"]["epochs"]
    assert measured["seconds"] == pytest.approx(tokens / results["tokens_per_second"])


def test_plan_counts_trained_parameters_by_module(plan: Any) -> None:
    width, rank = SMALL["hidden_size"], 8
    assert plan(f"{ENOUGH_MEMORY} --lora_target_modules q_proj o_proj")["trainable"] == {
        "q_proj": 2 * rank * 2 * width,
        "o_proj": 2 * rank * 2 * width,
    }
    assert plan(f"{ENOUGH_MEMORY} --modules_to_save lm_head")["trainable"]["lm_head"] == 600 * width


QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}
"""As published, 30.5 billion parameters."""


def test_plan_of_a_published_mixture_has_experts_in_4_bits(plan: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-30B-A3B"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    planned = plan(f"{ENOUGH_MEMORY} --bf16 True --q_lora True --tokens_per_second 1000 {ALL_LINEAR}", folder)
    assert planned["base"] == pytest.approx(30.5e9, rel=0.002)
    assert 15 < given_estimate(planned)["need"]["weights"] / 2**30 < 18
    gate_up, down = 2048 + 2 * 768, 768 + 2048
    experts = {"gate_up_proj": 8 * 48 * 128 * gate_up, "down_proj": 8 * 48 * 128 * down}
    assert {name: planned["trainable"].get(name) for name in experts} == experts
    assert set(planned["trainable"]) == {"q_proj", "k_proj", "v_proj", "o_proj", *experts}


def test_plan_lists_every_strategy_for_every_number_of_devices(plan: Any) -> None:
    planned = plan(f"--devices 5 --device_memory_gib 1 {ALL_LINEAR}")
    shown = [(one["strategy"]["devices"], one["strategy"]["name"]) for one in planned["devices"]]
    several = ["DDP", "ZeRO-2", "ZeRO-3", "FSDP2"]
    assert shown == [(1, "one process"), *((count, name) for count in (2, 3, 4, 5) for name in several)]
    assert planned["given"]["name"] == "DDP"
    for one in planned["devices"]:
        need = one["need"]
        assert need["total"] == pytest.approx(sum(size for name, size in need.items() if name != "total"), abs=8)
    assert count_devices_up_to(20) == [1, 2, 3, 4, 8, 16, 20]


@pytest.mark.parametrize(
    ("flags", "strategy"),
    [
        ("--fsdp True", "FSDP2"),
        ('--fsdp "full_shard auto_wrap"', "FSDP2"),
        ("--deepspeed playground/deepspeed_config_s2.json", "ZeRO-2"),
        ("--deepspeed playground/deepspeed_config_s3_offload.json", "ZeRO-3"),
        ("", "DDP"),
    ],
)
def test_plan_includes_the_given_strategy(flags: str, strategy: str, plan: Any) -> None:
    planned = plan(f"--devices 2 {ENOUGH_MEMORY} {flags}")
    assert planned["given"]["name"] == strategy and given_estimate(planned)["fits"] is True
    assert planned["given"]["offloads_weights"] == ("offload" in flags)


@pytest.mark.parametrize("config", ["s2", "s3_offload"])
def test_plan_keeps_the_given_strategy_on_one_device(config: str, plan: Any) -> None:
    """Offloading helps most there."""
    planned = plan(f"{ENOUGH_MEMORY} {ALL_LINEAR} --deepspeed playground/deepspeed_config_{config}.json")
    assert [one["strategy"]["name"] for one in planned["devices"]] == ["one process", f"ZeRO-{config[1]}"]
    run = given_estimate(planned)
    assert planned["fits"] is True and run["strategy"]["offloads_weights"] == ("offload" in config)
    assert (run["need"]["weights"] == 0) == ("offload" in config)


def test_plan_shows_zero_1_where_it_is_given(plan: Any, tmp_path: Path) -> None:
    config = tmp_path / "s1.json"
    config.write_text('{"zero_optimization": {"stage": 1}}')
    planned = plan(f"--devices 2 {ENOUGH_MEMORY} --deepspeed {config}")
    assert planned["given"]["name"] == "ZeRO-1" and planned["fits"] is True


def test_plan_reports_why_a_strategy_is_refused(plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    planned = plan(f"--devices 2 {ENOUGH_MEMORY} --q_lora True --use_dora True --optim adafactor")
    refused = {one["strategy"]["name"]: one["refused"] for one in planned["devices"]}
    assert "Adafactor".lower() in refused["ZeRO-2"] and "adafactor" in refused["FSDP2"] and not refused["DDP"]
    said = "--optim adafactor: needs the shapes that ZeRO flattens; choose adamw_torch, or no ZeRO"
    assert refused["ZeRO-2"] == refused["ZeRO-3"] == said, "as `train` would say"
    assert "needs the shapes that ZeRO flattens" in capsys.readouterr().out
    plan(f"--devices 2 {ENOUGH_MEMORY} --q_lora True --use_dora True --deepspeed playground/deepspeed_config_s3.json")
    assert "Not possible: ZeRO-3: --use_dora True with --q_lora True" in capsys.readouterr().out


def short_of(planned: dict[str, Any], share: float) -> str:
    """A device that has a share of what a run needs."""
    return f"--device_memory_gib {share * given_estimate(planned)['need']['total'] / 0.92 / 2**30}"


def test_passes_become_smaller_before_layers_are_checkpointed(plan: Any) -> None:
    """They are as large as memory allows: with one token more they would not fit."""
    always = f"{ALL_LINEAR} --per_device_train_batch_size 8"
    memory = short_of(enough := plan(f"{always} {ENOUGH_MEMORY}"), 0.8)
    found = given_estimate(plan(f"{always} {memory}"))
    assert found["fits"] is True and found["checkpointed"] == 0
    assert found["pass_tokens"] < enough["pass_tokens"] == given_estimate(enough)["pass_tokens"]
    for tokens, fits in ((found["pass_tokens"], True), (found["pass_tokens"] + 1, False)):
        flags = f"{always} {memory} --activation_checkpointing False --micro_batch_tokens {tokens}"
        assert given_estimate(plan(flags))["fits"] is fits
    least = given_estimate(plan(f"{always} {short_of(enough, 0.1)}"))
    assert least["checkpointed"] == 2 and least["pass_tokens"] < found["pass_tokens"], "the longest conversation"


@pytest.mark.parametrize(
    ("flags", "share", "change"),
    [
        ("--activation_checkpointing False", 0.9, "--activation_checkpointing auto"),
        ("--activation_checkpointing True", 0.8, "--micro_batch_tokens auto"),
    ],
)
def test_cheapest_change_makes_the_run_fit(
    flags: str, share: float, change: str, plan: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    always, cut = f"{ALL_LINEAR} --per_device_train_batch_size 8", "--micro_batch_tokens off"
    memory = short_of(plan(f"{always} {cut} {flags} {ENOUGH_MEMORY}"), share)
    planned = plan(f"{always} {cut} {flags} {memory}")
    assert given_estimate(planned)["fits"] is False and planned["changes"][0]["flags"] == change
    out = capsys.readouterr().out
    assert "It does not fit" in out and f"Cheapest change: {change}" in out
    changed = plan(f"{always} {f'{cut} {change}' if '--activation' in change else f'{flags} {change}'} {memory}")
    assert given_estimate(changed)["fits"] is True
    assert changed["schedule"]["steps"] == planned["schedule"]["steps"], "the same steps"


def test_every_proposed_change_fits(plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    always = f"--devices 2 {ALL_LINEAR} --per_device_train_batch_size 8 --bf16 True --micro_batch_tokens off"
    memory = short_of(plan(f"{always} --activation_checkpointing True {ENOUGH_MEMORY}"), 0.6)
    planned = plan(f"{always} {memory}")
    assert planned["changes"] and all(change["on_device"]["fits"] for change in planned["changes"])
    assert not plan(f"--device_memory_gib 0.0001 {ALL_LINEAR}")["changes"]
    assert "choose a smaller model" in capsys.readouterr().out


def test_more_devices_keep_the_steps_if_they_divide_evenly(plan: Any) -> None:
    """If the conversations of a step do not divide evenly, the cost says so."""
    always = (
        f"{ALL_LINEAR} --bf16 True --q_lora True --fsdp True --model_max_length 256 --activation_checkpointing True "
        "--micro_batch_tokens off"
    )
    for batch, same in (
        ("--per_device_train_batch_size 1 --gradient_accumulation_steps 8", True),
        (ONE_CONVERSATION, False),
    ):
        one = plan(f"{always} {batch} {ENOUGH_MEMORY} --devices 2")
        in_four = next(
            each["need"]["total"]
            for each in plan(f"{always} {batch} {ENOUGH_MEMORY} --devices 4")["devices"]
            if each["strategy"] == one["given"] | {"devices": 4}
        )
        planned = plan(f"{always} {batch} --devices 2 --device_memory_gib {1.001 * in_four / 0.92 / 2**30} ")
        last = planned["changes"][-1]
        assert last["on_device"]["strategy"]["devices"] == 4, planned["changes"]
        assert last["flags"] == ("on 4 devices --gradient_accumulation_steps 4" if same else "on 4 devices")
        assert ("2 times the conversations" in last["costs"]) != same


def test_changes_lower_the_precision(plan: Any) -> None:
    memory = short_of(plan(f"{ALL_LINEAR} {ENOUGH_MEMORY} {ONE_CONVERSATION} --activation_checkpointing True"), 0.9)
    flags = [
        change["flags"]
        for change in plan(f"{ALL_LINEAR} {memory} {ONE_CONVERSATION} --activation_checkpointing True")["changes"]
    ]
    assert flags[0] == "--bf16 True" and flags[1].startswith("--bf16 True --q_lora True")
    eight = f"{ALL_LINEAR} --bf16 True --load_in_8bit True {ONE_CONVERSATION} --activation_checkpointing True"
    memory = short_of(plan(f"{eight} {ENOUGH_MEMORY}"), 0.97)
    changes = plan(f"{eight} {memory}")["changes"]
    assert changes[0]["flags"] == "--q_lora True in place of --load_in_8bit"


def test_change_names_no_flag_that_was_not_given(plan: Any, tokenizer_folder: Path, tmp_path: Path) -> None:
    """The weights are in 8 bits as they are published."""
    model = publish(tmp_path / "bases", tokenizer_folder, "int8").published
    always = f"{ALL_LINEAR} --bf16 True {ONE_CONVERSATION} --activation_checkpointing True"
    memory = short_of(plan(f"{always} {ENOUGH_MEMORY}", model), 0.97)
    assert plan(f"{always} {memory}", model)["changes"][0]["flags"] == "--q_lora True"


def test_changes_replace_zero(plan: Any) -> None:
    always = f"--devices 2 {ALL_LINEAR} --bf16 True --deepspeed playground/deepspeed_config_s2.json {ONE_CONVERSATION}"
    changes = plan(f"{always} {short_of(plan(f'{always} {ENOUGH_MEMORY}'), 0.5)}")["changes"]
    assert changes and all(
        "in place of --deepspeed" in change["flags"] or change["flags"] == "no --deepspeed"
        for change in changes
        if change["on_device"]["strategy"]["name"] != "ZeRO-2"
    )


def test_batch_larger_than_the_data(plan: Any) -> None:
    always = f"--packing True --model_max_length 512 --micro_batch_tokens off {ENOUGH_MEMORY}"
    packed = plan(f"{always} --per_device_train_batch_size 64")
    assert packed["sequences"] < 64 and packed["pass_tokens"] == 512 * packed["sequences"]
    same = plan(f"{always} --per_device_train_batch_size {packed['sequences']}")
    assert given_estimate(packed)["need"] == given_estimate(same)["need"]


def test_checkpoint_size_without_optimizer_state(plan: Any) -> None:
    disk = plan(f"{ENOUGH_MEMORY} --save_only_model True --optim paged_adamw_8bit")["disk"]
    assert disk["a_checkpoint"] == disk["adapter"]
    assert plan(f"{ENOUGH_MEMORY} --optim paged_adamw_8bit")["disk"]["a_checkpoint"] == pytest.approx(
        1.5 * disk["adapter"], 0.01
    )


def test_processes_on_a_cpu_share_its_memory(plan: Any) -> None:
    one, four = (plan(f"--device_type cpu --devices {count}") for count in (1, 4))
    assert four["device_gib"] == pytest.approx(one["device_gib"] / 4)
    assert four["available"] == pytest.approx(one["available"] / 4)


def test_training_time_by_the_given_speed(plan: Any) -> None:
    planned = plan(f"{ENOUGH_MEMORY} --device_type cuda --tokens_per_second 100 --devices 2 --num_train_epochs 2")
    assert planned["time"]["seconds"] == planned["tokens"] * 2 / 2 / 100
    assert planned["time"]["is_upper_bound"] is False


def test_training_time_is_unknown_for_a_device_of_another_machine(
    plan: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(f"--device_type cuda {ENOUGH_MEMORY}")["time"] is None
    assert "--speed_from" in capsys.readouterr().out


def test_speed_of_matrix_products_is_an_upper_bound(
    plan: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flops, "TIMING_SECONDS", 0.01)
    time = plan("--device_type cpu")["time"]
    assert time["is_upper_bound"] is True and time["source"].startswith("this machine's matrix products reach")
    assert re.search(r"time +at least .* at most [\d,]+ tokens/s", capsys.readouterr().out)


def test_unknown_device_memory(plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    planned = plan("--device_type cuda")
    assert planned["available"] is None and given_estimate(planned)["fits"] is None
    assert "Give the memory of a device with --device_memory_gib" in capsys.readouterr().out


def test_plan_writes_nothing_and_reads_no_weights(plan: Any, tmp_path: Path) -> None:
    """A folder with only a configuration and a tokenizer is enough."""
    folder = tmp_path / "shapes"
    make_model(folder, SMALL)
    from stand_in import make_tokenizer

    make_tokenizer(folder)
    (folder / "model.safetensors").unlink()
    output = tmp_path / "out"
    assert plan(f"{ENOUGH_MEMORY} --output_dir {output}", folder)["base"] > 0
    assert not output.exists()


def test_json_on_standard_output(model_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(
            ["plan", *f"--model_name_or_path {model_folder} --data_path {data} --output - {ENOUGH_MEMORY}".split()]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["given"]["name"] == "one process"


def test_optimizer_of_a_deepspeed_configuration(plan: Any, tmp_path: Path) -> None:
    """It takes the place of --optim under ZeRO only."""
    config = tmp_path / "lion.json"
    config.write_text('{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lion"}}')
    planned = plan(f"--devices 2 {ENOUGH_MEMORY} --deepspeed {config}")
    lion, adam = (
        plan(f"--devices 2 {ENOUGH_MEMORY} --deepspeed playground/deepspeed_config_s2.json {f}")
        for f in ("--optim lion_32bit", "")
    )
    assert given_estimate(planned)["need"]["optimizer"] == given_estimate(lion)["need"]["optimizer"]
    assert planned["settings"]["optimizer"] == "Lion" and planned["disk"] == lion["disk"] != adam["disk"]
    by_ddp = [one["need"] for one in planned["devices"] if one["strategy"]["name"] == "DDP"]
    assert by_ddp == [one["need"] for one in adam["devices"] if one["strategy"]["name"] == "DDP"]


def test_changes_shard_4_bit_weights_in_place_of_8_bit_ones(plan: Any, tokenizer_folder: Path, tmp_path: Path) -> None:
    """8-bit weights cannot be sharded."""
    model = shutil.copytree(tokenizer_folder, tmp_path / "70B")
    shutil.copy("tests/recipes_models/Llama-3.3-70B-Instruct/config.json", model)
    always = f"--bf16 True {ONE_CONVERSATION} --device_memory_gib 40"
    [change] = plan(f"{always} --load_in_8bit True", model)["changes"]
    flags = "--q_lora True in place of --load_in_8bit --fsdp True on 2 devices"
    assert (change["flags"], change["on_device"]["strategy"]["devices"]) == (flags, 2)
    assert plan(f"{always} --q_lora True --fsdp True --devices 2", model)["fits"] is True


@pytest.mark.parametrize("named", ["--data_path", "a file of settings"])
def test_output_may_not_replace_an_input(
    named: str, model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.json"
    mine.write_bytes(data.read_bytes() if named == "--data_path" else b'{"lora_r": 4}')
    argv = ["--data_path", str(mine)] if named == "--data_path" else ["--data_path", str(data)]
    first = [] if named == "--data_path" else [str(mine)]
    before = mine.read_bytes()
    assert cli.main(["plan", *first, "--model_name_or_path", str(model_folder), *argv, "--output", str(mine)]) == 2
    assert "which would be lost; give another name" in capsys.readouterr().err and mine.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--devices 0", "--devices 0: must be at least 1"),
        ("--device_memory_gib -1", "--device_memory_gib -1.0: must be at least 0"),
        ("--tokens_per_second 1e-300", "--tokens_per_second 1e-300: must be at least 0.001"),
        (
            "--use_cpu True --device_memory_gib 8",
            "--use_cpu True and --device_memory_gib 8.0: give --device_type cpu too",
        ),
        ("--use_cpu True --device_type cuda", "two kinds of device"),
        (f"--dataloader_drop_last True --devices 500 {ONE_CONVERSATION}", "do not fill one step of 500"),
        ("--deepspeed four.json", "its train_micro_batch_size_per_gpu is 4, --per_device_train_batch_size is 8"),
        ("--deepspeed zero.json", "--deepspeed zero.json: zero_optimization.reduce_bucket_size is -5"),
        ("--tokens_per_second nan", "--tokens_per_second nan: must be a finite number"),
        ("--output plan.txt", "--output plan.txt: must end in .json"),
        ("--output /nowhere/plan.json", "--output /nowhere/plan.json: cannot be written"),
        ("--speed_from /nowhere", "--speed_from /nowhere: no results of a run found"),
        ("--devic cuda", "unknown flag --devic: did you mean --devices?"),
    ],
)
def test_mistakes_are_one_error_line(
    flags: str,
    message: str,
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("four.json").write_text('{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 4}')
    Path("zero.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": -5}}')
    assert cli.main(["plan", *f"--model_name_or_path {model_folder} --data_path {data} {flags}".split()]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize(("speed", "processes"), [("NaN", 1), ("9e999", 1), ("5", 0)])
def test_invalid_measured_speed(
    speed: str, processes: int, model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train_results.json").write_text(f'{{"tokens_per_second": {speed}}}')
    (tmp_path / "training_args.json").write_text(json.dumps({"processes": processes}))
    argv = f"--model_name_or_path {model_folder} --data_path {data} --speed_from {tmp_path}"
    assert cli.main(["plan", *argv.split()]) == 2
    assert "no results of a run found (ValueError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "nope"}, "no model can be made of its config.json"),
        ({"intermediate_size": -1}, "no model can be made of its config.json"),
        ({"model_type": "nobody_knows"}, "nobody_knows"),
        ({"model_type": "t5"}, "t5 is not a causal language model"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}},
            "lies outside transformers",
        ),
        ({"vocab_size": 500}, "the tokenizer has 600 tokens and the model embeddings for 500"),
    ],
)
def test_unusable_model_is_an_error(
    config: dict[str, Any],
    message: str,
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model_folder.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    own = "from transformers import PretrainedConfig\nclass Own(PretrainedConfig):\n    model_type = 'own'\n"
    (folder / "own.py").write_text(own)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | config))
    trusted = "--trust_remote_code True" if "auto_map" in config else ""
    assert cli.main(["plan", *f"--model_name_or_path {folder} --data_path {data} {trusted}".split()]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], errors
