"""The page: one file, from the content alone. Nothing is fetched, nothing of the data is ever code.

Every figure stands in a `<data>` element that names its place in report.json, so that it cannot say anything else. Text
goes through autoescape; what the script shows comes from a JSON block and is set as textContent. The content security
policy lets exactly this page's own style and script in, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from pydantic import JsonValue

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.results_folder import RESULTS_FOLDER, write_results
from modekit.files.figures import bytes_of, count_of
from modekit.files.write import json_bytes
from modekit.report.content import Content, make_content
from modekit.report.drawing import gap_bars, line_chart, make_pictures, scatter_chart, shade, tint


def _signed(text: str) -> str:
    """With a true minus, and without a sign where nothing but noughts is left."""
    return text.lstrip("+-") if not text.strip("+-0.") else text.replace("-", "\u2212")


FORMATS: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"{value:.3f}",
    "loss4": lambda value: f"{value:.4f}",
    "perplexity": lambda value: f"{value:.1f}",
    "gap": lambda value: _signed(f"{value:.2f}"),
    "error": lambda value: f"±{value:.3f}",
    "change": lambda value: _signed(f"{value:+.3f}"),
    "share": lambda value: f"{100 * value:.0f}%",
    "cell": lambda value: f"{100 * value:.0f}",
    "similarity": lambda value: _signed(f"{value:.2f}"),
    "points": lambda value: _signed(f"{value:+.1f}"),
    "speed": lambda value: f"{value:,.0f}",
    "score": lambda value: f"{value:.1f}",
    "factor": lambda value: f"{value:.2f}\u00d7",
    "lift": lambda value: f"{value:.1f}\u00d7",
    "weight": lambda value: f"{value:+.2f}",
    "count": lambda value: f"{value:,}",
    "parameters": lambda value: count_of(int(value)),
    "bytes": lambda value: f"{value / 1e9:.2f} GB" if value >= 1e9 else bytes_of(int(value)),
    "value": lambda value: f"{value:.3g}",
}
"""How a figure is written, by what it is."""

PAGE_FILE, PLOTS_FOLDER = "report.html", "plots"
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


@dataclass(frozen=True)
class Report:
    """What was written; `notes` say what had to be left out and how to get it."""

    page: Path
    plots: Sequence[Path]
    notes: Sequence[str]


def write_report(checkpoint: Checkpoint) -> Report:
    """Write OUT/results/report.html, its data beside it as report.json, and plots, together. Raises OutputError, OSError."""
    content, folder = make_content(checkpoint), checkpoint.folder / RESULTS_FOLDER
    plots = {f"{PLOTS_FOLDER}/{name}": picture for name, picture in make_pictures(content).items()}
    page = make_page(content).encode()
    write_results(checkpoint, {"report.json": json_bytes(content.data), **plots, PAGE_FILE: page})
    return Report(folder / PAGE_FILE, [folder / name for name in plots], content.notes)


def make_page(content: Content) -> str:
    """The HTML of a report."""
    data = content.data
    style, script = (files("modekit.report").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    figures, samples = Figures(data), data["samples"]
    return (
        _template()
        .render(
            content=data,
            num=figures.number,
            style=Markup(style),
            script=Markup(script),
            policy=_policy(style, script),
            shade=shade,
            tint=tint,
            samples_json=_json_block({"experts": content.experts, **(samples if isinstance(samples, dict) else {})}),
            gap_bars=gap_bars(content.results, figures) if content.results else None,
            line_chart=line_chart,
            scatter_chart=scatter_chart,
            largest=lambda rows: max((abs(each) for row in rows for each in row.values() if each is not None), default=0.0),
        )
        .strip()
        + "\n"
    )


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


class Figures:
    """Figures of the content by their place in it."""

    def __init__(self, data: JsonValue) -> None:
        self._data = data

    def value(self, *path: str | int) -> float | None:
        """The figure at a place; None when there is none."""
        value = self._data
        for part in path:
            value = value.get(str(part)) if isinstance(value, dict) else value[int(part)] if isinstance(value, list) else None
        return value if isinstance(value, (int, float)) else None

    def number(self, kind: str, *parts: str | int | Sequence[str | int]) -> Markup:
        """A figure as HTML, or a dash. Lists among the parts of its path are parts themselves."""
        path: list[str | int] = [each for part in parts for each in ([part] if isinstance(part, (str, int)) else part)]
        value = self.value(*path)
        if value is None:
            return Markup('<span class="none"><span aria-hidden="true">\u2013</span><span class="sr">none</span></span>')
        place = "/" + "/".join(str(part).replace("~", "~0").replace("/", "~1") for part in path)
        return Markup('<data value="{}" data-at="{}" data-as="{}">{}</data>').format(
            json.dumps(value), place, kind, FORMATS[kind](value)
        )


def _json_block(value: object) -> Markup:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup("".join(_UNSAFE.get(character, character) for character in text))


def _policy(style: str, script: str) -> str:
    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return f"default-src 'none'; style-src {digest(style)}; script-src {digest(script)}; base-uri 'none'; form-action 'none'"
