"""The number of operations of a training step, as benchmarks/step_ops.py counts them: what was reached is held."""

import functools

from benchmarks.step_ops import command_line, count


@functools.lru_cache
def counts():
    return count(command_line().parse_args(["--batch", "8", "--repeats", "1"]))


def part(column, name):
    return sum(counts()[column]["ops"][name].values())


def test_a_step_costs_little_more_than_its_network():
    bare = counts()["bare network"]["total"]
    assert 500 < bare < 550, "torchvision's ResNet-50: another count would mean that the parts are not comparable"
    assert counts()["1 group"]["total"] <= 0.92 * bare
    assert counts()["2 groups"]["total"] <= 1.3 * bare


def test_each_part_stays_as_small_as_it_is():
    assert part("2 groups", "finishing") <= 8
    assert part("1 group", "batch norm") == 2 * 54, "one kernel forward and one backward for each layer"
    assert part("2 groups", "batch norm") == 6 * 54
    assert part("spans 2 ranks", "batch norm") <= 17 * 54
    assert part("1 group", "network") <= part("bare network", "network") - 80, "weights are cast together"
    assert part("1 group", "losses") <= 56
    assert part("1 group", "update") + part("1 group", "running statistics") <= 23


def test_no_operation_of_a_step_reads_from_the_device():
    for column, result in counts().items():
        names = {name for ops in result["ops"].values() for name in ops}
        assert "_local_scalar_dense" not in names and "nonzero" not in names and "is_nonzero" not in names, column


def test_the_count_sees_operations_and_leaves_views_out():
    """Negative control: what is counted here would show in the tests above."""
    import torch

    from benchmarks.step_ops import Counting

    network = torch.nn.Linear(2, 2)
    with Counting(network) as counting:
        x = network(torch.ones(3, 2))
        x.view(-1).t().unsqueeze(0)
        (x * 2).sum().item()
        x.sum().backward()
    ops = {}
    for part_ops in counting.ops.values():
        ops |= part_ops
    assert ops["_local_scalar_dense"] == 1 and ops["mul"] == 1
    assert not {"view", "t", "unsqueeze"} & ops.keys()
    assert counting.ops["network"]["addmm"] == 1 or counting.ops["losses"]["addmm"] == 1
