"""A trained network as a file for other programs, checked against the network before it is there.

python -m reid_dist.export --weights best.pt --out model.onnx
python -m reid_dist.export --weights best.pt --out model.pt2          # torch.export
python -m reid_dist.export --weights best.pt --out model.safetensors  # weights alone, which load_model takes back

.onnx and .pt2 take images of one size, any number of them, in RGB, and normalise them inside: whoever normalises before
gets other features. docs/export.md has the details.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import dist
from .config import bare_parser
from .data.finish import MEAN, STD, finish
from .files import write_atomic
from .inference import Facts, load_model
from .models import ReIDModel

BATCHES = (1, 2, 5)  # tried after the export, which sees a batch of 3
BOUND = 1e-4
Run = Callable[[torch.Tensor], torch.Tensor]
USES = {  # how Python takes a file of each kind
    ".onnx": "onnxruntime.InferenceSession({!r}).run(None, {{'images': images}})",
    ".pt2": "torch.export.load({!r}).module()(images)",
    ".safetensors": "reid_dist.FeatureExtractor({!r})(images)",
}


class Deployed(nn.Module):
    """Images as other programs have them -> features (B, D) float32.

    images: (B, 3, H, W) RGB, uint8 from 0 to 255, or float32 from 0 to 1 where `scale` is 1. flip: the sum of the
    features of each image and of its mirror image.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: ReIDModel, scale: float, flip: bool):
        super().__init__()
        self.network, self.scale, self.flip = network, scale, flip
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images.float() / self.scale - self.mean) / self.std
        feats = self.network(x)
        return feats + self.network(x.flip(3)) if self.flip else feats


def main(world: dist.World, argv: list[str]) -> None:
    args = command_line().parse_intermixed_args(argv)
    if world.world_size > 1:
        dist.fail("export runs alone; expected no torchrun")
    out, suffix = Path(args.out), Path(args.out).suffix
    if suffix not in WRITERS:
        raise ValueError(f"--out {args.out!r}: expected a name that ends in {', '.join(WRITERS)}")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {args.out!r}: expected an existing folder")
    network, facts = load_model(args.weights, args.cfg, args.opts, ema=args.ema)
    for line in facts.notes:
        print(line)
    print(f"network   {facts.name}, images of {facts.height}x{facts.width}, features of {network.feature_dim} numbers")
    write_atomic(out, lambda part: print(WRITERS[suffix](network, facts, part, args), flush=True))
    print(f"written   {out}, {out.stat().st_size / 1e6:.1f} MB")
    print(f"next      {USES[suffix].format(str(out))}")


def write_onnx(network: ReIDModel, facts: Facts, part: Path, args: argparse.Namespace) -> str:
    """The ONNX file at `part`, by torch's exporter, and what is to be said of it. Raises ValueError."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--out {args.out!r}: {error}; expected pip install 'reid_dist[onnx]'") from None
    deployed = deploy(network, args)
    with quiet(), naming(facts, "ONNX"):
        program: Any = torch.onnx.export(
            deployed,
            (example(facts, 3, args.input),),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    program.model.metadata_props.update(metadata(facts, args))
    program.save(str(part), external_data=False)
    session = onnxruntime.InferenceSession(str(part), providers=["CPUExecutionProvider"])
    return described(facts, args) + check(
        lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0]),
        network, facts, args, f"onnxruntime {onnxruntime.__version__}",
    )  # fmt: skip


def write_pt2(network: ReIDModel, facts: Facts, part: Path, args: argparse.Namespace) -> str:
    """A file of torch.export at `part`, and what is to be said of it. Raises ValueError."""
    with quiet(), naming(facts, "torch.export"):
        program = torch.export.export(
            deploy(network, args),
            (example(facts, 3, args.input),),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
        stream = io.BytesIO()
        torch.export.save(program, stream, extra_files={"reid_dist.json": json.dumps(metadata(facts, args))})
        part.write_bytes(stream.getbuffer())
        stream.seek(0)
        loaded = torch.export.load(stream).module()
    return described(facts, args) + check(loaded, network, facts, args, f"torch.export of torch {torch.__version__}")


def write_safetensors(network: ReIDModel, facts: Facts, part: Path, args: argparse.Namespace) -> str:
    """The weights without the classifier, by their names here, with the network's config in the metadata."""
    from safetensors.torch import save_file

    if args.flip or args.input != "uint8":
        raise ValueError("--flip and --input are about a graph, and a .safetensors file has none; expected neither")
    tensors = {
        k: v.contiguous() for k, v in network.state_dict().items() if not k.startswith(("classifier.", "centers"))
    }
    save_file(tensors, part, facts.metadata)
    again, _ = load_model(str(part))
    done = check(lambda images: again(normalised(images)), network, facts, args, "load_model")
    return "holds     weights alone; FeatureExtractor and --weights take them\n" + done


WRITERS = {".onnx": write_onnx, ".pt2": write_pt2, ".safetensors": write_safetensors}


def deploy(network: ReIDModel, args: argparse.Namespace) -> Deployed:
    return Deployed(network, 255.0 if args.input == "uint8" else 1.0, args.flip).eval()


def example(facts: Facts, num: int, kind: str) -> torch.Tensor:
    """`num` images of random blocks of colour under some noise, some all black and all white. (To a network images of
    noise alone are much the same; its batch norms then enlarge small differences, rounding included.)"""
    generator = torch.Generator().manual_seed(num)
    blocks = torch.randint(0, 256, (num, 3, 8, 4), dtype=torch.uint8, generator=generator)
    colours = F.interpolate(blocks, size=(facts.height, facts.width), mode="nearest")
    noise = torch.randint(0, 256, colours.shape, dtype=torch.uint8, generator=generator)
    images = colours // 4 * 3 + noise // 4
    images[1:2], images[2:3] = 0, 255
    return images if kind == "uint8" else images.float() / 255


def normalised(images: torch.Tensor) -> torch.Tensor:
    """What training and evaluation make of uint8 images (B, 3, H, W)."""
    return finish(images.permute(0, 2, 3, 1), None, torch.float32)


@torch.no_grad()
def check(run: Run, network: ReIDModel, facts: Facts, args: argparse.Namespace, by: str) -> str:
    """A line with the greatest difference between run(images) and what the network gives for the same images.

    Raises ValueError where it is more than args.bound of the largest feature.
    """
    difference, largest = 0.0, 0.0
    for num in BATCHES:
        x = normalised(example(facts, num, "uint8"))
        expected = network(x) + network(x.flip(3)) if args.flip else network(x)
        given = run(example(facts, num, args.input))
        difference = max(difference, (given - expected).abs().max().nan_to_num(nan=np.inf).item())
        largest = max(largest, expected.abs().max().item())
    batches = ", ".join(map(str, BATCHES))
    found = f"greatest difference {difference:.2g} in features up to {largest:.2g}, at batches of {batches}, by {by}"
    if not difference <= args.bound * largest:
        raise ValueError(f"--bound {args.bound:g}: {found}; nothing is written")
    return f"checked   {found}"


def described(facts: Facts, args: argparse.Namespace) -> str:
    lines = interface(facts, args)
    return "".join(f"{name:<9} {text}\n" for name, text in lines.items())


def metadata(facts: Facts, args: argparse.Namespace) -> dict[str, str]:
    return facts.metadata | interface(facts, args)


def interface(facts: Facts, args: argparse.Namespace) -> dict[str, str]:
    """What goes in and what comes out, for the console and for the file."""
    pixels = "uint8 from 0 to 255" if args.input == "uint8" else "float32 from 0 to 1"
    mirrored = ", the sum of those of the image and of its mirror image" if args.flip else ""
    return {
        "input": f"images (batch, 3, {facts.height}, {facts.width}), RGB, {pixels}, any batch from 1 on",
        "resize": "bilinear, with antialiasing where it shrinks (PIL's BILINEAR): another filter gives other features",
        "pixels": "normalised inside the graph: do not take off a mean or divide by a deviation before",
        "output": f"features (batch, {facts.feature_dim}) float32, not scaled to length 1{mirrored}",
    }


@contextlib.contextmanager
def naming(facts: Facts, what: str) -> Iterator[None]:
    """A trace that fails becomes one line that names the network and the innermost reason."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - exporters raise anything
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise ValueError(f"MODEL.NAME {facts.name!r}: cannot be exported by {what}: {reason}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' own words, which run over pages and are not about the user's network."""
    logger, level = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def command_line() -> argparse.ArgumentParser:
    p = bare_parser("export", "Writes a trained network as ONNX, .pt2 or safetensors, checked against the network.")
    p.add_argument("--weights", required=True, metavar="FILE", help="a checkpoint, or weights with --cfg or KEY VALUE")
    p.add_argument("--out", required=True, metavar="FILE", help="a name that ends in .onnx, .pt2 or .safetensors")
    p.add_argument("--input", choices=("uint8", "float"), default="uint8", help="pixels: uint8, or float from 0 to 1")
    p.add_argument("--flip", action="store_true", help="the sum of the features of image and mirror image")
    p.add_argument("--ema", action="store_true", help="the moving average of the weights (TRAIN.EMA)")
    p.add_argument("--bound", type=float, default=BOUND, help="greatest difference, in parts of the largest feature")
    return p


if __name__ == "__main__":
    dist.run_main(lambda world: main(world, sys.argv[1:]))
