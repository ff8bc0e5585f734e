"""Time and memory of the data set's index and the epoch plan for very many images, on a node of several ranks.

    python benchmarks/index.py
    python benchmarks/index.py --images 1000000 --ids 100000 --ranks 2

Writes a table of so many rows into a temporary folder (no image is read), and for each way to read it starts ranks as a
run does: one of them builds the index and the others map it, then the plan is built and every rank makes the steps of
two epochs. Memory is what the ranks hold together above what they held once torch was imported, in the end and at most.
Seconds are of rank 0, of processor time where it says CPU; a busy machine shows in the others.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from reid_dist import dist
from reid_dist.data.index import build_index
from reid_dist.data.plan import SAMPLERS, EpochPlan
from reid_dist.data.readers.files import Options
from reid_dist.share import once_per_node

ROWS = 1 << 20  # of the table that are made at a time
TABLES = ("manifest.parquet", "manifest.csv")
EVERY_S = 0.05


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--images", type=int, default=10_000_000)
    p.add_argument("--ids", type=int, default=1_000_000)
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--ranks", type=int, default=8)
    p.add_argument("--sampler", choices=SAMPLERS, default="identity")
    p.add_argument("--table", help=argparse.SUPPRESS)  # a rank's own start
    args = p.parse_args()
    if args.batch % args.ranks:
        p.error(f"--batch {args.batch} --ranks {args.ranks}: expected a batch that divides into ranks")
    if args.table:
        dist.run_main(lambda world: measure(world, args))
    print(f"{args.images:,} images of {args.ids:,} identities, {args.ranks} ranks, {args.sampler} sampler")
    print(f"{'':18}{'index':>18}{'plan':>9}{'an epoch':>10}{'held':>11}{'at most':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for name in TABLES:
            write_table(Path(folder) / name, args.images, args.ids)
            ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}", __file__]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *ranks, *sys.argv[1:], "--table", f"{folder}/{name}"], check=True, env=env)
            (Path(folder) / name).unlink()


def write_table(file: Path, num: int, num_pids: int) -> None:
    """Rows in the order of their identities, of which all but 4 % train; paths of 28 bytes."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    rng = np.random.default_rng(0)
    pids = np.sort(np.concatenate([np.arange(num_pids), rng.integers(0, num_pids, num - num_pids)]))
    schema = pa.schema([("path", pa.string()), ("pid", pa.int64()), ("camid", pa.int64()), ("split", pa.string())])
    open_writer = csv.CSVWriter if file.suffix == ".csv" else parquet.ParquetWriter
    with open_writer(file, schema) as writer:
        for start in range(0, num, ROWS):
            own = pids[start : start + ROWS]
            camids = rng.integers(1, 16, len(own))
            names = [
                decimals(own // 1000, 4), b"/", decimals(own, 7), b"_", decimals(camids, 2), b"_",
                decimals(np.arange(start, start + len(own)), 8), b".jpg",
            ]  # fmt: skip
            codes = pa.array(np.where(own % 25 > 0, 0, 1 + np.arange(len(own)) % 2))
            split = pa.DictionaryArray.from_arrays(codes, pa.array(["train", "query", "gallery"]))
            rows = [join(names, len(own)), pa.array(own), pa.array(camids), split.cast(pa.string())]
            writer.write_table(pa.table(rows, schema=schema))


def decimals(values: np.ndarray, width: int) -> np.ndarray:
    """(n,) -> (n, width) uint8 of their decimal digits, with zeros in front."""
    return np.stack([values // 10**k % 10 + ord("0") for k in reversed(range(width))], axis=1).astype(np.uint8)


def join(parts: list[np.ndarray | bytes], num: int) -> object:
    """An Arrow array of `num` texts of one length, each the parts one after the other."""
    import pyarrow as pa

    columns = [np.tile(np.frombuffer(p, np.uint8), (num, 1)) if isinstance(p, bytes) else p for p in parts]
    letters = np.concatenate(columns, axis=1)
    ends = np.arange(num + 1, dtype=np.int32) * letters.shape[1]
    return pa.Array.from_buffers(pa.string(), num, [None, pa.py_buffer(ends), pa.py_buffer(letters)])


def measure(world: dist.World, args: argparse.Namespace) -> None:  # all ranks
    """One line, printed by rank 0."""
    table = Path(args.table)
    options = Options(manifest=table.name)
    how = {"batch": args.batch, "num_instances": 4, "sampler": args.sampler, "seed": 0, "height": 256, "width": 128}
    marks = []

    def mark() -> None:
        dist.barrier()
        marks.append((time.perf_counter(), time.process_time()))

    pids = dist.gather_objects(os.getpid())
    with Memory(pids if world.is_main else []) as memory:
        mark()
        index = once_per_node(lambda: build_index("csv", str(table.parent), (), options).hashed())
        mark()
        plan = once_per_node(lambda: EpochPlan(index.train.pids, camids=index.train.camids, **how))
        mark()
        for epoch in (1, 2):
            plan.step(epoch, 0, world.rank, world.world_size)
            mark()
    dist.barrier()
    if world.is_main:
        (index_s, index_cpu), (plan_s, _), (epoch_s, _), _ = np.diff(marks, axis=0).tolist()
        read = f"{index_s:.1f} s ({index_cpu:.1f} CPU)"
        seconds = f"{read:>18}{plan_s:7.1f} s{epoch_s:8.1f} s"
        print(f"{table.name:18}{seconds}{memory.held:8.2f} GB{memory.most:8.2f} GB", flush=True)


class Memory:
    """GB that some processes hold together, above those at the start: at the end, and the most that was seen."""

    def __init__(self, pids: list[int]) -> None:
        self._pids, self.most, self.held = pids, 0.0, 0.0
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._watch_them)

    def __enter__(self) -> Memory:
        self._start = self._now()
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watch.join()
        self.held = self._now() - self._start
        self.most = max(self.most, self.held)

    def _watch_them(self) -> None:
        while self._pids and not self._ended.wait(EVERY_S):
            self.most = max(self.most, self._now() - self._start)

    def _now(self) -> float:
        """The sum of proportional set sizes: of a page that n processes map each counts 1/n."""
        total = 0
        for pid in self._pids:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total * 1024 / 1e9


if __name__ == "__main__":
    main()
