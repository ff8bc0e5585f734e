"""The evaluator on several ranks of this machine against one rank: the same numbers, seconds, memory.

    python benchmarks/evaluation_ranks.py --size msmt17 --out one.npz
    torchrun --standalone --nproc_per_node=4 benchmarks/evaluation_ranks.py --size msmt17 --compare one.npz

Features as benchmarks/evaluation.py draws the good ones; every rank draws all of them and keeps its share.
"""

from __future__ import annotations

import argparse
import resource
import sys

import numpy as np
import torch
from evaluation import SIZES, WIDTH, draw

from reid_dist import dist
from reid_dist.evaluator import evaluate_features, shard

COMPARED = ("ap", "inp", "cmc")


def main(world: dist.World, argv: list[str]) -> None:  # all ranks
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SIZES, default="market")
    p.add_argument("--out", help="write the numbers of every query here")
    p.add_argument("--compare", help="a file of --out")
    args = p.parse_args(argv)
    rows = []
    for side in draw(args.size, "good"):
        share = shard(len(side.feats), world.rank, world.world_size)
        rows.append(side.take(torch.arange(share.start, share.stop)))
    del side
    result = evaluate_features(*rows)
    peaks = dist.gather_objects(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    if not world.is_main:
        return
    numbers = {name: getattr(result, name) for name in COMPARED}
    print(
        f"{args.size} ({result.num_query} x {result.num_gallery} x {WIDTH}), {world.world_size} ranks of "
        f"{torch.get_num_threads()} threads: mAP {result.mAP:.9f}, rank1 {result.rank1:.9f}, {result.seconds:.1f} s, "
        f"peak of a rank {max(peaks):,.0f} MiB, with all features while they are drawn"
    )
    if args.out:
        np.savez(args.out, **numbers)
    if args.compare:
        with np.load(args.compare) as other:
            worst = {name: float(np.nanmax(np.abs(numbers[name] - other[name]))) for name in COMPARED}
            mean = abs(float(np.nanmean(other["ap"])) - result.mAP)
        print(f"greatest differences of a query {worst}; of the mAP {mean:.1e}")


if __name__ == "__main__":
    dist.run_main(lambda world: main(world, sys.argv[1:]))
