#!/usr/bin/env bash
# Library   peft 0.21.2 with transformers 5.23.0
# Expected  target_modules as a regular expression adapts the modules whose whole names match it: of one layer, say.
# Actual    On a mixture of experts (such as Qwen3-MoE, whose experts are fused) PEFT turns the expression into
#           the last parts of the names that match, and so adapts these modules in every layer. On a dense model the
#           expression keeps its meaning. Nothing is logged.
# Affected  Everybody who chooses layers of a mixture by a regular expression: more parameters are trained and saved.
# Remedy    Give full names as a list (model.layers.1.self_attn.q_proj, ...), and count the trained parameters.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -I -m pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
cd "$folder"

venv/bin/python -I - <<'PYTHON'
import sys
from importlib.metadata import version

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 64, "head_dim": 16}
PATTERN = r".*\.1\.self_attn\.q_proj"
FULL_NAME = ["model.layers.1.self_attn.q_proj"]


def adapted_layers(config, targets):
    """Return the numbers of the layers with an adapter."""
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules=targets))
    names = [name for name, _ in model.named_parameters() if "lora_A" in name]
    layers = sorted(int(name.partition("layers.")[2].partition(".")[0]) for name in names)
    print(f"{config.model_type}, {targets!r}: layers {layers}")
    return layers


print("peft", version("peft"), "and transformers", version("transformers"))
dense, mixture = Qwen3Config(**SHAPE), Qwen3MoeConfig(**SHAPE, num_experts=4, moe_intermediate_size=32)
controls = [adapted_layers(dense, PATTERN), adapted_layers(dense, FULL_NAME), adapted_layers(mixture, FULL_NAME)]
if controls != [[1]] * 3 or adapted_layers(mixture, PATTERN) != [0, 1]:
    sys.exit("The behavior is not the one described any more.")
print("As described: on the mixture the expression for layer 1 adapts layer 0 too.")
PYTHON
