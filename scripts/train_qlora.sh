#!/usr/bin/env bash
# QLoRA in one process: the base model in 4 bits (NF4 with double quantization).
# usage: MODEL=... DATA=... OUTPUT=... bash scripts/train_qlora.sh [more flags]
source "$(dirname "${BASH_SOURCE[0]}")/quickstart_defaults.sh"
python train_lora.py \
    --model_name_or_path "$MODEL" \
    --data_path "$DATA" \
    --output_dir "$OUTPUT" \
    --q_lora True \
    --bf16 True \
    --num_train_epochs 1 \
    --per_device_train_batch_size 8 \
    --learning_rate 5e-4 \
    --lr_scheduler_type cosine \
    --logging_steps 5 \
    --model_max_length 2048 \
    "$@"
