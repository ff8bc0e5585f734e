"""Who looks like this? The nearest images of a gallery, as a table and as a page.

python -m reid_dist.extract --weights best.pt --images DIR --out gallery.npz
python -m reid_dist.search --gallery gallery.npz --query person.jpg -k 10 --html found.html

The network is the one that made the gallery's features; the page holds its pictures and needs nothing beside it.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from . import dist
from .config import bare_parser, flatten
from .data.decode import UNREADABLE, decode
from .feature_files import FeatureFile, read_features
from .files import write_atomic
from .inference import FeatureExtractor

THUMBNAIL = (128, 256)  # pixels, at most: twice what a page shows, for fine screens


class Answer(NamedTuple):
    """An image of the gallery: its row there, and its cosine to the query."""

    row: int
    similarity: float


def main(world: dist.World, argv: list[str]) -> None:
    args = command_line().parse_intermixed_args(argv)
    if world.world_size > 1:
        dist.fail("search runs alone; expected no torchrun")
    if args.k < 1:
        raise ValueError(f"-k {args.k}: expected at least 1")
    if args.html and not Path(args.html).absolute().parent.is_dir():
        raise ValueError(f"--html {args.html!r}: expected an existing folder")
    gallery = read_features(args.gallery, "--gallery")
    extractor = open_extractor(args, gallery)
    queries = extractor(args.query, normalize=True).cpu().numpy()
    found = [nearest(query, gallery.feats, args.k) for query in queries]
    for path, answers in zip(args.query, found, strict=True):
        print(table(path, answers, gallery))
    if args.html:
        text = page(args.query, found, gallery)
        write_atomic(Path(args.html), lambda part: part.write_text(text, encoding="utf-8"))
        print(f"written   {args.html}")


def open_extractor(args: argparse.Namespace, gallery: FeatureFile) -> FeatureExtractor:
    """The network that made the gallery, of the file that its metadata name or that --weights names.

    Raises ValueError where there is none, and for weights that are others.
    """
    made_by = gallery.metadata
    weights = args.weights or made_by.get("weights", "")
    if not weights or not Path(weights).is_file():
        raise ValueError(
            f"--gallery {args.gallery!r}: made by {weights or 'unknown weights'!r}; expected --weights FILE"
        )
    # The gallery's own config, size of images included; what is on the command line goes before it.
    keys = flatten(yaml.safe_load(made_by.get("config", "")) or {})
    opts = [text for key, value in keys.items() for text in (key, str(value))]
    flip, ema = made_by.get("flip", False), made_by.get("ema", False)
    extractor = FeatureExtractor(weights, args.cfg, [*opts, *args.opts], flip=flip, ema=ema)
    made, here = made_by.get("weights_sha256"), extractor.facts.sha256
    if made and made != here:
        raise ValueError(f"--weights {weights!r}: not the weights that made {args.gallery} (another SHA-256)")
    if extractor.facts.feature_dim != gallery.feats.shape[1]:
        raise ValueError(
            f"--gallery {args.gallery!r}: features of {gallery.feats.shape[1]} numbers; "
            f"expected {extractor.facts.feature_dim}, as {weights} gives"
        )
    return extractor


def nearest(query: np.ndarray, gallery: np.ndarray, k: int) -> list[Answer]:
    """The k rows of the gallery (N, D) with the largest cosines to a query (D,) of length 1; ties by row."""
    lengths = np.sqrt(np.einsum("nd,nd->n", gallery, gallery))
    cosines = gallery @ query / np.maximum(lengths, 1e-12)
    return [Answer(int(row), float(cosines[row])) for row in np.argsort(-cosines, kind="stable")[:k]]


def label(gallery: FeatureFile, row: int) -> str:
    """'pid 7 cam 2', as far as it is known."""
    parts = [("pid", gallery.pids), ("cam", gallery.camids)]
    return " ".join(f"{name} {column[row]}" for name, column in parts if column is not None)


def table(path: str, answers: list[Answer], gallery: FeatureFile) -> str:
    lines = [f"query     {path}", " rank  cosine  image"]
    for place, (row, similarity) in enumerate(answers, start=1):
        lines.append(f"{place:5}  {similarity:6.3f}  {gallery.paths[row]}  {label(gallery, row)}".rstrip())
    return "\n".join(lines)


STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #fff; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --line: #3d444d; } }
body { margin: 0 auto; max-width: 1200px; padding: 16px; background: var(--paper); color: var(--ink);
  font: 15px/1.4 system-ui, sans-serif; }
h1 { font-size: 20px; } section { border-top: 1px solid var(--line); padding: 16px 0; }
p { color: var(--soft); overflow-wrap: anywhere; margin: 4px 0 12px; }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 16px 12px; list-style: none;
  margin: 0; padding: 0; }
.image { display: grid; place-items: center; height: 160px; border: 1px solid var(--line); border-radius: 6px;
  overflow: hidden; color: var(--soft); font-size: 13px; text-align: center; }
.image img { max-width: 100%; max-height: 100%; height: 100%; object-fit: contain; }
.query { width: 112px; } b { font-variant-numeric: tabular-nums; }
small { display: block; color: var(--soft); font-size: 12px; overflow-wrap: anywhere; }
"""


def shown(gallery: FeatureFile, row: int) -> str:
    """An image's name behind that of its folder, which is often whom it shows."""
    return "/".join(part for part in Path(str(gallery.paths[row])).parts[-2:] if part != "/")


def page(queries: list[str], found: list[list[Answer]], gallery: FeatureFile) -> str:
    """A whole HTML page: each query with its answers, nearest first."""
    sections = []
    for path, answers in zip(queries, found, strict=True):
        items = [
            f"<li>{picture(str(gallery.paths[row]))}<b>{place}. {similarity:.3f}</b>"
            f"<small>{html.escape(label(gallery, row))}</small>"
            f"<small>{html.escape(shown(gallery, row))}</small></li>"
            for place, (row, similarity) in enumerate(answers, start=1)
        ]
        sections.append(
            f'<section><div class="query">{picture(path)}</div><p>query {html.escape(path)}</p>'
            f"<ol>{''.join(items)}</ol></section>"
        )
    facts = f"{len(gallery):,} images, {gallery.metadata.get('network', 'unknown network')}; numbers are cosines"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Nearest images</title><style>{STYLE}</style></head><body><h1>Nearest images</h1>"
        f"<p>{html.escape(facts)}</p>{''.join(sections)}</body></html>\n"
    )


def picture(path: str) -> str:
    """An image as a part of the page; words where it cannot be read any more."""
    try:
        image = decode(path)
    except UNREADABLE:
        return f'<div class="image" title="{html.escape(path)}">image not readable</div>'
    image.thumbnail(THUMBNAIL)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    name = html.escape(Path(path).name)
    return (
        f'<div class="image" title="{html.escape(path)}"><img alt="{name}" src="data:image/jpeg;base64,{data}"></div>'
    )


def command_line() -> Any:
    p = bare_parser("search", "Finds the images of a gallery that are nearest to a query.")
    p.add_argument("--gallery", required=True, metavar="FILE", help="features, as extract writes them")
    p.add_argument("--query", required=True, nargs="+", metavar="IMAGE", help="one image or several")
    p.add_argument("-k", type=int, default=10, help="answers to each (10)")
    p.add_argument("--html", metavar="FILE", help="a page with the pictures")
    p.add_argument("--weights", metavar="FILE", help="where the weights lie now, if not where they were")
    return p


if __name__ == "__main__":
    dist.run_main(lambda world: main(world, sys.argv[1:]))
