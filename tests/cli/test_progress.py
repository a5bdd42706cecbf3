"""Progress where there is no terminal: a line per phase and every ten seconds, by a clock of the test's own."""

from __future__ import annotations

import ast
import io
import re
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from rich.console import Console

import modekit.cli.progress as progress_module
from modekit.cli.printing import console_for, print_json
from modekit.cli.progress import Lines, drawn_progress
from modekit.run import DETAIL
from refusal import run_python


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_line_per_phase_and_every_ten_seconds(clock: Clock) -> None:
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
        "0:10  build: 10 %, 1:30 left",
        *(f"0:{second}  build: {second} %, 1:{40 - second:02} left" for second in (20, 30, 40)),
        "0:50  build: 50 %, 0:50 left",
        "1:00  build: 60 %, 0:40 left",
        "1:01  solve logistic: 25 %",
    ]


def test_a_phase_that_reports_nothing_is_still_seen(clock: Clock) -> None:
    said: list[str] = []
    lines = Lines(said.append, clock)
    for _ in range(61):
        clock.now += 1
        lines.tick()
    lines("train", 1, 10)
    clock.now += 45
    lines.tick()
    lines.tick()
    starts = [f"0:{second:02d}  load the libraries" for second in (2, 12, 22, 32, 42, 52)]  # a sign within two seconds
    assert said == [*starts, "1:01  train: 10 %", "1:46  train: 10 %"]


def test_the_time_is_said_after_the_first_step_with_its_loss(clock: Clock) -> None:
    said: list[str] = []
    lines = Lines(said.append, clock)
    lines("train", 0, 10)
    clock.now += 20
    lines(f"train{DETAIL}loss 2.310", 1, 10)
    assert said == ["0:00  train: 0 %", "0:20  train: 10 %, 3:00 left, loss 2.310"]


def test_phases_that_share_their_work_share_the_estimate(clock: Clock) -> None:
    """Rows of a table count what all of them read; what a known row skips is not counted as speed."""
    said: list[str] = []
    lines = Lines(said.append, clock)
    lines("score base", 400, 1000)  # known from before
    clock.now += 10
    lines("score law", 500, 1000)
    clock.now += 30
    lines("score law", 800, 1000)
    assert said == [
        "0:00  score base: 40 %",
        "0:10  score law: 50 %, 0:50 left",
        "0:40  score law: 80 %, 0:20 left",
    ]


def test_lines_go_to_the_standard_error_have_80_columns_and_hold_no_control_characters() -> None:
    stream = io.StringIO()
    with patch.object(progress_module, "err", Console(file=stream, width=40)), drawn_progress() as progress:
        progress("read [medicine] " + "long " * 20, 1, 2)
    assert stream.getvalue() == "0:00  read [medicine] " + "long " * 6 + "l…: 50 %\n"


def test_a_terminal_gets_bars_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True)
    clock = iter(float(second) for second in range(0, 100_000, 10))
    with (
        patch.object(progress_module, "err", console),
        patch("modekit.cli.progress.time.monotonic", lambda: next(clock)),
        drawn_progress() as progress,
    ):
        progress("load a model", 0, 1)
        progress("score base", 1, 4)
        progress(f"score law{DETAIL}loss 1.2", 2, 4)
        progress("compare mixture-q8_0.gguf in llama.cpp", 1, 4)
        progress("compare mixture-q8_0.gguf in llama.cpp", 2, 4)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "━" in drawn and "score law, loss 1.2" in drawn and re.search(r"llama\.cpp ━.* 50%", drawn)
    assert all(len(line) <= 80 for line in re.split(r"[\r\n]", drawn))
    assert capsys.readouterr().out == "" and sys.stdout is not stream


def test_libraries_are_loaded_where_a_sign_is_given() -> None:
    """What a command imports outside of `running()` needs no torch: else it is silent for as long as that takes."""
    found = set[str]()

    def look(node: ast.AST, *, signs: bool) -> None:
        signs = signs or (isinstance(node, ast.With) and "running()" in {ast.unparse(each.context_expr) for each in node.items})
        if isinstance(node, ast.ImportFrom) and not signs and str(node.module).startswith("modekit."):
            found.add(str(node.module))
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            for child in ast.iter_child_nodes(node):
                look(child, signs=signs)

    for file in Path(progress_module.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith(("_", "print_")):  # which others call inside
                look(node, signs=False)
    assert len(found) > 10
    done = run_python(
        f"import sys\nfor name in {sorted(found)!r}:\n    __import__(name)\n    assert 'torch' not in sys.modules, name"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("rank", "said"), [("0", "done"), ("1", "")])
def test_of_processes_that_share_a_command_the_first_prints(
    rank: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    console_for().print("done")
    assert capsys.readouterr().out.strip() == said
    print_json("done")
    assert capsys.readouterr().out.strip().strip('"') == said
