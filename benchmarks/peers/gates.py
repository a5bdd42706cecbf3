"""Rows of taxonomy.md: ways to choose experts, all over the same FFN specialists, in the modekit architecture.

Those that train start from the same random gate and move it alone, as long as other ways train (peers/training.py). A row whose
part is not in this version is skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import ModekitError
from modekit.evaluation.inspection.passes import Decided, traced_losses
from modekit.loaded.load import load_model
from modekit.recipes.read import parse_recipe
from modekit.recipes.strict import RecipeData
from modekit.training.settings import TrainSettings, checked_settings
from modekit.training.train import train
from peers.ours import built
from peers.peer import Made, Pool
from peers.score import texts_of
from peers.training import STEPS

LOAD_TOKENS = 1_024
"""Per domain, of the select split."""
RANDOM: RecipeData = {"fit": "random"}
FORMAT = {"format": "modekit"}
BOTH: RecipeData = {"what": ["experts", "routers"], "backbone_learning_rate": STEPS.rate}


@dataclass(frozen=True)
class Gate:
    """A row: what a recipe says of the mixture, and of its training.

    Attributes:
        source: paper, by arXiv number.
        training: settings; None: the gate stays as it was set.
    """

    name: str
    source: str
    mixture: RecipeData
    training: RecipeData | None = None
    kinds: frozenset[str] = field(default_factory=lambda: frozenset({"ffn"}))

    def missing(self) -> str:
        """What this version lacks for it; empty where it has all."""
        experts = [{"name": name, "model": f"./{name}", "text": f"{name}.jsonl"} for name in ("a", "b", "c", "d")]
        try:
            parse_recipe(
                {"base_model": "./base", "experts": experts, "mixture": self.mixture, "output": FORMAT},
                where=self.name,
            )
            checked_settings(self.training or {}, TrainSettings, where=self.name)
        except ModekitError as error:
            return str(error)
        return ""

    def prepare(self, environments: Path) -> None:
        """There is nothing to prepare."""

    def make(self, pool: Pool, out: Path) -> Made:
        """Build, train, and look at the load."""
        made = built(pool, out, {"mixture": self._seeded(pool), "output": FORMAT})
        checkpoint, note = open_checkpoint(out / "mixture"), ""
        if self.training is not None:
            done = train(
                checkpoint,
                checked_settings({**_as_others(pool), **self.training}, TrainSettings, where=self.name),
                evaluate_tokens=None,
            )
            checkpoint, note = done.checkpoint, STEPS.said
        return Made(made.model, note, load=load_of(checkpoint, pool))

    def _seeded(self, pool: Pool) -> RecipeData:
        router = self.mixture.get("router", {})
        return {**self.mixture, "router": {**router, "seed": pool.seed}} if router.get("fit") == "random" else self.mixture


def _as_others(pool: Pool) -> RecipeData:
    return {
        **{"steps": STEPS.count, "sequence_length": STEPS.length, "batch_tokens": STEPS.length * len(pool.text)},
        **{"select_tokens": 1_024, "evaluate_every": STEPS.count // 3, "seed": pool.seed},
    }


def load_of(checkpoint: Checkpoint, pool: Pool) -> float:
    """Largest share of an expert, mean over tokens of all domains and routers."""
    sums_E = np.zeros(len(checkpoint.names))

    def consume(_row: int, decided: Decided) -> None:
        nonlocal sums_E
        sums_E = sums_E + decided.weights_RSE.sum((0, 1), dtype=np.float64)

    model = load_model(checkpoint.folder)
    for sequences in texts_of(pool.base, pool.select, LOAD_TOKENS).values():
        traced_losses(model, checkpoint, sequences, consume, lambda _tokens: None)
    return float(sums_E.max() / sums_E.sum())


def _routed(fit: str, *, top_k: int = 2, **router: object) -> RecipeData:
    return {"top_k": top_k, "router": {"fit": fit, **router}}


def _trained(name: str, source: str, **settings: object) -> Gate:
    return Gate(f"trained: {name}", source, _routed("random"), settings)


def _with_loss(name: str, source: str, weight: float) -> Gate:
    return _trained(name, source, losses={"lm": 1.0, name: weight})


SET: list[Gate] = [
    Gate("fixed weights", "2205.12410", {"method": "linear"}),
    Gate("random, top-2", "2303.01610", _routed("random")),
    Gate("centroid, top-2", "modekit's fit", _routed("centroid")),
    Gate("logistic, top-1", "2101.03961", _routed("logistic", top_k=1)),
    Gate("logistic, top-2", "1701.06538", _routed("logistic")),
    Gate("logistic, top-p 0.9", "2403.07652", {"top_p": 0.9, "router": {"fit": "logistic"}}),
    Gate("logistic, dense", "2404.05567", {"method": "gating", "router": {"fit": "logistic"}}),
    Gate("logistic, groups: 2", "2105.15082", {"groups": 2, "router": {"fit": "logistic"}}),
    Gate("logistic, threshold 0.3", "2405.14297", {"threshold": 0.3, "router": {"fit": "logistic"}}),
    Gate(
        "logistic, base always on",
        "2401.06066",
        {**_routed("logistic"), "always_on": {"expert": "base", "weight": 0.2}},
    ),
    Gate("logistic, context, top-2", "modekit's fit", _routed("logistic", granularity="context")),
    Gate("logistic, per text, top-1", "2110.03742", _routed("logistic", top_k=1, granularity="sequence", per="model")),
    Gate("lexical, top-1", "2204.08396", _routed("lexical", top_k=1)),
    Gate("lexical, top-2", "2204.08396", _routed("lexical")),
    Gate("cosine, top-2", "2204.09179", _routed("cosine")),
]
LEARNT: list[Gate] = [
    _trained("lm alone", "1701.06538"),
    _trained("lm alone, experts too", "2101.03961", **BOTH),
    Gate("trained: noise", "1701.06538", _routed("random", noise=1.0), {}),
    _with_loss("balance", "2101.03961", 0.01),
    _with_loss("z", "2202.08906", 0.001),
    _with_loss("label", "modekit's loss", 0.1),
    _trained("all experts, then two", "2404.05567", train_top_k=0),
]
