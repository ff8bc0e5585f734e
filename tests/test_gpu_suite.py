"""Which runs see the GPU, and what is said of GPU tests that have not run."""

import os
import subprocess
import sys

import pytest

from tests.conftest import only_gpu_tests


@pytest.mark.parametrize(
    "line", ["tests/gpu", "-x tests/gpu/test_step.py::test_waiting_is_seen --maxfail 2", "-k x tests/gpu/"]
)
def test_a_run_of_gpu_tests_alone_sees_the_gpu(line):
    assert only_gpu_tests(line.split())


@pytest.mark.parametrize(
    "line", ["", "-q", "tests", "tests/gpu tests/test_gpu_suite.py", ".", "tests/test_gpu_suite.py"]
)
def test_every_other_run_hides_it(line):
    assert not only_gpu_tests(line.split())


def test_gpu_tests_that_have_not_run_are_counted_with_the_reason():
    """Without a device, as in a plain environment: no xdist, no limit for a test."""
    plugins = ["-p", "no:xdist", "-p", "no:timeout", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plugins, "tests/gpu/test_losses.py", "tests/gpu/test_images.py"]
    # An index that no machine has: none is hidden by an empty list.
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-2000:]
    lines = done.stdout.splitlines()
    [count] = [line for line in lines if line.startswith("GPU tests: ")]
    assert count.startswith("GPU tests: 0 ran, ") and count.endswith(" not run")
    reasons = [line for line in lines if line.startswith("  tests/gpu/")]
    assert len(reasons) == 2 and all(line.endswith(" tests): no CUDA device") for line in reasons)
