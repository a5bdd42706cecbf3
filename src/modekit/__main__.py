"""`python -m modekit` is the command line."""

from modekit.cli.shell import main

main()
