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
    "svg.hashsalt": "modekit",
    "svg.fonttype": "path",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "font.family": ["DejaVu Sans"],
}
_LONGEST_NAME = 24  # characters that a picture has room for
_MOST_ROWS, _MOST_COLUMNS = 64, 512  # of a picture that is still to be read on paper


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

    settings: Any = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    settings.update(_SETTINGS)  # whatever the user's own style is: the same data gives the same bytes
    with matplotlib.rc_context(settings):
        yield lambda: Figure(figsize=(6.4, 3.6), layout="constrained")


def _gap(figure: Any, content: dict[str, Any]) -> bool:
    results = content["results"]
    shown = [row for row in results["rows"] if row["kind"] in SHOWN_KINDS] if results else []
    domains = [
        name
        for name in (results["domains"] if results else [])
        if any((row["domains"].get(name) or {}).get("gap_closed") is not None for row in shown)
    ]
    if not 0 < len(domains) <= _MOST_ROWS:
        return False
    axes = figure.subplots()
    width = 0.8 / len(shown)
    for place, row in enumerate(shown):
        scores = [row["domains"].get(name) or {} for name in domains]
        known = [(at, score) for at, score in enumerate(scores) if score.get("gap_closed") is not None]
        axes.bar(
            [at + (place - (len(shown) - 1) / 2) * width for at, _ in known],
            [score["gap_closed"] for _, score in known],
            width * 0.92,
            label=row["name"],
            color=_KIND_COLOURS[row["kind"]],
            capsize=2,
            yerr=[score.get("gap_error") or 0.0 for _, score in known],
            error_kw={"elinewidth": 1},
        )
    axes.axhline(0, color="#55606b", linewidth=0.8)
    axes.axhline(1, color="#55606b", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(domains)), map(_short, domains))
    axes.set_ylabel("gap closed")
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return True


def _loss(figure: Any, content: dict[str, Any]) -> bool:
    results = content["results"]
    if not results or not results["against_base"]:
        return False
    every, names = [*results["domains"], *results["unseen"]], [row["name"] for row in results["rows"]]
    if max(len(every), len(names)) > _MOST_ROWS:
        return False
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
    if len(routing["experts"]) * len(every) > _MOST_COLUMNS:
        return False
    figure.set_size_inches(1.2 + 0.42 * len(routing["experts"]) * len(every), 1.6 + 0.26 * len(routing["rows"]))
    grid = figure.subplots(1, len(every), squeeze=False, sharey=True)[0]
    for place, (axes, domain) in enumerate(zip(grid, every, strict=True)):
        shares = routing["per_domain"][domain]["shares"]
        last = place == len(every) - 1
        _heat(figure, axes, shares, routing["rows"], routing["experts"], None, "Blues", 0, 1, "mean weight" if last else None)
        axes.set_title(_short(domain), fontsize=9)
    return True


def _similarity(figure: Any, content: dict[str, Any]) -> bool:
    similarity = content["routing"]["similarity"] if content["routing"] else None
    if not similarity or len(similarity["experts"]) > _MOST_ROWS:
        return False
    names, values = content["routing"]["experts"], similarity["experts"]
    low = min(0.0, min(min(row) for row in values))
    _heat(figure, figure.subplots(), values, names, names, values, "Blues", low, 1, "similarity")
    return True


def _training(figure: Any, content: dict[str, Any]) -> bool:
    curve = content["training"]["curve"] if content["training"] else None
    if not curve or not (curve["training"] or curve["mean"]) or len(curve["domains"]) > _MOST_ROWS:
        return False
    axes, experts = figure.subplots(), content["mixture"]["experts"]
    looks: list[tuple[str, list[list[float]], dict[str, Any]]] = [
        ("training text", curve["training"], {"color": "#8a949d", "linewidth": 0.7}),
        ("held-out mean", curve["mean"], {"color": "#1b2128", "linewidth": 2}),
    ]
    for name, points in curve["domains"].items():
        place = experts.index(name) if name in experts else 7
        look = {"color": PALETTE[place % len(PALETTE)], "linewidth": 1.4, "linestyle": _LINES[place % len(_LINES)]}
        looks.append((f"held-out {_short(name)}", points, look))
    for label, points, look in looks:
        axes.plot([step for step, _ in points], [value for _, value in points], label=label, **look)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return True


def _pareto(figure: Any, content: dict[str, Any]) -> bool:
    search = content["search"]
    if not search or len(search["points"]) < 2:
        return False
    axes = figure.subplots()
    axes.scatter(*zip(*((active / 1e6, loss) for active, loss in search["points"]), strict=True), s=14, color="#8a949d")
    front = list(zip(*((active / 1e6, loss) for active, loss in search["front"]), strict=True))
    axes.plot(*front, color=_KIND_COLOURS["mixture"], marker="o", markersize=4, label="no other is better with as few")
    axes.set_xlabel("active parameters, millions")
    axes.set_ylabel("loss on the select split, nats per token")
    axes.legend(frameon=False)
    return True


def _heat(
    figure: Any,
    axes: Any,
    values: list[list[float | None]],
    rows: list[str],
    columns: list[str],
    shown: list[list[float | None]] | None,
    colours: str,
    low: float,
    high: float,
    label: str | None,
) -> None:
    """A heat map with names on both sides and, with `shown`, a figure in each cell."""
    numbers = [[float("nan") if value is None else value for value in row] for row in values]
    image = axes.imshow(numbers, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(len(columns)), map(_short, columns), rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), map(_short, rows))
    axes.spines[:].set_visible(False)
    for y, row in enumerate(shown or []):
        for x, value in enumerate(row):
            if value is not None:
                r, g, b, _ = image.cmap(image.norm(numbers[y][x])) if values[y][x] is not None else (1, 1, 1, 1)
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="k" if r + g + b > 1.5 else "w")
    if label is not None:
        figure.colorbar(image, ax=axes, label=label)


def _short(name: str) -> str:
    name = "".join(character for character in name if character.isprintable())
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 9]}...{name[-6:]}"


_DRAWINGS: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    "gap": _gap,
    "loss": _loss,
    "routing": _routing,
    "similarity": _similarity,
    "training": _training,
    "pareto": _pareto,
}
