"""What a run has left in its folder, read back: the page and the comparison are made of nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config import defaults, flatten

METRICS_FILE = "metrics.jsonl"
DETAILS_FILE = "evaluation_details.json"
FACTS_FILE = "environment.json"
PAGE = Path("report") / "index.html"


@dataclass(frozen=True)
class Run:
    """The files of one run. Each is optional but for one of metrics.jsonl and evaluation_details.json."""

    folder: Path
    train: list[dict[str, Any]]  # train lines of metrics.jsonl, in order
    evals: list[dict[str, Any]]  # eval lines likewise; averaged weights have "weights": "ema"
    config: dict[str, Any]  # {'DATA.HEIGHT': 256, ...} as resolved
    command: str  # what was typed, from the first line of config.yaml
    details: dict[str, Any] = field(default_factory=dict)  # of the newest evaluation, as `details.py` makes them
    starts: list[dict[str, Any]] = field(default_factory=list)  # as `facts.py` makes them, one for each start
    result: dict[str, Any] = field(default_factory=dict)  # result.json: the run has come to its end

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def steps_per_epoch(self) -> int:
        """0 where it is not known."""
        return self.starts[-1].get("steps_per_epoch", 0) if self.starts else 0

    @property
    def changed(self) -> dict[str, Any]:
        """The keys of the config that differ from the defaults."""
        usual = flatten(defaults())
        return {key: value for key, value in self.config.items() if key not in usual or usual[key] != value}


def read_run(folder: str | Path) -> Run:
    """The run in a folder. Raises ValueError when there is none, or a file of it is not what it should be."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"RUN {str(folder)!r}: expected the folder of a run")
    events = read_events(folder / METRICS_FILE)
    details = read_json(folder / DETAILS_FILE)
    if not events and not details:
        raise ValueError(f"RUN {str(folder)!r}: holds no {METRICS_FILE}; expected the folder of a run")
    command, config = read_config(folder / "config.yaml")
    return Run(
        folder,
        [e for e in events if e.get("event") == "train"],
        [e for e in events if e.get("event") == "eval"],
        config,
        command,
        details or {},
        read_json(folder / FACTS_FILE) or [],
        read_json(folder / "result.json") or {},
    )


def read_events(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a half last line, of a run that goes on or was killed, is passed over."""
    if not file.exists():
        return []
    events = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [event for event in events if isinstance(event, dict)]


def read_json(file: Path) -> Any:
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: no JSON ({error}); expected what reid_dist wrote") from None


def read_config(file: Path) -> tuple[str, dict[str, Any]]:
    """(the command line in its first line, flat config) of config.yaml; ('', {}) where there is none."""
    if not file.exists():
        return "", {}
    text = file.read_text(encoding="utf-8")
    first = text.partition("\n")[0]
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: no YAML: {' '.join(str(error).split())}") from None
    return (first.removeprefix("# ") if first.startswith("# ") else ""), flatten(tree or {})
