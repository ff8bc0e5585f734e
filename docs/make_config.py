"""Writes docs/config.md, the reference of all configuration keys, from reid_dist/keys.py and the comments in it.

python docs/make_config.py
"""

from __future__ import annotations

import ast
import io
import tokenize
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from reid_dist import keys
from reid_dist.config import flatten
from reid_dist.data.index import DATASETS
from reid_dist.losses import CLASSIFICATION, PAIRWISE
from reid_dist.models import MODELS

HEAD = """\
# Configuration reference

Every key with its default and its meaning. `python docs/make_config.py` writes this page from the comments in
`reid_dist/keys.py`.

A value comes from the defaults below, then from the YAML file of `--cfg`, then from `KEY VALUE` pairs on the command
line, then from the flags:

| flag | key |
|---|---|
| `--root DIR` | `DATA.ROOT` |
| `--dataset NAME` | `DATA.DATASET` |
| `--output DIR` | `OUTPUT` |
| `--tag NAME` | `TAG` |
| `--resume auto` | `MODEL.RESUME` |
| `--eval` | `EVAL_MODE` |
| `--gpu` | none: it is accepted for the command lines of Simple-ReID |

An unknown key is an error that names the nearest one; so are a value of another type and a combination that cannot
work. All mistakes are reported at once, a line each, with exit code 2. The resolved config of a run is in its folder as
`config.yaml`, and `--cfg` takes that file back.

The last column says whether a run may go on with another value (`--resume`). *no*: the key is part of the mathematics,
and another value is an error unless `TRAIN.ALLOW_CHANGES` is set.
"""
TYPES = {bool: "true or false", int: "integer", float: "number", str: "text", list: "list"}


def page() -> str:
    """The text of docs/config.md. Raises ValueError for a key that no comment explains."""
    defaults, meanings = flatten(keys._C), read_meanings(Path(keys.__file__).read_text(encoding="utf-8"))
    silent = [key for key in defaults if not meanings.get(key)]
    if silent:
        raise ValueError(f"reid_dist/keys.py: no comment says what {', '.join(silent)} means")
    lines = [HEAD]
    for section, names in groupby(sorted(defaults, key=place), key=section_of):
        lines += [f"## {section}", "", "| key | default | meaning | values | resume |", "|---|---|---|---|---|"]
        for key in names:
            free = "yes" if key in keys.FREE_ON_RESUME else "no"
            row = [
                f"`{key}`",
                f"`{defaults[key]!r}`",
                escape(meanings[key], quote=False),
                values_of(key, defaults[key]),
                free,
            ]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        lines.append("")
    return "\n".join(lines)


def section_of(key: str) -> str:
    return key.split(".")[0] if "." in key else "The run"


def place(key: str) -> tuple[int, int]:
    """Where a key stands in the page: as in keys.py, those of the run itself last."""
    sections = list(keys._C)
    return ("." not in key, sections.index(key.split(".")[0]))


def read_meanings(source: str) -> dict[str, str]:
    """{'DATA.ROOT': what its comment says, ...}: the comment behind the value, or else the lines above the key."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    lines = source.splitlines()
    meanings = {}
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("_C.")):
            continue
        said = [comments[n] for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in comments]
        above = node.lineno - 1
        while not said and lines[above - 1].startswith("#"):
            above -= 1
        said = said or [comments[n] for n in range(above + 1, node.lineno)]
        meanings[ast.unparse(node.targets[0]).removeprefix("_C.")] = " ".join(said)
    return meanings


def values_of(key: str, default: Any) -> str:
    """The choices of a key, or its type and bound."""
    tables = {
        "DATA.DATASET": DATASETS,
        "MODEL.NAME": MODELS,
        "LOSS.CLA_LOSS": CLASSIFICATION,
        "LOSS.PAIR_LOSS": PAIRWISE,
    }
    choices = keys.CHOICES | {name: tuple(table) for name, table in tables.items()}
    if key in choices:
        return ", ".join(f"`{value!r}`" if value == "" else f"`{value}`" for value in choices[key])
    bound = f", at least {keys.AT_LEAST[key]}" if key in keys.AT_LEAST else ""
    return TYPES[type(default)] + bound


if __name__ == "__main__":
    Path(__file__).with_name("config.md").write_text(page(), encoding="utf-8")
