"""A network from its file alone, and FeatureExtractor."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reid_dist.data.loader import test_batches as read_batches
from reid_dist.inference import FeatureExtractor, as_tensor, load_model
from reid_dist.models import build_model


def paths_of(root):
    return sorted(str(f) for f in (root / "bounding_box_test").iterdir() if f.suffix == ".jpg")


@pytest.fixture(scope="module")
def extractor(trained):
    return FeatureExtractor(trained, device="cpu", batch_size=5)


def test_a_checkpoint_says_what_it_holds(trained):
    network, facts = load_model(str(trained))
    assert (facts.name, facts.height, facts.width, facts.feature_dim) == ("tiny", 32, 16, 128)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    saved = torch.load(trained, weights_only=True)
    for key, value in network.state_dict().items():
        if not key.startswith("classifier.") and not key.endswith("num_batches_tracked"):
            assert torch.equal(value, saved["model"][key]), key
    assert len(facts.notes) == 1 and facts.metadata["weights_sha256"] == facts.sha256
    averaged, _ = load_model(str(trained), ema=True)
    assert torch.equal(averaged.bn.weight, saved["ema"]["bn.weight"])
    assert not torch.equal(averaged.bn.weight, network.bn.weight)


def test_what_is_asked_for_goes_before_what_the_checkpoint_says(trained, tmp_path):
    assert load_model(str(trained), opts=["DATA.HEIGHT", "64"])[1].height == 64
    (tmp_path / "c.yaml").write_text("DATA: {WIDTH: 24}")
    facts = load_model(str(trained), str(tmp_path / "c.yaml"), ["DATA.HEIGHT", "64"])[1]
    assert (facts.height, facts.width) == (64, 24)
    with pytest.raises(ValueError, match="weights of another architecture"):
        load_model(str(trained), opts=["MODEL.NAME", "mobilenet_v2", "MODEL.FEATURE_DIM", "1280"])
    with pytest.raises(ValueError, match=r"DATA\.HIGHT '64' on the command line: unknown key"):
        load_model(str(trained), opts=["DATA.HIGHT", "64"])


def test_weights_of_others_take_their_name_from_the_options(tmp_path):
    net = build_model("tiny", 128, range(0), False)
    torch.save(net.backbone.state_dict(), tmp_path / "w.pth")
    network, facts = load_model(str(tmp_path / "w.pth"), opts=["MODEL.NAME", "tiny", "MODEL.FEATURE_DIM", "128"])
    x = torch.randn(2, 3, 32, 16)
    torch.testing.assert_close(network(x), net.backbone.eval()(x).mean((2, 3)), rtol=1e-4, atol=1e-6)
    assert facts.height == 256 and "the feature is the pooled map" in facts.notes[1]
    with pytest.raises(ValueError, match=r"MODEL\.FEATURE_DIM 2048: expected 128"):
        load_model(str(tmp_path / "w.pth"), opts=["MODEL.NAME", "tiny"])
    with pytest.raises(ValueError, match=r"--ema with --weights .*: holds no averaged weights"):
        load_model(str(tmp_path / "w.pth"), opts=["MODEL.NAME", "tiny", "MODEL.FEATURE_DIM", "128"], ema=True)


def test_features_are_those_of_the_evaluation(extractor, pedestrians):
    """The very pixels of the pipelines, hence the same features as `evaluator.extract` before it adds the mirror's."""
    paths = paths_of(pedestrians)[:13]
    batches = read_batches(
        paths.__getitem__, np.arange(13), batch=8, height=32, width=16, device=torch.device("cpu"),
        dtype=torch.float32, pipeline="torch", decode_device="cpu", num_workers=0,
    )  # fmt: skip
    with torch.no_grad():
        images = torch.cat([images for images, _ in batches])
        plain, mirrored = (extractor.network(x) for x in (images, images.flip(3)))
    feats = extractor(paths)
    assert feats.shape == (13, 128) and feats.dtype == torch.float32
    torch.testing.assert_close(feats, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(extractor(paths, normalize=True).norm(dim=1), torch.ones(13))
    flipping = FeatureExtractor(str(extractor.facts.weights), device="cpu", flip=True)
    torch.testing.assert_close(flipping(paths), plain + mirrored, rtol=1e-5, atol=1e-5)


def test_every_kind_of_image_gives_the_same(extractor, pedestrians):
    path = paths_of(pedestrians)[0]
    expected = extractor(path)
    pil = Image.open(path)
    array = np.array(pil.convert("RGB"))
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    batch = np.stack([array] * 7)
    kinds = [str(path), pil, array, tensor, [path], (array, path), batch, torch.from_numpy(batch).permute(0, 3, 1, 2)]
    for kind in kinds:
        feats = extractor(kind)
        assert len(feats) == (len(kind) if isinstance(kind, (list, tuple)) else 7 if np.ndim(kind) == 4 else 1)
        torch.testing.assert_close(feats, expected.expand_as(feats), rtol=1e-5, atol=1e-5)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 60)), max_size=12), st.integers(1, 6))
def test_any_number_of_images_of_any_size(extractor, sizes, batch_size):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    extractor.batch_size = batch_size
    feats = extractor(images)
    assert feats.shape == (len(sizes), 128)
    for image, feat in zip(images, feats, strict=True):
        torch.testing.assert_close(extractor(image)[0], feat, rtol=1e-4, atol=1e-4)
    assert extractor(np.zeros((0, 40, 20, 3), np.uint8)).shape == (0, 128)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), r"image float32 \(8, 8, 3\): expected uint8 \(h, w, 3\) or"),
        (torch.zeros(3, 8, 8), r"image torch\.float32 \(3, 8, 8\): expected uint8 \(3, h, w\) or"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"\(8, 8, 3\): expected uint8 \(3, h, w\)"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\): expected uint8 \(h, w, 3\)"),
        (np.zeros((8, 8), np.uint8), r"\(8, 8\): expected uint8"),
        (np.zeros((0, 8, 3), np.uint8), r"\(0, 8, 3\): expected uint8"),
        (["/no/such.jpg"], r"image /no/such\.jpg: No such file"),
        ([None], r"image NoneType: expected a path"),
    ],
)
def test_what_is_no_image_is_named(extractor, image, message):
    with pytest.raises(ValueError, match=message):
        extractor(image)


def test_a_greyscale_picture_on_its_side_is_turned_and_coloured(tmp_path):
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    exif = image.getexif()
    exif[274] = 6  # on its side
    image.save(tmp_path / "x.png", exif=exif)
    from_file, from_pil = as_tensor(tmp_path / "x.png"), as_tensor(Image.open(tmp_path / "x.png"))
    assert from_file.shape == (1, 3, 4, 3) and torch.equal(from_file, from_pil)


def test_importing_the_extractor_is_what_imports_torch():
    code = (
        "import sys, reid_dist; a = 'torch' in sys.modules; from reid_dist import FeatureExtractor; "
        "print(a, 'torch' in sys.modules, FeatureExtractor.__name__, hasattr(reid_dist, 'nothing'))"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=90)
    assert out.split() == ["False", "True", "FeatureExtractor", "False"]
