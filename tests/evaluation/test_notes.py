"""What is said below a table: gaps within the noise, and what labels are worth."""

from __future__ import annotations

import io
import math
import operator
from dataclasses import replace

import pytest

from modekit.cli import printing
from modekit.cli.printing import console_for, print_result
from modekit.demo.demo import DemoResults
from modekit.evaluation.results import Results, Row, Score, difference, gapless_notes, label_notes, with_gaps
from modekit.report.sections import gap_chart

DOMAINS = ["law", "code", "art"]


def row(name: str, loss: float, jitter: float = 0.0, gap: float | None = None) -> Row:
    """Four blocks of ten tokens each around a mean loss."""
    blocks = tuple((10 * (loss + (jitter if place % 2 else -jitter)), 10) for place in range(4))
    kind = "base" if name == "base" else "mixture" if name == "mixture" else "expert"
    return Row(name, kind, 1, 1, {"general": Score(loss, gap_closed=gap, blocks=blocks)}, "")


def test_a_gain_within_the_noise_has_no_gap_closed_but_a_sentence() -> None:
    """An expert that is barely trained: its text decides by chance whether it is better than the base."""
    for jitter, shown in ((0.001, True), (0.2, False)):
        rows = [row("base", 3.60), row("general", 3.55, jitter), row("mixture", 3.56)]
        gaps = {each.name: each.scores["general"].gap_closed for each in with_gaps(rows, ["general"])}
        assert gaps["mixture"] == (pytest.approx(0.8) if shown else None)
        notes = list(gapless_notes(rows, ["general"]))
        assert bool(notes) != shown and all("two standard errors: general +0.050 ± 0.115" in note for note in notes)


def test_blocks_weigh_by_their_tokens() -> None:
    """A long part in which two models are alike, and a short one in which they are not."""
    losses, tokens = ((2.0, 2.0), (2.0, 5.0)), (95, 5)
    one, other = (
        Score(
            sum(map(operator.mul, each, tokens)) / 100, blocks=tuple(zip(map(operator.mul, each, tokens), tokens, strict=True))
        )
        for each in zip(*losses, strict=True)
    )
    apart, error = difference(other, one)
    assert apart == pytest.approx(0.15)
    assert error == pytest.approx(1.5)  # without the long part 3, without the short one 0


def test_every_mean_gap_closed_is_of_the_same_domains_and_says_how_many() -> None:
    """Of three domains one has no own expert better than the base, and one row was not scored on all."""
    losses = {
        "base": (3.0, 3.0, 3.0),
        "law": (2.0, 3.1, 3.5),
        "code": (3.4, 2.0, 3.5),
        "art": (3.0, 3.0, 2.999),
        "mixture": (2.5, 2.2, 3.9),
    }
    rows = [
        replace(
            row(name, 1.0),
            scores={domain: row(name, loss).scores["general"] for domain, loss in zip(DOMAINS, each, strict=True)},
        )
        for name, each in losses.items()
    ]
    part = replace(rows[-1], name="mixture, wrong label", kind="label", scores={"law": rows[-1].scores["law"]})
    results = Results(with_gaps([*rows, part], DOMAINS), DOMAINS, [], notes=list(gapless_notes(rows, DOMAINS)))
    assert results.row("mixture").mean_gap(DOMAINS) == pytest.approx((0.5 + 0.8) / 2)
    assert results.row("mixture, wrong label").mean_gap(DOMAINS) is None
    assert "gap closed\n(2 of 3 domains)" in results.tables()[0].header
    assert len(results.notes) == 1 and "leaves out" in results.notes[0] and "art +0.001" in results.notes[0]
    (unknown,) = gapless_notes(rows[1:], DOMAINS)
    assert "leaves out law, code, art" in unknown


def test_a_gain_of_unknown_error_is_no_gap() -> None:
    """One piece of text tells nothing of how sure a gain is."""
    rows = [
        replace(row(name, 0.0), scores={"law": Score(loss, blocks=((10 * loss, 10),))})
        for name, loss in (("base", 3.6), ("law", 3.0))
    ]
    assert with_gaps(rows, ["law"])[1].scores["law"].gap_closed is None
    assert "law +0.600;" in next(gapless_notes(rows, ["law"]))


def test_where_gains_are_noise_demo_and_report_show_no_gap_either(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("base", 3.60), row("general", 3.55, 0.2), replace(row("mixture", 3.56), name="oracle", kind="oracle")]
    rows = with_gaps([*rows, row("mixture", 3.56)], ["general"])
    results = Results(rows, ["general"], [], notes=list(gapless_notes(rows, ["general"])))
    demo = DemoResults({seed: {"lexical": results} for seed in (0, 1)}, 1.0, {}, quick=False)
    assert demo.merged(1).row("lexical").mean_gap(["general"]) is None and gap_chart(results) == ""
    for shown in (results, demo.merged(1)):
        drawn = io.StringIO()
        monkeypatch.setattr(printing, "out", console_for(file=drawn, width=80, force_terminal=True, color_system=None))
        print_result(shown)
        said = drawn.getvalue()
        assert "or two standard errors: general +0.050 ± 0.115" in " ".join(said.split())
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
