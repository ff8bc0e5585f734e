"""Four ranks equal one at a twentieth of MSMT17's size; the bytes that go over the network are those of the formula."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from reid_dist import dist
from reid_dist.evaluator import Features, evaluate_features
from reid_dist.ranking.features import shard
from tests.ranks import run_ranks

NUM_QUERY, NUM_GALLERY, NUM_PIDS, NUM_CAMIDS = 11_659 // 20, 82_161 // 20, 3_060 // 20, 15
WIDTH, CHUNK = 128, 60
# The first argument of each is what the rank has in the end.
COLLECTIVES = {
    "gather": (dist, "_all_gather_into"),
    "sum": (dist.td, "all_reduce"),
    "broadcast": (dist.td, "broadcast"),
}


def draw(side: str, num: int, part: range) -> Features:
    """A rank's rows; features around a centre for each identity, float64."""
    centres = np.random.default_rng(0).normal(size=(NUM_PIDS, WIDTH))
    rng = np.random.default_rng([1, side == "query"])
    pids, camids = rng.integers(0, NUM_PIDS, num), rng.integers(0, NUM_CAMIDS, num)
    feats = centres[pids] + 1.6 * rng.normal(size=(num, WIDTH))
    rows = np.array(part)
    return Features(*(torch.from_numpy(values[rows]) for values in (feats, pids, camids)), torch.from_numpy(rows))


def evaluate_counted() -> tuple:
    """(result, bytes of the tensors that left or reached this rank, this rank's true matches by chunk)."""
    rank, world_size = dist.rank(), dist.world_size()
    query = draw("query", NUM_QUERY, shard(NUM_QUERY, rank, world_size))
    gallery = draw("gallery", NUM_GALLERY, shard(NUM_GALLERY, rank, world_size))
    counted = dict.fromkeys(COLLECTIVES, 0)
    plain = {name: getattr(*where) for name, where in COLLECTIVES.items()}
    objects, active = dist.gather_objects, [True]

    def counting(name: str):
        def call(tensor, *args, **kwargs):
            counted[name] += tensor.nbytes * active[0]
            return plain[name](tensor, *args, **kwargs)

        return call

    def not_counted(value):
        """The checks' few hundred bytes of Python objects."""
        active[0] = False
        found = objects(value)
        active[0] = True
        return found

    with pytest.MonkeyPatch.context() as patch:
        for name, where in COLLECTIVES.items():
            patch.setattr(*where, counting(name))
        patch.setattr(dist, "gather_objects", not_counted)
        result = evaluate_features(query, gallery, chunk=CHUNK)
    whole = draw("query", NUM_QUERY, range(NUM_QUERY))
    match = (whole.pids[:, None] == gallery.pids) & (whole.camids[:, None] != gallery.camids)
    return result, counted, match.sum(1).numpy()


def formula(matches: np.ndarray) -> dict[str, int]:
    """Bytes by kind of collective; matches: (W, Q) of each query on each rank.

    The gathers pad every rank's part to the largest one. None of it depends on the size of the gallery.
    """
    world_size = len(matches)
    sizes = [len(shard(NUM_QUERY, r, world_size)) for r in range(world_size)]
    chunks, start = [], 0
    for size in sizes:
        parts = [shard(size, i, -(-size // CHUNK)) for i in range(-(-size // CHUNK))]
        chunks += [slice(start + part.start, start + part.stop) for part in parts]
        start += size
    found = sum(24 * world_size * int(matches[:, chunk].sum(1).max()) for chunk in chunks)
    labels = 24 * world_size * max(sizes)
    num_matches = 8 * world_size * len(chunks)
    row_counts = 2 * 8 * world_size  # how many rows come, of the labels and of the numbers of matches
    return {
        "gather": found + labels + num_matches + row_counts,
        "sum": 8 * NUM_QUERY + 8 * int(matches.sum()),
        "broadcast": 8 * WIDTH * NUM_QUERY,
    }


@pytest.mark.ranks
def test_four_ranks_equal_one_at_a_twentieth_of_msmt17():
    [(alone, nothing, _)] = run_ranks(1, evaluate_counted)
    four = run_ranks(4, evaluate_counted)
    assert set(nothing.values()) == {0}
    assert 0.3 < alone.mAP < 0.99
    for result, counted, _ in four:
        for f in fields(alone):
            if f.name != "seconds":
                np.testing.assert_allclose(getattr(result, f.name), getattr(alone, f.name), rtol=0, atol=1e-9)
        assert counted == formula(np.stack([matches for *_, matches in four]))
