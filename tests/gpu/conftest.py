"""Every test here needs a CUDA device; without one it is counted as not run, with the reason.

The tests take the device as an argument, so that tests/test_gpu_bodies.py can run their bodies on the CPU.
"""

import os

import pytest
import torch


def pytest_runtest_setup(item):
    if torch.cuda.is_available():
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        pytest.skip("no CUDA device: the whole suite hides it; `make test-gpu` runs these tests")
    pytest.skip("no CUDA device")


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())
