"""Kinds of demo: what its text is and what its experts are, how they are mixed, and how much work it does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from modekit.demo.models import TRAINING
from modekit.demo.text import DOMAINS, PAIRED, UNSEEN, UNSEEN_PAIRED
from modekit.demo.translation import PAIR_TRAINING
from modekit.loaded.text_training import Training

Experts = Literal["mlp", "full", "lora"]
"""What is trained of an expert."""
What = Experts | Literal["translation"]
"""translation: FFNs of a model with an encoder, which reads pairs."""

_ROUTING: dict[str, Any] = {"method": "routing", "top_k": 2}
_TOP_1: dict[str, Any] = {**_ROUTING, "top_k": 1}
_LEXICAL, _BIGRAMS = {"fit": "lexical"}, {"fit": "lexical", "orders": [1, 2]}
_LOGISTIC = {"fit": "logistic"}
_MIXTURES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "routing": _ROUTING,
    "noisy": {**_ROUTING, "router": {"fit": "random"}},
    "logistic": {**_ROUTING, "router": _LOGISTIC},
    "context": {**_ROUTING, "router": {**_LOGISTIC, "granularity": "context"}},
    "lexical": {**_ROUTING, "router": _LEXICAL},
    "bigrams": {**_ROUTING, "router": _BIGRAMS},
    "lexical-top-1": {**_TOP_1, "router": _LEXICAL},
    "bigrams-top-1": {**_TOP_1, "router": _BIGRAMS},
    **{f"routing {name}": {**_ROUTING, "backbone": name} for name in ("average", "task_arithmetic", "ties")},
    "sequence whole": {**_ROUTING, "modules": "all", "router": {**_LOGISTIC, "granularity": "sequence", "per": "model"}},
    "lexical whole": {**_ROUTING, "modules": "all", "router": _LEXICAL},
}


def _mixtures(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {"mixture": _MIXTURES[name]} for name in names}


MIXTURES: dict[What, dict[str, dict[str, Any]]] = {
    "mlp": _mixtures("linear", "noisy", "logistic", "context", "routing", "lexical-top-1"),
    "full": _mixtures(
        "routing", "linear", "routing average", "routing task_arithmetic", "routing ties", "sequence whole", "lexical whole"
    ),
    "lora": {
        **_mixtures("linear", "logistic", "context", "lexical", "routing", "bigrams-top-1"),
        "routing modekit": {"mixture": _ROUTING, "output": {"format": "modekit"}},
        "routing average": {"mixture": _MIXTURES["routing average"]},
    },
    "translation": _mixtures("lexical", "lexical-top-1", "bigrams", "bigrams-top-1"),
}
"""What the experts are -> name -> what the recipe says. `routing` is what a recipe gets that says nothing about the router;
what stands behind a space changes what the experts can carry, and gets an oracle row of its own."""


AS_MIXED: dict[What, str] = {"mlp": "lexical-top-1"}
"""Rows whose recipe is what `modekit mix --without-base` chooses; other demos have none."""


@dataclass(frozen=True)
class Size:
    """How much work a demo does.

    `training` is that of an expert; so many pairs of each domain are `translated`; `without` names mixtures that it leaves out.
    """

    base_steps: int
    training: Training
    fit_tokens: int
    eval_tokens: int
    translated: int = 0
    without: tuple[str, ...] = ()


SMALL = Size(960, TRAINING.with_(steps=120), fit_tokens=65_536, eval_tokens=16_384)
SIZES: dict[str, Size] = {
    "small": SMALL,
    "small lora": Size(960, TRAINING.with_(steps=160, learning_rate=3e-3), fit_tokens=131_072, eval_tokens=16_384),
    "quick": Size(24, TRAINING.with_(steps=6, held_out_tokens=1_024), fit_tokens=2_048, eval_tokens=1_024),
    "small translation": Size(
        2_000, PAIR_TRAINING.with_(steps=120, batch_tokens=3_000, learning_rate=3e-3), 131_072, 16_384, translated=200
    ),
    "quick translation": Size(
        8, PAIR_TRAINING.with_(steps=2), 2_048, eval_tokens=1_024, translated=4, without=("bigrams", "bigrams-top-1")
    ),
}
SIZES["quick lora"] = replace(SIZES["quick"], without=("logistic", "context", "lexical"))


@dataclass(frozen=True)
class Kind:
    """A kind of demo, whose experts are fine-tunes of one base."""

    what: What
    quick: bool = False

    @property
    def size(self) -> Size:
        """How much work it does."""
        pace = "quick" if self.quick else "small"
        return SIZES.get(f"{pace} {self.what}", SIZES[pace])

    @property
    def translates(self) -> bool:
        """Whether its text is pairs, and what models write is scored."""
        return self.what == "translation"

    @property
    def domains(self) -> tuple[str, ...]:
        """Which have an expert."""
        return PAIRED if self.translates else DOMAINS

    @property
    def unseen(self) -> tuple[str, ...]:
        """Domains that no model is trained on."""
        return UNSEEN_PAIRED if self.translates else (UNSEEN,)

    @property
    def trains(self) -> Experts:
        """What is trained of an expert."""
        return "mlp" if self.what == "translation" else self.what

    @property
    def mixtures(self) -> dict[str, dict[str, Any]]:
        """Name -> what the recipe says."""
        return {name: says for name, says in MIXTURES[self.what].items() if name not in self.size.without}
