"""Small models that read bytes, one per domain and each with a text of its own, and mixtures of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapter_folders import lora, write_adapter
from byte_level import save_byte_model
from conftest import write_text
from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe

TWO = ("medicine", "law")


def model_experts(root: Path, domains: Sequence[str] = TWO, family: str = "llama", **overrides: Any) -> list[dict[str, Any]]:
    """A recipe's experts: a random model per domain, in a folder of its name, and its text."""
    texts = write_text(root / "text", tuple(domains))
    for seed, name in enumerate(domains):
        save_byte_model(root / name, family, seed, **overrides)
    return [{"name": name, "model": f"./{name}", "text": str(text)} for name, text in texts.items()]


def adapter_experts(root: Path, domains: Sequence[str] = TWO, width: int = 32) -> list[dict[str, Any]]:
    """A recipe's experts: random changes of a base of that width per domain, in `<name>-adapter`, and its text."""
    texts = write_text(root / "text", tuple(domains))
    for seed, name in enumerate(domains):
        write_adapter(root / f"{name}-adapter", lora("mlp.up_proj", 48, width, seed=seed), lora_alpha=8)
    return [{"name": name, "adapter": f"./{name}-adapter", "text": str(text)} for name, text in texts.items()]


def built(root: Path, recipe: dict[str, Any], name: str = "OUT") -> Checkpoint:
    """The mixture of a recipe whose paths begin in `root`, in `root`/`name`."""
    build(make_plan(parse_recipe(recipe), root), root / name)
    return open_checkpoint(root / name)


def lexical_mixture(root: Path, base: str = "medicine", name: str = "OUT", **overrides: Any) -> Checkpoint:
    """A plain mixture of whole models, which serving engines run: each word tells its domain."""
    said = {"mixture": {"router": {"fit": "lexical"}}, "output": {"format": "plain"}}
    return built(root, {"base_model": f"./{base}", "experts": model_experts(root, **overrides), **said}, name)
