"""`modekit ARGS` in this process: what a user types, without the seconds that importing torch takes."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from modekit.cli.shell import main


def ended(*args: object) -> tuple[object, str, str]:
    """Run `modekit ARGS` and return exit code, stdout and stderr."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), None
    with patch.object(sys, "argv", ["modekit", *map(str, args)]), redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return code, stdout.getvalue(), stderr.getvalue()


def modekit(*args: object) -> str:
    """Run `modekit ARGS`, which must end well, and return what it printed."""
    code, stdout, stderr = ended(*args)
    assert code == 0, f"exit code {code}: {stdout}{stderr}"
    return stdout
