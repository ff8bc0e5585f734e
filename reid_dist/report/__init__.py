"""What people see of a run: the console, metrics.jsonl, the report as a page, and logging services.

Importing it needs no torch: `python -m reid_dist.report` and the page built beside a training start fast.
"""

from .background import PageBuilder
from .console import (
    METRICS,
    Reporter,
    best_of,
    clock,
    describe_best,
    draw_ranked_lists,
    eval_event,
    result_numbers,
    table,
)
from .facts import note_start, software
from .run import PAGE
from .services import new_run_id, open_services

__all__ = [
    "METRICS",
    "PAGE",
    "PageBuilder",
    "Reporter",
    "best_of",
    "clock",
    "describe_best",
    "draw_ranked_lists",
    "eval_event",
    "new_run_id",
    "note_start",
    "open_services",
    "result_numbers",
    "software",
    "table",
]
