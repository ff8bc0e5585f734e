"""The whole state of a run in one file: written by rank 0 to a temporary name, synced, renamed; read by every rank.

A file is a dict saved by torch.save, of tensors and plain Python values only, so that weights_only loading takes it:
format (1), step (training steps done), last_eval (the step that was last evaluated), best ({} or the best evaluation's
numbers), config (YAML), index (the data set's fingerprint), wandb_id, model, optimizer, scaler (state dicts). Nothing
in it depends on the number of ranks.
"""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
KEEP = 2  # the newest, and one before it in case a disk fails under the newest
NAME = re.compile(r"step_(\d{9})\.pt")


def save(folder: Path, state: dict[str, Any], best: bool = False) -> Path:  # rank 0 only
    """Writes folder/step_NNNNNNNNN.pt (or folder/best.pt) whole or not at all; removes all but the KEEP newest."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("best.pt" if best else f"step_{state['step']:09d}.pt")
    write_atomic(file, lambda part: torch.save({"format": FORMAT, **state}, part))
    for old in list_steps(folder)[:-KEEP]:
        old.unlink(missing_ok=True)
    return file


def write_atomic(file: Path, write: Any) -> None:
    """write(path) into a neighbour of `file`, synced to the disk and renamed: readers see the old file or the new."""
    part = file.with_name(f".{file.name}.part")
    try:
        write(part)
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def list_steps(folder: Path) -> list[Path]:
    """The step checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if NAME.fullmatch(f.name))


def step_of(file: Path) -> int:
    """The step in a step checkpoint's name."""
    return int(file.stem.removeprefix("step_"))


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint on the CPU. Raises ValueError for a file that is missing, broken, or none of ours."""
    if not path.is_file():
        raise ValueError(f"--resume {str(path)!r}: expected auto or an existing checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--resume {str(path)!r}: not a checkpoint of reid_dist ({reason})") from None
    except Exception as error:  # noqa: BLE001 - torch raises anything from EOFError to KeyError on a file that is none
        raise ValueError(f"--resume {str(path)!r}: not a whole checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"--resume {str(path)!r}: expected a checkpoint of reid_dist, format {FORMAT}")
    return state


def find(folder: Path, resume: str) -> dict[str, Any] | None:
    """The state to go on from: of the file `resume`, or for 'auto' of the newest whole one in `folder`.

    None when there is nothing to resume. A broken newest file is passed over for the one before it.
    """
    if not resume:
        return None
    if resume != "auto":
        return load(Path(resume))
    files = list_steps(folder)
    problems = []
    for file in reversed(files):
        try:
            return load(file)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return None
