"""modekit's own rows, and fits of others' papers that modekit has (docs/routers.md)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modekit.building.build import build
from modekit.checkpoint.open import open_checkpoint
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.training.settings import TrainSettings, checked_settings
from modekit.training.train import train as train_mixture
from peers.peer import Formula, Made, Peer, Pool
from peers.pool import is_adapter, read_text, write_text
from peers.training import STEPS

ADAPTERS = frozenset({"adapters"})


def built(pool: Pool, out: Path, said: dict[str, Any], text: str = "real", besides: Sequence[dict[str, Any]] = ()) -> Made:
    """A mixture by a recipe, over the text that peers have: a recipe reads its fit split to fit, its select split to choose."""
    experts: list[dict[str, Any]] = []
    for name, path in pool.experts.items():
        both = write_text([*read_text(pool.text[name]), *read_text(pool.select[name])], out / "text" / f"{name}.jsonl")
        which = "adapter" if is_adapter(path) else "model"
        experts.append({"name": name, which: str(path), **({"text": "self" if text == "self" else str(both)} if text else {})})
    recipe = parse_recipe({"base_model": str(pool.base), "experts": [*experts, *besides], **said}, where="scoreboard")
    return Made(build(make_plan(recipe, out), out / "mixture").folder)


def _plain(pool: Pool, out: Path, text: str = "real", top_k: int = 1) -> Made:
    """What `modekit mix --without-base` writes where llama.cpp must run it."""
    full = pool.trained == "full"
    average = full and not any(map(is_adapter, pool.experts.values()))
    mixture = {"method": "routing", "top_k": top_k, **({"backbone": "average"} if average else {})}
    return built(pool, out, {"mixture": mixture, "output": {"format": "plain", **({"carry": "all"} if full else {})}}, text)


def _mixed(pool: Pool, out: Path) -> Made:
    """What `modekit mix` writes: the base is an expert, too, and the recipe leaves everything open."""
    home = next(folder for folder in pool.base.parents if (folder / "text" / "general.jsonl").is_file())
    general = {"name": "general", "model": "base", "text": str(home / "text" / "general.jsonl")}
    return built(pool, out, {}, besides=[general])


def _architecture(pool: Pool, out: Path, top_k: int) -> Made:
    """Tokens and pairs of them, which `fit: auto` takes."""
    whole = {"modules": "all"} if pool.trained == "full" else {}
    return built(pool, out, {"mixture": {"method": "routing", "top_k": top_k, **whole}, "output": {"format": "modekit"}})


def _trained(pool: Pool, out: Path) -> Made:
    """The plain checkpoint, distilled from the experts' own models for as long as other ways train."""
    _plain(pool, out)
    checkpoint = open_checkpoint(out / "mixture")
    asked = {
        **{"what": ["all"], "losses": {"forward_kl": 1.0}, "backbone_learning_rate": STEPS.rate, "steps": STEPS.count},
        **{"sequence_length": STEPS.length, "batch_tokens": STEPS.length * len(pool.text), "select_tokens": 1_024},
    }
    done = train_mixture(checkpoint, checked_settings(asked, TrainSettings, where="scoreboard"), evaluate_tokens=None)
    return Made(done.checkpoint.folder, f"distilled, {STEPS.said}")


def _fit(fit: str, top_k: int, pool: Pool, out: Path, **router: Any) -> Made:
    """A router that scores adapters, in the modekit architecture."""
    mixture = {"method": "routing", "top_k": top_k, "router": {"fit": fit, **router}}
    said = {"mixture": mixture, "output": {"format": "modekit"}}
    return built(pool, out, said, "")


OURS: list[Peer] = [
    Formula("modekit mix", _mixed, "by default, the base among the experts"),
    Formula("modekit, plain checkpoint", _plain, "modekit mix, top-1"),
    Formula("modekit, plain checkpoint, top-2", partial(_plain, top_k=2), "modekit, two experts a token"),
    Formula("modekit architecture, top-1", lambda pool, out: _architecture(pool, out, 1), "modekit, fit: auto"),
    Formula("modekit architecture, top-2", lambda pool, out: _architecture(pool, out, 2), "modekit, fit: auto"),
    Formula("modekit, plain, text: self", lambda pool, out: _plain(pool, out, "self"), "modekit, no real text"),
]
OURS_TRAINED: list[Peer] = [Formula("modekit, plain, trained", _trained, "modekit mix, modekit train")]
FITS: list[Peer] = [
    Formula("arrow, top-4", partial(_fit, "arrow", 4), "2405.11157, modekit's fit", ADAPTERS),
    Formula(
        "modekit, no text (arrow, context 0.9, top-2)",
        partial(_fit, "arrow", 2, granularity="context"),
        "modekit, fit: auto without text",
        ADAPTERS,
    ),
]
