"""The script for a day with a GPU: every stage on the CPU; stages that fail, hang or come too late; the archive."""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_day, train_step


@pytest.mark.timeout(900)
def test_dry_run(tmp_path, tell):
    """Under two minutes on two cores with nothing beside it: CPU seconds count, because a test has no quiet machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "benchmarks/gpu_day.py", "--dry-run", "--out", str(tmp_path / "day"), "--budget", "800"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(Path.cwd())})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    log = (tmp_path / "day/log.txt").read_text()
    assert done.returncode == 0, done.stdout + log[-5000:]
    day = json.loads((tmp_path / "day/day.json").read_text())
    stages = {stage["name"]: stage for stage in day["stages"]}
    assert list(stages) == [stage.name for stage in gpu_day.STAGES]
    not_ok = {name: stage["status"] for name, stage in stages.items() if stage["status"] != "ok"}
    assert set(not_ok) <= {"tests"} and all(status.startswith("skipped") for status in not_ok.values())
    text = {name: "\n".join(stage["lines"]) for name, stage in stages.items()}
    assert all(text[name] for name in stages if name not in not_ok), "a stage says nothing in the table"
    assert "bitwise equal" in text["resume"]
    assert "2 ranks over gloo against 1 rank alone" in text["ranks"]
    assert {row["part"] for row in stages["step"]["details"]["rows"]} == {"bare", "step", "whole"}
    table = (tmp_path / "day/day.txt").read_text()
    assert done.stdout.endswith(table), "the table comes last"
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    tell(f"dry run of the GPU day: {day['seconds']:.0f} s, {cpu:.0f} CPU s")
    assert cpu < 200


def run(stages, folder, monkeypatch, budget=60.0, dry_run=True):
    """(results by stage, exit code) of a day of these stages."""
    monkeypatch.setattr(gpu_day, "prepare", lambda args, scratch: gpu_day.Day(True, scratch, scratch, False, ""))
    monkeypatch.setattr(gpu_day, "DRY_SCALE", 1)
    args = argparse.Namespace(dry_run=dry_run, out=folder, budget=budget)
    (folder / "scratch").mkdir()
    code = 0
    try:
        gpu_day.run_day(stages, args, folder / "scratch")
    except SystemExit as end:
        code = end.code
    return {s["name"]: s for s in json.loads((folder / "day.json").read_text())["stages"]}, code


def python(name, limit_s, code):
    return gpu_day.Stage(name, limit_s, f"what {name} is", lambda day: ["-c", code])


def state_of(pid):
    """'R', 'S', 'Z', ...; '-' for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "-"


def test_a_stage_that_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch, capsys):
    hang = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); "
        "print('result: so far', flush=True); time.sleep(300)"
    )
    stages = [python("hang", 3, hang), python("fail", 30, "print('result: 1'); raise SystemExit('why it failed')")]
    stages += [python("fine", 30, "print('result: 42')"), gpu_day.Stage("left", 9, "what it is", lambda day: "no data")]
    began = time.monotonic()
    found, code = run(stages, tmp_path, monkeypatch)
    assert time.monotonic() - began < 60 and code == 1
    assert found["hang"]["status"] == "killed after 3 s" and "so far" in found["hang"]["lines"]
    assert found["fail"]["status"] == "failed (exit code 1)"
    assert found["fail"]["lines"] == ["1", "| result: 1", "| why it failed"]
    assert found["fine"]["status"] == "ok" and found["fine"]["lines"] == ["42"]
    assert found["left"]["status"] == "skipped: no data"
    for _ in range(100):  # whoever inherits it has to collect it
        if state_of((tmp_path / "pid").read_text()) in "Z-":
            break
        time.sleep(0.05)
    else:
        raise AssertionError("what the stage had started still runs")
    assert capsys.readouterr().out.endswith("between ranks\n")


def test_what_the_budget_does_not_reach_is_listed(tmp_path, monkeypatch):
    sleep = "import time; time.sleep(4); print('result: slept')"
    stages = [python(name, 30, sleep) for name in ("one", "two", "three")]  # two at a time
    found, code = run(stages, tmp_path, monkeypatch, budget=8.0)
    assert [found[name]["status"] for name in ("one", "two")] == ["ok", "ok"] and code == 0
    assert found["three"]["status"] == "not run: the budget of 8 s was spent"


def test_without_a_gpu_the_day_ends_at_once(tmp_path, monkeypatch):
    stages = [python("card", 30, "raise SystemExit(3)"), python("never", 30, "print('result: ran')")]
    found, code = run(stages, tmp_path, monkeypatch, dry_run=False)
    assert code == 1 and found["never"]["status"].startswith("not run: no CUDA device; pass --dry-run")


def test_the_archive_holds_whole_identities_and_is_read(pedestrians, tmp_path, monkeypatch):
    weights = tmp_path / "weights.pth"
    torch.save({"weight": torch.randn(1000)}, weights)
    monkeypatch.setattr(gpu_day, "ARCHIVE", tmp_path / ".gpu/images.tar.xz")
    gpu_day.pack(pedestrians, weights, 0.0)
    whole = gpu_day.ARCHIVE.stat().st_size / 2**20
    args = argparse.Namespace(dry_run=False, root=None, weights=None)
    day = gpu_day.prepare(args, tmp_path / "all")
    assert day.real and Path(day.weights).read_bytes() == weights.read_bytes()
    names = {split: {f.name for f in (pedestrians / split).glob("*.jpg")} for split in gpu_day.SPLITS}
    assert names == {split: {f.name for f in (day.root / split).glob("*.jpg")} for split in gpu_day.SPLITS}

    gpu_day.pack(pedestrians, weights, 0.8 * whole)
    assert gpu_day.ARCHIVE.stat().st_size / 2**20 <= 0.8 * whole
    day = gpu_day.prepare(args, tmp_path / "part")
    kept = {f.name for f in (day.root / "bounding_box_train").glob("*.jpg")}
    identities = {name.split("_")[0] for name in kept}
    assert 0 < len(kept) < len(names["bounding_box_train"])
    assert kept == {name for name in names["bounding_box_train"] if name.split("_")[0] in identities}
    assert names["query"] == {f.name for f in (day.root / "query").glob("*.jpg")}
    with pytest.raises(SystemExit, match="--mib"):
        gpu_day.pack(pedestrians, weights, 0.1 * whole)


def test_floating_point_operations_by_hand():
    """Of the tiny network: three products of a convolution's size for each layer, two for the first, which has no
    gradient to give to images."""
    operations, channels, height, width = 0, (3, 16, 32, 64, 128), 64, 32
    for c_in, c_out, stride in zip(channels, channels[1:], (2, 2, 2, 1), strict=False):
        height, width = height // stride, width // stride
        operations += (2 if c_in == 3 else 3) * 2 * 9 * c_in * c_out * height * width
    operations += 3 * 2 * 128 * train_step.NUM_PIDS
    assert train_step.flop_per_image("tiny", (64, 32)) == operations


def test_waiting_for_the_device_is_counted():
    value = torch.ones(4)

    def part(step):
        return train_step.Part(lambda: None, step, lambda: None, 0.0)

    cpu = torch.device("cpu")
    assert train_step.count_syncs(part(lambda: value.sum().item()), cpu) == {train_step.READS: 1.0}
    assert train_step.count_syncs(part(lambda: value.sum()), cpu) == {}


def test_what_the_config_does_not_know_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(train_step.MODES, "graph", {"TRAIN.NO_SUCH_KEY": "on"})
    words = "--device cpu --model tiny --size 32 16 --batch 8 --modes graph --precision fp32,fp8 --parts bare,step"
    monkeypatch.setattr(sys, "argv", ["train_step.py", *words.split(), "--out", str(tmp_path / "rows.json")])
    train_step.main()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["note"] for row in rows] == [
        "TRAIN.NO_SUCH_KEY on: not in this version",
        "TRAIN.PRECISION fp8, TRAIN.NO_SUCH_KEY on: not in this version",
    ]


def test_a_failing_part_leaves_the_other_rows(monkeypatch, tmp_path):
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    build = train_step.build_trainer
    monkeypatch.setattr(
        train_step, "build_trainer", lambda o, d: no_memory() if o["DATA.TRAIN_BATCH"] == 16 else build(o, d)
    )
    words = "--device cpu --model tiny --size 32 16 --batch 16,8 --modes eager --precision fp32 --parts bare,step"
    fast = ["--repeats", "1", "--seconds", "0.01", "--out", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["train_step.py", *words.split(), *fast])
    with pytest.raises(SystemExit):
        train_step.main()
    failed, bare, step = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert failed["batch"] == 16 and "out of memory" in failed["note"]
    assert bare["ratio"] == [1.0, 1.0, 1.0] and step["part"] == "step" and step["images_per_s"][0] > 0
