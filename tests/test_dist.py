import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from reid_dist import dist
from reid_dist.models.sharded import classifier_rows
from tests.ranks import free_port, run_ranks

FULL = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "1"}


def test_environment_is_all_or_nothing():
    assert dist.read_environment({}) == (0, 0, 1)
    assert dist.read_environment({"MASTER_PORT": "1"}) == (0, 0, 1)
    assert dist.read_environment(FULL) == (1, 1, 4)
    for name in FULL:
        if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            half = {k: v for k, v in FULL.items() if k != name}
            with pytest.raises(ValueError, match=name):
                dist.read_environment(half)
    with pytest.raises(ValueError, match="RANK='x'"):
        dist.read_environment(FULL | {"RANK": "x"})
    with pytest.raises(ValueError, match="RANK=4"):
        dist.read_environment(FULL | {"RANK": "4"})


def _gather_and_weigh():
    r, w = dist.rank(), dist.world_size()
    rows = torch.full((2, 3), float(r), dtype=torch.float64, requires_grad=True)
    everyone = dist.gather_rows(rows)
    (everyone * (r + 1)).sum().backward()
    assert everyone[:, 0].tolist() == [float(s) for s in range(w) for _ in range(2)]
    return rows.grad.unique().tolist()


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gather_backward_sums_over_ranks(world_size):
    # Each rank weighs every row by rank + 1, so the sum of all weights is the gradient of each row.
    expected = float(sum(range(1, world_size + 1)))
    assert run_ranks(world_size, _gather_and_weigh) == [[expected]] * world_size


def _uneven():
    r = dist.rank()
    return dist.all_gather_rows(torch.full((r, 2), r)).tolist(), dist.all_gather_sizes(r)


@pytest.mark.ranks
def test_uneven_rows_come_in_rank_order():
    expected = [[1, 1], [2, 2], [2, 2]]
    assert run_ranks(3, _uneven) == [(expected, [0, 1, 2])] * 3


def _one_fails():
    def step():
        if dist.rank() == 1:
            raise ValueError("KEY 3; expected 4")

    try:
        dist.agreed(step)
    except dist.UserError:
        return "ended"
    return "went on"


@pytest.mark.ranks
def test_one_ranks_error_ends_all_ranks(capfd):
    assert run_ranks(2, _one_fails) == ["ended", "ended"]
    assert capfd.readouterr().err.count("reid_dist: error: rank 1: KEY 3; expected 4") == 1


def gather_unequal():
    return dist.gather_to_main(torch.full((dist.rank() + 1, 3), float(dist.rank())))


@pytest.mark.ranks
def test_rows_are_gathered_in_rank_0s_memory_alone():
    whole, *others = run_ranks(3, gather_unequal)
    assert whole[:, 0].tolist() == [0, 1, 1, 2, 2, 2] and whole.device.type == "cpu" and others == [None, None]


def test_a_rank_without_an_identity_is_an_error():
    assert [*classifier_rows(5, True, 0, 2), *classifier_rows(5, True, 1, 2)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="with 2 identities on 3 ranks"):
        classifier_rows(2, True, 0, 3)


class Backend:
    """What the watch over NCCL asks of a process group, and what such a group answers."""

    def __init__(self, error, device="cuda", name="nccl"):
        self._device_types = [torch.device("cpu"), torch.device(device)]
        self.error, self.name = error, lambda: name

    def _get_backend(self, device):
        assert device == torch.device("cuda")
        return self

    def get_error(self):
        return torch._C._distributed_c10d.ErrorType.__members__[self.error]


def test_an_error_of_any_nccl_group_is_found(monkeypatch):
    if hasattr(torch._C._distributed_c10d, "ProcessGroupNCCL"):  # not in a build without CUDA
        assert hasattr(torch._C._distributed_c10d.ProcessGroupNCCL, "get_error")
    monkeypatch.setattr(dist.td, "group", SimpleNamespace(WORLD=Backend("SUCCESS")))
    for groups, wanted in (
        ([], ""),
        ([Backend("COMM_ERROR", "meta"), Backend("COMM_ERROR", name="gloo")], ""),
        ([Backend("SUCCESS"), Backend("TIMEOUT")], "longer than the 600 s"),
        ([Backend("COMM_ERROR")], r"failed \(COMM_ERROR\)"),
        ([Backend("REMOTE_ERROR")], r"failed \(REMOTE_ERROR\)"),
    ):
        monkeypatch.setattr(dist, "_groups", groups)
        found = dist.nccl_error()
        assert re.search(wanted, found) and bool(found) == bool(wanted)


WATCHED = """
import sys, threading, time
from pathlib import Path
from reid_dist import dist, watchdog

def main(world):
    began = time.monotonic()
    dist.nccl_error = lambda: "given up" if time.monotonic() > began + 0.5 else ""
    dist.NCCL_POLL_S = 0.1
    threading.Thread(target=dist._watch_nccl, daemon=True).start()
    if sys.argv[1] == "finishes":
        return
    with watchdog.watching(world.rank, Path(sys.argv[2])):
        watchdog.at("gather", 41)
        time.sleep(60)

dist.run_main(main)
"""


@pytest.mark.parametrize("way", ["stuck", "finishes"])
def test_a_rank_whose_collective_nccl_gave_up_ends_with_one_line(way, tmp_path):
    """The host is stuck where no exception can reach it; or it ends first, and the watch lets it."""
    rank = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, way, str(tmp_path)],
        env={**os.environ, **rank, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=50,
    )
    log = tmp_path / "logs/rank0.txt"
    if way == "finishes":
        assert done.returncode == 0 and "error" not in done.stderr and not log.exists()
        return
    lines = [line for line in done.stderr.splitlines() if line.startswith("reid_dist: error")]
    assert done.returncode == 1 and len(lines) == 1
    assert re.search(r"rank 0 stood in step 41, gather, for .*: given up$", lines[0])
    assert "given up" in log.read_text() and "in main" in log.read_text()
