"""--device of the benchmarks: the GPU if there is one, named in what they print, waited for around what is timed."""

from __future__ import annotations

import argparse

import torch


def add_device_flag(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one")


def choose_device(name: str) -> torch.device:
    """The device of --device. Raises ValueError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; pass --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def describe(device: torch.device) -> str:
    """'cpu', or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def synchronize(device: torch.device) -> None:
    """Returns once nothing is queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
