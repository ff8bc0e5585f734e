"""What an exact evaluation costs above the bare matrix product of the same shapes, on this machine.

    python benchmarks/evaluation.py --size market --features random --threads 2 --repeats 3

One process. Each repeat times both, one after the other, so that what else the machine does meets both; the ratios are
medians of the paired ratios. CPU seconds (all threads) suffer less from a busy machine than wall seconds do. Random
features are the worst case: most of the gallery lies nearer than a query's farthest match. Good ones are drawn around
a centre per identity.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from reid_dist.evaluator import Features, evaluate_features
from reid_dist.ranking.positions import TILE_BYTES

# Queries, gallery rows, identities, cameras, of which gallery rows without an identity of the queries'.
SIZES = {
    "small": (500, 2_500, 120, 6, 400),
    "market": (3_368, 15_913, 750, 6, 2_798),  # 2,798 background images of pid 0, as in Market-1501
    "msmt": (11_659, 82_161, 3_060, 15, 0),
}
WIDTH = 2_048
# Spread of an identity's features beside a spread of 1 of the centres; gives an mAP of about 0.9.
NOISE = 2.6


def draw(size: str, kind: str) -> tuple[Features, Features]:
    """Query and gallery in the protocol's proportions; labels uniform, features normal, float32."""
    num_query, num_gallery, num_pids, num_camids, num_background = SIZES[size]
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_pids + 1, WIDTH, generator=generator)
    sides = []
    for num, background in ((num_query, 0), (num_gallery, num_background)):
        pids = torch.from_numpy(rng.integers(1, num_pids + 1, num))
        pids[torch.from_numpy(rng.permutation(num)[:background])] = 0
        feats = torch.randn(num, WIDTH, generator=generator)
        if kind == "good":
            for rows in range(0, num, 4096):
                here = slice(rows, rows + 4096)
                feats[here].mul_(NOISE).add_(centres[pids[here]])
        sides.append(Features(feats, pids, torch.from_numpy(rng.integers(0, num_camids, num)), torch.arange(num)))
    return sides[0], sides[1]


def bare_product(query: Features, gallery: Features) -> None:
    """The matrix product alone, in the tiles that the evaluator takes."""
    chunk = max(1, TILE_BYTES // (len(gallery.feats) * 4))
    tile = torch.empty(min(chunk, len(query.feats)), len(gallery.feats))
    for feats in query.feats.split(chunk):
        torch.mm(feats, gallery.feats.T, out=tile[: len(feats)])


def seconds(call: Callable[..., object], *args: object) -> tuple[float, float]:
    """(wall, CPU) seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call(*args)
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):8.3f}  ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SIZES, default="market")
    p.add_argument("--features", choices=("random", "good"), default=None, help="default: both, each in a process")
    p.add_argument("--metric", choices=("cosine", "euclidean"), default="cosine")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--repeats", type=int, default=3)
    args = p.parse_args()
    if args.features is None:
        # A process each: the peak memory that the system reports never falls again.
        for kind in ("random", "good"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--features", kind], check=True)
        return

    torch.set_num_threads(args.threads)
    query, gallery = draw(args.size, args.features)
    bare_product(query, gallery)
    before = peak_mib()
    result = evaluate_features(query, gallery, args.metric)
    extra = peak_mib() - before
    pairs = []
    for _ in range(args.repeats):
        pairs.append((seconds(bare_product, query, gallery), seconds(evaluate_features, query, gallery, args.metric)))
    print(
        f"size {args.size} ({len(query.feats)} x {len(gallery.feats)} x {WIDTH}), features {args.features}, "
        f"{args.metric}, float32, mAP {result.mAP:.3f}, rank1 {result.rank1:.3f}\n"
        f"torch {torch.__version__}, numpy {np.__version__}, {platform.machine()}, {args.threads} threads, "
        f"n = {args.repeats}; median (smallest to largest)"
    )
    for clock, name in enumerate(("wall", "CPU")):
        bare, whole = ([pair[side][clock] for pair in pairs] for side in (0, 1))
        print(f"  bare matrix product, {name:4} s {spread(bare)}")
        print(f"  evaluate_features,   {name:4} s {spread(whole)}")
        print(f"  ratio,               {name:4}   {spread([b / a for a, b in zip(bare, whole, strict=True)])}")
    print(f"  extra peak memory, MiB {extra:10.0f}  (over the features and one tile, which the product had too)\n")


if __name__ == "__main__":
    main()
