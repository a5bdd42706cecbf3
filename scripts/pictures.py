"""Make the pictures of README and docs, in docs/images.

    python scripts/pictures.py                     gaps.svg from the table in benchmarks/demo.md,
                                                   routed.svg from benchmarks/routed_words.json
    python scripts/pictures.py --words OUT TEXT    first what `modekit inspect OUT --text TEXT` finds,
                                                   into routed_words.json
    python scripts/pictures.py --report OUT        report.png: the top of OUT's report page, in Chromium
                                                   (needs playwright, pillow)

`modekit demo --quick`, then `modekit inspect OUT` and `modekit report OUT` for its lexical mixture, make
such an OUT for the report.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
TABLE = ROOT / "benchmarks" / "demo.md"
WORDS = ROOT / "benchmarks" / "routed_words.json"
INK, SOFT, LINE, BLUE, GREY = "#1b2128", "#55606b", "#c4ccd4", "#0a6aa8", "#b5bdc4"
_ROW = re.compile(r"^\| \**([^|*]+?)\** \| [^|]+ \| \**([-\d.]+)(?: ± [\d.]+)?\** \|", re.MULTILINE)
_LEFT, _WIDTH, _STEP = 250, 440, 30  # of the bars: where they begin, how long 1 is, height of a row


@dataclass
class Drawing:
    """Parts of an SVG, on a white card that is read on a dark page, too."""

    width: int
    height: int
    label: str
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, fill: str, edge: str = "none", opacity: float = 1) -> None:
        """A rounded rectangle."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width:g}" height="{height:g}" rx="6" '
            f'fill="{fill}" stroke="{edge}" opacity="{opacity}"/>'
        )

    def text(self, x: float, y: float, text: str, fill: str = INK, anchor: str = "middle", look: str = "") -> None:
        """A line of text; `look` has further attributes."""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}" {look}>{text}</text>')

    def line(self, path: str, stroke: str = SOFT, width: float = 1.5, look: str = 'marker-end="url(#end)"') -> None:
        """A path, with an arrow's head unless `look` says otherwise."""
        self.parts.append(f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="{width}" {look}/>')

    def svg(self) -> str:
        """The whole file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" font-family="system-ui, sans-serif" font-size="14" role="img" aria-label="{self.label}">'
        )
        marker = (
            '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{SOFT}"/></marker></defs>'
        )
        card = f'<rect width="{self.width}" height="{self.height}" rx="10" fill="#fff"/>'
        return "\n".join([head, marker, card, *self.parts, "</svg>", ""])


@dataclass(frozen=True)
class Row:
    """Gap closed of a model, as number and as the table shows it."""

    name: str
    gap: float
    shown: str


def rows() -> list[Row]:
    """The first table of benchmarks/demo.md, without base and single experts."""
    table = TABLE.read_text(encoding="utf-8").split("\n## ")[1]
    found = [Row(name, float(gap), gap) for name, gap in _ROW.findall(table)]
    return [row for row in found if row.name != "base" and not row.name.startswith("expert ")]


def gaps() -> str:
    """Gap closed by router, as bars."""
    shown = rows()
    bottom = 62 + _STEP * len(shown)
    drawing = Drawing(_LEFT + _WIDTH + 130, bottom + 50, "Gap closed by each router of the demo, from 0 (base) to 1.")
    drawing.text(20, 30, "How much of the experts' gain each router keeps", anchor="start", look='font-weight="600"')
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = _LEFT + _WIDTH * tick
        drawing.line(f"M{x:g} 48V{bottom}", INK if tick == 1 else LINE, 1, 'stroke-dasharray="4 3"' if tick == 1 else "")
        drawing.text(x, bottom + 18, {0.0: "0: base", 1.0: "1: own expert"}.get(tick, f"{tick:g}"), SOFT, look='font-size="12"')
    for place, row in enumerate(shown):
        y = 54 + _STEP * place
        fitted = row.name.startswith(("logistic", "lexical"))
        name, length = row.name.replace(" (own expert forced)", ": right expert known"), _WIDTH * row.gap
        drawing.text(_LEFT - 12, y + 16, name, anchor="end", look='font-size="13"')
        drawing.box(_LEFT, y, length, 22, BLUE if fitted else GREY)
        inside = row.gap > 0.2  # so that no figure stands on the line at 1
        x = _LEFT + length + (-8 if inside else 8)
        drawing.text(x, y + 16, row.shown, "#fff" if fitted else INK, "end" if inside else "start", 'font-weight="600"')
    note = "Demo, four domains, mean of three seeds; blue: routers that modekit fits. From benchmarks/demo.md."
    drawing.text(20, bottom + 40, note, SOFT, "start", 'font-size="12"')
    return drawing.svg()


_COLOURS = ("#ffd9a0", "#b7dcf7", "#c9ecc0", "#e3cdf5", "#f7c6cc", "#e4e7ea")
_CHARACTER = 8.0  # width of a letter of the routed words
_LINE_STEP, _RIGHT = 34, 740  # height of a line of them, and where it ends


def routed() -> str:
    """A text in which every word has the colour of the expert that leads it."""
    found = json.loads(WORDS.read_text(encoding="utf-8"))
    colours = dict(zip(found["experts"], _COLOURS, strict=False))
    drawing = Drawing(760, 0, "One text, word by word, in the colours of the experts that lead.")
    letters = 'font-family="ui-monospace, monospace" font-size="13"'
    drawing.text(20, 30, found["title"], anchor="start", look='font-weight="600"')
    x, y = 20.0, 46
    for word, expert in found["words"]:
        width = _CHARACTER * len(word) + 10
        if x + width > _RIGHT:
            x, y = 20.0, y + _LINE_STEP
        drawing.box(x, y, width, 25, colours[expert])
        look = f'{letters} textLength="{_CHARACTER * len(word):g}"'
        drawing.text(x + 5, y + 17, escape(word), anchor="start", look=look)
        x += width + 5
    x, y = 20.0, y + _LINE_STEP + 12
    for name, colour in colours.items():
        drawing.box(x, y, 14, 14, colour)
        drawing.text(x + 20, y + 12, escape(name), anchor="start", look='font-size="13"')
        x += 20 + 8 * len(name) + 24
    drawing.text(20, y + 36, found["note"], SOFT, "start", 'font-size="12"')
    drawing.height = y + 50
    return drawing.svg()


def read_words(checkpoint: Path, text: str) -> None:
    """Write which expert leads each word of a text in a mixture."""
    from modekit.checkpoint.open import open_checkpoint
    from modekit.evaluation.inspection.inspect import inspect_text
    from modekit.evaluation.inspection.tokens import words_of

    trace = inspect_text(open_checkpoint(checkpoint), text)
    words, _ = words_of(trace, len(text))
    losses = f"{trace.loss:.2f} nats per token, the base {trace.base_loss:.2f}"
    found = {
        "title": "Which expert reads what: each word has the colour of the expert that leads",
        "note": f"{losses}. The router reads the words so far: it changes a few words late.",
        "experts": list(trace.experts),
        "words": [[word.text, trace.experts[word.leader]] for word in words],
    }
    WORDS.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


PICTURES = {"gaps.svg": gaps, "routed.svg": routed}
"""File name -> what draws it; a test compares both with what is committed."""


def photograph(checkpoint: Path) -> None:
    """A mixture's report page from its top to the gaps closed, in 128 colours, as docs/images/report.png."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    page = (checkpoint / "results" / "report.html").resolve()
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 760, "height": 800}, color_scheme="light")
        tab.goto(page.as_uri())
        end = tab.locator("svg.chart").first.bounding_box()
        height = 1200 if end is None else end["y"] + end["height"] + 16
        seen = tab.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": 760, "height": height})
        browser.close()
    Image.open(io.BytesIO(seen)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
        IMAGES / "report.png", optimize=True
    )


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, metavar="OUT", help="take the picture of this mixture's report instead")
    parser.add_argument("--words", nargs=2, metavar=("OUT", "TEXT"), help="read this text with this mixture first")
    options = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    if options.words is not None:
        read_words(Path(options.words[0]), options.words[1])
    if options.report is not None:
        photograph(options.report)
        return
    for name, draw in PICTURES.items():
        (IMAGES / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
