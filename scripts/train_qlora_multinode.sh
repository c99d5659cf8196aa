#!/usr/bin/env bash
# QLoRA on several machines.
#
# torchrun, started on every machine with the same command (the first machine of the rendezvous is MASTER):
#     NODES=2 MASTER=10.0.0.1 bash scripts/train_qlora_multinode.sh [more flags]
# deepspeed, started on every machine, which needs no ssh between them:
#     LAUNCHER=deepspeed HOSTFILE=hosts NODE_RANK=0 MASTER=10.0.0.1 bash scripts/train_qlora_multinode.sh [more flags]
# deepspeed, started on one machine only, which starts the others over ssh:
#     LAUNCHER=deepspeed HOSTFILE=hosts bash scripts/train_qlora_multinode.sh [more flags]
#
# HOSTFILE has a line "name slots=N" for each machine. MODEL, DATA and OUTPUT are as for the other scripts and PROCESSES
# is the number of processes on this machine. OUTPUT must lie on storage that all machines share.
if [ "${LAUNCHER:=torchrun}" = torchrun ]; then
    : "${NODES:?how many machines there are}" "${MASTER:?name or address of one of them}"
elif [ -z "${HOSTFILE:-}" ]; then
    echo "HOSTFILE: name the file with a line 'name slots=N' for each machine" >&2
    exit 2
else
    HOSTFILE="$(realpath "$HOSTFILE")"
fi
source "$(dirname "${BASH_SOURCE[0]}")/quickstart_defaults.sh"
port="${MASTER_PORT:-29500}"
if [ "$LAUNCHER" = torchrun ]; then
    launch=(torchrun --nnodes "$NODES" --nproc_per_node "$PROCESSES" --rdzv_backend c10d
        --rdzv_endpoint "$MASTER:$port" --rdzv_id "${RUN_ID:-fastchat-qlora}")
    strategy=()
else
    launch=(deepspeed --hostfile "$HOSTFILE" --master_port "$port")
    [ -z "${MASTER:-}" ] || launch+=(--master_addr "$MASTER")
    [ -z "${NODE_RANK:-}" ] || launch+=(--no_ssh --node_rank "$NODE_RANK")
    strategy=(--deepspeed playground/deepspeed_config_s2.json)
fi
"${launch[@]}" train_lora.py \
    --model_name_or_path "$MODEL" \
    --data_path "$DATA" \
    --output_dir "$OUTPUT" \
    "${strategy[@]}" \
    --q_lora True \
    --bf16 True \
    --num_train_epochs 1 \
    --per_device_train_batch_size 4 \
    --learning_rate 5e-4 \
    --lr_scheduler_type cosine \
    --logging_steps 5 \
    --model_max_length 2048 \
    "$@"
