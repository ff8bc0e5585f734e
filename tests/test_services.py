"""Logging services: what wandb and TensorBoard are told, and that no broken one can stop a run or slow it."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import types

import pytest

from reid_dist.report import PageBuilder, Reporter, services
from reid_dist.report.services import Service, finish_all
from tests.runs import SMALL, TINY, run

SECRET = "0123456789abcdef0123456789abcdef01234567"


class Sink:
    """Notes what it is told. broken: 'log raises', 'log sleeps', 'finish hangs', or nothing."""

    def __init__(self, broken=""):
        self.broken, self.told = broken, []

    def log(self, values, step):
        if self.broken == "log raises":
            raise RuntimeError(f"no more quota for {SECRET}\nand more")
        if self.broken == "log sleeps":
            time.sleep(30)
        self.told.append((step, values))

    def finish(self):
        if self.broken == "finish hangs":
            threading.Event().wait()


def open_sink(broken):
    if broken == "open raises":
        raise OSError("no route to host")
    if broken == "open hangs":
        threading.Event().wait()
    return Sink(broken)


BROKEN = {
    "open raises": "OSError: no route to host",
    "open hangs": "not done in time at the run's end; 500 calls left out",
    "log raises": "RuntimeError: no more quota for *** and more",
    "log sleeps": "not done in time at the run's end; 499 calls left out",
    "finish hangs": "not done in time at the run's end; 0 calls left out",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_service_neither_stops_nor_slows_a_run(tmp_path, capsys, monkeypatch, broken):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr(services, "FINISH_S", 0.3)
    monkeypatch.setattr(services, "leave_hard", lambda: None)  # else pytest would end without its report
    reporter = Reporter(tmp_path, True, services=[Service("wandb", lambda: open_sink(broken))])
    begin = time.monotonic()
    for step in range(500):
        reporter.log({"event": "train", "step": step, "loss": 1.0})
    assert time.monotonic() - begin < 2
    reporter.close()
    assert time.monotonic() - begin < 4
    said = capsys.readouterr().out.splitlines()
    assert said == [f"wandb is off from here on: {BROKEN[broken]}"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 500


def test_a_run_in_a_hurry_waits_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(services, "FINISH_S", 1.2)
    monkeypatch.setattr(services, "leave_hard", lambda: None)
    page = PageBuilder(tmp_path)
    page.command = lambda: [sys.executable, "-c", "import time; time.sleep(5)"]
    reporter = Reporter(tmp_path, True, services=[Service("wandb", lambda: open_sink("open hangs"))], page=page)
    reporter.show([], {"step": 1, "epoch": 1})
    begin = time.monotonic()
    reporter.close(in_a_hurry=True)
    assert time.monotonic() - begin < 1
    page.process.kill()
    page.process.wait()


def test_a_service_is_told_everything_in_order(tmp_path):
    sink = Sink()
    reporter = Reporter(tmp_path, True, services=[Service("wandb", lambda: sink)])
    reporter.log({"event": "train", "step": 1, "loss": None, "acc": 0.5})
    reporter.log({"event": "eval", "step": 1, "dataset": "d", "mAP": 0.25})
    reporter.log({"event": "eval", "step": 1, "dataset": "d", "weights": "ema", "mAP": 0.5})
    reporter.close()
    assert sink.told == [
        (1, {"train/step": 1, "train/acc": 0.5}),
        (1, {"eval/d/step": 1, "eval/d/mAP": 0.25}),
        (1, {"eval/d/ema/step": 1, "eval/d/ema/mAP": 0.5}),
    ]


def test_what_a_slow_service_has_not_taken_is_dropped_not_kept(monkeypatch):
    monkeypatch.setattr(services, "MOST_WAITING", 5)
    gate, sink = threading.Event(), Sink()
    service = Service("wandb", lambda: gate.wait() and sink)
    for step in range(20):
        service.send(lambda s, step=step: s.log({}, step))
    [line] = service.complaints()
    assert "wandb is too slow" in line and service.complaints() == []
    gate.set()
    finish_all([service])
    assert [step for step, _ in sink.told] == [0, 1, 2, 3, 4]


def test_a_process_ends_although_its_service_hangs_in_the_interpreters_clean_up():
    code = (
        "import atexit, sys, threading; from reid_dist.report import services; services.FINISH_S = 0.2\n"
        "hang = threading.Event().wait\n"
        "def open_sink(): atexit.register(hang); hang()\n"
        "service = services.Service('wandb', open_sink)\n"
        "services.finish_all([service]); print(service.complaints()[0]); sys.exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "0 calls left out" in done.stdout, done.stderr


def broken_wandb(monkeypatch, init):
    module = types.ModuleType("wandb")
    module.init, module.Settings = init, lambda **_: None
    monkeypatch.setitem(sys.modules, "wandb", module)


@pytest.mark.ranks
def test_a_whole_run_with_a_wandb_that_hangs(pedestrians, tmp_path, monkeypatch):
    broken_wandb(monkeypatch, lambda **_: threading.Event().wait())
    monkeypatch.setattr(services, "FINISH_S", 0.2)
    events, [result] = run(2, pedestrians, tmp_path, f"{SMALL} {TINY} WANDB.MODE online TRAIN.MAX_STEPS 3")
    assert [e["step"] for e in events] == [1, 2, 3] and result["mAP"] > 0


@pytest.mark.ranks
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("wandb", "tensorboard"))), reason="wandb or tensorboard is not installed"
)
def test_wandb_and_tensorboard_of_a_run_that_goes_on(pedestrians, tmp_path, monkeypatch, capfd):
    """Two processes, one run: everything is read back from the files."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    text = f"{SMALL} {TINY} WANDB.MODE offline WANDB.PICTURES true WANDB.ARTIFACT true TENSORBOARD true TRAIN.MAX_STEPS"
    for steps in (2, 3):
        run(1, pedestrians, tmp_path, f"{text} {steps}", ["--resume", "auto"])
    out, err = capfd.readouterr()
    assert SECRET not in out + err and "is off" not in out

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tests.wandb_file import read

    folder = tmp_path / "market1501/t"
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({f.name for f in files}) == 1  # one run id
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = {}
    for file in files:
        config, history, kinds = read(file)
        assert config["DATA.HEIGHT"] == 32 and {"stats", "artifact", "summary"} <= kinds
        for row in history:
            kept.setdefault(row["_step"], {}).update(row)
    for event in logged:
        kind = "train" if event["event"] == "train" else f"eval/{event['dataset']}"
        for name in ("loss_pair", "acc") if kind == "train" else ("mAP", "mINP"):
            assert kept[event["step"]][f"{kind}/{name}"] == event[name]
    assert kept[3]["ranked_lists/market1501.nrows"] == 18 and kept[3]["ranked_lists/market1501.ncols"] == 15
    assert b"market1501-t" in files[1].read_bytes()  # the model artifact's name
    assert not [f for f in folder.rglob("*") if f.is_file() and SECRET.encode() in f.read_bytes()]

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    losses = {e.step: e.value for e in board.Scalars("train/loss")}
    wanted = {e["step"]: e["loss"] for e in logged if e["event"] == "train"}
    assert losses == pytest.approx(wanted, rel=1e-6)
