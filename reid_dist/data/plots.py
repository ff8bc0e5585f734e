"""Pictures of a data set: some of its people, and how many images of them there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomic
from .check import Examined
from .decode import UNREADABLE, decode
from .index import SPLITS
from .readers.files import RawDataset
from .split import Split, dense

IDENTITIES, IMAGES = 16, 10  # rows and columns of the contact sheet
CELL = (64, 128)  # width and height of an image there


def draw_contact_sheet(file: Path, raw: RawDataset, _files: Examined) -> None:
    """A PNG with a row for each of some identities, spread evenly over all; a frame's colour is a camera."""
    from PIL import Image, ImageColor, ImageDraw, ImageFont

    split = raw.train if len(raw.train) else raw.gallery
    names, pids = dense(split.pids)
    cameras, camids = dense(split.cameras)
    order = np.argsort(pids, kind="stable")
    starts = np.searchsorted(pids[order], np.arange(len(names) + 1))
    chosen = np.unique(np.linspace(0, len(names) - 1, IDENTITIES).astype(int)).tolist() if len(names) else []
    (width, height), gap, left = CELL, 8, 90
    sheet = Image.new("RGB", (left + IMAGES * (width + gap), gap + max(1, len(chosen)) * (height + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for line, identity in enumerate(chosen):
        y = gap + line * (height + gap)
        images = order[starts[identity] : starts[identity + 1]]
        draw.text((4, y), f"{split.pid_name(int(names[identity]))[:14]}\n{len(images)} images", "black", font)
        for column, i in enumerate(images[np.unique(np.linspace(0, len(images) - 1, IMAGES).astype(int))].tolist()):
            x = left + column * (width + gap)
            colour = ImageColor.getrgb(f"hsl({360 * int(camids[i]) // len(cameras)}, 70%, 50%)")
            draw.rectangle((x - 2, y - 2, x + width + 1, y + height + 1), colour)
            try:
                sheet.paste(decode(split.path(i)).resize(CELL), (x, y))
            except UNREADABLE:
                draw.text((x + 4, y + 4), "cannot be\ndecoded", "white", font)
    write_atomic(file, lambda part: sheet.save(part, format="PNG"))


def draw_distributions(file: Path, raw: RawDataset, files: Examined) -> None:
    """A PNG of four histograms: images an identity, cameras an identity, images a camera, heights and widths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(2, 2)
    per_pid = {what: np.bincount(dense(getattr(raw, what).pids)[1]) for what in SPLITS if len(getattr(raw, what))}
    most = max((int(counts.max()) for counts in per_pid.values()), default=1)
    bins = np.linspace(0.5, most + 0.5, min(most, 60) + 1)
    for what in SPLITS:
        split: Split = getattr(raw, what)
        if len(split) == 0:
            continue
        _, pids = dense(split.pids)
        cameras, camids = dense(split.cameras)
        pairs, _ = dense(pids * len(cameras) + camids)
        axes[0, 0].hist(per_pid[what], bins=bins, histtype="step", label=what)
        axes[0, 1].hist(
            np.bincount(pairs // len(cameras)), bins=np.arange(len(cameras) + 2) - 0.5, histtype="step", label=what
        )
        axes[1, 0].plot(np.arange(len(cameras)), np.bincount(camids), "o-", label=what)
    sizes = files.sizes[files.sizes[:, 0] > 0]
    bins = np.linspace(0, 1.05 * sizes.max(initial=1), 60)
    for column, name in enumerate(("height", "width")):
        axes[1, 1].hist(sizes[:, column], bins=bins, histtype="step", label=name)
    labels = ("images an identity", "cameras an identity", "camera, in sorted order", "pixels")
    for axis, label, what in zip(axes.flat, labels, ("identities", "identities", "images", "images"), strict=True):
        axis.set_xlabel(label)
        axis.set_ylabel(what)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axis.has_data():
            axis.legend()
    axes[0, 0].set_yscale("log")
    write_atomic(file, lambda part: figure.savefig(part, format="png", dpi=110))
