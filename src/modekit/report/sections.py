"""What a report shows, in its order: sections of tables, charts, text and notes, made from the results and the record.

The chart is SVG, coloured by the page's style. It is as wide as the page, from a phone's on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import yaml
from markupsafe import Markup

from modekit.checkpoint.carried import lost_by
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import STATISTICS_FOLDER
from modekit.evaluation.forced_results import ForcedExperts
from modekit.evaluation.inspection.result import Inspection, TokenTrace
from modekit.evaluation.results import Kind, Results, Row
from modekit.evaluation.results_folder import Result
from modekit.evaluation.tables import ResultTable
from modekit.evaluation.tasks.results import TaskResults
from modekit.evaluation.translation.results import TranslationResults
from modekit.files.figures import bytes_of, count_of, or_dash
from modekit.members.licences import Source, facts, sources_of

Block = ResultTable | Markup | str
"""A table, a chart, or a paragraph."""
_MOST_SAMPLES = 32  # texts, so that a page stays below 2 MB
_GAPS = (
    "How much of the way from the base model (0, solid line) to each domain's own expert (1, dashed line) is closed on "
    "held-out text. The oracle gives every text to its domain's own expert; a mixture can pass it."
)
_RECIPE = Markup(
    "<details><summary>Recipe (sha256 {})</summary>"
    '<div class="box" tabindex="0" role="region" aria-label="Recipe"><pre>{}</pre></div></details>'
)
_OTHERS: tuple[tuple[str, type[Result]], ...] = (
    ("Each expert and its own model", ForcedExperts),
    ("Tasks", TaskResults),
    ("Translations", TranslationResults),
)


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading; `notes` stand at its end."""

    title: str
    blocks: Sequence[Block]
    notes: Sequence[str]

    @property
    def anchor(self) -> str:
        """What a link to it says."""
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Sample:
    """A text shown word by word. `tokens`: of each its text, its look by the expert that leads, and what is said of it."""

    domain: str
    loss: float
    tokens: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Content:
    """What a report shows. `missing`: what there is no result of, and which command makes it."""

    results: Results | None
    sections: Sequence[Section]
    samples: Sequence[Sample]
    missing: list[str]


def make_content(checkpoint: Checkpoint) -> Content:
    """Read what is there about a checkpoint; what is missing, or of another state of it, is left out."""
    missing: list[str] = []
    results = Results.find(checkpoint, missing)
    inspection = Inspection.find(checkpoint, missing)
    sections = []
    if results is not None:
        chart = gap_chart(results)
        sections.append(Section("Losses", [*([_GAPS, chart] if chart else []), *results.tables()], results.notes))
    if inspection is not None:
        sections.append(Section("Routing", inspection.tables(), inspection.notes))
    sections += _training(checkpoint)
    for title, kind in _OTHERS:
        if (found := kind.find(checkpoint, missing)) is not None:
            sections.append(Section(title, found.tables(), found.notes))
    sections += [_size(checkpoint), _sources(checkpoint)]
    return Content(results, sections, samples_of(inspection), missing)


def _training(checkpoint: Checkpoint) -> list[Section]:
    """What each training changed."""
    blocks: list[Block] = []
    for place, record in enumerate(checkpoint.record.training, 1):
        losses = record.select_loss.items()
        rows = [[name, *(or_dash(loss.get(when), ".4f") for when in ("before", "after"))] for name, loss in losses]
        what, towards = (", ".join(record.settings.get(key) or []) for key in ("what", "losses"))
        much = f"{count_of(record.parameters)} parameters, {record.steps} steps, {record.tokens:,} tokens"
        said = f"{what}; loss: {towards}; {much}. Held-out loss by which states were compared (select split)."
        blocks.append(ResultTable(f"Training {place}", ["domain", "before", "after"], rows, said))
    notes = [note for record in checkpoint.record.training for note in record.notes]
    return [Section("Training", blocks, notes)] if blocks else []


def _size(checkpoint: Checkpoint) -> Section:
    size = checkpoint.parameters
    weights = sum(file.stat().st_size for file in {ref.file for ref in checkpoint.tensors.values()})
    kept = [path for path in (checkpoint.folder / STATISTICS_FOLDER).glob("*.safetensors") if path.is_file()]
    gates = sum(checkpoint.tensors[slot.name].numel for slot in checkpoint.slots)
    rows = [
        ["parameters", count_of(size.total), f"{size.total / size.dense:.2f}"],
        ["active per token", count_of(size.active), f"{size.active / (size.dense - size.idle):.2f}"],
        [f"gates of {len(checkpoint.slots)} routers", count_of(gates), ""],
        ["weights on disk", bytes_of(weights), ""],
        ["statistics on disk", bytes_of(sum(path.stat().st_size for path in kept)), ""],
    ]
    said = "Statistics are kept for later fits and may be deleted."
    return Section("Size", [ResultTable("Size", ["what", "how much", "of the base model"], rows, said)], lost_by(checkpoint))


def _sources(checkpoint: Checkpoint) -> Section:
    record = checkpoint.record
    sources = sources_of(checkpoint)
    read = [(s, name, file) for s in record.sources for name, file in s.files.items()]
    files = [[s.label, f"{s.spec}/{name}", bytes_of(file.size), file.blake3] for s, name, file in read]
    recipe = yaml.safe_dump(record.model_dump(mode="json")["recipe"], sort_keys=False, allow_unicode=True, width=100)
    blocks: list[Block] = [
        licence_table(sources),
        ResultTable("Files read", ["source", "file", "size", "blake3"], files, detail=True, prose=True),
        _RECIPE.format(record.recipe_digest, recipe),
    ]
    return Section("Sources and licences", blocks, [*facts(sources), *(f"{each.on}: {each.said}" for each in record.history)])


def licence_table(sources: Sequence[Source]) -> ResultTable:
    """What every source says."""
    rows = [[each.used_as, each.spec, each.revision or "-", each.licence, each.found_in] for each in sources]
    titles = ["used as", "model", "revision", "licence", "found in"]
    return ResultTable("Licences", titles, rows, "As each source states it.", prose=True)


def samples_of(inspection: Inspection | None) -> list[Sample]:
    """The first text of each domain."""
    if inspection is None or not inspection.routers:
        return []
    first: dict[str, TokenTrace] = {}
    for text in inspection.texts:
        first.setdefault(str(text.domain), text)
    shown = list(first.items())[:_MOST_SAMPLES]
    return [Sample(domain, text.loss, list(_tokens(text, inspection.experts))) for domain, text in shown]


def _tokens(text: TokenTrace, experts: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Each token's text, its look, and what is said of it."""
    for place, token in enumerate(text.tokens):
        weights = [fmean(each) for each in zip(*(rows[place] for rows in text.weights), strict=True)]
        largest = max(weights)
        leader = weights.index(largest)
        look = f"e{leader % 8} s{min(4, 1 + int(4 * largest))}"
        yield token.text, look, f"{experts[leader]} {largest:.2f}, loss {or_dash(token.loss, '.2f')}"


_SHOWN: tuple[Kind, ...] = ("average", "oracle", "mixture")
"""Rows of the table whose gaps are drawn; 0 is the base and 1 the own expert."""
_WIDTH = 400
_LINE, _NAMES, _FIGURES = 17, 104, 84  # of bars: height of a line, room for names and for figures
_NOTHING = 0.02  # of the largest difference: less has no colour
_LONGEST = 17  # characters of a name that a picture has room for


def shade(value: float | None) -> str:
    """Class of a share's colour: ten steps of one hue, dark is much."""
    return "" if value is None else f"q{min(9, max(0, int(value * 10)))}"


def tint(value: float | None) -> str:
    """Class of a difference's colour, from -1 to 1: five steps to each side of nothing."""
    if value is None:
        return ""
    return "d0" if abs(value) < _NOTHING else f"{'dp' if value > 0 else 'dn'}{math.ceil(min(1.0, abs(value)) * 5 - 1e-9)}"


def gap_chart(results: Results) -> Markup:
    """Per domain of which a gap is known, and for their mean: bars of weight average, oracle and mixture."""
    groups: list[tuple[str, list[tuple[Row, float, float | None]]]] = []
    for name in results.domains:
        scores = [(row, row.scores[name]) for row in results.rows if row.kind in _SHOWN and name in row.scores]
        known = [(row, score.gap_closed, score.gap_error) for row, score in scores if score.gap_closed is not None]
        groups += [(name, known)] if known else []
    if len(groups) > 1:
        means = [(row, row.mean_gap(results.domains)) for row in results.rows if row.kind in _SHOWN]
        of_mean = [(row, mean, row.mean_gap_error(results.domains)) for row, mean in means if mean is not None]
        groups.append(("mean", of_mean))
    ends = [value + sign * (error or 0.0) for _, known in groups for _, value, error in known for sign in (-1, 1)]
    low, high = max(-2.0, min([0.0, *ends])) - 0.03, min(3.0, max([1.0, *ends])) + 0.03
    parts, y = list[str](), 0
    for name, known in groups:
        parts.append(_text(0, y + 12, _short(name), "strong"))
        for row, value, error in known:
            y += _LINE
            said = f"{value:.2f}" + ("" if error is None else f" ±{error:.2f}")
            parts += [_text(8, y + 12, _short(row.name)), _text(_WIDTH - _FIGURES + 6, y + 12, said)]
            parts += _bar(y, value, error or 0.0, row.kind, (low, high))
        y += _LINE + 5
    said = "Gap closed per domain, with standard errors; the table below has the figures"
    head = f'<svg class="chart" viewBox="0 0 {_WIDTH} {y}" role="img" aria-label="{said}">'
    return Markup(head + "".join(parts) + "</svg>") if parts else Markup("")


def _bar(y: int, value: float, error: float, kind: str, span: tuple[float, float]) -> Iterator[str]:
    """A bar from 0, its marks at 0 and 1, and a whisker."""
    low, high = span

    def x(at: float) -> float:
        return _NAMES + (min(max(at, low), high) - low) / (high - low) * (_WIDTH - _NAMES - _FIGURES)

    left, right = sorted((x(0.0), x(value)))
    yield f'<rect class="of-{kind}" x="{left:.1f}" y="{y + 3}" width="{right - left:.1f}" height="10"/>'
    yield f'<path class="mark" d="M{x(0):.1f} {y}v16"/><path class="mark one" d="M{x(1):.1f} {y}v16"/>'
    if error > 0:
        yield f'<path class="whisker" d="M{x(value - error):.1f} {y + 5}v6m0 -3H{x(value + error):.1f}m0 -3v6"/>'


def _text(x: float, y: float, text: str, look: str = "") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(look, x, y, text)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 7]}…{name[-6:]}"
