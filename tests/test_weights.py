"""Weights of other code bases, in files of exactly their shape; files that are none or want too much."""

import copy
import functools
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reid_dist.models import MODELS, build_model, find_backbone
from reid_dist.models.batch_norm import group_batch_norms
from reid_dist.models.weights import fill, read_weight_file, read_weights


def give_statistics(net, seed=0):
    """Random batch norm parameters and statistics, so that a tensor that is not copied shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for t, low in ((m.weight, 0.5), (m.bias, -0.5), (m.running_mean, -0.5), (m.running_var, 0.5)):
                    t.copy_(low + torch.rand(t.shape, generator=generator))
    return net.eval()


@functools.cache
def made():
    import torchvision

    torch.manual_seed(3)
    return give_statistics(torchvision.models.resnet50())


def theirs():
    return copy.deepcopy(made())


class SimpleReID(nn.Module):
    """Simple-ReID's models/ResNet.py: keys base.0, base.1, base.4 to base.7, bn."""

    def __init__(self):
        super().__init__()
        self.base = nn.Sequential(*list(theirs().children())[:-2])
        self.bn = nn.BatchNorm1d(2048)

    def forward(self, x):
        return self.bn(self.base(x).mean((2, 3)))


def simple_reid():
    """(what save_checkpoint of its main.py writes, the network, names in it that have no use here)."""
    net = give_statistics(SimpleReID())
    return {"state_dict": net.state_dict(), "rank1": np.float64(0.945), "epoch": 59}, net, []


def fast_reid(bottleneck="bottleneck.0", classifier="weight"):
    """Its Checkpointer's file of a Baseline with an EmbeddingHead (modeling/heads/embedding_head.py)."""
    net = give_statistics(SimpleReID())
    children = zip(("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"), (0, 1, 4, 5, 6, 7), strict=True)
    model = {f"backbone.{n}.{k}": v for n, i in children for k, v in net.base[i].state_dict().items()}
    model |= {f"heads.{bottleneck}.{k}": v for k, v in net.bn.state_dict().items()}
    model |= {f"heads.{classifier}": torch.zeros(751, 2048), "pixel_mean": torch.zeros(1, 3, 1, 1)}
    return {"model": model, "optimizer": {}, "epoch": 59}, net, [f"heads.{classifier}", "pixel_mean"]


def torchreid():
    """torchreid's save_checkpoint of a resnet50 under DataParallel: no batch norm of the feature."""
    net = theirs()
    state = {f"module.{k}": v for k, v in net.state_dict().items() if not k.startswith("fc.")}
    state |= {"module.classifier.weight": torch.zeros(751, 2048), "module.classifier.bias": torch.zeros(751)}
    optimizer = torch.optim.Adam(net.layer1[0].conv1.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [20, 40])
    whole = {"state_dict": state, "epoch": 60, "rank1": np.float32(0.87), "optimizer": optimizer.state_dict()}
    net.fc = nn.Identity()
    return whole | {"scheduler": scheduler.state_dict()}, net, ["classifier.weight", "classifier.bias"]


def torchvision():
    net = theirs()
    state = net.state_dict()
    net.fc = nn.Identity()
    return state, net, ["fc.weight", "fc.bias"]


RESNET50 = {
    "Simple-ReID": simple_reid,
    "fast-reid": fast_reid,
    "fast-reid 0.2": lambda: fast_reid(classifier="classifier.weight"),
    "fast-reid before version 0.2": lambda: fast_reid("bnneck", "classifier.weight"),
    "torchreid": torchreid,
    "torchvision": torchvision,
}


@pytest.mark.parametrize("maker", RESNET50)
def test_resnet50_of_others_gives_their_features(maker, tmp_path):
    state, net, unused = RESNET50[maker]()
    torch.save(state, tmp_path / "w.pth.tar")
    read = read_weights(str(tmp_path / "w.pth.tar"))
    save_file({k: v.contiguous() for k, v in read.items()}, tmp_path / "w.safetensors")
    again = read_weights(str(tmp_path / "w.safetensors"))
    assert read.keys() == again.keys() and all(torch.equal(v, again[k]) for k, v in read.items())
    model = build_model("resnet50", 2048, range(0), cosine=False, last_stride=2)
    group_batch_norms(model, 32)
    model.eval()
    lines = fill(model, read, maker, whole=True)
    x = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), net(x), rtol=1e-4, atol=1e-4)
    has_bn = maker not in ("torchreid", "torchvision")
    assert lines[0].startswith(f"weights   {269 if has_bn else 265} of 269 tensors from {maker} (named as ")
    assert has_bn or lines[1] == "weights   no batch norm of the feature in the file: the feature is the pooled map"
    listed = [f"weights   in the file, not used: {len(unused)} ({', '.join(unused)})"] if unused else []
    assert lines[1 + (not has_bn) :] == listed


def test_the_key_lists_are_the_public_ones():
    """The first and last keys, as they stand in the public files; a wrong maker above would prove nothing."""
    keys = list(simple_reid()[0]["state_dict"])
    assert keys[:2] == ["base.0.weight", "base.1.weight"] and "base.4.0.conv1.weight" in keys
    assert "base.7.2.bn3.running_var" in keys and keys[-1] == "bn.num_batches_tracked"
    keys = list(fast_reid()[0]["model"])
    assert keys[0] == "backbone.conv1.weight" and "backbone.layer1.0.downsample.1.running_mean" in keys
    assert "heads.bottleneck.0.running_mean" in keys and "heads.weight" in keys
    assert "module.layer4.2.bn3.bias" in torchreid()[0]["state_dict"]


def numbered_weights(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.rand(v.shape, generator=generator).to(v.dtype) for k, v in model.state_dict().items()}


@pytest.mark.parametrize("back", [False, True])
def test_mobilenet_v2_of_timm_and_torchvision_is_one_network(back):
    """torchvision-shaped keys into timm's network and timm-shaped keys into torchvision's: the same features."""
    a, b = ("timm/mobilenetv2_100", "mobilenet_v2") if back else ("mobilenet_v2", "timm/mobilenetv2_100")
    source = give_statistics(find_backbone(a).build(2))
    model = build_model(b, 1280, range(0), cosine=False, last_stride=2).eval()
    lines = fill(model, source.state_dict() | {"classifier.bias": torch.zeros(1000)}, "x")
    assert lines[0].startswith("weights   260 of 264 tensors") and "classifier.bias" in lines[-1]
    x = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(x), source(x), rtol=1e-4, atol=1e-4)


def test_safetensors_and_pth_are_one(tmp_path):
    a, b = (build_model("tiny", 128, range(4), False, seed=s) for s in (0, 1))
    save_file(a.state_dict(), tmp_path / "a.safetensors")
    lines = fill(b, read_weights(str(tmp_path / "a.safetensors")), "x", whole=True)
    assert len(lines) == 1
    for key, value in a.state_dict().items():
        assert key.startswith("classifier.") or torch.equal(b.state_dict()[key], value)
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:999])
    with pytest.raises(ValueError, match=r"b\.safetensors': not a whole safetensors file \("):
        read_weights(str(tmp_path / "b.safetensors"))


def test_our_checkpoint_holds_config_and_average(tmp_path):
    a = build_model("tiny", 128, range(4), False)
    average = {"bn.weight": torch.full((128,), 3.0)}
    torch.save({"format": 2, "model": a.state_dict(), "config": "MODEL: {NAME: tiny}", "ema": average}, tmp_path / "a")
    file = read_weight_file(str(tmp_path / "a"), "--weights")
    assert file.config == "MODEL: {NAME: tiny}" and list(file.average) == ["bn.weight"] and len(file.sha256) == 64
    assert list(file.weights) == list(a.state_dict())


def test_a_part_is_an_error_for_use_and_a_list_for_training():
    a, b = (build_model("tiny", 128, range(4), False, seed=s) for s in (0, 1))
    part = {k: v for k, v in a.state_dict().items() if not k.startswith("backbone.9.")}
    lines = fill(b, part, "x")
    assert lines[1] == "weights   not in the file, left as they were: 1 (backbone.9.weight)"
    with pytest.raises(ValueError, match=r"x: weights of another architecture: 23 of 24 .*not there: 1 \(backbone\.9"):
        fill(b, part, "x", whole=True)
    for none in ({}, {"a": torch.zeros(1)}, {k: v for k, v in a.state_dict().items() if "bn" in k}):
        with pytest.raises(ValueError, match=r"tensors match \(not there: \d+ \(backbone\.0\.weight"):
            fill(b, none, "x")
    with pytest.raises(ValueError, match=r"backbone\.0\.weight is \(1,\) there, \(16, 3, 3, 3\) here"):
        fill(b, a.state_dict() | {"backbone.0.weight": torch.zeros(1)}, "x")


def test_resnet50_weights_do_not_pass_for_another_network():
    state, _, _ = torchvision()
    model = build_model("mobilenet_v2", 1280, range(0), cosine=False)
    with pytest.raises(ValueError, match="weights of another architecture"):
        fill(model, state, "x")


class Wanted:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [(nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"), (Wanted(), r"posix\.mkdir"), (print, "print")],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_pickle_wants_is_named(content, wanted, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": content}, "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"--weights 'w\.pth': not a file of weights alone: it wants {wanted}, and"):
        read_weight_file("w.pth", "--weights")
    assert [f.name for f in tmp_path.iterdir()] == ["w.pth"]


def test_files_that_are_no_weights(tmp_path):
    cases = {"missing": None, "empty.pth": b"", "text.pth": b"hello", "half.pth": None, "number.pth": None}
    torch.save(build_model("tiny", 128, range(4), False).state_dict(), tmp_path / "whole.pth")
    cases["half.pth"] = (tmp_path / "whole.pth").read_bytes()[:1000]
    torch.save({"state_dict": {"a": 1}}, tmp_path / "number.pth")
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^K '.*{name}': .*(expected|not a)") as error:
            read_weights(str(tmp_path / name), "K")
        assert "\n" not in str(error.value)


def test_every_network_of_ours_takes_its_own_file():
    for name in ("tiny", "mobilenet_v2"):
        width = MODELS[name].feature_dim
        a, b = (build_model(name, width, range(2), False, seed=s) for s in (0, 1))
        state = numbered_weights(a)
        assert fill(b, state, "x", whole=True) == [
            f"weights   {len([k for k in state if 'tracked' not in k]) - 2} of "
            f"{len([k for k in state if 'tracked' not in k]) - 2} tensors from x (named as reid_dist)"
        ]
        assert torch.equal(b.bn.running_var, state["bn.running_var"])
