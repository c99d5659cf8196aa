#!/usr/bin/env bash
#SBATCH --job-name=qlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
# QLoRA on several machines of a Slurm cluster: one launcher a machine, and torchrun starts a process for each GPU.
# usage: MODEL=... DATA=... OUTPUT=... sbatch scripts/train_qlora_slurm.sh [more flags]
# Submit it from the project's folder: Slurm runs a copy of this file from elsewhere.
set -euo pipefail
NODES="$SLURM_JOB_NUM_NODES"
MASTER="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one machine do not meet
RUN_ID="$SLURM_JOB_ID"
export NODES MASTER MASTER_PORT RUN_ID
# A process that fails ends the job at once, not only its own machine.
srun --kill-on-bad-exit=1 bash "$SLURM_SUBMIT_DIR/scripts/train_qlora_multinode.sh" "$@"
