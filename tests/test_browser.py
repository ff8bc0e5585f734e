"""The pages in a real browser, headless: nothing goes wrong in its console, nothing is wider than a phone, also in the
dark. Run where Chromium is installed (Debian: apt-get install chromium)."""

import html
import json
import re
import shutil
import subprocess

import pytest

from reid_dist.report.__main__ import main
from tests.runs import SMALL, TINY, run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]

# In a frame as wide as a phone: a headless window itself is at least 500 pixels wide.
FRAME = """<!DOCTYPE html><html><body><iframe src="{page}" style="width:{width}px;height:800px;border:0"></iframe>
<script>
onload = () => {{
  const inside = document.querySelector("iframe").contentWindow, root = inside.document.documentElement;
  const style = (element, name) => inside.getComputedStyle(element)[name];
  const wide = [...inside.document.querySelectorAll("body *")].filter(
    e => e.getBoundingClientRect().right > inside.innerWidth + 1 && !e.closest(".scroll"));
  document.body.dataset.seen = JSON.stringify({{
    inner: inside.innerWidth, scroll: root.scrollWidth, wide: wide.slice(0, 5).map(e => e.outerHTML.slice(0, 80)),
    text: style(inside.document.body, "color"), back: style(inside.document.body, "backgroundColor"),
    images: [...inside.document.images].filter(i => !(i.complete && i.naturalWidth)).length,
    headings: [...inside.document.querySelectorAll("h2")].map(e => e.textContent),
    axis: style(inside.document.querySelector("svg text"), "fill"),
    line: [...inside.document.querySelectorAll("svg path")].map(e => style(e, "stroke"))
      .filter(c => c !== "none" && c !== "rgb(0, 0, 0)").length,
  }});
}};
</script></body></html>"""


@pytest.fixture(scope="module")
def pages(pedestrians, tmp_path_factory):
    """{'page', 'comparison'}: files, of two short runs with averaged weights."""
    base = tmp_path_factory.mktemp("browser")
    folders = []
    for name, text in (("a", "TRAIN.EMA 0.5 REPORT.ACTIVATION_MAPS true"), ("b", "SEED 1")):
        options = f"{SMALL} {TINY} {text} WANDB.PICTURES true TEST.EVAL_STEP 1 TRAIN.MAX_EPOCH 2"
        run(1, pedestrians, base / name, options)
        folders.append(base / name / "market1501/t")
    comparison = base / "comparison.html"
    assert main([*map(str, folders), "--out", str(comparison)]) == 0
    return {"page": folders[0] / "report/index.html", "comparison": comparison}


def look(file, width, dark=False):
    """(what the script in FRAME saw, lines of the browser's console)."""
    frame = file.with_name(f"frame-{width}.html")
    frame.write_text(FRAME.format(page=file.name, width=width))
    flags = "--headless --no-sandbox --disable-gpu --allow-file-access-from-files --enable-logging=stderr --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    profile = file.with_name("profile")
    done = subprocess.run(
        [*command, f"--user-data-dir={profile}", frame.as_uri()], capture_output=True, text=True, timeout=100
    )
    seen = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert seen, done.stderr[-2000:]
    return json.loads(html.unescape(seen[1])), re.findall(r"CONSOLE.*", done.stderr)


def brightness(colour):
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return 0.299 * red + 0.587 * green + 0.114 * blue


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1200, True)])
@pytest.mark.parametrize("name", ["page", "comparison"])
def test_a_page_in_the_browser(pages, name, width, dark):
    seen, console = look(pages[name], width, dark)
    assert console == []
    assert seen["inner"] == width and seen["scroll"] <= width and seen["wide"] == []
    assert seen["images"] == 0 and seen["line"] > 5
    assert (brightness(seen["back"]) < 60) == dark and (brightness(seen["text"]) > 200) == dark
    assert seen["axis"] == seen["text"]  # plots follow the page
    wanted = {"page": ["Results", "Training", "Evaluation", "Ranked lists"], "comparison": ["Where they differ"]}[name]
    assert seen["headings"][: len(wanted)] == wanted
