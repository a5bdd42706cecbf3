"""The page: one file, of what the results say. Nothing is fetched, nothing of the data is ever code.

Text goes through autoescape, and the page has no script. The content security policy lets exactly its own style in, by its
hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.results_folder import RESULTS_FOLDER, write_results
from modekit.evaluation.tables import MIXTURE, ResultTable, cells_of
from modekit.files.figures import count_of
from modekit.report.card import facts_of
from modekit.report.sections import Content, make_content, shade, tint

PAGE_FILE = "report.html"


@dataclass(frozen=True)
class Report:
    """What was written; `notes` say what had to be left out and how to get it."""

    page: Path
    notes: Sequence[str]


def write_report(checkpoint: Checkpoint) -> Report:
    """Write OUT/results/report.html. Raises OutputError, OSError."""
    content = make_content(checkpoint)
    write_results(checkpoint, {PAGE_FILE: make_page(checkpoint, content).encode()})
    return Report(checkpoint.folder / RESULTS_FOLDER / PAGE_FILE, content.missing)


def make_page(checkpoint: Checkpoint, content: Content) -> str:
    """The HTML of a report."""
    style = files("modekit.report").joinpath("page.css").read_text(encoding="utf-8")
    page = _template().render(
        **facts_of(checkpoint),
        names=checkpoint.names,
        content=content,
        keys=_keys(checkpoint, content),
        is_table=lambda block: isinstance(block, ResultTable),
        is_chart=lambda block: isinstance(block, Markup),
        cells_of=cells_of,
        legend=_legend,
        shade=shade,
        tint=tint,
        marked=MIXTURE,
        style=Markup(style),
        style_digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    )
    return f"{page.strip()}\n"


def _keys(checkpoint: Checkpoint, content: Content) -> list[tuple[str, str, str]]:
    """The figures at the top: what it is, the figure, and what it means."""
    size = checkpoint.parameters
    results = content.results
    found = list[tuple[str, str, str]]()
    if results is not None and (mixture := results.of_kind("mixture")) is not None:
        domains = results.domains
        base = results.of_kind("base")
        gap = mixture.mean_gap(domains)
        error = mixture.mean_gap_error(domains)
        loss = mixture.mean_loss(domains)
        if gap is not None:
            spread = "" if error is None else f"±{error:.3f} standard error; "
            found.append(("Gap closed", f"{gap:.2f}", f"{spread}mean of {results.averaged}; 1 is every domain's own expert"))
        if loss is not None:
            of_base = base.mean_loss(domains) if base is not None else None
            said = "nats per token" if of_base is None else f"base model {of_base:.3f}, nats per token"
            found.append(("Mean held-out loss", f"{loss:.3f}", said))
    found.append(("Parameters", count_of(size.total), f"{size.total / size.dense:.2f} times the base model"))
    return [*found, ("Active per token", count_of(size.active), f"{size.active / (size.dense - size.idle):.2f} times the base")]


def _legend(table: ResultTable) -> str:
    """What colours and frames of a table mean."""
    cells = [cell for row in table.rows for cell in cells_of(row)]
    said = []
    if any(cell.change is not None for cell in cells):
        said.append("Blue: a lower loss; brown: a higher one." if table.title == "Loss" else "Blue: needed; brown: in the way.")
    if any(cell.share is not None for cell in cells):
        said.append("The darker, the more.")
    if any(cell.own for cell in cells):
        said.append("A frame marks a domain's own expert.")
    return " ".join([*([table.caption] if table.caption else []), *said])


@cache
def _template() -> Template:
    """The page's template, compiled once per process: compiling takes far longer than filling it."""
    environment = Environment(
        loader=PackageLoader("modekit.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.jinja")
