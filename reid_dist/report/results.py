"""docs/results.md: the twenty results that Simple-ReID publishes, with ours beside them where they were measured."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import defaults, flatten
from ..files import write_atomic
from ..keys import FREE_ON_RESUME
from .run import Run

BEGIN, END = "<!-- table: python -m reid_dist.report --table -->", "<!-- end of the table -->"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Row:
    """One config of the original's; published: {data set: (rank-1, mAP)} in per cent, ResNet-50, 256x128."""

    config: str
    losses: tuple[str, float, float, str, float, float]  # CLA_LOSS, CLA_S, CLA_M, PAIR_LOSS, PAIR_S, PAIR_M
    published: dict[str, tuple[float, float]]

    @property
    def keys(self) -> dict[str, Any]:
        """What its YAML file sets."""
        names = ("CLA_LOSS", "CLA_S", "CLA_M", "PAIR_LOSS", "PAIR_S", "PAIR_M")
        return {f"LOSS.{name}": value for name, value in zip(names, self.losses, strict=True)}


def row(config: str, cla: tuple[str, float, float], pair: tuple[str, float, float], *published: float) -> Row:
    market, msmt = published[:2], published[2:]
    return Row(config, (*cla, *pair), {"market1501": market, "msmt17": msmt})  # type: ignore[dict-item]


CE, SMOOTH = ("crossentropy", 16.0, 0.0), ("crossentropylabelsmooth", 16.0, 0.0)
TRIPLET, CONTRASTIVE, COSFACE = ("triplet", 16.0, 0.3), ("contrastive", 16.0, 0.3), ("cosface", 16.0, 0.1)
ROWS = (
    row("res50_ce_triplet", CE, TRIPLET, 94.5, 86.6, 78.9, 57.0),
    row("res50_ce_contrastive", CE, CONTRASTIVE, 94.3, 86.4, 79.3, 56.7),
    row("res50_ce_cosface", CE, COSFACE, 94.3, 86.2, 78.2, 55.2),
    row("res50_celabelsmooth_triplet", SMOOTH, TRIPLET, 95.0, 87.4, 79.9, 58.0),
    row("res50_celabelsmooth_contrastive", SMOOTH, CONTRASTIVE, 94.5, 87.1, 80.3, 58.7),
    row("res50_celabelsmooth_cosface", SMOOTH, COSFACE, 94.1, 86.4, 79.2, 56.6),
    row("res50_cosface_triplet", ("cosface", 16.0, 0.1), TRIPLET, 95.1, 86.7, 78.1, 54.1),
    row("res50_cosface_cosface", ("cosface", 16.0, 0.1), COSFACE, 94.5, 87.1, 78.8, 55.9),
    row("res50_arcface_triplet", ("arcface", 16.0, 0.1), TRIPLET, 94.2, 86.3, 78.2, 54.2),
    row("res50_circle_paircircle", ("circle", 96.0, 0.3), ("circle", 48.0, 0.35), 94.7, 87.3, 79.7, 57.0),
)
SIZES = {"market1501": (3368, 15913), "msmt17": (11659, 82161)}  # queries, gallery images of the whole test sets
TITLES = {"market1501": "Market-1501", "msmt17": "MSMT17"}
# What may differ from a row's config: SEED, most of what FREE_ON_RESUME names, and what rounds differently, as noted.
ROUNDING = ("TRAIN.PRECISION", "TEST.PRECISION", "TEST.FEATURE_DTYPE", "DATA.PIPELINE", "DATA.DECODE_DEVICE")
# What FREE_ON_RESUME names and makes a run another one all the same; MODEL.PRETRAINED, which may be the path of the
# usual ImageNet weights, is noted.
PART_OF_THE_ROW = ("TRAIN.MAX_EPOCH", "TRAIN.MAX_STEPS", "TRAIN.ALLOW_CHANGES")


def place(run: Run) -> tuple[str, str]:
    """(config, data set) of the table's row that a run belongs to. Raises ValueError that says why it is none's."""
    where = f"RUN {str(run.folder)!r}"
    data = run.config.get("DATA.DATASET")
    if data not in SIZES:
        raise ValueError(f"{where}: DATA.DATASET {data!r}; the table has {' and '.join(SIZES)}")
    if not run.result:
        raise ValueError(f"{where}: has no result.json; expected a run that has come to its end")
    final = run.result["final"]
    sizes = final["num_query"], final["num_gallery"]
    if sizes != SIZES[data]:
        raise ValueError(
            f"{where}: {sizes[0]:,} queries and {sizes[1]:,} gallery images; expected the whole test set of {data}: "
            f"{SIZES[data][0]:,} and {SIZES[data][1]:,}"
        )
    by_row = {r.config: differing(run, r) for r in ROWS}
    name, different = min(by_row.items(), key=lambda item: len(item[1]))
    if different:
        raise ValueError(f"{where}: is nearest to {name}, from which it differs: {'; '.join(different)}")
    return name, data


def differing(run: Run, wanted: Row) -> list[str]:
    """'KEY value, not value' for each key that defines the mathematics and is another than the row's."""
    usual = flatten(defaults()) | wanted.keys
    ignored = {*FREE_ON_RESUME, *ROUNDING, "TRAIN.DETERMINISTIC", "SEED", "DATA.DATASET"}.difference(PART_OF_THE_ROW)
    return [
        f"{k} {run.config[k]!r}, not {v!r}"
        for k, v in usual.items()
        if k not in ignored and k in run.config and run.config[k] != v
    ]


def build_table(runs: list[Run]) -> str:
    """The table as Markdown. Raises ValueError, a line for each run that belongs to no row."""
    placed: dict[tuple[str, str], list[Run]] = {}
    errors = []
    for run in runs:
        try:
            placed.setdefault(place(run), []).append(run)
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    lines = [
        "| config | data set | published rank-1 / mAP | ours, last epoch: rank-1 / mAP | seeds | runs with |",
        "|---|---|---|---|---|---|",
    ]
    for data in SIZES:
        for r in ROWS:
            rank1, mean = r.published[data]
            cells = [r.config, TITLES[data], f"{rank1} / {mean}", *measured(placed.get((r.config, data), []))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measured(runs: list[Run]) -> list[str]:
    """(rank-1 / mAP, seeds, precision and pipeline) of the runs of one row: means, and the standard deviation."""
    if not runs:
        return [NOT_RUN, "", ""]
    values = []
    for metric in ("rank1", "mAP"):
        found = [100 * run.result["final"][metric] for run in runs]
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        values.append(f"{statistics.mean(found):.1f}{spread}")
    seeds = sorted({run.config["SEED"] for run in runs})
    how = sorted({", ".join(made_with(run)) for run in runs})
    return [" / ".join(values), f"{', '.join(map(str, seeds))} (n = {len(runs)})", "; ".join(how)]


def made_with(run: Run) -> list[str]:
    """What may differ between runs of a row and is noted."""
    weights = run.config.get("MODEL.PRETRAINED", "imagenet")
    values = [str(run.config[key]) for key in ROUNDING if run.config.get(key)]
    values += ["not deterministic"] if run.config.get("TRAIN.DETERMINISTIC") == "off" else []
    return values if weights == "imagenet" else [*values, f"from {Path(weights).name or 'random weights'}"]


def write_table(runs: list[Run], file: Path) -> Path:
    """Puts the table between the two marks of `file`. Raises ValueError when they are not there."""
    try:
        text = file.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
    except (OSError, ValueError):
        raise ValueError(f"--out {str(file)!r}: expected a file with the lines {BEGIN} and {END}") from None
    whole = f"{before}{BEGIN}\n\n{build_table(runs)}\n\n{END}{after}"
    write_atomic(file, lambda part: part.write_text(whole, encoding="utf-8"))
    return file
