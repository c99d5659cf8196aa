"""Fine-tune a chat model with LoRA or QLoRA.

python train_lora.py --model_name_or_path M --data_path D.json --output_dir O --q_lora True --bf16 True
torchrun --nproc_per_node 2 train_lora.py --model_name_or_path M --data_path D.json --output_dir O
deepspeed train_lora.py --model_name_or_path M --data_path D.json --output_dir O \
    --deepspeed playground/deepspeed_config_s2.json
"""

import sys

from fastchat_qlora.cli import program

if __name__ == "__main__":
    program(["train", *sys.argv[1:]])
