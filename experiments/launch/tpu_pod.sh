#!/usr/bin/env bash
# A TPU pod slice: the same command on every host. Coordinator, processes and their numbers are found out by jax.
#
#   TPU=my-slice ZONE=us-east5-a SHARED=/mnt/shared bash experiments/launch/tpu_pod.sh
#
# The slice is made before, for a v5p-256 (128 chips) by
#   gcloud compute tpus tpu-vm create $TPU --zone=$ZONE --accelerator-type=v5p-256 --version=v2-alpha-tpuv5
# and every host has the checkout in ~/jcompress with pip install -e ".[experiments]" "jax[tpu]". Preempted, the hosts
# get SIGTERM, agree on a step, save and end; the same command goes on from there, on a slice of another size too.
set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?its zone}" "${SHARED:?a folder that all hosts see, such as a mounted bucket}"
CONFIG=${CONFIG:-experiments/configs/train_decoder.py:7b}

# JAX_COMPILATION_CACHE_DIR: a slice that starts again finds its programs. tensor stays within a host's four chips.
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  cd ~/jcompress && export JAX_COMPILATION_CACHE_DIR=$SHARED/cache &&
  python -m experiments.train --distributed --config=$CONFIG --workdir=$SHARED/decoder --data_dir=$SHARED/data \
    --config.mesh.fsdp=-1 --config.mesh.tensor=4 --config.batch_size=512"
