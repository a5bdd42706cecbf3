"""The command that finds domains in text that nobody has labelled."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modekit.cli.options import grouped
from modekit.cli.printing.discovery import print_discovery
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import AsJson, Fsync, Overwrite, Trust, app, resolved
from modekit.errors import ModekitError
from modekit.files.output import replaced_by
from modekit.run import Run

if TYPE_CHECKING:
    from modekit.search.discover.settings import DiscoverSettings


@dataclass(frozen=True)
class DiscoverOptions:
    """How many domains, and by what documents are alike."""

    domains: Annotated[int | None, typer.Option(help="Number of domains (default: chosen by held-out likelihood).")] = None
    most: Annotated[int | None, typer.Option(help="Largest number of domains to try (default 12; without --domains).")] = None
    features: Annotated[
        str, typer.Option(help="words; tokens: n-grams of the base's tokens; hidden: the base's hidden states.")
    ] = "words"
    model: Annotated[
        str | None, typer.Option(metavar="BASE", help="Folder or hub id of the base model, for tokens and hidden.")
    ] = None
    sample: Annotated[int, typer.Option(help="Largest number of documents to learn the groups from.")] = 8_192
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the grouping.")] = 0

    def settings(self) -> DiscoverSettings:
        """Checked. Raises ModekitError, and SourceError for a base model that is not there."""
        from modekit.search.discover.settings import DiscoverSettings, checked_features
        from modekit.sources.open import model_folder

        if self.domains is not None and self.most is not None:
            raise ModekitError(
                "the setting has no effect", where="--most", found=self.most, expected="no --domains", remedy="remove one"
            )
        model = None if self.model is None else model_folder(self.model, None, root=Path.cwd(), label="--model")
        features = checked_features(self.features)
        return DiscoverSettings(self.domains, self.most or 12, features, model, self.sample, self.seed)


@dataclass(frozen=True)
class DiscoverOutput:
    """What is said of the groups, and how."""

    mixture: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Mixture whose router is asked which groups it has an expert for.")
    ] = None
    overwrite: Overwrite = False
    fsync: Fsync = True
    as_json: AsJson = False
    trust_remote_code: Trust = False


@app.command()
@grouped
def discover(
    text: Annotated[list[str], typer.Option(help="Unlabelled text: file, folder or hub data set; repeatable.")],
    options: DiscoverOptions,
    said: DiscoverOutput,
    output: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="The folder to write: a .jsonl per domain; left out, nothing is.")
    ] = None,
) -> None:
    """Group unlabelled documents into domains, say what each is about and which of them a mixture serves already."""
    try:
        from modekit.search.discover.discover import Unlabelled, discover
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"sklearn", "scipy", "threadpoolctl"}:
            raise
        raise ModekitError(
            "grouping documents needs scikit-learn", where="modekit discover", remedy="pip install 'modekit[discover]'"
        ) from None
    from modekit.checkpoint.checkpoint import open_checkpoint

    mixture = None if said.mixture is None else open_checkpoint(resolved(said.mixture))
    folder = None if output is None else resolved(output)
    with drawn_progress() as progress:
        discovery = discover(
            Unlabelled(text, Path.cwd(), mixture),
            options.settings(),
            out=folder,
            replace=replaced_by(said.overwrite),
            run=Run(said.trust_remote_code, progress, said.fsync),
        )
    if said.as_json:
        sys.stdout.write(json.dumps(discovery.as_data(), indent=2) + "\n")
    else:
        print_discovery(discovery, output)
