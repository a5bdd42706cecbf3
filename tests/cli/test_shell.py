"""How a command ends: what a user can mend, what nobody foresaw, and text of others, which is never obeyed."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from rich.text import Text

import modekit.cli.shell as shell
from command_line import ended
from conftest import Workshop, make_workshop
from modekit.cli.printing import console_for
from modekit.errors import ModekitError
from refusal import borrow, refuse, run_python

pytestmark = pytest.mark.usefixtures("short_tables")


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def ended_by(error: BaseException, *args: object) -> tuple[object, str, str]:
    with patch.object(shell, "app", failing(error)):
        return ended(*args)


@pytest.mark.parametrize(
    "error", [KeyError("x"), RecursionError(), MemoryError(), AssertionError("[/x]\x1b[31m"), TypeError("\ud800")]
)
def test_what_nobody_foresaw_is_one_line(error: Exception) -> None:
    code, stdout, stderr = ended_by(error, "verify", "OUT")
    assert code == 1 and stdout == "" and stderr.count("\n") == 1
    assert stderr.startswith(f"error: this is a bug in modekit ({type(error).__name__}); ")
    file = Path(stderr.partition("); ")[2].partition(" says where")[0])
    assert "Traceback" in file.read_text() and type(error).__name__ in file.read_text()
    with patch.object(shell, "write_file", side_effect=PermissionError()):
        assert "MODEKIT_DEBUG=1 shows where" in ended_by(error, "verify", "OUT")[2]
    file.unlink()


class PanicException(BaseException):
    """As a library in Rust raises it."""


def test_a_panic_is_no_other_kind_of_end() -> None:
    code, _, stderr = ended_by(PanicException("index out of bounds"), "verify")
    assert code == 1 and "this is a bug in modekit (PanicException)" in stderr
    with pytest.raises(GeneratorExit):
        ended_by(GeneratorExit(), "verify")


def test_debugging_lets_it_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEKIT_DEBUG", "1")
    with pytest.raises(KeyError):
        ended_by(KeyError("x"), "verify")


def test_an_error_of_the_system_says_what_ran() -> None:
    code, _, stderr = ended_by(OSError(28, "No space left on device"), "--x", "fit", "OUT")
    assert code == 2 and stderr.splitlines()[:2] == ["error: No space left on device", "  where:    modekit fit"]
    assert "  where:    /a/b\n" in ended_by(OSError(28, "No space left on device", "/a/b"), "fit")[2]


def test_a_reader_that_goes_away_is_no_error(shared_workshop: Workshop) -> None:
    done = run_python(
        "import os, sys\nr, w = os.pipe()\nos.close(r)\nos.dup2(w, 1)\n"
        "from modekit.cli import main\nsys.argv = ['modekit', '--help']\nmain()"
    )
    assert "Traceback" not in done.stderr and "bug" not in done.stderr and "error" not in done.stderr


def test_a_message_does_not_grow_with_what_is_wrong() -> None:
    _, _, stderr = ended_by(ModekitError("x" * 10**6, found="\n".join("abc" * 1_000)), "verify")
    assert len(stderr) < 10_000 and stderr.count("characters more") == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_text_of_others_is_written_and_not_obeyed(terminal: bool) -> None:
    stream = io.StringIO()
    console = console_for(file=stream, force_terminal=terminal, width=80, color_system="truecolor" if terminal else None)
    hostile = "[bold]a[/x]\\ :smile: \x1b]0;title\x07\x1b[2J\x9b31m\u202e\r\x08\ud800"
    for each in (hostile, Text(hostile), Text.assemble((hostile, "bold"), ": x")):
        console.print(each)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())  # colours of our own
    assert shown.count("[bold]a[/x]\\ :smile: \\x1b]0;title") == 3 and shown.count("\\u202e") == 3
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert "\x1b[31m" not in stream.getvalue() and "\x1b[2J" not in stream.getvalue()


def test_a_label_is_no_markup(shared_workshop: Workshop, tmp_path: Path) -> None:
    out = borrow(shared_workshop, tmp_path).build()
    record = json.loads((out / "modekit.json").read_text())
    record["sources"][0]["label"] = "[/x]\x1b[2J"
    (out / "modekit.json").write_text(json.dumps(record))
    code, stdout, stderr = ended("verify", out, "--no-reload")
    assert code == 0 and "source [/x]\\x1b[2J" in stdout and "\x1b[2J" not in stdout + stderr


def test_a_name_in_an_error_is_no_markup(tmp_path: Path) -> None:
    folder = tmp_path / "[bold]x[red]\x1b[31m:smile:"
    folder.mkdir()
    assert "[bold]x[red]\\x1b[31m:smile:" in refuse("verify", folder)


def test_links_that_go_round_and_the_root_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for folder in (tmp_path / "a", Path("/"), tmp_path / os.fsdecode(b"\xff")):
        assert "modekit.json" in refuse("verify", folder)


def test_help_without_a_command_is_no_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell.sys, "argv", ["modekit", "data"])
    with pytest.raises(SystemExit) as end:
        shell.main()
    shown = capsys.readouterr()
    assert end.value.code == 2 and "balance" in shown.out + shown.err and "error" not in shown.err


def test_what_was_changed_by_hand_is_said_and_nothing_else(tmp_path: Path) -> None:
    """A lexical router in a plain checkpoint has another eps than the base: that is no change."""
    router = {"fit": "lexical", "sequence_length": 32}
    mixture = {"method": "routing", "top_k": 1, "router": router}
    out = make_workshop(tmp_path).build(mixture=mixture, output={"format": "plain"})
    assert "changed" not in "".join(map(str, ended("route", out, "the court")))
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"rope_theta": 10000.0', '"rope_theta": 5.0'))
    assert (out / "config.json").read_text() != config
    assert "note: changed since modekit wrote them: config.json" in ended("route", out, "the court")[2]


def test_a_recipe_is_no_mixture(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("base_model: ./base\n")
    assert "this is a recipe, not a mixture" in refuse("eval", tmp_path / "recipe.yaml")
