"""Writes the recipe's JSON schema as it is shipped: `python -m modekit.recipes`."""

from modekit.recipes.read import SCHEMA_FILE, schema_text

SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
