"""Progress on a terminal: one line that moves for each epoch, other lines above it; nothing from other ranks."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

CODE = """
import sys
from pathlib import Path
from reid_dist.report import Reporter
reporter = Reporter(Path(sys.argv[1]), sys.argv[2] == "0", steps_per_epoch=40, num_steps=80, batch=64)
event = {"loss": 1.5, "acc": 0.5, "images_per_s": 320.0, "data_wait": 0.01, "lr": 0.1}
for step in range(1, 81):
    if step % 10 == 0:
        event = event | {"step": step, "loss": step / 10}
    reporter.progress(1 + (step - 1) // 40, 1 + (step - 1) % 40, event if step % 10 == 0 else None)
    if step == 55:
        reporter.say("a line of its own")
reporter.close()
"""


def on_a_terminal(folder, rank):
    """What a terminal of 120 columns gets of CODE on a rank."""
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", CODE, str(folder), str(rank)], stdout=its, stderr=its)
    os.close(its)
    got = b""
    while True:
        try:
            part = os.read(mine, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not part:
            break
        got += part
    os.close(mine)
    assert child.wait(30) == 0
    return got.decode()


def screen(text):
    """The lines that remain on the screen: a carriage return begins the line anew."""
    lines = []
    for line in text.replace("\x1b[A", "").split("\n"):
        shown = [part for part in line.rstrip("\r").split("\r") if part.strip()]
        lines += shown[-1:]
    return [line.rstrip() for line in lines]


def test_one_line_an_epoch_on_a_terminal(tmp_path):
    text = on_a_terminal(tmp_path, 0)
    lines = screen(text)
    assert [line for line in lines if not line.startswith("epoch")] == [
        "speed     8 s an epoch, 12 s to the end, evaluations aside",
        "a line of its own",
    ]
    bars = [line for line in lines if line.startswith("epoch")]
    assert len(bars) == 2, lines
    for epoch, bar in enumerate(bars, 1):
        assert re.match(rf"epoch {epoch} 100%\|.*\| 40/40 .*loss {4 * epoch}\.0000  acc 50\.0%  320 images/s", bar)
    assert text.count("\r") > 4  # it moved


def test_another_rank_says_nothing(tmp_path):
    assert on_a_terminal(tmp_path, 1) == ""
