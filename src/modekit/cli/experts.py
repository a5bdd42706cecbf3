"""Commands that make experts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.markup import escape

from modekit.cli.printing.console import out
from modekit.cli.printing.figures import bytes_of
from modekit.cli.printing.mixtures import print_extract
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import AsJson, Overwrite, Trust, app
from modekit.errors import ModekitError


@app.command()
def specialize(
    base: Annotated[str, typer.Argument(help="Folder or hub id of the base model.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    text: Annotated[list[str], typer.Option(help="Text of the domain; may be given several times.")],
    train: Annotated[
        str, typer.Option(help="mlp: only the FFN moves; lora: OUT is an adapter, a PEFT folder; full: everything moves.")
    ] = "mlp",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the adapter (--train lora; default 16).")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; default: once over the text.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0, max=10, help="Peak learning rate (default 1e-4; lora 1e-3).")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=2, help="Tokens per step.")] = 4_096,
    sequence_length: Annotated[int, typer.Option(min=8, help="Longest piece of a document, in tokens.")] = 512,
    seed: Annotated[int, typer.Option(help="Order of the text.")] = 0,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
) -> None:
    """Fine-tune a base model on one domain so that it mixes well."""
    if train not in {"mlp", "lora", "full"}:
        raise ModekitError(
            "unknown choice", where="--train", found=train, expected="mlp, lora or full", remedy="write one of them"
        )
    if rank is not None and train != "lora":
        raise ModekitError("the setting has no effect", where="--rank", found=rank, remedy="remove it, or add --train lora")
    from modekit.experts.specialize import specialize as run
    from modekit.loaded.next_token import Training
    from modekit.sources.open import model_folder

    rate = learning_rate if learning_rate is not None else 1e-3 if train == "lora" else 1e-4
    training = Training(steps=steps, learning_rate=rate, batch_tokens=batch_tokens, sequence_length=sequence_length, seed=seed)
    with drawn_progress() as progress:
        record = run(
            model_folder(base, None, root=Path.cwd(), label="BASE"), output.resolve(),
            text, root=Path.cwd(), train=cast(Any, train), rank=rank or 16, training=training,
             overwrite=overwrite, trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    loss = record["held_out_loss"]
    change = "no held-out text" if loss["before"] is None else f"held-out loss {loss['before']:.3f} -> {loss['after']:.3f}"
    out.print(f"[bold]{escape(str(output))}[/]: {train}, {record['training']['steps']} steps, {change}")


@app.command()
def extract(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the fine-tuned model.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    base: Annotated[str, typer.Option(help="Folder or hub id of the model it was tuned from.")],
    rank: Annotated[int | None, typer.Option(help="Rank of every module's change.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="In place of --rank: the smallest ranks that keep this share of the squared change.")
    ] = None,
    max_rank: Annotated[int | None, typer.Option("--max-rank", help="Largest rank with --energy.")] = None,
    module: Annotated[list[str] | None, typer.Option(help="Only modules of this name (q_proj, mlp.down_proj).")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Text by whose activations the error is weighed; may be given several times.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=16, help="Tokens of that text (default 16,384).")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Turn a full fine-tune into a LoRA adapter over its base, and say what that loses."""
    from modekit.experts.extract import extract as run
    from modekit.sources.open import model_folder

    if tokens is not None and not text:
        raise ModekitError("the setting has no effect", where="--tokens", found=tokens, remedy="remove it, or add --text")
    with drawn_progress() as progress:
        record = run(
            model_folder(model, None, root=Path.cwd(), label="MODEL"),
            model_folder(base, None, root=Path.cwd(), label="--base"), output.resolve(), rank=rank, energy=energy,
            max_rank=max_rank, modules=module, texts=text or (), root=Path.cwd(), tokens=tokens or 16_384, base_name=base,
            overwrite=overwrite, trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    if as_json:
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
        return
    print_extract(record)
    totals = record["totals"]
    out.print(
        f"[bold]{escape(str(output))}[/]: {totals['modules']} modules, {bytes_of(totals['bytes'])}, "
        f"{totals['carried']:.0%} of the model's squared difference"
    )
