"""Facts about this process, and where they come from: torchrun's environment."""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """Facts about this process. `local_rank` picks the CUDA device and serves for nothing else."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_environment(env: dict[str, str]) -> tuple[int, int, int]:
    """(rank, local_rank, world_size) from torchrun's variables; (0, 0, 1) when none is set.

    Raises ValueError when only some of them are set or one is no number: guessing would start a wrong world.
    """
    # MASTER_ADDR and MASTER_PORT alone are harmless (login shells set them); the numbers say that we were launched.
    present = [name for name in ENVIRONMENT[:3] if name in env]
    if not present:
        return 0, 0, 1
    missing = [name for name in ENVIRONMENT if name not in env]
    if missing:
        raise ValueError(
            f"environment: {', '.join(present)} set but {', '.join(missing)} missing; "
            "start with torchrun (sets all five) or unset them all"
        )
    try:
        rank, local_rank, world_size = (int(env[name]) for name in ENVIRONMENT[:3])
    except ValueError:
        values = ", ".join(f"{name}={env[name]!r}" for name in ENVIRONMENT[:3])
        raise ValueError(f"environment: {values}; expected three integers") from None
    if not 0 <= rank < world_size:
        raise ValueError(f"environment: RANK={rank} with WORLD_SIZE={world_size}; expected 0 <= RANK < WORLD_SIZE")
    return rank, local_rank, world_size


def node_name() -> str:
    """The same for processes that can share memory by way of /proc: of one machine, and of one container on it."""
    name = socket.gethostname()
    with suppress(OSError):  # not on Linux
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        name += f" {boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    return name
