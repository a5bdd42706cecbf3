"""What `--help` shows of each command: the group that it is listed in, and the example that its help begins with."""

from __future__ import annotations

from collections.abc import Mapping

import typer
from typer.models import CommandInfo

GROUPS: Mapping[str, Mapping[str, str]] = {
    "Start here": {
        "mix": "mix ./base ./law-lora ./code -o OUT",
        "chat": "chat OUT",
        "serve": "serve OUT",
        "demo": "demo --quick",
    },
    "Look": {
        "plan": "plan recipe.yaml",
        "eval": "eval OUT",
        "eval-chat": "eval-chat OUT",
        "eval-tasks": "eval-tasks OUT questions",
        "eval-translation": "eval-translation OUT --beams 4",
        "inspect": 'inspect OUT --text "The court held that"',
        "route": 'route OUT "The court held that"',
        "experts": "experts OUT",
        "verify": "verify OUT --deep",
        "report": "report OUT",
    },
    "Build and change": {
        "build": "build recipe.yaml OUT",
        "fit": "fit OUT --fit lexical",
        "train": "train OUT --what routers --what attention",
        "add": "add OUT --name tax --model ./tax --text tax.jsonl",
        "replace": "replace OUT law --model ./law-2",
        "remove": "remove OUT law",
        "rename": "rename OUT law court",
    },
    "Make experts": {
        "specialize": "specialize ./base ./law --text law.jsonl",
        "extract": "extract ./law ./law-lora --base ./base --rank 16",
        "upcycle": "upcycle ./base OUT --experts 4 --segments 2",
        "shrink": "shrink OUT NEW --to 6 --text law.jsonl",
        "densify": "densify OUT DENSE --minutes 10",
        "data": "",
        "balance": "data balance OUT --text law=law.jsonl --text tax=tax.jsonl --tokenizer ./base",
        "tokenizer": "data tokenizer OUT --text law=law.jsonl --text tax=tax.jsonl",
    },
    "Find out": {
        "advise": "advise recipe.yaml --write advised.yaml",
        "tune": "tune recipe.yaml OUT --trials 24",
        "discover": "discover FOUND --text unlabelled/",
    },
    "Share": {
        "export": "export OUT FOLDER --gguf --outtype q8_0",
        "front": "front OUT --worker http://127.0.0.1:8001",
        "card": "card OUT",
        "push": "push OUT me/my-mixture --dry-run",
        "schema": "schema > recipe.schema.json",
    },
}


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
