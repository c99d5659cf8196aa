"""The merged model is the base model with its adapter: its weights bit for bit, its logits up to rounding."""

import argparse
import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import load_file, save_file
from saved_adapters import compute_logits, load_reference, save_adapter, save_base, write_training_args
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fastchat_qlora import cli
from fastchat_qlora.commands.adapter_flags import parse_size
from fastchat_qlora.commands.merge import command
from fastchat_qlora.model.merging import safetensors_files

QV = ["q_proj", "v_proj"]
NF4 = {"quantization": "nf4"}


class Case(NamedTuple):
    """A base model, its precision in training, and an adapter, as changes to the usual settings of each."""

    family: str
    base: Mapping[str, Any] = MappingProxyType({})
    training: Mapping[str, Any] = MappingProxyType({})
    adapter: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "lora": Case("llama", adapter={"target_modules": QV}),
    "bf16": Case("qwen3", training={"dtype": "bfloat16"}),
    "nf4": Case("llama", training={**NF4, "dtype": "bfloat16"}),
    "nf4 on few layers": Case("qwen2", training=NF4, adapter={"target_modules": QV}),
    "nf4 without double quantization": Case("llama", training={**NF4, "double_quant": False}),
    "fp4": Case("mistral", training={"quantization": "fp4"}),
    "int8": Case("llama", training={"quantization": "int8", "dtype": "float16"}),
    "rank by layer": Case(
        "phi3",
        adapter={"use_rslora": True, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    ),
    "trained biases": Case("qwen2", adapter={"bias": "all"}),
    "biases of the adapter": Case("qwen2", adapter={"target_modules": QV, "lora_bias": True}),
    "dora": Case("qwen3", adapter={"use_dora": True}),
    "dora on nf4": Case("llama", training=NF4, adapter={"use_dora": True}),
    "head": Case("llama", training=NF4, adapter={"modules_to_save": ["lm_head"]}),
    "tied head": Case("gemma2", base={"tie_word_embeddings": True}, adapter={"modules_to_save": ["lm_head"]}),
    "tied embeddings": Case(
        "gemma3", base={"tie_word_embeddings": True}, adapter={"target_modules": ["embed_tokens", "q_proj"]}
    ),
    "tied weights unchanged": Case("llama", base={"tie_word_embeddings": True}, training=NF4),
    "transposed": Case("gpt2", adapter={"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    "transposed nf4": Case("gpt2", training=NF4, adapter={"target_modules": ["c_attn", "c_proj"]}),
}
"""Every kind of adapter, on every family in turn."""

Folders = Callable[[str], tuple[Path, Path]]


@pytest.fixture
def folders(tokenizer_folder: Path, tmp_path: Path) -> Folders:
    """Make the folders of the base model and the adapter of a case."""

    def make(name: str) -> tuple[Path, Path]:
        case = CASES[name]
        dtype = torch.bfloat16 if case.training.get("dtype") == "bfloat16" else torch.float32
        base = save_base(tmp_path / "base", tokenizer_folder, case.family, dtype, **case.base)
        return base, save_adapter(tmp_path / "adapter", base, dict(case.training), **case.adapter)

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_merged_model_is_the_base_model_with_its_adapter(case: str, folders: Folders, tmp_path: Path) -> None:
    base, adapter = folders(case)
    training = CASES[case].training
    argv = ["merge", str(adapter), "--output_dir", str(tmp_path / "out"), "--dtype", "float32", "--verify", "False"]
    assert cli.main([*argv, "--max_shard_size", "60KB"]) == 0
    reference = load_reference(base, adapter, **training)
    expected = compute_logits(reference)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=reference.dtype).eval()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    # In 8 bits the base model rounds activations too, which the merged one does not.
    close = {"float32": 1e-4, "float16": 0.3, "bfloat16": 0.3}[training.get("dtype", "float32")]
    spread = float(expected.std())
    assert (compute_logits(merged) - expected).abs().max() < close * spread
    with reference.disable_adapter():
        effect = float((compute_logits(reference) - expected).abs().max()) / spread
    assert effect > 3 * close, "the adapter has an effect"
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    if not CASES[case].adapter.get("use_dora"):
        _assert_exact(reference, weights(tmp_path / "out"))


def _assert_exact(reference: Any, written: dict[str, torch.Tensor]) -> None:
    """Assert that weights are the dequantized ones and the adapter's delta, added in fp32."""
    count = 0
    for name, layer in reference.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight = layer.get_base_layer().weight
        is_4bit, is_8bit = (kind in type(weight).__name__ for kind in ("Params4bit", "Int8Params"))
        state = layer.get_base_layer().state if is_8bit else getattr(weight, "quant_state", None)
        plain = dequantize_bnb_weight(weight, state) if is_4bit or is_8bit else weight
        delta = layer.float().get_delta_weight("default")
        found = written[f"{name}.weight"]
        if plain.shape != found.shape or (is_4bit and "c_" in name):  # GPT-2's layers are transposed
            plain, delta = plain.T, delta.T
        assert torch.equal(found, plain.float() + delta.float()), name
        count += 1
    assert count >= 3
    for name, parameter in reference.get_base_model().named_parameters():
        if "lora_" not in name and "base_layer" not in name and parameter.dtype == torch.float32 and name in written:
            assert torch.equal(written[name], parameter), name


def test_weights_are_rounded_once_to_the_dtype_of_the_base_model(folders: Folders, tmp_path: Path) -> None:
    base, adapter = folders("nf4")
    for name, flags in (("auto", []), ("float32", ["--dtype", "float32"])):
        assert cli.main(["merge", str(adapter), "--output_dir", str(tmp_path / name), "--verify", "False", *flags]) == 0
    rounded, exact = weights(tmp_path / "auto"), weights(tmp_path / "float32")
    assert rounded.keys() == exact.keys() == weights(base).keys()
    for name, tensor in exact.items():
        assert torch.equal(rounded[name], tensor.bfloat16()), name
    formats = [json.loads((tmp_path / name / "config.json").read_text())["dtype"] for name in ("auto", "float32")]
    assert formats == ["bfloat16", "float32"]


def test_tied_weights_are_untied_if_one_is_changed(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = folders("tied head")
    assert "lm_head.weight" not in weights(base)
    assert cli.main(["merge", str(adapter), "--output_dir", str(tmp_path / "out")]) == 0
    written, saved = weights(tmp_path / "out"), load_file(adapter / "adapter_model.safetensors")
    assert torch.equal(written["lm_head.weight"], saved["base_model.model.lm_head.weight"])
    assert torch.equal(written["model.embed_tokens.weight"], weights(base)["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "are two in the merged model" in capsys.readouterr().err


def test_merge_logs_and_writes(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, adapter = folders("nf4")
    out = tmp_path / "deep" / "out"
    capsys.readouterr()  # the output of libraries while the adapter was made
    assert cli.main(["merge", str(adapter), "--output_dir", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "\r" not in captured.err, "no progress bars without a terminal"
    assert "Merged into the dequantized nf4 weights, which differ from the original ones by " in captured.err
    assert "of their norm; the adapter was trained on these and compensates for it. --quantization none" in captured.err
    assert "Merged model compared with base model and adapter at " in captured.err
    assert sorted(path.name for path in out.iterdir()) == [
        *("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    assert [path.name for path in out.parent.iterdir()] == ["out"], "no other folder is left"
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "all files have the same permissions"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(adapter).chat_template
    assert tokenizer.model_max_length == 256
    assert GenerationConfig.from_pretrained(out).eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


class MergedWeights(NamedTuple):
    """A quantization in training, empty if unknown, one given to `merge`, and the message."""

    trained_on: str
    given: str
    message: str


MERGED_WEIGHTS = [
    MergedWeights("nf4", "none", "Merged into the original weights; the adapter was trained on the dequantized nf4"),
    MergedWeights("nf4", "fp4", "of their norm; the adapter was trained on the dequantized nf4 weights only, so the"),
    MergedWeights("none", "nf4", "of their norm; the adapter was trained on the original weights only, so the merged"),
    MergedWeights("none", "none", "Merged into the original weights, on which the adapter was trained."),
    MergedWeights("", "none", "Merged into the original weights; on which ones the adapter was trained is not known."),
    MergedWeights("", "nf4", "of their norm; on which ones the adapter was trained is not known."),
]


@pytest.mark.parametrize("case", MERGED_WEIGHTS)
def test_given_quantization_of_the_base_model(
    case: MergedWeights, folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = folders("lora")
    (adapter / "training_args.json").unlink()
    if case.trained_on:
        write_training_args(adapter, quantization=case.trained_on)
    flags = ["--output_dir", str(tmp_path / "out"), "--quantization", case.given]
    assert cli.main(["merge", str(adapter), *flags, "--dtype", "float32", "--verify", "False"]) == 0
    assert case.message in capsys.readouterr().err
    _assert_exact(load_reference(base, adapter, quantization=case.given), weights(tmp_path / "out"))


FP4 = {"base_quantization": {"kind": "fp4", "double_quant": True}, "compute_dtype": "bfloat16"}
FP4_RUN = json.dumps({"manifest": {"format": 2, "run": FP4}})
OLD_RUN = json.dumps(
    {"manifest": {"format": 1, "run": {"base weights": "fp4, quantised twice", "compute dtype": "bfloat16"}}}
)
NF4_RUN = json.dumps({"lora": {"q_lora": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
                      "bnb_4bit_use_double_quant": True}, "training": {"bf16": True, "fp16": False}})  # fmt: skip
NF4_MESSAGE = "Merged into the dequantized nf4 weights, which differ from the original ones by "
FP4_MESSAGE = NF4_MESSAGE.replace("nf4", "fp4")


@pytest.mark.parametrize(
    ("folder", "files", "message"),
    [
        ("checkpoint-7", {}, "has no training_args.json, so the precision of its training is unknown"),
        ("checkpoint-7", {"manifest.json": FP4_RUN, "training_args.json": NF4_RUN}, FP4_MESSAGE),
        ("checkpoint-7", {"manifest.json": "{}", "training_args.json": NF4_RUN}, NF4_MESSAGE),
        ("checkpoint-7", {"manifest.json": OLD_RUN}, FP4_MESSAGE),
        ("checkpoint-7", {"../training_args.json": NF4_RUN}, NF4_MESSAGE),
        ("best", {"training_args.json": NF4_RUN}, NF4_MESSAGE),
        ("best", {"../training_args.json": NF4_RUN}, "best: has no training_args.json, so the "),
        ("best", {"training_args.json": NF4_RUN[:20]}, "best: its training_args.json is corrupt (JSONDecodeError: "),
        ("best", {"training_args.json": "[" * 100_000}, "best: its training_args.json is corrupt (RecursionError: "),
        ("best", {"training_args.json": "[]"}, "best: its training_args.json is corrupt (TypeError: "),
        ("best", {"training_args.json": NF4_RUN.replace("nf4", "nf5")}, "(ValueError: bnb_4bit_quant_type 'nf5')"),
        (
            "checkpoint-7",
            {"manifest.json": "{", "../training_args.json": "{}"},
            "property name enclosed in double quotes: line 1 column 2 (char 1)) and its training_args.json is corrupt "
            "(KeyError: 'lora'), so the precision of its training is unknown",
        ),
    ],
)
def test_precision_of_the_training(
    folder: str,
    files: dict[str, str],
    message: str,
    folders: Folders,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run's training_args.json counts for its checkpoints, and for no other folder in it."""
    _, adapter = folders("lora")
    adapter = adapter.rename(tmp_path / folder)
    (adapter / "training_args.json").unlink()
    for name, text in files.items():
        (adapter / name).write_text(text)
    assert cli.main(["merge", str(adapter), "--verify", "False", "--output_dir", str(tmp_path / "out")]) == 0
    assert message in capsys.readouterr().err


def test_merge_keeps_the_stop_tokens_of_the_training(folders: Folders, tmp_path: Path) -> None:
    _, adapter = folders("lora")
    GenerationConfig(eos_token_id=[2, 7], pad_token_id=0, temperature=0.5, do_sample=True).save_pretrained(adapter)
    assert cli.main(["merge", str(adapter), "--output_dir", str(tmp_path / "out"), "--verify", "False"]) == 0
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (found.eos_token_id, found.temperature) == ([2, 7], 0.5)


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("beside", ["base", "adapter"])
def test_merge_keeps_contradicting_generation_settings(
    beside: str, is_full: bool, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some base models have a temperature without sampling, which transformers reads and refuses to write."""
    base, adapter = folders("lora")
    settings = {"do_sample": False, "temperature": 0.5, "top_p": 0.3, "eos_token_id": [2]}
    settings |= {"default_chat_template_kwargs": {"enable_thinking": False}}  # as a run keeps them
    (base if beside == "base" else adapter).joinpath("generation_config.json").write_text(json.dumps(settings))
    if is_full:
        monkeypatch.setattr(command, "build_meta_model", lambda config: None)
    assert cli.main(["merge", str(adapter), "--output_dir", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: written[name] for name in settings} == settings


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("changed", ["o_proj", "q_proj"])
def test_overflow_of_the_dtype_is_an_error(
    changed: str,
    is_full: bool,
    folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error names the tensor, whether an adapter is on it or not; float32 holds it."""
    base, adapter = folders("lora")
    name = f"model.layers.1.self_attn.{changed}.weight"
    tensors = weights(base)
    tensors[name][0, 0] = -1e5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    if is_full:
        monkeypatch.setattr(command, "build_meta_model", lambda config: None)
    argv = ["merge", str(adapter), "--output_dir", str(tmp_path / "out"), "--dtype"]
    assert cli.main([*argv, "float16"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"error: {name}: holds values up to 1e+05, and float16 ends at 6.55e+04; give --dtype bfloat16 or float32"
    )
    assert not (tmp_path / "out").exists()
    assert cli.main([*argv, "float32"]) == 0


class Verification(NamedTuple):
    """Layers that the merge leaves out, the scale of the adapter, and the first words of the message."""

    left_out: str
    scale: float
    message: str


VERIFICATIONS = [
    Verification("", 1.0, ""),
    Verification("0.self_attn.v_proj", 1.0, "error: the merged model is not the base model with its adapter: "),
    Verification("", 0.01, ""),
    Verification("_proj", 0.01, "Not verified: the adapter changes the predictions by "),
    Verification("_proj", 0.0, "Not verified: the adapter changes the predictions by 0 nats"),
]


@pytest.mark.parametrize("case", VERIFICATIONS)
def test_verification_finds_missing_layers(
    case: Verification,
    folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """If the adapter's effect is too small for it, a warning says so."""
    base, adapter = folders("lora")
    _change_tensors(adapter, lambda tensors: [one.mul_(case.scale) for key, one in tensors.items() if "lora_B" in key])
    original, write = weights(base), safetensors_files.write_weight_files

    def leave_out(folder: Path, headers: Any, get: Callable[[str], torch.Tensor], limit: int) -> None:
        is_left_out = [name for name in headers if case.left_out and case.left_out in name]
        write(folder, headers, lambda name: original[name] if name in is_left_out else get(name), limit)

    monkeypatch.setattr(safetensors_files, "write_weight_files", leave_out)
    argv = ["merge", str(adapter), "--output_dir", str(tmp_path / "out")]
    is_wrong = case.message.startswith("error")
    assert cli.main(argv) == is_wrong
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith(case.message) for line in lines)
    assert any(line.startswith("Not verified") for line in lines) == case.message.startswith("Not verified")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"] + ([] if is_wrong else ["out"])
    if is_wrong:
        assert cli.main([*argv, "--verify", "False"]) == 0


@pytest.mark.parametrize("fault", ["full disk", "SIGTERM", "SIGINT", "another merge"])
def test_merge_cleans_up_after_failure(
    fault: str,
    folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, adapter = folders("lora")

    out = tmp_path / "out"
    out.mkdir()
    real = safetensors_files.save_file

    def fail(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        if fault == "full disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        if fault == "another merge":
            (out / "config.json").touch()
        else:
            signal.raise_signal(signal.Signals[fault])

    monkeypatch.setattr(safetensors_files, "save_file", fail)
    others = [tmp_path / ".out.unfinished" / "of a user", tmp_path / ".unfinished-merge-1" / "of another merge"]
    for other in others:
        other.mkdir(parents=True)
    code = cli.main(["merge", str(adapter), "--output_dir", str(out), "--verify", "False"])
    err = capsys.readouterr().err
    assert f"{tmp_path}: holds 1 unfinished merges, such as .unfinished-merge-1; remove" in err
    assert (code, err.splitlines()[-1]) == {
        "full disk": (1, f"error: --output_dir {out}: cannot be written: [Errno 28] No space left on device"),
        "SIGTERM": (143, f"SIGTERM: stopped; nothing was written to {out}"),
        "SIGINT": (130, f"SIGINT: stopped; nothing was written to {out}"),
        "another merge": (1, f"error: --output_dir {out}: another program has written there meanwhile, and its "
                          "files are kept; give another folder"),
    }[fault]  # fmt: skip
    assert [path.name for path in out.iterdir()] == (["config.json"] if fault == "another merge" else [])
    assert all(other.is_dir() for other in others)
    assert len(list(tmp_path.iterdir())) == 5, "base, adapter, out and two others"


@pytest.mark.parametrize("leads_to", ["a folder", "nothing yet"])
def test_output_dir_may_be_a_link(leads_to: str, folders: Folders, tmp_path: Path) -> None:
    _, adapter = folders("lora")
    elsewhere, link = tmp_path / "elsewhere" / "model", tmp_path / "link"
    link.symlink_to(elsewhere)
    if leads_to == "a folder":
        elsewhere.mkdir(parents=True)
    assert cli.main(["merge", str(adapter), "--output_dir", str(link), "--verify", "False"]) == 0
    assert link.is_symlink() and (elsewhere / "config.json").is_file()
    assert [path.name for path in elsewhere.parent.iterdir()] == ["model"]
    umask = os.umask(0)
    os.umask(umask)
    assert elsewhere.stat().st_mode & 0o777 == 0o777 & ~umask, "it has the permissions of a new folder"


def test_full_disk_is_an_error_before_anything_is_written(
    folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, adapter = folders("lora")
    usage = shutil.disk_usage(tmp_path)._replace(free=60 * 2**20)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: usage)
    assert cli.main(["merge", str(adapter), "--output_dir", str(tmp_path / "out")]) == 2
    assert "60 MiB are free and the model needs 65 MiB; free space" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fused_experts_are_merged_with_the_full_model(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers fuses experts when it loads them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(3)
    config = MixtralConfig(
        vocab_size=600, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "base")
    experts = "mlp.experts.gate_up_proj"
    for name, adapter in (
        ("attention", {"target_modules": QV}),
        ("experts", {"target_modules": ["q_proj"], "target_parameters": [experts]}),
    ):
        folder = save_adapter(tmp_path / name, tmp_path / "base", {}, **adapter)
        assert cli.main(["merge", str(folder), "--output_dir", str(tmp_path / f"{name} out")]) == 0
        is_full = "the whole model is loaded" in capsys.readouterr().err
        assert is_full == (name == "experts")
        written = weights(tmp_path / f"{name} out")
        assert written.keys() == weights(tmp_path / "base").keys()
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name} out").eval()
        reference = load_reference(tmp_path / "base", folder)
        assert torch.allclose(compute_logits(merged), compute_logits(reference), atol=1e-5)


def test_verification_uses_the_context_length(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A template may write more than the model has positions for."""
    _, adapter = folders("lora")
    (adapter / "chat_template.jinja").write_text("{{ 'word ' * 2000 }}")
    assert cli.main(["merge", str(adapter), "--output_dir", str(tmp_path / "out")]) == 0
    assert "Merged model compared with base model and adapter at 1024 positions" in capsys.readouterr().err


MISTAKES: dict[str, tuple[Callable[[Path, Path], list[str]], str]] = {
    # name: a change to base and adapter that returns flags, and the message
    "no adapter": (lambda base, adapter: [str(base)], "adapter_config.json and adapter_model.safetensors not found"),
    "no folder": (
        lambda base, adapter: ["/no/such"],
        "/no/such: adapter_config.json and adapter_model.safetensors not found",
    ),
    "its own folder": (lambda base, adapter: ["--output_dir", str(adapter)], "is the folder of the adapter"),
    "the base's folder": (lambda base, adapter: ["--output_dir", str(base)], "is the folder of the base model"),
    "a full folder": (lambda base, adapter: ["--output_dir", str(base.parent)], "is not empty"),
    "a link to nothing": (
        lambda base, adapter: ["--output_dir", _link_to_itself(base)],
        "is a link to nothing",
    ),
    "a NUL byte": (lambda base, adapter: ["--output_dir", "a\0b"], "must be UTF-8 text without NUL characters"),
    "no UTF-8": (
        lambda base, adapter: ["--output_dir", "a\udcffb"],
        "must be UTF-8 text without NUL characters",
    ),
    "no user": (lambda base, adapter: ["--output_dir", "~nosuchuser/out"], "no such user; give the path in full"),
    "an incomplete file": (
        lambda base, adapter: [_truncate(base)],
        "model.safetensors cannot be read as safetensors: ",
    ),
    "no numbers": (
        lambda base, adapter: [_break(adapter, "nan")],
        "1 of its 8 tensors are not finite floating-point numbers, such as base_mo",
    ),
    "too large": (lambda base, adapter: [_break(adapter, "-inf")], "lora_A.weight; take an earlier checkpoint, or"),
    "whole numbers": (
        lambda base, adapter: [_change_tensors(adapter, _to_integers)],
        "8 of its 8 tensors are not finite",
    ),
    "a base of integers": (
        lambda base, adapter: [_change_base(base, _to_integers)],
        "holds integers in the files; give a base model",
    ),
    "a missing tensor": (
        lambda base, adapter: [_change_base(base, lambda tensors: tensors.pop("model.norm.weight"))],
        "its files lack 1 of its tensors, such as model.norm.weight; download it again",
    ),
    "other shapes": (
        lambda base, adapter: [_set(base / "config.json", vocab_size=700)],
        "its files and its config.json differ in shapes of tensors; download it again",
    ),
    "a size": (lambda base, adapter: ["--max_shard_size", "5 apples"], "5 apples: is no size; give one such as 5GB"),
    "a flag": (lambda base, adapter: ["--quantizaton", "none"], "did you mean --quantization?"),
    "no base": (lambda base, adapter: [_rename(base)], "is neither a local model's folder nor a hub id"),
    "another base": (lambda base, adapter: [_widen(adapter)], "has the shape"),
    "a smaller base": (lambda base, adapter: [_deepen(adapter)], "1 of its tensors do not fit this model"),
    "more tokens": (
        lambda base, adapter: [_add_tokens(adapter)],
        "the tokenizer has 605 tokens and the model embeddings "
        "for 600: '<new 0>' (id 600) has none; give the base model on which the adapter in ",
    ),
    "quantized": (lambda base, adapter: [_quantize(base)], "has a quantization_config (int8), and its files hold no"),
    "no biases": (lambda base, adapter: [_configure(adapter, lora_bias=True)], "tensors are not in it"),
    "another kind": (lambda base, adapter: [_configure(adapter, peft_type="IA3")], "give a LoRA adapter"),
}


def _all_in(folder: Path) -> list[str]:
    return sorted(os.path.join(parent, name) for parent, dirs, files in os.walk(folder) for name in dirs + files)


def _rename(base: Path) -> str:
    base.rename(base.with_name("elsewhere"))
    return ""


def _link_to_itself(base: Path) -> str:
    link = base.with_name("link")
    link.symlink_to(link)
    return str(link)


def _truncate(base: Path) -> str:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5_000])
    return ""


def _configure(adapter: Path, **changes: Any) -> str:
    return _set(adapter / "adapter_config.json", **changes)


def _set(path: Path, **changes: Any) -> str:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return ""


def _change_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    return _change_file(adapter / "adapter_model.safetensors", change)


def _change_base(base: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    return _change_file(base / "model.safetensors", change)


def _change_file(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return ""


def _to_integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: tensor.to(torch.int32) for name, tensor in tensors.items()})


def _widen(adapter: Path) -> str:
    return _change_tensors(adapter, lambda tensors: tensors.update({min(tensors): torch.zeros(4, 128)}))


def _deepen(adapter: Path) -> str:
    name = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
    return _change_tensors(adapter, lambda tensors: tensors.update({name: torch.zeros(4, 64)}))


def _break(adapter: Path, number: str) -> str:
    return _change_tensors(adapter, lambda tensors: min(tensors.items())[1][0].fill_(float(number)))


def _add_tokens(adapter: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.add_tokens([f"<new {index}>" for index in range(5)])
    tokenizer.save_pretrained(adapter)
    return ""


def _quantize(base: Path) -> str:
    return _set(base / "config.json", quantization_config={"quant_method": "bitsandbytes"})


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_error_line(
    mistake: str,
    folders: Folders,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, adapter = folders("lora")
    change, expected = MISTAKES[mistake]
    given = [text for text in change(base, adapter) if text]
    flags = [] if "--output_dir" in given else ["--output_dir", str(tmp_path / "out")]
    named = [] if given and not given[0].startswith("-") else [str(adapter)]
    if mistake == "the base's folder":
        flags += ["--model_name_or_path", str(base)]
    before = _all_in(tmp_path)
    capsys.readouterr()  # the output of libraries while the adapter was made
    assert cli.main(["merge", *named, *given, *flags]) == 2
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert captured.out == "" and error.startswith("error: ") and expected in error
    assert _all_in(tmp_path) == before, "nothing was written"


@given(st.integers(1, 999), st.sampled_from(["", "K", "M", "G", "T"]), st.booleans())
def test_sizes_of_every_unit(number: int, unit: str, binary: bool) -> None:
    power = ["", "K", "M", "G", "T"].index(unit)
    text = f"{number}{unit}{'i' if binary and unit else ''}B"
    assert parse_size(text) == number * (1024 if binary and unit else 1000) ** power
    assert parse_size(text.lower()) == parse_size(text)


@pytest.mark.parametrize(
    "text", ["", "0", "5", "GB", "0B", "0.9B", "0GB", "-5GB", "1e9GB", "nanB", "5 XB", "9" * 400 + "B", "8388608TiB"]
)
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size; give one such as 5GB, 500MB or 2GiB"):
        parse_size(text)
