"""Pages of runs, rebuilt from their files: no network, no features, no torch.

python -m reid_dist.report runs/market1501/mine                # its page, report/index.html
python -m reid_dist.report RUN RUN RUN --out comparison.html   # several: their pages, and a comparison
python -m reid_dist.report --table RUN ...                     # fills docs/results.md
"""

from __future__ import annotations

import argparse
import sys

from ..failure import print_error
from .page import write_page
from .run import read_run


def main(argv: list[str]) -> int:
    """Exit code: 0, or 2 after a user's error."""
    p = argparse.ArgumentParser(prog="python -m reid_dist.report", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, such as runs/market1501/mine")
    p.add_argument("--out", metavar="FILE", help="the comparison of several runs (comparison.html), or the table")
    p.add_argument("--table", action="store_true", help="fill the table of results (docs/results.md) with these runs")
    args = p.parse_args(argv)
    try:
        runs = [read_run(folder) for folder in args.runs]
        for run in [] if args.table else runs:
            print(f"page       {write_page(run)}")
    except (ValueError, OSError) as error:
        print_error(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
