"""What the launchers in launch/ rely on."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from reid_dist.config import defaults
from reid_dist.resume import check_restarts
from tests.ranks import run_ranks
from tests.runs import start


def test_check_prints_the_folder_and_starts_nothing(tmp_path, capfd):
    """The data set does not exist here: a login node may not see it."""
    words = ["--cfg", "configs/res50_ce_triplet.yaml", "--output", str(tmp_path / "runs"), "--root", "/nowhere"]
    run_ranks(1, start, ["--check", "16", *words, "MODEL.BN_GROUP", "4"])
    assert capfd.readouterr().out == f"{tmp_path}/runs/market1501/res50-ce-triplet\n"
    assert not (tmp_path / "runs").exists()
    with pytest.raises(AssertionError, match="UserError"):
        run_ranks(1, start, ["--check", "24", *words])
    captured = capfd.readouterr()
    assert captured.out == "" and "1, 2, 4, 8, 16, 32, 64 ranks" in captured.err


def test_check_takes_a_number_of_ranks(capfd):
    with pytest.raises(AssertionError, match="UserError"):
        run_ranks(1, start, ["--check", "0"])
    assert "argument --check: '0': expected a number from 1 on" in capfd.readouterr().err


@pytest.mark.parametrize("resume", ["", "step_000000010.pt"])
def test_restarts_need_resume_auto(resume):
    """A second round without it would find a run in its folder; with a file it would go back to that file."""
    cfg = defaults()
    cfg.MODEL.RESUME = resume
    check_restarts(cfg, {"TORCHELASTIC_MAX_RESTARTS": "0"})
    check_restarts(cfg, {})
    with pytest.raises(ValueError, match=r"--max-restarts=3 .* expected --resume auto"):
        check_restarts(cfg, {"TORCHELASTIC_MAX_RESTARTS": "3"})
    cfg.MODEL.RESUME = "auto"
    check_restarts(cfg, {"TORCHELASTIC_MAX_RESTARTS": "3"})


def test_each_row_of_the_array_is_another_published_result(tmp_path):
    """Runs without SLURM: the script that each row hands over to is replaced by one that prints its arguments."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/slurm.sbatch").write_text('printf "%s " "$@"\n')
    rows = []
    for row in range(20):
        env = {**os.environ, "SLURM_ARRAY_TASK_ID": str(row), "SLURM_SUBMIT_DIR": str(tmp_path)}
        command = ["bash", "launch/slurm_array.sbatch", "--root", "DATA"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        rows.append(done.stdout.split())
    assert all(row[::2] == ["--cfg", "--dataset", "--root"] for row in rows)
    published = {str(f) for f in Path("configs").glob("*.yaml") if "Published" in f.read_text()}
    assert len(published) == 10
    assert {(row[1], row[3]) for row in rows} == {(c, d) for c in published for d in ("market1501", "msmt17")}


def read_jobset():
    return yaml.safe_load(Path("launch/kubernetes.yaml").read_text())


def as_kubernetes_reads_it(jobset):
    """Through the models that are generated from the schemas of JobSet and Kubernetes; unknown fields fall out."""
    return JobsetV1alpha2JobSet.from_dict(jobset).to_dict()


def test_the_jobset_fits_its_schema():
    jobset = read_jobset()
    assert as_kubernetes_reads_it(jobset) == jobset
    misspelt, untyped = read_jobset(), read_jobset()
    misspelt["spec"]["replicatedJobs"][0]["template"]["spec"]["completion"] = 2
    assert as_kubernetes_reads_it(misspelt) != misspelt
    untyped["spec"]["replicatedJobs"][0]["replicas"] = "one"
    with pytest.raises(ValueError, match="replicas"):
        as_kubernetes_reads_it(untyped)


def test_the_jobset_says_the_same_to_kubernetes_and_to_torchrun(capfd):
    jobset = read_jobset()
    [node] = jobset["spec"]["replicatedJobs"]
    job = node["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    args = container["args"]
    flags = dict(word.removeprefix("--").split("=", 1) for word in args if "=" in word)
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(flags["nnodes"]) == job["completions"] == job["parallelism"]
    assert int(flags["nproc-per-node"]) == gpus
    name = jobset["metadata"]["name"]
    assert flags["rdzv-endpoint"].split(":")[0] == f"{name}-{node['name']}-0-0.{name}"
    run_ranks(1, start, ["--check", str(job["completions"] * gpus), *args[args.index("reid_dist.train") + 1 :]])
    assert capfd.readouterr().out == "/runs/market1501/res50-ce-triplet\n"
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < job["template"]["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("file", [*map(str, Path("launch").glob("*")), "docker/Dockerfile"])
def test_every_way_to_start_has_torchruns_restarts_mended(file):
    text = Path(file).read_text()
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in text or "launch/slurm.sbatch" in text
