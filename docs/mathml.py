"""A hook of mkdocs: formulas become MathML while the site is built, so that a page needs no script and no font."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """The page's HTML with a <math> element for each of arithmatex's formulas in it."""
    return FORMULA.sub(as_mathml, content)


def as_mathml(match: re.Match[str]) -> str:
    inline = match[1] == "span"
    return convert(html.unescape(match[2]), display="inline" if inline else "block")
