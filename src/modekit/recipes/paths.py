"""The paths that a recipe names: where they are, and the same paths said from another folder, or for other people."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from modekit.recipes.strict import BASE, SELF, RecipeData, RecipePart


def locate(spec: str, root: Path) -> Path | None:
    """The file or folder that a recipe names, relative to `root`; None when there is none of that name."""
    try:
        path = (root / Path(spec).expanduser()).resolve()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long for a path, an unknown user's home, a NUL
        return None


def may_be_hub_id(spec: str) -> bool:
    """Whether what is no path on this machine may be an id on the hub: OWNER/NAME."""
    return spec.count("/") == 1 and not spec.startswith((".", "/", "~"))


def from_folder(recipe: RecipePart, root: Path, folder: Path) -> RecipeData:
    """The recipe with every path on disk, relative to `root`, said relative to another folder. Hub ids stay as they are."""

    def moved(spec: str) -> str:
        path = locate(spec, root)
        if folder == root or path is None or Path(spec).expanduser().is_absolute():
            return spec
        relative = os.path.relpath(root / spec, folder)
        return relative if relative.startswith("..") else f"./{relative}"

    return with_specs(recipe, moved)


def with_names(recipe: RecipePart, root: Path) -> RecipeData:
    """The recipe with every path, relative to `root`, cut to its last name: ./medicine. Hub ids stay as they are."""
    return with_specs(recipe, lambda spec: name_of(spec, root))


def name_of(spec: str, root: Path) -> str:
    """What a recipe names, without where it lies on this machine; a hub id stays as it is."""
    folder = locate(spec, root)
    if folder is None and not spec.startswith((".", "/", "~")) and spec.count("/") <= 1:
        return spec
    name = Path(spec).name
    return f"./{name if name not in ('', '..') or folder is None else folder.name}"


def with_specs(recipe: RecipePart, moved: Callable[[str], str]) -> RecipeData:
    """The recipe with every model and text said as `moved` says it."""

    def moved_texts(texts: str | Sequence[str]) -> str | list[str]:
        if texts in (SELF, [SELF]):
            return SELF
        return moved(texts) if isinstance(texts, str) else [moved(text) for text in texts]

    def moved_expert(expert: RecipePart) -> RecipeData:
        paths = {key: moved(expert[key]) for key in ("model", "adapter") if expert.get(key) not in (None, BASE)}
        return {**expert, **paths, **({"text": moved_texts(expert["text"])} if expert.get("text") else {})}

    experts = [moved_expert(expert) for expert in recipe["experts"]]
    result = {**recipe, "base_model": moved(recipe["base_model"]), "experts": experts}
    if recipe.get("eval"):
        result["eval"] = {domain: moved_texts(texts) for domain, texts in recipe["eval"].items()}
    return result
