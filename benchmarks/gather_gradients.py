"""Which way of taking a pair loss over several GPUs gives the right gradient?

    python benchmarks/gather_gradients.py [--ranks 2 4] [--batch 64] [--seeds 20]

Starts real gloo ranks, each with its share of a global batch and a small network under DistributedDataParallel, and
compares the parameter gradient after DDP's mean, in fp64, with that of one process on the whole batch. For every
scheme: cosine of the two gradients, ratio of their lengths, length of the difference over the true length. Mean and
standard deviation over the seeds (weights and data); takes 1 to 2 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, pstdev

import torch
import torch.distributed as td
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from reid_dist.dist import gather_rows
from reid_dist.losses import build_pairwise

INSTANCES, IMAGE_DIM, FEATURE_DIM = 4, 32, 16
LOSSES = {
    "triplet, batch hard, cosine, M 0.3": build_pairwise("triplet", 0.0, 0.3, "cosine"),
    "circle, S 48, M 0.35": build_pairwise("circle", 48.0, 0.35, "cosine"),
}
Tensor = torch.Tensor


# ---- gathers: (B, D) features of this rank -> (W * B, D) of all


def detached(feats: Tensor) -> Tensor:
    parts = [torch.empty_like(feats) for _ in range(td.get_world_size())]
    td.all_gather(parts, feats.detach())
    return torch.cat(parts)


def own_slice(feats: Tensor) -> Tensor:
    """This rank's rows carry gradient, the others' are constants."""
    parts = list(detached(feats).chunk(td.get_world_size()))
    parts[td.get_rank()] = feats
    return torch.cat(parts)


def summed_over_ranks(feats: Tensor) -> Tensor:
    """gather_rows, with the gradient of its backward divided by the number of ranks."""
    rows = gather_rows(feats)
    share = rows / td.get_world_size()
    return share + (rows - share).detach()


# ---- schemes: (loss, this rank's features, identities of the whole batch) -> what this rank calls backward on


def local_pairs(loss: Callable[..., Tensor], feats: Tensor, pids: Tensor) -> Tensor:
    mine = pids.chunk(td.get_world_size())[td.get_rank()]
    return loss(feats, mine, feats, mine, 0)


def local_anchors(gather: Callable[[Tensor], Tensor], factor: int = 1) -> Callable[..., Tensor]:
    def scheme(loss: Callable[..., Tensor], feats: Tensor, pids: Tensor) -> Tensor:
        mine = pids.chunk(td.get_world_size())[td.get_rank()]
        return factor * loss(feats, mine, gather(feats), pids, td.get_rank() * len(mine))

    return scheme


def all_anchors(gather: Callable[[Tensor], Tensor], factor: int = 1) -> Callable[..., Tensor]:
    def scheme(loss: Callable[..., Tensor], feats: Tensor, pids: Tensor) -> Tensor:
        everyone = gather(feats)
        return factor * loss(everyone, pids, everyone, pids, 0)

    return scheme


def schemes(world_size: int) -> dict[str, Callable[..., Tensor]]:
    return {
        "each rank mines its own images only": local_pairs,
        "local anchors x gathered, detached": local_anchors(detached),
        "local anchors x gathered, own-slice backward": local_anchors(own_slice),
        "local anchors x gathered, own-slice backward, loss x W": local_anchors(own_slice, world_size),
        "local anchors x gathered, summing backward / W": local_anchors(summed_over_ranks),
        "**local anchors x gathered, summing backward (reid_dist)**": local_anchors(gather_rows),
        "all anchors on every rank, own-slice backward": all_anchors(own_slice),
        "all anchors on every rank, own-slice backward, loss x W": all_anchors(own_slice, world_size),
        "all anchors on every rank, summing backward": all_anchors(gather_rows),
    }


# ---- measurement


def gradient(network: nn.Module, loss: Tensor) -> Tensor:
    network.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().clone() for p in network.parameters() if p.grad is not None])


def draw(seed: int, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """(network, images (N, 32), pids (N,)), the same on every rank: identities are noisy points around a centre."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(IMAGE_DIM, 64), nn.ReLU(), nn.Linear(64, FEATURE_DIM)).double()
    pids = torch.arange(batch) // INSTANCES
    centres = torch.randn(batch // INSTANCES, IMAGE_DIM, dtype=torch.float64)
    return network, centres[pids] + torch.randn(batch, IMAGE_DIM, dtype=torch.float64), pids


def compare(ours: Tensor, true: Tensor) -> tuple[float, float, float]:
    cosine = torch.nn.functional.cosine_similarity(ours, true, dim=0)
    return cosine.item(), (ours.norm() / true.norm()).item(), ((ours - true).norm() / true.norm()).item()


def worker(rank: int, world_size: int, batch: int, seeds: int, folder: str) -> None:
    torch.set_num_threads(1)
    td.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for seed in range(seeds):
        network, images, pids = draw(seed, batch)
        ddp = DistributedDataParallel(network)
        for loss_name, loss in LOSSES.items():
            feats = network(images)
            true = gradient(network, loss(feats, pids, feats, pids, 0))
            for name, scheme in schemes(world_size).items():
                mine = ddp(images.chunk(world_size)[rank])
                figures = compare(gradient(network, scheme(loss, mine, pids)), true)
                results.setdefault((loss_name, name), []).append(figures)
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    td.barrier()
    td.destroy_process_group()


def measure(world_size: int, batch: int, seeds: int) -> dict[tuple[str, str], list[tuple[float, float, float]]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (world_size, batch, seeds, folder), nprocs=world_size)
        return torch.load(Path(folder) / "results.pt")


def show(values: list[float], exact: float) -> str:
    """Mean and standard deviation; what is exact to rounding is shown by its largest distance from exact."""
    worst = max(abs(v - exact) for v in values)
    if worst < 1e-9:
        return f"{exact:g}" if exact else f"{worst:.0e}"
    return f"{mean(values):.3f} ± {pstdev(values):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, default=64, help="images of the global batch")
    parser.add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()
    for world_size in args.ranks:
        if args.batch % (world_size * INSTANCES):
            parser.error(f"--batch {args.batch}: expected a multiple of {world_size} ranks x {INSTANCES} instances")
    measured = {w: measure(w, args.batch, args.seeds) for w in args.ranks}
    print(
        f"torch {torch.__version__}, gloo, fp64; batch {args.batch} = {args.batch // INSTANCES} identities x "
        f"{INSTANCES} instances, whole identities on a rank; mean ± standard deviation over {args.seeds} seeds"
    )
    for loss_name in LOSSES:
        print(f"\n{loss_name}\n\n| scheme | ranks | cosine | length ratio | relative error |\n|---|---|---|---|---|")
        for name in schemes(1):
            for world_size in args.ranks:
                columns = zip(*measured[world_size][loss_name, name], strict=True)
                cells = [show(list(c), exact) for c, exact in zip(columns, (1.0, 1.0, 0.0), strict=True)]
                print(f"| {name} | {world_size} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
