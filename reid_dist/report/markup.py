"""Pieces of a page: the frame with its style, tables, pictures. Everything is in the one file; nothing is fetched."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

THUMBNAIL = (64, 128)  # width and height of a person's picture
QUALITY = 80  # of its JPEG

STYLE = """
:root { color-scheme: light dark; --text: #1d2126; --dim: #555d66; --back: #ffffff; --panel: #f4f5f7; --grid: #d5d9de;
  --right: #11772d; --wrong: #b3261e; --link: #0b57d0; --shade: 29, 99, 200;
  --line0: #1d63c8; --line1: #c2410c; --line2: #11772d; --line3: #7c3aed; --line4: #b3261e; --line5: #0e7490; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --dim: #a3abb5; --back: #14171a; --panel: #1f2429;
  --grid: #3b424a; --right: #5fd07d; --wrong: #ff8a80; --link: #8ab4f8; --shade: 100, 160, 255;
  --line0: #7db1ff; --line1: #ffa566; --line2: #5fd07d; --line3: #c4a5ff; --line4: #ff8a80; --line5: #5ad3e6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; }
a { color: var(--link); } .dim { color: var(--dim); } p { margin: .3rem 0; }
nav a { margin-right: .9rem; display: inline-block; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.numbers div { background: var(--panel); border-radius: .4rem; padding: .5rem .8rem; }
.numbers b { display: block; font-size: 1.4rem; }
/* A shadow where a table goes on; covers that scroll along hide it at the table's own edges. */
.scroll { overflow-x: auto; background: linear-gradient(to right, var(--back), transparent) left / 2rem 100% local,
  linear-gradient(to left, var(--back), transparent) right / 2rem 100% local,
  linear-gradient(to right, var(--grid), transparent) left / .7rem 100% scroll,
  linear-gradient(to left, var(--grid), transparent) right / .7rem 100% scroll; background-repeat: no-repeat; }
.scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
th { overflow-wrap: break-word; }
th:first-child, td:first-child, .text th, .text td { text-align: left; }
.text td, .text th { white-space: normal; } tr.mark td, tr.mark th { font-weight: bold; }
@media (max-width: 30rem) { th:first-child { white-space: normal; min-width: 6rem; } }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem;
  margin-top: 1rem; }
figure { margin: 0; min-width: 0; } figure svg { display: block; width: 100%; height: auto; max-width: 34rem;
  stroke-linejoin: round; } figcaption { font-size: .9rem; color: var(--dim); }
.query { display: grid; grid-template-columns: 5rem 1fr; gap: .8rem; padding: .7rem 0;
  border-bottom: 1px solid var(--grid); }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(4.2rem, 1fr)); gap: .5rem; margin: 0;
  padding: 0; list-style: none; }
.person { font-size: .75rem; line-height: 1.25; } .person img, .person .none { display: block; width: 4rem;
  height: 8rem; border: 3px solid var(--dim); }
.person .none { padding: .3rem; overflow: hidden; } .right img { border-color: var(--right); }
.right b { color: var(--right); } .wrong img { border: 3px dashed var(--wrong); } .wrong b { color: var(--wrong); }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: 1rem; }
.pair { display: flex; gap: .4rem; flex-wrap: wrap; } .pair p { flex-basis: 100%; font-size: .9rem; margin: 0; }
pre, code { font-family: ui-monospace, monospace; font-size: .85rem; } pre { white-space: pre-wrap;
  background: var(--panel); padding: .6rem; border-radius: .4rem; } summary { cursor: pointer; padding: .3rem 0; }
"""


def page(title: str, sections: Iterable[tuple[str, str, str]], head: str) -> str:
    """A whole HTML page. sections: (id, heading, HTML); those without content are left out. head: HTML above them."""
    kept = [(name, heading, body) for name, heading, body in sections if body]
    links = " ".join(f'<a href="#{name}">{html.escape(heading)}</a>' for name, heading, _ in kept)
    parts = [
        f'<section id="{name}" aria-labelledby="{name}-heading"><h2 id="{name}-heading">{html.escape(heading)}</h2>'
        f"{body}</section>"
        for name, heading, body in kept
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Without an icon of its own a browser asks the server for one.
        f'<link rel="icon" href="data:,">\n<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n'
        f'<body>\n<header>{head}</header>\n<nav aria-label="Sections">{links}</nav>\n<main>\n'
        + "\n".join(parts)
        + "\n</main>\n"
        "</body>\n</html>\n"
    )


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    caption: str,
    marked: Iterable[int] = (),
    text: bool = False,
    styles: dict[tuple[int, int], str] | None = None,
) -> str:
    """A table whose first column heads its rows; it scrolls by itself where it is wider than the page.

    marked: rows in bold; text: columns of text, to the left; styles: {(row, column): CSS}.
    """
    marked, styles = set(marked), styles or {}
    head = "".join(f'<th scope="col">{html.escape(str(c))}</th>' for c in columns)
    body = []
    for i, row in enumerate(rows):
        cells = [f'<th scope="row">{breakable(str(row[0])) if text else html.escape(str(row[0]))}</th>']
        for j, value in enumerate(row[1:], 1):
            style = f' style="{styles[i, j]}"' if (i, j) in styles else ""
            cells.append(f"<td{style}>{html.escape(str(value))}</td>")
        body.append(f"<tr{' class=mark' if i in marked else ''}>{''.join(cells)}</tr>")
    kind = ' class="text"' if text else ""
    return (
        f'<p class="dim">{html.escape(caption)}</p>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(caption)}"><table{kind}>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
        "</table></div>"
    )


def breakable(key: str) -> str:
    """A config key that a narrow screen may break behind its dots and underscores, and nowhere else."""
    return re.sub(r"([._])", r"\1<wbr>", html.escape(key))


def numbers(pairs: Iterable[tuple[str, str]]) -> str:
    """Key figures in a row: (what, value)."""
    cells = "".join(f"<div><b>{html.escape(value)}</b>{html.escape(what)}</div>" for what, value in pairs)
    return f'<div class="numbers">{cells}</div>'


def person(image: dict[str, Any], words: str, heat: list[list[float]] | None = None) -> str:
    """The picture of one person. image: its 'path'; words: the alternative text; heat: (h, w) in [0, 1], laid over."""
    data = thumbnail(image["path"], tuple(map(tuple, heat)) if heat else None)
    if not data:
        return f'<span class="none" role="img" aria-label="{html.escape(words)}, no picture">the file is gone</span>'
    size = f'width="{THUMBNAIL[0]}" height="{THUMBNAIL[1]}"'
    return f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(words)}" {size} loading="lazy">'


@lru_cache(maxsize=4096)
def thumbnail(path: str, heat: tuple[tuple[float, ...], ...] | None = None) -> str:
    """A small JPEG in base64; '' for a file that is gone or cannot be decoded."""
    from PIL import Image

    from ..data.decode import UNREADABLE, decode

    try:
        small = decode(path).resize(THUMBNAIL)
    except UNREADABLE:
        return ""
    if heat:
        small = Image.blend(small, heat_map(heat), 0.5)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=QUALITY)
    return base64.b64encode(out.getvalue()).decode("ascii")


def heat_map(heat: Sequence[Sequence[float]]) -> Any:
    """(h, w) numbers in [0, 1] as a picture of a thumbnail's size, from dark blue over green to yellow (viridis)."""
    import matplotlib
    import numpy as np
    from PIL import Image

    small = Image.fromarray(np.asarray(heat, np.float32)).resize(THUMBNAIL, Image.Resampling.BILINEAR)
    colours = matplotlib.colormaps["viridis"](np.asarray(small).clip(0, 1), bytes=True)[..., :3]
    return Image.fromarray(colours)


def per_cent(value: Any) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def escape(text: Any) -> str:
    return html.escape(str(text))
