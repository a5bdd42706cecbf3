"""`python -m modekit` is the command line."""

from modekit.cli import main

main()
