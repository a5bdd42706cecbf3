"""The command that finds domains in text that nobody has labelled."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from modekit.cli.options import grouped
from modekit.cli.printing.discovery import print_discovery
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import AsJson, Fsync, Overwrite, Trust, app, resolved
from modekit.errors import ModekitError
from modekit.files.output import replaced_by
from modekit.run import Run
from modekit.search.discover.result import MOST_DOMAINS, DiscoverSettings


@dataclass(frozen=True)
class DiscoverOptions:
    """Options of `modekit discover`."""

    domains: Annotated[
        int | None,
        typer.Option(min=2, max=MOST_DOMAINS, help="Number of domains (default: chosen by held-out likelihood)."),
    ] = None
    most: Annotated[
        int | None,
        typer.Option(min=2, max=MOST_DOMAINS, help="Largest number of domains to try (default 12; without --domains)."),
    ] = None
    sample: Annotated[int, typer.Option(min=2, help="Largest number of documents to learn the groups from.")] = 8_192
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the grouping.")] = 0
    mixture: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Mixture to compare with: which groups its router sends to an expert.")
    ] = None
    overwrite: Overwrite = False
    fsync: Fsync = True
    as_json: AsJson = False
    trust_remote_code: Trust = False

    def settings(self) -> DiscoverSettings:
        """Raises ModekitError for options that exclude each other."""
        if self.domains is not None and self.most is not None:
            raise ModekitError(
                "the setting has no effect", where="--most", found=self.most, expected="no --domains", remedy="remove one"
            )
        return DiscoverSettings(domains=self.domains, most=self.most or 12, sample=self.sample, seed=self.seed)


@app.command()
@grouped
def discover(
    text: Annotated[list[str], typer.Option(help="Unlabelled text: file, folder or hub data set; repeatable.")],
    options: DiscoverOptions,
    output: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="Folder to write a .jsonl per domain to (default: write nothing).")
    ] = None,
) -> None:
    """Group unlabelled documents into domains, name each by its words, and show which ones a mixture already serves."""
    try:
        from modekit.search.discover.discover import Unlabelled, discover
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"sklearn", "scipy", "threadpoolctl"}:
            raise
        raise ModekitError(
            "grouping documents needs scikit-learn", where="modekit discover", remedy="pip install 'modekit[discover]'"
        ) from None
    from modekit.checkpoint.checkpoint import open_checkpoint

    mixture = None if options.mixture is None else open_checkpoint(resolved(options.mixture))
    with drawn_progress() as progress:
        discovery = discover(
            Unlabelled(text, Path.cwd(), mixture),
            options.settings(),
            out=None if output is None else resolved(output),
            replace=replaced_by(options.overwrite),
            run=Run(options.trust_remote_code, progress, options.fsync),
        )
    if options.as_json:
        sys.stdout.write(discovery.model_dump_json(indent=2) + "\n")
    else:
        print_discovery(discovery, output)
