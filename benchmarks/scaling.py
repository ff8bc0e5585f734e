"""What a training step sends between GPUs, from formulas that are checked on real ranks; what it costs, from a model.

python -m benchmarks.scaling                     # bytes and collectives for 8, 64, 512 GPUs; the model's step times
python -m benchmarks.scaling --check 1 2 4 8     # also counts what runs of so many gloo ranks really send
python -m benchmarks.scaling --check 2 --check-models resnet50      # several full buckets; 1 GB a rank

The check starts the trainer on drawn images, on forked ranks of this machine, and counts during two steps, one of them
with a log line:
- every collective, DDP's buckets included, with the bytes of its tensor. All of them go through PyTorch's dispatcher as
  operators of the namespace c10d, so one dispatch mode sees them, whoever calls. The counts must equal the formulas.
- the bytes that the kernel has sent on this rank's TCP connections (TCP_INFO), the rendezvous left out, against those
  of a ring. gloo puts a header of some 50 bytes before each message, and does a reduce-scatter as an all-reduce.

Everything that has a time in it is a MODEL, whose assumptions are the options below and its first lines. No GPU was
measured for it.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import socket
import struct
import tempfile
from collections import Counter
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo  # DDP imports it; here once, not once in every forked rank
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from reid_dist import train
from reid_dist.data.synthetic import draw_dataset
from reid_dist.models import build_model, find_backbone
from reid_dist.models.batch_norm import batch_norms, group_batch_norms
from reid_dist.models.sharded import classifier_names

FP32 = 4
# DDP's, in bytes: of the bucket that is reduced first, and of all others.
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20
# A layer's collectives where a batch norm group spans ranks: (when, kind, fp32 numbers per channel).
SPANNING = (("forward", "all_gather", 2), ("backward", "all_reduce", 2))

WARM_STEPS, COUNTED_STEPS = 2, 2
SETTINGS = (
    "DATA.HEIGHT 64 DATA.WIDTH 32 DATA.TRAIN_BATCH 16 DATA.NUM_INSTANCES 4 DATA.NUM_WORKERS 1 DATA.TEST_BATCH 50 "
    "TRAIN.PRECISION fp32 TRAIN.LOG_STEP 2 TRAIN.MAX_EPOCH 9 TEST.EVAL_STEP 0 REPORT.PAGE false "
    "TRAIN.CHECKPOINT_EPOCH 0 TAG t"
)
NUM_PIDS, CHECK_BATCH = 8, 16


class Network(NamedTuple):
    """What of a network decides on its traffic. gradients: numbers in each parameter that DDP averages, in the order of
    registration; norms: channels of each batch norm; flops: of one image's forward."""

    width: int
    gradients: list[int]
    norms: list[int]
    flops: float


@dataclass(frozen=True)
class Run:
    """A training run, as far as it decides on traffic. images: of each rank; bn_group: 0 is the whole global batch."""

    network: Network
    num_pids: int
    ranks: int
    images: int
    bn_group: int
    sharded: bool = False
    center: bool = False


class Collective(NamedTuple):
    """One collective of a step. when: forward, backward (beside it), update, host (CPU network).

    nbytes: of the larger of its two tensors. ranks: how many take part.
    """

    part: str
    when: str
    kind: str
    nbytes: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that leave each rank on a ring."""
        return (2 if self.kind == "all_reduce" else 1) * (self.ranks - 1) / self.ranks * self.nbytes


def describe(name: str, num_pids: int, size: tuple[int, int], sharded: bool = False) -> Network:
    """Builds the network without memory for its weights. size: (height, width) of an image."""
    with torch.device("meta"):
        model = build_model(name, find_backbone(name, size).feature_dim, range(num_pids), False, sharded=sharded)
        group_batch_norms(model, 1)
        with FlopCounterMode(display=False) as counted:
            model.eval()(torch.empty(1, 3, *size))
    left_out = classifier_names(model) if sharded else []
    gradients = [p.numel() for n, p in model.named_parameters() if p.requires_grad and n not in left_out]
    norms = [len(norm.weight) for norm in batch_norms(model)]
    return Network(model.feature_dim, gradients, norms, float(counted.get_total_flops()))


def buckets(gradients: list[int]) -> list[int]:
    """Bytes of DDP's buckets in the order of their all-reduces: a bucket is closed once it has reached its size.

    DDP sorts parameters by when their gradients are ready; taken here as the reverse of the order of registration.
    """
    found, size = [], 0
    for numel in reversed(gradients):
        size += FP32 * numel
        if size >= (BUCKET if found else FIRST_BUCKET):
            found.append(size)
            size = 0
    return found + [size] * (size > 0)


def collectives(run: Run) -> list[Collective]:
    """All collectives of a step without a log line; none for one rank."""
    world, batch = run.ranks, run.ranks * run.images
    if world == 1:
        return []
    every = partial(Collective, ranks=world)
    feats = FP32 * batch * run.network.width
    found = [
        every("feature gather", "forward", "all_gather", feats),
        every("feature gather", "gather backward", "reduce_scatter", feats),
        *(every("gradients", "backward", "all_reduce", size) for size in buckets(run.network.gradients)),
        every("running statistics", "backward", "all_reduce", FP32 * 2 * sum(run.network.norms)),
        every("vote", "host", "all_reduce", 8),
    ]
    span = (run.bn_group or batch) // run.images
    if span > 1:
        for channels in run.network.norms:
            for when, kind, numbers in SPANNING:
                nbytes = FP32 * numbers * channels * (span if kind == "all_gather" else 1)
                found.append(Collective("batch norm groups", when + " of a layer", kind, nbytes, span))
    if run.sharded:
        # The softmax's maxima; exponentials, targets and logits; highest and own logit; whether the step is finite.
        for numbers in (batch, 3 * batch, 2 * batch, 1):
            found.append(every("sharded classifier", "forward", "all_reduce", FP32 * numbers))
    if run.center:
        found.append(every("center loss", "update", "all_reduce", FP32 * run.num_pids * run.network.width))
    return found


def log_line(run: Run) -> list[Collective]:
    """What a log line adds: two losses and the number of images that were right, in fp64."""
    return [Collective("log line", "update", "all_reduce", 24, run.ranks)] if run.ranks > 1 else []


# --- the check --------------------------------------------------------------------------------------------------------


KINDS = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}


class Counting(TorchDispatchMode):
    """Notes (kind, bytes of the larger tensor) of each collective that is begun inside."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.partition(".")[0]
            tensors = [t for a in args[:2] for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
            self.begun.append((KINDS.get(name, name), max((t.nbytes for t in tensors), default=0)))
        return func(*args, **(kwargs or {}))


def bytes_sent() -> int:
    """What the kernel was given so far to send on this process's TCP connections, those of the rendezvous left out.

    Linux's tcp_info: bytes_sent - bytes_retrans + notsent_bytes.
    """
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if not str(link.readlink()).startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(link.name)))
        except OSError:  # that of iterdir, which is closed by now
            continue
        with connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
                continue
            try:
                ports = {connection.getsockname()[1], connection.getpeername()[1]}
            except OSError:  # listening
                continue
            if int(os.environ.get("MASTER_PORT", 0)) not in ports:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent, again = struct.unpack_from("<QQ", info, 200)
                total += sent - again + struct.unpack_from("<I", info, 144)[0]
    return total


class Counted(Exception):
    """Ends a run once its counted steps are over."""


def train_counted(argv: list[str]) -> tuple[list[tuple[str, int]], int]:  # all ranks
    """(the collectives of the counted steps, the bytes that this rank sent meanwhile) of a run of the trainer."""
    from tests import ranks

    counting, step, marks = Counting(), train.train_step, []

    def marking(*args: Any) -> Any:
        marks.append((len(counting.begun), bytes_sent()))
        if len(marks) > WARM_STEPS + COUNTED_STEPS:
            raise Counted
        return step(*args)

    train.train_step = marking  # type: ignore[assignment]
    assert ranks.world is not None
    with counting, suppress(Counted), redirect_stdout(io.StringIO()):
        train.main(ranks.world, argv)
    (first, before), (last, after) = marks[WARM_STEPS], marks[WARM_STEPS + COUNTED_STEPS]
    return counting.begun[first:last], after - before


class Case(NamedTuple):
    name: str
    model: str
    bn_group: int  # as a multiple of a rank's images; 0: the whole batch
    sharded: bool = False
    center: bool = False


CASES = [
    Case("batch norm groups on a rank", "tiny", 1),
    Case("groups of two ranks, center loss", "tiny", 2, center=True),
    Case("groups of all ranks", "tiny", 0),
    Case("sharded classifier", "tiny", 1, sharded=True),
    Case("batch norm groups on a rank", "mobilenet_v2", 1),
    Case("groups of all ranks", "mobilenet_v2", 0),
    Case("batch norm groups on a rank", "resnet50", 1),
]


class Result(NamedTuple):
    """Of COUNTED_STEPS steps: collectives by (kind, bytes) as the formulas say and as counted on each rank.

    sent: bytes that each rank sent; ring: the formulas' for rings; gloo: the same with gloo's reduce-scatter.
    """

    formula: Counter[tuple[str, int]]
    counted: list[Counter[tuple[str, int]]]
    ring: float
    gloo: float
    sent: list[int]


def check(case: Case, num_ranks: int, root: Path, output: Path) -> Result:
    """Trains `case` on so many forked ranks and counts. root: a data set of NUM_PIDS identities."""
    from tests.ranks import run_ranks

    images = CHECK_BATCH // num_ranks
    group = min(case.bn_group * images, CHECK_BATCH)
    network = describe(case.model, NUM_PIDS, (64, 32), case.sharded)
    run = Run(network, NUM_PIDS, num_ranks, images, group, case.sharded, case.center)
    begun = collectives(run) * COUNTED_STEPS + log_line(run)
    text = (
        f"{SETTINGS} MODEL.NAME {case.model} MODEL.FEATURE_DIM {network.width} MODEL.BN_GROUP {group} "
        f"MODEL.CLASSIFIER_SHARDED {case.sharded} LOSS.CENTER {0.0005 * case.center}"
    )
    argv = ["--root", str(root), "--output", str(output), *text.split(), "MODEL.PRETRAINED", ""]
    by_rank = run_ranks(num_ranks, train_counted, argv, timeout_s=300)
    return Result(
        Counter((c.kind, c.nbytes) for c in begun),
        [Counter(calls) for calls, _ in by_rank],
        sum(c.sent for c in begun),
        sum(c.sent * (2 if c.kind == "reduce_scatter" else 1) for c in begun),
        [sent for _, sent in by_rank],
    )


def run_checks(world_sizes: list[int], cases: list[Case]) -> bool:
    """Prints a line for each case and number of ranks; whether every count equals its formula."""
    torch.set_num_threads(1)  # a forked rank keeps to one thread
    print(
        f"\ncounted on gloo ranks of this machine, {COUNTED_STEPS} steps with one log line, global batch {CHECK_BATCH}"
    )
    print("sent by a rank: the greatest over ranks, and its ratio to the formulas for a ring and for gloo")
    print(
        f"{'network':<13}{'':<34}{'ranks':>5}{'collectives':>12}{'bytes of tensors':>18}{'sent by a rank':>16}  ratios"
    )
    good = True
    with tempfile.TemporaryDirectory() as folder:
        root = draw_dataset(Path(folder) / "set", ids=NUM_PIDS, cams=2, images=3, seed=0)
        for i, case in enumerate(cases):
            for num_ranks in world_sizes:
                found = check(case, num_ranks, root, Path(folder) / f"{i}-{num_ranks}")
                equal = all(counted == found.formula for counted in found.counted)
                good &= equal
                nbytes = sum(size * n for (_, size), n in found.formula.items())
                wire = max(found.sent)
                ratios = f"{wire / found.ring:.3f} {wire / found.gloo:.3f}" if found.ring else ""
                print(
                    f"{case.model:<13}{case.name:<34}{num_ranks:>5}{sum(found.formula.values()):>12}{nbytes:>18,}"
                    f"{wire:>16,}  {ratios:<14} {'counts equal the formulas' if equal else 'COUNTS DIFFER'}",
                    flush=True,
                )
                for r, counted in enumerate(found.counted):
                    for kind, size in sorted((counted - found.formula).keys() | (found.formula - counted).keys()):
                        key = (kind, size)
                        print(f"    rank {r}: {kind} of {size:,} bytes: {counted[key]}, formula {found.formula[key]}")
    return good


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """The model's assumptions. Rates are those that are reached, bytes those of one direction."""

    tflops: float
    host_ops: int
    group_ops: int
    span_ops: int
    host_us: float
    collective_host_us: float
    gpus_per_node: int
    nvlink: float
    nic: float
    nics: int
    launch_us: float
    hop_us: float
    net_hop_us: float


class Step(NamedTuple):
    """A modelled step in seconds: max(compute, host) + exposed."""

    compute: float
    host: float
    exposed: float

    @property
    def total(self) -> float:
        return max(self.compute, self.host) + self.exposed


def collective_seconds(c: Collective, machine: Machine) -> float:
    """Latency and transfer of one collective. An all-reduce is a tree in latency and a ring in bytes, others are rings.

    Between nodes the rings of a node share its network cards.
    """
    inside = min(c.ranks, machine.gpus_per_node)
    nodes = math.ceil(c.ranks / machine.gpus_per_node)
    if c.kind == "all_reduce":
        hops, net_hops = 2 * math.log2(inside), 2 * math.log2(nodes)
    else:
        hops, net_hops = c.ranks - nodes, nodes - 1
    rate = machine.nvlink if nodes == 1 else min(machine.nvlink, machine.nic * machine.nics)
    latency = machine.launch_us + hops * machine.hop_us + net_hops * machine.net_hop_us
    return latency * 1e-6 + c.sent / (rate * 1e9)


def model_step(run: Run, machine: Machine, log_step: int) -> Step:
    """A step's modelled seconds. Hidden behind the backward: the gradients, but for the last bucket, and the running
    statistics, as far as two thirds of the step's arithmetic (or of the host's time) are long enough for them."""
    found = [c for c in collectives(run) if c.when != "host"]
    seconds = {c: collective_seconds(c, machine) for c in set(found)}
    compute = run.images * 3 * run.network.flops / (machine.tflops * 1e12)
    groups = max(1, run.images // (run.bn_group or run.ranks * run.images))
    spans = (run.bn_group or run.ranks * run.images) > run.images
    ops = machine.host_ops + (groups - 1) * machine.group_ops + spans * machine.span_ops
    host = ops * machine.host_us * 1e-6 + len(found) * machine.collective_host_us * 1e-6
    beside = [seconds[c] for c in found if c.when == "backward"]
    last = [seconds[c] for c in found if c.part == "gradients"][-1:]
    hidden = 2 / 3 * max(compute, host)
    exposed = sum(seconds[c] for c in found if c.when != "backward")
    exposed += max(sum(last), sum(beside) - hidden)
    exposed += sum(collective_seconds(c, machine) for c in log_line(run)) / log_step
    return Step(compute, host, exposed)


def stops_at(run: Run, machine: Machine, log_step: int, gain: float) -> int:
    """The largest share, in images a GPU, at which half of it on twice the GPUs makes a step less than `gain` times
    faster. run.images is not looked at; shares are powers of two."""
    share = 1
    while share < 4096:
        here = model_step(replace(run, images=2 * share), machine, log_step).total
        half = model_step(replace(run, images=share, ranks=2 * run.ranks), machine, log_step).total
        if here / half >= gain:
            break
        share *= 2
    return share


def print_traffic(run: Run) -> None:
    """A table of one number of GPUs, by part."""
    print(f"\n{run.ranks} GPUs, {run.images} images each, global batch {run.ranks * run.images:,}: from formulas")
    print(f"{'part':<22}{'kind':<28}{'collectives':>12}{'MB sent by each GPU':>21}")
    by_part: dict[tuple[str, str], list[Collective]] = {}
    for c in [*collectives(run), *log_line(run)]:
        by_part.setdefault((c.part, f"{c.kind}, {c.when}"), []).append(c)
    for (part, how), calls in by_part.items():
        print(f"{part:<22}{how:<28}{len(calls):>12}{sum(c.sent for c in calls) / 1e6:>21.3f}")
    print(f"{'a step, no log line':<50}{len(collectives(run)):>12}{sum(c.sent for c in collectives(run)) / 1e6:>21.3f}")


def print_model(run: Run, machine: Machine, args: argparse.Namespace) -> None:
    print("\nMODEL, not measured: step = max(compute, host) + exposed communication, in ms. It assumes:")
    print(
        f"  arithmetic: {machine.tflops:g} TFLOP/s reached, {3 * run.network.flops / 1e9:.1f} GFLOP an image, both "
        f"ways\n  host: {machine.host_ops} operations of {machine.host_us:g} us, {machine.group_ops} more for each "
        f"further batch norm group on a GPU or {machine.span_ops} for one that spans GPUs; "
        f"{machine.collective_host_us:g} us a collective\n"
        f"  network: {machine.gpus_per_node} GPUs a node with {machine.nvlink:g} GB/s of NVLink each; {machine.nics} "
        f"cards a node of {machine.nic:g} GB/s\n  a collective: {machine.launch_us:g} us, {machine.hop_us:g} us a hop "
        f"inside a node, {machine.net_hop_us:g} us a hop between nodes"
    )
    titles = ("GPUs", "images a GPU", "global batch", "compute", "host", "exposed", "step", "images/s", "arithmetic")
    widths = (5, 14, 14, 10, 8, 9, 8, 13, 12)
    print("".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True)))
    for ranks in args.gpus:
        for images in args.shares:
            step = model_step(replace(run, ranks=ranks, images=images), machine, args.log_step)
            print(
                f"{ranks:>5}{images:>14}{ranks * images:>14,}{1e3 * step.compute:>10.2f}{1e3 * step.host:>8.2f}"
                f"{1e3 * step.exposed:>9.2f}{1e3 * step.total:>8.2f}{ranks * images / step.total:>13,.0f}"
                f"{step.compute / step.total:>11.0%}"
            )
    even = machine.host_ops * machine.host_us * 1e-6 * machine.tflops * 1e12 / (3 * run.network.flops)
    print(f"model: below {even:.0f} images a GPU the host needs longer than the arithmetic, communication aside")
    for ranks in args.gpus:
        share = stops_at(replace(run, ranks=ranks), machine, args.log_step, args.gain)
        print(
            f"model: {ranks} GPUs: at {share} images a GPU and fewer, twice the GPUs for the same batch make a step "
            f"less than {args.gain:g} times faster; raise the global batch instead"
        )


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    p.add_argument("--images", type=int, default=64, help="images of each GPU in the tables of bytes")
    p.add_argument(
        "--shares", type=int, nargs="+", default=[8, 32, 64, 128, 256], help="images of each GPU in the model"
    )
    p.add_argument("--model", default="resnet50")
    p.add_argument("--size", type=int, nargs=2, default=[256, 128], help="height and width of the images")
    p.add_argument("--pids", type=int, default=751, help="identities")
    p.add_argument("--bn-group", type=int, default=32, help="MODEL.BN_GROUP; 0: the whole global batch")
    p.add_argument("--sharded", action="store_true", help="MODEL.CLASSIFIER_SHARDED True")
    p.add_argument("--center", action="store_true", help="LOSS.CENTER above 0")
    p.add_argument("--log-step", type=int, default=20, help="TRAIN.LOG_STEP")
    p.add_argument("--check", type=int, nargs="+", default=[], metavar="RANKS", help="count with so many gloo ranks")
    p.add_argument(
        "--check-models",
        nargs="+",
        default=["tiny", "mobilenet_v2"],
        choices=sorted({c.model for c in CASES}),
        metavar="M",
    )
    m = p.add_argument_group("assumptions of the model")
    m.add_argument("--tflops", type=float, default=140, help="rate of the step's arithmetic, TFLOP/s")
    m.add_argument("--host-ops", type=int, default=459, help="operations of a step with one batch norm group")
    m.add_argument("--group-ops", type=int, default=216, help="more for each further group on a GPU")
    m.add_argument("--span-ops", type=int, default=702, help="more where a group spans GPUs, collectives aside")
    m.add_argument("--host-us", type=float, default=10, help="host time of each, microseconds")
    m.add_argument("--collective-host-us", type=float, default=30, help="host time of a collective, microseconds")
    m.add_argument("--gpus-per-node", type=int, default=8)
    m.add_argument("--nvlink", type=float, default=360, help="GB/s of a GPU inside a node")
    m.add_argument("--nic", type=float, default=45, help="GB/s of a network card (400 Gb/s InfiniBand: 50 at most)")
    m.add_argument("--nics", type=int, default=8, help="network cards of a node")
    m.add_argument("--launch-us", type=float, default=8, help="a collective's time without any hop, microseconds")
    m.add_argument("--hop-us", type=float, default=1, help="a hop between GPUs of a node, microseconds")
    m.add_argument("--net-hop-us", type=float, default=4, help="a hop between nodes, microseconds")
    m.add_argument("--gain", type=float, default=1.25, help="what of twice the GPUs no longer counts as faster")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> bool:
    """Prints the tables; False when a count differs from its formula."""
    args = read_arguments(argv)
    network = describe(args.model, args.pids, (args.size[0], args.size[1]), args.sharded)
    run = Run(network, args.pids, 1, args.images, args.bn_group, args.sharded, args.center)
    print(
        f"{args.model}, {args.pids} identities: {sum(network.gradients) / 1e6:.1f} million gradients in "
        f"{len(buckets(network.gradients))} DDP buckets, {len(network.norms)} batch norms of {sum(network.norms):,} "
        f"channels, features of {network.width}"
    )
    for ranks in args.gpus:
        print_traffic(replace(run, ranks=ranks))
    machine = Machine(**{name: getattr(args, name) for name in Machine.__dataclass_fields__})
    print_model(run, machine, args)
    cases = [case for case in CASES if case.model in args.check_models]
    return run_checks(args.check, cases) if args.check else True


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
