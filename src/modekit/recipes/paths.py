"""The paths that a recipe names: where they are, and the same paths said from another folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modekit.recipes.strict import BASE


def locate(spec: str, root: Path) -> Path | None:
    """The file or folder that a recipe names, relative to `root`; None when there is none of that name."""
    try:
        path = (root / Path(spec).expanduser()).resolve()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long for a path, an unknown user's home, a NUL
        return None


def from_folder(recipe: Mapping[str, Any], root: Path, folder: Path) -> dict[str, Any]:
    """The recipe with every path on disk, relative to `root`, said relative to another folder. Hub ids stay as they are."""

    def moved(spec: str) -> str:
        path = locate(spec, root)
        if folder == root or path is None or Path(spec).expanduser().is_absolute():
            return spec
        relative = os.path.relpath(root / spec, folder)
        return relative if relative.startswith("..") else f"./{relative}"

    def moved_texts(texts: str | Sequence[str]) -> str | list[str]:
        return moved(texts) if isinstance(texts, str) else [moved(text) for text in texts]

    def moved_expert(expert: Mapping[str, Any]) -> dict[str, Any]:
        paths = {key: moved(expert[key]) for key in ("model", "adapter") if expert.get(key) not in (None, BASE)}
        return {**expert, **paths, **({"text": moved_texts(expert["text"])} if expert.get("text") else {})}

    experts = [moved_expert(expert) for expert in recipe["experts"]]
    result = {**recipe, "base_model": moved(recipe["base_model"]), "experts": experts}
    if recipe.get("eval"):
        result["eval"] = {domain: moved_texts(texts) for domain, texts in recipe["eval"].items()}
    return result
