"""The whole state of a run in one file: written by rank 0 to a temporary name, synced, renamed; read by every rank.

A file is a dict saved by torch.save, of tensors and plain Python values only, so that weights_only loading takes it:
format (2), checksum (SHA-256 of all the rest, see `digest`), step (training steps done), last_eval (the step that was
last evaluated), best ({} or the best evaluation's numbers), skipped and skipped_in_a_row (steps left out for a
non-finite gradient), config (YAML), index (the data set's fingerprint), wandb_id, model, optimizer, scaler (state
dicts), ema ({} or the averaged weights by name). Nothing in it depends on the number of ranks.
"""

from __future__ import annotations

import errno
import hashlib
import pickle
import re
import threading
from pathlib import Path
from typing import Any

import torch

from .files import write_atomic

FORMAT = 2
NAME = re.compile(r"step_(\d{9})\.pt")
FOREIGN = (
    "not a checkpoint of reid_dist, so there is no state to go on from; MODEL.PRETRAINED FILE starts from weights of "
    "other code, --eval evaluates them"
)


def write(folder: Path, state: dict[str, Any], keep: int, best: bool = False) -> Path:  # rank 0 only
    """Writes folder/step_NNNNNNNNN.pt, and best.pt where this is the best so far; each whole or not at all.

    Then removes all step files but the `keep` newest. Raises OSError; the files that were there stay usable.
    """
    whole = {"format": FORMAT, **state}
    whole["checksum"] = digest(whole)
    file = folder / f"step_{state['step']:09d}.pt"
    # best.pt first: cut off between the two, the run goes on from an older file and writes both again.
    for target in [folder / "best.pt", file] if best else [file]:
        write_atomic(target, lambda part: save_tensors(whole, part))
    for old in list_steps(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return file


def save_tensors(state: dict[str, Any], part: Path) -> None:
    """torch.save, with the disk's own error: torch reports a write that failed as a RuntimeError about positions."""
    with part.open("wb") as stream:
        try:
            torch.save(state, stream)
        except RuntimeError as error:
            raise OSError(errno.EIO, str(error).splitlines()[0], str(part)) from error


class Writer:  # rank 0 only
    """Writes in a thread, so that training waits only while the tensors are copied; at most one write in flight."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.error: OSError | None = None
        self._thread: threading.Thread | None = None

    def start(self, state: dict[str, Any], best: bool) -> None:
        """Copies every tensor of `state` and returns; the file follows. Waits for the write before, if any."""
        self.wait()
        copy = copy_tensors(state)
        self._thread = threading.Thread(target=self._write, args=(copy, best), name="reid_dist-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns once nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raises ValueError if a write has failed, with the file that is left to go on from."""
        if self.error is None:
            return
        left = list_steps(self.folder)
        good = f"the newest good one is {left[-1]}" if left else "there is no earlier one"
        raise ValueError(f"OUTPUT: the checkpoint could not be written: {self.error}; {good}")

    def _write(self, state: dict[str, Any], best: bool) -> None:
        try:
            write(self.folder, state, self.keep, best)
        except OSError as error:
            self.error = error


def copy_tensors(value: Any) -> Any:
    """The same nest of dicts and lists with each tensor copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((k, copy_tensors(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return [copy_tensors(v) for v in value]
    return value


def digest(state: Any) -> str:
    """SHA-256 in hexadecimal over all keys, values, dtypes, shapes and bytes of a nest of dicts, lists and tensors.

    torch's files have a CRC for each tensor, but loading does not look at it.
    """
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            # By value, not by memory: a channels_last tensor is the same tensor.
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            sha.update(f"dict{len(value)}".encode())
            for key, entry in value.items():
                sha.update(f"{key!r}:".encode())
                add(entry)
        elif isinstance(value, (list, tuple)):
            sha.update(f"list{len(value)}".encode())
            for entry in value:
                add(entry)
        else:
            sha.update(f"{value!r};".encode())

    add({key: entry for key, entry in state.items() if key != "checksum"})
    return sha.hexdigest()


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
    except pickle.UnpicklingError:  # it wants more than tensors: whatever it is, none of ours
        raise ValueError(f"--resume {str(path)!r}: {FOREIGN}") from None
    except Exception as error:  # noqa: BLE001 - torch raises anything from EOFError to KeyError on a file that is none
        raise ValueError(f"--resume {str(path)!r}: not a whole checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"--resume {str(path)!r}: {FOREIGN}")
    if state["format"] != FORMAT:
        raise ValueError(f"--resume {str(path)!r}: expected a checkpoint of format {FORMAT}, not {state['format']!r}")
    if state["checksum"] != digest(state):
        raise ValueError(f"--resume {str(path)!r}: not a whole checkpoint (its checksum is another)")
    return state


def find(folder: Path, resume: str) -> tuple[dict[str, Any] | None, list[str]]:
    """(state, notes): the state to go on from, of the file `resume`, or for 'auto' of the newest whole one in `folder`.

    None when there is nothing to resume. notes: a line for every newer file that was passed over, with the reason.
    """
    if not resume:
        return None, []
    if resume != "auto":
        return load(Path(resume)), []
    problems: list[str] = []
    for file in reversed(list_steps(folder)):
        try:
            return load(file), [f"passed over: {problem}" for problem in problems]
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return None, []
