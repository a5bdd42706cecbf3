"""What `--help` shows of each command: the group that it is listed in, and the example that its help begins with."""

from __future__ import annotations

from importlib.resources import files

import typer
from typer.models import CommandInfo

GROUPS: dict[str, dict[str, str]] = {}
"""Group -> command -> example, in the order of `--help`; examples.txt has a line for each."""
for _line in files("modekit.cli").joinpath("examples.txt").read_text(encoding="utf-8").splitlines():
    _group, _command, _example = (*_line.split("\t"), "")[:3]  # a group of commands has none
    GROUPS.setdefault(_group, {})[_command] = _example


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
