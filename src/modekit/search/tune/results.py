"""What a search found: the table of all candidates, the best, and the Pareto front of loss against active parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from modekit.evaluation.gaps import SMALLEST_GAP
from modekit.evaluation.markdown import markdown_table
from modekit.files.figures import count_of
from modekit.recipes.fits import DEFAULT_FIT, FITS
from modekit.search.tune.candidate import Candidate
from modekit.search.tune.space import label, short_backbone

Losses = Mapping[str, float]


@dataclass(frozen=True)
class TuneResults:
    """Of a search.

    Attributes:
        candidates: in the order of the search.
        reported: number of a candidate -> its loss per domain on the report split.
        reference: split -> base, own -> loss per domain of the base and of the domain's own expert.
        seconds: that this run of the search took to find the best; the report and the build come on top.
    """

    candidates: Sequence[Candidate]
    best: Candidate
    front: Sequence[Candidate]
    reported: Mapping[int, Losses]
    reference: Mapping[str, Mapping[str, Losses]]
    settings: Mapping[str, Any]
    space: Mapping[str, Any]
    text: Mapping[str, Mapping[str, Any]]
    seconds: float

    def gap_closed(self, losses: Losses, split: str) -> float | None:
        """Mean share of the gap closed, over the domains that have one."""
        base, own = self.reference[split]["base"], self.reference[split]["own"]
        gaps = [
            (base[name] - loss) / (base[name] - own[name])
            for name, loss in losses.items()
            if base[name] - own[name] > SMALLEST_GAP
        ]
        return sum(gaps) / len(gaps) if gaps else None

    def ranked(self) -> list[Candidate]:
        """By loss; those that were dropped behind those that were scored in full, and behind those that were dropped after
        more of the text, since losses on other text do not compare; refused ones last.
        """
        order = {"scored": 0, "dropped": 1, "refused": 2}
        return sorted(self.candidates, key=lambda each: (order[each.status], -each.tokens, each.mean if each.losses else 0.0))

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        front = {candidate.number for candidate in self.front}
        rows = []
        for candidate in self.ranked():
            report = self.reported.get(candidate.number)
            rows.append(
                {
                    **asdict(candidate),
                    "description": describe(candidate.mixture),
                    "mean_loss": candidate.mean if candidate.losses else None,
                    "gap_closed": self.gap_closed(candidate.losses, "select") if candidate.status == "scored" else None,
                    "report": None
                    if report is None
                    else {
                        "losses": dict(report),
                        "mean_loss": _mean(report),
                        "gap_closed": self.gap_closed(report, "report"),
                    },
                    "best": candidate.number == self.best.number,
                    "pareto": candidate.number in front,
                }
            )
        return {
            "format": 1,
            "candidates": rows,
            "reference": self.reference,
            "settings": dict(self.settings),
            "space": dict(self.space),
            "text": self.text,
            "seconds": self.seconds,
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and cells, best first."""
        header = ["", "variant", "select loss", "report loss", "gap closed", "active", "runs as"]
        body = []
        front = {candidate.number for candidate in self.front}
        for candidate in self.ranked():
            report = self.reported.get(candidate.number)
            gap = self.gap_closed(report, "report") if report is not None else None
            mark = "best" if candidate.number == self.best.number else "front" if candidate.number in front else ""
            name = f"{candidate.name}: " if candidate.name else ""
            body.append(
                [
                    mark,
                    name + describe(candidate.mixture),
                    _loss_text(candidate),
                    "-" if report is None else f"{_mean(report):.4f}",
                    "-" if gap is None else f"{gap:.3f}",
                    count_of(candidate.active) if candidate.active else "-",
                    _runs_as(candidate),
                ]
            )
        return header, body

    def markdown(self) -> str:
        """All candidates; dropped ones with the loss at which they were dropped."""
        header, body = self.table()
        about = [
            "Mean loss over the domains in nats per token. Candidates were compared on the select split; the report split",
            "chose nothing. In brackets: dropped after a part of the text. Gap closed is that of the report split.",
        ]
        reasons = {candidate.why: None for candidate in self.candidates if candidate.why}
        refused = ["", "Refused:", *(f"* {' '.join(why.split())}" for why in reasons)] if reasons else []
        return "\n".join([*about, "", markdown_table(header, body), *refused, ""])


def describe(mixture: Mapping[str, Any]) -> str:
    """A mixture in a line."""
    router = mixture.get("router", {})
    words = []
    if mixture.get("method") == "linear":
        words.append("linear")
    else:  # a recipe's own mixture need not say what is the default
        words.append(FITS[router.get("fit", DEFAULT_FIT)].label)
        words += [router["granularity"]] if "granularity" in router else []
        words += [f"order {router['order']}"] if "order" in router else []
        words += [f"decay {router['decay'][0]:g}"] if router.get("decay") else []
        words += [f"T {router['temperature']:g}"] if router.get("temperature", 1.0) != 1.0 else []
        words += [f"top-{mixture['top_k']}"] if mixture.get("top_k") else []
        words += [f"top_p {mixture['top_p']:g}"] if mixture.get("top_p") else []
    always_on = mixture.get("always_on")
    if always_on is not None:
        share = f" {always_on['weight']:g}" if always_on.get("weight") else ""
        words.append(f"always {always_on['expert']}{share}")
    if mixture.get("modules", "auto") != "auto":
        modules = mixture["modules"]
        words.append({"all": "whole models", "decoder": "whole decoders"}.get(str(modules)) or "+".join(modules))
    words += [f"layers {','.join(map(str, mixture['layers']))}"] if mixture.get("layers") else []
    if mixture.get("backbone", "base") != "base":
        words.append("backbone " + short_backbone(label(mixture["backbone"])))
    return ", ".join(words)


def _loss_text(candidate: Candidate) -> str:
    if not candidate.losses:
        return candidate.status
    return f"{candidate.mean:.4f}" if candidate.status == "scored" else f"({candidate.mean:.4f})"


def _runs_as(candidate: Candidate) -> str:
    if candidate.status == "refused":
        return "-"
    return "native" if candidate.native else "modekit"


def _mean(losses: Losses) -> float:
    return sum(losses.values()) / len(losses)
