"""Bases that are published quantized are trained on their own weights, answer with them and are merged onto them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from quantized_bases import Bases, publish
from quick_runs import command, losses, seen, train  # noqa: F401  # seen is a fixture
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastchat_qlora import cli
from fastchat_qlora.model.loading.base_model import keep_cpu_weights_trainable
from fastchat_qlora.model.quantization.base_quantization import BaseQuantization, build_quantization_config
from fastchat_qlora.model.quantization.published import FORMAT_NAMES

Publish = Callable[[str], Bases]


@pytest.fixture(scope="module")
def bases(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Publish:
    """Make the folders of a layout once."""
    made: dict[str, Bases] = {}

    def get(layout: str) -> Bases:
        if layout not in made:
            made[layout] = publish(tmp_path_factory.mktemp("base"), tokenizer_folder, layout)
        return made[layout]

    return get


@pytest.fixture
def pair(data: Path, tmp_path: Path) -> Path:
    """Two conversations, which make one batch."""
    path = tmp_path / "pair.json"
    path.write_text(json.dumps(json.loads(data.read_text())[:2]))
    return path


@torch.no_grad()
def first_loss(trainer: Any, folder: Path, dtype: torch.dtype, **settings: Any) -> float:
    """Return the loss of plain transformers on the run's only batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **settings).eval()
    keep_cpu_weights_trainable(model)
    found = []
    for row in trainer.train_dataset:
        ids, labels = (torch.as_tensor(row[name]) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        found.append(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none")[labels[1:] != -100])
    return float(torch.cat(found).mean())


NF4 = build_quantization_config(BaseQuantization("nf4", True), torch.float32)  # which packs experts too
TRAINED = ("nf4", "nf4, experts", "int8", "fp8 128x128", "fp8 64x64, experts", "mxfp4", "gptq, experts", "awq")
FLAGS = {"max_steps": 2, "padding_free": False, "lora_dropout": 0, "learning_rate": 3e-2, "use_cpu": True}


@pytest.mark.parametrize("layout", TRAINED)
def test_base_is_trained_chats_and_is_merged(
    layout: str,
    bases: Publish,
    pair: Path,
    tmp_path: Path,
    seen: dict[str, Any],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, out = bases(layout), tmp_path / "out"
    train(command(base.published, pair, out, **FLAGS))
    kind = re.split("[ ,]", layout)[0]
    folder = base.plain if kind in ("gptq", "awq") else base.published  # transformers needs a package for these
    # In bf16: in fp32 transformers 5.23 leaves what FP8 does not quantize in the dtype of the files, and fails.
    assert losses(out)[0] == pytest.approx(first_loss(seen["trainer"], folder, torch.bfloat16), rel=0.01)
    recorded = json.loads((out / "training_args.json").read_text())["base_quantization"]
    assert recorded["published"] == kind
    assert recorded["kind"] == (kind if kind in ("nf4", "int8") else "none")
    effective = json.loads((out / "training_args.json").read_text())["effective"]["quantized weights"]
    if recorded["kind"] == "none":
        assert effective == f"none, dequantized from {FORMAT_NAMES.get(kind, kind)}"
    else:
        assert "dequantized" not in effective
    capsys.readouterr()
    assert cli.main(["chat", str(out), "--message", "Who are you?", "--max_new_tokens", "4"]) == 0
    assert cli.main(["merge", str(out), "--output_dir", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    messages = capsys.readouterr().err
    assert f"Merged into the weights published in {kind}, dequantized, on which the adapter was trained." in messages
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged, plain = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base.plain))
    assert {name: tensor.shape for name, tensor in merged.items()} == {
        name: tensor.shape for name, tensor in plain.items()
    }
    for name, tensor in plain.items():
        if not name.endswith(("q_proj.weight", "v_proj.weight")):
            torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)


def run_code(card: str, folder: Path) -> None:
    """Run the code of a model card that loads the merged model in a folder."""
    assert "peft" not in card.partition("```python")[2] and card.count("fastchat-qlora merge") == 1
    code = card.partition("```python\n")[2].partition("```")[0].replace('"merged"', repr(str(folder / "merged")))
    exec(code.replace("max_new_tokens=200", "max_new_tokens=3"), {})


def test_experts_in_16_bits_are_packed_if_asked_for(
    bases: Publish,
    pair: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("INFO", "fastchat_qlora")
    base, outputs = bases("nf4, experts"), (tmp_path / "kept", tmp_path / "packed")
    for out, flags in zip(outputs, ({}, {"q_lora": True}), strict=True):
        train(command(base.published, pair, out, **FLAGS | {"max_steps": 1}, **flags))
    said = caplog.text
    quantized, experts = 49_152, 98_304
    share = quantized / (quantized + experts)
    assert (
        f"{share:.1%} of the {quantized + experts:,} weights in linear layers and experts are in 4 bits in the" in said
    )
    assert f"--q_lora True: packs {experts:,} of the {quantized + experts:,} weights" in said
    assert said.count("packed again with all experts (QLoRA)") == 1
    records = [json.loads((out / "training_args.json").read_text()) for out in outputs]
    assert [f"{share:.1%}", "100.0%"] == [
        re.search(r"[\d.]+%", record["effective"]["quantized weights"])[0]  # type: ignore[index]
        for record in records
    ]
    assert "repacked" not in records[0]["base_quantization"] and records[1]["base_quantization"]["repacked"]
    assert cli.main(["merge", str(outputs[1]), "--output_dir", str(tmp_path / "merged")]) == 0
    assert "Merged into the dequantized nf4 weights, packed again with all experts" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["int8", "fp8 64x64, experts", "mxfp4", "gptq, experts"])
def test_qlora_quantizes_the_dequantized_weights(
    layout: str,
    bases: Publish,
    pair: Path,
    tmp_path: Path,
    seen: dict[str, Any],  # noqa: F811
) -> None:
    base, out = bases(layout), tmp_path / "out"
    train(command(base.published, pair, out, **FLAGS, q_lora=True, lora_target_modules="all-linear"))
    expected = first_loss(seen["trainer"], base.plain, torch.float32, quantization_config=NF4)
    assert losses(out)[0] == pytest.approx(expected, rel=0.01)
    effective = json.loads((out / "training_args.json").read_text())["effective"]
    assert "100.0%" in effective["quantized weights"], "experts too"
    assert cli.main(["merge", str(out), "--output_dir", str(tmp_path / "merged")]) == 0
    card, kind = (out / "README.md").read_text(), re.split("[ ,]", layout)[0]
    form = "nf4 with double quantization"
    assert f"published in {kind}; the adapter was trained on its dequantized weights, in {form}. `fast" in card
    is_served = layout == "int8"  # vLLM does not take the adapters of the others, which are on experts
    assert (f"trained on the base model in {form}; on its weights as they are published" in card) == is_served
    run_code(card, tmp_path)
    merged, plain = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base.plain))
    assert {name: tensor.shape for name, tensor in merged.items()} == {
        name: tensor.shape for name, tensor in plain.items()
    }


@pytest.mark.parametrize(
    ("layout", "flags", "weights"),
    [
        ("gptq, experts", {}, "float32, dequantized from GPTQ"),
        ("nf4, experts", {}, "nf4 with double quantization, as published, 33.3% of the 147,456 weights"),
        (
            "gptq, experts",
            {"load_in_8bit": True},
            "int8, dequantized from GPTQ, 33.3% of the 147,456 weights",
        ),
    ],
)
def test_plan_has_the_shares(
    layout: str,
    flags: dict[str, object],
    weights: str,
    bases: Publish,
    pair: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = command(bases(layout).published, pair, tmp_path / "out", lora_target_modules="q_proj", **flags)
    assert cli.main(["plan", *given, "--output", str(tmp_path / "plan.json")]) == 0
    captured = capsys.readouterr()
    settings = json.loads((tmp_path / "plan.json").read_text())["settings"]
    assert settings["base weights"].startswith(weights)
    assert settings["adapter"].startswith("on 11.1% of the 147,456 weights in linear layers and experts, without")
    warned = "33.3% of the 147,456 weights in linear layers and experts are in" in captured.err
    assert warned is ("33.3%" in weights)


def test_dequantized_base_is_trained_in_the_compute_dtype(
    bases: Publish,
    pair: Path,
    tmp_path: Path,
    seen: dict[str, Any],  # noqa: F811
) -> None:
    base = bases("nf4")
    train(command(base.published, pair, tmp_path / "out", **FLAGS, dequantize_base=True))
    frozen = [parameter for parameter in seen["trainer"].model.parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {torch.float32}
    expected = first_loss(seen["trainer"], base.plain, torch.float32)
    assert losses(tmp_path / "out")[0] == pytest.approx(expected, rel=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "published in nf4; the adapter was trained on its dequantized weights, not quantized. `fastchat" in card
    assert "as they are published" not in card and "BitsAndBytesConfig" not in card


def test_adapter_of_a_published_4_bit_base_is_merged_onto_the_original_model(
    bases: Publish, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = bases("nf4"), tmp_path / "out"
    train(command(base.published, pair, out, **FLAGS | {"max_steps": 1}))
    flags = ["--model_name_or_path", str(base.published.parent / "source"), "--output_dir", str(tmp_path / "merged")]
    assert cli.main(["merge", str(out), *flags, "--quantization", "none", "--verify", "False"]) == 0
    message = "Merged into the original weights; the adapter was trained on the dequantized nf4 weights only"
    assert message in capsys.readouterr().err


class Refusal(NamedTuple):
    """A change to a folder of plain or nf4 weights, flags, and what is said."""

    message: str
    settings: Any = None  # quantization_config of plain weights
    flags: dict[str, object] = {}  # noqa: RUF012
    layout: str = ""


OTHERS = "; give the model in 16 bits, or a copy in bitsandbytes' 4 or 8 bits, GPTQ, AWQ, FP8 or MXFP4"
REFUSALS = {
    "gptq layout": Refusal(
        f"quantized by GPTQ with the layout marlin, and only gptq or gptq_v2 can be trained on{OTHERS}",
        {"quant_method": "gptq", "bits": 4, "is_marlin_format": True},
    ),
    "awq bits": Refusal(
        f"quantized by AWQ with 3 bits, and only 4 can be trained on{OTHERS}", {"quant_method": "awq", "bits": 3}
    ),
    "hqq": Refusal(f"quantized by HQQ, whose files can no longer be loaded{OTHERS}", {"quant_method": "hqq"}),
    "quanto": Refusal(f"quantized by Quanto, on which training is not supported{OTHERS}", {"quant_method": "quanto"}),
    "unknown": Refusal(f"quantized by q9, on which training is not supported{OTHERS}", {"quant_method": "q9"}),
    "compressed": Refusal(
        f"which reads them, is not installed; pip install compressed-tensors, or{OTHERS[1:]}",
        {"quant_method": "compressed-tensors"},
    ),
    "a text": Refusal('quantization_config "gptq" in its config.json must be an object; correct it there', "gptq"),
    "gptq bits": Refusal(
        f"quantized by GPTQ with 5 bits, and only 2 or 3 or 4 or 8 can be trained on{OTHERS}",
        {"quant_method": "GPTQ", "bits": "5"},
    ),
    "no method": Refusal("has no quant_method; add it there", {"bits": 4}),
    "another type": Refusal(
        'bnb_4bit_quant_type "nf9" in its config.json must be nf4 or fp4; correct it there',
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf9"},
    ),
    "no such weights": Refusal(
        "its config.json has a quantization_config (mxfp4), and its files hold no such weights; remove it there",
        {"quant_method": "mxfp4"},
    ),
    "no configuration": Refusal("so its weights are quantized, and its config.json has no", None, {}, "int8"),
    "8 bits of 4": Refusal(
        "--load_in_8bit True: the base model is published in 4 bits (nf4 with double quantization), from which 8 bits "
        "gain nothing; drop the flag",
        flags={"load_in_8bit": True},
        layout="nf4",
    ),
    "nothing to dequantize": Refusal(
        "--dequantize_base True: has no effect, since the base model is not quantized; drop it",
        flags={"dequantize_base": True},
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_what_to_do(
    case: str, bases: Publish, model_folder: Path, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message, settings, flags, layout = REFUSALS[case]
    folder = Path(shutil.copytree(bases(layout).published if layout else model_folder, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings or (config.get("quantization_config") if flags else None)
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main(["train", *command(folder, pair, tmp_path / "out", **flags)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error and "transformers" not in error
