"""Commands that show a mixture to others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from modekit.cli.printing.console import out
from modekit.cli.printing.mixtures import print_notes
from modekit.cli.printing.table import Table
from modekit.cli.progress import LIBRARIES, drawn_progress
from modekit.cli.shell import OutFolder, app, resolved
from modekit.files.figures import bytes_of

if TYPE_CHECKING:
    from modekit.report.push import Parcel


@app.command()
def report(
    checkpoint: OutFolder,
    output: Annotated[Path | None, typer.Option("--out", help="File for the page (default OUT/results/report.html).")] = None,
) -> None:
    """Write a report: one HTML page of results, its numbers as JSON, and charts as SVG."""
    from modekit.checkpoint.checkpoint import open_checkpoint

    opened, page = open_checkpoint(resolved(checkpoint)), resolved(output) if output is not None else None
    with drawn_progress() as progress:
        progress(LIBRARIES, 0, 1)
        from modekit.report.write import write_report

        written = write_report(opened, page=page)
    print_notes(written.notes)
    said = f"{bytes_of(written.page.stat().st_size)}, {len(written.plots)} chart{'' if len(written.plots) == 1 else 's'}"
    out.print(Text.assemble((str(written.page), "bold"), f": {said}"))


@app.command()
def card(
    checkpoint: OutFolder,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a README.md that you wrote or changed.")] = False,
) -> None:
    """Write the model card (OUT/README.md) with the licences of all sources."""
    from modekit.checkpoint.checkpoint import open_checkpoint

    opened = open_checkpoint(resolved(checkpoint))
    with drawn_progress() as progress:
        progress(LIBRARIES, 0, 1)
        from modekit.report.card import write_card

        written = write_card(opened, overwrite=overwrite)
    print_notes(written.notes)
    paths = ", ".join(str(opened.folder / name) for name in written.contents)
    out.print(Text.assemble((paths, "bold"), f": license {written.licence}"))


@app.command()
def push(
    checkpoint: OutFolder,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="NAME or OWNER/NAME on the hub; created if missing.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded; upload nothing.")] = False,
) -> None:
    """Upload the mixture to the hub, without router statistics and local paths."""
    from modekit.checkpoint.checkpoint import open_checkpoint
    from modekit.report.push import check_repo, pack, push

    check_repo(repo)
    parcel = pack(open_checkpoint(resolved(checkpoint)), ask_hub=not dry_run)
    print_parcel(parcel, repo)
    if not dry_run:
        out.print(Text(push(parcel, repo, private=private or None), style="bold"), soft_wrap=True)


def print_parcel(parcel: Parcel, repo: str) -> None:
    """Draw what goes to a repository and what stays."""
    sizes = parcel.sizes()
    table = Table(f"to {repo}", ["bytes", "how"])
    for name, size in sizes.items():
        table.add(name, bytes_of(size), "made for it" if isinstance(parcel.files[name], bytes) else "as it is")
    out.print(table)
    print_notes(parcel.notes)
    if parcel.left:
        left = ", ".join(f"{name} ({bytes_of(size)})" for name, size in parcel.left.items())
        out.print(Text(f"stays here: {left}"))
    going, staying = bytes_of(sum(sizes.values())), bytes_of(sum(parcel.left.values()))
    out.print(Text.assemble((going, "bold"), f" in {len(sizes)} files go, {staying} stay"))
