"""What the documentation says holds: its commands run or pass their tool's parser, its keys, flags and files exist.

tests/documents.py says what is done with which command. Each page's commands run in order, in a folder of their own
that holds what the pages name: DATA (a drawn data set), people (the same as folders), the demo's run, weights. `python`
fences run as well, `py` fences are compiled; `text` is output.
"""

import importlib
import inspect
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from reid_dist.config import defaults, flatten, merge
from reid_dist.models import MODELS, build_model
from tests.documents import PAGES, check_command, commands, fences, in_child, read
from tests.runs import SMALL, TINY, run

KEYS = flatten(defaults())
SECTIONS = {key.split(".")[0] for key in KEYS if "." in key}


@pytest.fixture(scope="module")
def workshop(pedestrians, tmp_path_factory):
    """A folder with everything that the pages name."""
    importlib.import_module("reid_dist.report.page")  # matplotlib with it: here once, not in every child
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "configs").symlink_to(Path("configs").resolve())
    shutil.copytree(pedestrians, folder / "DATA")
    shutil.copytree(pedestrians, folder / "build/demo/data")
    splits = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}
    for there, here in splits.items():
        for image in sorted((folder / "DATA" / there).glob("*.jpg")):
            pid, camera, *rest = image.stem.split("_")
            file = folder / "people" / here / pid / f"{camera[:2]}_{'_'.join(rest)}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, file)
    [table] = [fence.text for fence in fences("docs/data.md") if fence.title == "make_manifest.py"]
    assert in_child(folder, lambda: exec(table, {}))[0] == 0
    run(1, folder / "DATA", folder, f"{SMALL} {TINY} TRAIN.PRECISION fp32 TRAIN.MAX_STEPS 2")
    shutil.copytree(folder / "market1501/t", folder / "build/demo/runs/market1501/demo")
    shutil.move(folder / "market1501/t", folder / "RUN")
    for name in ("RUN_A", "RUN_B", "RUN_C", "runs/market1501/mine"):
        shutil.copytree(folder / "RUN", folder / name)
    (folder / "docs").mkdir()
    shutil.copy("docs/results.md", folder / "docs")
    shutil.copy(folder / "RUN/checkpoints/best.pt", folder / "best.pt")
    (folder / "DIR").symlink_to("people/gallery")
    images = sorted(file.relative_to(folder) for file in (folder / "people").rglob("*.jpg"))
    (folder / "list.csv").write_text("".join(f"{line}\n" for line in ["path", *images]))
    shutil.copy(next((folder / "DATA/query").glob("*.jpg")), folder / "person.jpg")
    torch.save(simple_reid_checkpoint(), folder / "checkpoint_ep60.pth.tar")
    return folder


def copy_workshop(workshop, folder):
    """A page's own copy; large files are shared."""

    def link_or_copy(source, target):
        return os.link(source, target) if Path(source).stat().st_size > 1 << 20 else shutil.copy2(source, target)

    shutil.copytree(workshop, folder, symlinks=True, copy_function=link_or_copy)


def simple_reid_checkpoint():
    """What Simple-ReID saves: its names, a numpy number, the epoch."""
    state = build_model("resnet50", 2048, range(0), cosine=False).state_dict()
    parts = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    names = {f"backbone.{part}.": f"base.{place}." for part, place in parts.items()} | {"bn.": "bn."}
    renamed = {
        there + key.removeprefix(here): value
        for key, value in state.items()
        for here, there in names.items()
        if key.startswith(here)
    }
    return {"state_dict": renamed, "rank1": np.float64(0.95), "epoch": 59}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("page", PAGES)
def test_commands(page, workshop, tmp_path):
    """In order, each page from the workshop as it was."""
    found = list(commands(page))
    if not found:
        return
    folder = tmp_path / "here"
    copy_workshop(workshop, folder)
    for command, in_fence in found:
        if page != "docs/adding.md" or not in_fence:  # that one has a test of its own below
            check_command(command, in_fence, folder)


@pytest.mark.parametrize("page", PAGES)
def test_snippets(page, workshop, tmp_path):
    snippets = fences(page)
    assert all(fence.language for fence in snippets), f"{page}: a fence without a language; output is `text`"
    for fence in snippets:
        if fence.language in ("python", "py"):
            compile(fence.text, page, "exec")
        if fence.language == "yaml":
            tree = yaml.safe_load(fence.text)
            keys = flatten({k: v for k, v in tree.items() if k in SECTIONS})
            assert not merge(defaults(), keys.items(), f" in {page}")
    runs = [fence.text for fence in snippets if fence.language == "python" and not fence.title]
    if runs:
        folder = tmp_path / "here"
        copy_workshop(workshop, folder)
        code, output = in_child(folder, lambda: exec("\n".join(runs), {"__name__": "__main__"}))
        assert code == 0, f"{page}: {output}"


def test_keys_exist():
    pattern = re.compile(rf"\b(?:{'|'.join(SECTIONS)})\.[A-Z][A-Z0-9_]*(?:\.[A-Z][A-Z0-9_]*)*")
    known = set(KEYS) | {key.rpartition(".")[0] for key in KEYS}
    unknown = {(page, key) for page in PAGES for key in pattern.findall(read(page)) if key not in known}
    assert not unknown


def test_flags_exist():
    """Of this package's commands, of torchrun, or of another tool that stands in the same line."""
    from torch.distributed.run import get_args_parser

    sources = [*Path("reid_dist").rglob("*.py"), *Path("benchmarks").glob("*.py"), *Path("docs").glob("*.py")]
    known = {flag for file in sources for flag in re.findall(r'"(--[a-z][\w-]*)"', read(file))}
    known |= {option for action in get_args_parser()._actions for option in action.option_strings}
    # docker, sbatch, tensorboard, wandb
    known |= {"--help", "--build-arg", "--device", "--user", "--signal", "--logdir", "--append"}
    others = ("sbatch", "SBATCH", "srun", "docker", "podman", "apptainer", "enroot", "pip", "git", "mkdocs", "kubectl")
    unknown = {
        (page, flag)
        for page in PAGES
        for line in re.sub(r"\\\n", "", read(page)).splitlines()
        if not any(tool in line for tool in others)
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", line)
        if flag not in known
    }
    assert not unknown


def test_files_exist():
    folders = "reid_dist|tests|benchmarks|configs|launch|docs|docker"
    pattern = re.compile(rf"(?<![\w/.-])(?:{folders})/[\w/-]+\.(?:py|md|yaml|sh|sbatch)\b")
    shown = {fence.title for page in PAGES for fence in fences(page)}  # files that a page shows how to write
    missing = {(p, f) for p in PAGES for f in pattern.findall(read(p)) if f not in shown and not Path(f).exists()}
    assert not missing


def test_the_tree_in_the_readme_is_the_package():
    tree = read("README.md").partition("```text\nreid_dist/\n")[2].partition("```")[0]
    named = set(re.findall(r"^  ([\w/]+(?:\.py)?)  ", tree, re.M))
    package = Path("reid_dist")
    there = {f.name for f in package.glob("*.py") if f.name != "__init__.py"}
    there |= {f"{f.parent.name}/" for f in package.glob("*/__init__.py")}
    assert named == there


def test_the_configuration_reference_is_current(monkeypatch):
    monkeypatch.delitem(MODELS, "plain")  # of tests/runs.py
    page = runpy.run_path("docs/make_config.py")["page"]()
    assert page == read("docs/config.md"), "python docs/make_config.py writes it anew"


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {file: file.read_text(encoding="utf-8") for file in tmp_path.glob("*.html")}
    loads = re.compile(r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//|<link[^>]+href=\"?(?:https?:)?//|@import")
    assert not [str(file) for file, text in pages.items() if loads.search(text)]
    formulas = next(text for file, text in pages.items() if file.name == "losses.html")
    assert formulas.count("<math") > 30 and "arithmatex" not in formulas


@pytest.mark.timeout(200)
def test_what_is_added_as_the_page_shows_works(pedestrians, tmp_path):
    """The files of docs/adding.md in a copy of the package: their tests pass and a run uses all three."""
    for folder in ("reid_dist", "tests", "configs"):
        shutil.copytree(folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shown = fences("docs/adding.md")
    for fence in shown:
        if fence.language == "python":
            assert not Path(fence.title).exists()
            (tmp_path / fence.title).write_text(fence.text)
        elif fence.language == "diff":
            apply(tmp_path / fence.title, fence.text)
    for split, name in (("train", "bounding_box_train"), ("query", "query"), ("gallery", "bounding_box_test")):
        (tmp_path / "DATA/shop" / split).mkdir(parents=True)
        for image in (pedestrians / name).glob("*.jpg"):
            pid, camera, *_ = image.stem.split("_")
            file = tmp_path / f"DATA/shop/{split}/{pid}-cam{camera[1]}-{image.stem[-6:]}.jpg"
            shutil.copy(image, file)
    modules = [fence.title.removesuffix(".py").replace("/", ".") for fence in shown if fence.title.startswith("tests/")]
    [(command, _)] = [found for found in commands("docs/adding.md") if found[0].startswith("python -m reid_dist.train")]
    fast = "TRAIN.MAX_STEPS 1 DATA.TRAIN_BATCH 16 MODEL.BN_GROUP 16 DATA.NUM_WORKERS 0 DATA.PIPELINE torch"

    def work():
        for name in [name for name in sys.modules if name.split(".")[0] in ("reid_dist", "tests")]:
            del sys.modules[name]  # torch stays
        sys.path.insert(0, str(tmp_path))
        for name in modules:
            module = importlib.import_module(name)
            for test in [getattr(module, function) for function in dir(module) if function.startswith("test_")]:
                test(**dict.fromkeys(inspect.signature(test).parameters, tmp_path / name))
        sys.argv = [*command.split()[2:], *fast.split()]
        runpy.run_module("reid_dist.train", run_name="__main__", alter_sys=True)

    code, output = in_child(tmp_path, work)
    assert code == 0 and "shop, epoch 1" in output, output


def apply(file: Path, difference: str) -> None:
    """Puts each line with a + behind the line that stands before it."""
    lines, after = file.read_text().splitlines(), ""
    for line in difference.splitlines():
        if line.startswith("+"):
            lines.insert(lines.index(after) + 1, line[1:])
        after = line[1:]
    file.write_text("\n".join(lines) + "\n")
