import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reid_dist.data import philox
from reid_dist.data.augment import Augment
from reid_dist.data.plan import SAMPLERS, EpochPlan


def make(pids, **changes):
    arguments = {
        "batch": 8, "num_instances": 4, "sampler": "chunk", "seed": 0, "height": 256, "width": 128,
    }  # fmt: skip
    augment = Augment(**{k: changes.pop(k) for k in list(changes) if k in Augment._fields})
    return EpochPlan(np.asarray(pids), augment=augment, **(arguments | changes))


@st.composite
def plans(draw):
    """(pids, arguments) of a data set that fills at least one batch; images of one identity need not be neighbours."""
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=25))
    k = draw(st.integers(1, 6))
    places = draw(st.integers(1, 8))
    sampler = draw(st.sampled_from(["chunk", "identity", "identity_camera"]))
    num = len(sizes) if sampler != "chunk" else sum(max(1, n // k) for n in sizes)
    assume(num >= places)
    seed = draw(st.sampled_from([0, 1, 2**64 - 1]))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    pids = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    camids = rng.integers(0, draw(st.integers(2, 6)), len(pids)) * 3
    camids[:2] = [0, 1] if len(pids) > 1 else 0
    assume(sampler != "identity_camera" or len(pids) > 1)
    return pids, {"num_instances": k, "batch": places * k, "sampler": sampler, "seed": seed, "camids": camids}


@given(plans(), st.integers(1, 3))
def test_structure_of_every_batch(drawn, epoch):
    pids, arguments = drawn
    plan = make(pids, **arguments)
    k, places = plan.num_instances, plan.batch // plan.num_instances
    indices = plan.indices(epoch)
    assert indices.dtype == np.int32 and indices.shape == (plan.num_steps, plan.batch)
    ids = pids[indices].reshape(plan.num_steps, places, k)
    assert (ids == ids[:, :, :1]).all()
    sizes = np.bincount(pids)
    chunks = np.maximum(1, sizes // k)
    if plan.sampler != "chunk":
        assert all(len(set(row)) == places for row in ids[:, :, 0])
        # The definition of S, checked from both sides.
        assert np.minimum(chunks, plan.num_steps).sum() >= plan.num_steps * places
        assert np.minimum(chunks, plan.num_steps + 1).sum() < (plan.num_steps + 1) * places
    else:
        assert plan.num_steps == chunks.sum() // places
    anchors = indices.reshape(-1, k)[:, :1]
    count = np.bincount((anchors if plan.sampler == "identity_camera" else indices).ravel(), minlength=len(pids))
    assert (count[sizes[pids] >= k] <= 1).all()
    # No identity gives more than its chunks.
    assert (np.bincount(pids[indices].ravel(), minlength=len(sizes)) <= chunks * k).all()
    stats = plan.stats(epoch)
    assert stats["images"] == len(set(indices.ravel().tolist())) == len(pids) - stats["left_out"]


@given(plans(), st.integers(1, 3))
def test_an_anchors_instances_come_from_other_cameras_first(drawn, epoch):
    pids, arguments = drawn
    assume(len(pids) > 1)
    assume(len(set(pids.tolist())) >= arguments["batch"] // arguments["num_instances"])
    plan = make(pids, **arguments | {"sampler": "identity_camera"})
    camids, k = arguments["camids"], plan.num_instances
    for chunk in plan.indices(epoch).reshape(-1, k):
        anchor, others = chunk[0], chunk[1:]
        identity = set(np.flatnonzero(pids == pids[anchor]).tolist())
        elsewhere = {i for i in identity if camids[i] != camids[anchor]}
        # As many of other cameras as there are, then of its own, and none twice before all have come.
        num_other = min(len(elsewhere), k - 1)
        assert set(others[:num_other].tolist()) <= elsewhere and len(set(others[:num_other].tolist())) == num_other
        distinct = min(len(identity), k)
        assert len(set(chunk[:distinct].tolist())) == distinct and set(chunk.tolist()) <= identity
        if len(identity) > 1:
            assert set(chunk[distinct:].tolist()) <= (elsewhere or identity - {anchor})


def test_every_choice_of_other_cameras_is_as_likely():
    # One identity: 3 images of camera 0, 4 of camera 1, 1 of camera 5; K = 4. An anchor of camera 0 is followed by 3 of
    # 5 images, the anchor of camera 5 by 3 of 7, an anchor of camera 1 by all 4 others (3 of 4).
    camids = np.array([0, 1, 5, 1, 0, 1, 1, 0])
    seen: dict[int, dict] = {}
    for seed in range(3000):
        plan = make(np.zeros(8, int), batch=4, sampler="identity_camera", camids=camids, seed=seed)
        for chunk in plan.indices(1).tolist():
            choices = seen.setdefault(chunk[0], {})
            others = tuple(sorted(chunk[1:]))
            choices[others] = choices.get(others, 0) + 1
    anchors = np.array([sum(choices.values()) for choices in seen.values()])
    assert len(anchors) == 8 and abs(anchors / 750 - 1).max() < 0.12
    num_choices = {0: 10, 1: 4, 5: 35}
    for anchor, choices in seen.items():
        counts = np.array(list(choices.values()))
        expected = num_choices[camids[anchor]]
        assert len(counts) == expected
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < expected + 5 * (
            2 * expected
        ) ** 0.5  # chi squared


def test_ten_million_images_are_planned_in_bounded_time_and_memory():
    """A tenth of that here; benchmarks/plan.py has the whole. Nothing in it is a list with an entry for each image."""
    code = (
        "import resource, sys, time, numpy as np; from reid_dist.data.plan import SAMPLERS, EpochPlan; "
        "pids = np.arange(1_000_000) % 100_000; camids = np.arange(1_000_000) // 7 % 12; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; start = time.process_time(); "
        "plan = EpochPlan(pids, batch=256, num_instances=4, sampler=sys.argv[1], seed=0, height=256, width=128, "
        "camids=camids); plan.step(1, 0); "
        "print(time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    for sampler in SAMPLERS:
        out = subprocess.check_output([sys.executable, "-c", code, sampler], text=True, timeout=60)
        seconds, mib = map(float, out.split())
        assert seconds < 3 and mib < 250, (sampler, out)


@given(plans(), st.data())
def test_blocks_of_any_world_size_are_the_global_step(drawn, data):
    pids, arguments = drawn
    plan = make(pids, **arguments)
    world_size = data.draw(st.sampled_from([w for w in range(1, plan.batch + 1) if plan.batch % w == 0]))
    epoch, step = data.draw(st.integers(1, 3)), data.draw(st.integers(0, plan.num_steps - 1))
    # The blocks come from a fresh object that was asked for other things before.
    other = make(pids, **arguments)
    other.step(epoch + 1, 0)
    whole = plan.step(epoch, step)
    blocks = [other.step(epoch, step, r, world_size) for r in reversed(range(world_size))][::-1]
    fields = [step[:2] + step.augmentation for step in (whole, *blocks)]
    for value, *parts in zip(*fields, strict=True):
        joined = np.concatenate(parts)
        assert joined.dtype == value.dtype and np.array_equal(joined, value)
    assert np.array_equal(whole.indices, plan.indices(epoch)[step])
    assert np.array_equal(whole.pids, pids[whole.indices])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_seeds_and_epochs_differ(sampler):
    pids = np.repeat(np.arange(40), 9)
    seen = set()
    for seed, epoch in [(0, 1), (0, 2), (1, 1), (1, 2)]:
        plan = make(pids, sampler=sampler, seed=seed, camids=np.arange(len(pids)) % 5)
        step = plan.step(epoch, 0).augmentation
        seen |= {plan.indices(epoch).tobytes(), step.crop_yx.tobytes() + step.erase.tobytes()}
    assert len(seen) == 8


def test_indices_are_kept_for_two_epochs_and_cannot_be_changed():
    plan = make(np.repeat(np.arange(4), 8))
    first = plan.indices(1)
    assert plan.indices(1) is first and plan.indices(2) is not first and plan.indices(1) is first
    plan.indices(3)
    assert np.array_equal(plan.indices(1), first)
    with pytest.raises(ValueError):
        first[0, 0] = 0


def test_identities_meet_at_random():
    # 60 identities of 6 chunks in batches of 6: a pair meets in 0.51 of an epoch's steps on average; were the columns
    # not shuffled, neighbours of the list's columns would meet in all six.
    pids = np.repeat(np.arange(60), 24)
    plan = make(pids, sampler="identity", batch=24)
    upper = np.triu_indices(60, 1)
    total, often = np.zeros(1770), 0
    places = np.zeros((60, 6))
    for epoch in range(1, 21):
        meetings = np.zeros((60, 60))
        for row in pids[plan.indices(epoch)][:, ::4]:
            meetings[np.ix_(row, row)] += 1
            places[row, np.arange(6)] += 1
        total += meetings[upper]
        often += np.count_nonzero(meetings[upper] >= 4)
    assert plan.num_steps == 60 and total.sum() == 20 * 60 * 15
    assert often < 0.001 * 20 * 1770  # 0.0004 measured over 100 epochs
    assert 0.8 < total.var() / total.mean() < 1.2  # Poisson
    assert places.min() > 4 and places.max() < 40  # of 20 on average: no place of the batch is an identity's own


def test_small_identity_draws_with_replacement():
    pids = [0, 0, 0, 1, 1, 1, 1]
    draws = [tuple(i for i in make(pids, seed=s).step(1, 0).indices if pids[i] == 0) for s in range(100)]
    assert all(len(d) == 4 and set(d) <= {0, 1, 2} for d in draws)
    assert len(set(draws)) > 50 and set(sum(draws, ())) == {0, 1, 2}


def test_augmentation_distribution():
    plan = make(np.repeat(np.arange(1000), 8), batch=8000)
    steps = [plan.step(epoch, 0).augmentation for epoch in range(1, 6)]
    names = ("resize_hw", "crop_yx", "flip", "erase")
    resize, crop, flip, erase = (np.concatenate([getattr(s, name) for s in steps]) for name in names)
    n = len(flip)
    assert resize.dtype == crop.dtype == erase.dtype == np.int32 and flip.dtype == bool
    cropped = resize[:, 0] == 288
    assert (resize[cropped] == [288, 144]).all() and (resize[~cropped] == [256, 128]).all()
    assert (crop[~cropped] == 0).all()
    assert abs(cropped.mean() - 0.5) < 0.01 and abs(flip.mean() - 0.5) < 0.01
    for axis, most in ((0, 32), (1, 16)):
        share = np.bincount(crop[cropped, axis], minlength=most + 1) / cropped.sum() * most
        assert len(share) == most + 1  # both ends reached, nothing beyond
        assert abs(share[[0, -1]] - 0.5).max() < 0.12 and abs(share[1:-1] - 1).max() < 0.17
    y, x, h, w = erase.T
    erased = h > 0
    # 40 % of the image or an aspect of 3.3 do not fit into 256 x 128 now and then, but one of 100 tries does.
    assert abs(erased.mean() - 0.5) < 0.01
    assert (erase[~erased] == 0).all()
    assert (h < 256).all() and (w < 128).all() and (y >= 0).all() and (x >= 0).all()
    assert (y + h)[erased].max() == 256 and (x + w)[erased].max() == 128 and y[erased].min() == x[erased].min() == 0
    area, ratio = (h * w)[erased] / (256 * 128), h[erased] / w[erased]
    assert 0.018 < area.min() < 0.021 and 0.38 < area.max() < 0.405
    assert 0.28 < ratio.min() < 0.32 and 3.1 < ratio.max() < 3.5
    assert abs((y / (256 - h))[erased].mean() - 0.5) < 0.01
    # Independent of each other.
    table = np.stack([cropped, flip, erased, crop[:, 0], crop[:, 1] * cropped]).astype(float)
    together = np.corrcoef(table)
    assert abs(together[np.ix_([0, 1, 2], [0, 1, 2])] - np.eye(3)).max() < 0.02
    assert abs(np.corrcoef(crop[cropped].T)[0, 1]) < 0.02 and n == 40000


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_augmentation_stays_in_bounds(height, width, seed):
    plan = make(
        np.zeros(64, int), batch=64, num_instances=1, height=height, width=width, seed=seed, re_prob=1, rc_prob=1
    )
    step = plan.step(1, 0).augmentation
    assert (step.resize_hw == [round(height * 1.125), round(width * 1.125)]).all()
    assert (step.crop_yx >= 0).all() and (step.crop_yx + np.array([height, width]) <= step.resize_hw).all()
    y, x, h, w = step.erase.T
    assert (step.erase >= 0).all() and (y + h <= height).all() and (x + w <= width).all()
    assert ((h == 0) | (h < height)).all() and ((w == 0) | (w < width)).all()


def test_probability_zero_does_nothing():
    step = make(np.zeros(64, int), batch=64, rc_prob=0, re_prob=0).step(1, 0).augmentation
    assert (step.resize_hw == [256, 128]).all() and not step.crop_yx.any() and not step.erase.any()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("order", ["by identity", "none"])
def test_pieces_of_any_size_make_the_same_plan(monkeypatch, sampler, order):
    rng = np.random.default_rng(0)
    pids = rng.permutation(np.repeat(np.arange(40), rng.integers(1, 20, 40)))
    pids = np.sort(pids) if order == "by identity" else pids
    whole = make(pids, sampler=sampler, camids=np.arange(len(pids)) % 3)
    expected = [whole.indices(epoch) for epoch in (1, 2)]
    num_pieces = []
    for size in (1, 5, 64, 10**6):
        monkeypatch.setattr(philox, "BLOCK", size)
        found = make(pids, sampler=sampler, camids=np.arange(len(pids)) % 3)
        for epoch in (1, 2):
            assert np.array_equal(found.indices(epoch), expected[epoch - 1])
        num_pieces.append(len(philox._ends_of_pieces(pids)))
    assert num_pieces[-1] == 1 and (num_pieces[0] > 30) == (order == "by identity")


# Changes of these hashes are changes of every user's training runs.
@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        ("chunk", "d84fe601377253e7"),
        ("identity", "33eb2cd795905b00"),
        ("identity_camera", "3b321a4ce53315f5"),
    ],
)
def test_golden_hash(sampler, expected):
    pids = np.repeat(np.arange(30), np.arange(1, 31))[::-1]
    digest = hashlib.sha256()
    for seed, epoch in [(0, 1), (7, 3)]:
        plan = make(pids, sampler=sampler, seed=seed, batch=16, camids=np.arange(len(pids)) % 5)
        digest.update(plan.indices(epoch).astype("<i8").tobytes())
        for step in (0, plan.num_steps - 1):
            drawn = plan.step(epoch, step).augmentation
            for value in (drawn.resize_hw, drawn.crop_yx, drawn.flip, drawn.erase):
                digest.update(value.astype("<i4").tobytes())
    assert digest.hexdigest()[:16] == expected


@pytest.mark.parametrize(
    ("pids", "changes", "message"),
    [
        ([0] * 8, {"batch": 6}, "multiple"),
        ([0] * 8, {"num_instances": 0}, "instances"),
        ([0] * 8, {"sampler": "random"}, "expected one of chunk, identity, identity_camera"),
        ([0] * 8, {"sampler": "identity_camera", "batch": 4}, "at least two cameras"),
        ([0] * 8, {"sampler": "identity_camera", "batch": 4, "camids": np.ones(8, int)}, "at least two cameras"),
        ([0] * 8, {"cj_hue": 0.6}, "cj_hue 0.6; expected 0 to 0.5"),
        ([0] * 8, {"re_fill": "red"}, "re_fill 'red'; expected one of constant"),
        ([0] * 8, {"batch": 12}, "at most DATA.TRAIN_BATCH 8"),
        ([0] * 99, {"sampler": "identity"}, "has 1 identities; expected at most DATA.TRAIN_BATCH 4, and"),
        ([], {}, "at least one image"),
        ([-1, 0], {}, "label >= 0"),
        ([0] * 8, {"seed": -1}, "seed -1"),
        ([0] * 8, {"re_prob": 1.5}, "re_prob 1.5"),
        ([0] * 8, {"height": 0}, "0 x 128"),
    ],
)
def test_errors(pids, changes, message):
    with pytest.raises(ValueError, match=message):
        make(pids, **changes)


def test_errors_of_calls():
    plan = make([0] * 8)
    for call in (
        lambda: plan.indices(0),
        lambda: plan.step(1, plan.num_steps),
        lambda: plan.step(1, 0, 0, 3),
        lambda: plan.step(1, 0, 2, 2),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
