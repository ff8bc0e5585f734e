"""What people see of a run: the console, metrics.jsonl, the report as a page, and logging services.

Importing it needs no torch: `python -m reid_dist.report` and the page built beside a training start fast.
"""

from .console import (
    METRICS,
    Reporter,
    clock,
    describe_best,
    draw_ranked_lists,
    eval_event,
    result_numbers,
    start_wandb,
    table,
)

__all__ = [
    "METRICS",
    "Reporter",
    "clock",
    "describe_best",
    "draw_ranked_lists",
    "eval_event",
    "result_numbers",
    "start_wandb",
    "table",
]
