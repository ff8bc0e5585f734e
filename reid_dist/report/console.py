"""What people see of a run while it goes on: the console, metrics.jsonl, result.json, the ranked lists as a picture.

Only rank 0 writes; every other rank holds a Reporter that does nothing. Names in files are those of the README.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import named, write_atomic
from .background import PageBuilder
from .run import DETAILS_FILE, METRICS_FILE
from .services import UPLOAD_S, Service, finish_all

SETTLED = 20  # steps after which the speed says something
SLOW_DATA = 0.2  # more waiting for images than this share of the time is said,
ENOUGH_WAITS = 3  # in the median of so many log lines: one alone may be a hiccup
METRICS = ("mAP", "rank1", "rank5", "rank10", "mINP")


class Reporter:
    """Progress and results of one run. `folder` is the run's; `is_main` says whether this process writes at all.

    steps_per_epoch, num_steps: of an epoch and of the whole run; batch: images of a step; services: what metrics go to
    beside metrics.jsonl; page: builds the page after each evaluation; None: nobody does.
    """

    def __init__(
        self,
        folder: Path,
        is_main: bool,
        steps_per_epoch: int = 0,
        num_steps: int = 0,
        batch: int = 0,
        services: Sequence[Service] = (),
        page: PageBuilder | None = None,
    ):
        self.folder, self.is_main = folder, is_main
        self.steps_per_epoch, self.num_steps, self.batch = steps_per_epoch, num_steps, batch
        self.services, self.page = list(services), page
        self.bar: Any = None
        self.bar_epoch = 0
        self.num_seen = 0  # steps of this process
        self.told: set[str] = set()
        self.waits: deque[float] = deque(maxlen=9)  # the newest shares of the time that went into waiting for images

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar if there is one."""
        if not self.is_main:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def make_folder(self) -> None:
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)

    def say_once(self, kind: str, text: str) -> None:
        """`say`, the first time only that something of this kind is to be said."""
        if kind not in self.told:
            self.told.add(kind)
            self.say(text)

    def log(self, event: dict[str, Any]) -> None:
        """One JSON object as a line of metrics.jsonl, and its numbers to the logging services."""
        if not self.is_main:
            return
        file = self.folder / METRICS_FILE
        with named(file), file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(event) + "\n")
        kind = "/".join(event[key] for key in ("event", "dataset", "weights") if key in event)
        words = ("event", "dataset", "weights")
        values = {f"{kind}/{k}": v for k, v in event.items() if k not in words and v is not None}
        self.send("log", values, event["step"])
        for line in self.page.poll() if self.page else []:
            self.say(line)

    def send(self, method: str, *args: Any) -> None:
        """Calls a method of each logging service that has it, in its own thread; says what went wrong since."""
        patience_s = UPLOAD_S if method == "artifact" else 0.0
        for service in self.services:
            service.send(lambda sink: getattr(sink, method, lambda *_: None)(*args), patience_s)
            for line in service.complaints():
                self.say(line)

    def show(self, details: list[dict[str, Any]], facts: dict[str, Any]) -> None:
        """After an evaluation: writes its details (one for each test set) and has the page built, which takes its time
        elsewhere. facts: of the evaluation as a whole: step, epoch."""
        if not self.is_main:
            return
        self.save_result(facts | {"sets": details}, DETAILS_FILE, indent=None)
        for line in self.page.build() if self.page else []:
            self.say(line)

    def cut(self, step: int, last_eval: int) -> None:
        """Drops what a killed run wrote after the checkpoint it goes on from, and a half last line."""
        file = self.folder / METRICS_FILE
        if not self.is_main or not file.exists():
            return
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if event["step"] <= (last_eval if event["event"] == "eval" else step):
                kept.append(line + "\n")
        write_atomic(file, lambda part: part.write_text("".join(kept), encoding="utf-8"))

    def progress(self, epoch: int, step: int, event: dict[str, Any] | None) -> None:
        """Moves the epoch's bar to `step` (of the epoch, from 1); `event` is the train event of a log step."""
        if not self.is_main:
            return
        self.num_seen += 1
        if event and self.num_seen >= SETTLED:
            self.judge_speed(event)
        interactive = sys.stderr.isatty()
        if interactive:
            if self.bar is None or self.bar_epoch != epoch:
                self.end_progress()
                self.bar, self.bar_epoch = open_bar(epoch, self.steps_per_epoch, step - 1), epoch
            self.bar.update(step - self.bar.n)
            if event:
                self.bar.set_postfix_str(describe(event))
            if step == self.steps_per_epoch:
                self.end_progress()
        elif event:
            self.say(f"epoch {epoch}  step {step}/{self.steps_per_epoch}  {describe(event)}")

    def judge_speed(self, event: dict[str, Any]) -> None:
        """Once the first steps are over: how long an epoch takes, and whether the network waits for images."""
        seconds = self.batch / event["images_per_s"]  # of a step
        epoch, left = self.steps_per_epoch * seconds, (self.num_steps - event["step"]) * seconds
        expected = f"{duration(epoch)} an epoch, {duration(left)} to the end, evaluations aside"
        self.say_once("speed", f"speed     {expected}")
        self.waits.append(event["data_wait"])
        wait = statistics.median(self.waits)
        if len(self.waits) >= ENOUGH_WAITS and wait > SLOW_DATA:
            self.say_once(
                "data wait",
                f"warning   {wait:.0%} of the time the network waits for images: raise DATA.NUM_WORKERS or set "
                "DATA.CACHE resized",
            )

    def end_progress(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    @contextmanager
    def counting(self, name: str, total: int) -> Iterator[Callable[[int], Any]]:
        """A bar that counts up to `total` and then disappears; on a terminal only."""
        if not self.is_main or not sys.stderr.isatty():
            yield lambda done: None
            return
        from tqdm import tqdm

        with tqdm(total=total, desc=name, leave=False, dynamic_ncols=True) as bar:
            yield bar.update

    def save_result(self, result: dict[str, Any], name: str = "result.json", indent: int | None = 2) -> None:
        """A JSON file in the run's folder, whole or not at all."""
        if self.is_main:
            text = json.dumps(result, indent=indent) + "\n"
            write_atomic(self.folder / name, lambda part: part.write_text(text, encoding="utf-8"))

    def close(self, in_a_hurry: bool = False) -> None:
        """Waits, within limits, for the page and the logging services. in_a_hurry: the cluster wants its nodes back, so
        the page is not waited for."""
        self.end_progress()
        for line in self.page.finish() if self.page and not in_a_hurry else []:
            self.say(line)
        finish_all(self.services, in_a_hurry)
        for service in self.services:
            for line in service.complaints():
                self.say(line)


def open_bar(epoch: int, total: int, initial: int) -> Any:
    from tqdm import tqdm

    form = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
    return tqdm(total=total, initial=initial, desc=f"epoch {epoch}", bar_format=form, dynamic_ncols=True)


def describe(event: dict[str, Any]) -> str:
    """The numbers of a train event as people read them while they wait."""
    loss = "not finite" if event["loss"] is None else f"{event['loss']:.4f}"
    return (
        f"loss {loss}  acc {event['acc']:.1%}  {event['images_per_s']:.0f} images/s  "
        f"data wait {event['data_wait']:.0%}  lr {event['lr']:.2g}"
    )


def duration(seconds: float) -> str:
    """'under 1 s', '48 s', '3 min 20 s', '2 h 5 min', '1 d 3 h'."""
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    whole = round(seconds)
    for (size, name), (smaller, next_name) in itertools.pairwise(units):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {name}" + (f" {rest} {next_name}" if rest else "")
    return f"{whole} s" if whole else "under 1 s"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A text table with a row per name and the five metrics in per cent."""
    width = max(len(name) for name in rows)
    lines = [" ".join([" " * width, *(f"{m:>7}" for m in METRICS)])]
    for name, row in rows.items():
        lines.append(" ".join([f"{name:<{width}}", *(f"{100 * row[m]:6.1f}%" for m in METRICS)]))
    return "\n".join(lines)


def result_numbers(result: Any) -> dict[str, Any]:
    """The numbers of an EvalResult as files name them; mAP and the like in [0, 1]."""
    return {name: getattr(result, name) for name in (*METRICS, "num_query", "num_gallery", "num_no_match", "seconds")}


def eval_event(epoch: int, step: int, dataset: str, result: Any) -> dict[str, Any]:
    """The eval line of metrics.jsonl from an EvalResult on test set `dataset`."""
    return {"event": "eval", "epoch": epoch, "step": step, "dataset": dataset} | result_numbers(result)


def best_of(events: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The first of the best by the metric, and by mAP among equals, of which rank-1 has many on small sets."""
    return max(events, key=lambda e: (e[metric], e["mAP"]))


def describe_best(best: dict[str, Any], metric: str, chosen_on: str) -> str:
    """The best evaluation, what it was chosen on, and the other test sets' results of the same weights."""
    lines = [
        f"best rank-1 {best['rank1']:.1%} (mAP {best['mAP']:.1%}) at epoch {best['epoch']}, by {metric} on {chosen_on}"
    ]
    for e in best["others"]:
        which = ", averaged weights" if e.get("weights") == "ema" else ""
        lines.append(f"  there on {e['dataset']}{which}: rank-1 {e['rank1']:.1%} (mAP {e['mAP']:.1%})")
    return "\n".join(lines)


RIGHT, WRONG, QUERY = "#1a9641", "#d7191c", "#404040"


def draw_ranked_lists(
    file: Path, rows: list[tuple[str, str, float, list[tuple[str, float, bool]]]], title: str
) -> None:  # rank 0 only
    """A PNG with a row per query: the query, then its first answers, right ones framed green, wrong ones red.

    rows: (query path, label, average precision, [(gallery path, distance, right), ...]).
    """
    from PIL import Image, ImageDraw, ImageFont

    from ..data.decode import decode

    width, height, gap, caption, frame = 64, 128, 12, 30, 4
    columns = 1 + max(len(answers) for *_, answers in rows)
    size = (gap + columns * (width + gap) + gap, 28 + len(rows) * (height + caption + gap))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    draw.text((gap, 8), title, "black", font)
    for line, (path, label, ap, answers) in enumerate(rows):
        cells = [(path, f"{label}\nAP {ap:.2f}", QUERY)]
        cells += [(p, f"{distance:.3f}", RIGHT if right else WRONG) for p, distance, right in answers]
        for column, (image_path, text, colour) in enumerate(cells):
            # The query stands apart from its answers.
            x = gap + column * (width + gap) + (gap if column else 0)
            y = 28 + caption + line * (height + caption + gap)
            draw.rectangle((x - frame, y - frame, x + width + frame - 1, y + height + frame - 1), colour)
            sheet.paste(decode(image_path).resize((width, height)), (x, y))
            top = y - frame - 13 * text.count("\n") - 14
            draw.multiline_text((x - frame, top), text, colour, font, spacing=1)
    write_atomic(file, lambda part: sheet.save(part, format="PNG"))


def clock() -> float:
    """Seconds of a clock that never jumps."""
    return time.perf_counter()
