#!/usr/bin/env bash
# Trains on this machine as if it were two: two torchrun agents, with RANK 0 to 2n-1 and LOCAL_RANK 0 to n-1 twice.
#
#   launch/two_nodes_local.sh --cfg configs/demo.yaml --root build/demo/data --output /tmp/runs
#
# RANKS_PER_NODE=2  ranks of each agent; else half of the GPUs, or 1. Each agent sees its own GPUs alone, or none where
#                   there are not enough for all ranks.
set -euo pipefail

# What `make` has set up, where no other environment is active.
venv="$(dirname "$0")/../.venv/bin/activate"
# shellcheck disable=SC1090
if ! command -v torchrun >/dev/null && [ -e "$venv" ]; then . "$venv"; fi

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else restarted ranks can read the addresses of dead ones
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=${RANKS_PER_NODE:-$((gpus > 1 ? gpus / 2 : 1))}
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# With too few GPUs both agents run on the CPU: ranks of one run are all on GPUs or all on the CPU.
if ((gpus < 2 * ranks)); then CUDA_VISIBLE_DEVICES='' gpus=0; fi
IFS=, read -ra cards <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"

agents=()
for node in 0 1; do
    own=$(IFS=, && echo "${cards[*]:node * ranks:ranks}")
    CUDA_VISIBLE_DEVICES=$own torchrun --nnodes=2 --nproc-per-node="$ranks" --rdzv-backend=c10d --rdzv-id=two_nodes \
        --rdzv-endpoint="localhost:$port" --local-addr=localhost -m reid_dist.train "$@" &
    agents+=($!)
done
# A signal is passed on, and both agents are waited for, so that a run can save before it ends.
trap 'kill -TERM "${agents[@]}" 2>/dev/null' INT TERM
code=0
for agent in "${agents[@]}"; do
    wait "$agent" || code=$?
    while kill -0 "$agent" 2>/dev/null; do # a signal had ended the wait
        wait "$agent" || code=$?
    done
done
exit "$code"
