"""A trained network from its file alone, and features of images from Python.

`load_model` serves export, extract, search and `FeatureExtractor` alike.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image, ImageOps
from torch.nn.functional import interpolate

from .build import build_network
from .config import check_config, describes_network, flatten, load_config
from .data.decode import UNREADABLE, as_rgb, decode, why
from .data.finish import MEAN, STD, finish
from .models import ReIDModel
from .models.weights import fill, read_weight_file
from .precision import AUTOCAST, fp32_products
from .world import World

# How fp32 is computed is a setting of the whole process: calls from several threads take turns.
_turn = threading.RLock()

ImageLike = str | Path | Image.Image | np.ndarray | torch.Tensor


@dataclass(frozen=True)
class Facts:
    """What one has to know about a loaded network. cfg: the frozen config it was built from; sha256: of the weights'
    file; notes: what was found in that file and what was not, as lines for people."""

    cfg: Any
    weights: str
    sha256: str
    notes: list[str]

    @property
    def name(self) -> str:
        return self.cfg.MODEL.NAME

    @property
    def height(self) -> int:
        return self.cfg.DATA.HEIGHT

    @property
    def width(self) -> int:
        return self.cfg.DATA.WIDTH

    @property
    def feature_dim(self) -> int:
        """D, the width of what comes out."""
        return self.cfg.MODEL.EMBED_DIM or self.cfg.MODEL.FEATURE_DIM

    @property
    def network_config(self) -> str:
        """YAML of the keys that the network depends on; `load_model` takes it back from a file's metadata."""
        tree: dict[str, Any] = {}
        for key, value in flatten(self.cfg).items():
            if describes_network(key):
                *parents, leaf = key.split(".")
                node = tree
                for name in parents:
                    node = node.setdefault(name, {})
                node[leaf] = value
        return yaml.safe_dump(tree)

    @property
    def metadata(self) -> dict[str, str]:
        """The facts as text, to be written into files."""
        return {
            "network": self.name,
            "height": str(self.height),
            "width": str(self.width),
            "feature_dim": str(self.feature_dim),
            "mean": " ".join(map(str, MEAN)),
            "std": " ".join(map(str, STD)),
            "weights_sha256": self.sha256,
            "config": self.network_config,
        }


def load_model(
    weights: str,
    cfg: str | None = None,
    opts: Sequence[str] = (),
    device: torch.device | str = "cpu",
    ema: bool = False,
) -> tuple[ReIDModel, Facts]:
    """The network in a file of weights, in fp32 and eval mode: normalised images (B, 3, H, W) -> features (B, D).

    weights: a checkpoint, a file of `export --out x.safetensors`, which both say what they hold, or a file of another
    code base (`models/rename.py`), for which `cfg` (a YAML file) and `opts` (KEY, VALUE, KEY, VALUE, ...) say
    MODEL.NAME and the like. ema: the moving average of the weights instead of the last ones.
    Raises ValueError for a file that is none, and for one that does not hold the whole network.
    """
    file = read_weight_file(weights, "--weights")
    if ema and not file.average:
        raise ValueError(f"--ema with --weights {weights!r}: holds no averaged weights; expected a run with TRAIN.EMA")
    config = load_config(argparse.Namespace(cfg=cfg, opts=list(opts)), file.config)
    config.TRAIN.PRECISION = "fp32"
    check_config(config, None, torch.cuda.is_available())
    config.freeze()
    device = torch.device(device)
    model = build_network(config, 0, World(0, 0, 1, device))
    tensors = file.weights | file.average if ema else file.weights
    notes = fill(model, tensors, f"--weights {weights!r}", whole=True)
    return model.eval().requires_grad_(False), Facts(config, weights, file.sha256, notes)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class FeatureExtractor:
    """Features of images, for a tracking project and the like:

    from reid_dist import FeatureExtractor
    extractor = FeatureExtractor("best.pt")
    features = extractor(crops, normalize=True)  # (B, D) float32
    similarity = features @ features.T
    """

    def __init__(
        self,
        weights: str | Path,
        cfg: str | None = None,
        opts: Sequence[str] = (),
        device: torch.device | str | None = None,
        batch_size: int = 64,
        flip: bool = False,
        ema: bool = False,
    ):
        """weights, cfg, opts, ema: as `load_model` takes them. device: None is the GPU if there is one. batch_size:
        images the network takes at a time. flip: the sum of the features of each image and of its mirror image, as
        evaluation does, for twice the time. The network computes in fp32, or in the TEST.PRECISION of `opts` or `cfg`:
        tf32, bf16 or fp16. Raises ValueError as `load_model` does.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: expected at least 1")
        self.device = default_device() if device is None else torch.device(device)
        self.network, self.facts = load_model(str(weights), cfg, opts, self.device, ema)
        self.batch_size, self.flip = batch_size, flip

    @torch.no_grad()
    def __call__(self, images: ImageLike | Sequence[ImageLike], normalize: bool = False) -> torch.Tensor:
        """B images, or one -> (B, D) float32 on the extractor's device, of length 1 with `normalize`.

        images: a path, a PIL image, a numpy array (h, w, 3) or (B, h, w, 3), a tensor (3, h, w) or (B, 3, h, w), or a
        sequence of paths, PIL images, (h, w, 3) arrays and (3, h, w) tensors of any sizes; arrays and tensors uint8,
        RGB. They are resized and normalised here. Raises ValueError for an image that cannot be decoded, with its path,
        and for other shapes and types: floating point has perhaps been normalised already. The process's settings of
        torch are the same after a call as before.
        """
        feats = [torch.empty(0, self.facts.feature_dim, device=self.device)]
        for pixels in self._pixels(images):
            x = finish(pixels.to(self.device, non_blocking=True), None, torch.float32)
            f = self._forward(x)
            feats.append(f + self._forward(x.flip(3)) if self.flip else f)
        whole = torch.cat(feats)
        return F.normalize(whole) if normalize else whole

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) normalised -> (n, D) float32, in the extractor's precision."""
        precision = self.facts.cfg.TEST.PRECISION or self.facts.cfg.TRAIN.PRECISION
        autocast = AUTOCAST.get(precision)
        half = torch.autocast(self.device.type, dtype=autocast, enabled=autocast is not None)
        with _turn, fp32_products(precision), half:
            return self.network(x).float()

    def _pixels(self, images: ImageLike | Sequence[ImageLike]) -> Iterator[torch.Tensor]:
        """Batches of (n, H, W, 3) uint8."""
        is_array = isinstance(images, (np.ndarray, torch.Tensor))
        if is_array and images.ndim == 4:  # type: ignore[union-attr]
            whole = as_tensor(images)  # type: ignore[arg-type]
            for start in range(0, len(whole), self.batch_size):
                yield self._resize(whole[start : start + self.batch_size])
            return
        items: list[Any] = [images] if is_array or isinstance(images, (str, Path, Image.Image)) else list(images)
        for start in range(0, len(items), self.batch_size):
            chunk = [self._resize(as_tensor(item)) for item in items[start : start + self.batch_size]]
            yield torch.cat([pixels.to(chunk[0].device) for pixels in chunk])

    def _resize(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, h, w) uint8 -> (n, H, W, 3); on the CPU the very pixels of the pipelines, on a GPU up to rounding."""
        size = (self.facts.height, self.facts.width)
        if images.shape[2:] != size:
            images = images.contiguous(memory_format=torch.channels_last)
            if images.device.type == "cpu":
                images = interpolate(images, size=size, mode="bilinear", antialias=True)
            else:  # no antialiasing of uint8 there
                images = interpolate(images.float(), size=size, mode="bilinear", antialias=True)
                images = images.round_().clamp_(0, 255).to(torch.uint8)
        return images.permute(0, 2, 3, 1)


def as_tensor(image: ImageLike) -> torch.Tensor:
    """(1, 3, h, w) uint8 of one image, (n, 3, h, w) of n in an array; see `FeatureExtractor`."""
    if isinstance(image, (str, Path)):
        try:
            image = decode(str(image))
        except UNREADABLE as error:
            raise ValueError(why(str(image), error)) from None
    elif isinstance(image, Image.Image):
        image = as_rgb(ImageOps.exif_transpose(image))
    if isinstance(image, Image.Image):
        image = np.array(image)
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        raise ValueError(f"image {type(image).__name__}: expected a path, a PIL image, an array or a tensor")
    is_numpy = isinstance(image, np.ndarray)
    wanted = "(h, w, 3) or (B, h, w, 3)" if is_numpy else "(3, h, w) or (B, 3, h, w)"
    shape = tuple(image.shape)
    is_uint8 = image.dtype == (np.uint8 if is_numpy else torch.uint8)
    if not is_uint8 or len(shape) not in (3, 4) or shape[-1 if is_numpy else -3] != 3 or 0 in shape[-3:]:
        raise ValueError(f"image {image.dtype} {shape}: expected uint8 {wanted}, RGB, 0 to 255, not normalised")
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3)
    return image if image.ndim == 4 else image[None]
