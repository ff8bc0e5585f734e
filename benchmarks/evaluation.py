"""What an exact evaluation costs beside the bare matrix product of the same tiles, and beside other ways to do it.

    python benchmarks/evaluation.py --size market
    python benchmarks/evaluation.py --size msmt17

One process for random and one for good features. Random ones are the worst case: most of the gallery lies nearer than
a query's farthest match; good ones are drawn around a centre per identity. Each repeat times the product and the
evaluation one after the other, so that what else the machine does meets both; ratios are medians of the paired ratios.
CPU seconds (all threads) suffer less from a busy machine than wall seconds do.

Features lie on `--device`, the GPU if there is one: product and evaluation run there, each from nothing queued to
nothing queued, and the extra memory is that of the GPU. The slow ways always run on the CPU, on a copy.

The slow ways rank evenly chosen queries, --sample of them; that time is scaled up to all queries and the product's is
added. "argsort" is what Simple-ReID does: the matrix, numpy's argsort of its rows, loops over the hits. No well-kept
library knows the camera rule; "scikit-learn" is average_precision_score, the step rule too, of every query after its
junk is taken out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from devices import add_device_flag, choose_device, describe, synchronize

from reid_dist.evaluator import Features, evaluate_features
from reid_dist.ranking.positions import TILE_BYTES
from reid_dist.ranking.tiles import multiply

# Queries, gallery rows, identities, cameras, of which gallery rows without an identity of the queries'.
SIZES = {
    "small": (500, 2_500, 120, 6, 400),
    "market": (3_368, 15_913, 750, 6, 2_798),  # 2,798 background images of pid 0, as in Market-1501
    "msmt17": (11_659, 82_161, 3_060, 15, 0),
}
REPEATS = {"small": 5, "market": 3, "msmt17": 1}
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
    """The matrix product alone, in the tiles that the evaluator takes and by the same library."""
    in_tiles(query, gallery, multiply)


def torch_product(query: Features, gallery: Features) -> None:
    in_tiles(query, gallery, lambda a, b, out: torch.mm(a, b.T, out=out))


def in_tiles(query: Features, gallery: Features, product: Callable[..., object]) -> None:
    chunk = max(1, TILE_BYTES // (len(gallery.feats) * 4))
    parts = query.feats.tensor_split(-(-len(query.feats) // chunk))
    tile = torch.empty(len(parts[0]), len(gallery.feats), device=gallery.feats.device)
    for feats in parts:
        product(feats, gallery.feats, tile[: len(feats)])


def moved(rows: Features, device: torch.device) -> Features:
    return Features(*(t.to(device) for t in (rows.feats, rows.pids, rows.camids, rows.indices)))


def sample_of(query: Features, num: int) -> Features:
    rows = torch.linspace(0, len(query.feats) - 1, num).long().unique()
    return Features(query.feats[rows], query.pids[rows], query.camids[rows], torch.arange(len(rows)))


def cosine_distances(query: Features, gallery: Features) -> np.ndarray:
    sides = [torch.nn.functional.normalize(side.feats) for side in (query, gallery)]
    return -(sides[0] @ sides[1].T).numpy()


def with_argsort(distances: np.ndarray, query: Features, gallery: Features) -> float:
    """mAP as the original computes it."""
    aps = []
    pids, camids = gallery.pids.numpy(), gallery.camids.numpy()
    order = np.argsort(distances, axis=1)
    for line, pid, camid in zip(order, query.pids.numpy(), query.camids.numpy(), strict=True):
        match = pids[line] == pid
        match = match[~(match & (camids[line] == camid))]
        hits = np.flatnonzero(match)
        if len(hits):
            aps.append(np.mean(np.arange(1, len(hits) + 1) / (hits + 1)))
    return float(np.mean(aps))


def with_sklearn(distances: np.ndarray, query: Features, gallery: Features) -> float:
    from sklearn.metrics import average_precision_score

    aps = []
    pids, camids = gallery.pids.numpy(), gallery.camids.numpy()
    for line, pid, camid in zip(distances, query.pids.numpy(), query.camids.numpy(), strict=True):
        match = pids == pid
        valid = ~(match & (camids == camid))
        if match[valid].any():
            aps.append(average_precision_score(match[valid], -line[valid]))
    return float(np.mean(aps))


def seconds(device: torch.device, call: Callable[..., object], *args: object) -> tuple[float, float]:
    """(wall, CPU) seconds of one call, with nothing queued on the device before and after."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    call(*args)
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_mib(device: torch.device) -> float:
    """The most memory so far: of the GPU's, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):8.3f}  ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SIZES, default="market")
    p.add_argument("--features", choices=("random", "good"), default=None, help="default: both, each in a process")
    p.add_argument("--metric", choices=("cosine", "euclidean"), default="cosine")
    p.add_argument("--threads", type=int, default=2)
    add_device_flag(p)
    p.add_argument(
        "--repeats", type=int, default=None, help="default: " + ", ".join(f"{k} {v}" for k, v in REPEATS.items())
    )
    p.add_argument("--sample", type=int, default=100, help="queries that the slow ways are run on; 0: leave them out")
    args = p.parse_args()
    if args.features is None:
        # A process each: the peak memory that the system reports never falls again.
        for kind in ("random", "good"):
            environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "OPENBLAS_NUM_THREADS": str(args.threads)}
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--features", kind], check=True, env=environment)
        return

    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    repeats = args.repeats or REPEATS[args.size]
    evaluate_features(*(moved(side, device) for side in draw("small", "good")))  # imports, threads and kernels
    query, gallery = (moved(side, device) for side in draw(args.size, args.features))
    pairs, extra, found = [], 0.0, []
    for _ in range(repeats):
        bare, before = seconds(device, bare_product, query, gallery), peak_mib(device)
        whole = seconds(device, lambda: found.append(evaluate_features(query, gallery, args.metric)))
        pairs.append((bare, whole))
        extra = extra or peak_mib(device) - before
    result = found[0]
    print(
        f"size {args.size} ({len(query.feats)} x {len(gallery.feats)} x {WIDTH}), features {args.features}, "
        f"{args.metric}, float32, mAP {result.mAP:.3f}, rank1 {result.rank1:.3f}\n"
        f"{describe(device)}, torch {torch.__version__}, numpy {np.__version__}, {platform.machine()}, "
        f"{args.threads} threads, "
        f"n = {repeats}; median (smallest to largest)"
    )
    for clock, name in enumerate(("wall", "CPU")):
        bare, whole = ([pair[side][clock] for pair in pairs] for side in (0, 1))
        print(f"  bare matrix product, {name:4} s {spread(bare)}")
        print(f"  evaluate_features,   {name:4} s {spread(whole)}")
        print(f"  ratio,               {name:4}   {spread([b / a for a, b in zip(bare, whole, strict=True)])}")
    print(f"  extra peak memory, MiB {extra:10.0f}  (over the features and one tile, which the product had too)")
    floor = [statistics.median(bare[clock] for bare, _ in pairs) for clock in (0, 1)]
    rows = [("product by torch.mm", seconds(device, torch_product, query, gallery), "")]
    query, gallery = (moved(side, torch.device("cpu")) for side in (query, gallery))
    part = sample_of(query, args.sample)
    distances = cosine_distances(part, gallery)
    for name, call in (("argsort", with_argsort), ("scikit-learn", with_sklearn)):
        if not args.sample or (call is with_sklearn and importlib.util.find_spec("sklearn") is None):
            continue
        call(distances[:2], part.take(torch.arange(2)), gallery)  # imports
        scale = len(query.feats) / len(part.feats)
        times = [f + scale * t for f, t in zip(floor, seconds(device, call, distances, part, gallery), strict=True)]
        rows.append((name, tuple(times), f", from {len(part.feats)} queries"))
    for name, (wall, cpu), note in rows:
        ratios = f"{wall / floor[0]:.2f} and {cpu / floor[1]:.2f} times the bare product"
        print(f"  {name}: {wall:.1f} s wall, {cpu:.1f} s CPU; {ratios} (n = 1{note})")
    print(flush=True)


if __name__ == "__main__":
    main()
