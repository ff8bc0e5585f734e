"""One thread for the whole suite, the same number for parent and forked ranks; hypothesis without a deadline."""

import importlib.util
import os
import sys
from pathlib import Path

for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Launchers call python and torchrun by name: those of the environment that the suite runs in, active or not.
os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]

import hypothesis
import pytest
import torch
import torch._dynamo  # DDP imports it; here once, not once in every forked rank

from reid_dist.data.synthetic import draw_dataset

if importlib.util.find_spec("nvidia.dali"):
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """A test of several ranks that is skipped has failed, unless its mark says what it needs that a laptop lacks."""
    report = yield
    mark = item.get_closest_marker("ranks")
    if report.skipped and mark and "needs" not in mark.kwargs:
        report.outcome, report.longrepr = "failed", f"{item.nodeid}: skipped, but a test of ranks always runs"
    return report


def pytest_terminal_summary(terminalreporter):
    """What tests have told; how many of those that start real clusters have run, and why the others have not."""
    for report in terminalreporter.stats.get("passed", []):
        for name, line in report.user_properties:
            if name == "tell":
                terminalreporter.write_line(line)

    def reports(state):
        return [r for r in terminalreporter.stats.get(state, []) if r.nodeid.startswith("tests/cluster/")]

    ran, not_run = [*reports("passed"), *reports("failed")], reports("skipped")
    if ran or not_run:
        terminalreporter.write_line(f"cluster tests: {len(ran)} ran, {len(not_run)} not run")
        for report in not_run:
            terminalreporter.write_line(f"  {report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}")
