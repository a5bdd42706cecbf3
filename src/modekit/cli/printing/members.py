"""What the commands about the experts of a mixture draw on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from modekit.cli.printing.advice import print_findings
from modekit.cli.printing.console import out
from modekit.cli.printing.table import Table
from modekit.files.figures import bytes_of, three_digits

if TYPE_CHECKING:
    from modekit.checkpoint.record import Change
    from modekit.members.admission import Admission
    from modekit.members.listing import ListedExpert


def print_admission(admission: Admission) -> None:
    """Draw what was measured of an expert before it is added."""
    if admission.losses:
        table = Table("model", ["loss", "gain over base"])
        for name, loss in admission.losses.items():
            table.add(admission.expert if name == "expert" else name, f"{loss:.3f}", f"{admission.losses['base'] - loss:+.3f}")
        out.print(
            f"Held-out loss in nats per token on {admission.tokens:,} tokens of {admission.expert}'s text (select split)."
        )
        out.print(table)
    if admission.nearest is not None:
        name, cosine, distance = admission.nearest
        near = f"the nearest expert is {name}: cosine {cosine:.2f}, distance {three_digits(distance)}"
        out.print(f"{admission.expert} moved {three_digits(admission.drift)} of the base's size; {near}.")
    print_findings(admission.findings)


def print_experts(experts: Sequence[ListedExpert], history: Sequence[Change]) -> None:
    """Draw the experts of a mixture and the history of its changes."""
    table = Table("expert", ["is", "of its own", "since", "gain", "gap closed", "licence", "from"])
    for expert in experts:
        figures = ["-" if value is None else f"{value:.3f}" for value in (expert.gain, expert.gap_closed)]
        table.add(
            expert.name,
            expert.kind,
            bytes_of(expert.nbytes),
            expert.since or "the build",
            *figures,
            expert.licence,
            expert.source,
        )
    out.print("Gain: loss of the base less that of the mixture on the expert's domain, in nats per token (`modekit eval`).")
    out.print(table)
    for change in history:
        out.print(Text.assemble((change.on, "dim"), f" {change.said}"))
