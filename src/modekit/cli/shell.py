"""What every command shares: the app, what `--help` shows of each, options, and how an error ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from itertools import islice
from pathlib import Path
from tempfile import gettempdir
from textwrap import TextWrapper
from traceback import format_exception
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.text import Text
from typer.exceptions import TyperException
from typer.models import CommandInfo

from modekit.cli.printing import err
from modekit.cli.words import list_settings
from modekit.errors import InterruptError, ModekitError, some_of
from modekit.files.change import refuse_existing
from modekit.files.marker import changed_files
from modekit.files.place import replaced_by
from modekit.files.write import FULL, write_file
from modekit.processes import DEVICE_VARIABLE, Device
from modekit.run import Run

if TYPE_CHECKING:
    from modekit.checkpoint.checkpoint import Checkpoint

GROUPS: dict[str, dict[str, str]] = {}
"""Group -> command -> example, in the order of `--help`; examples.txt has a line for each."""
for _line in files("modekit.cli").joinpath("examples.txt").read_text(encoding="utf-8").splitlines():
    _group, _called, _example = (*_line.split("\t"), "")[:3]  # a group of commands has none
    GROUPS.setdefault(_group, {})[_called] = _example

app = typer.Typer(
    name="modekit",
    help="Turn language models fine-tuned for different domains into one Mixture of Domain Experts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe.yaml.")]
NewFolder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")]
OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder once the new one is whole.")]


@dataclass(frozen=True)
class Common:
    """What is said before the command, of any of them."""

    trust_remote_code: bool = False
    json: bool = False
    fsync: bool = True


_asked = Common()
_COMMON = ("--trust-remote-code", "--json", "--no-fsync", "--device")
_PRINT_JSON = (
    *("plan", "eval", "eval-tasks", "eval-translation", "inspect", "route", "verify", "train", "extract", "densify"),
    "data",
)


def common() -> Common:
    """What was said before the command that runs."""
    return _asked


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How a command writes a folder."""

    overwrite: Overwrite = False


_INTERRUPTED = 130  # exit code after Ctrl-C, as a shell has it


def _say_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"modekit {version('modekit')}\n")
        raise typer.Exit()


@app.callback()
def _before_the_command(
    context: typer.Context,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow models that bring code of their own.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help=f"Print JSON instead of tables: {', '.join(_PRINT_JSON)}.")] = False,
    fsync: Annotated[bool, typer.Option(help="Wait until the disk has everything, so that a power loss costs nothing.")] = True,
    device: Annotated[
        Device,
        typer.Option(
            metavar="NAME",
            envvar=DEVICE_VARIABLE,
            show_envvar=False,
            help="Where models run: cpu, cuda, mps, or auto, which takes cuda, else mps, else cpu.",
        ),
    ] = "auto",
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    from modekit.processes import launched

    global _asked
    os.environ[DEVICE_VARIABLE] = device
    _asked, command = Common(trust_remote_code, as_json, fsync), str(context.invoked_subcommand)
    if "--help" in sys.argv:
        list_settings(context.command)
    if as_json and command not in _PRINT_JSON:
        refuse_without_effect(f"a command that prints JSON, which {command} does not", {"--json": True})
    if launched() > 1 and command not in {"fit", "train"}:
        raise ModekitError(
            "this command runs in one process",
            where=f"modekit {command}",
            found=f"{launched()} processes",
            remedy="start it without a launcher; fit and train know how to share their work",
        )


def _common_first(words: Sequence[str]) -> list[str]:
    """The words of a command line, with what may stand before any command there, wherever it was typed."""
    end = words.index("--") if "--" in words else len(words)
    first, rest, left = list[str](), list[str](), iter(words[:end])
    for word in left:
        is_common = word.partition("=")[0] in _COMMON
        (first if is_common else rest).append(word)
        if word == "--device":
            first += islice(left, 1)
    return [*first, *rest, *words[end:]]


def refuse_without_effect(why: str, options: Mapping[str, object]) -> None:
    """Raise ModekitError for the first option that was given although it changes nothing."""
    for name, value in options.items():
        if value not in (None, []):
            raise ModekitError("the setting has no effect", where=name, found=value, expected=why, remedy="remove it")


def resolved(path: Path) -> Path:
    """A path without links and ways up; unlike `Path.resolve` not an error where links go round."""
    return Path(os.path.realpath(path))


def checkpoint_in(folder: Path) -> Checkpoint:
    """The checkpoint of a folder, with a note where its files were changed by hand. Raises CheckpointError."""
    from modekit.checkpoint.open import open_checkpoint

    if folder.suffix in (".yaml", ".yml") and folder.is_file():
        raise ModekitError(
            "this is a recipe, not a mixture", where=str(folder), remedy=f"modekit build {folder} OUT, then give OUT"
        )
    opened = open_checkpoint(resolved(folder))
    if changed := changed_files(opened.folder):
        said = f"note: changed since modekit wrote them: {some_of(changed)}; `modekit verify {folder}` compares them"
        err.print(Text(said), soft_wrap=True)
    return opened


def model_in(spec: str, label: str, run: Run) -> tuple[Path, str | None]:
    """The folder of a model that is named on the command line, and its commit where it is the hub's. Raises SourceError."""
    from modekit.sources.folders import model_folder

    return model_folder(spec, root=Path.cwd(), label=label, run=run)


def writable(path: Path, overwrite: bool, *, trains: bool = False) -> Path:
    """The same of an OUT, which is looked at before anything is downloaded. Raises OutputError where it may not be written.

    A command that `trains` looks itself where OUT.training is left: it tidies up what a kill after the end left, then refuses.
    """
    target = resolved(path)
    if not (trains and os.path.lexists(f"{target}.training")):
        refuse_existing(target, replaced_by(overwrite))
    return target


def main() -> None:
    """Entry point: errors that a user can mend are one message and exit code 2, Ctrl-C 130; what nobody foresaw one line and 1.

    The traceback of the latter is in a file that the line names; `MODEKIT_DEBUG=1` in the environment lets it through.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        status = app(
            _common_first(sys.argv[1:]), prog_name="modekit", standalone_mode=False
        )  # so that wrong usage comes here, too
        if status == _INTERRUPTED:  # Typer's word for Ctrl-C, which says nothing
            raise KeyboardInterrupt
    except ModekitError as error:
        _fail(error)
    except (KeyboardInterrupt, typer.Abort):
        _fail(InterruptError("interrupted", remedy="run the command again"))
    except OSError as error:  # a folder that cannot be written, a file that vanished
        where = str(error.filename) if error.filename else f"modekit {_command()}"
        remedy = "free space on this disk" if error.errno in FULL else "mend what is named"
        _fail(ModekitError(f"{error.strerror or error}", where=where, remedy=f"{remedy} and run the command again"))
    except TyperException as error:
        if not error.format_message():  # without a command the help was printed
            sys.exit(2)
        _fail(_wrong_usage(error.format_message()))
    except BaseException as error:
        # A library in Rust panics by a class of its own, which is no Exception; the other such ones end the process.
        foreseen = not isinstance(error, Exception) and type(error).__name__ != "PanicException"
        if foreseen or os.environ.get("MODEKIT_DEBUG") == "1":
            raise
        said = f" this is a bug in modekit ({type(error).__name__}); {_traceback_of(error)}: please report that"
        err.print(Text.assemble(("error:", "bold red"), said), soft_wrap=True)
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)


def _traceback_of(error: BaseException) -> str:
    """Write where an error came from into a file, and say which; where nothing can be written, how to see it."""
    file = Path(gettempdir()) / f"modekit-traceback-{os.getpid()}.txt"
    try:
        write_file(file, "".join(format_exception(error)).encode("utf-8", "backslashreplace"))
    except OSError:
        return "MODEKIT_DEBUG=1 shows where"
    return f"{file} says where"


def _command() -> str:
    """The command that was asked for."""
    words = [each for each in sys.argv[1:] if not each.startswith("-")]
    return " ".join(words[: 2 if words[:1] == ["data"] else 1])


def _fail(error: ModekitError) -> NoReturn:
    lines = f"error: {error}".split("\n")
    if err.is_terminal:  # lines end between words, so that paths can be copied
        fold = TextWrapper(err.width, subsequent_indent=" " * 12, break_long_words=False, break_on_hyphens=False).fill
        lines = [fold(line) for line in lines]
    said = Text("\n".join(lines))
    said.stylize("bold red", 0, len("error:"))
    err.print(said, soft_wrap=True)
    sys.exit(_INTERRUPTED if isinstance(error, InterruptError) else 2)


def _wrong_usage(said: str) -> ModekitError:
    """What Typer says of options, without a library's own words."""
    said = said.replace(": Value error, ", ": ").replace("Input should be", "must be")
    example = example_of(_command().rpartition(" ")[2])
    usage = f"type for example `{example}`; modekit {_command()} --help shows all options" if example else "modekit --help"
    return ModekitError(said, remedy=usage)


def example_of(command: str) -> str:
    """The example of a command as it is typed; empty where there is no such command."""
    example = next((commands[command] for commands in GROUPS.values() if command in commands), "")
    return f"modekit {example}" if example else ""


def arrange(app: typer.Typer) -> None:
    """List the commands of an app in their groups, and begin the help of each with its example."""
    places = {name: (place, group) for group, commands in GROUPS.items() for place, name in enumerate(commands)}
    order = list(GROUPS)
    app.registered_commands.sort(key=lambda info: (order.index(places[_name(info)][1]), places[_name(info)][0]))
    for info in app.registered_commands:
        said = info.callback.__doc__ or ""
        info.rich_help_panel = places[_name(info)][1]
        info.short_help = said.partition("\n\n")[0]
        info.help = f"Example: {example_of(_name(info))}\n\n{said}"
    for within in (group.typer_instance for group in app.registered_groups if group.typer_instance is not None):
        within.info.rich_help_panel = places[str(within.info.name)][1]
        arrange(within)


def _name(info: CommandInfo) -> str:
    return info.name or (info.callback.__name__.replace("_", "-") if info.callback is not None else "")
