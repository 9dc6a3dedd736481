"""The bar appears on a terminal and nowhere else."""

import io
import os
import pty
import re
import sys
import threading

from gptoss_dist.tracking import progress as progress_module
from gptoss_dist.tracking.progress import Progress


def train(stream, steps=20, **options):
    with Progress(steps, stream=stream, **options) as progress:
        progress.message("starting [not markup] " + "x" * 120)
        for step in range(1, steps + 1):
            progress.update(step, loss=3.25, tokens_per_s=5123.0, lr=3e-4)
    return progress


def test_piped_output_is_plain_lines_at_intervals(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    flushed = []

    class Pipe(io.StringIO):
        def flush(self):
            flushed.append(self.getvalue().count("\n"))

    stream = Pipe()
    with Progress(35, start=5, interval_s=10, stream=stream) as progress:
        for step in range(6, 36):
            clock[0] += 1
            progress.update(step, loss=3.25, tokens_per_s=5123.0, lr=3e-4)
    lines = stream.getvalue().splitlines()
    assert [int(re.search(r"step (\d+)/35", line)[1]) for line in lines] == [6, 16, 26, 35]
    assert re.fullmatch(
        r"\[\d\d:\d\d:\d\d\] step 16/35 \| loss 3\.2500 \| 5\.1k tokens/s \| lr 0\.0003 \| 0:00:19 left", lines[1]
    )
    assert "left" not in lines[-1]
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
    assert flushed == [1, 2, 3, 4], "each line leaves at once"


def test_messages_are_whole_lines_when_piped():
    stream = io.StringIO()
    train(stream, interval_s=3600)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and lines[0].endswith("starting [not markup] " + "x" * 120)


def test_terminal_gets_a_bar_and_messages_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    master, slave = pty.openpty()
    chunks = []

    def drain():
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # Linux reports the other end's closing so
                return
            if not chunk:
                return
            chunks.append(chunk)

    reader = threading.Thread(target=drain)
    reader.start()
    stdout = sys.stdout
    with open(slave, "w", buffering=1) as terminal:
        train(terminal)
        assert sys.stdout is stdout
    reader.join(10)
    os.close(master)
    text = b"".join(chunks).decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "\x1b[" in text and "━" in text, "a bar was drawn"
    assert "20/20" in plain and "loss 3.2500 | 5.1k tokens/s" in plain
    assert "starting [not markup] " + "x" * 120 in re.split(r"[\r\n]+", plain), "a line of its own"
    assert not re.search(r"\[\d\d:\d\d:\d\d\] step", plain), "no plain lines besides the bar"


def test_dumb_terminal_and_other_ranks(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    train(stream)
    assert "\x1b" not in stream.getvalue() and "step 20/20" in stream.getvalue()
    silent = Terminal()
    train(silent, enabled=False)
    assert silent.getvalue() == ""


def test_a_closed_pipe_does_not_end_training():
    class Pipe(io.StringIO):
        writes = 0

        def write(self, text):
            self.writes += 1
            raise BrokenPipeError

    stream = Pipe()
    train(stream, interval_s=0)
    assert stream.writes == 1, "after the first failure nothing more is tried"
