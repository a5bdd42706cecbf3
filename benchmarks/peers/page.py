"""The page."""

from pathlib import Path


def write_page(results: Path) -> None: ...
