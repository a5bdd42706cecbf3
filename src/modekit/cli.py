"""The command line: parses, calls one public function, prints. Heavy modules are imported inside the commands."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.markup import escape
from typer.exceptions import TyperException

from modekit.errors import InterruptError, ModekitError
from modekit.printing import (
    bytes_of,
    err,
    out,
    print_checks,
    print_extract,
    print_plan,
    print_results,
    print_summary,
    print_training,
)
from modekit.progress import Progress

app = typer.Typer(
    name="modekit",
    help="Turn language models fine-tuned for different domains into one Mixture of Domain Experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(help="The recipe.yaml.")]
OutFolder = Annotated[Path, typer.Argument(help="The checkpoint folder.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Accept models that bring code of their own.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder once the new one is whole.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def _one_process(context: typer.Context) -> None:
    from modekit.processes import launched

    if launched() > 1 and context.invoked_subcommand not in {"fit", "train"}:
        raise ModekitError(
            "this command runs in one process", where=f"modekit {context.invoked_subcommand}", found=f"{launched()} processes",
            remedy="start it without a launcher; fit and train know how to share their work",
        )  # fmt: skip


@app.command()
def plan(recipe: RecipePath, as_json: AsJson = False, trust_remote_code: Trust = False) -> None:
    """Show what a build would do, from configs and headers alone."""
    from modekit.data import check_present
    from modekit.plan import make_plan
    from modekit.plan import summary as summarise
    from modekit.recipe import load_recipe

    root, parsed = recipe.resolve().parent, load_recipe(recipe)
    summary = summarise(make_plan(parsed, root, trust_remote_code=trust_remote_code, headers_only=True))
    for place, expert in enumerate(parsed.experts):
        check_present(expert.text or [], root=root, where=f"experts[{place}] '{expert.name}'")
    for domain, texts in parsed.eval.items():
        check_present(texts, root=root, where=f"eval.{domain}")
    if as_json:
        sys.stdout.write(json.dumps(summary, indent=2) + "\n")
    else:
        print_plan(summary)


@app.command()
def build(
    recipe: RecipePath, output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    overwrite: Overwrite = False, trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Write the mixture: stream the experts, fit the router."""
    from modekit.build import build as run
    from modekit.plan import make_plan
    from modekit.recipe import load_recipe

    made = make_plan(load_recipe(recipe), recipe.resolve().parent, trust_remote_code=trust_remote_code)
    with _progress() as progress:
        checkpoint = run(made, output.resolve(), overwrite=overwrite, progress=progress)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    out.print(
        f"[bold]{escape(str(output))}[/]: {made.config['architectures'][0]}, {made.experts} experts, "
        f"top_k {made.recipe.top_k}, router {checkpoint.record.router.status}, {bytes_of(size)}"
    )


@app.command()
def fit(
    checkpoint: OutFolder,
    method: Annotated[str | None, typer.Option(help="linear, gating or routing.")] = None,
    router: Annotated[str | None, typer.Option("--fit", help="As mixture.router.fit in a recipe.")] = None,
    granularity: Annotated[
        str | None, typer.Option(help="token, context or sequence (reads the text again; not for a native checkpoint).")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Experts per token.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Divides the router's logits.")] = None,
    l2: Annotated[float | None, typer.Option(help="Regularisation.")] = None,
    tokens_per_domain: Annotated[int | None, typer.Option(help="Tokens read per domain (reads the text again).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of a random router.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Set the router anew, from kept statistics where they suffice; the experts are not touched."""
    from modekit.checkpoint import open_checkpoint
    from modekit.processes import processes
    from modekit.routing.refit import refit

    wanted = {
        "fit": router, "granularity": granularity, "temperature": temperature, "l2": l2,
        "tokens_per_domain": tokens_per_domain, "seed": seed,
    }  # fmt: skip
    changes: dict[str, Any] = {"router": {key: value for key, value in wanted.items() if value is not None}}
    if method is not None:
        changes["method"] = method
    if top_k is not None:
        changes["top_k"] = top_k
    with _progress() as progress:
        done = refit(open_checkpoint(checkpoint.resolve()), changes, trust_remote_code=trust_remote_code, progress=progress)
    if not processes().is_main:
        return
    settings = done.record.router.settings
    name = settings.fit if settings is not None else "zero gate"
    out.print(
        f"[bold]{escape(str(checkpoint))}[/]: router {name}, {done.record.router.status}, "
        f"method {done.record.recipe.mixture.method}, top_k {done.record.recipe.top_k}"
    )


@app.command()
def train(
    checkpoint: OutFolder,
    text: Annotated[
        list[str] | None,
        typer.Option(help="domain=FILE, FOLDER or data set; may be given several times. Default: the recipe's text."),
    ] = None,
    what: Annotated[
        list[str] | None,
        typer.Option(help="What moves: routers (default), attention, norms, mlp, embeddings, head, experts, all; repeatable."),
    ] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME or NAME=WEIGHT; repeatable: lm (default), distill, distill_reverse, label, balance, importance, z."
        ),
    ] = None,
    cheap: Annotated[
        bool, typer.Option("--cheap", help="Gates alone, on kept activations with domain labels: no pass back.")
    ] = False,
    lora: Annotated[int | None, typer.Option(min=1, help="Train low-rank changes of this rank, folded in at the end.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; default: once over the text.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate of routers (default 5e-3).")] = None,
    backbone_learning_rate: Annotated[float | None, typer.Option(help="Peak rate of all else (default 1e-4).")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens per step, of all processes together (default 4096).")] = None,
    share: Annotated[float | None, typer.Option(help="Share of the documents that is trained on (default 1).")] = None,
    generic: Annotated[list[str] | None, typer.Option(help="Text of no domain, to keep the way back to the base.")] = None,
    randomise: Annotated[
        float | None, typer.Option(help="Probability of a wrong or missing label (domain randomisation; label, distill).")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="YAML with all settings by name (docs/training.md); options above count more.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything drawn.")] = None,
    output: Annotated[
        Path | None, typer.Option("--out", help="Write the trained mixture here and leave the first as it is.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=0, help="Held-out tokens per domain for the tables before and after; 0: none.")
    ] = 8_192,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Make a mixture better by gradient; by default only its routers move. Works under torchrun and accelerate launch."""
    from modekit.checkpoint import open_checkpoint
    from modekit.processes import processes
    from modekit.train.run import train as run
    from modekit.train.settings import read_settings, train_settings

    said: dict[str, Any] = {
        "what": what, "losses": _weights(loss), "speed": "cheap" if cheap else None, "lora": lora, "steps": steps,
        "learning_rate": learning_rate, "backbone_learning_rate": backbone_learning_rate, "batch_tokens": batch_tokens,
        "share": share, "generic": generic, "randomise": randomise, "seed": seed,
    }  # fmt: skip
    values = read_settings(settings) if settings is not None else {}
    values |= {key: value for key, value in said.items() if value is not None}
    wanted = train_settings(values, where=str(settings) if settings is not None else "modekit train")
    with _progress() as progress:
        done = run(
            open_checkpoint(checkpoint.resolve()), wanted, texts=_texts(text), root=Path.cwd(),
            out=output.resolve() if output is not None else None, evaluate_tokens=tokens or None,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    if processes().is_main:
        if as_json:
            record = {"improved": done.improved, **done.record.model_dump(mode="json")}
            sys.stdout.write(json.dumps(record, indent=2) + "\n")
        else:
            print_training(output if output is not None and done.improved else checkpoint, done)
    if done.failed is not None:
        raise done.failed


def _weights(losses: list[str] | None) -> dict[str, float] | None:
    """NAME or NAME=WEIGHT -> weight."""
    from modekit.train.settings import WEIGHTS

    if not losses:
        return None
    weights: dict[str, float] = {}
    for each in losses:
        name, sign, value = each.partition("=")
        try:
            weights[name] = float(value) if sign else cast(dict[str, float], WEIGHTS)[name]
        except (KeyError, ValueError):
            raise ModekitError(
                "unknown loss or weight", where="--loss", found=each, expected=f"one of {', '.join(WEIGHTS)}, or NAME=WEIGHT",
                remedy="correct it",
            ) from None  # fmt: skip
    return weights


def _texts(text: list[str] | None) -> dict[str, list[str]]:
    """domain=FILE -> texts by domain."""
    texts: dict[str, list[str]] = {}
    for each in text or []:
        domain, sign, spec = each.partition("=")
        if not sign or not domain or not spec:
            raise ModekitError("not domain=FILE", where="--text", found=each, remedy="write --text medicine=notes.jsonl")
        texts.setdefault(domain, []).append(spec)
    return texts


@app.command(name="eval")
def evaluate(
    checkpoint: OutFolder,
    tokens: Annotated[int, typer.Option(min=64, help="Held-out tokens per domain.")] = 20_000,
    sequence_length: Annotated[int, typer.Option(min=8, help="Longest piece of a document, in tokens.")] = 512,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Score base, experts, weight average, oracle and mixture on held-out text."""
    from modekit.checkpoint import open_checkpoint
    from modekit.evaluate import RESULTS_FOLDER
    from modekit.evaluate import evaluate as run

    with _progress() as progress:
        results = run(
            open_checkpoint(checkpoint.resolve()), tokens_per_domain=tokens, sequence_length=sequence_length,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    if as_json:
        sys.stdout.write(json.dumps(results.as_data(), indent=2) + "\n")
    else:
        print_results(results)
        out.print(f"[dim]{escape(str(checkpoint / RESULTS_FOLDER))}: eval.json, eval.md[/]")


@app.command()
def verify(
    checkpoint: OutFolder, as_json: AsJson = False, trust_remote_code: Trust = False,
    reload: Annotated[bool, typer.Option(help="Also load it in plain transformers.")] = True,
) -> None:  # fmt: skip
    """Prove that the checkpoint is what it says; exit code 1 when it is not."""
    from modekit.checkpoint import open_checkpoint
    from modekit.verify import is_proven
    from modekit.verify import verify as run

    with _progress() as progress:
        checks = run(
            open_checkpoint(checkpoint.resolve()), trust_remote_code=trust_remote_code, reload=reload, progress=progress
        )
    if as_json:
        sys.stdout.write(json.dumps([vars(check) for check in checks], indent=2) + "\n")
    else:
        print_checks(checks)
    if not is_proven(checks):
        raise typer.Exit(1)


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
    from modekit.locate import model_folder
    from modekit.specialize import specialize as run
    from modekit.training import Training

    rate = learning_rate if learning_rate is not None else 1e-3 if train == "lora" else 1e-4
    training = Training(steps=steps, learning_rate=rate, batch_tokens=batch_tokens, sequence_length=sequence_length, seed=seed)
    with _progress() as progress:
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
    from modekit.extract import extract as run
    from modekit.locate import model_folder

    if tokens is not None and not text:
        raise ModekitError("the setting has no effect", where="--tokens", found=tokens, remedy="remove it, or add --text")
    with _progress() as progress:
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


@app.command()
def export(
    checkpoint: OutFolder,
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Gets one PEFT folder per expert.")],
    expert: Annotated[list[str] | None, typer.Option(help="Only this expert; may be given several times.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the adapters of a mixture as ordinary PEFT folders, bit for bit."""
    from modekit.checkpoint import open_checkpoint
    from modekit.export import adapter_experts, export_adapter

    opened = open_checkpoint(checkpoint.resolve())
    names = expert or adapter_experts(opened)
    if not names:
        raise ModekitError(
            "no expert of this mixture is an adapter", where=str(checkpoint), found=", ".join(opened.names),
            remedy="see `modekit extract` for full models",
        )  # fmt: skip
    for name in names:
        record = export_adapter(opened, name, output.resolve() / name, overwrite=overwrite)
        out.print(f"[bold]{escape(str(output / name))}[/]: LoRA, rank {record['rank']}, {record['modules']} modules")
        for note in record["notes"]:
            out.print(f"  [dim]{escape(note)}[/]")


@app.command()
def demo(
    output: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the demo; what is there is kept and used. Default: demo, demo-full, ..."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to run, from 0.")] = 1,
    full: Annotated[bool, typer.Option("--full", help="Ordinary full fine-tunes as experts, several backbones.")] = False,
    adapters: Annotated[
        bool, typer.Option("--adapters", help="LoRA adapters as experts, kept low-rank and folded into a native checkpoint.")
    ] = False,
    real: Annotated[bool, typer.Option("--real", help="Start from SmolLM2-135M (within an hour).")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test: the same steps, too short to be good.")] = False,
) -> None:
    """Train a base and four experts on real text, mix them in several ways and show what each is worth."""
    from modekit.demo.run import run_demo

    if full and adapters:
        raise ModekitError("the experts are either full models or adapters", where="--full, --adapters", remedy="give one")
    options = (("full", full), ("adapters", adapters), ("real", real), ("quick", quick))
    kinds = [name for name, chosen in options if chosen]
    output = output or Path("-".join(["demo", *kinds]))
    what: Any = "full" if full else "lora" if adapters else "mlp"
    with _progress() as progress:
        results = run_demo(output.resolve(), seeds=range(seeds), what=what, real=real, quick=quick, progress=progress)
    for seed in results.per_seed:
        out.print(f"[bold]seed {seed}[/]")
        print_results(results.merged(seed))
    if seeds > 1:
        print_summary(results.summary())
    out.print(
        f"[dim]{results.seconds / 60:.1f} minutes; models, recipes, checkpoints and results are in {escape(str(output))}[/]"
    )


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema, for editors."""
    from modekit.recipe import schema_text

    sys.stdout.write(schema_text())


@contextmanager
def _progress() -> Iterator[Progress]:
    """Draw bars with the time left on a terminal; draw nothing elsewhere."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    from modekit.processes import processes

    columns = (
        TextColumn("{task.description:<24}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Bars(*columns, console=err, transient=True, disable=not (err.is_terminal and processes().is_main)) as bars:
        tasks: dict[str, Any] = {}

        def draw(stage: str, done: int, total: int) -> None:
            group = stage if not stage.startswith("score ") else "score"
            if group not in tasks:
                tasks[group] = bars.add_task(stage, total=total)
            bars.update(tasks[group], description=stage, completed=done, total=total)

        yield draw


def main() -> None:
    """Entry point: errors that a user can mend are one message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        status = app(standalone_mode=False)  # so that Ctrl-C and wrong usage come here, too
    except ModekitError as error:
        _fail(error)
    except (KeyboardInterrupt, typer.Abort):
        _fail(InterruptError("interrupted", remedy="run the command again"))
    except OSError as error:  # a folder that cannot be written, a file that vanished
        where = str(error.filename or "")
        _fail(ModekitError(f"{error.strerror or error}", where=where, remedy="mend what is named and run the command again"))
    except TyperException as error:
        _fail(ModekitError(str(error), remedy="modekit --help, or --help after a command"))
    sys.exit(status if isinstance(status, int) else 0)


def _fail(error: ModekitError) -> None:
    err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
