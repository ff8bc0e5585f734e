"""What the page of a run shows of an evaluation, beyond its numbers: some queries' ranked lists, confused identities.

Plain values that fit into a small JSON file: the page is made of it without the network, the features and torch.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
import torch

from .data.index import TestSet
from .data.loader import test_batches
from .data.split import Split
from .evaluator import EvalResult, Features, RankedList, ranked_lists
from .models import ReIDModel
from .ranking.further import Names, describe_pairs
from .ranking.protocols import camera_pairs, worst_identities

SHOWN_QUERIES = 6  # of each kind
SHOWN_ANSWERS = 10
EXAMINED_QUERIES = 100  # the worst: over their first answers confused identities are counted
SHOWN_PAIRS = 12


def evaluation_details(
    query: Features,
    gallery: Features,
    result: EvalResult,
    test: TestSet,
    metric: Any,
    seed: int,
    blocks: dict[str, Any] | None = None,
) -> dict[str, Any]:  # all ranks
    """The details of an evaluation on `test`, the same on every rank.

    query, gallery: this rank's features; metric: TEST.DISTANCE; seed: of the choice of random queries, which is the
    same at each evaluation, so that one can follow them; blocks: what `evaluate_further` has found, None: mAP by camera
    pair and the worst identities are found here.
    """
    if blocks is None:
        blocks = pairs_and_identities(query, gallery, result, test, metric)
    chosen = choose_queries(result.ap, seed)
    examined = worst_first(result.ap)[:EXAMINED_QUERIES].tolist()
    wanted = sorted({*examined, *(i for indices in chosen.values() for i in indices)})
    found = {one.query_index: one for one in ranked_lists(query, gallery, wanted, SHOWN_ANSWERS, metric)}
    return {
        "dataset": test.name,
        "label": test.label,
        "distance": metric,
        "num_query": result.num_query,
        "num_gallery": result.num_gallery,
        "num_no_match": result.num_no_match,
        "cmc": [round(float(v), 6) for v in result.cmc],
        "ap": [round(float(v), 4) for v in result.ap if not np.isnan(v)],
        "queries": {kind: [shown_query(found[i], result, test) for i in indices] for kind, indices in chosen.items()},
        "num_examined": len(examined),
        "confused": confused_pairs([found[i] for i in examined], test),
        **blocks,
    }


def pairs_and_identities(
    query: Features, gallery: Features, result: EvalResult, test: TestSet, metric: Any
) -> dict[str, Any]:  # all ranks
    """{'camera_pairs', 'worst_identities'} as in evaluation.json; for the cost of one more ranking."""
    names = Names(test.query.pid_name, test.query.camid_name)
    pairs = camera_pairs(query, gallery, metric)
    worst = worst_identities(test.query.pids, result.ap)
    return {
        **({"camera_pairs": describe_pairs(pairs, names)} if pairs else {}),
        "worst_identities": [{"pid": names.pid(pid), "mAP": value, "num_query": num} for pid, value, num in worst],
    }


def worst_first(ap: np.ndarray) -> np.ndarray:
    """Indices of the queries with a match, by rising AP."""
    with_match = np.flatnonzero(~np.isnan(ap))
    return with_match[np.argsort(ap[with_match], kind="stable")]


def choose_queries(ap: np.ndarray, seed: int, num: int = SHOWN_QUERIES) -> dict[str, list[int]]:
    """{'worst', 'median', 'random'}: indices of `num` queries each, or of as many as have a match.

    ap: (Q,), NaN for a query without a match. The random ones depend on the seed and on which queries have a match.
    """
    order = worst_first(ap)
    start = max(0, (len(order) - num) // 2)
    drawn = np.random.Generator(np.random.Philox(seed)).permutation(np.sort(order))[:num]
    return {
        "worst": order[:num].tolist(),
        "median": order[start : start + num].tolist(),
        "random": np.sort(drawn).tolist(),
    }


def shown_query(found: RankedList, result: EvalResult, test: TestSet) -> dict[str, Any]:
    """A query and its first answers as values: where the images lie, who they show, from which camera."""
    i = found.query_index
    entries = zip(found.gallery_indices.tolist(), found.distances.tolist(), found.is_match.tolist(), strict=True)
    answers = [image(test.gallery, j) | {"distance": round(d, 4), "right": bool(right)} for j, d, right in entries]
    return image(test.query, i) | {"index": i, "ap": round(float(result.ap[i]), 4), "answers": answers}


def image(split: Split, i: int) -> dict[str, str]:
    camera = "" if split.camids is None else split.camid_name(int(split.camids[i]))
    # Absolute, so that the page can be built again from another folder than the training was started in.
    path = os.path.abspath(split.path(i))  # noqa: PTH100 - not what links mean
    return {"path": path, "pid": split.pid_name(int(split.pids[i])), "camera": camera}


def confused_pairs(found: list[RankedList], test: TestSet) -> list[dict[str, Any]]:
    """The pairs of identities of which one was most often answered when the other was asked for.

    'count': wrong answers of the pair among the first answers of `found`, in both directions; 'query' and 'answer':
    the pair's nearest wrong answer, as `image` describes them.
    """
    counts: Counter[tuple[str, str]] = Counter()
    nearest: dict[tuple[str, str], tuple[float, int, int]] = {}
    for one in found:
        asked = test.query.pid_name(int(test.query.pids[one.query_index]))
        for j, distance, right in zip(one.gallery_indices.tolist(), one.distances.tolist(), one.is_match, strict=True):
            if right:
                continue
            first, second = sorted((asked, test.gallery.pid_name(int(test.gallery.pids[j]))))
            counts[first, second] += 1
            here = (distance, one.query_index, j)
            nearest[first, second] = min(nearest.get((first, second), here), here)
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:SHOWN_PAIRS]
    return [
        {
            "pids": list(pair),
            "count": count,
            "query": image(test.query, nearest[pair][1]),
            "answer": image(test.gallery, nearest[pair][2]),
        }
        for pair, count in most
    ]


@torch.no_grad()
def add_activation_maps(
    details: dict[str, Any], model: ReIDModel, test: TestSet, images: dict[str, Any]
) -> None:  # rank 0 only
    """Adds to each of the worst queries 'activation': an (h, w) list of numbers in [0, 1], where the network responds.

    The map is the sum of squares over the channels of the backbone's last feature map, divided by its greatest value
    (Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, sec. 3.1, F^2_sum). It needs no class and
    no gradient. images: how the network's input is made, as `test_batches` takes it. No collective is called: the
    model is in eval mode, where batch norm takes its running statistics; the training flags are restored.
    """
    worst = details["queries"]["worst"]
    indices = np.array([row["index"] for row in worst], np.int64)
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        maps = [model.backbone(x).float().square().sum(1) for x, _ in test_batches(test.path, indices, **images)]
    finally:
        for module, flag in flags:
            module.training = flag
    for row, heat in zip(worst, torch.cat(maps).cpu() if maps else (), strict=True):
        row["activation"] = [[round(v, 3) for v in line] for line in (heat / heat.max().clamp(min=1e-12)).tolist()]
