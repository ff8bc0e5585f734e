import pytest
import torch
from torch import nn

from reid_dist.models import MODELS, Backbone, build_model, find_backbone
from reid_dist.models.batch_norm import group_batch_norms
from reid_dist.models.heads import BLOCK_ROWS, CosineClassifier, LinearClassifier


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("resnet50", (64, 32), (2, 2048, 4, 2)),
        ("mobilenet_v2", (64, 32), (2, 1280, 4, 2)),
        ("tiny", (64, 32), (2, 128, 8, 4)),
        ("timm/mobilenetv2_100", (64, 32), (2, 1280, 4, 2)),
        ("timm/resnet18", (64, 32), (2, 512, 4, 2)),
    ],
)
def test_last_stride_1_doubles_the_map(name, size, shape):
    row = find_backbone(name)
    x = torch.randn(2, 3, *size)
    assert row.feature_dim == shape[1]
    assert row.build(1).eval()(x).shape == shape
    assert row.build(2).eval()(x).shape == (*shape[:2], shape[2] // 2, shape[3] // 2)


def test_resnet50_is_torchvisions():
    from torchvision.models import resnet50

    theirs, ours = resnet50().eval(), MODELS["resnet50"].build(2).eval()
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    assert list(ours.state_dict()) == list(weights)
    ours.load_state_dict(weights)
    x = torch.randn(1, 3, 64, 32)
    theirs.fc = nn.Identity()
    torch.testing.assert_close(ours(x).mean((2, 3)), theirs(x))
    assert sum(p.numel() for p in ours.parameters()) == 23_508_032


def test_last_stride_1_of_timms_resnet_is_torchvisions():
    """timm would dilate what follows; re-ID's last stride 1 does not."""
    import timm
    from torchvision.models import resnet18

    theirs = resnet18().eval()
    theirs.layer4[0].conv1.stride = theirs.layer4[0].downsample[0].stride = (1, 1)
    ours = find_backbone("timm/resnet18").build(1).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    theirs.fc = nn.Identity()
    x = torch.randn(1, 3, 64, 32)
    torch.testing.assert_close(ours(x).mean((2, 3)), theirs(x))
    assert timm.is_model("resnet18")


def test_mobilenet_has_the_312_tensors_of_torchvision():
    assert len(MODELS["mobilenet_v2"].build(2).state_dict()) == 312
    assert len(find_backbone("timm/mobilenetv2_100").build(2).state_dict()) == 312


def test_features_and_logits():
    model = build_model("tiny", 128, range(7), cosine=False)
    x = torch.randn(4, 3, 32, 16)
    feats, logits = model(x)
    assert feats.shape == (4, 128) and logits.shape == (4, 7)
    torch.testing.assert_close(logits, feats @ model.classifier.weight.T + model.classifier.bias)
    assert model.eval()(x).shape == (4, 128)
    weight, norm = model.classifier.weight.detach(), model.bn.weight.detach()
    assert weight.std() == pytest.approx(0.001, rel=0.2) and not model.classifier.bias.any()
    assert norm.std() == pytest.approx(0.02, rel=0.3) and norm.mean() == pytest.approx(1, abs=0.01)


def test_cosines_are_cosines_also_under_autocast():
    model = build_model("tiny", 128, range(7), cosine=True)
    with torch.autocast("cpu", torch.bfloat16):
        feats, cosines = model(torch.randn(4, 3, 32, 16))
    assert cosines.dtype == torch.float32 and cosines.abs().max() <= 1 + 1e-6
    expected = torch.cosine_similarity(feats.float()[:, None], model.classifier.weight[None], dim=2)
    torch.testing.assert_close(cosines, expected)
    torch.testing.assert_close(model.classifier.weight.norm(dim=1), torch.ones(7))


def test_the_seed_alone_makes_the_weights():
    torch.manual_seed(5)
    a = build_model("tiny", 128, range(7), cosine=False, seed=3)
    torch.manual_seed(6)
    before = torch.get_rng_state()
    b = build_model("tiny", 128, range(7), cosine=False, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    other = build_model("tiny", 128, range(7), cosine=False, seed=4)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.backbone[0].weight, other.backbone[0].weight)
    assert not torch.equal(a.classifier.weight, other.classifier.weight)


@pytest.mark.parametrize("head", [LinearClassifier, CosineClassifier])
def test_a_shard_holds_the_rows_of_the_whole(head):
    num = 2 * BLOCK_ROWS + 100
    whole = head(4, range(num), seed=1).weight
    for rows in (range(10), range(1000, 1100), range(BLOCK_ROWS, num), range(num, num)):
        assert torch.equal(head(4, rows, seed=1).weight, whole[rows.start : rows.stop])


def test_errors_name_the_key():
    with pytest.raises(ValueError, match=r"MODEL\.FEATURE_DIM 2048: expected 128"):
        build_model("tiny", 2048, range(7), cosine=False)
    with pytest.raises(ValueError, match=r"timm has no such network; near ones: .*resnet50"):
        build_model("timm/resnet5o", 2048, range(7), cosine=False)


def test_group_batch_norms_keeps_the_keys():
    model = build_model("mobilenet_v2", 1280, range(7), cosine=False)
    keys = list(model.state_dict())
    group_batch_norms(model, 4)
    assert list(model.state_dict()) == keys


def test_active_dropout_is_an_error():
    for layer in (nn.Dropout(0.1), nn.Dropout2d(0.5)):
        MODELS["dropping"] = Backbone(lambda stride, layer=layer: nn.Sequential(nn.Conv2d(3, 8, 3), layer), 8)
        with pytest.raises(ValueError, match=r"backbone\.1 is Dropout"):
            build_model("dropping", 8, range(3), cosine=False)
    MODELS["dropping"] = Backbone(lambda stride: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.0)), 8)
    build_model("dropping", 8, range(3), cosine=False)
    del MODELS["dropping"]
