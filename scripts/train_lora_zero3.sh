#!/usr/bin/env bash
# LoRA with the base model's weights spread over the GPUs of this machine (DeepSpeed ZeRO-3).
# usage: MODEL=... DATA=... OUTPUT=... PROCESSES=... bash scripts/train_lora_zero3.sh [more flags]
source "$(dirname "${BASH_SOURCE[0]}")/quickstart_defaults.sh"
require_deepspeed
deepspeed --num_accelerators "$PROCESSES" train_lora.py \
    --model_name_or_path "$MODEL" \
    --data_path "$DATA" \
    --output_dir "$OUTPUT" \
    --deepspeed playground/deepspeed_config_s3.json \
    --bf16 True \
    --num_train_epochs 1 \
    --per_device_train_batch_size 4 \
    --learning_rate 5e-4 \
    --lr_scheduler_type cosine \
    --logging_steps 5 \
    --model_max_length 2048 \
    "$@"
