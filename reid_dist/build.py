"""Where the config ends: from its keys to plain arguments of the parts that train and evaluate alike."""

from __future__ import annotations

import argparse
import functools
import sys
from dataclasses import replace
from typing import Any

import torch

from . import dist
from .config import check_config, flatten, load_config, resolve, run_folder
from .data.augment import Augment, sizes
from .data.bad_images import FILE as BAD_IMAGES
from .data.bad_images import BadImage, describe, find_bad, positions_of, read_verdict, save_verdict
from .data.cache import build_cache
from .data.index import DatasetIndex, build_index
from .data.loader import TrainLoader
from .data.pipeline import open_images
from .data.plan import EpochPlan
from .data.readers.files import Options
from .data.subset import drop, hold_out, splits_of
from .losses import uses_cosine
from .models import ReIDModel, build_model
from .models.batch_norm import group_batch_norms
from .models.heads import add_centers
from .models.sharded import classifier_rows
from .report import Reporter, clock
from .share import once_per_node


def read_command(
    parser: argparse.ArgumentParser, argv: list[str], world: dist.World, trains: bool = True
) -> tuple[argparse.Namespace, Any]:
    """(flags, frozen config) of a command line, checked and resolved. Raises ValueError with a line per mistake.

    trains: False where no training batch has to divide into ranks.
    """
    args = parser.parse_intermixed_args(argv)
    cfg = load_config(args)
    cuda = torch.cuda.is_available()
    num_ranks = getattr(args, "check", None) or world.world_size
    check_config(cfg, num_ranks if trains and not cfg.EVAL_MODE else None, cuda)
    resolve(cfg, cuda)
    cfg.freeze()
    if args.gpu is not None and world.is_main:
        print("--gpu has no effect: CUDA_VISIBLE_DEVICES and --nproc_per_node decide", file=sys.stderr)
    return args, cfg


def read_index(cfg: Any, world: dist.World, trains: bool) -> DatasetIndex:  # all ranks
    """The data to train and evaluate on, once in the memory of each node, without what cannot be decoded.

    The same on every rank: a rank that sees other files or labels is an error of all. trains: False to evaluate only.
    """
    d = cfg.DATA
    options = Options(d.SPLIT_ID, d.CUHK03_LABELED, d.CUHK03_CLASSIC_SPLIT, d.MSMT17_VAL, d.MANIFEST)
    may_lack = [*["train"] * (not trains), *["test"] * (d.VAL_IDS > 0)]
    whole = once_per_node(lambda: build_index(d.DATASET, d.ROOT, cfg.TEST.DATASETS, options, may_lack).hashed())
    dist.agreed(compare_fingerprints, dist.gather_objects(whole.fingerprint()))
    # Evaluation alone reads every image once in any case, and names one that it cannot decode.
    bad = find_bad_images(cfg, whole, world, trains) if trains or d.ON_BAD_IMAGE == "skip" else []
    if not bad and not d.VAL_IDS:
        return whole
    return once_per_node(lambda: subset(whole, bad, d.VAL_IDS, cfg.SEED).hashed())


def subset(index: DatasetIndex, bad: list[BadImage], num_held_out: int, seed: int) -> DatasetIndex:
    """The index without its bad images, and with a validation set if one is asked for."""
    if bad:
        note = f"{len(bad):,} images that cannot be decoded are left out; all of them in {BAD_IMAGES}, the first:"
        first = [f"  {image.message}" for image in bad[:3]]
        index = replace(drop(index, positions_of(bad)), notes=(*index.notes, note, *first))
    return hold_out(index, num_held_out, seed) if num_held_out else index


def find_bad_images(cfg: Any, index: DatasetIndex, world: dist.World, trains: bool) -> list[BadImage]:  # all ranks
    """The images to leave out: every image is decoded once, shared out over the ranks. DATA.ON_BAD_IMAGE error ends the
    run with the list if there are any.

    A run that goes on, or is evaluated, keeps to what it found when it began, so that its batches stay the same.
    """
    folder, skip = run_folder(cfg), cfg.DATA.ON_BAD_IMAGE == "skip"
    goes_on = bool(cfg.MODEL.RESUME) or not trains
    saved = dist.gather_objects(read_verdict(folder, index.fingerprint()) if world.is_main and goes_on else None)[0]
    if saved is not None and (skip or not saved):
        return saved
    splits = splits_of(index)
    num = sum(map(len, splits))
    share = range(num * world.rank // world.world_size, num * (world.rank + 1) // world.world_size)
    with Reporter(folder, world.is_main).counting("check images", len(share)) as progress:
        mine = find_bad(splits, share, max(1, cfg.DATA.NUM_WORKERS), progress)
    bad = [image for part in dist.gather_objects(mine) for image in part]
    if world.is_main and (goes_on or not (folder / "metrics.jsonl").exists()):  # another run's folder is left alone
        save_verdict(folder, index.fingerprint(), num, bad)
    if bad and not skip:
        lines = describe(bad, str(folder / BAD_IMAGES))
        dist.fail(
            "\n".join(
                [
                    f"DATA.ON_BAD_IMAGE error: {len(bad):,} of {num:,} images cannot be decoded; skip leaves them out",
                    *lines,
                ]
            )
        )
    return bad


def read_same_command(
    parser: argparse.ArgumentParser, argv: list[str], world: dist.World, trains: bool = True
) -> tuple[argparse.Namespace, Any]:  # all ranks
    """`read_command`, agreed on: a node with another YAML file, or without DALI, is an error of all."""
    args, cfg = dist.agreed(read_command, parser, argv, world, trains)
    own = {k: v for k, v in flatten(cfg).items() if k not in ("DATA.ROOT", "OUTPUT")}
    dist.agreed(compare_configs, dist.gather_objects(own))
    return args, cfg


def compare_configs(configs: list[dict[str, Any]]) -> None:
    errors = [
        f"{key} {config[key]!r} on rank {r}, {value!r} on rank 0: expected the same config on all ranks"
        for r, config in enumerate(configs)
        for key, value in configs[0].items()
        if config[key] != value
    ]
    if errors:
        raise ValueError("\n".join(errors))


def compare_fingerprints(fingerprints: list[str]) -> None:
    other = [r for r, f in enumerate(fingerprints) if f != fingerprints[0]]
    if other:
        raise ValueError(
            f"DATA.ROOT: ranks {other} see other files or labels than rank 0; expected the same data on all"
        )


def build_plan(cfg: Any, index: DatasetIndex) -> EpochPlan:  # all ranks
    """The plan of all epochs, whose tables the ranks of a node share."""
    return once_per_node(functools.partial(make_plan, cfg, index))


def make_plan(cfg: Any, index: DatasetIndex) -> EpochPlan:
    return EpochPlan(
        index.train.pids,
        batch=cfg.DATA.TRAIN_BATCH,
        num_instances=cfg.DATA.NUM_INSTANCES,
        sampler=cfg.DATA.SAMPLER,
        seed=cfg.SEED,
        height=cfg.DATA.HEIGHT,
        width=cfg.DATA.WIDTH,
        augment=Augment(**{key.lower(): value for key, value in cfg.AUG.items()}),
        camids=index.train.camids,
    )


def build_loader(
    cfg: Any, index: DatasetIndex, plan: EpochPlan, world: dist.World, steps_done: int, reporter: Reporter
) -> TrainLoader:  # all ranks
    """This rank's batches from the one after `steps_done` on, and the cache they come from where one is asked for."""
    epochs_done, step = divmod(steps_done, plan.num_steps)
    how = {
        "pipeline": cfg.DATA.PIPELINE,
        "decode_device": cfg.DATA.DECODE_DEVICE,
        "num_workers": cfg.DATA.NUM_WORKERS,
        "device": world.device,
    }
    began = clock()
    cache, said = build_cache(
        cfg.DATA.CACHE,
        cfg.DATA.CACHE_GB,
        index.train.path,
        len(index.train),
        sizes(plan.augment, plan.height, plan.width),
        functools.partial(open_images, path_of=index.train.path, **how),
        world.device,
        cfg.DATA.CACHE_DEVICE_GB,
    )
    if cfg.DATA.CACHE != "off":
        reporter.say(f"cache     {said}; filled in {clock() - began:.1f} s")
    return TrainLoader(
        index.train.path,
        plan,
        rank=world.rank,
        world_size=world.world_size,
        dtype=image_dtype(cfg),
        cache=cache,
        epoch=1 + epochs_done,
        step=step,
        **how,
    )


def image_dtype(cfg: Any) -> torch.dtype:
    """Images are fp32 under autocast too, which casts them at the first convolution."""
    return torch.float64 if cfg.TRAIN.PRECISION == "fp64" else torch.float32


def build_network(cfg: Any, num_pids: int, world: dist.World) -> ReIDModel:
    """The model on its device, channels last, its batch norms over MODEL.BN_GROUP images of the global batch."""
    m = cfg.MODEL
    rows = classifier_rows(num_pids, m.CLASSIFIER_SHARDED, world.rank, world.world_size)
    cosine = uses_cosine(cfg.LOSS.CLA_LOSS)
    head = {"bnneck": m.HEAD == "bnneck", "pool": m.POOL, "embed_dim": m.EMBED_DIM, "non_local": m.NON_LOCAL}
    options = {"variant": m.IANET.VARIANT, "image_size": (cfg.DATA.HEIGHT, cfg.DATA.WIDTH)}
    sharded = m.CLASSIFIER_SHARDED
    model = build_model(m.NAME, m.FEATURE_DIM, rows, cosine, m.RES4_STRIDE, cfg.SEED, sharded, **head, **options)
    group_batch_norms(model, m.BN_GROUP or cfg.DATA.TRAIN_BATCH)
    if cfg.LOSS.CENTER:
        add_centers(model, num_pids, model.feature_dim, cfg.SEED)
    return model.to(device=world.device, dtype=image_dtype(cfg)).to(memory_format=torch.channels_last)
