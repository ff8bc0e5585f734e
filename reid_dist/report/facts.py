"""On what a run ran: command, code revision, versions, hardware. Written at each start, read by the page."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from ..files import write_atomic
from .run import FACTS_FILE, read_json

PACKAGES = ("reid_dist", "torch", "torchvision", "nvidia-dali-cuda130", "numpy", "pillow", "timm", "wandb")
KEPT_STARTS = 50


def note_start(folder: Path, start: dict[str, Any]) -> None:  # rank 0 only
    """Adds this start to the run's environment.json: `start` and what can be known of software and command."""
    try:
        starts = read_json(folder / FACTS_FILE) or []
    except ValueError:  # a damaged file must not stop a run
        starts = []
    starts = [*starts, start | software()][-KEPT_STARTS:]
    text = json.dumps(starts, indent=1) + "\n"
    write_atomic(folder / FACTS_FILE, lambda part: part.write_text(text, encoding="utf-8"))


def software() -> dict[str, Any]:
    """Time, command line, git revision of this code, versions. Of the environment only a number: it holds secrets."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": without_secrets(command()),
        "revision": revision(),
        "nodes": int(os.environ.get("GROUP_WORLD_SIZE", "1")),  # torchrun's
        "versions": versions,
        "system": f"{platform.system()} {platform.release()}, {processor()}, {os.cpu_count()} cores",
    }


def command() -> str:
    """How this process was started, as one would type it."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = ["python", "-m", spec.name.removesuffix(".__main__")] if spec is not None else ["python", sys.argv[0]]
    return shlex.join([*program, *sys.argv[1:]])


def without_secrets(text: str) -> str:
    """`text` without the value of WANDB_API_KEY, wherever it stands."""
    key = os.environ.get("WANDB_API_KEY", "")
    return text.replace(key, "***") if key else text


def revision() -> str:
    """The git commit of this code, '+ changes' when files differ from it; '' outside of a checkout."""
    file = Path(__file__)
    git = ["git", "-C", str(file.parent)]
    try:
        # Installed below somebody else's checkout, this file is not one of its files.
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, timeout=5, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return head.stdout.strip()[:12] + (" + changes" if changed.stdout.strip() else "")


def processor() -> str:
    """The name of the CPU as the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
