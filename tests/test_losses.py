"""Each loss against its formula as plain loops in fp64, at the edges of its domain, against another library, on ranks.

The references are written from the formulas, one anchor and one pair at a time. `fixed` holds the values behind the
circle losses' weights, which carry no gradient: a numerical derivative has to keep them still.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import distances, losses, miners, reducers
from torch.utils._python_dispatch import TorchDispatchMode

from reid_dist import dist
from reid_dist.losses import CLASSIFICATION, PAIRWISE, build_classification, build_pairwise, uses_cosine
from reid_dist.losses.cross_entropy import SoftmaxParts, smoothed_cross_entropy, softmax_parts
from tests.ranks import run_ranks

# tests/test_recipes.py has the triplet losses without a margin.
ORIGINAL = [name for name in PAIRWISE if name not in ("softtriplet", "weightedtriplet")]
PAIRS = [("triplet", "cosine"), ("triplet", "euclidean"), *((n, "cosine") for n in ORIGINAL if n != "triplet")]
WITHOUT_WEIGHTS = [p for p in PAIRS if p[0] != "circle"]
# Identity 0 has four images, 1 and 2 two each, 3, 4 and 5 one: no anchor of the last three has a positive.
PIDS = torch.tensor([0, 1, 0, 3, 2, 0, 1, 4, 2, 0, 5, 1])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- references


def relu(x):
    return x if x > 0 else 0 * x


def log_sum_exp(values):
    return torch.stack(values).exp().sum().log()


def reference_logit(name, cos, fixed, is_target, scale, margin):
    if name == "cosface":
        return scale * (cos - margin if is_target else cos)
    if name == "arcface" and is_target:
        if cos > math.cos(math.pi - margin):
            return scale * torch.cos(torch.acos(cos) + margin)
        return scale * (cos - margin * math.sin(math.pi - margin))
    if name == "arcface":
        return scale * cos
    if name == "circle" and is_target:
        return scale * relu(1 + margin - fixed) * (cos - (1 - margin))
    if name == "circle":
        return scale * relu(fixed + margin) * (cos - margin)
    return cos


def reference_classification(name, x, pids, scale, margin, fixed=None):
    fixed = x.detach() if fixed is None else fixed
    loss = 0
    for i, pid in enumerate(pids.tolist()):
        row = [reference_logit(name, x[i, c], fixed[i, c], c == pid, scale, margin) for c in range(x.shape[1])]
        for c in range(len(row)):
            target = float(c == pid)
            if name == "crossentropylabelsmooth":
                target = (1 - 0.1) * target + 0.1 / len(row)
            loss = loss - target * (row[c] - log_sum_exp(row))
    return loss / len(pids)


def reference_pairwise(name, feats, pids, offset, num_anchors, scale, margin, distance, fixed=None):
    """feats (N, D) and pids (N,) are the references; the anchors are num_anchors of them from offset on."""
    pids = pids.tolist()
    rows = range(len(pids))
    z = [f / f.norm() for f in feats]
    z_fixed = z if fixed is None else [f / f.norm() for f in fixed]
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(offset, offset + num_anchors):
        s = [z[i].dot(z[j]) for j in rows]
        w = [z_fixed[i].dot(z_fixed[j]).detach() for j in rows]
        positives = [j for j in rows if pids[j] == pids[i] and j != i]
        negatives = [j for j in rows if pids[j] != pids[i]]
        if name == "triplet":
            squared = [(feats[i] - feats[j]).square().sum().clamp(min=1e-12) for j in rows]
            d = [-v for v in s] if distance == "cosine" else [v.sqrt() for v in squared]
            if negatives:
                loss = loss + relu(max(d[j] for j in [*positives, i]) - min(d[j] for j in negatives) + margin)
        elif not positives or not negatives:
            pass
        elif name == "contrastive":
            for p in positives:
                own = (scale * s[p]).exp()
                loss = loss - (own / (sum((scale * s[n]).exp() for n in negatives) + own)).log() / len(positives)
        elif name == "cosface":
            of_negatives = log_sum_exp([scale * (s[n] + margin) for n in negatives])
            loss = loss + (1 + (of_negatives + log_sum_exp([-scale * s[p] for p in positives])).exp()).log()
        else:
            of_negatives = log_sum_exp([scale * relu(w[n] + margin) * (s[n] - margin) for n in negatives])
            of_positives = log_sum_exp([scale * relu(1 + margin - w[p]) * (1 - margin - s[p]) for p in positives])
            loss = loss + (1 + (of_negatives + of_positives).exp()).log()
    return loss / num_anchors


def value_and_gradient(loss, x):
    x = x.detach().clone().requires_grad_()
    value = loss(x)
    if not value.requires_grad:  # a reference to which no anchor contributed
        return value, torch.zeros_like(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def on_batch(loss, pids, offset=0, num_anchors=None):
    """The loss as a function of all N features, of which the anchors are num_anchors from offset on."""
    end = len(pids) if num_anchors is None else offset + num_anchors
    return lambda x: loss(x[offset:end], pids[offset:end], x, pids, offset)


def assert_same(ours, theirs, tolerance=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- against the references


@pytest.mark.parametrize("name", CLASSIFICATION)
@given(
    pids=st.integers(1, 6).flatmap(lambda c: st.lists(st.integers(0, c - 1), min_size=1, max_size=5)),
    spare=st.integers(0, 2),
    scale=st.floats(1, 64),
    margin=st.floats(0, 0.5),
    seed=st.integers(0, 999),
)
@settings(max_examples=25)
def test_classification_is_its_formula(name, pids, spare, scale, margin, seed):
    pids = torch.tensor(pids)
    x = random(len(pids), int(pids.max()) + 1 + spare, seed=seed).tanh()
    ours = value_and_gradient(lambda x: build_classification(name, scale, margin)(x, pids), x)
    assert_same(ours, value_and_gradient(lambda x: reference_classification(name, x, pids, scale, margin), x))


def test_arcface_beyond_pi():
    x, pids = torch.tensor([[-0.99, 0.2], [-0.9, 0.1]], dtype=torch.float64), torch.tensor([0, 0])
    assert math.cos(math.pi - 0.5) > -0.9
    ours = value_and_gradient(lambda x: build_classification("arcface", 16.0, 0.5)(x, pids), x)
    assert_same(ours, value_and_gradient(lambda x: reference_classification("arcface", x, pids, 16.0, 0.5), x))


@pytest.mark.parametrize(("name", "distance"), PAIRS)
@given(
    pids=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    scale=st.floats(1, 48),
    margin=st.floats(0, 0.5),
    seed=st.integers(0, 999),
)
@settings(max_examples=25)
def test_pairwise_is_its_formula(name, distance, pids, cut, scale, margin, seed):
    pids = torch.tensor(pids)
    offset = int(cut[0] * (len(pids) - 1))
    num_anchors = 1 + int(cut[1] * (len(pids) - 1 - offset))
    loss = build_pairwise(name, scale, margin, distance)
    x = random(len(pids), 4, seed=seed)
    ours = value_and_gradient(on_batch(loss, pids, offset, num_anchors), x)
    arguments = (pids, offset, num_anchors, scale, margin, distance)
    assert_same(ours, value_and_gradient(lambda x: reference_pairwise(name, x, *arguments), x), 1e-9)


@pytest.mark.parametrize("name", [n for n in CLASSIFICATION if n != "circle"])
def test_classification_gradcheck(name):
    x, pids = random(4, 5).tanh().requires_grad_(), torch.tensor([0, 4, 2, 2])
    assert torch.autograd.gradcheck(lambda x: build_classification(name, 16.0, 0.3)(x, pids), x)


@pytest.mark.parametrize(("name", "distance"), WITHOUT_WEIGHTS)
@pytest.mark.parametrize(("offset", "num_anchors"), [(0, 12), (4, 4)])
def test_pairwise_gradcheck(name, distance, offset, num_anchors):
    loss = on_batch(build_pairwise(name, 8.0, 0.3, distance), PIDS, offset, num_anchors)
    assert torch.autograd.gradcheck(loss, random(12, 3).requires_grad_())


@pytest.mark.parametrize("kind", ["classification", "pairwise"])
def test_circle_gradient_keeps_the_weights_still(kind):
    """Numerical derivatives of the formula with its weights frozen; gradcheck would move them."""
    if kind == "classification":
        x, pids = random(3, 4).tanh(), torch.tensor([0, 3, 3])
        ours = value_and_gradient(lambda x: build_classification("circle", 8.0, 0.3)(x, pids), x)[1]

        def formula(moved):
            return reference_classification("circle", moved, pids, 8.0, 0.3, fixed=x)

    else:
        x, pids = random(6, 3), PIDS[:6]
        ours = value_and_gradient(on_batch(build_pairwise("circle", 8.0, 0.3, "cosine"), pids), x)[1]

        def formula(moved):
            return reference_pairwise("circle", moved, pids, 0, 6, 8.0, 0.3, "cosine", fixed=x)

    step = 1e-6 * torch.eye(x.numel(), dtype=torch.float64).view(-1, *x.shape)
    slopes = torch.stack([(formula(x + e) - formula(x - e)) / 2e-6 for e in step])
    torch.testing.assert_close(ours.flatten(), slopes, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------- the registry


def test_names_are_the_configs():
    assert list(CLASSIFICATION) == ["crossentropy", "crossentropylabelsmooth", "arcface", "cosface", "circle"]
    assert list(PAIRWISE) == ["triplet", "softtriplet", "weightedtriplet", "contrastive", "cosface", "circle"]
    assert [n for n in CLASSIFICATION if uses_cosine(n)] == ["arcface", "cosface", "circle"]


def test_torchs_cross_entropy_is_ours():
    x, pids = random(6, 9), torch.tensor([0, 8, 3, 3, 1, 5])
    ours = [build_classification(n, 16.0, 0.3)(x, pids) for n in ("crossentropy", "crossentropylabelsmooth")]
    assert_same(ours, [F.cross_entropy(x, pids), F.cross_entropy(x, pids, label_smoothing=0.1)], 1e-14)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_softmax_from_slices_of_the_classes(name):
    """What a classifier spread over ranks needs: the parts of disjoint classes combine to those of all."""
    x, pids = random(5, 7).tanh(), torch.tensor([0, 6, 3, 3, 1])
    row = CLASSIFICATION[name]
    keywords = {k: v for k, v in {"scale": 24.0, "margin": 0.2}.items() if k in row.keywords}
    target = F.one_hot(pids, 7).bool()
    slices = [
        softmax_parts(row.logits_of(a, t, **keywords) if row.logits_of else a, t)
        for a, t in zip(x.tensor_split(3, 1), target.tensor_split(3, 1), strict=True)
    ]
    top = torch.stack([p.maximum for p in slices]).amax(0)
    sum_exp = sum(p.sum_exp * (p.maximum - top).exp() for p in slices)
    whole = SoftmaxParts(top, sum_exp, sum(p.target for p in slices), sum(p.total for p in slices))
    assert_same(
        [smoothed_cross_entropy(whole, 7, row.smoothing)], [build_classification(name, 24.0, 0.2)(x, pids)], 1e-14
    )


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize(("name", "distance"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_identity_gives_zero(name, distance, dtype):
    loss = on_batch(build_pairwise(name, 256.0, 0.3, distance), torch.zeros(6, dtype=torch.int64))
    value, gradient = value_and_gradient(loss, random(6, 4).to(dtype))
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(("name", "distance"), PAIRS)
def test_no_anchor_has_a_positive(name, distance):
    x, pids = random(6, 4), torch.arange(6)
    value, gradient = value_and_gradient(on_batch(build_pairwise(name, 256.0, 0.3, distance), pids), x)
    assert gradient.isfinite().all()
    if name != "triplet":
        assert value == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))
    elif distance == "cosine":
        cosines = F.normalize(x) @ F.normalize(x).T
        hardest = (cosines - 2 * torch.eye(6, dtype=torch.float64)).amax(1)
        assert_same([value], [(0.3 - 1 + hardest).relu().mean()])


@pytest.mark.parametrize(("name", "distance"), PAIRS)
@pytest.mark.parametrize("kind", ["equal", "opposite", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_features_stay_finite(name, distance, kind, dtype):
    """All features equal; positives opposite and negatives equal (the largest exponents there are); all zero."""
    x = random(1, 4).expand(12, 4).clone()
    if kind == "opposite":
        x[::2] *= -1
    if kind == "zero":
        x *= 0
    value, gradient = value_and_gradient(on_batch(build_pairwise(name, 256.0, 0.4, distance), PIDS), x.to(dtype))
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_coinciding_points_have_no_euclidean_gradient():
    """Two pairs of coinciding points: only the distance between the pairs acts, on each anchor by a unit vector."""
    x = random(2, 3)[[0, 0, 1, 1]]
    loss = on_batch(build_pairwise("triplet", 1.0, 9.0, "euclidean"), torch.tensor([0, 0, 1, 1]))
    value, gradient = value_and_gradient(loss, x)
    apart = x[2] - x[0]
    assert value.item() == pytest.approx(9 - apart.norm().item() + 1e-6, abs=1e-9)
    torch.testing.assert_close(gradient[:2].sum(0), apart / apart.norm())
    # Where all coincide, the negative is as far as the anchor itself: at the formula's 1e-6, not at 0.
    value, gradient = value_and_gradient(loss, 0 * x)
    assert value.item() == pytest.approx(9.0, abs=1e-9)
    assert torch.equal(gradient, 0 * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arcface_at_cosine_one(dtype):
    x = torch.tensor([[1.0, -1.0], [1.0000001, 1.0], [-1.0, 1.0]], dtype=dtype)
    value, gradient = value_and_gradient(
        lambda x: build_classification("arcface", 64.0, 0.5)(x, x.new_zeros(3).long()), x
    )
    assert value.isfinite()
    assert gradient.isfinite().all()


# ---------------------------------------------------------------- low precision


LOW = [
    (torch.float32, None),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
]


def in_low_precision(loss, x, dtype, autocast):
    """The forward under autocast, the backward outside, as training has them."""
    x = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        value = loss(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def assert_close_to_fp64(loss, x, dtype, autocast):
    """The values that dtype can hold are the common starting point; only the arithmetic may differ."""
    value, gradient = in_low_precision(loss, x, dtype, autocast)
    true_value, true_gradient = value_and_gradient(loss, x.to(dtype).double())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(true_value.item(), rel=1e-5)
    # A low precision gradient is rounded once, when it reaches the leaf.
    error = (gradient.double() - true_gradient).norm() / true_gradient.norm()
    assert error < (2e-3 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("dtype", "autocast"), LOW)
@pytest.mark.parametrize("name", CLASSIFICATION)
def test_classification_in_low_precision(name, dtype, autocast):
    x, pids = random(12, 20).tanh(), PIDS
    x = x if uses_cosine(name) else 60 * x
    assert_close_to_fp64(lambda x: build_classification(name, 256.0, 0.35)(x, pids), x, dtype, autocast)


@pytest.mark.parametrize(("dtype", "autocast"), LOW)
@pytest.mark.parametrize(("name", "distance"), PAIRS)
def test_pairwise_in_low_precision(name, distance, dtype, autocast):
    """Features of norm 400, whose square fp16 cannot hold, at a scale whose exponentials fp32 cannot."""
    loss = on_batch(build_pairwise(name, 256.0, 0.35, distance), PIDS)
    assert_close_to_fp64(loss, 100 * random(12, 16), dtype, autocast)


# ---------------------------------------------------------------- cost


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize(("name", "distance"), PAIRS)
def test_memory_and_host_syncs(name, distance):
    """Nothing larger than B x N or N x D, nothing that waits for the device, the same operations for any B."""
    names = []
    for num_anchors in (4, 16):
        x, pids = random(64, 8), torch.arange(64) // 4
        with Recorder() as seen:
            value_and_gradient(on_batch(build_pairwise(name, 16.0, 0.3, distance), pids, 8, num_anchors), x)
        assert seen.largest <= max(num_anchors * 64, 64 * 8)
        assert not {n for n in seen.names if "nonzero" in n or "masked_select" in n or "_local_scalar" in n}
        names.append(seen.names)
    assert names[0] == names[1]


# ---------------------------------------------------------------- pytorch-metric-learning, where it has the formula


def other_library(name, distance, scale, margin):
    if name == "triplet":
        kind = (
            distances.CosineSimilarity() if distance == "cosine" else distances.LpDistance(normalize_embeddings=False)
        )
        mine = miners.BatchHardMiner(distance=kind)
        loss = losses.TripletMarginLoss(margin=margin, distance=kind, reducer=reducers.MeanReducer())
        return lambda x, pids: loss(x, pids, mine(x, pids))
    if name == "contrastive":
        return losses.NTXentLoss(temperature=1 / scale, reducer=reducers.PerAnchorReducer())
    return losses.CircleLoss(m=margin, gamma=scale, reducer=reducers.MeanReducer())


@pytest.mark.parametrize(("name", "distance"), [p for p in PAIRS if p[0] != "cosface"])
def test_pairwise_equals_another_library(name, distance):
    # Its miner leaves out anchors without a positive, which the original's triplet loss keeps.
    pids = torch.arange(12) % 4 if name == "triplet" else PIDS
    theirs = other_library(name, distance, 16.0, 0.3)
    ours = value_and_gradient(on_batch(build_pairwise(name, 16.0, 0.3, distance), pids), random(12, 5))
    assert_same(ours, value_and_gradient(lambda x: theirs(x, pids), random(12, 5)), 1e-9)


@pytest.mark.parametrize("name", ["arcface", "cosface"])
def test_classification_equals_another_library(name):
    weight, pids = random(7, 5, seed=1), torch.arange(12) % 7
    if name == "arcface":
        theirs = losses.ArcFaceLoss(7, 5, margin=math.degrees(0.3), scale=16.0)
    else:
        theirs = losses.CosFaceLoss(7, 5, margin=0.3, scale=16.0)
    theirs.W.data = weight.T.clone()

    def ours(x):
        return build_classification(name, 16.0, 0.3)(F.normalize(x) @ F.normalize(weight).T, pids)

    x = random(12, 5)
    assert_same(value_and_gradient(ours, x), value_and_gradient(lambda x: theirs(x, pids), x), 1e-9)


# ---------------------------------------------------------------- ranks


def on_ranks(gather):
    """{pair: gradient of the global loss with respect to this rank's features}, DDP's mean over ranks taken."""
    w, r = dist.world_size(), dist.rank()
    size = len(PIDS) // w
    pids, gradients = PIDS.chunk(w)[r], {}
    for name, distance in PAIRS:
        feats = random(len(PIDS), 5).chunk(w)[r].clone().requires_grad_()
        references = gather(feats)
        loss = build_pairwise(name, 16.0, 0.3, distance)(feats, pids, references, PIDS, r * size)
        gradients[name, distance] = torch.autograd.grad(loss, feats)[0] / w
    return gradients


def worst_error(world_size, gather):
    """{pair: largest difference to one process, relative to the largest gradient}."""
    parts = run_ranks(world_size, on_ranks, gather)
    errors = {}
    for name, distance in PAIRS:
        true = value_and_gradient(on_batch(build_pairwise(name, 16.0, 0.3, distance), PIDS), random(len(PIDS), 5))[1]
        error = torch.cat([p[name, distance] for p in parts]) - true
        errors[name, distance] = (error.abs().max() / true.abs().max()).item()
    return errors


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_equal_one_process(world_size):
    errors = worst_error(world_size, dist.gather_rows)
    assert all(e < 1e-12 for e in errors.values()), errors


@pytest.mark.ranks
def test_a_detached_gather_does_not():
    errors = worst_error(2, lambda feats: dist.gather_rows(feats).detach())
    assert all(e > 0.05 for e in errors.values()), errors
