"""Reading and checking of YAML files and KEY VALUE pairs; the keys themselves are in keys.py.

The keys of Simple-ReID keep their names, defaults and meanings, so its YAML files load unchanged. A config defines the
mathematics of a run; world size, hardware and launcher are not in it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from .batch_rules import check_batch
from .keys import _C, AT_LEAST, CHOICES, FREE_ON_RESUME


def defaults() -> CfgNode:
    """A fresh copy of all keys with their defaults."""
    return _C.clone()


def flatten(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'TRAIN': {'LR': 1}} -> {'TRAIN.LR': 1}."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def bare_parser(prog: str, description: str = "") -> argparse.ArgumentParser:
    """A config file and KEY VALUE pairs, as every command takes them; unknown flags are errors."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:  # raised, so that all ranks can agree on it before they exit
            raise ValueError(f"command line: {message}; expected the flags of --help and KEY VALUE pairs")

    p = Parser(
        prog=f"python -m reid_dist.{prog}",
        description=description,
        epilog="Every config key with its default and meaning: docs/config.md.",
        allow_abbrev=False,
    )
    p.add_argument("--cfg", metavar="FILE", help="YAML file with config keys")
    p.add_argument("opts", nargs="*", metavar="KEY VALUE", help="any config keys, such as TRAIN.MAX_EPOCH 20")
    return p


def parser(prog: str, description: str = "") -> argparse.ArgumentParser:
    """The flags that the commands which read a data set share."""
    p = bare_parser(prog, description)
    p.add_argument("--root", help="folder of the data set (DATA.ROOT)")
    p.add_argument("--dataset", help="name of the data set (DATA.DATASET): market1501, csv, folder, ...; docs/data.md")
    p.add_argument("--output", help="where runs are written (OUTPUT)")
    p.add_argument("--tag", help="name of this run (TAG)")
    p.add_argument("--gpu", help="accepted for Simple-ReID's command lines; has no effect")
    return p


def load_config(args: argparse.Namespace, saved: str = "") -> CfgNode:
    """Defaults, then the YAML file, then KEY VALUE pairs, then flags. Raises one ValueError with a line per error.

    saved: a checkpoint's config (YAML), of which only what makes the network and its images counts, after the defaults.
    """
    cfg = defaults()
    network = {k: v for k, v in flatten(yaml.safe_load(saved) or {}).items() if describes_network(k)}
    errors = merge(cfg, network.items(), " in the checkpoint's config")
    if args.cfg is not None:
        errors += merge(cfg, read_yaml(args.cfg).items(), f" in {args.cfg}")
    if len(args.opts) % 2:
        errors.append(f"command line: {args.opts[-1]!r} has no partner; expected KEY VALUE pairs")
    errors += merge(cfg, zip(args.opts[::2], args.opts[1::2], strict=False), " on the command line")
    flags = {"root": "DATA.ROOT", "dataset": "DATA.DATASET", "output": "OUTPUT", "tag": "TAG", "gpu": "GPU"}
    flags |= {"resume": "MODEL.RESUME", "eval": "EVAL_MODE"}
    given = [
        (key, getattr(args, name)) for name, key in flags.items() if getattr(args, name, None) not in (None, False)
    ]
    errors += merge(cfg, given, " on the command line")
    if errors:
        raise ValueError("\n".join(errors))
    return cfg


def describes_network(key: str) -> bool:
    """Whether a network that is used, and not trained, depends on the key."""
    training = ("MODEL.RESUME", "MODEL.PRETRAINED", "MODEL.BN_GROUP", "MODEL.CLASSIFIER_SHARDED")
    return (key.startswith("MODEL.") and key not in training) or key in ("DATA.HEIGHT", "DATA.WIDTH")


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """{'TRAIN.MAX_EPOCH': 60, ...} from a file of nested keys."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--cfg {str(path)!r}: {error.strerror}; expected a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--cfg {str(path)!r}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree or {}, dict):
        raise ValueError(f"--cfg {str(path)!r}: holds a {type(tree).__name__}; expected nested keys")
    return flatten(tree or {})


def merge(cfg: CfgNode, items: Iterable[tuple[str, Any]], where: str) -> list[str]:
    """Sets the keys it can, returns a message for each that it cannot."""
    known = flatten(_C)
    errors = []
    for key, value in items:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "reid_dist/keys.py has them all"
            errors.append(f"{key} {value!r}{where}: unknown key; {hint}")
            continue
        if isinstance(value, bool) and "off" in CHOICES.get(key, ()):
            value = "on" if value else "off"  # YAML reads on and off without quotes as true and false
        try:
            set_key(cfg, key, coerce(value, known[key]))
        except ValueError as error:
            errors.append(f"{key} {value!r}{where}: expected {error}")
    return errors


def set_key(cfg: CfgNode, key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for name in parents:
        cfg = cfg[name]
    cfg[leaf] = value


def coerce(value: Any, default: Any) -> Any:
    """`value` as the default's type. Widens only: an int where a float is due, a number where a string is.

    Text is read as the type that is due ('16' as 16.0, 'true' as True), because the command line has nothing else and
    YAML reads 3e-4 as text. Raises ValueError with what was expected.
    """
    if isinstance(default, str):
        if value is None:
            return ""
        if isinstance(value, (str, int, float)):
            return str(value)
        raise ValueError("text")
    if isinstance(value, str):
        text = value.strip()
        try:
            value = {"true": True, "false": False}[text.lower()]
        except KeyError:
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(text)
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise ValueError("true or false")
    if isinstance(default, (list, tuple)):
        return coerce_list(value, default)
    if isinstance(value, bool):
        raise ValueError("a number")
    if isinstance(default, int):
        if isinstance(value, int):
            return value
        raise ValueError("an integer")
    if isinstance(value, (int, float)):
        return float(value)
    raise ValueError("a number")


def coerce_list(value: Any, default: Sequence[Any]) -> list[Any]:
    """A list of integers, or of names where the default is empty; text may leave out the quotes: [a, b]."""
    if default:
        if isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
            return list(value)
        raise ValueError("a list of integers such as [20, 40]")
    if isinstance(value, str):
        value = [name.strip() for name in value.strip().strip("[]").split(",") if name.strip()]
    if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        return list(value)
    raise ValueError("a list of names such as [market1501, msmt17]")


def check_config(cfg: CfgNode, world_size: int | None, cuda: bool) -> None:
    """Raises one ValueError with a line for every impossible value or combination: key, value, what was expected.

    world_size: of the ranks that are to train; None where nothing is trained, and no batch has to be shared out.
    """
    from .data.augment import Augment
    from .data.index import DATASETS
    from .losses import CLASSIFICATION, PAIRWISE
    from .models import MODELS

    flat = flatten(cfg)
    choices = CHOICES | {
        "LOSS.CLA_LOSS": tuple(CLASSIFICATION),
        "LOSS.PAIR_LOSS": tuple(PAIRWISE),
    }
    errors = [
        f"{k} {flat[k]!r}: expected one of {', '.join(map(str, c))}" for k, c in choices.items() if flat[k] not in c
    ]
    errors += [f"{k} {flat[k]!r}: expected at least {least}" for k, least in AT_LEAST.items() if not flat[k] >= least]
    augment = Augment(**{key.lower(): value for key, value in cfg.AUG.items()})
    errors += [f"AUG.{name.upper()} {value!r}: expected {expected}" for name, value, expected in augment.errors()]
    for key, names in (("DATA.DATASET", cfg.DATA.DATASET.split("+")), ("TEST.DATASETS", cfg.TEST.DATASETS)):
        if not set(names) <= set(DATASETS) or len(set(names)) < len(names):
            joined = ", or several joined by +" if key == "DATA.DATASET" else ""
            errors.append(f"{key} {flat[key]!r}: expected one of {', '.join(DATASETS)}{joined}, each once")
    if cfg.MODEL.NAME not in MODELS and not cfg.MODEL.NAME.startswith("timm/"):
        errors.append(f"MODEL.NAME {cfg.MODEL.NAME!r}: expected one of {', '.join(MODELS)}, or timm/<name>")
    steps = cfg.TRAIN.LR_SCHEDULER.STEPSIZE
    if any(b <= a for a, b in zip([0, *steps], steps, strict=False)):
        errors.append(f"TRAIN.LR_SCHEDULER.STEPSIZE {steps}: expected rising epochs, from 1 on")
    if not cfg.TEST.RERANK_LAMBDA <= 1:
        errors.append(f"TEST.RERANK_LAMBDA {cfg.TEST.RERANK_LAMBDA}: expected a share, 0 to 1")
    errors += precision_errors(cfg, cuda)
    if not cfg.TRAIN.EMA < 1:
        errors.append(f"TRAIN.EMA {cfg.TRAIN.EMA}: expected less than 1, such as 0.999, or 0 for none")
    cosine = cfg.TRAIN.LR_SCHEDULER
    if cosine.NAME == "cosine" and (cosine.END_EPOCH or cfg.TRAIN.MAX_EPOCH) <= cosine.FLAT_EPOCHS:
        errors.append(
            f"TRAIN.LR_SCHEDULER.FLAT_EPOCHS {cosine.FLAT_EPOCHS}: expected less than the "
            f"{cosine.END_EPOCH or cfg.TRAIN.MAX_EPOCH} epochs until END_LR"
        )
    if cfg.TRAIN.START_EPOCH >= cfg.TRAIN.MAX_EPOCH:
        errors.append(
            f"TRAIN.START_EPOCH {cfg.TRAIN.START_EPOCH}: expected less than TRAIN.MAX_EPOCH {cfg.TRAIN.MAX_EPOCH}"
        )
    for part, name in (("TAG", cfg.TAG), ("DATA.DATASET", cfg.DATA.DATASET)):
        if not name or name in (".", "..") or set(name) & set("/\\\0"):
            errors.append(f"{part} {name!r}: expected a name that can be a folder")
    if cfg.MODEL.CLASSIFIER_SHARDED and cfg.MODEL.HEAD != "simple":
        # The gather carries the pair loss's features, and the shards need them after the batch norm.
        errors.append(f"MODEL.CLASSIFIER_SHARDED True with MODEL.HEAD {cfg.MODEL.HEAD!r}: expected simple")
    if cfg.MODEL.CLASSIFIER_SHARDED and not cfg.LOSS.GATHER:
        errors.append("MODEL.CLASSIFIER_SHARDED True with LOSS.GATHER False: expected LOSS.GATHER True")
    if not errors and world_size is not None:
        errors = check_batch(cfg, world_size)
    if errors:
        raise ValueError("\n".join(errors))


def precision_errors(cfg: CfgNode, cuda: bool) -> list[str]:
    """A line for every precision that cannot be had on this machine or with another key's value."""
    train, test, errors = cfg.TRAIN.PRECISION, cfg.TEST.PRECISION, []
    if train == "fp16" and not cuda:
        errors.append("TRAIN.PRECISION 'fp16': expected bf16, fp32 or fp64 on a machine without a GPU")
    if train == "fp16" and cfg.MODEL.CLASSIFIER_SHARDED:
        # An overflow in one rank's rows would make that rank alone skip the step.
        errors.append("MODEL.CLASSIFIER_SHARDED True with TRAIN.PRECISION 'fp16': expected bf16, tf32, fp32 or fp64")
    if train == "fp64" and cfg.TRAIN.CUDA_GRAPH == "on":
        # The learning rate that a graph reads is a tensor in fp32.
        errors.append("TRAIN.CUDA_GRAPH 'on' with TRAIN.PRECISION 'fp64': expected off")
    if test == "fp16" and not cuda:
        errors.append("TEST.PRECISION 'fp16': expected bf16 or fp32 on a machine without a GPU")
    if test and train == "fp64":
        errors.append(f"TEST.PRECISION {test!r} with TRAIN.PRECISION 'fp64': expected ''")
    return errors


def resolve(cfg: CfgNode, cuda: bool) -> None:
    """Replaces every 'auto' and '' that stands for a choice of this machine by the choice, so that it is on record."""
    import torch

    from .data.pipeline import resolve as resolve_pipeline

    device = torch.device("cuda" if cuda else "cpu")
    cfg.DATA.PIPELINE, cfg.DATA.DECODE_DEVICE = resolve_pipeline(cfg.DATA.PIPELINE, cfg.DATA.DECODE_DEVICE, device)
    cfg.OUTPUT = cfg.OUTPUT or "./runs"
    schedule = cfg.TRAIN.LR_SCHEDULER
    if schedule.NAME == "cosine":
        schedule.END_EPOCH = schedule.END_EPOCH or cfg.TRAIN.MAX_EPOCH


def changed_keys(saved: str, cfg: CfgNode) -> list[str]:
    """'KEY saved -> now' for every key that defines the mathematics and differs from a checkpoint's config (YAML).

    A key that the checkpoint's version did not have yet counts as the key's default.
    """
    old, new = flatten(_C) | flatten(yaml.safe_load(saved)), flatten(cfg)
    keys = [k for k in new if k not in FREE_ON_RESUME and old[k] != new[k]]
    return [f"{k} {old[k]!r} -> {new[k]!r}" for k in keys]


def run_folder(cfg: CfgNode) -> Path:
    """Where this run's files are: OUTPUT/DATASET/TAG."""
    return Path(cfg.OUTPUT or "./runs") / cfg.DATA.DATASET / cfg.TAG
