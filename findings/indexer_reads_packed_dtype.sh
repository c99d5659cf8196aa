#!/usr/bin/env bash
# Library   transformers 5.23.0 (Dots3Note, also HYV4) with bitsandbytes 0.50.2 in 4 bits
# Expected  The indexer of sparse attention weighs its heads by a product with the hidden states, whatever the storage
#           of its weight.
# Actual    It casts the hidden states to the dtype of `weights_proj.weight`. In 4 bits that is uint8, the dtype of the
#           packed bytes: fractions are cut off, most inputs become 0 and negative ones wrap around, with no message.
#           DeepSeek-V3.2 has the same cast and keeps that layer out of quantization by `_keep_in_fp32_modules`.
# Affected  QLoRA and 4-bit inference of these models: keys are selected by other weights than the model has.
# Remedy    Name the layer in `llm_int8_skip_modules`.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -I -m pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 bitsandbytes==0.50.2 accelerate==1.15.0
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HOME="$folder/cache" HF_HUB_OFFLINE=1
cd "$folder"

venv/bin/python -I - <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import torch
import transformers
from transformers import BitsAndBytesConfig, DeepseekV32Config, DeepseekV32ForCausalLM
from transformers import Dots3NoteForCausalLM, Dots3NoteTextConfig

warnings.simplefilter("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
SIZES = {
    "vocab_size": 512, "pad_token_id": 0, "eos_token_id": 2, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 64, "kv_lora_rank": 64,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "index_n_heads": 32, "index_head_dim": 16,
    "index_topk": 16, "layer_types": ["indexed_attention"] * 2, "mlp_layer_types": ["dense", "sparse"],
}


@torch.no_grad()
def describe_input(model_class, config, skipped=None):
    """Return the dtype of the indexer's input, and how many percent of it are 0."""
    torch.manual_seed(0)
    model_class(config).save_pretrained(model_class.__name__)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    model = model_class.from_pretrained(model_class.__name__, dtype=torch.bfloat16, quantization_config=bits)
    seen = []
    layer = next(module for name, module in model.named_modules() if name.endswith("weights_proj"))
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(input_ids=torch.arange(40)[None])
    return str(seen[0].dtype).removeprefix("torch."), round(100 * float((seen[0] == 0).float().mean()))


print("transformers", version("transformers"), "and bitsandbytes", version("bitsandbytes"))
dots = Dots3NoteForCausalLM, Dots3NoteTextConfig(**SIZES)
found = {
    "Dots3Note": describe_input(*dots),
    "Dots3Note, the layer skipped": describe_input(*dots, skipped=["weights_proj", "lm_head"]),
    "DeepSeek-V3.2": describe_input(DeepseekV32ForCausalLM, DeepseekV32Config(**SIZES)),
}
for name, (dtype, zeros) in found.items():
    print(f"{name}: the indexer's input is in {dtype}, {zeros} % of it are 0")
others = [dtype for name, (dtype, _) in found.items() if name != "Dots3Note"]
if found["Dots3Note"][0] != "uint8" or found["Dots3Note"][1] < 50 or "uint8" in others:
    sys.exit("The behavior is not the one described any more.")
print("As described: the input of a packed layer is cast to the dtype of its bytes.")
PYTHON
