"""Commands that make mixtures of dense models, and dense models of mixtures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic import BaseModel, Field

from modekit.cli.options import DomainTexts, grouped, texts_by_domain
from modekit.cli.printing import print_done, print_json, print_notes, print_table
from modekit.cli.progress import running
from modekit.cli.shell import NewFolder, OutFolder, Writing, app, checkpoint_in, common, refuse_without_effect, writable
from modekit.cli.words import Words, settings_in
from modekit.evaluation.tables import ResultTable
from modekit.files.figures import count_of, or_dash
from modekit.text.amounts import SAMPLE_TOKENS

if TYPE_CHECKING:
    from modekit.conversion.densify import DenseRecord


class DensifySettings(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Settings of `modekit densify`; but for the last two of distillation alone."""

    steps: int | None = Field(None, description="Optimiser steps (default 200).")
    learning_rate: float | None = Field(None, description="Peak learning rate (default 1e-4).")
    batch_tokens: int | None = Field(None, description="Tokens per step (default 4096).")
    evaluate_every: int | None = Field(None, description="Steps between states that are compared.")
    seed: int | None = Field(None, description="Random seed of the text order.")
    weights: float | None = Field(None, description="Weight of the text loss, the mixture's is the rest (default 0.5).")
    temperature: float | None = Field(None, description="Softmax temperature of mixture and model (default 1).")
    sequence_length: int | None = Field(None, description="Longest piece of a document, in tokens (default 512).")
    select_tokens: int | None = Field(None, description="Held-out tokens per domain that states are compared on.")


_OF_ANY = ("sequence_length", "select_tokens")


@dataclass(frozen=True)
class DensifyOptions(Writing):
    """How the models are merged, and by what text."""

    scale: Annotated[
        float | None,
        typer.Option(min=0, max=1_000, help="Scale of the summed differences (not with average; default: by text)."),
    ] = None
    text: DomainTexts = None
    tokens: Annotated[int, typer.Option(min=64, help="Held-out tokens per domain for the table.")] = SAMPLE_TOKENS


@app.command()
@grouped
def densify(
    checkpoint: OutFolder,
    output: Annotated[Path, typer.Argument(metavar="DENSE", help="The folder to write.")],
    options: DensifyOptions,
    words: Words = None,
    by: Annotated[
        Literal["distil", "average", "sum", "best"],
        typer.Option(
            help="distil: the best merge, then distilled from the mixture; average: the mean of the experts; sum: of their "
            "differences; best: one expert."
        ),
    ] = "distil",
) -> None:
    """Turn a mixture into one dense model of the base's size, and show what it keeps."""
    course = settings_in(words, DensifySettings, "densify").model_dump(exclude_none=True)
    if by != "distil":
        refuse_without_effect("--by distil", {key: course[key] for key in [*course] if key not in _OF_ANY})
    if by in ("average", "best"):
        refuse_without_effect("--by sum or distil", {"--scale": options.scale})
    target, opened = writable(output, options.overwrite, trains=True), checkpoint_in(checkpoint)
    with running() as run:
        from modekit.conversion.densify import Densify, course_of, densify

        said = course_of(**course)
        texts, scale = texts_by_domain(options.text), options.scale
        asked = Densify(by, said, texts, Path.cwd(), scale, options.tokens, options.overwrite)
        record = densify(opened, asked, target, run=run)
    if common().json:
        print_json({**record.model_dump(mode="json"), "kept": record.kept})
    else:
        print_dense(output, record)


def print_dense(output: Path, record: DenseRecord) -> None:
    """A row per model, a column per domain."""
    domains = list(record.losses.get("dense", {}))
    if domains:
        rows = []
        for row, losses in record.losses.items():
            figures = [losses[domain] for domain in domains]
            cells = [f"{loss:.3f}" for loss in (*figures, sum(figures) / len(figures))]
            rows.append([row, *cells, or_dash(record.gap_closed.get(row), ".2f")])
        print_table(ResultTable("", ["held-out loss", *domains, "mean", "gap closed"], rows))
    print_notes(record.notes)
    said = f"{count_of(record.parameters)} parameters, {record.merge.said}"
    said += f", then {record.best_step} steps of distillation" if record.by == "distil" else ""
    said += f"; keeps {record.kept:.0%} of the mixture's gap" if record.kept is not None else ""
    print_done(output, said)


@dataclass(frozen=True)
class UpcycleOptions(Writing):
    """Which experts."""

    experts: Annotated[int, typer.Option(min=2, max=128, help="Copies of the FFN in every layer.")] = 4
    top_k: Annotated[int, typer.Option(min=1, help="Copies per token.")] = 2
    seed: Annotated[int, typer.Option(help="Random seed of the gates.")] = 0


@app.command()
@grouped
def upcycle(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or hub id of the dense model.")],
    output: NewFolder,
    options: UpcycleOptions,
) -> None:
    """Turn a dense model into a mixture with the same logits, to be trained."""
    from modekit.conversion.upcycle import Upcycling, upcycle

    target = writable(output, options.overwrite)
    with running() as run:
        asked = Upcycling(options.experts, options.top_k, options.seed, options.overwrite)
        made = upcycle(base, asked, target, root=Path.cwd(), run=run)
    size = made.parameters
    said = f"{count_of(size.total)} parameters, {count_of(size.active)} active per token, {len(made.names)} experts"
    print_done(output, said)
