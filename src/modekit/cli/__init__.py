"""The command line: parses, calls one public function, prints. Heavy modules are imported inside the commands.

A file per group of commands; shell.py has what they share.
"""

# ruff: noqa: I001
from modekit.cli import data as data
from modekit.cli import mixtures as mixtures
from modekit.cli import members as members
from modekit.cli import training as training
from modekit.cli import evaluation as evaluation
from modekit.cli import demo as demo
from modekit.cli import inspection as inspection
from modekit.cli import experts as experts
from modekit.cli import conversion as conversion
from modekit.cli import export as export
from modekit.cli import serving as serving
from modekit.cli.shell import arrange as _arrange
from modekit.cli.shell import app as app
from modekit.cli.shell import main as main

_arrange(app)
