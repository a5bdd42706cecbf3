"""Progress where there is no terminal: a line per stage and every half minute, by a clock of the test's own."""

from __future__ import annotations

import io
import sys
from unittest.mock import patch

import pytest
from rich.console import Console

import modekit.cli.progress as progress_module
from modekit.cli.progress import Lines, drawn_progress


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_line_per_stage_and_every_half_minute(clock: Clock) -> None:
    said: list[str] = []
    lines = Lines(said.append, clock)
    lines("build", 0, 100)
    for second in range(1, 61):
        clock.now += 1
        lines("build", second, 100)
    clock.now += 1
    lines("solve logistic", 1, 4)
    assert said == [
        "0:00  build: 0 %",
        "0:30  build: 30 %, 1:10 left",
        "1:00  build: 60 %, 0:40 left",
        "1:01  solve logistic: 25 %",
    ]


def test_a_stage_that_reports_nothing_is_still_seen(clock: Clock) -> None:
    said: list[str] = []
    lines = Lines(said.append, clock)
    for _ in range(61):
        clock.now += 1
        lines.tick()
    lines("train", 1, 10)
    clock.now += 45
    lines.tick()
    lines.tick()
    assert said == ["0:30  starting", "1:00  starting", "1:01  train: 10 %", "1:46  train: 10 %"]


def test_stages_that_share_their_work_share_the_estimate(clock: Clock) -> None:
    """Rows of a table count what all of them read; what a known row skips is not counted as speed."""
    said: list[str] = []
    lines = Lines(said.append, clock)
    lines("score base", 400, 1000)  # known from before
    clock.now += 10
    lines("score law", 500, 1000)
    clock.now += 30
    lines("score law", 800, 1000)
    assert said == ["0:00  score base: 40 %", "0:10  score law: 50 %, 0:50 left", "0:40  score law: 80 %, 0:20 left"]


def test_a_stage_that_begins_anew_is_timed_anew(clock: Clock) -> None:
    said: list[str] = []
    lines = Lines(said.append, clock)
    lines("compare", 90, 100)
    clock.now += 300
    lines("compare", 1, 100)
    clock.now += 30
    lines("compare", 11, 100)
    assert said[-1] == "5:30  compare: 11 %, 4:27 left"


def test_stages_that_go_on_at_once_are_said_once_each(clock: Clock) -> None:
    lines: list[str] = []
    draw = Lines(lines.append, clock)
    for step in range(100):
        clock.now += 0.1
        draw("train law", step, 100)
        draw("train code", step, 100)
    assert [line.split()[2] for line in lines] == ["law:", "code:"]
    clock.now += 30
    draw("train law", 100, 100)
    assert len(lines) == 3


def test_lines_go_to_the_standard_error_and_hold_no_control_characters() -> None:
    stream = io.StringIO()
    with patch.object(progress_module, "err", Console(file=stream, width=40)), drawn_progress() as progress:
        progress("read [medicine] " + "long " * 20, 1, 2)
    assert stream.getvalue() == "0:00  read [medicine] " + "long " * 19 + "long : 50 %\n"


def test_a_terminal_gets_bars(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True)
    with patch.object(progress_module, "err", console), drawn_progress() as progress:
        progress("score base", 1, 4)
        progress("score law", 2, 4)
    assert "━" in stream.getvalue() and "left" in stream.getvalue()
    assert capsys.readouterr().out == "" and sys.stdout is not stream
