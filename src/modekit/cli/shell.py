"""What every command shares: the app, options, progress, and how an error ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.exceptions import TyperException

from modekit.cli.printing.mixtures import err
from modekit.errors import InterruptError, ModekitError
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


@contextmanager
def drawn_progress() -> Iterator[Progress]:
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
