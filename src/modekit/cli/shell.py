"""What every command shares: the app, options, and how an error ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from typer.exceptions import TyperException

from modekit.cli.printing.console import err
from modekit.errors import InterruptError, ModekitError

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
Fsync = Annotated[
    bool, typer.Option("--fsync/--no-fsync", help="Wait until the disk has it all, so that a power loss costs nothing.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _say_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"modekit {version('modekit')}\n")
        raise typer.Exit()


@app.callback()
def _one_process(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    from modekit.processes import launched

    if launched() > 1 and context.invoked_subcommand not in {"fit", "train"}:
        raise ModekitError(
            "this command runs in one process", where=f"modekit {context.invoked_subcommand}", found=f"{launched()} processes",
            remedy="start it without a launcher; fit and train know how to share their work",
        )  # fmt: skip


def refuse_without_effect(why: str, options: Mapping[str, object]) -> None:
    """Raise ModekitError for the first option that was given although it changes nothing."""
    for name, value in options.items():
        if value not in (None, []):
            raise ModekitError("the setting has no effect", where=name, found=value, expected=why, remedy="remove it")


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
