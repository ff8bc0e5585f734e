"""How far this pipeline is from the original's transforms made with PIL and torchvision, and what that does to mAP.

    python benchmarks/pipeline_agreement.py --root DATA --weights WEIGHTS

First the pixels: the train and the test pipe against torchvision's transforms on PIL images with the same parameters,
over `--images` files at several sizes, in grey levels; and the two decoders alone. Then the effect: a MobileNetV2 is
trained for `--steps` steps with this pipeline and with PIL's (same seed, so the same batches and augmentation), each
network is evaluated with both test pipes, and one more seed says how much a run's mAP varies anyway. On a machine with
a GPU "this pipeline" is DALI's GPU decoder. DATA is in Market-1501's layout; without WEIGHTS the network starts random.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as F

from reid_dist import dist, evaluate, train
from reid_dist.data import pipeline
from reid_dist.data.finish import ERASED, MEAN, STD
from reid_dist.data.loader import TrainLoader, test_batches
from reid_dist.data.pipeline import resolve
from reid_dist.data.plan import EpochPlan

SIZES = ((256, 128), (384, 128), (128, 64), (112, 56), (64, 32))
CFG = Path(__file__).parent.parent / "configs" / "mobilenetv2_ce_triplet.yaml"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--root", type=Path, required=True, help="folder with bounding_box_train, bounding_box_test, query")
    p.add_argument("--weights", default="", help="MobileNetV2 weights to start from")
    p.add_argument("--images", type=int, default=1024)
    p.add_argument("--steps", type=int, default=80, help="of 64 images, in each of three runs; 0: pixels only")
    p.add_argument("--size", type=int, nargs=2, default=(112, 56), help="height and width to train on")
    args = p.parse_args()
    world = dist.init()
    paths = sorted(str(f) for f in (args.root / "bounding_box_train").glob("*.jpg"))[: args.images]
    compare_decoders(paths, world.device)
    compare_pixels(paths, world.device)
    if args.steps:
        compare_training(args, world)


# --- pixels -----------------------------------------------------------------------------------------------------------


def original_test(path: str, height: int, width: int) -> torch.Tensor:
    """(3, H, W) float32 by torchvision's functions on the PIL image."""
    image = F.resize(Image.open(path).convert("RGB"), [height, width])
    return F.normalize(F.to_tensor(image), list(MEAN), list(STD))


def original_train(path: str, height: int, width: int, drawn: tuple) -> torch.Tensor:
    """Likewise with the crop, flip and erasing of one image of the plan."""
    resize_hw, (y, x), flip, (ey, ex, eh, ew) = drawn
    image = F.resize(Image.open(path).convert("RGB"), list(resize_hw))
    image = F.crop(image, y, x, height, width)
    image = F.hflip(image) if flip else image
    out = F.normalize(F.to_tensor(image), list(MEAN), list(STD))
    return F.erase(out, ey, ex, eh, ew, torch.tensor(ERASED)[:, None, None]) if eh else out


def compare_decoders(paths: list[str], device: torch.device) -> None:
    """Images are asked for in their own size, so that they are only decoded."""
    kind, where = resolve("auto", "auto", device)
    same, worst, num = 0, 0, 0
    for path in paths[:256]:
        pil = np.asarray(Image.open(path).convert("RGB"))
        request = pipeline.Request(
            np.zeros(1, np.int64), np.array([pil.shape[:2]], np.int32), np.zeros((1, 2), np.int32)
        )
        stream = pipeline.open_images(
            [request], lambda _, path=path: path, batch=1, height=pil.shape[0], width=pil.shape[1], pipeline=kind,
            decode_device=where, num_workers=1, device=device,
        )  # fmt: skip
        with stream:
            difference = np.abs(next(stream)[0].cpu().numpy().astype(int) - pil)
        same, worst, num = same + int((difference == 0).sum()), max(worst, int(difference.max())), num + pil.size
    print(
        f"decoders: {kind} ({where}) and PIL, {len(paths[:256])} files: {same / num:.4%} of the values equal, "
        f"at most {worst} off"
    )


def compare_pixels(paths: list[str], device: torch.device) -> None:
    kind, where = resolve("auto", "auto", device)
    how = {"device": device, "dtype": torch.float32, "pipeline": kind, "decode_device": where, "num_workers": 2}
    path_of = functools.partial(list.__getitem__, paths)
    print(f"grey levels between {kind} ({where}) and PIL; border: greatest on it less greatest inside")
    print(f"{'pipe':8}{'size':>10}{'greatest':>10}{'mean':>9}{'share > 1':>11}{'border':>8}")
    for height, width in SIZES:
        batches = test_batches(path_of, np.arange(len(paths)), batch=64, height=height, width=width, **how)
        ours = torch.cat([images.cpu() for images, _ in batches])
        report("test", height, width, ours, torch.stack([original_test(path, height, width) for path in paths]))
        plan = EpochPlan(
            np.zeros(len(paths), int), batch=64, num_instances=4, sampler="chunk", seed=0, height=height, width=width
        )
        ours_of, originals = [], []
        with TrainLoader(path_of, plan, rank=0, world_size=1, **how) as loader:
            for batch in loader:
                if batch.epoch > 1:
                    break
                ours_of.append(batch.images.cpu())
                a = plan.step(batch.epoch, batch.step).augmentation
                rows = zip(*(v.tolist() for v in (a.resize_hw, a.crop_yx, a.flip, a.erase)), strict=True)
                originals += [
                    original_train(paths[i], height, width, row)
                    for i, row in zip(batch.indices.tolist(), rows, strict=True)
                ]
        report("train", height, width, torch.cat(ours_of), torch.stack(originals))


def report(pipe: str, height: int, width: int, ours: torch.Tensor, original: torch.Tensor) -> None:
    difference = (ours - original).abs() * torch.tensor(STD)[:, None, None] * 255
    inner = difference[..., 1:-1, 1:-1]
    share = (difference > 1.5).double().mean()
    print(
        f"{pipe:8}{f'{height}x{width}':>10}{difference.max():10.2f}{difference.mean():9.4f}{share:11.1e}"
        f"{difference.max() - inner.max():8.2f}"
    )


# --- the effect -------------------------------------------------------------------------------------------------------


def pil_resize_and_crop(pixels: np.ndarray, resize_hw: np.ndarray, crop_yx: np.ndarray, out: np.ndarray) -> None:
    """`pipeline.resize_and_crop` by PIL."""
    (h, w), (y, x) = resize_hw.tolist(), crop_yx.tolist()
    resized = np.asarray(Image.fromarray(pixels).resize((w, h), Image.Resampling.BILINEAR))
    np.copyto(out, resized[y : y + out.shape[0], x : x + out.shape[1]])


@contextlib.contextmanager
def transforms_of(name: str) -> Iterator[list[str]]:
    """Inside, images are made by this pipeline or by PIL; yields the config keys for it."""
    if name == "this":
        yield ["DATA.NUM_WORKERS", "2"]
    else:
        # No worker processes: they would not know of the replacement.
        with mock.patch.object(pipeline, "resize_and_crop", pil_resize_and_crop):
            yield ["DATA.PIPELINE", "torch", "DATA.DECODE_DEVICE", "cpu", "DATA.NUM_WORKERS", "0"]


def compare_training(args: argparse.Namespace, world: dist.World) -> None:
    print(f"\nmAP after {args.steps} steps of 64 images at {args.size[0]}x{args.size[1]}, one run each")
    print(f"{'trained with':26}{'tested with this':>18}{'tested with PIL':>18}")
    with tempfile.TemporaryDirectory() as output:
        for name, seed in (("this", 0), ("PIL", 0), ("this", 1)):
            tag = f"{name}-{seed}"
            common = [
                "--cfg", str(CFG), "--root", str(args.root), "--output", output, "--tag", tag, "SEED", str(seed),
                "DATA.HEIGHT", str(args.size[0]), "DATA.WIDTH", str(args.size[1]), "MODEL.PRETRAINED", args.weights,
            ]  # fmt: skip
            steps = str(args.steps)
            with transforms_of(name) as keys:
                quietly(train.main, world, [*common, *keys, "TRAIN.MAX_STEPS", steps, "TRAIN.CHECKPOINT_STEP", steps])
            folder = Path(output) / "market1501" / tag
            found = []
            for tester in ("this", "PIL"):
                with transforms_of(tester) as keys:
                    weights = str(folder / "checkpoints" / "best.pt")
                    quietly(evaluate.main, world, [*common, *keys, "--weights", weights])
                found.append(json.loads((folder / "evaluation.json").read_text())["mAP"])
            print(f"{f'{name}, seed {seed}':26}{found[0]:18.2%}{found[1]:18.2%}", flush=True)


def quietly(main, world: dist.World, argv: list[str]) -> None:
    """A command without its lines on the console."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main(world, argv)
        except dist.UserError:
            raise SystemExit(errors.getvalue()) from None


if __name__ == "__main__":
    main()
