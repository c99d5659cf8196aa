"""Every recipe parses under the launcher in its first lines, for a model of known shapes."""

import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.config.parser import parse_args

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "playground" / "recipes").glob("*.yaml"))
MODELS = ROOT / "tests" / "recipes_models"
BILLIONS = {
    "Llama-3.2-1B-Instruct": 1.236,
    "Llama-3.1-8B-Instruct": 8.030,
    "Llama-3.3-70B-Instruct": 70.554,
    "Qwen3-1.7B": 1.721,
    "Qwen3-8B": 8.191,
    "Qwen3-32B": 32.762,
}
"""Parameters, from the models' cards."""


def head(recipe: Path) -> list[str]:
    return [line.removeprefix("#").strip() for line in recipe.read_text().splitlines() if line.startswith("#")]


def launch(recipe: Path) -> list[str]:
    return next(shlex.split(line) for line in head(recipe) if "train_lora.py" in line)


def processes(words: list[str]) -> int:
    if words[0] == "deepspeed":
        return 8  # it takes all there are
    return math.prod(int(words[i + 1]) for i, word in enumerate(words) if word in ("--nnodes", "--nproc_per_node"))


@pytest.fixture(autouse=True)
def no_deepspeed_left() -> Iterator[None]:
    """Keep the ZeRO-3 configuration of a recipe away from later tests."""
    yield
    unset_hf_deepspeed_config()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_under_its_launcher(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = launch(recipe)
    assert words[-2:] == ["train_lora.py", str(recipe.relative_to(ROOT))], "the command starts this recipe"
    settings = yaml.safe_load(recipe.read_text())
    if words[0] == "torchrun":  # as the first process, without waiting for the others
        monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("cpu"))
    if words[0] != "python":
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1" if words[0] == "deepspeed" else str(processes(words)))
    assert settings["output_dir"] == f"output/{recipe.stem}"
    given = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "True"]
    args = parse_args([words[-1], *given])
    assert args.model.model_name_or_path == settings["model_name_or_path"]
    assert bool(args.training.fsdp) == ("fsdp" in recipe.stem)
    assert bool(args.training.deepspeed) == ("zero3" in recipe.stem)
    assert args.lora.q_lora == ("qlora" in recipe.stem)
    assert args.lora.lora_target_modules == ["all-linear"]
    assert args.training.learning_rate == float(settings["learning_rate"]) and args.training.bf16
    at_once = args.training.per_device_train_batch_size * args.training.gradient_accumulation_steps
    assert 16 <= at_once * processes(words) <= 32


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_names_its_gpus(recipe: Path) -> None:
    plan = [line for line in head(recipe) if line.startswith("plan:")]
    assert len(plan) == 1
    found = re.fullmatch(r"plan: --devices (\d+) --device_memory_gib ([\d.]+)", plan[0])
    assert found and int(found.group(1)) == processes(launch(recipe))
    nominal = re.search(r"(?:of|with)(?: .*?with)? (\d+) (?:or \d+ )?GB", head(recipe)[0])
    assert nominal, "the title names the GPU"
    assert 0.9 < float(found.group(2)) / int(nominal.group(1)) < 1, "which reports less than it is sold by"
    model = yaml.safe_load(recipe.read_text())["model_name_or_path"].partition("/")[2]
    assert (MODELS / model / "config.json").is_file()


@pytest.mark.parametrize("name", BILLIONS)
def test_models_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODELS / name))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(BILLIONS[name], abs=5e-4)


def test_recipes_cover_all_models_and_device_counts() -> None:
    devices = {int(re.search(r"--devices (\d+)", path.read_text()).group(1)) for path in RECIPES}
    assert devices == {1, 2, 8, 16}
    assert {*BILLIONS} == {yaml.safe_load(p.read_text())["model_name_or_path"].partition("/")[2] for p in RECIPES}
