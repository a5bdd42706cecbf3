"""Experts in short form -> as a recipe says them in full: `./law`, `org/tax-lora`, `base`, `NAME=` before any of them.

    experts: [./law, tax=org/tax-lora, base]

Whether it is a model or an adapter is found out; a name that is not given is the folder's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from modekit.errors import RecipeError
from modekit.recipes.paths import locate, may_be_hub_id
from modekit.recipes.strict import BASE, LONGEST_NAME, TAKEN, RecipeData, is_name

OF_THE_BASE = "general"
"""Name of the base as an expert."""
_ADAPTER = "adapter_config.json"
_SAYS_NOTHING = re.compile(
    r"(checkpoint|step|epoch)[-_]?\d*|((final|best|last|merged|adapter|lora|peft|model|output)[-_]?)+", re.I
)
"""Last parts of paths that training tools write, below the folder that somebody named."""


class ExpertNames:
    """Names of experts by the last part of their paths that says something, no two alike."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._seen = {*TAKEN, *taken}

    def of(self, spec: object) -> str:
        """The name of an expert that has none."""
        parts = [part for part in str(spec).split("/") if part not in ("", ".", "..", "~")]
        said = next((part for part in reversed(parts) if not _SAYS_NOTHING.fullmatch(part)), parts[-1] if parts else "")
        last = re.sub(r"[^A-Za-z0-9_.-]+", "-", said).lstrip("_.-").rstrip("-") or "expert"
        names = (f"{last[: LONGEST_NAME - 4]}{f'-{number}' if number > 1 else ''}" for number in count(1))
        name = next(name for name in names if name not in self._seen)
        self._seen.add(name)
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
    names = ExpertNames([name for name in (*said, *(name for name, _ in halves)) if isinstance(name, str)])
    return {**raw, "experts": [_in_full(name, spec, names, root) for name, spec in halves]}


def _halves(short: str, root: Path) -> tuple[str | None, str]:
    """The name that is given, if any, and what it is of; a path may have an equals sign of its own."""
    name, _, spec = short.partition("=")
    named = name and spec and (is_name(name) or locate(spec, root)) and locate(short, root) is None
    return (name, spec) if named else (None, short)


def _in_full(name: str | None, spec: object, names: ExpertNames, root: Path) -> object:
    if not isinstance(spec, str) or not spec:
        return spec
    wanted, colon, path = spec.partition(":")
    if colon and path.startswith((".", "/", "~")) and locate(spec, root) is None:
        raise RecipeError("a name with a colon", where=f"experts: {spec}", remedy=f"write {wanted}={path.strip()}")
    if spec == BASE:
        return {"name": name or names.of(OF_THE_BASE), "model": BASE}
    return {"name": name or names.of(spec), _kind(spec, root): spec}


def _kind(spec: str, root: Path) -> str:
    """The key of a recipe that names it: adapter or model, as which opening it says what is wrong where it is neither."""
    path = locate(spec, root)
    if path is not None:
        is_adapter = (path / _ADAPTER).is_file() and not any(path.glob("model*.safetensors"))
    else:
        is_adapter = may_be_hub_id(spec) and _is_adapter_on_the_hub(spec)
    return "adapter" if is_adapter else "model"


def _is_adapter_on_the_hub(spec: str) -> bool:
    from huggingface_hub import hf_hub_download  # its import takes longer than a whole local plan
    from huggingface_hub.errors import HFValidationError

    try:
        hf_hub_download(spec, _ADAPTER)
    except (HFValidationError, OSError):  # no such file, no such repository, no hub
        return False
    return True
