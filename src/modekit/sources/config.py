"""Settings of a model's config.json, which anyone may have written, by the kind that they have to be of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from modekit.errors import SourceError
from modekit.files.read import LARGE, UNREADABLE, read_json

Config = Mapping[str, object]
"""config.json of a model, or adapter_config.json, as data: `whole`, `number` and `words` read what has to be of a kind."""

SAVE_AGAIN = "download or save the model again"
OF_A_MIXTURE = "give the model that its experts were fine-tuned from; `modekit add` adds an expert to a mixture"


def whole(config: Config, key: str) -> int:
    """A whole number that a config gives. Raises SourceError where it gives none."""
    value = config.get(key)
    if type(value) is not int:
        raise no_usable(key, value, "a whole number")
    return value


def number(config: Config, key: str, default: float | None = None) -> float:
    """A number that a config gives; `default` where it gives none, or 0. Raises SourceError for anything else."""
    value = config.get(key)
    value = default if default is not None and not value else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise no_usable(key, value, "a number")
    return float(value)


def words(config: Config, key: str) -> list[object]:
    """A list that a config gives, empty where it gives none. Raises SourceError for anything else."""
    value = config.get(key) or []
    if not isinstance(value, list):
        raise no_usable(key, value, "a list")
    return value


def architecture_of(config: Config) -> str:
    """The class of transformers that a config names first."""
    return str(next(iter(words(config, "architectures")), ""))


def no_usable(key: str, found: object, expected: str | None, where: str | None = None, remedy: str = SAVE_AGAIN) -> SourceError:
    """The error of a setting that nothing can be computed from."""
    return damaged_model(f"config.json gives no usable {key[:64]}", where, found, expected, remedy)


def damaged_model(
    what: str, where: str | None, found: object = None, expected: str | None = None, remedy: str = SAVE_AGAIN
) -> SourceError:
    """The error of a model whose files contradict each other, or cannot be read."""
    return SourceError(what, where=where, found=found, expected=expected, remedy=remedy)


def is_mixture(config: Config) -> bool:
    """Whether a plain model is itself a mixture of experts."""
    return any(config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"))


def read_beside(folder: Path, name: str) -> Config:
    """A JSON file of a model's folder; nothing where it is missing or damaged, which whoever uses it says."""
    try:
        found = read_json(folder / name, LARGE)
    except UNREADABLE:
        return {}
    return found if isinstance(found, dict) else {}
