"""What stronger recipes add: schedules, frozen steps, learning rates by part, averaged weights, centers, two losses."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from reid_dist import checkpoint, ema
from reid_dist.losses import PAIRWISE
from reid_dist.losses.center import center, center_gradient
from reid_dist.models import MODELS, Backbone
from reid_dist.models.tiny import build_tiny
from reid_dist.optim import Schedule, lr_at, parameter_groups, set_lr
from tests.runs import PLAIN, SMALL, TINY, build_plain, losses_of, run


def newest(folder):
    return checkpoint.load(checkpoint.list_steps(folder / "market1501/t/checkpoints")[-1])


# --- learning rates ---------------------------------------------------------------------------------------------------


def test_cosine_is_flat_then_torchs_cosine():
    schedule = Schedule(0.1, name="cosine", flat_epochs=2, end_epoch=6, end_lr=0.01)
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.1)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4 * 3, eta_min=0.01)
    assert [lr_at(step, 3, schedule) for step in range(7)] == [0.1] * 7
    for step in range(6, 18):
        assert lr_at(step, 3, schedule) == pytest.approx(reference.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        reference.step()
    assert lr_at(18, 3, schedule) == lr_at(100, 3, schedule) == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["step", "cosine"])
def test_warm_up_rises_linearly_to_the_schedule(name):
    schedule = Schedule(0.1, name=name, milestones=[1], end_epoch=4, warmup_steps=5, warmup_factor=0.1)
    bare = schedule._replace(warmup_steps=0)
    factors = [lr_at(step, 3, schedule) / lr_at(step, 3, bare) for step in range(8)]
    assert factors == pytest.approx([0.1, 0.28, 0.46, 0.64, 0.82, 1, 1, 1])


def test_the_backbone_has_a_rate_of_its_own():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.bn, self.classifier = nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 3)

    model = Net()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1), lr=1.0)
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.5]
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in listed] == [id(p) for p in model.parameters()]


# --- losses -----------------------------------------------------------------------------------------------------------


def batch(seed=0, num=12, num_pids=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 5, generator=generator, dtype=torch.float64), torch.arange(num) % num_pids


def distance_of(x, y, distance):
    return -torch.cosine_similarity(x, y, dim=0) if distance == "cosine" else (x - y).norm().clamp(min=1e-6)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("name", ["softtriplet", "weightedtriplet"])
def test_triplets_without_a_margin_are_their_definitions(name, distance):
    feats, pids = batch()
    total = 0.0
    for i in range(12):
        d = torch.stack([distance_of(feats[i], feats[j], distance) for j in range(12)])
        d_p, d_n = d[pids == pids[i]], d[pids != pids[i]]
        if name == "softtriplet":
            gap = d_p.max() - d_n.min()
        else:
            gap = (d_p.exp() / d_p.exp().sum() * d_p).sum() - ((-d_n).exp() / (-d_n).exp().sum() * d_n).sum()
        total += math.log1p(math.exp(gap))
    loss = PAIRWISE[name].loss(feats, pids, feats, pids, 0, distance=distance)
    assert float(loss) == pytest.approx(total / 12, rel=1e-9)


@pytest.mark.parametrize("name", ["softtriplet", "weightedtriplet"])
def test_an_anchor_without_negatives_contributes_nothing_and_gradients_stay_finite(name):
    feats, _ = batch()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        leaf = feats.detach().to(dtype).clone().requires_grad_()
        pids = torch.zeros(12, dtype=torch.int64)
        loss = PAIRWISE[name].loss(leaf, pids, leaf, pids, 0, distance="cosine")
        loss.backward()
        assert loss == 0 and leaf.grad.isfinite().all()


def test_center_loss_is_its_definition():
    feats, pids = batch()
    centers = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    expected = sum(float(((feats[i] - centers[pids[i]].detach()) ** 2).sum()) for i in range(12)) / 12
    loss = center(feats, pids, centers)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(center_gradient(feats, pids, centers), centers.grad)
    for c in range(4):
        torch.testing.assert_close(centers.grad[c], 2 * (centers[c] - feats[pids == c]).sum(0).detach() / 12)


@pytest.mark.ranks
@pytest.mark.parametrize("more", ["", "TRAIN.MICRO_BATCH 4", "MODEL.CLASSIFIER_SHARDED true", "LOSS.GATHER false"])
def test_centers_do_not_depend_on_the_number_of_ranks(pedestrians, tmp_path, more):
    text = f"{SMALL} {TINY} MODEL.BN_GROUP 4 LOSS.CENTER 0.05 TRAIN.MAX_STEPS 4"
    if "GATHER" in more:  # outside the promise: only that it runs
        events, _ = run(2, pedestrians, tmp_path, f"{text} {more}")
        assert np.isfinite(losses_of(events)).all()
        return
    one, _ = run(1, pedestrians, tmp_path / "1", text)
    two, _ = run(2, pedestrians, tmp_path / "2", f"{text} {more}")
    np.testing.assert_allclose(losses_of(two), losses_of(one), rtol=1e-9)
    a, b = newest(tmp_path / "1")["model"]["centers"], newest(tmp_path / "2")["model"]["centers"]
    torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)
    without, _ = run(1, pedestrians, tmp_path / "0", text.replace("0.05", "0"))
    assert (losses_of(one)[:, 1] > losses_of(without)[:, 1] + 0.1).all()


def test_centers_step_with_the_gradient_of_the_unweighted_loss(pedestrians, tmp_path):
    """With a rate of 0 they stay; a rate moves them alike whatever the weight of the loss."""
    text = f"{SMALL} {TINY} TRAIN.MAX_STEPS 1 LOSS.CENTER"
    centers = []
    for weight, rate in ((0.05, 0.0), (0.05, 0.5), (0.5, 0.5)):
        folder = tmp_path / f"{weight}{rate}"
        run(1, pedestrians, folder, f"{text} {weight} LOSS.CENTER_LR {rate}")
        centers.append(newest(folder)["model"]["centers"])
    assert not torch.equal(centers[0], centers[1])
    torch.testing.assert_close(centers[1], centers[2])


# --- averaged weights -------------------------------------------------------------------------------------------------


def test_the_average_is_its_definition_and_comes_and_goes():
    model = nn.ModuleDict({"backbone": build_tiny(), "classifier": nn.Linear(2, 2)})
    average = ema.start_average(model)
    assert not any(name.startswith("classifier") for name in average)
    name, p = next(iter(ema.averaged(model).items()))
    first = p.detach().clone()
    with torch.no_grad():
        p += 1
    ema.move_average(average, model, 0.9)
    torch.testing.assert_close(average[name], 0.9 * first + 0.1 * (first + 1))
    with ema.using_average(average, model):
        torch.testing.assert_close(p.detach(), average[name])
    torch.testing.assert_close(p.detach(), first + 1)


@pytest.mark.ranks
def test_averaged_weights_are_evaluated_beside_the_raw_ones_saved_and_resumed(pedestrians, tmp_path):
    text = f"{SMALL} {TINY} TRAIN.EMA 0.7 TEST.EVAL_STEP 1"
    _, evals = run(1, pedestrians, tmp_path / "a", f"{text} TRAIN.MAX_STEPS 6")
    assert [e.get("weights") for e in evals] == [None, "ema"] * 3
    assert any(raw["mAP"] != averaged["mAP"] for raw, averaged in zip(evals[::2], evals[1::2], strict=True))
    run(2, pedestrians, tmp_path / "b", f"{text} TRAIN.MAX_STEPS 3")
    _, resumed = run(4, pedestrians, tmp_path / "b", f"{text} MODEL.BN_GROUP 8 TRAIN.MAX_STEPS 6 MODEL.RESUME auto")
    assert resumed[-1]["mAP"] == pytest.approx(evals[-1]["mAP"], abs=1e-9)
    a, b = newest(tmp_path / "a"), newest(tmp_path / "b")
    for name in a["ema"]:
        torch.testing.assert_close(b["ema"][name], a["ema"][name], rtol=1e-7, atol=1e-9)
    assert any(not torch.equal(a["ema"][name], a["model"][name]) for name in a["ema"])


# --- frozen steps -----------------------------------------------------------------------------------------------------


@pytest.mark.ranks
def test_a_frozen_backbone_stays_as_it_is_and_then_learns(pedestrians, tmp_path):
    text = f"{SMALL} {TINY} MODEL.BN_GROUP 8 TRAIN.FREEZE_STEPS 3 TRAIN.CHECKPOINT_STEP 1 TRAIN.KEEP_CHECKPOINTS 9"
    one, _ = run(1, pedestrians, tmp_path / "1", f"{text} TRAIN.MAX_STEPS 6")
    two, _ = run(2, pedestrians, tmp_path / "2", f"{text} TRAIN.MAX_STEPS 6")
    np.testing.assert_allclose(losses_of(two), losses_of(one), rtol=1e-9)
    states = [checkpoint.load(f)["model"] for f in checkpoint.list_steps(tmp_path / "2/market1501/t/checkpoints")]

    def part(state, prefix):
        return {k: v for k, v in state.items() if k.startswith(prefix) and v.is_floating_point()}

    backbones = [checkpoint.digest(part(state, "backbone.")) for state in states]
    heads = [checkpoint.digest(part(state, "bn.") | part(state, "classifier.")) for state in states]
    assert len(set(backbones[:3])) == 1 and len(set(backbones)) == 4 and len(set(heads)) == 6


@pytest.mark.ranks
def test_what_the_network_itself_keeps_fixed_stays_fixed(pedestrians, tmp_path, monkeypatch):
    def build(last_stride=1):
        net = build_plain()
        net[0].weight.requires_grad_(False)
        return net

    monkeypatch.setitem(MODELS, "partly_fixed", Backbone(build, 16))
    text = f"{SMALL} {PLAIN} MODEL.NAME partly_fixed TRAIN.FREEZE_STEPS 1 TRAIN.CHECKPOINT_STEP 1"
    run(2, pedestrians, tmp_path, f"{text} TRAIN.KEEP_CHECKPOINTS 9 TRAIN.MAX_STEPS 3")
    states = [checkpoint.load(f)["model"] for f in checkpoint.list_steps(tmp_path / "market1501/t/checkpoints")]
    fixed, learned = ([state[f"backbone.{i}.weight"] for state in states] for i in (0, 2))
    assert torch.equal(fixed[0], fixed[-1]) and not torch.equal(learned[0], learned[-1])


@pytest.mark.ranks
@pytest.mark.parametrize("cut", [2, 3, 4])
def test_a_run_with_frozen_steps_resumes_bitwise(pedestrians, tmp_path, cut):
    """Three ranks: DDP's bucket order would show."""
    text = f"{SMALL} {TINY} TRAIN.PRECISION fp32 DATA.TRAIN_BATCH 24 MODEL.BN_GROUP 8 TRAIN.FREEZE_STEPS 3"
    run(3, pedestrians, tmp_path / "a", f"{text} TRAIN.MAX_STEPS 6")
    run(3, pedestrians, tmp_path / "b", f"{text} TRAIN.MAX_STEPS {cut}")
    run(3, pedestrians, tmp_path / "b", f"{text} TRAIN.MAX_STEPS 6 MODEL.RESUME auto")
    a, b = newest(tmp_path / "a"), newest(tmp_path / "b")
    assert checkpoint.digest(a["model"]) == checkpoint.digest(b["model"])
    assert checkpoint.digest({"": a["optimizer"]}) == checkpoint.digest({"": b["optimizer"]})


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL.BN_GROUP 1", "MODEL.BN_GROUP 1: expected at least 2"),
        ("TRAIN.EMA 1.0", "TRAIN.EMA 1.0: expected less than 1"),
        ("TRAIN.LR_SCHEDULER.NAME cosine TRAIN.LR_SCHEDULER.FLAT_EPOCHS 60", "FLAT_EPOCHS 60: expected less than"),
        ("TRAIN.LR_SCHEDULER.NAME poly", "expected one of step, cosine"),
    ],
)
def test_impossible_recipes_are_errors(text, message):
    from reid_dist.config import check_config, load_config, parser

    cfg = load_config(parser("train").parse_intermixed_args(text.split()))
    with pytest.raises(ValueError, match=message):
        check_config(cfg, 1, cuda=False)


@pytest.mark.ranks
def test_a_sharded_classifier_needs_an_identity_a_rank(pedestrians, tmp_path, capfd):
    from reid_dist.models.sharded import classifier_rows

    with pytest.raises(ValueError, match="3 identities on 4 ranks"):
        classifier_rows(3, True, 0, 4)
    assert classifier_rows(3, False, 0, 4) == range(3)


def test_the_end_of_a_cosine_is_part_of_the_mathematics(pedestrians, tmp_path, capfd):
    text = f"{SMALL} {TINY} TRAIN.LR_SCHEDULER.NAME cosine TRAIN.MAX_STEPS 2 TRAIN.MAX_EPOCH"
    run(1, pedestrians, tmp_path, f"{text} 4")
    with pytest.raises(AssertionError, match="UserError"):
        run(1, pedestrians, tmp_path, f"{text} 8 MODEL.RESUME auto")
    assert "END_EPOCH 4 -> 8" in capfd.readouterr().err
