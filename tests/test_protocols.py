"""Query expansion, ROC, camera pairs, pooled queries and single gallery shots over ranks against plain dense loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reid_dist import dist
from reid_dist.ranking import positions, roc
from reid_dist.ranking.expansion import Settings, evaluate_expanded, expand, without_self
from reid_dist.ranking.features import Labels
from reid_dist.ranking.protocols import camera_pairs, draw, pool_queries, single_shot, worst_identities
from tests.ranks import run_ranks
from tests.test_metrics import Case, dense_distances, make_case, reference
from tests.test_rerank import clustered

WORLD_SIZES = (1, 2, 3)


def on_ranks(world_size: int, fn, cases: list) -> list:
    """Rank 0's values of fn(query, gallery, case) for every case, after a look that all ranks have the same."""

    def all_cases():
        return [fn(*(c.features(s, dist.rank(), dist.world_size()) for s in "qg"), c) for c in cases]

    by_rank = run_ranks(world_size, all_cases)
    for others in by_rank[1:]:
        for a, b in zip(by_rank[0], others, strict=True):
            np.testing.assert_equal(a, b)
    return by_rank[0]


def whole(rows, name: str = "feats") -> np.ndarray:
    """A field of all ranks' rows, by index."""
    values = dist.all_gather_rows(getattr(rows, name))
    return values[dist.all_gather_rows(rows.indices).argsort()].numpy()


# Query expansion.


def unit(feats: np.ndarray) -> np.ndarray:
    return feats / np.linalg.norm(feats, axis=1, keepdims=True)


def dense_expand(case: Case, s: Settings) -> tuple[np.ndarray, np.ndarray]:
    q, g = (unit(case.q), unit(case.g)) if case.metric == "cosine" else (case.q, case.g)

    def expanded(row: np.ndarray, own: int | None) -> np.ndarray:
        order = np.argsort(((g - row) ** 2).sum(1), kind="stable")
        near = order[order != own][: s.k]
        cosines = g[near] @ row / np.linalg.norm(g[near], axis=1) / np.linalg.norm(row)
        weights = np.maximum(cosines, 0) ** s.alpha
        return (row + weights @ g[near]) / (1 + weights.sum())

    new = np.stack([expanded(row, own) for own, row in enumerate(g)]) if s.gallery else case.g
    return np.stack([expanded(row, None) for row in q]), new


EXPANSIONS = [
    (clustered(12, 60, 6, 7, 3, 0, metric="cosine"), Settings()),
    (clustered(12, 60, 6, 7, 3, 1, metric="euclidean"), Settings(5, 1.0)),
    (clustered(9, 40, 6, 7, 3, 2, metric="cosine"), Settings(3, 2.0, gallery=True)),
    (clustered(9, 40, 6, 7, 3, 3, metric="euclidean"), Settings(4, 0.0, gallery=True)),
    (clustered(4, 3, 6, 2, 0, 4, metric="cosine"), Settings(10, 3.0, gallery=True)),
]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_expansion_equals_a_dense_reference(world_size, monkeypatch):
    monkeypatch.setattr(positions, "TILE_BYTES", 4096)  # several chunks
    settings = iter(s for _, s in EXPANSIONS)

    def both(query, gallery, case):
        s = next(settings)
        return [
            *map(whole, expand(query, gallery, case.metric, s)),
            evaluate_expanded(query, gallery, case.metric, None, s).ap,
        ]

    found = on_ranks(world_size, both, [case for case, _ in EXPANSIONS])
    for (case, s), (q, g, ap) in zip(EXPANSIONS, found, strict=True):
        wanted_q, wanted_g = dense_expand(case, s)
        np.testing.assert_allclose(q, wanted_q, rtol=0, atol=1e-12)
        np.testing.assert_allclose(g, wanted_g, rtol=0, atol=1e-12)
        new = Case(wanted_q, wanted_g, case.q_pids, case.g_pids, case.q_camids, case.g_camids, case.metric)
        np.testing.assert_allclose(ap, reference(new)["ap"], rtol=0, atol=1e-6)


def test_a_row_is_not_its_own_neighbour():
    """Also where equal rows stand before it, or have pushed it out."""
    near = np.array([[0, 1, 2], [0, 1, 2], [0, 1, 3], [3, 0, 1]])
    assert without_self(near, 2).tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]


def test_expansion_settings_matter_and_help():
    case = clustered(40, 200, 6, 12, 3, 0)
    query, gallery = case.features("q", 0, 1), case.features("g", 0, 1)
    plain = reference(case)["mAP"]
    one, other = (evaluate_expanded(query, gallery, settings=s).mAP for s in (Settings(), Settings(3, 1.0)))
    assert one > plain + 0.02 and abs(one - other) > 1e-4
    for wrong in (Settings(k=0), Settings(alpha=-1.0)):
        with pytest.raises(ValueError, match="expected k of at least 1"):
            expand(query, gallery, settings=wrong)


# ROC.


def pairs(case: Case, junk_rule: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Distances of the positive and of the negative pairs."""
    distances = dense_distances(case)
    same = case.q_pids[:, None] == case.g_pids
    junk = same & (case.q_camids[:, None] == case.g_camids) if case.q_camids is not None and junk_rule else same & False
    return distances[same & ~junk], distances[~same]


def exact_tpr(positive: np.ndarray, negative: np.ndarray, fpr: float) -> float:
    """The best true positive rate of any threshold whose false positive rate is at most fpr."""
    thresholds = np.concatenate([[-np.inf], positive, negative])
    good = [t for t in thresholds if (negative <= t).sum() <= round(fpr * len(negative), 9)]
    return max((positive <= t).mean() for t in good)


ROC_CASES = [
    make_case(9, 31, 3, 3, 2, "integers", 0),
    make_case(9, 31, 3, 3, 2, "signs", 1),
    make_case(7, 40, 4, 3, 0, "normal", 2, metric="cosine"),
    make_case(7, 40, 4, 3, 2, "normal", 3, metric="euclidean"),
    make_case(2, 3, 4, 1, 0, "normal", 4, metric="cosine"),  # no negative pair
]
FPR = np.array([0.0, 0.01, 0.1, 0.5, 1.0])


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_roc_equals_all_thresholds(world_size):
    found = on_ranks(world_size, lambda q, g, case: roc.roc(q, g, case.metric, 4).tpr(FPR), ROC_CASES)
    for case, (rates, bounds) in zip(ROC_CASES[:-1], found, strict=False):
        wanted = np.array([exact_tpr(*pairs(case), f) for f in FPR])
        assert (rates <= wanted + 1e-12).all() and (wanted <= rates + bounds + 1e-12).all()
        if len(np.unique(dense_distances(case))) < 40:  # every distance has a bin of its own
            np.testing.assert_allclose(rates, wanted, rtol=0, atol=1e-12)
        assert bounds.max() < 0.5
    assert np.isnan(found[-1]).all()


def test_roc_on_both_devices_code_and_a_negative_control(monkeypatch):
    case = ROC_CASES[0]
    query, gallery = case.features("q", 0, 1), case.features("g", 0, 1)
    found = roc.roc(query, gallery, "euclidean")
    positive, negative = pairs(case)
    assert (found.positive.sum(), found.negative.sum()) == (len(positive), len(negative))
    assert len(positive) < len(pairs(case, junk_rule=False)[0])
    wrong = exact_tpr(pairs(case, junk_rule=False)[0], negative, 0.1)
    assert abs(found.tpr(np.array([0.1]))[0][0] - wrong) > 1e-3
    plain = torch.tensor([0.0, 5.9, 70000.0, -3.0, torch.inf])
    assert roc.histogram(plain).nonzero()[:, 0].tolist() == [0, 5, roc.NUM_BINS - 1]
    assert roc.histogram(plain)[0] == 2 and roc.histogram(plain).sum() == 4


# Pairs of cameras.


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_camera_pairs_equal_separate_evaluations(world_size):
    cases = [make_case(20, 60, 3, 4, 3, kind, seed) for seed, kind in enumerate(("integers", "signs", "normal"))]
    cases.append(make_case(4, 9, 3, 2, 0, "normal", 3))

    def table(query, gallery, case):
        found = camera_pairs(query, gallery, case.metric)
        return None if found is None else (found.query_camids, found.gallery_camids, found.mAP)

    found = on_ranks(world_size, table, cases)
    assert found[3] is None
    for case, (asking, answering, values) in zip(cases[:3], found, strict=False):
        assert asking.tolist() == answering.tolist() == [0, 1, 2]
        assert np.isnan(np.diag(values)).all()  # all junk
        for a, b in [(0, 1), (1, 2), (2, 0)]:
            q, g = case.q_camids == a, case.g_camids == b
            part = Case(case.q[q], case.g[g], case.q_pids[q], case.g_pids[g], None, None, case.metric)
            assert values[a, b] == pytest.approx(reference(part)["mAP"], abs=1e-9)


# Pooled queries.


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_pooled_queries_are_means(world_size, monkeypatch):
    monkeypatch.setattr(positions, "TILE_BYTES", 4 * 8 * 5 * 2)  # two groups at a time
    cases = [make_case(30, 5, 3, 4, cams, "normal", cams, metric=m) for cams, m in ((3, "cosine"), (0, "euclidean"))]

    def pooled(query, gallery, case):
        found = pool_queries(query, case.metric)
        camids = None if found.camids is None else whole(found, "camids")
        return whole(found), whole(found, "pids"), camids, len(found.feats)

    def sizes_aside(query, gallery, case):
        return pooled(query, gallery, case)[:3]

    for case, (feats, pids, camids) in zip(cases, on_ranks(world_size, sizes_aside, cases), strict=True):
        q = unit(case.q) if case.metric == "cosine" else case.q
        q_camids = np.zeros(30) if case.q_camids is None else case.q_camids
        keys = sorted(set(zip(case.q_pids.tolist(), q_camids.tolist(), strict=True)))
        assert len(keys) < 30
        wanted = [q[(case.q_pids == pid) & (q_camids == camid)].mean(0) for pid, camid in keys]
        np.testing.assert_allclose(feats, wanted, rtol=0, atol=1e-12)
        assert pids.tolist() == [pid for pid, _ in keys]
        assert camids is None if case.q_camids is None else camids.tolist() == [camid for _, camid in keys]


# One gallery image of each identity.


def shot_by_shot(case: Case, repeats: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(Q,) mean AP, (50,) mean CMC by plain loops; the draw alone is the product's."""
    distances, aps, curves = dense_distances(case), [], []
    for repeat in range(repeats):
        ap, cmc = np.full(len(case.q), np.nan), []
        for i in range(len(case.q)):
            valid = np.arange(len(case.g))
            if case.g_camids is not None:
                valid = valid[case.g_camids != case.q_camids[i]]
            chosen = np.sort(draw(Labels(case.g_pids[valid], valid, valid), seed, repeat))
            order = chosen[np.argsort(distances[i][chosen], kind="stable")]
            hit = np.flatnonzero(case.g_pids[order] == case.q_pids[i])
            if len(hit):
                ap[i] = 1 / (1 + hit[0])
                cmc.append(np.arange(50) >= hit[0])
        aps.append(ap)
        curves.append(np.mean(cmc, 0))
    return np.mean(aps, 0), np.mean(curves, 0)


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_single_shots_equal_loops_on_every_number_of_ranks(world_size):
    cases = [make_case(8, 40, 3, 5, cams, kind, cams) for cams, kind in ((2, "integers"), (3, "normal"), (0, "signs"))]

    def shots(query, gallery, case):
        found = single_shot(query, gallery, case.metric, repeats=3, seed=7)
        return found.mean.ap, found.mean.cmc, found.rank1

    for case, (ap, cmc, rank1) in zip(cases, on_ranks(world_size, shots, cases), strict=True):
        wanted_ap, wanted_cmc = shot_by_shot(case, 3, 7)
        np.testing.assert_allclose(ap, wanted_ap, rtol=0, atol=1e-9)
        np.testing.assert_allclose(cmc, wanted_cmc, rtol=0, atol=1e-9)
        assert len(rank1) == 3 and rank1.mean() == pytest.approx(cmc[0])


def test_the_draw_is_uniform():
    """The mean over many repeats is the expectation, which is a product over the identities."""
    case = make_case(6, 30, 4, 4, 2, "normal", 1)
    distances, expected = dense_distances(case), []
    for i in range(6):
        valid = case.g_camids != case.q_camids[i]
        own = np.flatnonzero(valid & (case.g_pids == case.q_pids[i]))
        others = [np.flatnonzero(valid & (case.g_pids == pid)) for pid in set(case.g_pids[valid]) - {case.q_pids[i]}]
        first = [np.prod([(distances[i][rows] > distances[i][j]).mean() for rows in others]) for j in own]
        if len(own):
            expected.append(np.mean(first))
    found = single_shot(case.features("q", 0, 1), case.features("g", 0, 1), repeats=150, seed=0)
    spread = found.rank1.std() / 150**0.5
    assert abs(found.mean.rank1 - np.mean(expected)) < 4 * spread < 0.15
    again = single_shot(case.features("q", 0, 1), case.features("g", 0, 1), repeats=150, seed=1)
    assert again.rank1.tolist() != found.rank1.tolist()
    with pytest.raises(ValueError, match="repeats=0"):
        single_shot(case.features("q", 0, 1), case.features("g", 0, 1), repeats=0)


def test_worst_identities_by_hand():
    pids, ap = np.array([5, 3, 5, 9, 3, 7]), np.array([0.25, 0.5, 0.75, np.nan, 0.25, 0.375])
    assert worst_identities(pids, ap, 2) == [(3, 0.375, 2), (7, 0.375, 1)]
    assert worst_identities(pids, ap)[2:] == [(5, 0.5, 2)]
    assert worst_identities(pids, np.full(6, np.nan)) == []
