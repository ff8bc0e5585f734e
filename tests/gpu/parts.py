"""What the tests of a training step share: the parts of one, from a config, and steps on fixed images."""

from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from reid_dist.build import build_network, image_dtype
from reid_dist.checkpoint import copy_tensors, digest
from reid_dist.config import check_config, load_config, parser
from reid_dist.models import MODELS
from reid_dist.optim import build_optimizer, parameter_groups
from reid_dist.resume import Parts
from reid_dist.step import Network, Objective, build_objective, global_values, network_of, train_step
from reid_dist.world import World

NUM_PIDS = 8
SMALL = (
    "DATA.TRAIN_BATCH 16 DATA.NUM_INSTANCES 4 MODEL.BN_GROUP 8 "
    "LOSS.CLA_LOSS crossentropy LOSS.PAIR_LOSS triplet TRAIN.OPTIMIZER.LR 0.001"
)


class Trainer(NamedTuple):
    cfg: Any
    parts: Parts
    objective: Objective
    net: Network


def trainer(world: World, text: str = "", network: str = "tiny", wrap: Any = None) -> Trainer:
    """A fresh one. text: keys and values beside SMALL; wrap: model -> model."""
    # The CPU takes seconds for what the GPU does in milliseconds, above all in fp16.
    size = "DATA.HEIGHT 64 DATA.WIDTH 32" if world.device.type == "cuda" else "DATA.HEIGHT 32 DATA.WIDTH 16"
    words = f"{SMALL} {size} MODEL.NAME {network} MODEL.FEATURE_DIM {MODELS[network].feature_dim} {text}"
    cfg = load_config(parser("train").parse_intermixed_args(words.split()))
    check_config(cfg, world.world_size, cuda=True)
    cfg.freeze()
    model = build_network(cfg, NUM_PIDS, world).train()
    opt = cfg.TRAIN.OPTIMIZER
    groups, graph = parameter_groups(model, opt.BACKBONE_FACTOR), cfg.TRAIN.CUDA_GRAPH == "on"
    optimizer = build_optimizer(groups, opt.NAME, opt.LR, opt.WEIGHT_DECAY, captured=graph)
    scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.TRAIN.PRECISION == "fp16")
    parts = Parts(model, optimizer, scaler, range(NUM_PIDS), {})
    objective = build_objective(cfg, NUM_PIDS, world)
    return Trainer(cfg, parts, objective, network_of(wrap(model) if wrap else model, objective))


def alone(device: torch.device) -> World:
    return World(0, 0, 1, device)


def batch(cfg: Any, world: World, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(this rank's images, all labels) of a step, the same global batch on any number of ranks."""
    generator = torch.Generator().manual_seed(step)
    num, share = cfg.DATA.TRAIN_BATCH, cfg.DATA.TRAIN_BATCH // world.world_size
    images = torch.randn(num, 3, cfg.DATA.HEIGHT, cfg.DATA.WIDTH, generator=generator, dtype=torch.float64)
    images = images[world.rank * share : (world.rank + 1) * share]
    pids = (torch.arange(num) // cfg.DATA.NUM_INSTANCES + step) % NUM_PIDS
    images = images.to(world.device, image_dtype(cfg)).contiguous(memory_format=torch.channels_last)
    return images, pids.to(world.device)


def one_step(t: Trainer, images: torch.Tensor, pids: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """(losses, flag of a step that was left out)."""
    return train_step(t.net, t.objective, t.parts.optimizer, t.parts.scaler, images, pids)


def steps(t: Trainer, world: World, first: int, last: int) -> list[dict[str, float]]:
    """Trains on the batches first..last-1; the global losses of each step."""
    found = []
    for step in range(first, last):
        losses, bad = one_step(t, *batch(t.cfg, world, step))
        assert not bad
        found.append(global_values(losses, t.cfg.DATA.TRAIN_BATCH))
    return found


def digest_of_steps(t: Trainer, world: World) -> dict[str, Any]:
    """The losses of three steps, and a hash of what they left."""
    losses = [v["loss"] for v in steps(t, world, 0, 3)]
    return {"losses": losses, "digest": digest(state_of(t)["model"])}


def state_of(t: Trainer) -> dict[str, Any]:
    """All that a step changes, copied."""
    model, optimizer, scaler, *_ = t.parts
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    return copy_tensors(state)


@contextmanager
def deterministic():
    """The settings of TRAIN.DETERMINISTIC on, until the end of the block."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.utils.deterministic.fill_uninitialized_memory = filled
