#!/usr/bin/env bash
# GPU nodes under SLURM: a process for each GPU. Coordinator, processes and their numbers are found out by jax.
#
#   sbatch --nodes=4 --gpus-per-node=8 experiments/launch/slurm.sh
#
# Before the limit of time SLURM sends SIGTERM to all processes: they agree on a step, save and end, and the job goes
# back to the queue, from where the same command goes on, on another number of nodes too.
#SBATCH --job-name=decoder
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
CONFIG=${CONFIG:-experiments/configs/train_decoder.py:7b}
export JAX_COMPILATION_CACHE_DIR=${SHARED:-$PWD/runs}/cache
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"

# tensor=8: products are split within a node, where links are fast; fsdp takes the nodes.
srun --kill-on-bad-exit=0 python -m experiments.train --distributed --config="$CONFIG" \
  --workdir="${SHARED:-$PWD/runs}/decoder" --data_dir="${SHARED:-$PWD}/data" \
  --config.mesh.fsdp=-1 --config.mesh.tensor=8 --config.batch_size=256
code=$?
# 143: stopped by SIGTERM, all saved.
[ "$code" -eq 143 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
