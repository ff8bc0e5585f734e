"""What users do with data before they train: look at it.

    python -m reid_dist.data check --dataset market1501 --root DATA [--plot]

Prints a table and what is odd, and writes check.txt, check.json and, with --plot, pictures into OUTPUT/DATASET/check.
Exit code: 0 good, 1 usable with warnings, 2 unusable.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import load_config, parser
from ..files import write_atomic
from .check import GOOD, UNREADABLE_FILES, UNUSABLE, Examined, Report, check, examine_files
from .decode import printable
from .index import find_roots, read_dataset, unite
from .plan import count_chunks
from .readers.files import Options, RawDataset
from .split import relabel
from .subset import find_candidates, first_of_cameras

SHOWN = 20  # names of a kind that are printed; check.json has all
SECONDS = 10  # between two lines of progress where there is no terminal
VERDICTS = ("good", "usable, with warnings", "unusable")


def main(argv: Sequence[str]) -> int:
    """The command. Returns its exit code."""
    try:
        args, cfg = read_command(argv)
        roots = find_roots(cfg.DATA.ROOT, cfg.DATA.DATASET.split("+"))
        folder = Path(cfg.OUTPUT or "./runs") / cfg.DATA.DATASET / "check"
        reports, raws, num_files, seconds = [], [], 0, 0.0
        for name, root in roots.items():
            d = cfg.DATA
            options = Options(d.SPLIT_ID, d.CUHK03_LABELED, d.CUHK03_CLASSIC_SPLIT, d.MSMT17_VAL, d.MANIFEST)
            raw = read_dataset(name, root, options)
            raws.append(raw)
            began = time.monotonic()
            report, files = check(name, str(root), raw, lambda paths: examine_with_progress(paths, args.workers))
            reports.append(report)
            num_files, seconds = num_files + len(files.paths), seconds + time.monotonic() - began
            if args.plot:
                from .plots import draw_contact_sheet, draw_distributions

                folder.mkdir(parents=True, exist_ok=True)
                prefix = f"{name}_" if len(roots) > 1 else ""
                draw_contact_sheet(folder / f"{prefix}contact_sheet.png", raw, files)
                draw_distributions(folder / f"{prefix}distributions.png", raw, files)
        save(folder, reports)
    except (ValueError, OSError) as error:
        sys.stderr.write("".join(f"reid_dist: error: {line}\n" for line in str(error).splitlines()))
        return UNUSABLE
    print("\n".join(describe(report, SHOWN) for report in reports))
    names = "check.txt, check.json" + (" and the pictures" if args.plot else "")
    print(f"{num_files:,} files in {seconds:.1f} s with {args.workers} processes; {names}: {folder}")
    verdict = max((report.verdict for report in reports), default=GOOD)
    words = what_to_train(args, cfg, dict(zip(roots, raws, strict=True))) if verdict != UNUSABLE else []
    if words:
        print(f"next      python -m reid_dist.train {shlex.join(words)}")
    return verdict


def what_to_train(args: argparse.Namespace, cfg: Any, raws: dict[str, RawDataset]) -> list[str]:
    """The flags and keys with which a training on this data begins, also where it is small or has no test set.

    [] where none does: there is nothing to train on, or nobody to test on.
    """
    d = cfg.DATA
    train, num_pids = relabel(unite({name: raw.train for name, raw in raws.items()}))
    if not num_pids:
        return []
    chunks = count_chunks(np.bincount(train.pids), d.NUM_INSTANCES)
    words = ["--cfg", args.cfg or "configs/res50_ce_triplet.yaml", "--dataset", d.DATASET, "--root", d.ROOT, *args.opts]
    if not cfg.TEST.DATASETS and not all(len(raw.query) and len(raw.gallery) for raw in raws.values()):
        candidates = find_candidates(train, first_of_cameras(train)[0])
        num = min(max(2, num_pids // 5), len(candidates), num_pids - 1)
        if num < 1:
            return []
        words += ["DATA.VAL_IDS", str(num)]
        chunks[candidates[chunks[candidates].argsort()[-num:]]] = 0  # if those with the most images are drawn
    most = int(chunks.sum() if d.SAMPLER == "chunk" else np.count_nonzero(chunks)) * d.NUM_INSTANCES
    if most < d.TRAIN_BATCH:
        group = max(n for n in range(1, (cfg.MODEL.BN_GROUP or most) + 1) if most % n == 0)
        words += ["DATA.TRAIN_BATCH", str(most), "MODEL.BN_GROUP", str(group)]
    return words


def read_command(argv: Sequence[str]) -> tuple[argparse.Namespace, Any]:
    p = parser("data check", "Shows what is in a data set, and what is odd or broken in it.")
    p.add_argument("--plot", action="store_true", help="also draw a contact sheet and distributions")
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; all cores by default")
    if not argv or argv[0] != "check":
        if argv and argv[0] in ("-h", "--help"):
            p.parse_args(["--help"])
        raise ValueError(f"command line: {argv[0] if argv else 'nothing'!r}; expected check --dataset NAME --root DIR")
    args = p.parse_intermixed_args(list(argv[1:]))
    return args, load_config(args)


def examine_with_progress(paths: list[str], num_workers: int) -> Examined:
    """`examine_files` with a bar on a terminal, and a line every ten seconds elsewhere."""
    began = time.monotonic()
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=len(paths), desc="images", leave=False, dynamic_ncols=True) as bar:
            return examine_files(paths, num_workers, bar.update)
    return examine_files(paths, num_workers, lines_of_progress(len(paths), began))


def lines_of_progress(total: int, began: float) -> Callable[[int], None]:
    done, said = 0, began

    def progress(num: int) -> None:
        nonlocal done, said
        done += num
        if time.monotonic() - said >= SECONDS:
            said = time.monotonic()
            print(f"{done:,} of {total:,} images in {said - began:.0f} s", file=sys.stderr, flush=True)

    return progress


def describe(report: Report, shown: int) -> str:
    """The table and, below it, the first `shown` of each list. A name is never wrapped or cut."""
    facts = list(next(iter(report.splits.values())))
    rows = [["", *facts], *([what, *(f"{n:,}" for n in row.values())] for what, row in report.splits.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"{report.name} in {report.root}: {VERDICTS[report.verdict]}", ""]
    for first, *numbers in rows:
        lines.append(
            "  ".join([first.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True))])
        )
    lines += ["", "min, median, max: images an identity. one camera: identities that one camera alone has seen.", ""]
    lines += [f"error    {text}" for text in report.errors]
    if any(text.startswith(UNREADABLE_FILES) for text in report.errors):
        lines.append("         DATA.ON_BAD_IMAGE skip trains without these files")
    lines += [f"warning  {text}" for text in report.warnings]
    for kind, names in report.lists.items():
        lines += ["", f"{kind}: {len(names):,}", *(f"  {printable(name)}" for name in names[:shown])]
        if len(names) > shown:
            lines.append(f"  and {len(names) - shown:,} more in check.json")
    return "\n".join(lines) + "\n"


def save(folder: Path, reports: Sequence[Report]) -> None:
    """check.txt and check.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(describe(report, SHOWN) for report in reports)
    whole = [{**vars(report), "verdict": VERDICTS[report.verdict]} for report in reports]
    write_atomic(folder / "check.txt", lambda part: part.write_text(text, encoding="utf-8", errors="surrogateescape"))
    write_atomic(
        folder / "check.json", lambda part: part.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
