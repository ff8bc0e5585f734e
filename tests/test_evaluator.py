"""The sharded evaluator against a stable argsort of the full matrix, on random, tied and degenerate input."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from reid_dist import dist, evaluator
from reid_dist.evaluator import Features, evaluate_features, extract, ranked_lists, shard
from reid_dist.ranking import features, positions
from reid_dist.ranking.features import square_norms
from reid_dist.ranking.tiles import Shard
from tests.ranks import run_ranks
from tests.test_metrics import Case, dense_distances, make_case, ranked, reference

WORLD_SIZES = (1, 2, 3, 4)
compared = {"evaluations": 0, "queries": 0, "ranked lists": 0}


def assert_equal(result: evaluator.EvalResult, wanted: dict) -> None:
    for name, value in wanted.items():
        np.testing.assert_allclose(getattr(result, name), value, rtol=0, atol=1e-9, err_msg=name)
    assert (result.rank1, result.rank5, result.rank10) == tuple(result.cmc[[0, 4, 9]])
    assert result.query_indices.tolist() == list(range(result.num_query))
    compared["evaluations"] += 1
    compared["queries"] += result.num_query


def evaluate_cases(cases: list[Case]):
    return [
        evaluate_features(*(c.features(s, dist.rank(), dist.world_size()) for s in "qg"), c.metric, c.chunk)
        for c in cases
    ]


def evaluate_on(world_size: int, cases: list[Case]) -> list[evaluator.EvalResult]:
    """Rank 0's results, after a look that all ranks have the same."""
    by_rank = run_ranks(world_size, evaluate_cases, cases)
    for others in by_rank[1:]:
        for a, b in zip(by_rank[0], others, strict=True):
            for field in fields(a):
                np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
    return by_rank[0]


case_strategy = st.builds(
    make_case,
    num_q=st.integers(1, 9),
    num_g=st.integers(1, 30),
    dim=st.integers(1, 4),
    num_pids=st.integers(1, 5),
    num_camids=st.integers(0, 3),
    kind=st.sampled_from(["integers", "signs", "normal"]),
    seed=st.integers(0, 2**32 - 1),
    metric=st.sampled_from(["cosine", "euclidean"]),
    chunk=st.sampled_from([None, 1, 2, 3, 100]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)


@settings(max_examples=300)
@given(case_strategy)
def test_alone_equals_a_stable_argsort(case):
    assert_equal(evaluate_cases([case])[0], reference(case))


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
@settings(max_examples=4, phases=[Phase.generate])  # shrinking lists of forked runs would take long
@given(cases=st.lists(case_strategy, min_size=15, max_size=15))
def test_equals_a_stable_argsort(world_size, cases):
    for case, result in zip(cases, evaluate_on(world_size, cases), strict=True):
        assert_equal(result, reference(case))


def degenerate_cases() -> list[Case]:
    rng = np.random.default_rng(1)

    def case(num_q, num_g, q_pids, g_pids, q_camids=0, g_camids=1, zero=False, **options):
        q, g = (rng.integers(0, 1 if zero else 2, (n, 3)) * 1.0 for n in (num_q, num_g))
        sizes, values = (num_q, num_g, num_q, num_g), (q_pids, g_pids, q_camids, g_camids)
        full = [None if v is None else np.zeros(n, np.int64) + v for n, v in zip(sizes, values, strict=True)]
        return Case(q, g, *full, **options)

    return [
        case(1, 1, 0, 0),
        case(1, 7, 0, 0),  # one query, everything matches
        case(5, 9, 0, 1),  # no match at all
        case(5, 9, 0, 0, g_camids=0),  # all junk
        case(5, 9, np.arange(5) % 2, 0, g_camids=0),  # all junk or no match
        case(4, 3, 0, np.array([0, 1, 1]), chunk=100),  # a gallery smaller than the chunk and than W
        case(3, 7, 0, np.arange(7) % 2),  # not divisible by W
        case(60, 60, np.arange(60) % 3, np.arange(60) % 3, seed=4),
        case(2, 90, 0, np.arange(90) // 89),  # the first match beyond the end of the CMC, or all but one
        case(2, 90, 1, np.arange(90) // 89),
        case(2, 9, 0, np.arange(9) % 2, zero=True),  # a collapsed network: every distance the same
        case(2, 9, 0, np.arange(9) % 2, None, None, zero=True, metric="cosine", chunk=1),
    ]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_degenerate_input(world_size):
    cases = degenerate_cases()
    results = evaluate_on(world_size, cases)
    for case, result in zip(cases, results, strict=True):
        assert_equal(result, reference(case))
    for result in results[2:5]:
        assert result.num_no_match == result.num_query == 5
        assert result.mAP == result.mINP == result.rank1 == 0


def original_rule(case: Case) -> tuple[float, np.ndarray]:
    """(mAP, CMC) as Simple-ReID's evaluate() adds them up: AP over recall steps, of the queries that have a match."""
    distances, cmc, total, num_no_match = dense_distances(case), np.zeros(len(case.g)), 0.0, 0
    for i, pid in enumerate(case.q_pids):
        order = np.argsort(distances[i])
        same = np.flatnonzero(case.g_pids == pid)
        junk = same[:0] if case.g_camids is None else same[case.g_camids[same] == case.q_camids[i]]
        good = np.setdiff1d(same, junk)
        if len(good) == 0:
            num_no_match += 1
            continue
        where = np.flatnonzero(np.isin(order[~np.isin(order, junk)], good))
        cmc[where[0] :] += 1
        total += sum(1 / len(good) * (n + 1) / (place + 1) for n, place in enumerate(where))
    num = len(case.q) - num_no_match
    return total / num, cmc / num


def cython_rule(case: Case, max_rank: int = 50) -> tuple[float, float, np.ndarray]:
    """(mAP, mINP, CMC) as the evaluators that toolboxes compile have it: cumulated hits, masked by the hits."""
    distances, aps, inps, curves = dense_distances(case), [], [], []
    for i, pid in enumerate(case.q_pids):
        hits = []
        for j in np.argsort(distances[i]):
            is_junk = case.g_camids is not None and case.g_pids[j] == pid and case.g_camids[j] == case.q_camids[i]
            if not is_junk:
                hits.append(int(case.g_pids[j] == pid))
        if not any(hits):
            continue
        raw, cumulated = np.array(hits), np.cumsum(hits)
        last = np.flatnonzero(raw)[-1]
        inps.append(cumulated[last] / (last + 1))
        aps.append((cumulated / np.arange(1, len(raw) + 1) * raw).sum() / raw.sum())
        curves.append(np.pad(np.minimum(cumulated, 1), (0, max_rank), mode="edge")[:max_rank])
    return np.mean(aps), np.mean(inps), np.mean(curves, 0)


@settings(max_examples=60)
@given(
    num_q=st.integers(1, 20),
    num_g=st.integers(1, 80),
    num_pids=st.integers(1, 6),
    num_camids=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
    metric=st.sampled_from(["cosine", "euclidean"]),
)
def test_equals_the_originals_and_the_compiled_evaluators_rules(num_q, num_g, num_pids, num_camids, seed, metric):
    """On input without ties, where they all mean the same."""
    case = make_case(num_q, num_g, 6, num_pids, num_camids, "normal", seed, metric=metric)
    result = evaluate_cases([case])[0]
    compared["evaluations"] += 1
    compared["queries"] += num_q
    if result.num_no_match == num_q:
        return
    mean, curve = original_rule(case)
    assert result.mAP == pytest.approx(mean, abs=1e-9)
    length = min(50, num_g)
    np.testing.assert_allclose(result.cmc[:length], curve[:length], rtol=0, atol=1e-9)
    mean, inp, curve = cython_rule(case)
    assert (result.mAP, result.mINP) == (pytest.approx(mean, abs=1e-9), pytest.approx(inp, abs=1e-9))
    np.testing.assert_allclose(result.cmc, curve, rtol=0, atol=1e-9)


def test_negative_control_wrong_rules_are_seen():
    """The same comparison fails against a reference without the junk rule, and against one with ties the other way."""
    cases = [make_case(9, 30, 3, 3, 2, kind, seed) for kind in ("integers", "signs") for seed in range(5)]
    for case, result in zip(cases, evaluate_cases(cases), strict=True):
        assert_equal(result, reference(case))
        for wrong in ({"junk_rule": False}, {"later_first": True}):
            with pytest.raises(AssertionError):
                assert_equal(result, reference(case, **wrong))


def test_negative_control_without_the_tie_step(monkeypatch):
    case = make_case(9, 30, 3, 3, 2, "integers", 0)
    monkeypatch.setattr(np, "flatnonzero", lambda mask: np.nonzero(mask)[0][: 0 if mask.dtype == bool else None])
    with pytest.raises(AssertionError):
        assert_equal(evaluate_cases([case])[0], reference(case))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_an_argsort_of_the_same_computed_distances(metric, dtype):
    """Real-valued features with every gallery row three times: whatever the product's last bits are."""
    case = make_case(60, 900, 64, 20, 3, "normal", 5, metric=metric, dtype=dtype)
    case.g = np.tile(case.g[:300], (3, 1))
    query, gallery = case.features("q", 0, 1), case.features("g", 0, 1)
    mine = Shard(gallery, metric, square_norms(gallery.feats))
    products, order = mine.tile(query.feats, mine.new_buffer(60))
    tile = np.empty((60, 900))
    tile[np.ix_(query.indices, gallery.indices)] = order.of(products).numpy()
    assert_equal(evaluate_features(query, gallery, metric, chunk=60), reference(case, tile))


@pytest.mark.ranks
def test_world_sizes_agree_on_real_features():
    cases = [make_case(150, 701, 32, 40, 4, "normal", seed, metric=m) for seed, m in ((0, "cosine"), (1, "euclidean"))]
    wanted = [reference(case) for case in cases]
    for world_size in WORLD_SIZES:
        for result, numbers in zip(evaluate_on(world_size, cases), wanted, strict=True):
            assert_equal(result, numbers)


def test_the_tile_keeps_to_its_budget(monkeypatch):
    case = make_case(50, 200, 8, 10, 3, "normal", 3)
    shapes = []
    tile = Shard.tile
    monkeypatch.setattr(Shard, "tile", lambda self, *args: shapes.append(len(args[0])) or tile(self, *args))
    monkeypatch.setattr(positions, "TILE_BYTES", 7 * 200 * 8)
    monkeypatch.setattr(positions, "MATCH_BYTES", 0)
    (result,) = evaluate_cases([case])
    assert len(shapes) == 8 and sum(shapes) == 50 and set(shapes) == {6, 7}
    assert_equal(result, reference(case))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_half_types_are_computed_in_float32(dtype, metric, monkeypatch):
    monkeypatch.setattr(features, "BLOCK_BYTES", 16 * 4 * 10)  # ten rows a block
    case = make_case(20, 75, 16, 6, 2, "normal", 7, metric=metric, dtype=dtype)
    case.q, case.g = (torch.from_numpy(a).to(dtype).double().numpy() for a in (case.q, case.g))
    assert_equal(evaluate_cases([case])[0], reference(case))


def last_bits(tile: torch.Tensor, mine: Shard) -> torch.Tensor:
    """The tile with about half of its entries one floating-point number higher: sums that were split in other ways."""
    rows = torch.arange(len(tile), device=tile.device)[:, None]
    up = features.hashes((rows * 100_003 + mine.indices).numpy().astype(np.uint64)) % np.uint64(2) == 0
    return torch.where(torch.from_numpy(up), torch.nextafter(tile, torch.full_like(tile, torch.inf)), tile)


@pytest.mark.ranks
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_twins_may_differ_in_the_last_bit(metric, monkeypatch):
    """A gallery with every image twice; the two products differ, as where a matrix product splits its sums by tile.

    No result changes while both have one identity; else a match changes places with its own twin alone.
    """
    case = make_case(20, 60, 6, 7, 3, "normal", 5, metric=metric)
    case.g, case.g_camids = np.tile(case.g, (2, 1)), np.tile(case.g_camids, 2)
    one_pid, other_pid = np.tile(case.g_pids, 2), np.concatenate([case.g_pids, case.g_pids + 100])
    match_first = replace(case, g_pids=other_pid)
    reverse = np.arange(120)[::-1].copy()
    twin_first = replace(case, g=case.g[reverse], g_pids=other_pid[reverse], g_camids=case.g_camids[reverse])
    same = replace(case, g_pids=one_pid)
    [quiet], [best], [worst] = (evaluate_cases([c]) for c in (same, match_first, twin_first))
    assert (best.ap > worst.ap + 1e-3).any()

    tile, moved = Shard.tile, []

    def noisy(self, feats, buffer):
        products, order = tile(self, feats, buffer)
        noise = last_bits(products, self)
        moved.append((noise != products).any())
        return products.copy_(noise), order

    monkeypatch.setattr(Shard, "tile", noisy)
    for world_size in (1, 3):
        for found in run_ranks(world_size, evaluate_cases, [same]):
            for name in ("ap", "inp", "cmc"):
                np.testing.assert_array_equal(getattr(found[0], name), getattr(quiet, name))
        for [found] in run_ranks(world_size, evaluate_cases, [match_first]):
            assert (found.ap <= best.ap + 1e-12).all() and (found.ap >= worst.ap - 1e-12).all()
            assert found.mAP not in (best.mAP, worst.mAP)
    evaluate_cases([same])
    assert moved and all(moved)


def list_cases(cases_and_queries, k):
    return [
        ranked_lists(*(c.features(s, dist.rank(), dist.world_size()) for s in "qg"), chosen, k, c.metric)
        for c, chosen in cases_and_queries
    ]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranked_lists_equal_a_stable_argsort(world_size, monkeypatch):
    monkeypatch.setattr(evaluator, "TILE_BYTES", 3 * 23 * 8)  # three queries at a time
    cases = [make_case(6, 23, 3, 4, 2, kind, seed) for kind in ("integers", "signs", "normal") for seed in range(8)]
    chosen = [[4, 0, 4, 5], [], [1]] * 8
    by_rank = run_ranks(world_size, list_cases, list(zip(cases, chosen, strict=True)), 21)
    for results in by_rank:
        for case, queries, lists in zip(cases, chosen, results, strict=True):
            distances = dense_distances(case)
            assert [found.query_index for found in lists] == queries
            for i, found in zip(queries, lists, strict=True):
                order, match = ranked(case, distances, i)
                assert found.gallery_indices.tolist() == order[:21].tolist()
                assert found.is_match.tolist() == match[:21].tolist()
                np.testing.assert_allclose(found.distances, distances[i][order[:21]], atol=1e-12)
                compared["ranked lists"] += 1


def failures(changes):
    """The message of evaluate_features on this rank for every (side, field, value made from the rows' tensor)."""
    case, messages = make_case(4, 8, 3, 2, 2, "normal", 0), []
    for side, field, change, on_rank in changes:
        parts = {s: case.features(s, 0, 1) for s in "qg"}
        for part in parts.values():
            for f in fields(part):
                setattr(part, f.name, getattr(part, f.name)[part.indices.argsort()][dist.rank() :: dist.world_size()])
        if on_rank == dist.rank():
            setattr(parts[side], field, change(getattr(parts[side], field)))
        try:
            evaluate_features(parts["q"], parts["g"])
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    return messages


def put(tensor, value):
    tensor = tensor.clone()
    tensor[0] = value
    return tensor


FAULTS = [
    ("q", "feats", lambda t: put(t, float("nan")), 1, ["rank 1: query", "dataset index [1]"]),
    ("g", "feats", lambda t: put(t, float("inf")), 1, ["rank 1: gallery", "dataset index [1]"]),
    ("g", "feats", lambda t: put(t, 1e160), 0, ["rank 0: gallery", "overflowing", "[0]"]),
    ("g", "feats", lambda t: t.float(), 1, ["rank 1's gallery", "float32", "float64"]),
    ("q", "feats", lambda t: t[:, :2], 1, ["rank 1's query", "width 2", "width 5"]),
    ("g", "feats", lambda t: t[0], 0, ["gallery: feats", "(5,)"]),
    ("g", "camids", lambda t: None, 1, ["rank 1's gallery", "no camids"]),
    ("g", "pids", lambda t: t.int(), 1, ["gallery: pids", "torch.int32"]),
    ("g", "indices", lambda t: t[:-1], 1, ["gallery: indices", "(3,)"]),
    ("g", "indices", lambda t: put(t, 4), 1, ["gallery: dataset indices missing [1]", "more than once [4]", "0..7"]),
    ("q", "indices", lambda t: put(t, -1), 0, ["query: dataset indices missing [0]", "0..3"]),
    ("q", "indices", lambda t: put(t, 9), 0, ["query: dataset indices missing [0]"]),
]


@pytest.mark.ranks
def test_wrong_input_is_an_error_that_says_which_on_every_rank():
    first, second = run_ranks(2, failures, [fault[:4] for fault in FAULTS])
    assert first == second
    for message, (*_, parts) in zip(first, FAULTS, strict=True):
        assert all(part in message for part in parts), (message, parts)


def test_wrong_arguments():
    query, gallery = (make_case(3, 5, 2, 2, 2, "normal", 0).features(s, 0, 1) for s in "qg")
    empty = Features(*(getattr(query, f.name)[:0] for f in fields(query)))
    for message, call in (
        ("query: no rows", lambda: evaluate_features(empty, gallery)),
        ("gallery: no rows", lambda: evaluate_features(query, empty)),
        ("metric='l2'", lambda: evaluate_features(query, gallery, "l2")),
        ("chunk=0", lambda: evaluate_features(query, gallery, chunk=0)),
        (r"query_rows \[3\]", lambda: ranked_lists(query, gallery, [0, 3])),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_cover_everything_once(num, world_size):
    shares = [shard(num, r, world_size) for r in range(world_size)]
    assert [i for share in shares for i in share] == list(range(num))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Net(torch.nn.Module):
    """Tells left from right, and training from evaluation."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3 * 4 * 2, 5)
        self.bn = torch.nn.BatchNorm1d(5)

    def forward(self, images):
        return self.bn(self.linear(images.flatten(1)))


def test_extract_adds_the_flipped_image_and_restores_the_flags():
    torch.manual_seed(0)
    net, images, indices = Net().train(), torch.randn(7, 3, 4, 2), torch.arange(7) * 3
    net.linear.eval()
    before, seen = {k: v.clone() for k, v in net.state_dict().items()}, []
    batches = [(images[a : a + 3], indices[a : a + 3]) for a in (0, 3, 6)]
    feats, rows = extract(net, batches, 7, 5, torch.device("cpu"), progress=seen.append)
    assert (net.training, net.bn.training, net.linear.training) == (True, True, False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    wanted = net.eval()(images) + net(images.flip(-1))
    torch.testing.assert_close(feats, wanted.detach(), rtol=0, atol=1e-6)
    assert torch.equal(rows, indices) and seen == [3, 3, 1] and not feats.requires_grad

    half, _ = extract(net, batches, 7, 5, torch.device("cpu"), autocast=torch.bfloat16)
    assert half.dtype == torch.float32 and 0 < (half - feats).abs().max() < 0.1
    double, _ = extract(net.double(), [(i.double(), r) for i, r in batches], 7, 5, torch.device("cpu"))
    assert double.dtype == torch.float64
    none, no_rows = extract(net, [], 0, 5, torch.device("cpu"))
    assert none.shape == (0, 5) and none.dtype == torch.float64 and no_rows.shape == (0,)


@pytest.mark.parametrize("num", [2, 4])
def test_extract_wants_the_number_of_images_it_was_told(num):
    net = Net().train()
    with pytest.raises(ValueError, match=f"num={num}"):
        extract(net, [(torch.zeros(3, 3, 4, 2), torch.arange(3))], num, 5, torch.device("cpu"))
    assert net.training


def test_number_of_cases(tell):
    """Last: says how much was compared in this run."""
    assert all(compared.values())
    tell("evaluator: compared " + ", ".join(f"{n:,} {what}" for what, n in compared.items()))
