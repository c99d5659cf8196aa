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
# HOSTFILE has a line "name slots=N" for each machine; it says how many processes there are, as PROCESSES does for
# torchrun, on this machine. MODEL, DATA and OUTPUT are as for the other scripts. OUTPUT must lie on storage that all
# machines share.
set -euo pipefail
fail() {
    echo "error: $1" >&2
    exit 2
}
case "${LAUNCHER:=torchrun}" in
    torchrun)
        [ -n "${NODES:-}" ] || fail "NODES: not set; give the number of machines"
        [ -n "${MASTER:-}" ] || fail "MASTER: not set; give the name or address of one of the machines"
        ;;
    deepspeed)
        [ -f "${HOSTFILE:-}" ] || fail "HOSTFILE '${HOSTFILE:-}': no such file; give a line 'name slots=N' for each machine"
        [ -z "${NODE_RANK:-}" ] || [ -n "${MASTER:-}" ] ||
            fail "MASTER: not set; give the name or address of the machine with NODE_RANK=0"
        HOSTFILE="$(realpath "$HOSTFILE")"
        ;;
    *) fail "LAUNCHER '$LAUNCHER': choose torchrun or deepspeed" ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/quickstart_defaults.sh"
port="${MASTER_PORT:-29500}"
strategy=()
if [ "$LAUNCHER" = torchrun ]; then
    launch=(torchrun --nnodes "$NODES" --nproc_per_node "$PROCESSES" --rdzv_backend c10d
        --rdzv_endpoint "$MASTER:$port" --rdzv_id "${RUN_ID:-fastchat-qlora}")
else
    require_deepspeed
    launch=(deepspeed --hostfile "$HOSTFILE" --master_port "$port")
    [ -z "${MASTER:-}" ] || launch+=(--master_addr "$MASTER")
    [ -z "${NODE_RANK:-}" ] || launch+=(--no_ssh --node_rank "$NODE_RANK")
    strategy=(--deepspeed playground/deepspeed_config_s2.json)
fi
"${launch[@]}" train_lora.py \
    --model_name_or_path "$MODEL" \
    --data_path "$DATA" \
    --output_dir "$OUTPUT" \
    ${strategy[@]+"${strategy[@]}"} \
    --q_lora True \
    --bf16 True \
    --num_train_epochs 1 \
    --per_device_train_batch_size 4 \
    --learning_rate 5e-4 \
    --lr_scheduler_type cosine \
    --logging_steps 5 \
    --model_max_length 2048 \
    "$@"
