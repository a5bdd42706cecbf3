"""The command that shows what the routers do."""

from __future__ import annotations

import colorsys
import math
import sys
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.columns import Columns
from rich.style import Style
from rich.text import Text

from modekit.cli.evaluation import show_results
from modekit.cli.options import grouped
from modekit.cli.printing import out, print_json, print_notes, print_table, visible
from modekit.cli.progress import running
from modekit.cli.shell import OutFolder, app, checkpoint_in, common, refuse_without_effect
from modekit.evaluation.tables import ResultTable
from modekit.files.figures import or_dash
from modekit.text.amounts import SAMPLE_TOKENS

if TYPE_CHECKING:
    from modekit.evaluation.inspection.inspect import UserMessage
    from modekit.evaluation.inspection.result import Inspection, TextTrace


@dataclass(frozen=True)
class TextOptions:
    """A text to show in place of the tables."""

    text: Annotated[str | None, typer.Option(help="Show this text word by word; - reads standard input.")] = None
    chat: Annotated[bool, typer.Option("--chat", help="Read the text as a user message in the chat template.")] = False
    system: Annotated[str | None, typer.Option(help="System prompt (with --chat; default: the template's own).")] = None

    def read(self) -> str | UserMessage | None:
        """The text, or a user message (--chat); None without a text. Raises ModekitError, TextError."""
        from modekit.text.plain import decode

        if not self.chat:
            refuse_without_effect("a user message (--chat)", {"--system": self.system})
        if self.text is None:
            refuse_without_effect("a text (--text)", {"--chat": self.chat or None})
            return None
        text = decode(sys.stdin.buffer.read(), where="standard input") if self.text == "-" else self.text
        if not self.chat:
            return text
        from modekit.evaluation.inspection.inspect import UserMessage

        return UserMessage(self.system, text)


@app.command()
@grouped
def inspect(
    checkpoint: OutFolder,
    shown: TextOptions,
    tokens: Annotated[int, typer.Option(min=64, help="Held-out tokens per domain.")] = SAMPLE_TOKENS,
    sequence_length: Annotated[int, typer.Option(min=8, help="Longest piece of a document or text, in tokens.")] = 512,
) -> None:
    """Show what the routers do: expert weights per domain, leave-one-out losses, similarity, tokens; or one text by word."""
    opened = checkpoint_in(checkpoint)
    found: Inspection | TextTrace
    with running() as run:
        text = shown.read()
        from modekit.evaluation.inspection.inspect import inspect, inspect_text
        from modekit.evaluation.inspection.result import Inspection

        if text is None:
            found = inspect(opened, tokens_per_domain=tokens, sequence_length=sequence_length, run=run)
        else:
            found = inspect_text(opened, text, sequence_length=sequence_length, run=run)
    if isinstance(found, Inspection):
        show_results(found, checkpoint)
    elif common().json:
        print_json(found.as_data())
    else:
        print_trace(found, chat=shown.chat)


_MOST_WORDS = 200
_GOLDEN = 0.618034  # hues that far apart stay distinct however many there are


def print_trace(trace: TextTrace, *, chat: bool = False) -> None:
    """Draw a text word by word, then what each expert is worth for it; of a chat who leads where the answer begins."""
    from modekit.evaluation.inspection.tokens import words_of

    words, more = words_of(trace, _MOST_WORDS)
    coloured = out.color_system is not None and not out.no_color
    letters = [chr(ord("A") + place) if place < 26 else f"E{place}" for place in range(len(trace.experts))]
    said = (
        "The colour of a word is that of its leading expert, stronger with more weight. Below the word: its loss"
        if coloured
        else "Below each word: the leading expert's letter and its weight in percent, and the word's loss"
    )
    out.print(f"{said}.")
    shown = []
    for word in words:
        leader = "" if coloured else f"{letters[word.leader]}{100 * word.weights_E.max():.0f} "
        style = tint(word.leader, float(word.weights_E.max())) if coloured else ""
        below = leader + or_dash(word.loss, ".1f")
        shown.append(Text.assemble((visible(word.text).replace("\n", "\\n"), style), "\n", (below, "dim")))
    out.print(Columns(shown, padding=(0, 1)))
    legend = [
        Text(f" {name} ", style=tint(place, 1.0)) if coloured else Text(f"{letters[place]} {name}")
        for place, name in enumerate(trace.experts)
    ]
    out.print(Text("  ").join(legend))
    if more:
        out.print(Text(f"The first {len(words)} words are shown; the text has {len(trace.tokens):,} tokens.", style="dim"))
    _print_worth(trace)
    if chat:
        last = [fmean(each) for each in zip(*(router[-1] for router in trace.weights), strict=True)]
        shares = sorted(zip(last, trace.experts, strict=True), reverse=True)
        said = ", ".join(f"{name} {weight:.2f}" for weight, name in shares if weight >= 0.005)
        out.print(Text.assemble("the answer begins with ", (said, "bold")))
    print_notes(trace.notes)


def _print_worth(trace: TextTrace) -> None:
    means = [fmean(fmean(row[place] for row in router) for router in trace.weights) for place in range(len(trace.experts))]
    added = [or_dash(trace.without.get(name), "+.3f") for name in trace.experts]
    rows = [[name, f"{mean:.2f}", more] for name, mean, more in zip(trace.experts, means, added, strict=True)]
    print_table(ResultTable("", ["expert", "mean weight", "left out adds"], rows))
    largest = math.log(min(trace.top_k or len(trace.experts), len(trace.experts)))
    base = "" if trace.base_loss is None else f", of the base model {trace.base_loss:.3f}"
    entropy = f"; entropy {trace.entropy:.2f} of at most {largest:.2f} nats" if largest else ""
    out.print(f"loss {trace.loss:.3f} nats per token{base}{entropy}")


def tint(expert: int, strength: float) -> Style:
    """Black on a colour of the expert's own, paler the weaker."""
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(expert * _GOLDEN % 1, 0.7 * strength, 1.0))
    return Style(color="black", bgcolor=f"rgb({red},{green},{blue})")
