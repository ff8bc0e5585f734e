"""What bf16 arithmetic at test and half-precision storage of features do to mAP, on a data set in Market-1501's layout.

    python benchmarks/precision.py --cfg configs/mobilenetv2_ce_triplet.yaml --root DATA --weights FILE

Stored types are compared on the whole test set; bf16 arithmetic, which is slow on most CPUs, on the queries: as queries
against the fp32 gallery, and among themselves (an image is junk to itself, having its own identity and camera).
Everything runs on `--device`, the GPU if there is one. Seconds are CPU seconds on a CPU, and wall seconds, decoding
included, on a GPU, with nothing queued there before and after.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from devices import add_device_flag, choose_device, describe, synchronize

from reid_dist.build import build_network
from reid_dist.config import bare_parser, check_config, load_config, resolve
from reid_dist.data.index import TestSet, build_index
from reid_dist.data.loader import test_batches
from reid_dist.data.split import Split
from reid_dist.evaluator import Features, evaluate_features, extract
from reid_dist.models import ReIDModel
from reid_dist.models.weights import fill, read_weights
from reid_dist.world import World


def main() -> None:
    p = bare_parser("precision")
    p.description, p.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    p.add_argument("--root", required=True)
    p.add_argument("--weights", required=True)
    add_device_flag(p)
    args = p.parse_intermixed_args()
    device = choose_device(args.device)
    cfg = load_config(args)
    check_config(cfg, None, device.type == "cuda")
    resolve(cfg, device.type == "cuda")
    index = build_index("market1501", args.root)
    test = index.tests[0]
    model = build_network(cfg, index.num_pids, World(0, 0, 1, device))
    fill(model, read_weights(args.weights, "--weights"), args.weights, whole=True)
    num_query = len(test.query)

    feats, plain_s = extract_first(model, test, num_query + len(test.gallery), cfg, None, device)
    query, gallery = with_labels(test.query, feats[:num_query]), with_labels(test.gallery, feats[num_query:])
    base = evaluate_features(query, gallery, cfg.TEST.DISTANCE)
    print(
        f"{cfg.MODEL.NAME}, {cfg.DATA.HEIGHT}x{cfg.DATA.WIDTH}, {num_query} x {len(test.gallery)} images; "
        f"torch {torch.__version__}, {describe(device)}\nfp32: mAP {base.mAP:.4%}, rank1 {base.rank1:.4%}",
        flush=True,
    )
    for dtype in (torch.float16, torch.bfloat16):
        both = evaluate_features(stored(query, dtype), stored(gallery, dtype), cfg.TEST.DISTANCE)
        one = evaluate_features(query, stored(gallery, dtype), cfg.TEST.DISTANCE)
        print(
            f"kept as {dtype}: mAP {both.mAP - base.mAP:+.4%}, rank1 {both.rank1 - base.rank1:+.4%}; "
            f"the gallery alone: mAP {one.mAP - base.mAP:+.4%}",
            flush=True,
        )
    among = evaluate_features(query, query, cfg.TEST.DISTANCE)
    feats, half_s = extract_first(model, test, num_query, cfg, torch.bfloat16, device)
    half = with_labels(test.query, feats)
    asked = evaluate_features(half, gallery, cfg.TEST.DISTANCE)
    both = evaluate_features(half, half, cfg.TEST.DISTANCE)
    error = ((feats - query.feats).norm(dim=1) / query.feats.norm(dim=1)).median()
    print(
        f"bf16 arithmetic: features differ by {error:.2%} (median); queries alone: mAP {asked.mAP - base.mAP:+.4%}; "
        f"queries among themselves: mAP {among.mAP:.4%} {both.mAP - among.mAP:+.4%}\n"
        f"{'CPU' if device.type == 'cpu' else 'wall'} seconds per image and its mirror image: "
        f"fp32 {plain_s:.4f}, bf16 {half_s:.4f}"
    )


def extract_first(
    model: ReIDModel, test: TestSet, num: int, cfg, autocast: torch.dtype | None, device: torch.device
) -> tuple[torch.Tensor, float]:
    """(feats (num, D) of the first images, seconds per image: of the CPU, or on a GPU wall seconds)."""
    batches = test_batches(
        test.path,
        np.arange(num),
        batch=cfg.DATA.TEST_BATCH,
        height=cfg.DATA.HEIGHT,
        width=cfg.DATA.WIDTH,
        device=device,
        dtype=torch.float32,
        pipeline=cfg.DATA.PIPELINE,
        decode_device=cfg.DATA.DECODE_DEVICE,
        num_workers=cfg.DATA.NUM_WORKERS,
    )
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    began = clock()
    feats, _ = extract(model, batches, num, model.feature_dim, device, autocast)
    synchronize(device)
    return feats, (clock() - began) / num


def with_labels(split: Split, feats: torch.Tensor) -> Features:
    labels = (torch.from_numpy(split.pids), torch.from_numpy(split.camids), torch.arange(len(split)))
    return Features(feats, *(label.to(feats.device) for label in labels))


def stored(rows: Features, dtype: torch.dtype) -> Features:
    return Features(rows.feats.to(dtype), rows.pids, rows.camids, rows.indices)


if __name__ == "__main__":
    main()
