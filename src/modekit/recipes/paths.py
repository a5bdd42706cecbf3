"""The paths that a recipe names: where they are, the same paths said from another folder, or for other people; and experts in
short form -> as a recipe says them in full: `./law`, `org/tax-lora`, `base`, `NAME=` before any of them.

    experts: [./law, tax=org/tax-lora, base]

Whether it is a model or an adapter is found out; a name that is not given is the folder's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

from modekit.errors import RecipeError
from modekit.recipes.strict import BASE, LONGEST_NAME, SELF, TAKEN, RecipeData, RecipePart, is_name

OF_THE_BASE = "general"
"""Name of the base as an expert."""
_ADAPTER = "adapter_config.json"
_SAYS_NOTHING = re.compile(
    r"(checkpoint|step|epoch)[-_]?\d*|((final|best|last|merged|adapter|lora|peft|model|output)[-_]?)+", re.I
)
"""Last parts of paths that training tools write, below the folder that somebody named."""


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
        # Also a path where nothing is, as messages name the place; and one that would be another model in the folder.
        is_path = spec.startswith(".") or any(locate(spec, each) is not None for each in (root, folder))
        if folder == root or not is_path or Path(spec).expanduser().is_absolute():
            return spec
        relative = os.path.relpath(root / spec, folder)
        return relative if relative.startswith("..") else f"./{relative}"

    return with_specs(recipe, moved)


def name_of(spec: str, root: Path) -> str:
    """What a recipe names, without where it lies on this machine: ./medicine; a hub id stays as it is."""
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


def new_name(spec: str, seen: set[str]) -> str:
    """The name of an expert that has none, by the last part of its path that says something; it is `seen` from then on."""
    parts = [part for part in spec.split("/") if part not in ("", ".", "..", "~")]
    said = next((part for part in reversed(parts) if not _SAYS_NOTHING.fullmatch(part)), parts[-1] if parts else "")
    last = re.sub(r"[^A-Za-z0-9_.-]+", "-", said).lstrip("_.-").rstrip("-") or "expert"
    names = (f"{last[: LONGEST_NAME - 4]}{f'-{number}' if number > 1 else ''}" for number in count(1))
    name = next(name for name in names if name not in seen)
    seen.add(name)
    return name


def spelled_out(raw: RecipeData, root: Path) -> RecipeData:
    """The recipe with every expert that is a string said in full; the rest, right or wrong, as it is.

    Paths are relative to `root`. Of a hub id the hub is asked whether it is an adapter.
    """
    experts = raw.get("experts")
    if not isinstance(experts, list) or not any(isinstance(each, str) for each in experts):
        return raw
    halves = [_halves(each, root) if isinstance(each, str) else (None, each) for each in experts]
    said = [each.get("name") for each in experts if isinstance(each, dict)]
    seen = {*TAKEN, *(name for name in (*said, *(name for name, _ in halves)) if isinstance(name, str))}
    return {**raw, "experts": [_in_full(name, spec, seen, root) for name, spec in halves]}


def _halves(short: str, root: Path) -> tuple[str | None, str]:
    """The name that is given, if any, and what it is of; a path may have an equals sign of its own."""
    name, _, spec = short.partition("=")
    named = name and spec and (is_name(name) or locate(spec, root)) and locate(short, root) is None
    return (name, spec) if named else (None, short)


def _in_full(name: str | None, spec: object, seen: set[str], root: Path) -> object:
    if not isinstance(spec, str) or not spec:
        return spec
    wanted, colon, path = spec.partition(":")
    if colon and path.startswith((".", "/", "~")) and locate(spec, root) is None:
        raise RecipeError("a name with a colon", where=f"experts: {spec}", remedy=f"write {wanted}={path.strip()}")
    if spec == BASE:
        return {"name": name or new_name(OF_THE_BASE, seen), "model": BASE}
    return {"name": name or new_name(spec, seen), _kind(spec, root): spec}


def _kind(spec: str, root: Path) -> str:
    """The key of a recipe that names it: adapter or model, as which opening it says what is wrong where it is neither."""
    path = locate(spec, root)
    if path is not None:
        is_adapter = (path / _ADAPTER).is_file() and not any(path.glob("model*.safetensors"))
    else:
        is_adapter = may_be_hub_id(spec) and _is_on_the_hub(spec, _ADAPTER)
    return "adapter" if is_adapter else "model"


def _is_on_the_hub(spec: str, file: str) -> bool:
    from huggingface_hub import hf_hub_download  # its import takes longer than a whole local plan
    from huggingface_hub.errors import HFValidationError

    try:
        return bool(hf_hub_download(spec, file))
    except (HFValidationError, OSError):  # no such file, no such repository, no hub
        return False
