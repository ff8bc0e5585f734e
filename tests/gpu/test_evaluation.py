"""The evaluator on the device: the ranks of a stable argsort, ties included, and what the CPU finds."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from reid_dist.evaluator import Features, evaluate_features, ranked_lists
from reid_dist.ranking import counting, expansion, features, positions, rerank
from reid_dist.ranking.protocols import camera_pairs, pool_queries, single_shot
from reid_dist.ranking.roc import LEVELS, roc
from tests.test_metrics import dense_distances, make_case, ranked, reference
from tests.test_rerank import clustered, dense_rerank

HALF = (torch.float16, torch.bfloat16)


def on(rows, device):
    moved = {f.name: getattr(rows, f.name) for f in fields(rows)}
    return Features(**{name: None if t is None else t.to(device) for name, t in moved.items()})


def sides(case, device):
    return [on(case.features(side, 0, 1), device) for side in "qg"]


def assert_equal(result, wanted, tolerance=1e-9):
    for name, value in wanted.items():
        np.testing.assert_allclose(getattr(result, name), value, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("kind", ["integers", "signs"])
def test_ties_rank_by_gallery_index(device, kind, dtype):
    """Products of small integers and of powers of two are exact in every type: equal to the definition."""
    for seed, num_g in enumerate((30, 301, 1000)):
        case = make_case(40, num_g, 8, 5, 3, kind, seed, dtype=dtype, chunk=[None, 7, 40][seed])
        assert_equal(evaluate_features(*sides(case, device), case.metric, case.chunk), reference(case))
        with pytest.raises(AssertionError):
            assert_equal(evaluate_features(*sides(case, device), case.metric), reference(case, later_first=True))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_real_features(device, metric):
    case = make_case(150, 2003, 64, 40, 4, "normal", 0, metric=metric)
    assert_equal(evaluate_features(*sides(case, device), metric), reference(case))
    case.dtype = torch.float32
    found = evaluate_features(*sides(case, device), metric)
    np.testing.assert_allclose(found.mAP, reference(case)["mAP"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_half_types_are_summed_up_in_float32(device, metric, dtype):
    case = make_case(50, 400, 256, 12, 3, "normal", 1, metric=metric, dtype=dtype)
    case.q, case.g = (torch.from_numpy(a).to(dtype).double().numpy() for a in (case.q, case.g))
    assert evaluate_features(*sides(case, device), metric).mAP == pytest.approx(reference(case)["mAP"], abs=1e-4)


def test_blocks_of_temporaries_change_nothing(device, monkeypatch):
    case = make_case(60, 500, 8, 4, 2, "integers", 3, dtype=torch.float32)
    wanted = reference(case)
    monkeypatch.setattr(counting, "GPU_BLOCK_BYTES", 10 * 500 * 4)
    monkeypatch.setattr(features, "BLOCK_BYTES", 7 * 8 * 4)
    monkeypatch.setattr(positions, "TILE_BYTES", 9 * 500 * 4)
    assert_equal(evaluate_features(*sides(case, device), case.metric), wanted)


@pytest.mark.parametrize("kind", ["integers", "signs"])
def test_ranked_lists(device, kind):
    case = make_case(6, 60, 3, 4, 2, kind, 0)
    distances = dense_distances(case)
    for found in ranked_lists(*sides(case, device), [4, 0, 5], 21, case.metric):
        order, match = ranked(case, distances, found.query_index)
        assert found.gallery_indices.tolist() == order[:21].tolist()
        assert found.is_match.tolist() == match[:21].tolist()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_reranking(device, metric):
    case = clustered(20, 150, 6, 12, 3, 0, metric=metric)
    wanted = reference(case, dense_rerank(case, 20, 6, 0.3))
    result = rerank.evaluate_reranked(*sides(case, device), metric)
    for name in ("ap", "inp", "cmc", "mAP"):
        np.testing.assert_allclose(getattr(result, name), wanted[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_expansion(device, metric, gallery):
    case = clustered(20, 150, 6, 12, 3, 1, metric=metric)
    settings = expansion.Settings(5, 3.0, gallery)
    wanted, found = (expansion.expand(*sides(case, place), metric, settings) for place in (torch.device("cpu"), device))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.feats.cpu(), b.feats, rtol=1e-10, atol=1e-10)
    plain = sides(case, device)
    assert (found[0].feats - plain[0].feats).abs().max() > 0.01
    results = [expansion.evaluate_expanded(*sides(case, place), metric, None, settings) for place in ("cpu", device)]
    assert results[1].mAP == pytest.approx(results[0].mAP, abs=1e-9)


@pytest.mark.parametrize("kind", ["integers", "normal"])
def test_roc(device, kind):
    """The same pairs; a pair on the border of two bins may be in either."""
    case = make_case(60, 900, 16, 20, 3, kind, 2, dtype=torch.float32)
    wanted, found = (roc(*sides(case, place), case.metric) for place in ("cpu", device))
    for a, b in zip(found, wanted, strict=True):
        assert a.sum() == b.sum() > 0
        # By so many bins: one to either side of where the CPU has them.
        low, middle, high = (np.roll(b.cumsum(), shift) for shift in (1, 0, -1))
        low[0], high[-1] = 0, b.sum()
        inside = (a.cumsum() >= low) & (a.cumsum() <= high)
        assert inside.all() and (a.cumsum() == middle).mean() > 0.5
    rates, bounds = wanted.tpr(np.array(LEVELS))
    assert (np.abs(found.tpr(np.array(LEVELS))[0] - rates) <= bounds + 0.01).all()


def test_other_protocols(device):
    case = clustered(40, 200, 6, 12, 3, 4)
    cpu, there = (sides(case, place) for place in ("cpu", device))
    pooled = [pool_queries(rows[0]) for rows in (cpu, there)]
    torch.testing.assert_close(pooled[1].feats.cpu(), pooled[0].feats, rtol=1e-12, atol=1e-12)
    assert torch.equal(pooled[1].pids.cpu(), pooled[0].pids)
    shots = [single_shot(*rows, repeats=3) for rows in (cpu, there)]
    assert shots[1].mean.mAP == pytest.approx(shots[0].mean.mAP, abs=1e-9)
    np.testing.assert_allclose(*(camera_pairs(*rows).mAP for rows in (cpu, there)), atol=1e-9)


def test_wrong_input_is_named(device):
    query, gallery = sides(make_case(3, 50, 2, 2, 2, "normal", 0), device)
    feats = gallery.feats.clone()
    feats[7, 1] = torch.nan
    bad = int(gallery.indices[7])
    with pytest.raises(ValueError, match=rf"gallery: NaN, infinite or overflowing .* \[{bad}\]"):
        evaluate_features(query, replace(gallery, feats=feats))
