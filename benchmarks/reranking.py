"""Seconds and memory of k-reciprocal re-ranking and of query expansion over one process, on this machine.

    python benchmarks/reranking.py --size market --threads 2

Features as benchmarks/evaluation.py draws the good ones. The usual code for re-ranking holds matrices of
(queries + gallery)^2 floats, of which the table says the size of one.
"""

from __future__ import annotations

import argparse
import platform
import time

import numpy as np
import torch
from evaluation import SIZES, WIDTH, draw, peak_mib

from reid_dist.evaluator import evaluate_features
from reid_dist.ranking.expansion import evaluate_expanded
from reid_dist.ranking.rerank import evaluate_reranked


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SIZES, default="market")
    p.add_argument("--metric", choices=("cosine", "euclidean"), default="cosine")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--repeats", type=int, default=3)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    query, gallery = draw(args.size, "good")
    num = len(query.feats) + len(gallery.feats)
    print(
        f"size {args.size} ({len(query.feats)} + {len(gallery.feats)} rows of {WIDTH} float32), {args.metric}; "
        f"torch {torch.__version__}, numpy {np.__version__}, {platform.machine()}, {args.threads} threads, "
        f"n = {args.repeats}; median (smallest to largest)\n"
        f"features and what was loaded before: {peak_mib():,.0f} MiB; one dense matrix: {num**2 * 4 / 2**20:,.0f} MiB\n"
        f"{'':22}{'mAP':>8}{'rank1':>8}{'wall s':>26}{'CPU s':>26}{'peak MiB of the process':>26}"
    )
    # Rising needs: the peak that the system reports never falls again.
    for name, call in (
        ("evaluate_features", evaluate_features),
        ("evaluate_expanded", evaluate_expanded),
        ("evaluate_reranked", evaluate_reranked),
    ):
        times = []
        for _ in range(args.repeats):
            wall, cpu = time.perf_counter(), time.process_time()
            result = call(query, gallery, args.metric)
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
        columns = [f"{np.median(t):.1f} ({min(t):.1f} to {max(t):.1f})" for t in zip(*times, strict=True)]
        print(
            f"{name:22}{result.mAP:8.3f}{result.rank1:8.3f}{columns[0]:>26}{columns[1]:>26}{peak_mib():26,.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
