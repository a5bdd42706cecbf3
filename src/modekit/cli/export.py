"""Commands that show a mixture to others, and take it elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from modekit.cli.options import grouped
from modekit.cli.printing import out, print_done, print_notes, print_table
from modekit.cli.progress import running
from modekit.cli.shell import OutFolder, Writing, app, checkpoint_in, refuse_without_effect, resolved
from modekit.engines.registry import Outtype
from modekit.evaluation.tables import ResultTable
from modekit.files.figures import bytes_of
from modekit.files.place import replaced_by

if TYPE_CHECKING:
    from modekit.checkpoint.checkpoint import Checkpoint
    from modekit.report.push import Parcel


@dataclass(frozen=True)
class ExportOptions(Writing):
    """What is written, and how."""

    expert: Annotated[list[str] | None, typer.Option(help="Only this expert; repeatable.")] = None
    gguf: Annotated[bool, typer.Option("--gguf", help="Write a GGUF file for llama.cpp and compare it with transformers.")] = (
        False
    )
    outtype: Annotated[Outtype | None, typer.Option(help="Type of the weights (--gguf; default: as in the checkpoint).")] = None


@app.command()
@grouped
def export(
    checkpoint: OutFolder,
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to write.")],
    options: ExportOptions,
) -> None:
    """Write the adapters of a mixture as ordinary PEFT folders, bit for bit; or a mixture for llama.cpp (--gguf)."""
    opened = checkpoint_in(checkpoint)
    if not options.gguf:
        refuse_without_effect("only --gguf reads it", {"--outtype": options.outtype})
        _export_adapters(opened, output, options)
        return
    refuse_without_effect("with --gguf the mixture is written as a whole", {"--expert": options.expert})
    with running() as run:
        from modekit.engines.gguf import export_gguf

        target, replaced = resolved(output), replaced_by(options.overwrite)
        written = export_gguf(opened, target, options.outtype, replace=replaced, run=run)
    print_done(output / written.file.name, f"{bytes_of(written.file.stat().st_size)}; in llama.cpp {written.proof}")
    print_notes(written.notes)


def _export_adapters(checkpoint: Checkpoint, output: Path, options: ExportOptions) -> None:
    from modekit.experts.export import exportable, why_not, write_export

    experts = exportable(checkpoint, options.expert)
    for expert, name in enumerate(checkpoint.names):
        if expert in experts:
            written = resolved(output) / name
            with running() as run:
                record = write_export(checkpoint, expert, written, overwrite=options.overwrite, run=run)
            print_done(output / name, f"LoRA, rank {record.rank}, {record.modules} modules")
            print_notes(record.notes)
        elif not options.expert:
            out.print(Text(f"{name}: not exported: {why_not(checkpoint, expert)}", style="dim"))


@app.command()
def report(checkpoint: OutFolder) -> None:
    """Write a report: one HTML page of all results."""
    opened = checkpoint_in(checkpoint)
    with running():
        from modekit.report.page import write_report

        written = write_report(opened)
    print_notes(written.notes)
    print_done(written.page, bytes_of(written.page.stat().st_size))


@app.command()
def push(
    checkpoint: OutFolder,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="NAME or OWNER/NAME on the hub; created if missing.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded; upload nothing.")] = False,
) -> None:
    """Upload the mixture to the hub, without router statistics and local paths."""
    with running():
        from modekit.report.push import check_repo, pack, push

        check_repo(repo)
        parcel = pack(checkpoint_in(checkpoint))
    print_parcel(parcel, repo)
    if not dry_run:
        with running() as run:
            run.begin("upload")
            address = push(parcel, repo, private=private or None)
        out.print(Text(address, style="bold"), soft_wrap=True)


def print_parcel(parcel: Parcel, repo: str) -> None:
    """Draw what goes to a repository and what stays."""
    sizes = parcel.sizes()
    made = {name for name, content in parcel.files.items() if isinstance(content, bytes)}
    rows = [[name, bytes_of(size), "made for it" if name in made else "as it is"] for name, size in sizes.items()]
    print_table(ResultTable("", [f"to {repo}", "bytes", "how"], rows, prose=True))
    print_notes(parcel.notes)
    if parcel.left:
        left = ", ".join(f"{name} ({bytes_of(size)})" for name, size in parcel.left.items())
        out.print(Text(f"stays here: {left}"))
    print_done(repo, f"{bytes_of(sum(sizes.values()))} in {len(sizes)} files go, {bytes_of(sum(parcel.left.values()))} stay")
