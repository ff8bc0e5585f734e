"""The promise: the same parameters on 1, 2 and 4 ranks, for every pair of losses and every kind of batch norm group.

Five optimizer steps of the real step function in fp64. Parameters after them agree to 1e-9, gradients of the first
step to 1e-12, each relative to max(the tensor's norm, 1e-3 x the network's RMS tensor norm): a tensor whose gradient is
zero by construction is pure noise. Every (world size, wrong scheme) is one job of forked ranks that runs all cases.
"""

import pytest
import torch
from torch import nn

from reid_dist import dist
from reid_dist.config import defaults
from reid_dist.losses import CLASSIFICATION, PAIRWISE
from reid_dist.models import ReIDModel
from reid_dist.models.batch_norm import batch_norms, group_batch_norms
from reid_dist.models.heads import CosineClassifier, LinearClassifier
from reid_dist.models.pool import AveragePool
from reid_dist.models.sharded import classifier_names, classifier_rows
from reid_dist.optim import build_optimizer
from reid_dist.step import backward, build_objective, network_of, train_step
from tests import ranks
from tests.ranks import run_ranks

BATCH, NUM_PIDS, INSTANCES, STEPS = 32, 11, 4, 5
# The original's nine losses in every pair; what was added beside the triplet loss, with one partner.
ADDED = ("softtriplet", "weightedtriplet")
LOSSES = [(cla, pair) for cla in CLASSIFICATION for pair in PAIRWISE if pair not in ADDED]
LOSSES += [("crossentropy", pair) for pair in ADDED]
# On 4 ranks of 8 images: ghost groups, groups of a rank, groups of two ranks, the whole batch. (Groups of 2 would make
# the last batch norm a sign function, whose slope turns rounding into anything.)
GROUPS = (4, 8, 16, 0)
WORLD_SIZES = (2, 4)
MARGINS = {"crossentropy": (1, 0), "crossentropylabelsmooth": (1, 0), "arcface": (16, 0.1), "cosface": (16, 0.1)}
MARGINS |= {"circle": (96, 0.3)}
PAIR_MARGINS = {"triplet": (1, 0.3), "contrastive": (16, 0), "cosface": (16, 0.1), "circle": (48, 0.35)}
PAIR_MARGINS |= dict.fromkeys(ADDED, (1, 0))


def make_config(cla, pair, group, micro_batch=0, sharded=False, gather=True, distance="cosine"):
    cfg = defaults()
    cfg.DATA.TRAIN_BATCH, cfg.DATA.NUM_INSTANCES, cfg.MODEL.BN_GROUP = BATCH, INSTANCES, group
    cfg.LOSS.CLA_LOSS, (cfg.LOSS.CLA_S, cfg.LOSS.CLA_M) = cla, MARGINS[cla]
    cfg.LOSS.PAIR_LOSS, (cfg.LOSS.PAIR_S, cfg.LOSS.PAIR_M) = pair, PAIR_MARGINS[pair]
    cfg.LOSS.GATHER, cfg.TEST.DISTANCE = gather, distance
    cfg.TRAIN.MICRO_BATCH, cfg.MODEL.CLASSIFIER_SHARDED = micro_batch, sharded
    return cfg


def make_model(cfg, rows):
    """Two convolutions with batch norm, the batch norm of the head, the classifier that the loss needs."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2), nn.BatchNorm2d(8), nn.Tanh()]
    head = CosineClassifier if CLASSIFICATION[cfg.LOSS.CLA_LOSS].uses_cosine else LinearClassifier
    classifier = head(8, rows, seed=0)
    model = ReIDModel(nn.Sequential(*layers), 8, classifier, cfg.MODEL.CLASSIFIER_SHARDED, pool=AveragePool())
    group_batch_norms(model, cfg.MODEL.BN_GROUP or BATCH)
    return model.double()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        pids = torch.randperm(NUM_PIDS, generator=generator)[: BATCH // INSTANCES].repeat_interleave(INSTANCES)
        yield torch.randn(BATCH, 3, 12, 10, generator=generator, dtype=torch.float64), pids


def train_case(cfg):
    """(gradients of the first step, parameters and buffers after the last), whole and as every rank has them."""
    world = ranks.world
    rows = classifier_rows(NUM_PIDS, cfg.MODEL.CLASSIFIER_SHARDED, world.rank, world.world_size)
    model = make_model(cfg, rows)
    objective = build_objective(cfg, NUM_PIDS, world)
    ddp = dist.wrap_ddp(model, world.device, classifier_names(model) if model.sharded else [])
    # SGD: its step shows the gradient's length, which Adam's would hide.
    optimizer = build_optimizer(model.parameters(), "sgd", 0.01, 5e-4)
    scaler, net = torch.amp.GradScaler("cpu", enabled=False), network_of(ddp, objective)
    local = BATCH // world.world_size
    first = {}
    for step, (images, pids) in enumerate(batches()):
        mine = images[world.rank * local : (world.rank + 1) * local]
        train_step(net, objective, optimizer, scaler, mine, pids)
        if step == 0:
            for name, p in model.named_parameters():
                whole = model.sharded and name.startswith("classifier.")
                first[name] = (dist.all_gather_rows(p.grad) if whole else p.grad).clone()
    state = model.state_dict()
    if model.sharded:
        state |= {name: dist.all_gather_rows(state[name]) for name in classifier_names(model)}
    return first, {k: v.clone() for k, v in state.items() if v.is_floating_point()}


def train_cases(cases, sabotage=None):
    if sabotage is not None:
        sabotage()
    return [train_case(make_config(**case)) for case in cases]


def worst(got, want):
    """Greatest relative difference over the tensors of a network."""
    rms = torch.stack([w.norm() for w in want.values()]).square().mean().sqrt()
    return max(float((got[k] - w).norm() / max(w.norm(), 1e-3 * rms)) for k, w in want.items())


def compare(world_size, cases, expected, sabotage=None):
    """[(gradient difference, parameter difference) per case], the worst over ranks."""
    results = run_ranks(world_size, train_cases, cases, sabotage, timeout_s=100)
    return [
        (max(worst(r[i][0], grads) for r in results), max(worst(r[i][1], params) for r in results))
        for i, (grads, params) in enumerate(expected)
    ]


def check(differences, cases):
    for (grad, param), case in zip(differences, cases, strict=True):
        assert grad <= 1e-12, (case, grad)
        assert param <= 1e-9, (case, param)


CASES = [{"cla": cla, "pair": pair, "group": group} for cla, pair in LOSSES for group in GROUPS]
COMPARED = []


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(1, train_cases, CASES, timeout_s=100)[0]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_parameters_do_not_depend_on_the_number_of_ranks(one_rank, world_size, tell):
    differences = compare(world_size, CASES, one_rank)
    check(differences, CASES)
    COMPARED.extend(CASES)
    grads, params = (max(d[k] for d in differences) for k in range(2))
    tell(
        f"{len(CASES)} combinations of loss pair and batch norm group on {world_size} ranks equal 1 rank: "
        f"gradients within {grads:.0e}, parameters after {STEPS} steps within {params:.0e}"
    )


@pytest.mark.ranks
def test_every_combination_was_compared():
    assert len(LOSSES) == 22 and len(COMPARED) == 22 * len(GROUPS) * len(WORLD_SIZES)


@pytest.mark.ranks
def test_euclidean_triplet_too():
    cases = [{"cla": "crossentropy", "pair": "triplet", "group": 8, "distance": "euclidean"}]
    [expected] = run_ranks(1, train_cases, cases)
    check(compare(4, cases, expected), cases)


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_sharded_classifier_changes_no_number(one_rank, world_size):
    # 11 identities: the shards of 2 and 4 ranks differ in size.
    chosen = [i for i, case in enumerate(CASES) if case["pair"] == "triplet" and case["group"] == 8]
    cases = [CASES[i] | {"sharded": True} for i in chosen]
    check(compare(world_size, cases, [one_rank[i] for i in chosen]), cases)


@pytest.mark.ranks
@pytest.mark.parametrize("sharded", [False, True])
def test_micro_batches_change_no_number(one_rank, sharded):
    chosen = [i for i, case in enumerate(CASES) if case["group"] == 4 and case["pair"] in ("triplet", "circle")]
    for world_size in (1, 2, 4):
        cases = [CASES[i] | {"micro_batch": 4, "sharded": sharded} for i in chosen]
        check(compare(world_size, cases, [one_rank[i] for i in chosen]), cases)


def detached_gather():
    dist.gather_rows = lambda rows: dist.all_gather_rows(rows.detach())


def own_slice_only():
    """The gather of Simple-CCReID and fast-reid: each rank keeps the gradient of its own rows' copy alone."""

    def gather(rows):
        everyone = list(dist.all_gather_rows(rows.detach()).chunk(dist.world_size()))
        everyone[dist.rank()] = rows
        return torch.cat(everyone)

    dist.gather_rows = gather


def scaled_backward():
    """A gather that divides by the world size once more, as some public code does."""
    right = dist.gather_rows

    def gather(rows):
        return right(dist._ScaleGradient.apply(rows, 1 / dist.world_size()))

    dist.gather_rows = gather


@pytest.mark.ranks
@pytest.mark.parametrize("scheme", [detached_gather, own_slice_only, scaled_backward])
def test_wrong_gathers_fail_the_same_check(one_rank, scheme):
    chosen = [i for i, case in enumerate(CASES) if case["cla"] == "crossentropy" and case["group"] == 8]
    cases = [CASES[i] for i in chosen]
    differences = compare(2, cases, [one_rank[i] for i in chosen], scheme)
    for difference, case in zip(differences, cases, strict=True):
        with pytest.raises(AssertionError):
            check([difference], [case])


@pytest.mark.ranks
def test_rank_local_mining_fails_the_same_check(one_rank):
    chosen = [i for i, case in enumerate(CASES) if case["cla"] == "crossentropy" and case["group"] == 8]
    cases = [CASES[i] | {"gather": False} for i in chosen]
    for difference, case in zip(compare(2, cases, [one_rank[i] for i in chosen]), cases, strict=True):
        with pytest.raises(AssertionError):
            check([difference], [case])


@pytest.mark.ranks
def test_another_batch_norm_group_fails_the_same_check(one_rank):
    chosen = [i for i, case in enumerate(CASES) if case["cla"] == "cosface" and case["group"] == 8]
    cases = [CASES[i] | {"group": 16} for i in chosen]
    for difference, case in zip(compare(2, cases, [one_rank[i] for i in chosen]), cases, strict=True):
        with pytest.raises(AssertionError):
            check([difference], [case])


def rehearsed_state(case):
    from reid_dist.step import rehearse

    cfg = make_config(**case)
    model = make_model(cfg, range(NUM_PIDS))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ddp = dist.wrap_ddp(model, ranks.world.device, [])
    objective = build_objective(cfg, NUM_PIDS, ranks.world)
    shape = (BATCH // dist.world_size(), 3, 12, 10)
    rehearse(network_of(ddp, objective), objective, torch.amp.GradScaler("cpu", enabled=False), shape)
    same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return same and all(p.grad is None for p in model.parameters()) and not any(m.noted for m in batch_norms(model))


@pytest.mark.ranks
def test_a_rehearsal_leaves_nothing_behind():
    assert run_ranks(2, rehearsed_state, CASES[0]) == [True, True]


def peak_graph(micro_batch):
    """Elements that autograd keeps at the same time in one backward of the crossentropy + triplet case."""
    cfg = make_config("crossentropy", "triplet", 4, micro_batch)
    model = make_model(cfg, range(NUM_PIDS))
    objective = build_objective(cfg, NUM_PIDS, dist.World(0, 0, 1, torch.device("cpu")))
    images, pids = next(batches())
    alive, peak = [0], [0]

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            alive[0] += tensor.numel()
            peak[0] = max(peak[0], alive[0])

        def __del__(self):
            alive[0] -= self.tensor.numel()

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        backward(network_of(model, objective), objective, torch.amp.GradScaler("cpu", enabled=False), images, pids)
    return peak[0]


def test_micro_batches_keep_less_for_the_backward():
    assert peak_graph(4) < 0.4 * peak_graph(0)
