"""What a training step costs: the bare network, the trainer's step, and the whole trainer fed from JPEGs.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --root DATA --batch 64 --precision bf16 --modes eager,graph --out step.json
    python benchmarks/train_step.py --device cpu --model tiny --size 64 32 --batch 8    # a trial without a GPU

bare    the network with average pooling and a linear classifier (torchvision's ResNet-50, last stride 1), cross
        entropy, fused Adam, channels last, under the same autocast; images and labels are on the device
step    `reid_dist.step.train_step`, with model, losses and optimizer built from a config as the trainer builds them;
        images and labels are on the device
whole   the same, fed by the trainer's loader from the JPEG files of --root (drawn ones by default), with the learning
        rate set at every step and the losses read every 10 steps, as the trainer does

Modes: eager; compiled (TRAIN.COMPILE on); graph (TRAIN.CUDA_GRAPH on); nondeterministic (TRAIN.DETERMINISTIC off,
otherwise eager). A mode or precision that this version's config does not know is reported as such.

The parts of a mode are measured in turn, `--repeats` times; speeds are medians (least to greatest), ratios are medians
of the ratios to the bare network in the same repeat and mode. Host: milliseconds until the host has issued a step;
where that is about the time of the whole step, the host is the limit. Syncs: how often in a step the host waits for
the device, counted by torch's profiler between log lines. Share: floating-point operations of the bare network, forward
and backward, over what one large bf16 matrix product reaches on the same device in the same process.

The bare network's algorithms are those that cuDNN chooses by its rules; in the mode nondeterministic it times them, as
the trainer does there.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from reid_dist.build import build_loader, build_network, make_plan
from reid_dist.config import bare_parser, check_config, defaults, flatten, load_config, resolve
from reid_dist.data import synthetic
from reid_dist.data.index import build_index
from reid_dist.failure import UserError
from reid_dist.keys import CHOICES
from reid_dist.models import find_backbone
from reid_dist.optim import build_optimizer, lr_at, parameter_groups, set_lr
from reid_dist.precision import CUBLAS_WORKSPACES, set_determinism
from reid_dist.report import Reporter
from reid_dist.step import AUTOCAST, Losses, build_objective, global_values
from reid_dist.train import build_schedule, step_of, wrap
from reid_dist.world import World

NUM_PIDS = 751  # of Market-1501's training set
LOG_STEP = 10
MODES = {
    "eager": {},
    "compiled": {"TRAIN.COMPILE": "on"},
    "graph": {"TRAIN.CUDA_GRAPH": "on"},
    "nondeterministic": {"TRAIN.DETERMINISTIC": "off"},
}
PARTS = ("bare", "step", "whole")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
READS = "aten::_local_scalar_dense"  # what item() and tolist() of a scalar call, on any device


class Trainer(NamedTuple):
    """What `train.fit` holds at a step. prepare(): torch's settings for the whole process, which other parts change,
    too; step: images (B, 3, H, W), global_pids (B,) -> what `train_step` returns."""

    cfg: Any
    optimizer: torch.optim.Optimizer
    prepare: Callable[[], None]
    step: Callable[[torch.Tensor, torch.Tensor], tuple[Losses, torch.Tensor]]


class Part(NamedTuple):
    """step() issues one step and returns the seconds for which it waited for data; read() is what a log line reads;
    prepare() makes the settings of the whole process that the part is measured under."""

    prepare: Callable[[], None]
    step: Callable[[], float]
    read: Callable[[], object]
    peak_mib: float


class Sample(NamedTuple):
    step_s: float
    host_s: float
    waited_s: float  # per step


def main() -> None:
    args = read_arguments()
    device = torch.device(args.device)
    # cuBLAS and torch read it once, at the first matrix product, which is not the trainer's here.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
    with ExitStack() as stack:
        root = args.root
        if root is None and "whole" in args.parts:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            root = synthetic.draw_dataset(Path(folder) / "drawn", ids=args.ids, cams=2, images=4, seed=0)
        found = facts(args, device)
        print(describe(found), flush=True)
        began, rows = time.monotonic(), []
        for mode, precision, batch in [(m, p, b) for m in args.modes for p in args.precision for b in args.batch]:
            late = args.limit and time.monotonic() - began > args.limit
            group = {"mode": mode, "precision": precision, "batch": batch}
            if late:
                rows.append(group | {"note": f"not measured within {args.limit:.0f} s"})
            else:
                rows += compare(group, args, device, root, found)
            if args.out:  # after every group, so that what was measured is kept when the rest fails
                args.out.write_text(json.dumps({**found, "rows": rows}, indent=1))
    print_table(rows)
    if any("failed" in row.get("note", "") for row in rows):
        sys.exit(1)


def read_arguments() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--model", default="resnet50", help="MODEL.NAME")
    p.add_argument("--size", type=int, nargs=2, default=(256, 128), metavar=("HEIGHT", "WIDTH"))
    p.add_argument("--batch", type=numbers, default=[64, 128, 256], help="64,128,256")
    p.add_argument("--precision", type=words, default=["bf16", "tf32", "fp32"], help="TRAIN.PRECISION: bf16,tf32,fp32")
    p.add_argument("--modes", type=words, default=list(MODES), help=",".join(MODES))
    p.add_argument("--parts", type=words, default=list(PARTS), help=",".join(PARTS))
    p.add_argument("--root", type=Path, help="Market-1501 layout, for `whole`; default: drawn pedestrians")
    p.add_argument("--ids", type=int, default=16, help="drawn identities")
    p.add_argument("--workers", type=int, default=min(8, len(os.sched_getaffinity(0))), help="DATA.NUM_WORKERS")
    p.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="more config keys, for step and whole")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--seconds", type=float, default=0.3, help="of one repeat of one part, about")
    p.add_argument("--limit", type=float, default=0.0, help="start no new group after so many seconds; 0: no limit")
    p.add_argument("--out", type=Path, help="write everything to this JSON file")
    args = p.parse_args()
    for name, known in (("modes", tuple(MODES)), ("parts", PARTS)):
        if unknown := set(getattr(args, name)) - set(known):
            p.error(f"--{name}: unknown {', '.join(sorted(unknown))}; choose from {','.join(known)}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


# --- what is measured -------------------------------------------------------------------------------------------------


def build_trainer(opts: dict[str, Any], device: torch.device) -> Trainer:
    """The trainer's step as `train.main` builds it on one rank from the defaults and `opts`. Raises ValueError."""
    cfg = read_config(opts, device)

    def prepare() -> None:
        set_arithmetic(cfg.TRAIN.PRECISION)
        set_determinism(cfg.TRAIN.DETERMINISTIC == "on", device, cfg.TRAIN.COMPILE == "on")

    prepare()  # a step is captured when it is built
    world = World(0, 0, 1, device)
    model = build_network(cfg, NUM_PIDS, world)
    objective = build_objective(cfg, NUM_PIDS, world)
    opt = cfg.TRAIN.OPTIMIZER
    groups = parameter_groups(model, opt.BACKBONE_FACTOR)
    graph = cfg.TRAIN.CUDA_GRAPH == "on"
    optimizer = build_optimizer(groups, opt.NAME, opt.LR, opt.WEIGHT_DECAY, captured=graph)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.TRAIN.PRECISION == "fp16")
    learned = [p for p in model.backbone.parameters() if p.requires_grad]
    net = wrap(model, learned, objective, scaler, False, cfg, world)
    step = step_of(net, objective, optimizer, scaler, cfg, world, print)

    return Trainer(cfg, optimizer, prepare, step)


def read_config(opts: dict[str, Any], device: torch.device) -> Any:
    words = [str(word) for pair in opts.items() for word in pair]
    cfg = load_config(bare_parser("train").parse_args(words))
    check_config(cfg, 1, device.type == "cuda")
    resolve(cfg, device.type == "cuda")
    return cfg


def not_in_this_version(opts: dict[str, Any]) -> list[str]:
    """'KEY VALUE' for each that the config of this version does not know."""
    known = flatten(defaults())
    return [f"{k} {v}" for k, v in opts.items() if k not in known or v not in CHOICES.get(k, (v,))]


def set_arithmetic(precision: str, time_algorithms: bool = False) -> None:
    """fp32 or TF32 for the arithmetic of float32 tensors, and algorithms of cuDNN's choice, timed or not."""
    torch.set_deterministic_debug_mode("default")
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, time_algorithms
    kind = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cudnn.conv.fp32_precision = kind
    torch.backends.cuda.matmul.fp32_precision = kind


def build_bare(model: str, stride: int) -> nn.Module:
    """The network without anything of the trainer's: for resnet50 exactly torchvision's, but for the last stride."""
    row = find_backbone(model)
    return nn.Sequential(row.build(stride), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(row.feature_dim, NUM_PIDS))


def bare_step(model: str, mode: str, precision: str, images: torch.Tensor, pids: torch.Tensor) -> Callable[[], object]:
    device = images.device
    net = build_bare(model, stride=1).to(device, memory_format=torch.channels_last).train()
    forward = torch.compile(net, dynamic=False) if mode == "compiled" else net
    captured = mode == "graph" and device.type == "cuda"
    options = {"capturable": True} if captured else {}
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True, **options)
    autocast = AUTOCAST.get(precision)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        # A captured step must not keep casts of weights from one step to the next.
        with torch.autocast(device.type, autocast, enabled=autocast is not None, cache_enabled=not captured):
            logits = forward(images)
        loss = cross_entropy(logits.float(), pids)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return capture(step) if captured else step


def capture(step: Callable[[], object]) -> Callable[[], object]:
    """`step` as one CUDA graph, after three steps on a stream beside the current one, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def parts_of(
    group: dict[str, Any], args: argparse.Namespace, device: torch.device, root: Path | None, stack: ExitStack
) -> Iterator[tuple[str, Part]]:
    """The parts of --parts, one after the other, each warmed up; `whole` shares the trainer of `step`."""
    batch, (height, width) = group["batch"], args.size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, height, width, generator=generator).to(device, memory_format=torch.channels_last)
    pids = (torch.arange(batch) // 4).to(device)
    if "bare" in args.parts:
        prepare = functools.partial(set_arithmetic, group["precision"], group["mode"] == "nondeterministic")
        prepare()
        with peak_of(device) as peak:
            step = bare_step(args.model, group["mode"], group["precision"], images, pids)
            for _ in range(3):
                step()
        yield "bare", Part(prepare, without_data(step), lambda: None, peak[0])
    if not {"step", "whole"} & set(args.parts):
        return
    with peak_of(device) as peak:
        trainer = build_trainer(options_of(group, args), device)
        for _ in range(3):
            trainer.step(images, pids)
    if "step" in args.parts:
        step = functools.partial(trainer.step, images, pids)
        yield "step", Part(trainer.prepare, without_data(step), lambda: None, peak[0])
    if "whole" in args.parts:
        assert root is not None
        yield "whole", fed(trainer, root, device, peak[0], stack)


def without_data(step: Callable[[], object]) -> Callable[[], float]:
    def issue() -> float:
        step()
        return 0.0

    return issue


def fed(trainer: Trainer, root: Path, device: torch.device, peak: float, stack: ExitStack) -> Part:
    """The trainer's step with its loader in front."""
    cfg, world = trainer.cfg, World(0, 0, 1, device)
    index = build_index(cfg.DATA.DATASET, str(root))
    plan, schedule = make_plan(cfg, index), build_schedule(cfg)
    loader = stack.enter_context(build_loader(cfg, index, plan, world, 0, Reporter(root, is_main=False)))
    last: list[Losses] = []

    def step() -> float:
        batch = next(loader)
        set_lr(trainer.optimizer, lr_at(0, plan.num_steps, schedule))
        last[:] = [trainer.step(batch.images, batch.global_pids)[0]]
        return batch.data_wait

    for _ in range(5):
        step()
    return Part(trainer.prepare, step, lambda: global_values(last[0], cfg.DATA.TRAIN_BATCH), peak)


def options_of(group: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Config keys of the trainer for one row of the table."""
    row = find_backbone(args.model)
    return {
        "MODEL.NAME": args.model,
        "MODEL.FEATURE_DIM": row.feature_dim,
        "MODEL.PRETRAINED": "",
        "DATA.HEIGHT": args.size[0],
        "DATA.WIDTH": args.size[1],
        "DATA.TRAIN_BATCH": group["batch"],
        "DATA.NUM_WORKERS": args.workers,
        "MODEL.BN_GROUP": min(32, group["batch"]),
        "TRAIN.PRECISION": group["precision"],
        **MODES[group["mode"]],
        **dict(zip(args.opts[::2], args.opts[1::2], strict=True)),
    }


class peak_of:
    """with peak_of(device) as peak: peak[0] is afterwards the device memory in MiB that was added at most inside."""

    def __init__(self, device: torch.device):
        self.cuda, self.peak = device.type == "cuda", [0.0]

    def __enter__(self) -> list[float]:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self.peak

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            self.peak[0] = (torch.cuda.max_memory_allocated() - self.before) / 2**20


# --- measuring --------------------------------------------------------------------------------------------------------


def compare(
    group: dict[str, Any], args: argparse.Namespace, device: torch.device, root: Path | None, found: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row of the table for each part; one with a note where the config does not know the mode, or it fails."""
    if unknown := not_in_this_version(options_of(group, args)):
        return [group | {"note": f"{', '.join(unknown)}: not in this version"}]
    return compare_parts(group, args, device, root, found)


def compare_parts(
    group: dict[str, Any], args: argparse.Namespace, device: torch.device, root: Path | None, found: dict[str, Any]
) -> list[dict[str, Any]]:
    samples: dict[str, list[Sample]] = {}
    rows = []
    try:
        with ExitStack() as stack:
            parts = dict(parts_of(group, args, device, root, stack))
            steps = {}
            for name, part in parts.items():
                once = run(part, 2, device).step_s
                steps[name] = max(2, min(100, round(args.seconds / once)))
            for repeat in range(args.repeats):
                for name in list(parts) if repeat % 2 else reversed(parts):
                    samples.setdefault(name, []).append(run(parts[name], steps[name], device))
            syncs = {name: count_syncs(part, device) for name, part in parts.items()}
            rows = [row_of(group, name, parts[name], samples, syncs[name], found) for name in parts]
    except (
        RuntimeError,
        ValueError,
        UserError,
    ) as error:  # such as out of memory: the other rows count
        rows = [group | {"note": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}]
    parts = {}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if "compiled" in group["mode"]:
        torch.compiler.reset()
    return rows


def run(part: Part, steps: int, device: torch.device) -> Sample:
    part.prepare()
    synchronize(device)
    began, waited = time.perf_counter(), 0.0
    for number in range(1, steps + 1):
        waited += part.step()
        if number % LOG_STEP == 0:
            part.read()
    host = time.perf_counter() - began
    synchronize(device)
    return Sample((time.perf_counter() - began) / steps, host / steps, waited / steps)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def count_syncs(part: Part, device: torch.device, steps: int = 4) -> dict[str, float]:
    """How often per step each call that waits for the device is made, by torch's profiler."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    part.prepare()
    with profile(activities=activities) as prof:
        with record_function("counted steps"):  # the profiler itself waits for the device when it ends
            for _ in range(steps):
                part.step()
        synchronize(device)
    events = prof.events()
    [span] = [e.time_range for e in events if e.name == "counted steps" and e.device_type.name == "CPU"]
    inside = Counter(
        e.name for e in events if e.name in (*WAITS, READS) and span.start <= e.time_range.start < span.end
    )
    return {name: number / steps for name, number in inside.items()}


def row_of(
    group: dict[str, Any],
    name: str,
    part: Part,
    samples: dict[str, list[Sample]],
    syncs: dict[str, float],
    found: dict[str, Any],
) -> dict[str, Any]:
    mine, batch = samples[name], group["batch"]
    speeds = [batch / s.step_s for s in mine]
    row = group | {
        "part": name,
        "n": len(mine),
        "images_per_s": spread(speeds),
        "step_ms": spread([1e3 * s.step_s for s in mine]),
        "host_ms": spread([1e3 * s.host_s for s in mine]),
        "data_wait": statistics.median(s.waited_s / s.step_s for s in mine),
        "peak_mib": part.peak_mib,
        "share": statistics.median(speeds) * found["flop_per_image"] / found["bf16_flop_per_s"],
        "syncs": syncs,
        "syncs_per_step": sum(syncs.get(wait, 0.0) for wait in WAITS) or syncs.get(READS, 0.0),
    }
    if "bare" in samples:
        pairs = zip(samples["bare"], mine, strict=True)
        row["ratio"] = spread([bare.step_s / s.step_s for bare, s in pairs])
    return row


def spread(values: list[float]) -> list[float]:
    """[median, least, greatest]"""
    return [statistics.median(values), min(values), max(values)]


# --- the device -------------------------------------------------------------------------------------------------------


def facts(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    rate = product_rate(device)
    return {
        "card": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "model": args.model,
        "size": list(args.size),
        "flop_per_image": flop_per_image(args.model, args.size),
        "bf16_flop_per_s": rate,
    }


def flop_per_image(model: str, size: tuple[int, int]) -> float:
    """Of the bare network, forward and backward, last stride 1; a multiplication and an addition are two."""
    with torch.device("meta"):
        net, images = build_bare(model, stride=1), torch.empty(2, 3, *size)
        with FlopCounterMode(display=False) as counter:
            net(images).sum().backward()
    return counter.get_total_flops() / len(images)


def product_rate(device: torch.device) -> float:
    """Floating-point operations per second of a bf16 matrix product, the median of 20 (on a CPU a small one)."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    seconds = []
    for _ in range(23):
        synchronize(device)
        began = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(seconds[3:])


def describe(found: dict[str, Any]) -> str:
    height, width = found["size"]
    return (
        f"{found['card']}, torch {found['torch']}, cuDNN {found['cudnn']}; bf16 matrix product "
        f"{found['bf16_flop_per_s'] / 1e12:.3g} TFLOP/s; {found['model']} at {height}x{width}, "
        f"{found['flop_per_image'] / 1e9:.2f} GFLOP per image, forward and backward"
    )


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'mode':17}{'type':>5}{'batch':>6} {'part':6}{'images/s':>26}{'to bare':>24}{'share':>7}{'host ms':>9}"
        f"{'peak MiB':>10}{'wait':>7}{'syncs':>7}"
    )
    for row in rows:
        name = f"{row['mode']:17}{row['precision']:>5}{row['batch']:6} "
        if "note" in row:
            print(name + row["note"])
            continue
        speed = "{:,.0f} ({:,.0f} to {:,.0f})".format(*row["images_per_s"])
        ratio = "{:.3f} ({:.3f} to {:.3f})".format(*row["ratio"]) if "ratio" in row else ""
        print(
            f"{name}{row['part']:6}{speed:>26}{ratio:>24}{row['share']:7.1%}{row['host_ms'][0]:9.2f}"
            f"{row['peak_mib']:10,.0f}{row['data_wait']:7.1%}{row['syncs_per_step']:7.1f}"
        )


if __name__ == "__main__":
    main()
