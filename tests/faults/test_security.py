"""Untrusted folders of models and adapters: nothing in them runs code; they are refused in one line or harmless.

Every artifact is real: it creates a file when it is read carelessly, and after the run there is none.
"""

import json
import runpy
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from malice import CODE, Malice, assert_refused, copy, edit, is_live, start, torch_is_live
from safetensors.torch import load_file, save_file
from transformers.integrations.hub_kernels import is_kernel

from fastchat_qlora.cli import main
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter.adapter_files import check_adapter_tensors, check_pattern_time, read_lora_config

Plant = Callable[[Path, Path], None]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture(autouse=True)
def modules_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Return the folder into which transformers copies the code of a model that it may run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def pickled(folder: Path, marker: Path, name: str = "pytorch_model.bin") -> None:
    torch.save({"weight": Malice(marker)}, folder / name)
    assert torch_is_live(folder / name, marker)


def only_pickled(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()
    pickled(folder, marker)


def index(name: str) -> Plant:
    def plant(folder: Path, marker: Path) -> None:
        (folder / "model.safetensors").unlink()
        pickled(folder, marker, Path(name).name)
        text = json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}})
        (folder / "model.safetensors.index.json").write_text(text)

    return plant


def pickled_under_the_safe_name(folder: Path, marker: Path) -> None:
    pickled(folder, marker, "model.safetensors.bin")
    (folder / "model.safetensors.bin").replace(folder / "model.safetensors")


def code(**config: object) -> Plant:
    def plant(folder: Path, marker: Path) -> None:
        (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
        assert is_live(lambda: runpy.run_path(str(folder / "evil.py")), marker)
        edit(folder / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, **config)

    return plant


def tokenizer_code(folder: Path, marker: Path) -> None:
    code()(folder, marker)
    auto_map = {"AutoTokenizer": ["evil.T", "evil.T"]}
    edit(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="T", trust_remote_code=True)


def kernel(name: str, key: str) -> Plant:
    def plant(folder: Path, marker: Path) -> None:
        assert is_kernel(name)
        edit(folder / "config.json", **{key: name})

    return plant


def generation_code(folder: Path, marker: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(marker)))
    assert is_live(lambda: runpy.run_path(str(folder / "custom_generate" / "generate.py")), marker)
    settings = {"custom_generate": str(folder), "trust_remote_code": True, "max_length": 5}
    (folder / "generation_config.json").write_text(json.dumps(settings))


def adapter_beside(folder: Path, marker: Path) -> None:
    pickled(folder, marker, "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "../x"}))


def templates(folder: Path, marker: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": name, "template": "{{ messages }}"} for name in ("default", "../../../evil")]
    edit(folder / "tokenizer_config.json", chat_template=named)


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (only_pickled, "has no model.safetensors but pytorch_model.bin, which may run code"),
        (index("weights.bin"), "names 'weights.bin', which is not a safetensors file of that folder"),
        (index("../weights.bin"), "names '../weights.bin', which is not a safetensors file"),
        (pickled_under_the_safe_name, "model.safetensors cannot be read as safetensors"),
        (code(model_type="evil"), "contains custom code"),
        (code(model_type="evil", trust_remote_code=True), "contains custom code"),
        (tokenizer_code, "contains custom code"),
        (kernel("org/kernel", "_attn_implementation"), "requests the kernel org/kernel, which is code"),
        (kernel("org/kernel@main:f", "attn_implementation"), "requests the kernel org/kernel@main:f, which is code"),
        (kernel("org/kernel", "experts_implementation"), "requests the kernel org/kernel, which is code"),
        (adapter_beside, "has an adapter_config.json"),
        (templates, "has a chat template named '../../../evil'"),
    ],
    ids=lambda value: value.__qualname__.split(".")[0] if callable(value) else None,
)
def test_unsafe_model_is_refused(
    plant: Plant, reason: str, model_folder: Path, data_file: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy(model_folder, marker.parent / "model")
    plant(model, marker)
    assert_refused(start(model, data_file, marker.parent / "out"), capsys, reason)
    assert not marker.exists()


@pytest.mark.parametrize("plant", [pickled, code(), generation_code], ids=["pickle beside", "code", "generation"])
def test_code_beside_a_known_model_is_not_run(plant: Plant, model_folder: Path, data_file: Path, marker: Path) -> None:
    """The run ends well: transformers' own classes are used."""
    model = copy(model_folder, marker.parent / "model")
    plant(model, marker)
    assert main(start(model, data_file, marker.parent / "out")) == 0
    assert not marker.exists()


def test_code_runs_with_trust_remote_code(model_folder: Path, data_file: Path, marker: Path) -> None:
    """The flag has its effect, which proves that the artifacts above can run."""
    model = copy(model_folder, marker.parent / "model")
    code(model_type="evil")(model, marker)
    assert main(start(model, data_file, marker.parent / "out", trust_remote_code=True)) == 0
    assert marker.exists()


@pytest.fixture(scope="module")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a trained adapter."""
    folder = tmp_path_factory.mktemp("adapter")
    data = folder / "data.jsonl"
    data.write_text(json.dumps({"instruction": "Say it.", "output": "So be it."}) + "\n")
    assert main(start(model_folder, data, folder / "out")) == 0
    return folder / "out"


def adapter_pickled(folder: Path, marker: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    pickled(folder, marker, "adapter_model.bin")


def adapter_under_the_safe_name(folder: Path, marker: Path) -> None:
    pickled(folder, marker, "adapter_model.bin")
    (folder / "adapter_model.bin").replace(folder / "adapter_model.safetensors")


def header(length: int) -> Plant:
    def plant(folder: Path, marker: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")

    return plant


def narrow(folder: Path, marker: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor[..., :1].contiguous() for name, tensor in load_file(path).items()}, path)


def settings(**values: object) -> Plant:
    return lambda folder, _: edit(folder / "adapter_config.json", **values)


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (adapter_pickled, "no adapter_model.safetensors found there"),
        (adapter_under_the_safe_name, "adapter_model.safetensors cannot be read"),
        (header(2**62), "adapter_model.safetensors cannot be read"),
        (header(2**64 - 1), "adapter_model.safetensors cannot be read"),
        (header(10**8), "adapter_model.safetensors cannot be read"),
        (settings(r=10**9), "has r '1000000000'"),
        (settings(r=-1), "has r '-1'"),
        (settings(r="8"), "has r '8'"),
        (settings(lora_dropout=5), "has lora_dropout '5'"),
        (settings(init_lora_weights="os.system"), "has init_lora_weights 'os.system'"),
        (settings(megatron_config={"x": 1}, megatron_core="evil"), "has megatron_config"),  # PEFT would import it
        (settings(corda_config={"cache_file": "x.pt"}), "has corda_config"),  # PEFT would torch.load it
        (settings(lora_ga_config={}), "has lora_ga_config"),
        (settings(layer_replication=[[0, 2]] * 100_000), "has layer_replication"),
        (settings(target_modules=[1, 2]), "has target_modules"),
        (settings(target_modules="(" * 5000), "is not a regular expression"),
        (settings(modules_to_save=["../../x"]), "--modules_to_save ../../x: matches no module"),
        (settings(peft_type="IA3"), "holds a"),
        (settings(peft_type="../x"), "adapter_config.json cannot be read"),
        (lambda folder, _: (folder / "adapter_config.json").write_text("[1]") and None, "cannot be read"),
    ],
)
def test_unsafe_adapter_is_refused(
    plant: Plant,
    reason: str,
    model_folder: Path,
    adapter: Path,
    data_file: Path,
    marker: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copy(adapter, marker.parent / "adapter")
    plant(folder, marker)
    assert_refused(start(model_folder, data_file, marker.parent / "out", lora_weight_path=folder), capsys, reason)
    assert not marker.exists()


def test_adapter_of_another_shape_is_refused(
    model_folder: Path, adapter: Path, data_file: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(adapter, marker.parent / "adapter")
    expected = {name: tensor.shape for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    check_adapter_tensors(str(folder), expected)
    narrow(folder, marker)
    with pytest.raises(UserError, match=r"has the shape \(8, 1\), on this model it has \(8, 64\)"):
        check_adapter_tensors(str(folder), expected)
    with pytest.raises(UserError, match="1 tensors are not in it, such as more"):
        check_adapter_tensors(str(folder), expected | {"more": torch.Size([1])})
    arguments = start(model_folder, data_file, marker.parent / "out", lora_weight_path=folder)
    assert_refused(arguments, capsys, "shape", codes=(1, 2))


@pytest.mark.parametrize(
    "plant",
    [
        lambda folder, marker: pickled(folder, marker, "adapter_model.bin"),
        settings(auto_mapping={"base_model_class": "system", "parent_library": "os"}),
        settings(base_model_name_or_path="../../elsewhere", revision="../x", unheard_of={"x": 1}),
        settings(target_modules=r"model\.layers\.\d+\.self_attn\.[qv]_proj"),
    ],
    ids=["pickle beside", "auto_mapping", "other names", "expression"],
)
def test_training_starts_from_a_sound_adapter(
    plant: Plant, model_folder: Path, adapter: Path, data_file: Path, marker: Path
) -> None:
    folder = copy(adapter, marker.parent / "adapter")
    plant(folder, marker)
    output = marker.parent / "out"
    assert main(start(model_folder, data_file, output, lora_weight_path=folder)) == 0
    assert not marker.exists()
    saved = json.loads((output / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(model_folder) and saved["revision"] is None


@pytest.mark.parametrize("command", ["train", "chat"])
@pytest.mark.parametrize("name", ["target_modules", "rank_pattern"])
def test_slow_expression_is_refused(
    name: str,
    command: str,
    model_folder: Path,
    adapter: Path,
    data_file: Path,
    marker: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every expression is slow where the limit is a microsecond."""
    monkeypatch.setattr("fastchat_qlora.model.adapter.adapter_files.PATTERN_SECONDS", 1e-6)
    folder = copy(adapter, marker.parent / "adapter")
    settings(**{name: ".*[qv]_proj" if name == "target_modules" else {".*v_proj": 8}})(folder, marker)
    training = start(model_folder, data_file, marker.parent / "out", lora_weight_path=folder)
    chat = ["chat", str(folder), "--model_name_or_path", str(model_folder)]
    assert_refused(training if command == "train" else chat, capsys, "take more than")


def test_timer_is_restored(adapter: Path) -> None:
    config = read_lora_config(str(adapter))
    config.target_modules = r".*\.[qv]_proj"
    before = signal.getsignal(signal.SIGALRM)
    check_pattern_time(config, None)
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
