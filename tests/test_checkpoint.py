import pytest
import torch

from reid_dist import checkpoint
from reid_dist.optim import build_optimizer, lr_at, set_lr


def test_a_checkpoint_comes_back_whole(tmp_path):
    state = {"step": 7, "model": {"w": torch.arange(3)}, "best": {"mAP": 0.5}}
    file = checkpoint.save(tmp_path / "c", state)
    loaded = checkpoint.load(file)
    assert loaded["step"] == 7 and torch.equal(loaded["model"]["w"], torch.arange(3)) and loaded["best"] == {"mAP": 0.5}
    assert [f.name for f in (tmp_path / "c").iterdir()] == ["step_000000007.pt"]


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    for step in (10, 20, 100):
        checkpoint.save(tmp_path, {"step": step})
    checkpoint.save(tmp_path, {"step": 20}, best=True)
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names == ["best.pt", "step_000000020.pt", "step_000000100.pt"]
    assert checkpoint.find(tmp_path, "auto")["step"] == 100
    assert checkpoint.find(tmp_path, str(tmp_path / "best.pt"))["step"] == 20


def test_a_broken_newest_file_is_passed_over(tmp_path):
    for step in (10, 20):
        checkpoint.save(tmp_path, {"step": step, "w": torch.zeros(1000)})
    newest = tmp_path / "step_000000020.pt"
    newest.write_bytes(newest.read_bytes()[:500])
    assert checkpoint.find(tmp_path, "auto")["step"] == 10
    (tmp_path / "step_000000010.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        checkpoint.find(tmp_path, "auto")


def test_nothing_to_resume(tmp_path):
    assert checkpoint.find(tmp_path / "none", "auto") is None
    assert checkpoint.find(tmp_path, "") is None
    with pytest.raises(ValueError, match="expected auto or an existing checkpoint"):
        checkpoint.find(tmp_path, str(tmp_path / "gone.pt"))
    torch.save({"w": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="expected a checkpoint of reid_dist"):
        checkpoint.find(tmp_path, str(tmp_path / "other.pt"))


def test_a_failing_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a"
    checkpoint.write_atomic(file, lambda part: part.write_text("old"))

    def fail(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomic(file, fail)
    assert file.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["a"]


def test_learning_rate_is_a_function_of_the_step():
    scheduler_model = torch.nn.Linear(1, 1)
    optimizer = build_optimizer(scheduler_model.parameters(), "sgd", 0.1, 0.0, torch.device("cpu"))
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5], 0.1)
    for epoch in range(8):
        for step in range(3):
            assert lr_at(epoch * 3 + step, 3, 0.1, [2, 5], 0.1) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    set_lr(optimizer, 0.7)
    assert optimizer.param_groups[0]["lr"] == 0.7


def test_the_three_optimizers():
    p = torch.nn.Linear(1, 1).parameters
    adam = build_optimizer(p(), "adam", 0.1, 5e-4, torch.device("cpu"))
    assert type(adam) is torch.optim.Adam and adam.defaults["weight_decay"] == 5e-4
    assert type(build_optimizer(p(), "adamw", 0.1, 0, torch.device("cpu"))) is torch.optim.AdamW
    sgd = build_optimizer(p(), "sgd", 0.1, 0, torch.device("cpu"))
    assert sgd.defaults["momentum"] == 0.9 and sgd.defaults["nesterov"]
