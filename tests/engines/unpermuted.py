"""The converter's process with a mistake in it: rows of B stay in the order of transformers. See test_lora_gguf.py."""

from __future__ import annotations

from typing import Any

from modekit.engines import convert_process

known = convert_process.place_of


def in_our_order(model: Any, name: str, shape: tuple[int, int]) -> tuple[str, Any]:
    """The right name, and the wrong rows."""
    return known(model, name, shape)[0], slice(None)


if __name__ == "__main__":
    convert_process.place_of = in_our_order
    convert_process.main()
