"""What SECURITY.md promises of the code: nothing from outside is run, nothing is written outside the run's folder."""

import ast
from pathlib import Path

import pytest

from reid_dist.config import check_config, load_config, parser

PACKAGE = Path(__file__).parents[1] / "reid_dist"


def calls_in(source):
    """(dotted name, {keyword: value as source}) of every call."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def faults_of(source):
    """The calls that could run what a file or a config says; a program with a list of arguments has no shell."""
    found = []
    for name, keywords in calls_in(source):
        last = name.split(".")[-1]
        if name == "torch.load" or last == "load_state_dict_from_url":
            bad = keywords.get("weights_only") != "True"
        elif name in ("np.load", "numpy.load"):
            bad = keywords.get("allow_pickle", "False") != "False"
        elif name.startswith("yaml."):
            bad = last not in ("safe_load", "safe_dump", "dump")
        else:
            bad = "shell" in keywords or name in (
                *("eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
                *("pickle.load", "pickle.loads"),
            )
        if bad:
            found.append(f"{name}({keywords})")
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_nothing_from_outside_is_run(file):
    allowed = ["pickle.loads({'buffers': 'parts[1:]'})"] if file.name == "share.py" else []
    assert faults_of(file.read_text()) == allowed


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f)",
        "os.system(cfg.TAG)",
        "subprocess.run(cfg.TAG, shell=True)",
        "eval(text)",
        "pickle.loads(data)",
    ],
)
def test_the_check_finds(source):
    assert len(faults_of(source)) == 1


@pytest.mark.parametrize("tag", ["../other", "/etc", "..", "a/b", "a\\b", ""])
def test_a_tag_cannot_lead_out_of_the_output_folder(tag):
    cfg = load_config(parser("train").parse_intermixed_args([]))
    cfg.TAG = tag
    with pytest.raises(ValueError, match="expected a name that can be a folder"):
        check_config(cfg, 1, cuda=False)
