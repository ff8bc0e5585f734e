"""One thread for the whole suite, the same number for parent and forked ranks; hypothesis without a deadline.

CUDA is hidden, except from a run of tests/gpu alone: a forked rank cannot use a GPU that its parent has used.
"""

import importlib
import os
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

TESTS = Path(__file__).parent


def only_gpu_tests(arguments):
    """Whether the tests that a pytest command line names are all in tests/gpu."""
    paths = [Path(argument.partition("::")[0]).resolve() for argument in arguments]
    tests = [path for path in paths if path.is_relative_to(TESTS) and path.exists()]
    return bool(tests) and all(path.is_relative_to(TESTS / "gpu") for path in tests)


for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)
os.environ.setdefault("OMP_NUM_THREADS", "1")
if only_gpu_tests(sys.argv[1:]):
    # Deterministic matrix products need it, and cuBLAS reads it once.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Launchers call python and torchrun by name: those of the environment that the suite runs in, active or not.
os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]

import hypothesis
import pytest
import torch
import torch._dynamo  # DDP imports it; here once, not once in every forked rank

from reid_dist.data.synthetic import draw_dataset

with suppress(ImportError):
    importlib.import_module("nvidia.dali.fn")  # likewise

torch.set_num_threads(1)
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def pedestrians(tmp_path_factory):
    """A data set of 8 training and 8 test identities: 48 images to train on, 16 queries, 32 gallery images."""
    return draw_dataset(tmp_path_factory.mktemp("data") / "set", ids=8, cams=2, images=3, seed=0)


@pytest.fixture(scope="session")
def trained(pedestrians, tmp_path_factory):
    """The checkpoint of a short run of the `tiny` network at 32x16, with averaged weights."""
    from tests.runs import SMALL, TINY, run

    folder = tmp_path_factory.mktemp("trained")
    run(1, pedestrians, folder, f"{SMALL} {TINY} TRAIN.PRECISION fp32 TRAIN.MAX_STEPS 3 TRAIN.EMA 0.5")
    return folder / "market1501/t/checkpoints/best.pt"


@pytest.fixture
def tell(record_property):
    """tell(line): a line at the end of the test run; what tests print is lost where several processes run them."""
    return lambda line: record_property("tell", line)


@pytest.fixture
def no_waiting():
    """with no_waiting(device): an operation for which the host would wait for the GPU is an error; nothing on a CPU."""

    @contextmanager
    def inside(device):
        if device.type != "cuda":
            yield
            return
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return inside


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """A test of several ranks that is skipped has failed, unless its mark says what it needs that a laptop lacks."""
    report = yield
    mark = item.get_closest_marker("ranks")
    if report.skipped and mark and "needs" not in mark.kwargs:
        report.outcome, report.longrepr = "failed", f"{item.nodeid}: skipped, but a test of ranks always runs"
    return report


def pytest_terminal_summary(terminalreporter):
    """What tests have told; how many of those that need a cluster or a GPU have run, and why the others have not."""
    for report in terminalreporter.stats.get("passed", []):
        for name, line in report.user_properties:
            if name == "tell":
                terminalreporter.write_line(line)
    for name, folder in (("cluster", "tests/cluster/"), ("GPU", "tests/gpu/")):

        def reports(state, folder=folder):
            return [r for r in terminalreporter.stats.get(state, []) if r.nodeid.startswith(folder)]

        ran, not_run = [*reports("passed"), *reports("failed")], reports("skipped")
        if ran or not_run:
            terminalreporter.write_line(f"{name} tests: {len(ran)} ran, {len(not_run)} not run")
            for line in reasons(not_run):
                terminalreporter.write_line(f"  {line}")


def reasons(not_run):
    """A line with the reason for each test that has not run; one for those of a file that share theirs."""
    whys = [(r.nodeid.partition("::")[0], r.longrepr[2].removeprefix("Skipped: ")) for r in not_run]
    counts = Counter(whys)
    single = [f"{r.nodeid}: {why[1]}" for r, why in zip(not_run, whys, strict=True) if counts[why] == 1]
    return single + [f"{file} ({num} tests): {why}" for (file, why), num in counts.items() if num > 1]
