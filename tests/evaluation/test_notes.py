"""What is said below a table: gaps within the noise, and what labels are worth."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest

from modekit.cli import printing
from modekit.cli.printing import console_for, print_result
from modekit.demo.demo import DemoResults
from modekit.evaluation.results import Results, Row, Score, gapless_notes, label_notes, with_gaps
from modekit.report.sections import gap_chart


def row(name: str, loss: float, jitter: float = 0.0, gap: float | None = None) -> Row:
    """Four blocks of ten tokens each around a mean loss."""
    blocks = tuple(10 * (loss + (jitter if place % 2 else -jitter)) for place in range(4))
    kind = "base" if name == "base" else "mixture" if name == "mixture" else "expert"
    return Row(name, kind, 1, 1, {"general": Score(loss, gap_closed=gap, blocks=blocks)}, "")


def test_a_gain_within_the_noise_has_no_gap_closed_but_a_sentence() -> None:
    """An expert that is barely trained: its text decides by chance whether it is better than the base."""
    for jitter, shown in ((0.001, True), (0.2, False)):
        rows = [row("base", 3.60), row("general", 3.55, jitter), row("mixture", 3.56)]
        gaps = {each.name: each.scores["general"].gap_closed for each in with_gaps(rows, ["general"])}
        assert gaps["mixture"] == (pytest.approx(0.8) if shown else None)
        notes = list(gapless_notes(rows, ["general"]))
        assert bool(notes) != shown and all("the noise, in nats per token: general 0.050" in note for note in notes)


def test_where_gains_are_noise_demo_and_report_show_no_gap_either(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("base", 3.60), row("general", 3.55, 0.2), replace(row("mixture", 3.56), name="oracle", kind="oracle")]
    rows = with_gaps([*rows, row("mixture", 3.56)], ["general"])
    results = Results(rows, ["general"], [], notes=list(gapless_notes(rows, ["general"])))
    demo = DemoResults({seed: {"lexical": results} for seed in (0, 1)}, 1.0)
    assert demo.summary()["lexical"]["gap_closed"] is None and gap_chart(results) == ""
    for shown in (results, demo.merged(1)):
        drawn = io.StringIO()
        monkeypatch.setattr(printing, "out", console_for(file=drawn, width=80, force_terminal=True, color_system=None))
        print_result(shown)
        said = drawn.getvalue()
        assert "no more than the noise, in nats per token: general 0.050" in " ".join(said.split())
        assert all(len(line) <= 80 for line in said.splitlines())


def told_row(name: str, losses: dict[str, float], *, jitter: float = 0.0, without: tuple[str, ...] = ()) -> Row:
    """Rows as `row` makes them, of several domains; of those `without` blocks nothing is known but the loss."""
    scores = {
        each: Score(loss, blocks=() if each in without else row(name, loss, jitter).scores["general"].blocks)
        for each, loss in losses.items()
    }
    return Row(name, "label" if "label" in name else "mixture", 1, 1, scores, "")


@pytest.mark.parametrize("unknown", [(), ("law",), ("general", "law")])
def test_what_a_label_is_worth_has_an_error_only_where_all_domains_have_one(unknown: tuple[str, ...]) -> None:
    losses = {"general": 3.0, "law": 2.0}
    rows = [
        told_row("mixture", losses, jitter=0.3, without=unknown),
        told_row("mixture, right label", {key: value - 0.5 for key, value in losses.items()}, without=unknown),
    ]
    (note,) = label_notes(rows, ["general", "law"])
    # The jackknife of means that differ by 0.5 +- 0.3 in turn, over four blocks, and of the mean of two such domains.
    error = math.sqrt(3 / 4 * 4 * (0.3 / 3) ** 2) / math.sqrt(2)
    assert f"a gain of +0.500{'' if unknown else f' ± {error:.3f}'} nats per token over none" in note
