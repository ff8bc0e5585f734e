import functools
import os
import signal
from pathlib import Path

import pytest
import torch

from reid_dist import dist
from reid_dist.data import cache
from reid_dist.data.augment import sizes
from reid_dist.data.pipeline import open_images
from tests.ranks import run_ranks
from tests.runs import PLAIN, SMALL, losses_of, run
from tests.test_pipeline import (  # noqa: F401
    CPU,
    HEIGHT,
    PIPELINES,
    WIDTH,
    make_plan,
    note_buffers,
    path_of,
    take,
    train_loader,
)

SIZES = [(HEIGHT, WIDTH), (72, 36)]
PIXELS = 24 * 3 * sum(h * w for h, w in SIZES)


def build(kind, files, pipeline="torch", budget_gb=1.0, num=24, device_gb=1.0):
    how = {"pipeline": pipeline, "decode_device": "cpu", "num_workers": 0, "device": CPU}
    plain = functools.partial(open_images, path_of=files, **how)
    return cache.build_cache(kind, budget_gb, files, num, SIZES, plain, CPU, device_gb)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("kind", ["encoded", "resized", "device"])
def test_no_bit_depends_on_the_cache(path_of, kind, pipeline, num_workers):  # noqa: F811
    plan = make_plan()
    assert sizes(plan.augment, HEIGHT, WIDTH) == SIZES
    made, said = build(kind, path_of, pipeline)
    budget = "per rank (DATA.CACHE_DEVICE_GB 1)" if kind == "device" else "a node (DATA.CACHE_GB 1)"
    assert made.kind == kind and said == f"{kind}, 0.00 GB {budget}"
    expected = take(train_loader(path_of, pipeline, plan), 2 * plan.num_steps)
    # From here on the files are not looked at: only the cache has the images.
    found = take(
        train_loader(
            lambda i: "nowhere", pipeline, plan, num_workers=num_workers if pipeline == "dali" else 0, cache=made
        ),
        2 * plan.num_steps,
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.indices, b.indices)


def test_worker_processes_read_the_same_memory(path_of):  # noqa: F811
    made, _ = build("encoded", path_of)
    expected = take(train_loader(path_of, "torch"), 3)
    found = take(train_loader(path_of, "torch", num_workers=1, cache=made), 3)
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, expected, strict=True))


def on_each_rank(files, kind):
    made, _ = build(kind, files, num=23)  # does not divide by 2 or 3
    memory = made.memory
    loader = train_loader(files, "torch", make_plan(23), cache=made)
    images = [b.images for b in take(loader, 2)]
    return Path(memory.path).stat().st_ino, memory.path, torch.cat(images)


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["encoded", "resized"])
def test_ranks_of_a_node_hold_one_copy(path_of, kind):  # noqa: F811
    expected = torch.cat([b.images for b in take(train_loader(path_of, "torch", make_plan(23)), 2)])
    for world_size in (2, 3):
        inodes, paths, images = zip(*run_ranks(world_size, on_each_rank, path_of, kind), strict=True)
        assert len(set(inodes)) == 1 and len(set(paths)) == world_size
        assert all(torch.equal(i, expected) for i in images)


def batches_and_pixels_on_each_rank(files):
    cache._IMAGE_ROUND, cache._BATCH = 10, 3  # several rounds, of several batches
    made, _ = build("device", files, num=23)
    world = dist.world_size()
    loader = train_loader(files, "torch", make_plan(23, batch=12), rank=dist.rank(), world_size=world, cache=made)
    return torch.cat([b.images for b in take(loader, 2)]), made.pixels


@pytest.mark.ranks
def test_each_rank_holds_all_images_on_its_device(path_of):  # noqa: F811
    [(_, pixels)] = run_ranks(1, batches_and_pixels_on_each_rank, path_of)
    for world_size in (2, 3):
        results = run_ranks(world_size, batches_and_pixels_on_each_rank, path_of)
        assert all(torch.equal(found, pixels) for _, found in results)
        for rank, (images, _) in enumerate(results):
            plain = train_loader(path_of, "torch", make_plan(23, batch=12), rank=rank, world_size=world_size)
            assert torch.equal(images, torch.cat([b.images for b in take(plain, 2)]))


def test_a_device_with_too_little_memory(path_of, monkeypatch):  # noqa: F811
    for budget, expected in [(PIXELS, "device"), (PIXELS - 1, "resized")]:
        made, said = build("device", path_of, device_gb=budget / 1e9)
        assert made.kind == expected and said.startswith(expected)
        assert ("; device would take 0.00 GB per rank (DATA.CACHE_DEVICE_GB" in said) == (expected == "resized")
    made, said = build("device", path_of, budget_gb=(PIXELS - 1) / 1e9, device_gb=0.0)
    assert made.kind == "encoded" and "; device would take" in said and "; resized would take" in said
    with monkeypatch.context() as patch:
        patch.setattr(cache, "free_device_memory", lambda device, ranks: PIXELS - 1)
        made, said = build("device", path_of)
        assert made.kind == "resized" and "0.0 GB of free memory" in said

    # Another process may take the memory in between.
    class Full(cache.DeviceCache):
        def __init__(self, num, sizes, device):
            raise torch.OutOfMemoryError

    monkeypatch.setattr(cache, "DeviceCache", Full)
    assert build("device", path_of)[0].kind == "resized"


def try_with_one_full_device(files):
    if dist.rank() == 1:
        cache._allocate = lambda num, sizes, device: None
    return build("device", files)[0].kind


@pytest.mark.ranks
def test_ranks_agree_where_one_device_is_full(path_of):  # noqa: F811
    assert run_ranks(2, try_with_one_full_device, path_of) == ["resized", "resized"]


def test_batches_are_cut_out_in_the_memory_that_is_copied_from(path_of, monkeypatch):  # noqa: F811
    made, _ = build("resized", path_of)
    buffers = note_buffers(monkeypatch, cache)
    found = take(train_loader(path_of, "torch", num_workers=2, cache=made)._images, 3)
    assert [b.data_ptr() for b in found] == [b.data_ptr() for b in buffers[:3]]


def test_what_does_not_fit_gives_way(path_of, monkeypatch):  # noqa: F811
    bytes_of_files = sum(Path(path_of(i)).stat().st_size for i in range(24))
    assert bytes_of_files < PIXELS
    for budget, expected in [(PIXELS, "resized"), (PIXELS - 1, "encoded"), (bytes_of_files, "encoded")]:
        made, said = build("resized", path_of, budget_gb=budget / 1e9)
        assert made.kind == expected and said.startswith(expected)
        assert ("resized would take 0.00 GB" in said) == (expected == "encoded")
    made, said = build("resized", path_of, budget_gb=(bytes_of_files - 1) / 1e9)
    assert made is None and said.startswith(
        "off: resized would take 0.00 GB, encoded would take 0.00 GB a node; DATA.CA"
    )
    made, said = build("encoded", path_of, budget_gb=(bytes_of_files - 1) / 1e9)
    assert made is None and said.startswith("off: encoded would take")
    # What is free counts, not what was allowed.
    monkeypatch.setattr(cache, "free_memory", lambda: PIXELS - 1)
    made, said = build("resized", path_of)
    assert made.kind == "encoded" and "0.0 GB of free memory" in said
    assert build("off", path_of) == (None, "off")


def test_memory_outlives_the_process_that_made_it_and_has_no_name(tmp_path):
    before = sorted(Path("/dev/shm").iterdir())
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        memory = cache.SharedMemory(1 << 20)
        memory.array[:] = 7
        os.write(writer, memory.path.encode())
        signal.pause()
    memory = cache.SharedMemory(1 << 20, os.read(reader, 100).decode())
    assert str(Path(memory.path).readlink()).startswith("/memfd:reid_dist (deleted)")
    assert sorted(Path("/dev/shm").iterdir()) == before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (memory.array == 7).all()
    path = memory.path
    del memory
    assert not Path(path).exists()
    os.close(reader)
    os.close(writer)


def try_to_build(files, kind):
    try:
        build(kind, files, num=25)
    except dist.UserError:
        return "ended"


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["encoded", "resized", "device"])
def test_a_bad_file_ends_all_ranks_with_its_name(path_of, tmp_path, kind, capfd):  # noqa: F811
    bad = tmp_path / "bad.jpg"
    if kind != "encoded":
        bad.write_bytes(b"no image")
    files = [*(path_of(i) for i in range(24)), str(bad)].__getitem__
    assert run_ranks(2, try_to_build, files, kind) == ["ended", "ended"]
    assert f"image {bad}: " in capfd.readouterr().err


def test_not_on_linux(path_of, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with pytest.raises(dist.UserError):
        build("encoded", path_of)
    assert "DATA.CACHE: expected off" in capsys.readouterr().err


@pytest.mark.ranks
def test_training_is_the_same_with_a_cache_and_may_change_it_when_resumed(pedestrians, tmp_path, capfd):
    text = f"{SMALL} {PLAIN} TRAIN.MAX_STEPS 4 TRAIN.CHECKPOINT_STEP 2"
    plain, _ = run(2, pedestrians, tmp_path / "off", text)
    encoded, _ = run(2, pedestrians, tmp_path / "1", f"{text} DATA.CACHE encoded TRAIN.MAX_STEPS 2")
    resized, _ = run(
        2, pedestrians, tmp_path / "1", f"{text} DATA.CACHE resized TRAIN.MAX_STEPS 3", flags=["--resume", "auto"]
    )
    device, _ = run(
        2,
        pedestrians,
        tmp_path / "1",
        f"{text} DATA.CACHE device DATA.CACHE_DEVICE_GB 0.5",
        flags=["--resume", "auto"],
    )
    assert (losses_of(device) == losses_of(plain)).all() and (losses_of(encoded) == losses_of(plain)[:2]).all()
    assert (losses_of(resized) == losses_of(plain)[:3]).all()
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("cache")]
    assert len(said) == 3 and "encoded, 0.00 GB a node" in said[0] and "resized, 0.00 GB a node" in said[1]
    assert "device, 0.00 GB per rank (DATA.CACHE_DEVICE_GB 0.5)" in said[2]
