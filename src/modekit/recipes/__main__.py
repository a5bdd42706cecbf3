"""Writes the recipe's JSON schema as it is shipped: `python -m modekit.recipes`."""

from modekit.files.write import write_file
from modekit.recipes.schema import SCHEMA_FILE, schema_text

write_file(SCHEMA_FILE, schema_text().encode())
