"""The page of one run, report/index.html: results, curves, ranked lists, confusions, config, on what it ran."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomic
from .console import METRICS, best_of
from .markup import escape, numbers, page, per_cent, person, table
from .plots import Line, curves, histogram, is_wide
from .run import PAGE, Run

# TEST.DISTANCE, as the numbers under an image are made of it.
DISTANCES = {"cosine": "minus the cosine, from -1 (equal) to 1", "euclidean": "squared Euclidean"}
KINDS = {
    "worst": "the worst queries",
    "median": "queries in the middle",
    "random": "queries drawn at random, the same at each evaluation",
}


def write_page(run: Run) -> Path:
    """Writes the run's page, whole or not at all; returns where."""
    file = run.folder / PAGE
    file.parent.mkdir(exist_ok=True)
    text = build_page(run)
    with alone_in(file.parent):
        write_atomic(file, lambda part: part.write_text(text, encoding="utf-8"))
    return file


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits while another process is in here for the same folder: a training, or somebody who builds the page."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def build_page(run: Run) -> str:
    """The HTML of the run's page."""
    sets = run.details.get("sets", [])
    several = len(sets) > 1
    sections = [("results", "Results", results(run)), ("curves", "Training", training_curves(run))]
    for i, details in enumerate(sets):
        on = f" on {details['label']}" if several else ""
        sections += [
            (f"evaluation-{i}", f"Evaluation{on}", evaluation(run, details)),
            (f"lists-{i}", f"Ranked lists{on}", ranked_lists(details)),
            (f"confused-{i}", f"Confused identities{on}", confused(details)),
        ]
    sections += [("config", "Config", config(run)), ("environment", "Environment", environment(run))]
    return page(f"{run.name}: reid_dist", sections, head(run))


def head(run: Run) -> str:
    data = run.config.get("DATA.DATASET", "")
    network, losses = run.config.get("MODEL.NAME", ""), [run.config.get(f"LOSS.{k}_LOSS", "") for k in ("CLA", "PAIR")]
    about = ", ".join(filter(None, [data, network, " + ".join(filter(None, losses))]))
    return f"<h1>{escape(run.name)}</h1><p>{escape(about)}</p><p class=dim>{escape(state(run))}</p>{key_figures(run)}"


def state(run: Run) -> str:
    """How far the run is, from its files."""
    if not run.train:
        return "evaluated only"
    step, epoch = run.train[-1]["step"], run.train[-1]["epoch"]
    last = run.starts[-1].get("last_step") if run.starts else None
    if last and step >= last and run.result:
        return f"complete: {step:,} steps, {epoch} epochs"
    of = f" of {last:,}" if last else ""
    return f"so far: step {step:,}{of}, epoch {epoch}"


def series(run: Run) -> dict[str, list[dict[str, Any]]]:
    """{'market1501': eval lines, 'market1501, averaged weights': ...}, each in the order of steps."""
    found: dict[str, list[dict[str, Any]]] = {}
    for e in run.evals:
        name = e.get("dataset", run.config.get("DATA.DATASET", "")) + (
            ", averaged weights" if e.get("weights") == "ema" else ""
        )
        found.setdefault(name, []).append(e)
    return found


def key_figures(run: Run) -> str:
    by_name = series(run)
    if not by_name:
        row: dict[str, Any] = next(iter(run.details.get("sets", [])), {})
        return numbers([(m, per_cent(row[m])) for m in METRICS if m in row])
    events = next(iter(by_name.values()))
    metric = run.config.get("TEST.BEST_METRIC", "rank1")
    last, best = events[-1], best_of(events, metric)
    other = "mAP" if metric == "rank1" else "rank1"
    pairs = [(f"{m}, epoch {last['epoch']}", per_cent(last[m])) for m in METRICS]
    return numbers(
        [*pairs, (f"best {metric}, epoch {best['epoch']} ({other} {per_cent(best[other])})", per_cent(best[metric]))]
    )


def results(run: Run) -> str:
    """A table over epochs, all test sets, and the same as curves."""
    by_name = series(run)
    rows: list[list[Any]] = []
    marked = []
    metric = run.config.get("TEST.BEST_METRIC", "rank1")
    for name, events in by_name.items():
        best = best_of(events, metric)
        for e in events:
            if e is best:
                marked.append(len(rows))
            rows.append([name, e["epoch"], e["step"], *(per_cent(e[m]) for m in METRICS), f"{e['seconds']:.2f}"])
    if run.details.get("by") == "evaluation":
        for d in run.details["sets"]:
            found = {f"{d['label']}, evaluated": d} | {
                f"{d['label']}, {name}": r for name, r in d.get("rows", {}).items()
            }
            for name, r in found.items():
                rows.append([name, "", "", *(per_cent(r[m]) for m in METRICS), f"{r['seconds']:.2f}"])
    if not rows:
        return "<p>No evaluation yet.</p>"
    columns = ["test set", "epoch", "step", *METRICS, "ranking, s"]
    text = table(columns, rows, f"Each evaluation; bold: the best of its test set by {metric}", marked)
    lines = [
        Line(f"{m} {name}" if len(by_name) > 1 else m, column(events, "epoch"), column(events, m), i)
        for i, (m, name, events) in enumerate((m, n, es) for n, es in by_name.items() for m in ("mAP", "rank1"))
    ]
    return text + f'<div class="plots">{curves("mAP and rank-1", lines, "epoch", percent=True, markers=True)}</div>'


def column(events: list[dict[str, Any]], key: str) -> np.ndarray:
    """(n,) float64; NaN where the key is missing or null (a loss that was not finite)."""
    return np.array([np.nan if e.get(key) is None else e[key] for e in events], np.float64)


def training_curves(run: Run) -> str:
    if not run.train:
        return ""
    x, x_label = time_axis(run)

    def line(key: str, name: str = "", style: int = 0) -> Line:
        return Line(name or key, x, column(run.train, key), style)

    losses = [line("loss", "sum"), line("loss_cla", "classification", 1), line("loss_pair", "pairs", 2)]
    rates = column(run.train, "lr")
    plots = [
        curves("Losses", losses, x_label),
        curves("Accuracy of the classifier", [line("acc", "accuracy")], x_label, percent=True),
        curves("Learning rate", [line("lr", "learning rate")], x_label, log=is_wide(rates), zero=True),
        curves("Images a second", [line("images_per_s", "images/s")], x_label, zero=True),
        curves(
            "Share of time that waits for images", [line("data_wait", "data wait")], x_label, percent=True, zero=True
        ),
    ]
    skipped = int(run.train[-1].get("skipped") or 0)
    note = f"<p>{skipped} steps were left out for a gradient that was not finite.</p>" if skipped else ""
    return note + f'<div class="plots">{"".join(plots)}</div>'


def time_axis(run: Run) -> tuple[np.ndarray, str]:
    """((n,) of the train lines, its name): epochs where the length of one is known, else steps."""
    steps = column(run.train, "step")
    return (steps / run.steps_per_epoch, "epoch") if run.steps_per_epoch else (steps, "step")


def evaluation(run: Run, details: dict[str, Any]) -> str:
    """CMC, AP histogram and what else the newest evaluation says."""
    if run.details.get("by") == "evaluation":
        when = f"python -m reid_dist.evaluate, weights {run.details.get('weights', '')}"
    else:
        when = f"at epoch {run.details.get('epoch')}, step {run.details.get('step')}"
    counts = f"{details['num_query']:,} queries, {details['num_gallery']:,} gallery images"
    if details["num_no_match"]:
        counts += f"; {details['num_no_match']:,} queries have no match and are left out"
    label = details["label"]
    cmc = np.array(details["cmc"])
    line = Line("CMC", np.arange(1, len(cmc) + 1, dtype=np.float64), cmc)
    plots = [
        curves(f"CMC on {label}: queries with a match among the first k", [line], "k", percent=True),
        histogram(f"Average precision of the queries on {label}", np.array(details["ap"]), "AP", "queries"),
    ]
    if roc := details.get("roc"):
        rates = np.array([np.nan if v is None else v for v in roc["curve"]["tpr"]], np.float64)
        line = Line("true positive rate", np.array(roc["curve"]["fpr"]), rates)
        title = f"ROC on {label}: pairs of one identity that are accepted, by wrongly accepted pairs"
        plots.append(curves(title, [line], "false positive rate", percent=True, x_log=True))
    return (
        f"<p>{escape(when)}; {escape(counts)}; distance: {escape(DISTANCES[details['distance']])}.</p>"
        f'<div class="plots">{"".join(plots)}</div>{camera_pairs(details)}{worst_identities(details)}'
    )


def camera_pairs(details: dict[str, Any]) -> str:
    """mAP by (query camera, camera of the match), where the evaluation has it."""
    pairs = details.get("camera_pairs")
    if not pairs:
        return ""
    rows, styles = [], dict[tuple[int, int], str]()
    for i, (camera, values) in enumerate(zip(pairs["query_cameras"], pairs["mAP"], strict=True)):
        rows.append([f"query camera {camera}", *("" if v is None else f"{100 * v:.1f}" for v in values)])
        for j, v in enumerate(values, 1):
            if v is not None:
                styles[i, j] = f"background: rgba(var(--shade), {0.55 * v:.2f})"
    caption = "mAP in per cent by camera pair: the gallery images of one camera only; empty: no such match"
    return table(["", *(f"gallery {camera}" for camera in pairs["gallery_cameras"])], rows, caption, styles=styles)


def worst_identities(details: dict[str, Any]) -> str:
    worst = details.get("worst_identities")
    if not worst:
        return ""
    rows = [[f"pid {one['pid']}", per_cent(one["mAP"]), one["num_query"]] for one in worst]
    text = table(["identity", "mAP", "queries"], rows, f"The {len(rows)} identities with the lowest mAP")
    return f"<details><summary>Identities that are found worst</summary>{text}</details>"


def ranked_lists(details: dict[str, Any]) -> str:
    parts = []
    for kind, rows in details["queries"].items():
        shown = "".join(query(row) for row in rows)
        parts.append(f"<details open><summary>{KINDS[kind].capitalize()}</summary>{shown}</details>")
    note = (
        "Each query with its first answers, nearest first. ✓ and a solid frame: the same identity; ✗ and a dashed "
        "frame: another one. Junk (the query's identity from its own camera) is left out."
    )
    return f"<p>{note}</p>{''.join(parts)}"


def query(row: dict[str, Any]) -> str:
    who = describe(row)
    asked = f'<div class="person">{person(row, f"query: {who}")}<b>AP {row["ap"]:.2f}</b><br>{in_lines(who)}</div>'
    items = []
    if row.get("activation"):
        heat = person(row, f"where the network responds in the query: {who}", row["activation"])
        items.append(f'<li class="person">{heat}<b>activation</b></li>')
    for place, answer in enumerate(row["answers"], 1):
        sign, kind = ("✓", "right") if answer["right"] else ("✗", "wrong")
        words = f"answer {place}, {kind}: {describe(answer)}, distance {answer['distance']:.3f}"
        items.append(
            f'<li class="person {kind}">{person(answer, words)}<b>{sign} {answer["distance"]:.3f}</b><br>'
            f"{in_lines(describe(answer))}</li>"
        )
    return f'<div class="query">{asked}<ol class="answers">{"".join(items)}</ol></div>'


def describe(image: dict[str, Any]) -> str:
    """'pid 7 cam 2'."""
    return f"pid {image['pid']}" + (f" cam {image['camera']}" if image["camera"] else "")


def in_lines(who: str) -> str:
    """What `describe` returns, as HTML that is not broken between 'cam' and the camera."""
    return escape(who).replace(" cam ", " cam&nbsp;")


def confused(details: dict[str, Any]) -> str:
    if not details["confused"]:
        return "<p>No wrong answer among the first ones of the worst queries.</p>"
    cells = []
    for pair in details["confused"]:
        first, second = pair["query"], pair["answer"]
        times = f"{pair['count']} wrong answer{'s' if pair['count'] > 1 else ''}"
        cells.append(
            f'<div class="pair"><p>pid {escape(" and ".join(pair["pids"]))}: {times}</p>'
            + "".join(
                f'<div class="person">{person(one, describe(one))}{escape(describe(one))}</div>'
                for one in (first, second)
            )
            + "</div>"
        )
    note = (
        f"Pairs of identities by how often one was answered for the other among the first answers of the "
        f"{details['num_examined']} queries with the lowest AP, each with its nearest wrong answer (query left)."
    )
    return f'<p>{note}</p><div class="pairs">{"".join(cells)}</div>'


def config(run: Run) -> str:
    """What differs from the defaults first, then all of it."""
    if not run.config:
        return ""
    from ..config import defaults, flatten

    usual = flatten(defaults())
    changed = [[key, value, usual.get(key, "")] for key, value in run.changed.items()]
    every = [[key, value] for key, value in run.config.items()]
    return (
        table(["key", "value", "default"], changed, "Keys that differ from the defaults", text=True)
        + f"<details><summary>All {len(every)} keys</summary>"
        + table(["key", "value"], every, "The resolved config", text=True)
        + "</details>"
    )


def environment(run: Run) -> str:
    """Command, revision, versions and hardware of each start."""
    # An evaluation in a folder of its own is no start of a run.
    starts = run.starts or [start for start in [run.details.get("start")] if start]
    if not starts:
        return f"<pre>{escape(run.command)}</pre>" if run.command else ""
    last = starts[-1]
    ranks = last["world_size"]
    rows = [
        ["ranks", f"{ranks} on {last['device']}" + (f", {last['nodes']} nodes" if last.get("nodes", 1) > 1 else "")],
        ["system", last["system"]],
        ["git revision", last["revision"] or "not a checkout"],
        *([name, version] for name, version in last["versions"].items()),
    ]
    columns = ["started", "after step", "ranks", "device", "revision", "command"]
    lines = [[s["time"], s["step"], s["world_size"], s["device"], s["revision"], s["command"]] for s in run.starts]
    every = table(columns, lines, "All starts of this run", text=True) if len(lines) > 1 else ""
    return f"<pre>{escape(last['command'])}</pre>" + table(["", ""], rows, "The last start", text=True) + every
