"""What `modekit inspect` draws: tables of a mixture, and a text whose words are tinted by the experts that lead on them.

Texts and names are drawn as they are: no markup, no control characters.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.style import Style
from rich.text import Text

from modekit.cli.printing.console import out, shows_bold, visible
from modekit.cli.printing.table import OWN, Cell, Table
from modekit.recipes.layers import order_of

if TYPE_CHECKING:
    from modekit.evaluation.inspection.words import Word

_MOST_WORDS = 200
_MOST_LAYERS = 8
_TOP_TOKENS = 10
_UNSURE = 0.8  # of the largest entropy
_SAYS_SCORE = "; then by how much experts stand above the base: below zero it is the base's."
_GOLDEN = 0.618034  # hues that far apart stay distinct however many there are


def print_inspection(folder: Path, data: Mapping[str, Any]) -> None:
    """Draw what inspect.json holds, the mean over the routers where there are several."""
    names, domains = data["experts"], data["per_domain"]
    unseen = set(data["unseen"])
    titles = [f"{name}\nunseen" if name in unseen else name for name in domains]
    used = data["utilisation"]

    own = "in bold" if shows_bold(out) else f"marked {OWN}"
    out.print(f"Mean weight of each expert per domain (its own {own}); in brackets the fraction of tokens that chose it.")
    rows: list[_Row] = []
    for place, name in enumerate(names):
        cells = [
            f"{_mean(r[place] for r in entry['shares']):.2f} ({_mean(r[place] for r in entry['chosen']):.2f})"
            for entry in domains.values()
        ]
        rows.append((name, [*_bold_own(cells, domains, name), f"{_mean(router[place] for router in used):.2f}"], ""))
    agreement = [entry["agreement"] for entry in domains.values()]
    rows.append(("agreement", ["-" if each is None else f"{_mean(each):.2f}" for each in agreement] + [""], "dim"))
    rows.append(("entropy", [f"{_mean(entry['entropy']):.2f}" for entry in domains.values()] + [""], "dim"))
    _print_table("expert", [*titles, "used"], rows)
    _print_routers(data)
    if any(entry["without"] for entry in domains.values()):
        _print_without(names, titles, domains)
    out.print(Text(f"\nSimilarity (cosine) of {data['similarity']['of']}."))
    cosines = zip(names, data["similarity"]["experts"], strict=True)
    _print_table("", names, [(name, [f"{value:.2f}" for value in row], "") for name, row in cosines])
    _print_dead(data)
    out.print("\nTokens with the largest mean weight of each expert.")
    _print_tokens(data["top_tokens"])
    if data.get("evidence") is not None:
        out.print("\nTokens that speak most for each expert, by the router's own table.")
        _print_tokens(data["evidence"])
    if data.get("told_apart") is not None:
        _print_told_apart(data["told_apart"])
    _print_notes(data["notes"])
    out.print(Text(f"{folder}: inspect.json", style="dim"))


def _print_routers(data: Mapping[str, Any]) -> None:
    """Agreement and entropy layer by layer, of a few layers when there are many."""
    routers = data["routers"]
    layers = sorted({router["layer"] for router in routers if router["layer"] is not None}, key=order_of)
    if len(layers) < 2:
        return
    own = [data["per_domain"][name] for name in data["domains"]]
    shown = layers[:: math.ceil(len(layers) / _MOST_LAYERS)]
    out.print("\nAgreement with the domain's own expert, entropy in brackets, by layer; means over domains.")
    rows: list[_Row] = []
    for module in dict.fromkeys(router["module"] for router in routers if router["layer"] is not None):
        places = {router["layer"]: place for place, router in enumerate(routers) if router["module"] == module}
        cells = [
            f"{_mean(e['agreement'][places[layer]] for e in own):.2f} ({_mean(e['entropy'][places[layer]] for e in own):.2f})"
            if layer in places
            else "-"
            for layer in shown
        ]
        rows.append((module, cells, ""))
    _print_table("router", [str(layer) for layer in shown], rows)


def _print_without(names: Sequence[str], titles: Sequence[str], domains: Mapping[str, Any]) -> None:
    out.print("\nWhat leaving out an expert adds to the loss, nats per token. named: texts that miss their own expert most.")
    rows: list[_Row] = []
    for name in names:
        cells = [f"{entry['without'][name]:+.3f}" for entry in domains.values()]
        rows.append((name, _bold_own(cells, domains, name), ""))
    rows.append(("loss", [f"{entry['loss']:.3f}" for entry in domains.values()], "dim"))
    named = [entry["named"] for entry in domains.values()]
    rows.append(("named", ["-" if each is None else f"{each:.0%}" for each in named], "dim"))
    _print_table("left out", titles, rows)


def _bold_own(cells: Sequence[str], domains: Mapping[str, Any], name: str) -> list[str | Cell]:
    """The cells of an expert with that of its own domain in bold."""
    own = [entry["expert"] == name for entry in domains.values()]
    return [Cell(cell, own=mine) for cell, mine in zip(cells, own, strict=True)]


def _print_tokens(of_experts: Mapping[str, Any]) -> None:
    for name, found in of_experts.items():
        tokens = "  ".join(printable(each["token"]) for each in found[:_TOP_TOKENS])
        out.print(Text(f"{name}: ", style="bold").append(tokens or "-", style="not bold"), highlight=False)


def _print_told_apart(told: Mapping[str, Any]) -> None:
    """How well running scores tell each unseen domain from the domains, and where the base leads."""
    for name in next(iter(told["auroc"].values())):
        out.print(Text(f"\nAUROC: the domains' text against {name}, by the router's running score after so many tokens."))
        rows: list[_Row] = []
        for score, of_domains in told["auroc"].items():
            rows.append((score, ["-" if each is None else f"{each:.3f}" for each in of_domains[name]], ""))
        _print_table("score", [str(at) for at in told["at"]], rows)
    if told["to_base"] is not None:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in told["to_base"].items())
        out.print(Text(f"\nTokens on which the base leads: {shares}."))


def _print_dead(data: Mapping[str, Any]) -> None:
    routers: dict[str, list[str]] = {}
    for dead in data["dead"]:
        router = data["routers"][dead["router"]]
        routers.setdefault(dead["expert"], []).append(
            "" if router["layer"] is None else f"{router['layer']} {router['module']}"
        )
    out.print("\nDead experts: " + ("none." if not routers else ""))
    for name, places in routers.items():
        where = "in every router" if len(places) == len(data["routers"]) else f"in layer {', '.join(places)}"
        out.print(Text.assemble("  ", (name, "yellow"), f" {where}"))


def print_trace(trace: Mapping[str, Any]) -> None:
    """Draw a text word by word, then what each expert is worth for it."""
    from modekit.evaluation.inspection.words import words_of

    names = trace["experts"]
    words, more = words_of(trace, _MOST_WORDS)
    decided = any(word.over_base is not None for word in words)
    coloured = out.color_system is not None and not out.no_color
    letters = [chr(ord("A") + place) if place < 26 else f"E{place}" for place in range(len(names))]
    legend = Text("  ").join(
        Text(f" {name} ", style=_tint(place, 1.0)) if coloured else Text(f"{letters[place]} {name}")
        for place, name in enumerate(names)
    )
    if coloured:
        out.print(
            "Each word by the expert that leads on it, the stronger its weight the stronger the colour; below it its loss"
            + (_SAYS_SCORE if decided else ".")
        )
        _print_glossed(words, lambda word: _loss(word), lambda word: _tint(word.leader, float(word.weights_E.max())))
    else:
        said = "Below each word: the leading expert's letter and its weight in percent, and the word's loss"
        out.print(said + (_SAYS_SCORE if decided else "."))

        def gloss(word: Word) -> str:
            return f"{letters[word.leader]}{100 * word.weights_E.max():.0f} {_loss(word)}"

        _print_glossed(words, gloss, lambda _: Style())
    out.print(legend)
    if more:
        shown = f"The first {len(words)} words are shown; the text has {len(trace['tokens']):,} tokens."
        out.print(Text(shown, style="dim"))
    _print_worth(trace)
    if "prompt_end" in trace:
        shares = sorted(zip(trace["prompt_end"], names, strict=True), reverse=True)
        said = ", ".join(f"{name} {weight:.2f}" for weight, name in shares if weight >= 0.005)
        out.print(Text.assemble("the answer begins with ", (said, "bold")))
    _print_notes(trace["notes"])


def _print_worth(trace: Mapping[str, Any]) -> None:
    names = trace["experts"]
    rows: list[_Row] = []
    for place, name in enumerate(names):
        share = _mean(_mean(token[place] for token in router) for router in trace["weights"])
        rows.append((name, [f"{share:.2f}", f"{trace['without'][name]:+.3f}" if trace["without"] else "-"], ""))
    out.print()
    _print_table("expert", ["mean\nweight", "left out\nadds"], rows)
    largest = math.log(min(trace["top_k"] or len(names), len(names)))
    base = "" if trace["base_loss"] is None else f", of the base model {trace['base_loss']:.3f}"
    out.print(f"loss {trace['loss']:.3f} nats per token{base}; entropy {trace['entropy']:.2f} of at most {largest:.2f} nats")
    if largest and trace["entropy"] > _UNSURE * largest:
        out.print(Text("The routers are unsure: this text is like that of no domain, or of several.", style="yellow"))
    if trace["base_loss"] is not None and trace["loss"] >= trace["base_loss"]:
        out.print(Text("The base model is as good without any expert: this text is like that of no domain.", style="yellow"))


def _print_glossed(words: Sequence[Word], gloss: Callable[[Word], str], style: Callable[[Word], Style]) -> None:
    """Words side by side with a line below them, wrapped to the terminal's width, in a file to a line one can read."""
    above, below, used = Text(), Text(), 0
    for word in words:
        shown, under = printable(word.text), gloss(word)
        width = min(max(cell_len(shown), cell_len(under)), out.width - 1)
        if used and used + width > out.width - 1:
            _print_lines(above, below)
            above, below, used = Text(), Text(), 0
        tinted = Text(set_cell_size(shown, min(cell_len(shown), width)), style=style(word))
        above.append_text(tinted).append(" " * (width - tinted.cell_len + 1))
        below.append(set_cell_size(under, width) + " ")
        used += width + 1
    if used:
        _print_lines(above, below)


def _print_lines(above: Text, below: Text) -> None:
    below.stylize("dim")
    for line in (above, below):
        line.rstrip()
        out.print(line, no_wrap=True, overflow="crop", highlight=False)


def _loss(word: Word) -> str:
    score = "" if word.over_base is None else f" {word.over_base:+.1f}"
    return ("-" if word.loss is None else f"{word.loss:.1f}") + score


def _tint(expert: int, strength: float) -> Style:
    """Black on a colour of the expert's own, paler the weaker."""
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(expert * _GOLDEN % 1, 0.7 * strength, 1.0))
    return Style(color="black", bgcolor=f"rgb({red},{green},{blue})")


def printable(text: str) -> str:
    """Text without what a terminal would obey: control and format characters are written out, a space at an end is shown."""
    shown = visible(text).replace("\n", "\\n")
    stripped = shown.strip(" ")
    return "␣" * (len(shown) - len(shown.lstrip(" "))) + stripped if stripped else "␣" * len(shown)


_Row = tuple[str, Sequence[str | Cell], str]
"""Name, cells, style."""


def _print_table(first: str, titles: Sequence[str], rows: Sequence[_Row]) -> None:
    table = Table(first, titles)
    for name, cells, style in rows:
        table.add(name, *cells, style=style)
    out.print(table)


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        out.print(Text.assemble(("note:", "yellow"), f" {note}"))


def _mean(values: Iterable[float]) -> float:
    every = list(values)
    return sum(every) / len(every)
