"""Rules of the house that a reader can rely on."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

SOURCES = sorted(Path("reid_dist").rglob("*.py"))


def test_only_dist_imports_torch_distributed():
    pattern = re.compile(r"(import torch\.distributed|from torch import distributed|from torch\.distributed)")
    users = [str(f) for f in SOURCES if pattern.search(f.read_text())]
    assert users == ["reid_dist/dist.py"]


def test_importing_the_package_is_fast_and_imports_no_torch():
    code = (
        "import sys, time; start = time.perf_counter(); import reid_dist; "
        "print(time.perf_counter() - start, 'torch' in sys.modules)"
    )
    seconds, has_torch = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60).split()
    assert float(seconds) < 0.5 and has_torch == "False"


def test_the_trainer_imports_nothing_that_only_gpus_have():
    """No DALI, wandb, timm or CUDA initialisation before a config asks for it."""
    code = (
        "import reid_dist.train, sys, torch; "
        "print([m for m in ('nvidia.dali', 'wandb', 'timm', 'pynvml', 'torchvision') if m in sys.modules], "
        "torch.cuda.is_initialized())"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=90, env={"PATH": ""})
    assert out.strip() == "[] False"


def test_collectives_are_marked():
    """Every function in dist.py that talks to other ranks says so where it is defined."""
    text = Path("reid_dist/dist.py").read_text()
    for name in re.findall(r"^def (\w+)\(", text, re.M):
        body = text[text.index(f"def {name}(") :]
        body = body[: body.find("\n\n\n")]
        if re.search(r"td\.(all_|broadcast|barrier|reduce|new_group)|_into\(|\.apply\(x\)$", body):
            assert re.search(r"# all ranks", body.splitlines()[0] + body[: body.find('"""')]), name


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_constraints_pin_each_package_once_and_can_be_installed_on_every_python(python):
    """A package that needs a newer Python makes pip give up on all of them, so its pin has a marker."""
    version = f"{python}.9"
    lines = [line for line in Path("constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    here = {"python_version": python, "python_full_version": version}
    pinned = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(here)]
    assert sorted(pin.name for pin in pinned) == sorted({pin.name for pin in pins})
    installed = {
        distribution.name.lower().replace("_", "-"): distribution for distribution in importlib.metadata.distributions()
    }
    known = [
        installed[pin.name] for pin in pinned if pin.name in installed and installed[pin.name].version in pin.specifier
    ]
    assert known
    needs = {d.name: d.metadata["Requires-Python"] or "" for d in known}
    assert {name: need for name, need in needs.items() if version not in SpecifierSet(need)} == {}
