"""CPU seconds and memory of the epoch plan for very many images, one process for each sampler.

python benchmarks/plan.py --images 10000000 --ids 1000000
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import numpy as np

from reid_dist.data.plan import SAMPLERS, EpochPlan


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--images", type=int, default=10_000_000)
    p.add_argument("--ids", type=int, default=1_000_000)
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--sampler", choices=SAMPLERS, help="this one only, in this process")
    args = p.parse_args()
    if args.sampler is None:
        print(f"{args.images:,} images of {args.ids:,} identities, batch {args.batch}, K 4")
        print(f"{'sampler':18}{'plan':>10}{'an epoch':>10}{'a step':>12}{'peak memory':>14}")
        for sampler in SAMPLERS:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--sampler", sampler], check=True)
        return
    rng = np.random.default_rng(0)
    # Sorted, as the readers list them; every identity has an image, the rest fall where they may.
    pids = np.sort(np.concatenate([np.arange(args.ids), rng.integers(0, args.ids, args.images - args.ids)]))
    camids = rng.integers(0, 15, args.images, dtype=np.int64)
    times = [time.process_time()]  # one thread; a busy machine does not show
    plan = EpochPlan(
        pids, batch=args.batch, num_instances=4, sampler=args.sampler, seed=0, height=256, width=128, camids=camids
    )
    times.append(time.process_time())
    plan.indices(1)
    times.append(time.process_time())
    plan.step(1, 0)
    times.append(time.process_time())
    build, epoch, step = np.diff(times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{args.sampler:18}{build:9.2f}s{epoch:9.2f}s{step * 1e3:10.2f}ms{peak:10,.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
