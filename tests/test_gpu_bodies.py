"""The tests of tests/gpu on the CPU against itself, so that they cannot rot where there is no GPU."""

import importlib
from pathlib import Path

import pytest
import torch

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("gpu/test_*.py"))
for name in MODULES:
    functions = vars(importlib.import_module(f"tests.gpu.{name}"))
    for test in [key for key in functions if key.startswith("test_")]:
        globals()[f"{test}__{name.removeprefix('test_')}"] = functions[test]


@pytest.fixture
def device():
    return torch.device("cpu")
