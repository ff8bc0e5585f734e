"""The page of a run: what it shows is what was evaluated; it stands alone; it never holds up or stops a training."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from reid_dist import evaluate
from reid_dist.data.index import TestSet, build_index
from reid_dist.data.split import Split
from reid_dist.details import choose_queries, confused_pairs, image
from reid_dist.evaluator import RankedList
from reid_dist.report import PageBuilder, Reporter, background
from reid_dist.report.__main__ import main
from reid_dist.report.console import best_of, duration
from reid_dist.report.plots import Line, curves, thin
from reid_dist.report.run import read_run
from tests import ranks
from tests.ranks import run_ranks
from tests.runs import SMALL, TINY, run

TEXT = f"{SMALL} {TINY} MODEL.BN_GROUP 8 REPORT.PAGE true REPORT.ACTIVATION_MAPS true TRAIN.EMA 0.5 TEST.EVAL_STEP 1"


@pytest.fixture(scope="module")
def reported(pedestrians, tmp_path_factory):
    """The folder of a run of two epochs on 2 ranks, with its page."""
    base = tmp_path_factory.mktemp("reported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(background, "FINISH_S", 300.0)  # on a busy machine its low priority makes it slow
        run(2, pedestrians, base, f"{TEXT} TRAIN.MAX_EPOCH 2")
    return base / "market1501/t"


class Page(HTMLParser):
    """Elements by tag, ids, and whether every element that is opened is closed."""

    VOID = ("meta", "link", "img", "br", "wbr")

    def __init__(self, text):
        super().__init__()
        self.found, self.ids, self.open = {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.setdefault(tag, []).append(dict(attrs))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.setdefault(tag, []).append(dict(attrs))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.ranks
def test_the_page_stands_alone_and_can_be_read_by_everybody(reported):
    text = (reported / "report/index.html").read_text()
    page = Page(text)
    assert page.open == [] and len(set(page.ids)) == len(page.ids)
    targets = [a[k] for tag in page.found.values() for a in tag for k in ("src", "href", "xlink:href") if k in a]
    assert targets and all(t.startswith(("data:", "#")) for t in targets)
    assert {t[1:] for t in targets if t.startswith("#")} <= set(page.ids)
    assert not re.search(r"@import|url\((?!#)", text) and "script" not in page.found
    assert len(page.found["img"]) > 18 and all(image["alt"] for image in page.found["img"])
    assert len(page.found["svg"]) == 8 and all(svg["role"] == "img" and svg["aria-label"] for svg in page.found["svg"])
    # Right and wrong are told by a sign and by words as well as by a colour.
    right = text.count('class="person right"')
    assert right == text.count("<b>✓") == len(re.findall(r'alt="answer \d+, right', text)) > 0
    assert text.count('class="person wrong"') == text.count("<b>✗") > 0


@pytest.mark.ranks
def test_the_page_shows_what_was_measured(reported):
    text = (reported / "report/index.html").read_text().replace("<wbr>", "")
    events = [json.loads(line) for line in (reported / "metrics.jsonl").read_text().splitlines()]
    evals = [e for e in events if e["event"] == "eval"]
    assert len(evals) == 4 and text.count("averaged weights</th>") == 2
    for e in evals:
        cells = "".join(f"<td>{100 * e[m]:.1f} %</td>" for m in ("mAP", "rank1", "rank5", "rank10", "mINP"))
        assert f"<td>{e['epoch']}</td><td>{e['step']}</td>{cells}" in text
    last = [e for e in events if e["event"] == "train"][-1]
    assert f"sum: {events[0]['loss']:.4g} at first, {last['loss']:.4g} at last" in text
    for words in ("TRAIN.PRECISION", "on cpu", "git revision", "torch", "All starts", "complete: 4 steps, 2 epochs"):
        assert (words in text) == (words != "All starts")
    changed = text[text.index("Keys that differ") : text.index("The resolved config")]
    assert ">TRAIN.EMA<" in changed and ">AUG.RE_PROB<" not in changed and ">AUG.RE_PROB<" in text


@pytest.mark.ranks
def test_ranked_lists_are_those_of_the_evaluation(reported, pedestrians):
    [details] = json.loads((reported / "evaluation_details.json").read_text())["sets"]
    ap = np.array(details["ap"])
    assert len(ap) == 16 and details["cmc"][-1] == 1.0
    worst = details["queries"]["worst"]
    assert [row["ap"] for row in worst] == np.sort(ap)[:6].tolist()
    index = build_index("market1501", str(pedestrians))
    camera = re.compile(r"/(\d+)_c(\d)")
    gallery = Counter(camera.search(index.gallery.path(i)).groups() for i in range(len(index.gallery)))
    for row in (row for rows in details["queries"].values() for row in rows):
        pid, own = camera.search(row["path"]).groups()
        assert (int(row["pid"]), row["camera"]) == (int(pid), own)  # cameras as the file names count them, from 1
        distances = [a["distance"] for a in row["answers"]]
        assert distances == sorted(distances) and len(distances) == 10
        for a in row["answers"]:
            of_pid, of_camera = camera.search(a["path"]).groups()
            assert (int(a["pid"]), a["camera"]) == (int(of_pid), of_camera) and a["right"] == (of_pid == pid)
            assert (of_pid, of_camera) != (pid, own), "junk is left out"
        # AP by hand, where all matches are among the answers shown.
        hits = np.flatnonzero([a["right"] for a in row["answers"]])
        if len(hits) == sum(n for (p, c), n in gallery.items() if p == pid and c != own):
            assert row["ap"] == pytest.approx(np.mean(np.arange(1, len(hits) + 1) / (hits + 1)), abs=1e-4)
    assert all(np.shape(row["activation"]) == (4, 2) and np.max(row["activation"]) == 1.0 for row in worst)


@pytest.mark.ranks
def test_one_and_two_ranks_show_the_same(reported, pedestrians, tmp_path):
    run(1, pedestrians, tmp_path, f"{TEXT} TRAIN.MAX_EPOCH 2 REPORT.PAGE false WANDB.PICTURES true")
    one, two = (json.loads((f / "evaluation_details.json").read_text()) for f in (tmp_path / "market1501/t", reported))
    assert one == two
    assert not (tmp_path / "market1501/t/report").exists()


@pytest.mark.ranks
def test_the_page_is_rebuilt_without_torch(reported):
    before = (reported / "report/index.html").read_bytes()
    (reported / "report/index.html").unlink()
    code = "import sys; sys.modules['torch'] = None; from reid_dist.report.__main__ import main; main(sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, str(reported)], check=True, timeout=60)
    assert (reported / "report/index.html").read_bytes() == before


@pytest.mark.ranks
def test_evaluate_writes_the_page_of_what_it_found(reported, pedestrians, tmp_path, monkeypatch):
    """Into a copy of the run's folder: the run's own curves stay, the evaluation is the newer one."""
    monkeypatch.setattr(background, "FINISH_S", 300.0)
    folder = tmp_path / "market1501/t"
    shutil.copytree(reported, folder)
    weights = folder / "checkpoints/best.pt"
    argv = ["--cfg", str(folder / "config.yaml"), "--root", str(pedestrians), "--output", str(tmp_path)]
    run_ranks(
        2, lambda: evaluate.main(ranks.world, [*argv, "--weights", str(weights), "REPORT.ACTIVATION_MAPS", "false"])
    )
    text = (folder / "report/index.html").read_text()
    assert f"weights {weights}" in text and "market1501, evaluated</th>" in text and "ROC on market1501" in text
    assert "averaged weights</th>" in text and "query camera 1</th>" in text and "gallery 2</th>" in text
    assert "class=dim>complete" in text and 'alt="where the network responds' not in text
    found = json.loads((folder / "evaluation.json").read_text())["camera_pairs"]
    assert f">{100 * found['mAP'][0][1]:.1f}</td>" in text


@pytest.mark.ranks
def test_several_test_sets_are_told_apart(reported, tmp_path):
    details = json.loads((reported / "evaluation_details.json").read_text())
    details["sets"].append(details["sets"][0] | {"label": "msmt17 (no camera ids)"})
    shutil.copytree(reported, tmp_path / "r")
    (tmp_path / "r/evaluation_details.json").write_text(json.dumps(details))
    assert main([str(tmp_path / "r")]) == 0
    page = Page((tmp_path / "r/report/index.html").read_text())
    assert len(set(page.ids)) == len(page.ids)
    assert {"evaluation-0", "evaluation-1", "lists-1", "confused-1"} <= set(page.ids)


def test_queries_are_chosen_by_ap():
    ap = np.array([0.5, np.nan, 0.1, 0.9, 0.3, 0.7, 1.0])
    chosen = choose_queries(ap, seed=0, num=2)
    assert chosen["worst"] == [2, 4] and chosen["median"] == [0, 5]
    assert 1 not in chosen["random"] and chosen["random"] == choose_queries(ap, seed=0, num=2)["random"]
    drawn = {tuple(choose_queries(ap, seed=s, num=2)["random"]) for s in range(20)}
    assert len(drawn) > 5
    assert choose_queries(np.array([np.nan]), 0) == {"worst": [], "median": [], "random": []}


def test_confused_pairs_count_both_directions(pedestrians):
    test = build_index("market1501", str(pedestrians)).tests[0]
    assert isinstance(test, TestSet)
    pids = [test.gallery.pid_name(int(p)) for p in test.gallery.pids]
    asked = [test.query.pid_name(int(p)) for p in test.query.pids]
    first, second = 0, next(i for i, pid in enumerate(asked) if pid != asked[0])
    of = {pid: [j for j, p in enumerate(pids) if p == pid] for pid in set(pids)}
    a, b = asked[first], asked[second]
    third = next(pid for pid in of if pid not in (a, b))
    lists = [
        RankedList(
            first, np.array([of[b][0], of[a][0], of[third][0]]), np.array([0.1, 0.2, 0.3]), np.array([0, 1, 0], bool)
        ),
        RankedList(second, np.array([of[a][1], of[a][0]]), np.array([0.05, 0.2]), np.array([0, 0], bool)),
    ]
    most, other = confused_pairs(lists, test)
    assert most["pids"] == sorted([a, b]) and most["count"] == 3
    assert most["query"]["path"] == test.query.path(second) and most["answer"]["path"] == test.gallery.path(of[a][1])
    assert other["pids"] == sorted([a, third]) and other["count"] == 1


# --- built beside the training ----------------------------------------------------------------------------------------


class Fake(PageBuilder):
    """Runs `code` in place of the page's building."""

    code = ""

    def command(self):
        return [sys.executable, "-c", self.code, str(self.folder)]


def builder(folder, code):
    fake = Fake(folder)
    fake.code = code
    return fake


def test_one_page_is_built_at_a_time_and_the_newest_at_last(tmp_path):
    code = "import sys, time; time.sleep(0.3); open(sys.argv[1] + '/log', 'a').write('x')"
    page = builder(tmp_path, code)
    begin = time.monotonic()
    assert [line for _ in range(5) for line in page.build()] == []
    assert time.monotonic() - begin < 0.3
    assert page.finish() == [] and (tmp_path / "log").read_text() == "xx"  # the first, and once more for the rest


def test_a_page_that_fails_is_a_line(tmp_path, capsys):
    reporter = Reporter(tmp_path, True, page=builder(tmp_path, "raise ValueError('no such plot')"))
    reporter.show([], {"step": 1, "epoch": 1})
    reporter.close()
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("report: not built: ValueError: no such plot; python -m reid_dist.report ")


def test_the_real_building_says_why_it_failed_and_leaves_its_log(tmp_path):
    page = PageBuilder(tmp_path)
    assert page.build() == []
    [line] = page.finish()
    assert line.startswith("report: not built: ") and str(tmp_path) in line
    assert page.finish() == [] and page.log.exists()


def test_a_page_that_hangs_is_given_up(tmp_path):
    page = builder(tmp_path, "import time; time.sleep(60)")
    assert page.build() == []
    process, begin = page.process, time.monotonic()
    [line] = page.finish(0.2)
    assert "not ready after 0 s" in line and time.monotonic() - begin < 5 and process.returncode != 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the process on Linux only")
def test_a_page_is_not_built_any_longer_than_its_training_lives(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from reid_dist.report import PageBuilder, background\n"
        "background.BUILD = background.BUILD.replace('build_beside()', "
        "'import reid_dist.report.__main__ as m, time; m.main = lambda _: time.sleep(60); build_beside()')\n"
        "page = PageBuilder(Path(sys.argv[1])); page.build(); time.sleep(float(sys.argv[2]))\n"
        "print(page.process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    for seconds in ("0", "2"):  # killed before the process has got so far, and after
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path), seconds], capture_output=True, text=True)
        pid, deadline = int(done.stdout), time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            assert time.monotonic() < deadline, "the process outlives its training"
            time.sleep(0.05)


# --- reading and drawing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no metrics\.jsonl; expected the folder of a run"),
        ({"metrics.jsonl": '{"event": "train"}\n', "result.json": "{"}, r"result\.json: no JSON"),
    ],
)
def test_what_is_no_run_is_one_line_and_exit_code_2(tmp_path, capsys, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert main([str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("reid_dist: error: ") and re.search(message, line)


def test_a_half_line_and_a_loss_that_was_not_finite_are_drawn_around(tmp_path):
    lines = [{"event": "train", "epoch": 1, "step": s, "loss": None if s == 2 else s / 2, "lr": 0.1} for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"event": "tr')
    assert [e["step"] for e in read_run(tmp_path).train] == [1, 2, 3]
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report/index.html").read_text()
    assert "sum: 0.5 at first, 1.5 at last" in text and "No evaluation yet" in text


def test_text_from_files_is_no_markup(tmp_path):
    event = {"event": "eval", "epoch": 1, "step": 1, "dataset": "<b>&", "seconds": 1.0}
    event |= dict.fromkeys(("mAP", "rank1", "rank5", "rank10", "mINP"), 0.5)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(event))
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report/index.html").read_text()
    assert "<b>&" not in text and "&lt;b&gt;&amp;" in text


def test_long_curves_are_thinned_to_means():
    line = Line("a", np.arange(10_000.0), np.where(np.arange(10_000) % 2, 1.0, np.nan))
    few = thin(line)
    assert len(few.x) == 400 and few.y.min() == few.y.max() == 1.0 and few.x.mean() == pytest.approx(line.x.mean())
    assert len(curves("t", [line], "step")) < 40_000
    assert curves("t", [Line("a", np.arange(3.0), np.full(3, np.nan))], "step") == ""


def test_durations_are_read_as_people_say_them():
    assert [duration(s) for s in (0.4, 48, 200, 7500, 97200, 86400)] == [
        "under 1 s", "48 s", "3 min 20 s", "2 h 5 min", "1 d 3 h", "1 d",
    ]  # fmt: skip


def test_speed_and_waiting_are_judged_once_after_twenty_steps(tmp_path, capsys):
    reporter = Reporter(tmp_path, True, steps_per_epoch=100, num_steps=1000, batch=64)
    event = {"loss": 1.0, "acc": 0.5, "images_per_s": 32.0, "data_wait": 0.35, "lr": 0.1}
    for step in range(1, 61):
        reporter.progress(1, step, event | {"step": step} if step % 10 == 0 else None)
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("epoch")]
    assert said[0] == "speed     3 min 20 s an epoch, 32 min 40 s to the end, evaluations aside"
    assert said[1].startswith("warning   35% of the time the network waits for images") and len(said) == 2


def test_pictures_are_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    split = Split(("people",), np.array([b"train/anna/hall_1.jpg"]), np.array([7]), np.array([0]))
    assert image(split, 0) == {"path": f"{tmp_path}/people/train/anna/hall_1.jpg", "pid": "7", "camera": "0"}


def test_one_hiccup_is_no_waiting_for_images(tmp_path, capsys):
    reporter = Reporter(tmp_path, True, steps_per_epoch=100, num_steps=1000, batch=64)
    event = {"loss": 1.0, "acc": 0.5, "images_per_s": 32.0, "lr": 0.1}
    for step in range(1, 101):
        wait = 0.66 if step == 30 else 0.01
        reporter.progress(1, step, event | {"step": step, "data_wait": wait} if step % 10 == 0 else None)
    assert "waits for images" not in capsys.readouterr().out


def test_of_equally_good_evaluations_the_one_with_the_better_map_is_the_best():
    events = [{"rank1": r, "mAP": m} for r, m in ((0.9, 0.95), (1.0, 0.8), (1.0, 0.9), (1.0, 0.9))]
    assert best_of(events, "rank1") is events[2] and best_of(events, "mAP") is events[0]


def test_the_page_of_a_folder_that_was_moved_says_which_pictures_are_gone(reported, tmp_path):
    details = json.loads((reported / "evaluation_details.json").read_text())
    details["sets"][0]["queries"]["worst"][0]["path"] = "/nowhere/1.jpg"
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / name).write_bytes((reported / name).read_bytes())
    (tmp_path / "evaluation_details.json").write_text(json.dumps(details))
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report/index.html").read_text().count("the file is gone") >= 1
