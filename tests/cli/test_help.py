"""Help at 80 columns: commands in groups, an example first, no name cut; and shell completion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from command_line import ended, modekit
from modekit.cli.shell import GROUPS, app, example_of
from modekit.cli.words import SETTINGS, described
from refusal import run_python


@pytest.fixture(autouse=True)
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def commands(of: typer.Typer, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command."""
    for info in of.registered_commands:
        assert info.callback is not None
        yield (*before, info.name or info.callback.__name__.replace("_", "-"))
    for group in of.registered_groups:
        if group.typer_instance is not None:
            yield from commands(group.typer_instance, (*before, str(group.typer_instance.info.name)))


COMMANDS = list(commands(app))


def test_every_command_is_in_one_group() -> None:
    named = [name for group in GROUPS.values() for name in group]
    assert sorted(named) == sorted([words[-1] for words in COMMANDS] + ["data"])
    shown = modekit("--help")
    places = [shown.index(f"─ {group} ─") for group in GROUPS]
    assert places == sorted(places) and shown.index(" mix ") < shown.index(" serve ")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_begins_with_an_example_and_cuts_no_name(words: tuple[str, ...]) -> None:
    shown = modekit(*words, "--help")
    said = [line.strip() for line in shown.splitlines() if line.strip()]
    example = f"Example: {example_of(words[-1])}"
    assert " ".join(said[1:3]).startswith(example), said[:3]
    assert example.startswith(f"Example: modekit {' '.join(words)}")
    assert all(word in shown.partition("Options")[2] for word in example.split() if word.startswith("--"))
    assert "…" not in shown and all(len(line) <= 80 for line in shown.splitlines())


@pytest.mark.parametrize("command", SETTINGS)
def test_settings_of_an_example_are_there(command: str) -> None:
    before = example_of(command).partition(" --")[0]  # what options have may have an equals sign, too
    assert all(f"\n{word.partition('=')[0]}" in described(command) for word in before.split() if "=" in word)


def test_it_starts_without_torch() -> None:
    """One command after the other in one process, which whatever one of them imports would stay in."""
    done = run_python(f"""
import sys
from modekit.cli import app
for words in {[(), *COMMANDS]!r}:
    sys.argv = ["modekit", *words, "--help"]
    try:
        app()
    except SystemExit as end:
        assert not end.code, words
    assert not {{"torch", "transformers"}} & set(sys.modules), words
""")
    assert done.returncode == 0 and done.stdout.count("Usage") == len(COMMANDS) + 1, done.stderr


def test_a_wrong_path_is_refused_without_torch(tmp_path: Path) -> None:
    """Else it is said seconds after it was typed."""
    of_a_mixture = [["eval"], ["eval-tasks", "questions"], ["eval-translation"], ["train"], ["densify", f"{tmp_path}/OUT"]]
    of_a_model = [["specialize", f"{tmp_path}/no", "NEW", "--text", __file__], ["specialize", "b", "NEW", "--text", "no.txt"]]
    done = run_python(f"""
import sys
from modekit.cli import main
for words in {[*([name, str(tmp_path), *more] for name, *more in of_a_mixture), *of_a_model]!r}:
    sys.argv = ["modekit", *words]
    try:
        main()
    except SystemExit as end:
        assert end.code == 2, words
    assert not {{"torch", "transformers"}} & set(sys.modules), words
""")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("not a modekit checkpoint") == len(of_a_mixture), done.stderr
    assert done.stderr.count("does not exist") == len(of_a_model), done.stderr


def test_wrong_usage_is_answered_with_the_example() -> None:
    code, _, said = ended("mix")
    assert code == 2 and "Missing argument 'BASE'" in said
    assert f"type for example `{example_of('mix')}`; modekit mix --help shows all options" in said
    assert "modekit data balance --help shows all options" in ended("data", "balance", "OUT")[2]


def test_completion_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--install-completion" in modekit("--help")
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))  # of the shell that runs the tests
    assert "_MODEKIT_COMPLETE=complete_bash" in modekit("--show-completion", "bash")
    for name, value in {"_MODEKIT_COMPLETE": "complete_bash", "COMP_WORDS": "modekit mi", "COMP_CWORD": "1"}.items():
        monkeypatch.setenv(name, value)
    assert ended()[1].split() == ["mix"]
