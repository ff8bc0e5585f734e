"""What real ranks send in a training step is what the formulas of benchmarks/scaling.py say; what its model says."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks import scaling
from benchmarks.scaling import CASES, Collective, check, collectives

RUN = scaling.Run(scaling.Network(8, [100], [4, 6], 1e9), num_pids=5, ranks=4, images=2, bn_group=2)


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: case.name)
def test_a_step_sends_what_the_formulas_say(pedestrians, tmp_path, case, world_size):
    found = check(case, world_size, pedestrians, tmp_path)
    assert len(found.counted) == world_size
    for counted in found.counted:
        assert counted == found.formula
    if world_size == 1:
        assert not found.formula and found.ring == 0
    else:
        # gloo's headers: more than nothing, and little beside the gradients of even this network.
        assert all(1 < sent / found.gloo < 1.1 for sent in found.sent)


@pytest.mark.ranks
def test_a_larger_network_sends_what_the_formulas_say(pedestrians, tmp_path):
    """MobileNetV2: two buckets of DDP's; the headers of gloo count for less than a hundredth."""
    [case] = [case for case in CASES if (case.model, case.bn_group) == ("mobilenet_v2", 1)]
    found = check(case, 2, pedestrians, tmp_path)
    assert found.counted == [found.formula] * 2
    assert all(1 < sent / found.gloo < 1.01 for sent in found.sent)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({}, ""),
        ({"bn_group": 4}, "batch norm groups"),
        ({"sharded": True}, "sharded classifier"),
        ({"center": True}, "center loss"),
    ],
)
def test_a_part_is_there_when_the_run_has_it(change, part):
    optional = {"batch norm groups", "sharded classifier", "center loss"}
    assert {c.part for c in collectives(replace(RUN, **change))} & optional == ({part} - {""})
    assert not collectives(replace(RUN, ranks=1, **change))


def test_a_group_that_spans_ranks_gathers_once_and_sums_once_per_layer():
    """2 C numbers from each of its ranks forward, 2 C backward."""
    found = [c for c in collectives(replace(RUN, bn_group=4)) if c.part == "batch norm groups"]
    wanted = {("all_gather", 8 * n * 2): 1 for n in (4, 6)} | {("all_reduce", 8 * n): 1 for n in (4, 6)}
    assert Counter((c.kind, c.nbytes) for c in found) == wanted and {c.ranks for c in found} == {2}


def test_a_ring_sends_each_byte_as_often_as_it_must():
    assert Collective("", "", "all_reduce", 800, 4).sent == 1200
    assert Collective("", "", "all_gather", 800, 4).sent == Collective("", "", "reduce_scatter", 800, 4).sent == 600


def test_the_model_adds_up(capsys):
    machine = scaling.Machine(100, 600, 80, 0, 10, 30, 8, 300, 50, 8, 8, 1, 4)
    alone = scaling.model_step(replace(RUN, ranks=1), machine, 20)
    assert alone.exposed == 0 and alone.total == pytest.approx(600e-5)  # the host's: 6e9 flops take 60 us
    assert alone.compute == pytest.approx(6e9 / 100e12)
    steps = [scaling.model_step(replace(RUN, ranks=ranks), machine, 20) for ranks in (2, 8, 64, 512)]
    assert all(a.exposed < b.exposed for a, b in pairwise(steps))
    # Slow cards are worth sharing out to the last image; with a free host and network nothing ever stops a step.
    slow, free = replace(machine, tflops=0.001), replace(machine, host_ops=0, group_ops=0, tflops=1e-3)
    assert scaling.stops_at(RUN, machine, 20, 1.25) > scaling.stops_at(RUN, slow, 20, 1.25) >= 1
    assert scaling.stops_at(RUN, free, 20, 1.25) == 1
    assert scaling.main(["--model", "tiny", "--size", "64", "32", "--gpus", "8", "512"])
    out = capsys.readouterr().out
    lines = out[out.index("MODEL, not measured") :].splitlines()
    assert sum(line.startswith("model: ") for line in lines) == 3
