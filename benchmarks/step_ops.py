"""How many operations one training step dispatches, part by part, against the bare network. No GPU needed.

    python benchmarks/step_ops.py                  # ResNet-50 in bf16: the table of docs/performance.md
    python benchmarks/step_ops.py --precision fp32 --pair-loss contrastive --details

A GPU step of small kernels is limited by the host, which needs some microseconds for each operation whatever the batch.
The number of operations depends neither on the machine nor on the number or size of the images: it is counted on the
CPU, in eager mode, by what reaches PyTorch's dispatcher. Views and allocations are not counted, since neither launches
a kernel.

bare network: torchvision's ResNet-50 with cross entropy and fused Adam. The other columns are the trainer's step
(`train_step`, and the finishing of its uint8 images) with one batch norm group, with two groups of half the batch, and
with one group that two ranks share, where each collective counts as one operation. Times are those of a step on this
CPU with images of 32x16 pixels, the median of --repeats, kernels included, so only their shares mean something.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from reid_dist import dist
from reid_dist.build import build_network
from reid_dist.config import defaults
from reid_dist.data.augment import Augment
from reid_dist.data.finish import finish
from reid_dist.data.plan import EpochPlan
from reid_dist.optim import build_optimizer, parameter_groups
from reid_dist.step import AUTOCAST, build_objective, network_of, train_step

PARTS = ("finishing", "network", "batch norm", "gather", "losses", "update", "running statistics")
# Operations that start no kernel.
FREE = frozenset(
    "alias as_strided detach diagonal expand lift_fresh narrow permute select slice split split_with_sizes squeeze t "
    "transpose unbind unfold unsqueeze view _unsafe_view _reshape_alias empty empty_like empty_strided new_empty "
    "new_empty_strided is_pinned".split()
)
NUM_PIDS = 751

Step = Callable[[], Any]


class Counting(TorchDispatchMode):
    """Counts operations by part of the step.

    network: the module whose forward and backward are the part `network`; its output's autograd graph tells which
    backward operations belong to it, since no Python frame does.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.ops: dict[str, Counter[str]] = {part: Counter() for part in PARTS}
        self.seconds: Counter[str] = Counter()  # up to the end of each operation, from the end of the one before
        self._ended = time.perf_counter()
        self._nodes: set[Any] = set()
        network.register_forward_hook(lambda module, inputs, output: self._note_nodes(output))

    def _note_nodes(self, output: Any) -> None:
        todo = [t.grad_fn for t in (output if isinstance(output, tuple) else (output,)) if t is not None]
        while todo:
            node = todo.pop()
            if node is not None and node not in self._nodes:
                self._nodes.add(node)
                todo += [following for following, _ in node.next_functions]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seconds = time.perf_counter() - self._ended
        name, part = func.overloadpacket.__name__, self._part()
        if name not in FREE:
            self.ops[part][name] += 1
        begin = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self._ended = time.perf_counter()
        self.seconds[part] += seconds + self._ended - begin
        return result

    def _part(self) -> str:
        frame: Any = sys._getframe(2)
        while frame is not None:
            part = part_of_code(frame.f_code.co_filename, frame.f_code.co_name)
            if part == "backward":
                node = torch._C._current_autograd_node()
                if node not in self._nodes:
                    return "losses"
                return "batch norm" if "BatchNorm" in node.name() else "network"
            if part:
                return part
            frame = frame.f_back
        return "losses"


def part_of_code(filename: str, function: str) -> str:
    """The part that a frame of this function belongs to; 'backward' for autograd's engine; '' where it does not say."""
    file = Path(filename)
    if "running_stats" in function:
        return "running statistics"
    if function == "_engine_run_backward":
        return "backward"
    if function in ("gather_rows", "non_finite", "step_unless"):
        return "gather" if function == "gather_rows" else "update"
    if file.name in ("batch_norm.py", "batchnorm.py"):
        return "batch norm"
    if file.name in ("finish.py", "photometric.py", "transfer.py"):
        return "finishing"
    if file.parent.name in ("losses", "optim"):
        return {"losses": "losses", "optim": "update"}[file.parent.name]
    if file.parent.name == "models" or "torchvision" in file.parts:
        return "network"
    return ""


def bare_step(model: str, batch: int, height: int, width: int, autocast: torch.dtype | None) -> tuple[Step, Any]:
    """(a training step of the plain network with its own classifier, the network)."""
    import torchvision

    network = getattr(torchvision.models, model)(weights=None, num_classes=NUM_PIDS)
    network = network.to(memory_format=torch.channels_last)
    params = list(network.parameters())
    optimizer = torch.optim.Adam(params, fused=True)
    images = torch.randn(batch, 3, height, width).contiguous(memory_format=torch.channels_last)
    pids = torch.arange(batch) // 4

    def step() -> None:
        for p in params:
            p.grad = None
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            logits = network(images)
        F.cross_entropy(logits.float(), pids).backward()
        optimizer.step()

    return step, network


def trainer_step(cfg: Any) -> tuple[Step, Any]:
    """(finishing and `train_step` on one rank as train.py builds them, the network)."""
    world = dist.World(0, 0, 1, torch.device("cpu"))
    model = build_network(cfg, NUM_PIDS, world)
    objective = build_objective(cfg, NUM_PIDS, world)
    groups = parameter_groups(model, cfg.TRAIN.OPTIMIZER.BACKBONE_FACTOR)
    optimizer = build_optimizer(groups, "adam", cfg.TRAIN.OPTIMIZER.LR, cfg.TRAIN.OPTIMIZER.WEIGHT_DECAY)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch, height, width = cfg.DATA.TRAIN_BATCH, cfg.DATA.HEIGHT, cfg.DATA.WIDTH
    pids = torch.arange(NUM_PIDS).repeat_interleave(4)
    plan = EpochPlan(
        pids.numpy(),
        batch=batch,
        num_instances=4,
        sampler="chunk",
        seed=0,
        height=height,
        width=width,
        augment=Augment(),
        camids=(pids * 0).numpy(),
    )
    augmentation = plan.step(1, 0, 0, 1).augmentation
    raw = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8)
    labels = torch.from_numpy(plan.global_pids(1, 0))
    net = network_of(model, objective)

    def step() -> None:
        images = finish(raw, augmentation, torch.float32)
        train_step(net, objective, optimizer, scaler, images, labels)

    return step, model


def config(args: argparse.Namespace, group: int, batch: int, size: tuple[int, int]) -> Any:
    cfg = defaults()
    pairs = {"DATA.TRAIN_BATCH": batch, "DATA.HEIGHT": size[0], "DATA.WIDTH": size[1], "MODEL.BN_GROUP": group}
    pairs |= {"TRAIN.PRECISION": args.precision, "LOSS.CLA_LOSS": args.cla_loss, "LOSS.PAIR_LOSS": args.pair_loss}
    cfg.merge_from_list([part for pair in pairs.items() for part in pair])
    return cfg


def two_ranks_in_one() -> Any:
    """Replaces a batch norm group's collectives by doubling this rank's share, one operation each."""
    return mock.patch.multiple(
        dist,
        consecutive_ranks=lambda size: None,
        group_gather=lambda tensor, group: torch.stack([tensor, tensor]),
        group_sum=lambda tensor, group: tensor.mul_(2),
    )


def count(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """{column: {'ops': {part: {operation: count}}, 'total': count, 'seconds': {part: seconds per step}}}."""
    autocast = AUTOCAST.get(args.precision)
    batch, tiny = args.batch, (32, 16)

    def ours(group: int) -> Callable[[tuple[int, int]], tuple[Step, Any]]:
        return lambda size: trainer_step(config(args, group, batch, size))

    columns: dict[str, Callable[[tuple[int, int]], tuple[Step, Any]]] = {
        "bare network": lambda size: bare_step(args.model, batch, *size, autocast),
        "1 group": ours(batch),
        "2 groups": ours(batch // 2),
        "spans 2 ranks": ours(2 * batch),
    }
    results = {}
    for name, build in columns.items():
        with two_ranks_in_one() if name.startswith("spans") else mock.MagicMock():
            step, network = build(tiny)
            step()  # the optimizer makes its state, constants are cached
            counted = []
            for _ in range(args.repeats):
                with Counting(network) as counting:
                    step()
                counted.append(counting)
        ops = {part: dict(counter.most_common()) for part, counter in counting.ops.items()}
        total = sum(sum(counter.values()) for counter in counting.ops.values())
        seconds = {part: statistics.median(c.seconds[part] for c in counted) for part in PARTS}
        results[name] = {"ops": ops, "total": total, "seconds": seconds}
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    names = list(results)
    lines = [f"{'part':<20}" + "".join(f"{name:>17}" for name in names)]
    for part in PARTS:
        cells = [(sum(results[n]["ops"][part].values()), 1e3 * results[n]["seconds"][part]) for n in names]
        lines.append(f"{part:<20}" + "".join(f"{num:>7} {ms:>6.0f} ms" for num, ms in cells))
    bare = results[names[0]]["total"]
    cells = [(results[n]["total"], 1e3 * sum(results[n]["seconds"].values())) for n in names]
    lines.append(f"{'all':<20}" + "".join(f"{num:>7,} {ms:>6.0f} ms" for num, ms in cells))
    lines.append(f"{'ratio':<20}" + "".join(f"{results[n]['total'] / bare:>7.2f}" + " " * 10 for n in names))
    return "\n".join(lines)


def command_line() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--model", default="resnet50", help="a network that torchvision has as well")
    p.add_argument("--batch", type=int, default=16, help="images on the rank")
    p.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    p.add_argument("--cla-loss", default="crossentropy")
    p.add_argument("--pair-loss", default="triplet")
    p.add_argument("--repeats", type=int, default=3, help="counted and timed steps")
    p.add_argument("--details", action="store_true", help="list the operations of each part")
    p.add_argument("--out", type=Path, help="write the counts to this JSON file")
    return p


def main() -> None:
    args = command_line().parse_args()
    results = count(args)
    print(
        f"torch {torch.__version__}, {args.model}, {args.batch} images on the rank, {args.precision}, {args.cla_loss}"
    )
    print(f"and {args.pair_loss}, {NUM_PIDS} identities, Adam: operations per step, and milliseconds on this CPU")
    print(table(results))
    for name, result in results.items() if args.details else ():
        for part, ops in result["ops"].items():
            print(f"{name} / {part}: {', '.join(f'{op} {n}' for op, n in ops.items())}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
