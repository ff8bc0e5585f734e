import errno
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from reid_dist import checkpoint
from reid_dist.optim import Schedule, build_optimizer, lr_at, set_lr


def test_a_checkpoint_comes_back_whole(tmp_path):
    state = {"step": 7, "model": {"w": torch.arange(3)}, "best": {"mAP": 0.5}}
    file = checkpoint.write(tmp_path, state, keep=2)
    loaded = checkpoint.load(file)
    assert loaded["step"] == 7 and torch.equal(loaded["model"]["w"], torch.arange(3)) and loaded["best"] == {"mAP": 0.5}
    assert [f.name for f in tmp_path.iterdir()] == ["step_000000007.pt"]


def test_the_newest_few_and_the_best_are_kept(tmp_path):
    for step, best in ((10, False), (20, True), (100, False)):
        checkpoint.write(tmp_path, {"step": step}, keep=2, best=best)
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names == ["best.pt", "step_000000020.pt", "step_000000100.pt"]
    assert checkpoint.find(tmp_path, "auto")[0]["step"] == 100
    assert checkpoint.find(tmp_path, str(tmp_path / "best.pt"))[0]["step"] == 20
    checkpoint.write(tmp_path, {"step": 110}, keep=1)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["best.pt", "step_000000110.pt"]


def test_a_broken_newest_file_is_passed_over_and_named(tmp_path):
    for step in (10, 20):
        checkpoint.write(tmp_path, {"step": step, "w": torch.zeros(1000)}, keep=2)
    newest = tmp_path / "step_000000020.pt"
    newest.write_bytes(newest.read_bytes()[:500])
    state, notes = checkpoint.find(tmp_path, "auto")
    assert state["step"] == 10 and len(notes) == 1 and str(newest) in notes[0] and "not a whole" in notes[0]
    (tmp_path / "step_000000010.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        checkpoint.find(tmp_path, "auto")


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path):
    file = checkpoint.write(tmp_path, {"step": 10, "w": torch.full((1000,), 0.25)}, keep=2)
    data = bytearray(file.read_bytes())
    place = bytes(data).index(np.full(100, 0.25, np.float32).tobytes())
    data[place + 203] ^= 1
    file.write_bytes(data)
    assert torch.load(file, weights_only=True)["w"].sum() != 250  # torch itself does not see it
    with pytest.raises(ValueError, match="checksum"):
        checkpoint.load(file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_the_checksum_sees_every_part(dtype):
    state = {"a": [1, {"w": torch.ones(2, 3, dtype=dtype)}], "b": "x", "c": torch.tensor(0.5)}
    same = {"a": (1, {"w": torch.ones(3, 2, dtype=dtype).t()}), "b": "x", "c": torch.tensor(0.5)}
    assert checkpoint.digest(state) == checkpoint.digest(same)
    others = [
        state | {"b": "y"},
        state | {"c": torch.tensor(0.25)},
        state | {"a": [1, {"w": torch.ones(3, 2, dtype=dtype)}]},
        state | {"a": [1, {"v": torch.ones(2, 3, dtype=dtype)}]},
        {"a": state["a"], "b": "x"},
    ]
    assert checkpoint.digest(state) not in [checkpoint.digest(other) for other in others]


def test_the_writer_copies_before_it_returns(tmp_path):
    w = torch.zeros(1000)
    writer = checkpoint.Writer(tmp_path, keep=2)
    writer.start({"step": 1, "w": w}, best=True)
    w.fill_(7.0)
    writer.wait()
    writer.check()
    assert checkpoint.load(tmp_path / "step_000000001.pt")["w"].sum() == 0
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 1


def test_the_writer_has_one_write_in_flight(tmp_path, monkeypatch):
    running, most, lock = 0, 0, threading.Lock()
    write = checkpoint.write

    def slow(*args):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.1)
        write(*args)
        with lock:
            running -= 1

    monkeypatch.setattr(checkpoint, "write", slow)
    writer = checkpoint.Writer(tmp_path, keep=2)
    began = time.perf_counter()
    writer.start({"step": 1}, best=False)
    assert time.perf_counter() - began < 0.1
    for step in (2, 3):
        writer.start({"step": step}, best=False)
    writer.wait()
    assert most == 1 and [checkpoint.step_of(f) for f in checkpoint.list_steps(tmp_path)] == [2, 3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_a_clear_error_and_spares_the_last_file(tmp_path):
    writer = checkpoint.Writer(tmp_path, keep=2)
    writer.start({"step": 1, "w": torch.zeros(100)}, best=False)
    writer.wait()
    (tmp_path / ".step_000000002.pt.part").symlink_to("/dev/full")
    writer.start({"step": 2, "w": torch.zeros(100_000)}, best=False)
    writer.wait()
    with pytest.raises(ValueError, match=r"No space left.*newest good one is .*step_000000001.pt"):
        writer.check()
    assert checkpoint.find(tmp_path, "auto")[0]["step"] == 1


def test_a_vanished_folder_is_a_clear_error(tmp_path):
    writer = checkpoint.Writer(tmp_path / "gone", keep=2)
    writer.start({"step": 1}, best=False)
    writer.wait()
    with pytest.raises(ValueError, match=r"No such file.*there is no earlier one"):
        writer.check()


def test_nothing_to_resume(tmp_path):
    assert checkpoint.find(tmp_path / "none", "auto") == (None, [])
    assert checkpoint.find(tmp_path, "") == (None, [])
    with pytest.raises(ValueError, match="expected auto or an existing checkpoint"):
        checkpoint.find(tmp_path, str(tmp_path / "gone.pt"))
    torch.save({"w": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"not a checkpoint of reid_dist, .*MODEL\.PRETRAINED FILE starts"):
        checkpoint.find(tmp_path, str(tmp_path / "other.pt"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), OSError("disk full")])
def test_a_failing_write_leaves_the_old_file(tmp_path, error):
    file = tmp_path / "a"
    checkpoint.write_atomic(file, lambda part: part.write_text("old"))

    def fail(part):
        part.write_text("half")
        raise error

    with pytest.raises(OSError, match=r"disk full: '.*/a'"):
        checkpoint.write_atomic(file, fail)
    assert file.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["a"]


def test_learning_rate_is_a_function_of_the_step():
    scheduler_model = torch.nn.Linear(1, 1)
    optimizer = build_optimizer(scheduler_model.parameters(), "sgd", 0.1, 0.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5], 0.1)
    for epoch in range(8):
        for step in range(3):
            lr = lr_at(epoch * 3 + step, 3, Schedule(0.1, milestones=[2, 5], decay=0.1))
            assert lr == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    set_lr(optimizer, 0.7)
    assert optimizer.param_groups[0]["lr"] == 0.7


def test_the_three_optimizers():
    p = torch.nn.Linear(1, 1).parameters
    adam = build_optimizer(p(), "adam", 0.1, 5e-4)
    assert type(adam) is torch.optim.Adam and adam.defaults["weight_decay"] == 5e-4
    assert type(build_optimizer(p(), "adamw", 0.1, 0)) is torch.optim.AdamW
    sgd = build_optimizer(p(), "sgd", 0.1, 0)
    assert sgd.defaults["momentum"] == 0.9 and sgd.defaults["nesterov"]
