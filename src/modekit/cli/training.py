"""The command that trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from modekit.cli.options import grouped, texts_by_domain
from modekit.cli.printing.console import print_json
from modekit.cli.printing.mixtures import print_training
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import OutFolder, app, checkpoint_in, common, resolved
from modekit.text.amounts import SAMPLE_TOKENS


@dataclass(frozen=True)
class SettingOptions:
    """What is trained and how: settings (training/settings.py), most of them by the same name; None leaves one alone."""

    what: Annotated[
        list[str] | None,
        typer.Option(
            help="What to train: routers (default), attention, norms, mlp, embeddings, head, experts, all; repeatable."
        ),
    ] = None
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME or NAME=WEIGHT; repeatable: lm (default), distill, distill_reverse, teacher_ce, total_variation, label, "
            "balance, importance, load, mutual, z, consistency."
        ),
    ] = None
    gate: Annotated[
        str | None,
        typer.Option(
            help="How experts are chosen in training only: base, sinkhorn, random, domain-random, dselect, dense-to-sparse."
        ),
    ] = None
    regime: Annotated[
        str | None,
        typer.Option(
            help="mixture (default): experts as the routers choose. joint: each step has text of one domain and trains its "
            "expert and what all experts share."
        ),
    ] = None
    teacher: Annotated[
        str | None, typer.Option(help="Folder or hub id of one teacher for all text (default: each domain's own expert).")
    ] = None
    lora: Annotated[int | None, typer.Option(min=1, help="Train low-rank changes of this rank, folded in at the end.")] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; default: once over the text.")] = None
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate of routers (default 5e-3).")] = None
    backbone_learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate of everything else (default 1e-4).")
    ] = None
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens per step, of all processes together (default 4096).")] = None
    sequence_length: Annotated[int | None, typer.Option(help="Longest piece of a document, in tokens (default 512).")] = None
    share: Annotated[float | None, typer.Option(help="Share of the documents to train on (default 1).")] = None
    select_tokens: Annotated[
        int | None,
        typer.Option(help="Held-out tokens per domain on which states are compared (default 8192; no more than --tokens)."),
    ] = None
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None

    def said(self) -> dict[str, object]:
        """The settings that were given, by their names in a settings file."""
        from modekit.training.settings import WEIGHTS, losses_said

        losses = losses_said(self.loss, WEIGHTS, where="--loss") if self.loss else None
        given = {("losses" if name == "loss" else name): value for name, value in vars(self).items()} | {"losses": losses}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class LabelSettings:
    """Labels and text of no domain: further settings."""

    generic: Annotated[list[str] | None, typer.Option(help="Text of no domain, so that other text still goes to the base.")] = (
        None
    )
    generic_share: Annotated[float | None, typer.Option(help="Share of tokens from --generic (default 0.1).")] = None
    tags: Annotated[bool, typer.Option("--tags", help="Put its domain's tag before every text (the tokenizer needs tags).")] = (
        False
    )
    randomise: Annotated[
        float | None,
        typer.Option(
            help="Probability of a random label (domain randomisation; with label, distill, --tags or --regime joint)."
        ),
    ] = None
    randomise_to: Annotated[
        str | None,
        typer.Option(
            help="Labels to draw from: half (default; none or another, evenly), all (its own, too), others, generic (none)."
        ),
    ] = None

    def said(self) -> dict[str, object]:
        """As those of `SettingOptions`."""
        return {name: value for name, value in vars(self).items() if value is not None and value is not False}


@dataclass(frozen=True)
class TrainOptions:
    """Files and tables: where from, where to and how loudly."""

    settings: Annotated[
        Path | None, typer.Option(help="YAML with settings by name (docs/training.md); options of the command line win.")
    ] = None
    output: Annotated[Path | None, typer.Option("--out", help="Folder for the trained mixture (default: OUT itself).")] = None
    tokens: Annotated[
        int | None,
        typer.Option(min=0, help="Held-out tokens per domain for the tables before and after (default 8192); 0: none."),
    ] = None


@app.command()
@grouped
def train(
    checkpoint: OutFolder,
    said: SettingOptions,
    labels: LabelSettings,
    options: TrainOptions,
    text: Annotated[
        list[str] | None, typer.Option(help="domain=FILE, FOLDER or data set; repeatable. Default: the recipe's text.")
    ] = None,
) -> None:
    """Improve a mixture by gradient; by default train only its routers. Works under torchrun and accelerate launch."""
    from modekit.processes import processes
    from modekit.training.settings import given_settings

    wanted = given_settings({**said.said(), **labels.said()}, options.settings, held_out_tokens=options.tokens)
    tokens = SAMPLE_TOKENS if options.tokens is None else options.tokens
    with drawn_progress() as progress:
        from modekit.training.train import train

        done = train(
            checkpoint_in(checkpoint),
            wanted,
            texts=texts_by_domain(text),
            root=Path.cwd(),
            out=resolved(options.output) if options.output is not None else None,
            evaluate_tokens=tokens or None,
            run=common().run(progress),
        )
    if processes().is_main:
        if common().json:
            record = {"improved": done.improved, **done.record.model_dump(mode="json")}
            print_json(record)
        else:
            print_training(options.output if options.output is not None and done.improved else checkpoint, done)
    if done.failed is not None:
        raise done.failed
