"""Commands that show a mixture to others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from modekit.cli.printing.console import out
from modekit.cli.printing.figures import bytes_of
from modekit.cli.printing.reports import print_parcel
from modekit.cli.shell import OutFolder, Overwrite, app


@app.command()
def report(
    checkpoint: OutFolder,
    output: Annotated[Path | None, typer.Option("--out", help="The page to write; default OUT/results/report.html.")] = None,
) -> None:
    """Write one page that shows what the mixture is and is worth, its numbers as JSON, and plots for papers."""
    from modekit.checkpoint.checkpoint import open_checkpoint
    from modekit.report.write import write_report

    written = write_report(open_checkpoint(checkpoint.resolve()), page=output.resolve() if output is not None else None)
    for note in written.notes:
        out.print(f"[yellow]note:[/] {escape(note)}")
    out.print(f"[bold]{escape(str(written.page))}[/]: {bytes_of(written.page.stat().st_size)}, {len(written.plots)} plots")


@app.command()
def card(checkpoint: OutFolder, overwrite: Overwrite = False) -> None:
    """Write the model card, OUT/README.md, with what the sources say of their licences."""
    from modekit.checkpoint.checkpoint import open_checkpoint
    from modekit.report.card import write_card

    written = write_card(open_checkpoint(checkpoint.resolve()), overwrite=overwrite)
    for note in written.notes:
        out.print(f"[yellow]note:[/] {escape(note)}")
    out.print(f"[bold]{escape(', '.join(map(str, written.files)))}[/]: license {escape(written.licence)}")


@app.command()
def push(
    checkpoint: OutFolder,
    repo: Annotated[str, typer.Argument(help="NAME or OWNER/NAME on the hub; made when it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository for you alone.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go and what would stay.")] = False,
) -> None:
    """Upload the mixture to the hub: without the router's statistics, and without paths of this machine."""
    from modekit.checkpoint.checkpoint import open_checkpoint
    from modekit.report.push import pack, push

    parcel = pack(open_checkpoint(checkpoint.resolve()), ask_hub=not dry_run)
    print_parcel(parcel, repo)
    if not dry_run:
        out.print(f"[bold]{escape(push(parcel, repo, private=private or None))}[/]", highlight=False, soft_wrap=True)
