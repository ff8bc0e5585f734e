"""Evaluation: extract the test images on all ranks, rank them, print and write the table.

python -m reid_dist.evaluate --cfg configs/res50_ce_triplet.yaml --weights runs/.../best.pt --root DATA
python -m reid_dist.evaluate --features-query q.npz --features-gallery g.npz     # features made elsewhere
torchrun --nproc_per_node=4 -m reid_dist.evaluate ...                            # either, on 4 ranks
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import dist
from .build import build_network, image_dtype, read_index, read_same_command
from .config import parser, run_folder
from .data.index import DatasetIndex, TestSet
from .data.loader import test_batches
from .data.split import Split
from .details import add_activation_maps, evaluation_details
from .evaluator import EvalResult, Features, evaluate_features, extract, ranked_lists, shard
from .models import ReIDModel
from .models.weights import fill, read_weights
from .precision import AUTOCAST as HALF
from .precision import fp32_products, set_determinism
from .ranking import expansion, rerank
from .ranking.further import Further, Names, Wanted, block_of, evaluate_further
from .ranking.pair import Side, read_pair
from .report import PageBuilder, Reporter, draw_ranked_lists, result_numbers, software, table
from .share import once_per_node
from .summary import after_evaluation, device_name

SHOWN_QUERIES = 12
SHOWN_ANSWERS = 10
# Repeats where a test set's protocol has one gallery image of each identity.
SINGLE_SHOTS = 100


def main(world: dist.World, argv: list[str]) -> None:  # all ranks
    args, cfg = read_same_command(command_line(), argv, world, trains=False)
    dist.agreed(set_determinism, cfg.TRAIN.DETERMINISTIC == "on", world.device)
    if args.features_query or args.features_gallery:
        dist.agreed(check_features_flags, args)
        evaluate_files(args.features_query, args.features_gallery, cfg, world)
        return
    if args.weights is None:
        dist.fail("command line: expected --weights FILE, or --features-query FILE with --features-gallery FILE")
    index = read_index(cfg, world, trains=False)
    evaluate_file(args.weights, "--weights", index, cfg, world)


def evaluate_file(path: str, flag: str, index: DatasetIndex, cfg: Any, world: dist.World) -> None:  # all ranks
    """Evaluates the weights in a file, of this code or another; `flag` is what named it."""
    model = dist.agreed(build_network, cfg, index.num_pids, world)
    notes = dist.agreed(lambda: fill(model, read_weights(path, flag), f"{flag} {path!r}", whole=True))
    evaluate_once(model, index, cfg, world, notes, path)


@fp32_products("fp32")  # rankings; `evaluate` extracts the features in TEST.PRECISION
def evaluate_once(
    model: ReIDModel, index: DatasetIndex, cfg: Any, world: dist.World, notes: list[str], weights: str = ""
) -> None:  # all ranks
    """Evaluates on every test set, prints the table, writes evaluation.json, the ranked lists of the first, the page.

    weights: the file they came from, where there is one.
    """
    reporter = Reporter(run_folder(cfg), world.is_main, page=PageBuilder(run_folder(cfg)) if cfg.REPORT.PAGE else None)
    dist.agreed(reporter.make_folder)
    for line in [*notes, *(f"note      {note}" for note in index.notes)]:
        reporter.say(line)
    results, details, picture = {}, [], ""
    for test in index.tests:
        result, query, gallery = evaluate(model, test, cfg, world, reporter)
        names = Names(test.query.pid_name, test.query.camid_name)
        wanted = wanted_of(cfg, cfg.TEST.SINGLE_SHOT or SINGLE_SHOTS * test.single_shot)
        further = evaluate_further(query, gallery, result, cfg.TEST.DISTANCE, wanted, names, evaluate_features)
        results[test.label] = (test.name, result, further)
        picture = picture or show_ranked_lists(query, gallery, result, test, cfg, world, reporter)
        if cfg.REPORT.PAGE:
            found = evaluation_details(query, gallery, result, test, cfg.TEST.DISTANCE, cfg.SEED, further.blocks)
            rows = {name: result_numbers(row) for name, row in further.rows.items()}
            details.append(found | result_numbers(result) | {"rows": rows})
            show_activation(details[-1], model, test, cfg, world)
    say_and_save(results, reporter)
    reporter.say(f"ranked lists: {picture}\nnumbers:      {reporter.folder / 'evaluation.json'}")
    if details:
        start = {"world_size": world.world_size, "device": device_name(world)} | software()
        weights_of = weights or cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED
        reporter.show(details, {"by": "evaluation", "weights": weights_of, "start": start})
    reporter.close()
    for line in after_evaluation(cfg, weights):
        reporter.say(line)


def wanted_of(cfg: Any, single_shot: int) -> Wanted:
    t = cfg.TEST
    return Wanted(
        rerank=rerank.Settings(t.RERANK_K1, t.RERANK_K2, t.RERANK_LAMBDA) if t.RERANK else None,
        expansion=expansion.Settings(t.EXPAND_K, t.EXPAND_ALPHA, t.EXPAND == "both") if t.EXPAND != "off" else None,
        single_shot=single_shot,
        seed=cfg.SEED,
        details=t.DETAILS,
    )


def say_and_save(results: dict[str, tuple[str, EvalResult, Further]], reporter: Reporter) -> None:
    """The table, what the details say, and evaluation.json. results: (name, result, further) by label."""
    rows: dict[str, Any] = {}
    for label, (_, result, further) in results.items():
        rows |= {label: vars(result)} | {f"{label}, {name}": vars(row) for name, row in further.rows.items()}
    reporter.say(table(rows))
    by_set = {}
    for label, (name, result, further) in results.items():
        if len(results) > 1 and further.lines:
            reporter.say(f"{label}:")
        for line in further.lines:
            reporter.say(line)
        more = {block_of(row): result_numbers(found) | further.settings[row] for row, found in further.rows.items()}
        by_set[name] = result_numbers(result) | more | further.blocks
    reporter.save_result(next(iter(by_set.values())) | {"tests": by_set}, "evaluation.json")


def evaluate(
    model: ReIDModel, test: TestSet, cfg: Any, world: dist.World, reporter: Reporter
) -> tuple[EvalResult, Features, Features]:  # all ranks
    """(result, this rank's query features, this rank's gallery features) of a test set.

    The result's seconds are those of the ranking; extraction shows its own progress.
    """
    num_query, num_gallery = len(test.query), len(test.gallery)
    mine = {
        "query": np.array(shard(num_query, world.rank, world.world_size), np.int64),
        "gallery": num_query + np.array(shard(num_gallery, world.rank, world.world_size), np.int64),
    }
    images = np.concatenate(list(mine.values()))
    batches = test_batches(test.path, images, **how_images_are_made(cfg, world))
    precision = cfg.TEST.PRECISION or cfg.TRAIN.PRECISION
    autocast, storage = HALF.get(precision), HALF.get(cfg.TEST.FEATURE_DTYPE)
    with fp32_products(precision), reporter.counting("extract", len(images)) as progress:
        feats, rows = extract(model, batches, len(images), model.feature_dim, world.device, autocast, progress, storage)

    def part(split: Split, start: int) -> Features:
        here = (rows >= start) & (rows < start + len(split))
        taken = (rows[here] - start).cpu().numpy()
        pids = torch.from_numpy(split.pids[taken]).to(feats.device)
        camids = None if split.camids is None else torch.from_numpy(split.camids[taken]).to(feats.device)
        return Features(feats[here], pids, camids, rows[here] - start)

    query, gallery = part(test.query, 0), part(test.gallery, num_query)
    return evaluate_features(query, gallery, cfg.TEST.DISTANCE), query, gallery


def how_images_are_made(cfg: Any, world: dist.World) -> dict[str, Any]:
    """The keywords of `test_batches`."""
    return {
        "batch": cfg.DATA.TEST_BATCH,
        "height": cfg.DATA.HEIGHT,
        "width": cfg.DATA.WIDTH,
        "device": world.device,
        "dtype": image_dtype(cfg),
        "pipeline": cfg.DATA.PIPELINE,
        "decode_device": cfg.DATA.DECODE_DEVICE,
        "num_workers": cfg.DATA.NUM_WORKERS,
    }


def show_activation(details: dict[str, Any], model: ReIDModel, test: TestSet, cfg: Any, world: dist.World) -> None:
    """Adds activation maps to an evaluation's details where they are asked for; on rank 0, without a collective."""
    if cfg.REPORT.ACTIVATION_MAPS and world.is_main:
        add_activation_maps(details, model, test, how_images_are_made(cfg, world))


def show_ranked_lists(
    query: Features,
    gallery: Features,
    result: EvalResult,
    test: TestSet,
    cfg: Any,
    world: dist.World,
    reporter: Reporter,
) -> str:  # all ranks
    """Draws queries from the worst to the best with their first answers; returns where the picture lies."""
    with_match = np.flatnonzero(~np.isnan(result.ap))
    by_ap = with_match[np.argsort(result.ap[with_match], kind="stable")]
    chosen = by_ap[np.unique(np.linspace(0, len(by_ap) - 1, SHOWN_QUERIES).astype(int))] if len(by_ap) else by_ap
    lists = ranked_lists(query, gallery, chosen.tolist(), SHOWN_ANSWERS, cfg.TEST.DISTANCE)
    file = reporter.folder / "ranked_lists.png"
    if world.is_main and lists:
        q, g = test.query, test.gallery
        rows = []
        for found in lists:
            i = found.query_index
            entries = zip(found.gallery_indices, found.distances, found.is_match, strict=True)
            answers = [(g.path(j), float(d), bool(right)) for j, d, right in entries]
            rows.append((q.path(i), q.title(i), float(result.ap[i]), answers))
        draw_ranked_lists(file, rows, "queries from the worst to the best: right answers green, wrong ones red")
    return str(file)


def check_features_flags(args: argparse.Namespace) -> None:
    if not args.features_query or not args.features_gallery:
        raise ValueError("command line: expected --features-query and --features-gallery, both of them")
    if args.weights:
        raise ValueError(f"--weights {args.weights!r} with --features-query: expected one of them")


@fp32_products("fp32")
def evaluate_files(query_file: str, gallery_file: str, cfg: Any, world: dist.World) -> None:  # all ranks
    """Evaluates features that were made elsewhere; the table, and evaluation.json in OUTPUT/features/<query's name>."""
    pair = once_per_node(lambda: read_pair(query_file, gallery_file))
    query, gallery = (side_of(side, cfg, world) for side in (pair.query, pair.gallery))
    label = Path(query_file).stem
    reporter = Reporter(Path(cfg.OUTPUT) / "features" / label, world.is_main)
    dist.agreed(reporter.make_folder)
    result = dist.agreed(evaluate_features, query, gallery, cfg.TEST.DISTANCE)
    if pair.query.camids is None:
        reporter.say("note      no camera ids, so nothing is junk")
    wanted = wanted_of(cfg, cfg.TEST.SINGLE_SHOT)
    further = evaluate_further(query, gallery, result, cfg.TEST.DISTANCE, wanted, pair.names, evaluate_features)
    say_and_save({label: (label, result, further)}, reporter)
    reporter.say(f"numbers:      {reporter.folder / 'evaluation.json'}")


def side_of(side: Side, cfg: Any, world: dist.World) -> Features:
    """This rank's share of a file's rows, on its device."""
    share = shard(len(side.feats), world.rank, world.world_size)
    rows = slice(share.start, share.stop)
    feats = torch.tensor(side.feats[rows], dtype=HALF.get(cfg.TEST.FEATURE_DTYPE), device=world.device)
    pids = torch.tensor(side.pids[rows], device=world.device)
    camids = None if side.camids is None else torch.tensor(side.camids[rows], device=world.device)
    return Features(feats, pids, camids, torch.arange(share.start, share.stop, device=world.device))


def command_line() -> argparse.ArgumentParser:
    p = parser("evaluate", "Evaluates a trained network on a data set, or features made elsewhere.")
    p.add_argument("--weights", metavar="FILE", help="a checkpoint, or backbone weights")
    p.add_argument("--features-query", metavar="FILE", help="query features, .npz or .parquet, in place of --weights")
    p.add_argument("--features-gallery", metavar="FILE", help="gallery features, likewise")
    return p


if __name__ == "__main__":
    dist.run_main(lambda world: main(world, sys.argv[1:]))
