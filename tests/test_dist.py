import pytest
import torch

from reid_dist import dist
from reid_dist.models.sharded import classifier_rows
from tests.ranks import run_ranks

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
