"""Pages of runs, rebuilt from their files: no network, no features, no torch.

python -m reid_dist.report runs/market1501/mine                # its page, report/index.html
python -m reid_dist.report RUN RUN RUN --out comparison.html   # several: their pages, and a comparison
python -m reid_dist.report --table RUN ...                     # fills docs/results.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..failure import print_error
from .comparison import write_comparison
from .page import write_page
from .results import write_table
from .run import read_run


def main(argv: list[str]) -> int:
    """Exit code: 0, or 2 after a user's error."""
    p = argparse.ArgumentParser(prog="python -m reid_dist.report", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("runs", nargs="*", metavar="RUN", help="a run's folder, such as runs/market1501/mine")
    p.add_argument("--table", action="store_true", help="fill the table of results with these runs (none: empty it)")
    p.add_argument("--out", metavar="FILE", help="of the comparison (comparison.html) or the table (docs/results.md)")
    args = p.parse_args(argv)
    if not args.runs and not args.table:
        p.error("expected a RUN, the folder of a run")
    if args.out and len(args.runs) < 2 and not args.table:
        p.error(f"--out {args.out!r}: expected several RUNs or --table; a run's page is its report/index.html")
    try:
        runs = [read_run(folder) for folder in args.runs]
        if args.table:
            print(f"table       {write_table(runs, Path(args.out or 'docs/results.md'))}")
            return 0
        for run in runs:
            print(f"page        {write_page(run)}")
        if len(runs) > 1:
            print(f"comparison  {write_comparison(runs, Path(args.out or 'comparison.html'))}")
    except (ValueError, OSError) as error:
        print_error(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
