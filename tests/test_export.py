"""Exports: the features of the network at any batch, nothing written that was not checked, one line of reasons."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from reid_dist import export
from reid_dist.inference import FeatureExtractor, load_model
from reid_dist.models import MODELS, Backbone, build_model
from reid_dist.models.ianet import IABlock
from reid_dist.world import World

WORLD = World(0, 0, 1, torch.device("cpu"))
NETWORKS = {"resnet50": 2048, "resnet50_ibn": 2048, "ianet": 2048, "timm/test_vit3": 96}


def run(*argv):
    export.main(WORLD, [str(a) for a in argv])


def onnx_session(file):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def save_network(name, width, file, height=32, width_px=16):
    """A network whose batch norms have seen some noise, so that features are of a size with those of a trained one."""
    model = build_model(name, width, range(0), cosine=False, image_size=(height, width_px))
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = 1.0
        if isinstance(m, IABlock):  # away from the identity
            for bn in (m.W1, m.W2):
                nn.init.constant_(bn.weight, 0.5)
    torch.manual_seed(0)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, height, width_px))
    config = f"MODEL: {{NAME: {name}, FEATURE_DIM: {width}}}\nDATA: {{HEIGHT: {height}, WIDTH: {width_px}}}"
    torch.save({"format": 2, "model": model.state_dict(), "config": config}, file)


@pytest.mark.timeout(400)  # seconds on a quiet machine; the exporter is one long Python program
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_is_the_network(name, tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="torch's ONNX exporter takes onnxscript")
    save_network(name, NETWORKS[name], tmp_path / "w.pt")
    run("--weights", tmp_path / "w.pt", "--out", tmp_path / "m.onnx")
    said = capsys.readouterr().out
    assert "normalised inside the graph" in said and "checked   greatest difference" in said
    network, _ = load_model(str(tmp_path / "w.pt"))
    session = onnx_session(tmp_path / "m.onnx")
    for num in (1, 4, 7):
        images = torch.randint(0, 256, (num, 3, 32, 16), dtype=torch.uint8)
        given = session.run(["features"], {"images": images.numpy()})[0]
        expected = network(export.normalised(images))
        assert given.shape == (num, NETWORKS[name]) and 0.1 < expected.abs().max() < 100
        np.testing.assert_allclose(given, expected, rtol=0, atol=1e-4)


def test_the_file_says_what_it_takes(trained, tmp_path):
    pytest.importorskip("onnxscript", reason="torch's ONNX exporter takes onnxscript")
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
    save_network("branching", 8, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"^MODEL\.NAME 'branching': cannot be exported by .*: \w+: .*") as error:
        run("--weights", tmp_path / "w.pt", "--out", tmp_path / f"m.{suffix}")
    assert "\n" not in str(error.value) and [f.name for f in tmp_path.iterdir()] == ["w.pt"]


def test_names_that_are_no_export(trained, tmp_path):
    for name, expected in (("m.trt", r"ends in \.onnx, \.pt2, \.safetensors"), ("no/m.onnx", "existing folder")):
        with pytest.raises(ValueError, match=f"^--out '.*{name}': expected .*{expected}"):
            run("--weights", trained, "--out", tmp_path / name)
    with pytest.raises(ValueError, match=r"--weights 'none\.pt': expected an existing file"):
        run("--weights", "none.pt", "--out", tmp_path / "m.onnx")
