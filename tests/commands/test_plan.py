"""`plan` counts what a run does, says what a device needs, and names the cheapest way to make it fit."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from forked import succeed as run_forked
from stand_in import SMALL, make_model

from fastchat_qlora import cli
from fastchat_qlora.commands.plan.planning import counts_up_to
from fastchat_qlora.model.estimates import flops as speed

ALL = "--lora_target_modules all-linear"
ROOM = "--device_memory_gib 1000"
OF_LION = "--optim lion_32bit"
ONE = "--per_device_train_batch_size 1"


@pytest.fixture
def plan(model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Plan with some flags, and read it back."""

    def planned(flags: str = "", model: Path = model_folder) -> dict[str, Any]:
        output = tmp_path / "plan.json"
        argv = f"--model_name_or_path {model} --data_path {data} --output {output} {flags}"
        assert cli.main(["plan", *shlex.split(argv)]) == 0, capsys.readouterr().err
        found: dict[str, Any] = json.loads(output.read_text())
        return found

    return planned


def the_run(planned: dict[str, Any]) -> dict[str, Any]:
    """What the strategy asked for needs."""
    return next(one for one in planned["devices"] if one["placement"] == planned["given"])


@pytest.mark.parametrize(
    "flags",
    [
        "--per_device_train_batch_size 4",
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 4 --num_train_epochs 2",
        f"--packing True --model_max_length 128 --per_device_train_batch_size 1 {ALL}",
        "--eval_split 7 --max_steps 5 --save_steps 2 --lora_r 4",
    ],
)
def test_a_plan_is_what_a_run_does(flags: str, plan: Any, model_folder: Path, data: Path, tmp_path: Path) -> None:
    planned = plan(f"{flags} {ROOM}")
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
    measured = plan(f"{flags} {ROOM} --speed_from {output}")["time"]
    assert measured["tokens_per_second"] == results["tokens_per_second"]
    tokens = planned["tokens"] * planned["schedule"]["epochs"]
    assert measured["seconds"] == pytest.approx(tokens / results["tokens_per_second"])


def test_what_is_trained_by_module(plan: Any) -> None:
    width, rank = SMALL["hidden_size"], 8
    assert plan(f"{ROOM} --lora_target_modules q_proj o_proj")["trainable"] == {
        "q_proj": 2 * rank * 2 * width,
        "o_proj": 2 * rank * 2 * width,
    }
    assert plan(f"{ROOM} --modules_to_save lm_head")["trainable"]["lm_head"] == 600 * width


def test_every_strategy_for_every_number_of_devices(plan: Any) -> None:
    planned = plan(f"--devices 5 --device_memory_gib 1 {ALL}")
    shown = [(one["placement"]["devices"], one["placement"]["strategy"]) for one in planned["devices"]]
    several = ["DDP", "ZeRO-2", "ZeRO-3", "FSDP2"]
    assert shown == [(1, "one process"), *((count, name) for count in (2, 3, 4, 5) for name in several)]
    assert planned["given"]["strategy"] == "DDP"
    for one in planned["devices"]:
        need = one["need"]
        assert need["total"] == pytest.approx(sum(size for name, size in need.items() if name != "total"), abs=8)
    assert counts_up_to(20) == [1, 2, 3, 4, 8, 16, 20]


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
def test_the_strategy_asked_for(flags: str, strategy: str, plan: Any) -> None:
    planned = plan(f"--devices 2 {ROOM} {flags}")
    assert planned["given"]["strategy"] == strategy and the_run(planned)["fits"] is True
    assert planned["given"]["offloads_weights"] == ("offload" in flags)


@pytest.mark.parametrize("config", ["s2", "s3_offload"])
def test_one_device_keeps_the_strategy_asked_for(config: str, plan: Any) -> None:
    """Offloading is worth most there."""
    planned = plan(f"{ROOM} {ALL} --deepspeed playground/deepspeed_config_{config}.json")
    assert [one["placement"]["strategy"] for one in planned["devices"]] == ["one process", f"ZeRO-{config[1]}"]
    run = the_run(planned)
    assert planned["fits"] is True and run["placement"]["offloads_weights"] == ("offload" in config)
    assert (run["need"]["weights"] == 0) == ("offload" in config)


def test_zero_1_is_shown_where_it_is_asked_for(plan: Any, tmp_path: Path) -> None:
    config = tmp_path / "s1.json"
    config.write_text('{"zero_optimization": {"stage": 1}}')
    planned = plan(f"--devices 2 {ROOM} --deepspeed {config}")
    assert planned["given"]["strategy"] == "ZeRO-1" and planned["fits"] is True


def test_what_a_strategy_cannot_do_is_said(plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    planned = plan(f"--devices 2 {ROOM} --q_lora True --use_dora True --optim adafactor")
    refused = {one["placement"]["strategy"]: one["refused"] for one in planned["devices"]}
    assert "Adafactor".lower() in refused["ZeRO-2"] and "adafactor" in refused["FSDP2"] and not refused["DDP"]
    assert "looks at shapes" in capsys.readouterr().out
    plan(f"--devices 2 {ROOM} --q_lora True --use_dora True --deepspeed playground/deepspeed_config_s3.json")
    assert "Not possible: ZeRO-3: --use_dora True with --q_lora True" in capsys.readouterr().out


def test_the_largest_batch_is_the_largest(plan: Any) -> None:
    memory = "--device_memory_gib 0.008"
    found = the_run(plan(f"{memory} {ALL}"))["largest_batch"]
    assert 1 <= found < 30
    assert the_run(plan(f"{memory} {ALL} --per_device_train_batch_size {found}"))["fits"] is True
    assert the_run(plan(f"{memory} {ALL} --per_device_train_batch_size {found + 1}"))["fits"] is False


def short_of(planned: dict[str, Any], share: float) -> str:
    """A device that can give a share of what a run needs."""
    return f"--device_memory_gib {share * the_run(planned)['need']['total'] / 0.92 / 2**30}"


@pytest.mark.parametrize(
    ("flags", "share", "change"),
    [
        ("--activation_checkpointing False", 0.9, "--activation_checkpointing auto"),
        ("--activation_checkpointing True", 0.8, "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"),
    ],
)
def test_the_cheapest_change_makes_it_fit(
    flags: str, share: float, change: str, plan: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    always = f"{ALL} --per_device_train_batch_size 8"
    memory = short_of(plan(f"{always} {flags} {ROOM}"), share)
    planned = plan(f"{always} {flags} {memory}")
    assert the_run(planned)["fits"] is False and planned["changes"][0]["flags"] == change
    said = capsys.readouterr().out
    assert "It does not fit" in said and f"Cheapest change: {change}" in said
    changed = plan(f"{always} {change if '--activation' in change else flags + ' ' + change} {memory}")
    assert the_run(changed)["fits"] is True
    assert changed["schedule"]["steps"] == planned["schedule"]["steps"], "the same steps"


def test_every_change_fits_and_nothing_is_promised_where_none_does(
    plan: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    always = f"--devices 2 {ALL} --per_device_train_batch_size 8 --bf16 True"
    memory = short_of(plan(f"{always} --activation_checkpointing True {ROOM}"), 0.6)
    planned = plan(f"{always} {memory}")
    assert planned["changes"] and all(change["on_device"]["fits"] for change in planned["changes"])
    assert not plan(f"--device_memory_gib 0.0001 {ALL}")["changes"]
    assert "choose a smaller model" in capsys.readouterr().out


def test_more_devices_take_the_same_steps_where_they_can(plan: Any) -> None:
    """The conversations of a step are dealt out; where they cannot be, that is said."""
    always = f"{ALL} --bf16 True --q_lora True --fsdp True --model_max_length 256 --activation_checkpointing True"
    for batch, same in (("--per_device_train_batch_size 1 --gradient_accumulation_steps 8", True), (ONE, False)):
        one = plan(f"{always} {batch} {ROOM} --devices 2")
        in_four = next(
            each["need"]["total"]
            for each in plan(f"{always} {batch} {ROOM} --devices 4")["devices"]
            if each["placement"] == one["given"] | {"devices": 4}
        )
        planned = plan(f"{always} {batch} --devices 2 --device_memory_gib {1.001 * in_four / 0.92 / 2**30} ")
        last = planned["changes"][-1]
        assert last["on_device"]["placement"]["devices"] == 4, planned["changes"]
        assert last["flags"] == ("on 4 devices --gradient_accumulation_steps 4" if same else "on 4 devices")
        assert ("2 times the conversations" in last["costs"]) != same


def test_fp32_becomes_bf16_and_8_bits_become_4(plan: Any) -> None:
    memory = short_of(plan(f"{ALL} {ROOM} {ONE} --activation_checkpointing True"), 0.9)
    flags = [change["flags"] for change in plan(f"{ALL} {memory} {ONE} --activation_checkpointing True")["changes"]]
    assert flags[0] == "--bf16 True" and flags[1].startswith("--bf16 True --q_lora True")
    eight = f"{ALL} --bf16 True --load_in_8bit True {ONE} --activation_checkpointing True"
    memory = short_of(plan(f"{eight} {ROOM}"), 0.97)
    changes = plan(f"{eight} {memory}")["changes"]
    assert changes[0]["flags"] == "--q_lora True in place of --load_in_8bit"


def test_what_zero_is_changed_for_takes_its_place(plan: Any) -> None:
    always = f"--devices 2 {ALL} --bf16 True --deepspeed playground/deepspeed_config_s2.json {ONE}"
    changes = plan(f"{always} {short_of(plan(f'{always} {ROOM}'), 0.5)}")["changes"]
    assert changes and all(
        "in place of --deepspeed" in change["flags"] or change["flags"] == "no --deepspeed"
        for change in changes
        if change["on_device"]["placement"]["strategy"] != "ZeRO-2"
    )


def test_rows_that_are_fewer_than_a_batch(plan: Any) -> None:
    packed = plan(f"--packing True --model_max_length 512 --per_device_train_batch_size 64 {ROOM}")
    assert packed["rows"] < 64 and packed["largest_batch"] == 512 * packed["rows"]
    same = plan(f"--packing True --model_max_length 512 --per_device_train_batch_size {packed['rows']} {ROOM}")
    assert the_run(packed)["need"] == the_run(same)["need"]


def test_checkpoints_without_the_optimizer(plan: Any) -> None:
    disk = plan(f"{ROOM} --save_only_model True --optim paged_adamw_8bit")["disk"]
    assert disk["a_checkpoint"] == disk["adapter"]
    assert plan(f"{ROOM} --optim paged_adamw_8bit")["disk"]["a_checkpoint"] == pytest.approx(
        1.5 * disk["adapter"], 0.01
    )


def test_processes_on_a_cpu_share_its_memory(plan: Any) -> None:
    one, four = (plan(f"--device_type cpu --devices {count}") for count in (1, 4))
    assert four["device_gib"] == pytest.approx(one["device_gib"] / 4)
    assert four["available"] == pytest.approx(one["available"] / 4)
    batches = {each["placement"]["devices"]: each["largest_batch"] for each in four["devices"]}
    assert batches[1] >= 2 * batches[2] >= 4 * batches[4] > 0, "each row of the table has its own share"


def test_time(plan: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    planned = plan(f"--device_type cuda {ROOM} --tokens_per_second 100 --devices 2 --num_train_epochs 2")
    assert planned["time"]["seconds"] == planned["tokens"] * 2 / 2 / 100
    assert plan(f"--device_type cuda {ROOM}")["time"] is None, "this machine has no such device"
    assert "--speed_from" in capsys.readouterr().out
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    assert plan("--device_type cpu")["time"]["source"].startswith("at the most: this machine's matrix products")


def test_a_device_whose_memory_is_not_known(plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    planned = plan("--device_type cuda")
    assert planned["available"] is None and the_run(planned)["fits"] is None
    assert "--device_memory_gib says what a device has" in capsys.readouterr().out


def test_nothing_is_written_and_no_weight_is_read(plan: Any, tmp_path: Path) -> None:
    """A folder with nothing but a configuration and a tokenizer will do."""
    folder = tmp_path / "shapes"
    make_model(folder, SMALL)
    from stand_in import make_tokenizer

    make_tokenizer(folder)
    (folder / "model.safetensors").unlink()
    output = tmp_path / "out"
    assert plan(f"{ROOM} --output_dir {output}", folder)["base"] > 0
    assert not output.exists()


def test_json_on_the_terminal(model_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *f"--model_name_or_path {model_folder} --data_path {data} --output - {ROOM}".split()]) == 0
    assert json.loads(capsys.readouterr().out)["given"]["strategy"] == "one process"


def test_the_optimizer_of_a_deepspeed_configuration(plan: Any, tmp_path: Path) -> None:
    """Where it has one, it is that which steps; what is in place of ZeRO has the flag's."""
    config = tmp_path / "lion.json"
    config.write_text('{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lion"}}')
    planned = plan(f"--devices 2 {ROOM} --deepspeed {config}")
    lion, adam = (
        plan(f"--devices 2 {ROOM} --deepspeed playground/deepspeed_config_s2.json {f}") for f in (OF_LION, "")
    )
    assert the_run(planned)["need"]["optimizer"] == the_run(lion)["need"]["optimizer"]
    assert planned["settings"]["optimizer"] == "Lion" and planned["disk"] == lion["disk"] != adam["disk"]
    by_ddp = [one["need"] for one in planned["devices"] if one["placement"]["strategy"] == "DDP"]
    assert by_ddp == [one["need"] for one in adam["devices"] if one["placement"]["strategy"] == "DDP"]


def test_what_8_bits_cannot_4_bits_can_on_more_devices(plan: Any, tokenizer_folder: Path, tmp_path: Path) -> None:
    """8-bit weights are never sharded."""
    model = shutil.copytree(tokenizer_folder, tmp_path / "70B")
    shutil.copy("tests/recipes_models/Llama-3.3-70B-Instruct/config.json", model)
    always = f"--bf16 True {ONE} --device_memory_gib 40"
    [change] = plan(f"{always} --load_in_8bit True", model)["changes"]
    flags = "--q_lora True in place of --load_in_8bit --fsdp True on 2 devices"
    assert (change["flags"], change["on_device"]["placement"]["devices"]) == (flags, 2)
    assert plan(f"{always} --q_lora True --fsdp True --devices 2", model)["fits"] is True


@pytest.mark.parametrize("named", ["--data_path", "a file of settings"])
def test_no_file_of_the_run_is_lost(
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
    ("flags", "says"),
    [
        ("--devices 0", "--devices 0: must be at least 1"),
        ("--device_memory_gib -1", "--device_memory_gib -1.0: must be at least 0"),
        ("--tokens_per_second 1e-300", "--tokens_per_second 1e-300: must be at least 0.001"),
        ("--use_cpu True --device_memory_gib 8", "--use_cpu True and --device_memory_gib 8.0: give --device_type cpu too"),
        ("--use_cpu True --device_type cuda", "two kinds of device"),
        (f"--dataloader_drop_last True --devices 500 {ONE}", "do not fill one batch of 500"),
        ("--deepspeed four.json", "its train_micro_batch_size_per_gpu is 4, --per_device_train_batch_size is 8"),
        ("--deepspeed zero.json", "--deepspeed zero.json: zero_optimization.reduce_bucket_size is -5"),
        ("--tokens_per_second nan", "--tokens_per_second nan: must be a finite number"),
        ("--output plan.txt", "--output plan.txt: give a name that ends in .json"),
        ("--output /nowhere/plan.json", "--output /nowhere/plan.json: cannot be written"),
        ("--speed_from /nowhere", "--speed_from /nowhere: no results of a run are there"),
        ("--tokens_per_second 5 --speed_from x", "two speeds for one run"),
        ("--device cuda", "unknown flag --device: did you mean --devices?"),
    ],
)
def test_mistakes(
    flags: str,
    says: str,
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
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and says in said[0]


@pytest.mark.parametrize(
    ("speed", "batch"),
    [("NaN", "2 x 1 accumulated x 1 processes = 2"), ("9e999", "x 1 processes"), ("5", "x 0 processes")],
)
def test_speeds_that_are_none(
    speed: str, batch: str, model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train_results.json").write_text(f'{{"tokens_per_second": {speed}}}')
    (tmp_path / "training_args.json").write_text(json.dumps({"effective": {"batch": batch}}))
    argv = f"--model_name_or_path {model_folder} --data_path {data} --speed_from {tmp_path}"
    assert cli.main(["plan", *argv.split()]) == 2
    assert "no results of a run are there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "says"),
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
def test_models_of_which_nothing_can_be_said(
    config: dict[str, Any],
    says: str,
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
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and says in said[0], said
