"""What evaluation as a command finds beside mAP and CMC: re-ranking, expansion, other protocols, ROC, the worst."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import metrics
from ..metrics import EvalResult
from . import expansion, rerank
from .features import Features, Metric, query_labels
from .protocols import CameraPairs, camera_pairs, pool_queries, single_shot, worst_identities
from .roc import CURVE, LEVELS, Roc, roc


@dataclass(frozen=True)
class Wanted:
    """Which of them. single_shot: repeats; details: ROC, camera pairs, worst identities, pooled queries."""

    rerank: rerank.Settings | None = None
    expansion: expansion.Settings | None = None
    single_shot: int = 0
    seed: int = 0
    details: bool = True


@dataclass
class Further:
    """rows: of the table, by what the name of the test set goes on with; settings: of these rows, by the same names;
    blocks: of evaluation.json beside the rows; lines: for the console."""

    rows: dict[str, EvalResult] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocks: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def add(self, name: str, result: EvalResult, **settings: Any) -> None:
        self.rows[name], self.settings[name] = result, settings


@dataclass(frozen=True)
class Names:
    """How a pid and a camid are written."""

    pid: Callable[[int], str] = str
    camid: Callable[[int], str] = str


def evaluate_further(  # all ranks
    query: Features,
    gallery: Features,
    result: EvalResult,
    metric: Metric,
    wanted: Wanted,
    names: Names,
    evaluate: Callable[[Features, Features, Metric], EvalResult],
) -> Further:
    """All that is wanted, the same on every rank. result: of `evaluate`, which is `evaluator.evaluate_features`."""
    found = Further()
    if s := wanted.expansion:
        row = expansion.evaluate_expanded(query, gallery, metric, settings=s)
        found.add("query expansion", row, k=s.k, alpha=s.alpha, gallery=s.gallery)
    if r := wanted.rerank:
        row = rerank.evaluate_reranked(query, gallery, metric, settings=r)
        found.add("re-ranked", row, k1=r.k1, k2=r.k2, weight=r.weight)
    if repeats := wanted.single_shot:
        shots = single_shot(query, gallery, metric, repeats, wanted.seed)
        spread = float(shots.rank1.std())
        found.add("single shot", shots.mean, repeats=repeats, seed=wanted.seed, rank1_std=spread)
        found.lines.append(f"single    {repeats} draws; rank-1 has a standard deviation of {spread:.2%}")
    if wanted.details:
        several = evaluate(pool_queries(query, metric), gallery, metric)
        if several.num_query < result.num_query:
            found.add("multi-query", several)
        found.blocks["roc"] = curve = describe_roc(roc(query, gallery, metric))
        found.lines += roc_lines(curve)
        if pairs := camera_pairs(query, gallery, metric):
            found.blocks["camera_pairs"] = describe_pairs(pairs, names)
            found.lines += pair_lines(pairs, names)
        labels = query_labels(query)
        worst = worst_identities(labels.pids[labels.indices.argsort()], result.ap)
        found.blocks["worst_identities"] = [{"pid": names.pid(p), "mAP": v, "num_query": n} for p, v, n in worst]
        if worst:
            shown = ", ".join(f"{names.pid(p)} ({v:.1%})" for p, v, _ in worst[:5])
            found.lines.append(f"worst     identities by mAP: {shown}")
    return found


def block_of(row: str) -> str:
    """The name in evaluation.json of a row of the table."""
    return row.replace(" ", "_").replace("-", "_")


def describe_roc(counts: Roc) -> dict[str, Any]:
    """The true positive rates at LEVELS with their bounds, and a curve to draw."""
    levels, bounds = counts.tpr(np.array(LEVELS))
    return {
        "num_positive": int(counts.positive.sum()),
        "num_negative": int(counts.negative.sum()),
        "fpr": list(LEVELS),
        "tpr": or_none(levels),
        "bound": or_none(bounds),
        "curve": {"fpr": CURVE.tolist(), "tpr": or_none(counts.tpr(CURVE)[0])},
    }


def roc_lines(curve: dict[str, Any]) -> list[str]:
    if None in curve["tpr"]:
        return []
    rates = ", ".join(f"{t:.1%} at FPR {f:.0e}" for t, f in zip(curve["tpr"], curve["fpr"], strict=True))
    return [f"ROC       TPR {rates.replace('e-0', 'e-')} (exact to {max(curve['bound']):.2%})"]


def describe_pairs(pairs: CameraPairs, names: Names) -> dict[str, Any]:
    return {
        "query_cameras": [names.camid(int(c)) for c in pairs.query_camids],
        "gallery_cameras": [names.camid(int(c)) for c in pairs.gallery_camids],
        "mAP": [or_none(line) for line in pairs.mAP],
    }


def pair_lines(pairs: CameraPairs, names: Names) -> list[str]:
    """The pair of cameras with the lowest mAP and that with the highest."""
    if np.isnan(pairs.mAP).all():
        return []
    shown = []
    for place in (np.nanargmin(pairs.mAP), np.nanargmax(pairs.mAP)):
        a, b = np.unravel_index(place, pairs.mAP.shape)
        cameras = names.camid(int(pairs.query_camids[a])), names.camid(int(pairs.gallery_camids[b]))
        shown.append(f"{pairs.mAP[a, b]:.1%} (camera {cameras[0]} to {cameras[1]})")
    if np.nanmin(pairs.mAP) == np.nanmax(pairs.mAP):
        return [f"cameras   mAP of every camera pair {np.nanmax(pairs.mAP):.1%}"]
    return [f"cameras   mAP by camera pair from {shown[0]} to {shown[1]}"]


def or_none(values: metrics.Floats) -> list[float | None]:
    """JSON has no NaN."""
    return [None if np.isnan(v) else float(v) for v in values]
