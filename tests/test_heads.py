"""Pools, bnneck, embedding and non-local blocks; and that none of them depends on the number of ranks."""

import numpy as np
import pytest
import torch

from reid_dist import checkpoint
from reid_dist.models import ReIDModel, build_model
from reid_dist.models.non_local import NonLocal
from reid_dist.models.pool import POOLS
from tests.runs import SMALL, TINY, losses_of, run


def test_pools_are_their_definitions():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    flat = x.flatten(2)
    torch.testing.assert_close(POOLS["avg"]()(x), flat.mean(2))
    torch.testing.assert_close(POOLS["max+avg"]()(x), flat.mean(2) + flat.max(2).values)
    gem = POOLS["gem"]().double()
    expected = (flat.clamp(min=1e-6) ** 3).mean(2) ** (1 / 3)
    torch.testing.assert_close(gem(x), expected)
    gem(x).sum().backward()
    assert gem.p.grad.isfinite().all() and gem.p.grad.abs() > 0
    with torch.no_grad():
        gem.p.fill_(1.0)
    torch.testing.assert_close(gem(x.abs()), flat.abs().mean(2))


def test_gem_stays_in_fp32_under_autocast():
    x = torch.full((1, 1, 2, 2), 200.0)  # 200^3 overflows fp16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = POOLS["gem"]()(x.bfloat16())
    assert out.dtype == torch.float32 and out.item() == pytest.approx(200, rel=1e-3)


def model_of(**options):
    return build_model("tiny", 128, range(5), cosine=False, **options).double()


def test_bnneck_gives_the_pair_loss_the_feature_before_the_batch_norm_and_learns_no_bias():
    images = torch.randn(6, 3, 32, 16, dtype=torch.float64)
    model = model_of(bnneck=True)
    pair, logits = model(images)
    pooled = model.backbone(images).mean((2, 3))
    torch.testing.assert_close(pair, pooled)
    torch.testing.assert_close(
        logits, model.classifier(torch.nn.functional.batch_norm(pooled, None, None, training=True))
    )
    assert not model.bn.bias.requires_grad and not model.classifier.bias.requires_grad
    assert model.bn.weight.requires_grad and model.classifier.weight.requires_grad
    plain, _ = model_of()(images)
    assert not torch.allclose(plain, pooled)
    assert torch.allclose(model.eval()(images).mean(0), model.bn(model.backbone(images).mean((2, 3))).mean(0))


def test_an_embedding_sets_the_width_of_the_feature():
    model = model_of(embed_dim=7)
    feats, logits = model(torch.randn(4, 3, 32, 16, dtype=torch.float64))
    assert feats.shape == (4, 7) and logits.shape == (4, 5) and model.feature_dim == 7
    assert model.embed.bias is None


def test_a_non_local_block_is_its_definition_and_the_identity_at_the_start():
    torch.manual_seed(0)
    block, x = NonLocal(6).double(), torch.randn(2, 6, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(block(x), x)
    torch.nn.init.ones_(block.W[1].weight)
    block.eval()
    theta, phi, g = (layer(x).flatten(2) for layer in (block.theta, block.phi, block.g))
    f = theta.mT @ phi / 12  # (B, N, N)
    y = (f @ g.mT).mT.reshape(2, 3, 3, 4)
    torch.testing.assert_close(block(x), x + block.W(y))


def test_non_local_blocks_stand_where_agw_has_them_and_other_names_stay():
    plain = build_model("resnet50", 2048, range(5), cosine=False).state_dict()
    model = build_model("resnet50", 2048, range(5), cosine=False, non_local=True)
    names = [n for n, m in model.named_modules() if isinstance(m, NonLocal)]
    assert names == [f"backbone.layer2.non_local{i}" for i in (2, 3)] + [
        f"backbone.layer3.non_local{i}" for i in (3, 4, 5)
    ]
    assert {k for k in model.state_dict() if "non_local" not in k} == set(plain)
    order = [n for n, _ in model.backbone.layer2.named_children()]
    assert order == ["0", "1", "2", "non_local2", "3", "non_local3"]
    with pytest.raises(ValueError, match="expected a ResNet-50"):
        model_of(non_local=True)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "more",
    [
        "MODEL.HEAD bnneck",
        "MODEL.HEAD bnneck MODEL.POOL gem TRAIN.MICRO_BATCH 4",
        "MODEL.POOL max+avg MODEL.EMBED_DIM 16",
    ],
)
def test_heads_do_not_depend_on_the_number_of_ranks(pedestrians, tmp_path, more):
    text = f"{SMALL} {TINY} MODEL.BN_GROUP 4 TRAIN.MAX_STEPS 3 {more}"
    one, [eval_one] = run(1, pedestrians, tmp_path / "1", text)
    two, [eval_two] = run(2, pedestrians, tmp_path / "2", text)
    np.testing.assert_allclose(losses_of(two), losses_of(one), rtol=1e-9)
    assert eval_two["mAP"] == pytest.approx(eval_one["mAP"], abs=1e-9)
    states = [
        checkpoint.load(checkpoint.list_steps(tmp_path / n / "market1501/t/checkpoints")[-1])["model"] for n in "12"
    ]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-8, atol=1e-9)
    if "bnneck" in more:
        assert (states[0]["bn.bias"] == 0).all() and (states[0]["classifier.bias"] == 0).all()


def test_shards_need_the_simple_head():
    from reid_dist.config import check_config, load_config, parser

    cfg = load_config(parser("train").parse_intermixed_args("MODEL.HEAD bnneck MODEL.CLASSIFIER_SHARDED true".split()))
    with pytest.raises(ValueError, match=r"MODEL.HEAD .bnneck.: expected simple"):
        check_config(cfg, 2, cuda=False)


def test_the_default_head_is_simple_reids():
    model = model_of()
    assert isinstance(model, ReIDModel) and model.bn.bias.requires_grad
    assert [n for n, _ in model.named_parameters() if not n.startswith("backbone")] == [
        "bn.weight", "bn.bias", "classifier.weight", "classifier.bias",
    ]  # fmt: skip
