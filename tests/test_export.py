"""Exports: the features of the network at any batch, nothing written that was not checked, one line of reasons."""

import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from reid_dist import export
from reid_dist.inference import FeatureExtractor, load_model
from reid_dist.models import MODELS, Backbone, build_model
from reid_dist.models.ianet import IABlock
from reid_dist.world import World
from tests.ranks import run_ranks

WORLD = World(0, 0, 1, torch.device("cpu"))
# Width of the feature, height and width of the images: in smaller ones IBN's instance norms see two positions.
NETWORKS = {
    "resnet50": (2048, 64, 32),
    "resnet50_ibn": (2048, 64, 32),
    "ianet": (2048, 64, 32),
    "timm/test_vit3": (96, 32, 16),
}


def run(*argv):
    export.main(WORLD, [str(a) for a in argv])


def onnx_session(file):
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def blocks(num, height, width):
    return export.example(SimpleNamespace(height=height, width=width), num, "uint8")


def save_network(name, width, file, height, width_px):
    """A network in which rounding stays small, so that a bound speaks of the export alone: its batch norms have seen
    such images as it is tried on, and the branches beside its identities are small. (With torch's weights the features
    of a ResNet-50 in fp32 and fp64, without any export, differ by 6e-4.)"""
    model = build_model(name, width, range(0), cosine=False, image_size=(height, width_px))
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = 1.0
        if hasattr(m, "bn3"):
            nn.init.constant_(m.bn3.weight, 0.1)
        if isinstance(m, IABlock):  # away from the identity
            for bn in (m.W1, m.W2):
                nn.init.constant_(bn.weight, 0.1)
    torch.manual_seed(0)
    with torch.no_grad():
        model.train()(export.normalised(blocks(64, height, width_px)))
    config = f"MODEL: {{NAME: {name}, FEATURE_DIM: {width}}}\nDATA: {{HEIGHT: {height}, WIDTH: {width_px}}}"
    torch.save({"format": 2, "model": model.state_dict(), "config": config}, file)


@pytest.mark.timeout(400)  # seconds on a quiet machine; the exporter is one long Python program
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_is_the_network(name, tmp_path):
    pytest.importorskip("onnxscript", reason="torch's ONNX exporter takes onnxscript")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    # In a process of its own: onnxruntime's threads would stay, and ranks are forked from a process without others.
    run_ranks(1, compare_onnx, name, tmp_path, timeout_s=390)


def compare_onnx(name, tmp_path):
    dim, *size = NETWORKS[name]
    save_network(name, dim, tmp_path / "w.pt", *size)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run("--weights", tmp_path / "w.pt", "--out", tmp_path / "m.onnx")
    assert "normalised inside the graph" in said.getvalue() and "checked   greatest difference" in said.getvalue()
    network, _ = load_model(str(tmp_path / "w.pt"))
    session = onnx_session(tmp_path / "m.onnx")
    for num in (1, 4, 7):
        images = blocks(num, *size)
        given = session.run(["features"], {"images": images.numpy()})[0]
        expected = network(export.normalised(images))
        assert given.shape == (num, dim) and 1 < expected.abs().max() < 30
        np.testing.assert_allclose(given, expected, rtol=0, atol=1e-4)


def test_the_file_says_what_it_takes(trained, tmp_path):
    pytest.importorskip("onnxscript", reason="torch's ONNX exporter takes onnxscript")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    run_ranks(1, look_into_onnx, trained, tmp_path, timeout_s=100)


def look_into_onnx(trained, tmp_path):
    run("--weights", trained, "--out", tmp_path / "m.onnx", "--input", "float", "--flip", "--ema")
    session = onnx_session(tmp_path / "m.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    assert (facts["network"], facts["height"], facts["width"], facts["feature_dim"]) == ("tiny", "32", "16", "128")
    assert "inside the graph" in facts["pixels"] and "float32 from 0 to 1" in facts["input"]
    assert len(facts["weights_sha256"]) == 64 and "mirror image" in facts["output"]
    [images] = session.get_inputs()
    assert images.shape == ["batch", 3, 32, 16] and images.type == "tensor(float)"
    pixels = torch.randint(0, 256, (3, 3, 32, 16), dtype=torch.uint8)
    expected = FeatureExtractor(trained, device="cpu", flip=True, ema=True)(pixels)
    given = session.run(None, {"images": (pixels.float() / 255).numpy()})[0]
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-4)


def test_torch_export_is_the_network(trained, tmp_path):
    run("--weights", trained, "--out", tmp_path / "m.pt2")
    extra = {"reid_dist.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
    assert json.loads(extra["reid_dist.json"])["network"] == "tiny"
    extractor = FeatureExtractor(trained, device="cpu")
    for num in (1, 9):
        images = torch.randint(0, 256, (num, 3, 32, 16), dtype=torch.uint8)
        torch.testing.assert_close(program(images), extractor(images), rtol=1e-5, atol=1e-5)


def test_safetensors_go_out_and_come_back(trained, tmp_path):
    run("--weights", trained, "--out", tmp_path / "m.safetensors")
    there, here = load_model(str(trained)), load_model(str(tmp_path / "m.safetensors"))
    assert here[1].network_config == there[1].network_config and here[1].height == 32
    for key, value in there[0].state_dict().items():
        assert torch.equal(here[0].state_dict()[key], value), key
    run("--weights", tmp_path / "m.safetensors", "--out", tmp_path / "again.safetensors")
    with pytest.raises(ValueError, match=r"--flip and --input are about a graph"):
        run("--weights", trained, "--out", tmp_path / "x.safetensors", "--flip")


def test_over_the_bound_nothing_is_written(trained, tmp_path):
    (tmp_path / "m.pt2").write_text("old")
    broken = export.Deployed.forward

    def forward(self, images):
        return broken(self, images) * 1.001

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.Deployed, "forward", forward)
        with pytest.raises(ValueError, match=r"--bound 0\.0001: greatest difference 0\.00.* nothing is written"):
            run("--weights", trained, "--out", tmp_path / "m.pt2")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("m.pt2", "old")]


class Branching(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_trace_that_fails_is_one_line(suffix, tmp_path, monkeypatch):
    if suffix == "onnx":
        pytest.importorskip("onnxscript", reason="torch's ONNX exporter takes onnxscript")
    monkeypatch.setitem(MODELS, "branching", Backbone(lambda stride: Branching(3, 8, 3), 8))
    save_network("branching", 8, tmp_path / "w.pt", 32, 16)
    with pytest.raises(ValueError, match=r"^MODEL\.NAME 'branching': cannot be exported by .*: \w+: .*") as error:
        run("--weights", tmp_path / "w.pt", "--out", tmp_path / f"m.{suffix}")
    assert "\n" not in str(error.value) and [f.name for f in tmp_path.iterdir()] == ["w.pt"]


def test_names_that_are_no_export(trained, tmp_path):
    for name, expected in (("m.trt", r"ends in \.onnx, \.pt2, \.safetensors"), ("no/m.onnx", "existing folder")):
        with pytest.raises(ValueError, match=f"^--out '.*{name}': expected .*{expected}"):
            run("--weights", trained, "--out", tmp_path / name)
    with pytest.raises(ValueError, match=r"--weights 'none\.pt': expected an existing file"):
        run("--weights", "none.pt", "--out", tmp_path / "m.onnx")
