"""Every recipe fits the GPUs that it names, by `plan` and the shapes of its model.

Each conversation of the data has --model_max_length tokens.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from plan_check import write_data

from fastchat_qlora import cli

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "playground" / "recipes").glob("*.yaml"))
CORE = {
    *("llama-3.1-8b-lora-8gpu-ddp", "llama-3.1-8b-lora-2gpu-fsdp"),
    *("llama-3.3-70b-qlora-8gpu-zero3", "qwen3-8b-lora-1gpu"),
}
"""Recipes of every CI run, one for each strategy; `pytest -m models` runs the rest."""


def test_recipes_of_ci_exist() -> None:
    assert {path.stem for path in RECIPES} > CORE


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(path, marks=[] if path.stem in CORE else pytest.mark.models, id=path.stem) for path in RECIPES],
)
def test_recipe_fits_its_gpus(
    recipe: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    text = recipe.read_text(encoding="utf-8")
    name = yaml.safe_load(text)["model_name_or_path"].rpartition("/")[2]
    model = tmp_path / name
    shutil.copytree(tokenizer_folder, model)
    shutil.copy(ROOT / "tests" / "recipes_models" / name / "config.json", model)
    found = re.search(r"^# plan: (.*)$", text, re.MULTILINE)
    assert found, "the recipe names its GPUs"
    output = tmp_path / "plan.json"
    write_data(data := tmp_path / "long.json")
    shared = f"--model_name_or_path {model} --data_path {data} --output_dir {tmp_path / 'out'} --output {output}"
    flags = f"{shared} --eval_split 0 {found[1]}"
    assert cli.main(["plan", str(recipe), *shlex.split(flags)]) == 0, capsys.readouterr().err
    planned = json.loads(output.read_text())
    assert planned["fits"] is True, capsys.readouterr().out
    asked = planned["given"]["name"], planned["given"]["devices"]
    named = {"fsdp": "FSDP2", "zero3": "ZeRO-3", "ddp": "DDP", "1gpu": "one process"}
    assert asked[0] == named[recipe.stem.rpartition("-")[2]]
    billions = float(re.search(r"([\d.]+)B", name, re.IGNORECASE)[1])  # type: ignore[index]
    assert planned["base"] == pytest.approx(billions * 1e9, rel=0.25), "the shapes are those of the model"
