#!/usr/bin/env bash
# Trains on this machine: a rank for each GPU that CUDA_VISIBLE_DEVICES leaves, or one rank on the CPU.
#
#   launch/torchrun.sh --cfg configs/res50_ce_triplet.yaml --root DATA
#
# RANKS=2         so many ranks instead
# MAX_RESTARTS=3  a rank that dies is started again, from the newest checkpoint; needs --resume auto
set -euo pipefail

# What `make` has set up, where no other environment is active.
venv="$(dirname "$0")/../.venv/bin/activate"
# shellcheck disable=SC1090
if ! command -v torchrun >/dev/null && [ -e "$venv" ]; then . "$venv"; fi

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else restarted ranks can read the addresses of dead ones
ranks=${RANKS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
# The machine's own name need not resolve, as in some containers: ranks would wait for it.
exec torchrun --standalone --local-addr=localhost --nproc-per-node="$ranks" --max-restarts="${MAX_RESTARTS:-0}" \
    -m reid_dist.train "$@"
