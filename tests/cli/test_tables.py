"""Every table, at several widths and in a file: nothing is cut off, wrapped where it must not be, or coloured."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Some
from typing import Any
from unittest.mock import patch

import pytest
from rich.console import Console

import modekit.cli.data as data
import modekit.cli.mixtures as mixtures
import modekit.cli.printing as printing
import modekit.cli.training as training
from modekit.building.preview import Preview
from modekit.cli.printing import console_for
from modekit.evaluation.forced_results import ForcedExpert, ForcedExperts
from modekit.evaluation.inspection.result import Inspection, Usage
from modekit.evaluation.results import Results, Row, Score
from modekit.evaluation.tables import Cell, ResultTable
from modekit.evaluation.tasks.results import Estimate, TaskResults, TaskScores
from modekit.experts.corpus.balance import Balanced, BalancedDomain, BalanceSettings, Share
from modekit.experts.corpus.tokenizer import Fertility, TrainedTokenizer
from modekit.files.figures import three_digits
from modekit.planning.shape import RouterPosition

NAMES = [f"{letter}-expert_" + "long_name_" * 5 + "of64" for letter in "abcdefgh"]
WIDTHS = (60, 80, 200)
TOLD = "mixture, right label"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """What a drawing gives on a terminal of a width, or in a file (width None)."""

    def draw(width: int | None, drawing: Callable[..., None], *arguments: Any) -> str:
        stream = io.StringIO()
        if width is None:
            with patch("sys.stdout", stream):
                console = console_for()
        else:
            console = Console(file=stream, width=width, force_terminal=True, color_system="truecolor", legacy_windows=False)
        console.file = stream
        monkeypatch.setattr(printing, "out", console)
        drawing(*arguments)
        return stream.getvalue()

    yield draw


def plain(text: str) -> str:
    from rich.text import Text

    return Text.from_ansi(text).plain


def check_whole(shown: Callable[..., str], cells: list[str], drawing: Callable[..., None], *arguments: Any) -> None:
    """Every name and figure is there at every width, and no line is wider."""
    for width in WIDTHS:
        text = plain(shown(width, drawing, *arguments))
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width, text
        together = "".join(text.split())
        assert all("".join(cell.split()) in together or width < 200 for cell in cells)
        figures = [cell for cell in cells if cell[0].isdigit()]
        assert [cell for cell in figures if cell not in text.replace("*", " ")] == []
    text = shown(None, drawing, *arguments)
    assert "\x1b" not in text and "…" not in text and "\r" not in text
    lines = text.splitlines()
    assert [cell for cell in cells if not any(cell in line for line in lines)] == []


def results() -> Results:
    scores = {name: Score(10.1234 + place) for place, name in enumerate(NAMES)}
    rows = [Row(name, "expert", 123_456_789_000, 98_765_432_100, scores, "x") for name in ["base", *NAMES, "mixture"]]
    rows.append(Row(TOLD, "label", 123_456_789_000, 98_765_432_100, {name: scores[name] for name in NAMES[:7]}, "x"))
    return Results(rows, NAMES[:7], NAMES[7:], notes=["a note " * 20])


def test_eval(shown: Callable[..., str]) -> None:
    cells = [*NAMES, "10.123", "17.123", "24919.4", "13.123", "123.46B", "98.77B", "mixture", TOLD]
    check_whole(shown, cells, printing.print_result, results())
    assert "10.123 / 24919.4" in shown(None, printing.print_result, results())


def test_plan(shown: Callable[..., str]) -> None:
    figures = {
        "architecture": "ModekitForCausalLM",
        "also_runs_in": "transformers alone",
        "why": "why " * 40,
        "method": "routing",
        "experts": {name: f"./{name}" for name in NAMES},
        "chosen": "top_k 2",
        "router": "logistic",
        "router_why": "",
        "backbone": "base",
        "parameters": {"total": 10**12, "active": 10**11},
        "tensors": 1113,
        "shards": 3,
        "dtype": "bfloat16",
        "bytes": {"written": 10**12, "statistics": 10**9},
        "disk": {"needed": 1, "free": 2},
        "memory": {"build": 1, "fit": 2, "load": 3},
        "notes": ["note " * 40],
    }
    preview = Preview.model_validate(figures)
    check_whole(shown, ["1000.00B total"], mixtures.print_plan, preview)
    for name in NAMES:
        assert name in "".join(plain(shown(80, mixtures.print_plan, preview)).split())


def test_verify(shown: Callable[..., str]) -> None:
    row = ["copied tensors", "proven", "1113 tensors compared byte by byte with their sources " * 4]
    checks = ResultTable("", ["check", "verdict", "detail"], [row], prose=True)
    check_whole(shown, ["copied tensors", "proven"], printing.print_table, checks)
    text = plain(shown(80, printing.print_table, checks)).splitlines()
    assert text[1].startswith("copied tensors  proven   1113 tensors") and text[2].startswith(" " * 24)


def test_forced(shown: Callable[..., str]) -> None:
    figures = (0.000002346, 0.25, 12.3456, 12.3456, 13.4567)
    rows = [ForcedExpert(name, name, "PEFT", 10, 12.3, *figures) for name in NAMES]
    found = ForcedExperts(rows, notes=["a note " * 20], checkpoint={})
    check_whole(shown, [*NAMES, "2.35e-06", "9.38e-06", "12.3", "12.3456", "13.4567"], printing.print_result, found)
    small = ForcedExperts([replace(rows[0], expert="medicine", text="medicine")], checkpoint={})
    table = plain(shown(80, printing.print_result, small)).splitlines()[-1]
    assert table.split() == ["medicine", "medicine", "2.35e-06", "9.38e-06", "12.3", "12.3456", "12.3456", "13.4567"]


def test_training(shown: Callable[..., str]) -> None:
    losses = {name: {"before": 3.1234, "after": 2.9876} for name in NAMES}
    done = Some(record=Some(select_loss=losses, notes=[], parameters=10, steps=1, tokens=5), results=results(), improved=True)
    check_whole(shown, [*NAMES, "3.1234", "2.9876"], training.print_training, "OUT", done)


def test_tasks(shown: Callable[..., str]) -> None:
    rows = {name: Estimate(0.1234, 0.01) for name in ["base", *NAMES, "mixture"]}
    scores = TaskScores(metric="acc", higher_is_better=True, items=1234, rows=rows)
    found = TaskResults(dict.fromkeys(NAMES, scores), checkpoint={})
    check_whole(shown, [*NAMES, "0.123 ± 0.010", "1234"], printing.print_result, found)


def inspection_of(experts: list[str], layers: list[int | str]) -> Inspection:
    size, routers = len(experts), len(layers)
    weights = [[0.123] * size] * routers
    usage = {"shares": weights, "chosen": weights, "agreement": [0.5] * routers, "loss": 12.345}
    usage |= {"entropy": [1.25] * routers, "without": dict.fromkeys(experts, 0.456)}
    return Inspection(
        checkpoint={},
        experts=experts,
        routers=[RouterPosition("gate", layer, "mlp") for layer in layers],
        per_domain={name: Usage(**usage, expert=name) for name in experts},
        similarity=[[0.789] * size] * size,
        top_tokens={},
        texts=[],
        notes=[],
    )


def test_inspect(shown: Callable[..., str]) -> None:
    found = inspection_of(NAMES, [0, 1, 2])
    check_whole(shown, [*NAMES, "0.12 (0.12)", "12.345", "0.79"], printing.print_result, found)


def test_data(shown: Callable[..., str]) -> None:
    share = Share(found_tokens=9_876_543, documents=99_999, tokens=8_999_999)
    splits = {"train": share, "validation": share}
    found = Balanced(
        settings=BalanceSettings(common=True),
        tokenizer="./TOKENIZER",
        diff_percent={"train": 4.9, "validation": 3.9},
        domains=[BalancedDomain(name=name, text=f"./{name}", duplicates=17, splits=splits) for name in NAMES[:4]],
    )
    check_whole(shown, [*NAMES[:4], "99,999", "8,999,999", "8.9%"], data.print_balanced, found, Path("OUT"))
    size = {"documents": 1_234, "bytes": 5_678_900, "per_1000_bytes": 217.4}
    other = {"per_word": 1_250.8, "against_per_1000_bytes": 413.1, "change": -0.474}
    fertilities = [Fertility(name=name, **size, **other) for name in NAMES[:4]]
    about = {"vocabulary": 31_999, "against": NAMES[4]}
    trained = TrainedTokenizer(**about, domains=fertilities, notes=["a note " * 20])
    check_whole(shown, [*NAMES[:4], "5,678.9", "217.4", "413.1", "-47.4%"], data.print_tokenizer, trained, Path("OUT"))


def test_without_bold_a_sign_marks_and_figures_stay_aligned(shown: Callable[..., str]) -> None:
    rows = [["a", Cell("1.000", own=True), "2.000"], ["b", "3.000", Cell("4.000", own=True)]]
    drawn = shown(None, printing.print_table, ResultTable("", ["", "law", "code"], rows))
    assert drawn.splitlines() == ["      law    code", "a  *1.000   2.000", "b   3.000  *4.000"]


def test_names_are_shown_and_not_obeyed(shown: Callable[..., str]) -> None:
    said = shown(None, printing.print_table, ResultTable("", ["", "x"], [["[red]a[/]\x1b[31m", "\x07"]]))
    assert "[red]a[/]\\x1b[31m" in said and "\x1b" not in said and "\x07" not in said


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0"), (0.000712, "0.000712"), (0.5, "0.500"), (1.2345, "1.23"), (123.4, "123"), (1e-9, "1.00e-09")],
)
def test_small_figures_keep_their_digits(value: float, said: str) -> None:
    assert three_digits(value) == said
