"""The figures of a report as PNG and SVG, for papers. matplotlib without a display; no date and no random id in a file."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from modekit.report.drawing import SHOWN_KINDS

PALETTE = ("#0072b2", "#c95700", "#007a5a", "#aa4499", "#7a6a00", "#4b3aa8", "#a02050", "#4d5560")
"""Of the experts, in their order; told apart by colour-blind readers, and by lines and names besides."""
_LINES = ("-", "--", ":", "-.")
_KIND_COLOURS = {"average": "#b5bdc4", "oracle": "#7d8892", "mixture": "#0a6aa8"}
_SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "modekit", "svg.fonttype": "path", "text.parse_math": False, "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "figure.dpi": 100, "savefig.dpi": 200, "font.family": ["DejaVu Sans"],
}  # fmt: skip
_MOST_ROWS = 64  # of a heat map that is still to be read on paper


def make_plots(content: dict[str, Any]) -> dict[str, bytes]:
    """File name -> bytes of every figure that the content has data for. Raises ImportError without matplotlib."""
    pictures: dict[str, bytes] = {}
    with _drawing() as figure_of:
        for name, draw in _DRAWINGS.items():
            figure = figure_of()
            if draw(figure, content):
                for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                    buffer = io.BytesIO()
                    figure.savefig(buffer, format=kind, bbox_inches="tight", metadata=metadata)
                    pictures[f"{name}.{kind}"] = buffer.getvalue()
    return pictures


@contextmanager
def _drawing() -> Iterator[Callable[[], Any]]:
    import matplotlib
    from matplotlib.figure import Figure

    defaults: dict[Any, Any] = dict(matplotlib.rcParamsDefault)
    with matplotlib.rc_context({**defaults, **_SETTINGS, "backend": "agg"}):
        yield lambda: Figure(figsize=(6.4, 3.6), layout="constrained")


def _gap(figure: Any, content: dict[str, Any]) -> bool:
    results = content["results"]
    shown = [row for row in results["rows"] if row["kind"] in SHOWN_KINDS] if results else []
    domains = [
        name
        for name in (results["domains"] if results else [])
        if any((row["domains"].get(name) or {}).get("gap_closed") is not None for row in shown)
    ]
    if not domains:
        return False
    axes = figure.subplots()
    width = 0.8 / len(shown)
    for place, row in enumerate(shown):
        scores = [row["domains"].get(name) or {} for name in domains]
        known = [(at, score) for at, score in enumerate(scores) if score.get("gap_closed") is not None]
        axes.bar(
            [at + (place - (len(shown) - 1) / 2) * width for at, _ in known], [score["gap_closed"] for _, score in known],
            width * 0.92, label=row["name"], color=_KIND_COLOURS[row["kind"]], capsize=2,
            yerr=[score.get("gap_error") or 0.0 for _, score in known], error_kw={"elinewidth": 1},
        )  # fmt: skip
    axes.axhline(0, color="#55606b", linewidth=0.8)
    axes.axhline(1, color="#55606b", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(domains)), domains)
    axes.set_ylabel("gap closed")
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return True


def _loss(figure: Any, content: dict[str, Any]) -> bool:
    results = content["results"]
    if not results or not results["against_base"]:
        return False
    every, names = [*results["domains"], *results["unseen"]], [row["name"] for row in results["rows"]]
    values = [[results["against_base"].get(name, {}).get(domain) for domain in every] for name in names]
    losses = [[(row["domains"].get(domain) or {}).get("loss") for domain in every] for row in results["rows"]]
    most = max((abs(value) for row in values for value in row if value is not None), default=0.0) or 1.0
    _heat(figure, figure.subplots(), values, names, every, losses, "RdBu_r", -most, most, "loss less that of the base, nats")
    return True


def _routing(figure: Any, content: dict[str, Any]) -> bool:
    routing = content["routing"]
    if not routing or not 0 < len(routing["rows"]) <= _MOST_ROWS:
        return False
    every = [*routing["domains"], *routing["unseen"]]
    figure.set_size_inches(1.2 + 0.42 * len(routing["experts"]) * len(every), 1.6 + 0.26 * len(routing["rows"]))
    grid = figure.subplots(1, len(every), squeeze=False, sharey=True)[0]
    for place, (axes, domain) in enumerate(zip(grid, every, strict=True)):
        shares = routing["per_domain"][domain]["shares"]
        last = place == len(every) - 1
        _heat(figure, axes, shares, routing["rows"], routing["experts"], None, "Blues", 0, 1, "mean weight" if last else None)
        axes.set_title(domain, fontsize=9)
    return True


def _similarity(figure: Any, content: dict[str, Any]) -> bool:
    similarity = content["routing"]["similarity"] if content["routing"] else None
    if not similarity:
        return False
    names, values = content["routing"]["experts"], similarity["experts"]
    low = min(0.0, min(min(row) for row in values))
    _heat(figure, figure.subplots(), values, names, names, values, "Blues", low, 1, "similarity")
    return True


def _training(figure: Any, content: dict[str, Any]) -> bool:
    curve = content["training"]["curve"] if content["training"] else None
    if not curve or not curve["lines"]:
        return False
    axes, experts = figure.subplots(), content["mixture"]["experts"]
    for name, points in curve["lines"].items():
        domain = name.removeprefix("eval_")
        colour = PALETTE[(experts.index(domain) if domain in experts else 7) % len(PALETTE)]
        line = _LINES[(experts.index(domain) if domain in experts else 7) % len(_LINES)]
        look: dict[str, Any] = {"color": colour, "linewidth": 1.4, "linestyle": line}
        if name in {"loss", "eval_loss"}:
            look = {"color": "#8a949d", "linewidth": 0.7} if name == "loss" else {"color": "#1b2128", "linewidth": 2}
        label = {"loss": "training text", "eval_loss": "held-out mean"}.get(name, f"held-out {domain}")
        axes.plot([step for step, _ in points], [value for _, value in points], label=label, **look)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return True


def _heat(
    figure: Any, axes: Any, values: list[list[float | None]], rows: list[str], columns: list[str],
    shown: list[list[float | None]] | None, colours: str, low: float, high: float, label: str | None,
) -> None:  # fmt: skip
    """A heat map with names on both sides and, with `shown`, a figure in each cell."""
    numbers = [[float("nan") if value is None else value for value in row] for row in values]
    image = axes.imshow(numbers, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.spines[:].set_visible(False)
    for y, row in enumerate(shown or []):
        for x, value in enumerate(row):
            if value is not None:
                r, g, b, _ = image.cmap(image.norm(numbers[y][x])) if values[y][x] is not None else (1, 1, 1, 1)
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="k" if r + g + b > 1.5 else "w")
    if label is not None:
        figure.colorbar(image, ax=axes, label=label)


_DRAWINGS: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    "gap": _gap, "loss": _loss, "routing": _routing, "similarity": _similarity, "training": _training,
}  # fmt: skip
