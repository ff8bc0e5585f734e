"""Several runs side by side on one page: the config keys in which they differ, their results, their curves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from ..config import defaults, flatten
from ..files import write_atomic
from ..keys import FREE_ON_RESUME
from .console import METRICS, best_of
from .markup import escape, page, per_cent, table
from .page import column, series, time_axis
from .plots import Line, curves, is_wide
from .results import PART_OF_THE_ROW
from .run import PAGE, Run

CURVES: tuple[tuple[str, str, dict[str, bool]], ...] = (
    ("loss", "Loss", {}),
    ("loss_cla", "Classification loss", {}),
    ("loss_pair", "Pair loss", {}),
    ("acc", "Accuracy of the classifier", {"percent": True}),
    ("lr", "Learning rate", {"zero": True}),
    ("images_per_s", "Images a second", {"zero": True}),
    ("data_wait", "Share of time that waits for images", {"percent": True, "zero": True}),
)
UNSET = "not set"


def write_comparison(runs: list[Run], file: Path) -> Path:
    """Writes the page, whole or not at all; returns where."""
    text = build_comparison(runs, file.parent)
    write_atomic(file, lambda part: part.write_text(text, encoding="utf-8"))
    return file


def build_comparison(runs: list[Run], beside: Path) -> str:
    """The HTML of the page. beside: the folder it will lie in, where its links to the runs' own pages begin."""
    names = short_names(runs)
    links = []
    for name, run in zip(names, runs, strict=True):
        target = quote(Path(os.path.relpath(run.folder / PAGE, beside)).as_posix())
        links.append(f'<a href="{target}">{escape(name)}</a>')
    head = f"<h1>{len(runs)} runs compared</h1><p>{' '.join(links)}</p>"
    sections = [
        ("config", "Where they differ", differences(names, runs)),
        ("results", "Results", results(names, runs)),
        ("quality", "Evaluations", quality(names, runs)),
        ("curves", "Training", training(names, runs)),
        ("environment", "Environment", environment(names, runs)),
    ]
    return page("Comparison: reid_dist", sections, head)


def short_names(runs: list[Run]) -> list[str]:
    """The folders' names, with as many of the folders above as it takes to tell them apart."""
    paths = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return names


def differences(names: list[str], runs: list[Run]) -> str:
    """Keys that differ; first those that define the mathematics."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    # Where a run lies and what it is called is seen above already.
    keys = [key for key in keys if key not in ("TAG", "OUTPUT", "MODEL.RESUME")]
    configs = [whole_config(run) for run in runs]
    differing = [key for key in keys if len({repr(config.get(key, UNSET)) for config in configs}) > 1]
    differing.sort(key=lambda key: key in FREE_ON_RESUME and key not in (*PART_OF_THE_ROW, "MODEL.PRETRAINED"))
    if not differing:
        return "<p>Their configs are the same.</p>"
    rows = [[key, *(config.get(key, UNSET) for config in configs)] for key in differing]
    same = len(keys) - len(differing)
    caption = f"Keys that differ, those that define the mathematics first; {same} others are the same"
    return table(["key", *names], rows, caption, text=True)


def whole_config(run: Run) -> dict[str, Any]:
    """A run's config; a key that was not there yet when it was made has its default, which changes nothing."""
    return flatten(defaults()) | run.config if run.config else {}


def results(names: list[str], runs: list[Run]) -> str:
    """The last and the best evaluation of each run on each test set; the greatest value of a column is marked."""
    rows: list[list[Any]] = []
    for kind in ("last", "best"):
        for name, run in zip(names, runs, strict=True):
            for test_set, events in series(run).items():
                metric = run.config.get("TEST.BEST_METRIC", "rank1")
                e = events[-1] if kind == "last" else best_of(events, metric)
                rows.append([name, test_set, f"{kind}, epoch {e['epoch']}", *(e[m] for m in METRICS)])
    if not rows:
        return "<p>No evaluation yet.</p>"
    styles: dict[tuple[int, int], str] = {}
    for test_set, kind in {(row[1], row[2].partition(",")[0]) for row in rows}:
        group = [i for i, row in enumerate(rows) if row[1] == test_set and row[2].startswith(kind)]
        for j in range(3, 3 + len(METRICS)):
            greatest = max(rows[i][j] for i in group)
            styles |= {(i, j): "font-weight: bold" for i in group if rows[i][j] == greatest and len(group) > 1}
    shown = [[*row[:3], *(per_cent(v) for v in row[3:])] for row in rows]
    caption = "Bold: the greatest of a test set"
    return table(["run", "test set", "evaluation", *METRICS], shown, caption, styles=styles)


def quality(names: list[str], runs: list[Run]) -> str:
    """mAP and rank-1 over epochs, a plot for each test set."""
    plots = []
    for test_set in dict.fromkeys(name for run in runs for name in series(run)):
        for metric in ("mAP", "rank1"):
            lines = [
                Line(name, column(events, "epoch"), column(events, metric), i)
                for i, (name, run) in enumerate(zip(names, runs, strict=True))
                if (events := series(run).get(test_set))
            ]
            plots.append(curves(f"{metric} on {test_set}", lines, "epoch", percent=True, markers=True))
    return f'<div class="plots">{"".join(plots)}</div>' if any(plots) else ""


def training(names: list[str], runs: list[Run]) -> str:
    axes = [time_axis(run) for run in runs]
    if len({label for _, label in axes}) > 1:  # the length of an epoch is not known of all
        axes = [(column(run.train, "step"), "step") for run in runs]
    plots = []
    for key, title, style in CURVES:
        lines = [
            Line(name, x, column(run.train, key), i)
            for i, (name, run, (x, _)) in enumerate(zip(names, runs, axes, strict=True))
        ]
        log = key == "lr" and is_wide(np.concatenate([line.y for line in lines]))
        plots.append(curves(title, lines, axes[0][1], log=log, **style))
    return f'<div class="plots">{"".join(plots)}</div>' if any(plots) else ""


def environment(names: list[str], runs: list[Run]) -> str:
    rows = []
    for name, run in zip(names, runs, strict=True):
        s: dict[str, Any] = run.starts[-1] if run.starts else {}
        versions = s.get("versions", {})
        rows.append(
            [name, s.get("world_size", ""), s.get("device", ""), s.get("revision", ""), versions.get("torch", "")]
        )
    return table(["run", "ranks", "device", "revision", "torch"], rows, "The last start of each", text=True)
