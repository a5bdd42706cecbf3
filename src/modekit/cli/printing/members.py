"""What the commands that change who is in a mixture draw on a terminal."""

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
    from modekit.members.door import Door
    from modekit.members.listing import Member


def print_door(door: Door) -> None:
    """Draw what was measured of an expert before it is let in."""
    if door.losses:
        table = Table("model", ["loss", "base less it"])
        for name, loss in door.losses.items():
            table.add(door.expert if name == "expert" else name, f"{loss:.3f}", f"{door.losses['base'] - loss:+.3f}")
        out.print(f"Held-out loss in nats per token on {door.tokens:,} tokens of {door.expert}'s text (select split).")
        out.print(table)
    if door.nearest is not None:
        name, cosine, distance = door.nearest
        near = f"of those who are there {name} is nearest: cosine {cosine:.2f}, distance {three_digits(distance)}"
        out.print(f"{door.expert} moved {three_digits(door.drift)} of the base's size; {near}.")
    print_findings(door.findings)


def print_members(members: Sequence[Member], history: Sequence[Change]) -> None:
    """Draw who is in, and who came and went."""
    table = Table("expert", ["is", "of its own", "since", "gain", "gap closed", "licence", "from"])
    for member in members:
        figures = ["-" if value is None else f"{value:.3f}" for value in (member.gain, member.gap_closed)]
        table.add(
            member.name,
            member.kind,
            bytes_of(member.nbytes),
            member.since or "the build",
            *figures,
            member.licence,
            member.source,
        )
    out.print("Gain: loss of the base less that of the mixture on the expert's domain, in nats per token (`modekit eval`).")
    out.print(table)
    for change in history:
        out.print(Text.assemble((change.on, "dim"), f" {change.said}"))
