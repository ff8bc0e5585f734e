"""Re-ranking and query expansion over ranks against plain dense references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reid_dist import dist
from reid_dist.evaluator import evaluate_features
from reid_dist.ranking import expansion, features, rerank, tiles
from reid_dist.ranking.rerank import Settings, evaluate_reranked
from tests.ranks import run_ranks
from tests.test_metrics import Case, make_case, reference


def clustered(num_q: int, num_g: int, dim: int, num_pids: int, num_camids: int, seed: int, **options) -> Case:
    """Features around a centre per identity, so that reciprocal sets are neither empty nor everything."""
    case = make_case(num_q, num_g, dim, num_pids, num_camids, "normal", seed, **options)
    centres = np.random.default_rng(seed).normal(size=(num_pids, case.q.shape[1]))
    case.q, case.g = case.q + 1.2 * centres[case.q_pids], case.g + 1.2 * centres[case.g_pids]
    return case


def all_distances(case: Case) -> np.ndarray:
    feats = np.concatenate([case.q, case.g])
    if case.metric == "cosine":
        feats = feats / np.linalg.norm(feats, axis=1, keepdims=True)
    return ((feats[:, None] - feats[None]) ** 2).sum(2)


def dense_rerank(case: Case, k1: int, k2: int, weight: float) -> np.ndarray:
    """(Q, G) final distances by whole matrices and plain loops, after Zhong et al. 2017, sections 3.2 to 3.5."""
    d = all_distances(case)
    d = d / d.max(1, keepdims=True)
    order = np.argsort(d, axis=1, kind="stable")
    num, num_q = len(d), len(case.q)

    def reciprocal(i: int, k: int) -> set[int]:
        return {j for j in order[i, : k + 1].tolist() if i in order[j, : k + 1]}

    v = np.zeros((num, num))
    for i in range(num):
        core = reciprocal(i, k1)
        members = set(core)
        for j in core:
            other = reciprocal(j, int(np.around(k1 / 2)))
            if len(other & core) > 2 / 3 * len(other):
                members |= other
        columns = sorted(members)
        v[i, columns] = np.exp(-d[i, columns])
        v[i] /= v[i].sum()
    v = np.stack([v[order[i, :k2]].mean(0) for i in range(num)])
    smaller = np.minimum(v[:num_q, None], v[None, num_q:]).sum(2)
    jaccard = 1 - smaller / (2 - smaller)
    return (1 - weight) * jaccard + weight * d[:num_q, num_q:]


def rerank_cases(cases_and_settings):
    return [
        evaluate_reranked(*(c.features(s, dist.rank(), dist.world_size()) for s in "qg"), c.metric, c.chunk, settings)
        for c, settings in cases_and_settings
    ]


CASES = [
    (clustered(12, 60, 6, 7, 3, seed, metric=metric, chunk=chunk), Settings(*numbers))
    for seed, (metric, chunk, numbers) in enumerate(
        [
            ("cosine", None, (20, 6, 0.3)),
            ("euclidean", None, (20, 6, 0.3)),
            ("cosine", 5, (7, 3, 0.3)),
            ("cosine", 1, (5, 1, 0.0)),
            ("euclidean", 4, (8, 4, 1.0)),
            ("cosine", None, (1, 1, 0.5)),
        ]
    )
] + [(clustered(3, 5, 4, 2, 0, 9), Settings(20, 6, 0.3)), (clustered(2, 9, 4, 2, 2, 10), Settings(4, 8, 0.3))]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_reranking_equals_a_dense_reference(world_size):
    for results in run_ranks(world_size, rerank_cases, CASES):
        for (case, settings), result in zip(CASES, results, strict=True):
            wanted = reference(case, dense_rerank(case, settings.k1, settings.k2, settings.weight))
            for name in ("ap", "inp", "cmc", "mAP", "num_no_match"):
                np.testing.assert_allclose(getattr(result, name), wanted[name], rtol=0, atol=1e-6, err_msg=name)


def test_reranking_changes_the_order_and_helps_on_clusters():
    case = clustered(40, 200, 6, 12, 3, 0)
    plain, reranked = (
        f(case.features("q", 0, 1), case.features("g", 0, 1)) for f in (evaluate_features, evaluate_reranked)
    )
    assert reranked.mAP > plain.mAP + 0.02


def test_the_reference_is_not_indifferent():
    """A negative control: other settings give other numbers in the comparison above."""
    case, _ = CASES[0]
    one, other = (reference(case, dense_rerank(case, *numbers))["mAP"] for numbers in ((20, 6, 0.3), (10, 3, 0.6)))
    assert abs(one - other) > 1e-4


@pytest.mark.parametrize("settings", [Settings(k1=0), Settings(k2=0), Settings(weight=1.5)])
def test_settings_out_of_range(settings):
    case = CASES[0][0]
    with pytest.raises(ValueError, match="expected k1 and k2"):
        evaluate_reranked(case.features("q", 0, 1), case.features("g", 0, 1), settings=settings)


def test_blocks_are_larger_on_a_gpu():
    cpu, gpu = (features.block_bytes(torch.device(name)) for name in ("cpu", "cuda:1"))
    assert cpu == 8 << 20 and gpu == 256 << 20


def test_no_bit_of_reranking_and_expansion_depends_on_the_size_of_the_blocks(monkeypatch):
    """Blocks of one row up to blocks of everything, in every place that asks how large they may be."""
    case = clustered(12, 60, 6, 7, 3, 0, dtype=torch.float16)
    sides = [case.features(side, 0, 1) for side in "qg"]
    found, asked = [], set()
    for size in (1, 1 << 10, 256 << 20):
        for module in (features, tiles, rerank, expansion):

            def block_bytes(device, module=module, size=size):
                asked.add(module.__name__.rpartition(".")[2])
                return size

            monkeypatch.setattr(module, "block_bytes", block_bytes)
        settings = expansion.Settings(5, 3.0, gallery=True)
        expanded = expansion.expand(*sides, settings=settings)
        found.append([*(rows.feats.numpy() for rows in expanded), evaluate_reranked(*sides).ap])
    assert asked == {"features", "tiles", "rerank", "expansion"}
    for others in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], others, strict=True))
