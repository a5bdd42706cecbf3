"""The result folder: how it appears, its record, its router file."""
