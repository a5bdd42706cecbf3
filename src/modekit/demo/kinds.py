"""Kinds of demo: what its text is and what its experts are, how they are mixed, and how much work it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from modekit.demo.models import BATCH_TOKENS, SEQUENCE_LENGTH
from modekit.demo.text import DOMAINS, PAIRED, UNSEEN, UNSEEN_PAIRED
from modekit.demo.translation import BASE_TRAINING
from modekit.loaded.text_training import Training

Experts = Literal["mlp", "full", "lora"]
"""What is trained of an expert."""
What = Experts | Literal["translation"]
"""Kinds whose experts are fine-tunes of one base (seed.py); translation: FFNs of a model with an encoder, which reads pairs."""

_ROUTING: dict[str, Any] = {"method": "routing", "top_k": 2}
_FITS: dict[str, dict[str, Any]] = {
    "noisy": {"fit": "random"},
    "ridge": {"fit": "ridge"},
    "logistic": {"fit": "logistic"},
    "context": {"fit": "logistic", "granularity": "context"},
    "ngram": {"fit": "ngram"},
    "lexical": {"fit": "lexical"},
    "bigrams": {"fit": "lexical", "orders": [1, 2]},
}
_MIXTURES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "routing": _ROUTING,
    **{name: {**_ROUTING, "router": router} for name, router in _FITS.items()},
    **{f"{name}-top-1": {**_ROUTING, "top_k": 1, "router": _FITS[name]} for name in ("lexical", "bigrams")},
    **{f"routing {name}": {**_ROUTING, "backbone": name} for name in ("average", "task_arithmetic", "ties")},
    "sequence whole": {**_ROUTING, "modules": "all", "router": {"fit": "logistic", "granularity": "sequence", "per": "model"}},
    "ngram whole": {**_ROUTING, "modules": "all", "router": {"fit": "ngram"}},
}


def _mixtures(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {"mixture": _MIXTURES[name]} for name in names}


_FOLDED = {"output": {"format": "native"}}
MIXTURES: dict[What, dict[str, dict[str, Any]]] = {
    "mlp": _mixtures("linear", "noisy", "ridge", "logistic", "context", "ngram", "routing", "lexical-top-1"),
    "full": _mixtures(
        "linear", "routing", "routing average", "routing task_arithmetic", "routing ties", "sequence whole", "ngram whole"
    ),
    "lora": {
        **_mixtures("linear", "logistic", "context", "ngram", "lexical", "routing", "bigrams-top-1"),
        "routing folded": {"mixture": _ROUTING, **_FOLDED},
        "routing folded average": {"mixture": _MIXTURES["routing average"], **_FOLDED},
    },
    "translation": _mixtures("lexical", "lexical-top-1", "bigrams", "bigrams-top-1", "ngram"),
}
"""What the experts are -> name -> what the recipe says. `routing` is what a recipe gets that says nothing about the router;
what stands behind a space changes what the experts can carry, and gets an oracle row of its own."""


REFITTED = {"ridge": "logistic"}
"""Mixtures that differ from another one of the same demo in what is solved of the same statistics: the text is read once."""


@dataclass(frozen=True)
class Size:
    """How much work a demo does; `without` names mixtures that it leaves out."""

    base_steps: int
    expert_training: Training
    lora_training: Training
    fit_tokens: int
    eval_tokens: int
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class PairSize(Size):
    """Of pairs: so many of each domain are translated."""

    translated: int = 200


@dataclass(frozen=True)
class Kind:
    """A kind of demo whose experts are fine-tunes of one base."""

    what: What
    size: Size
    real: bool = False

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
    def training(self) -> Training:
        """Of an expert."""
        return self.size.lora_training if self.what == "lora" else self.size.expert_training

    @property
    def mixtures(self) -> dict[str, dict[str, Any]]:
        """Name -> what the recipe says."""
        return {name: says for name, says in MIXTURES[self.what].items() if name not in self.size.without}


_TRAINING = Training(
    steps=80,
    batch_tokens=BATCH_TOKENS,
    sequence_length=SEQUENCE_LENGTH,
    learning_rate=3e-3,
    weight_decay=0.05,
    by_length=True,
    autocast=True,
)
SMALL = Size(
    base_steps=480,
    expert_training=_TRAINING.with_(steps=60, muon_learning_rate=0.01),
    lora_training=_TRAINING,
    fit_tokens=131_072,
    eval_tokens=16_384,
)
QUICK = Size(12, SMALL.expert_training.with_(steps=3), SMALL.lora_training.with_(steps=3), 2_048, 2_048)
_REAL_TRAINING = Training(
    steps=24, batch_tokens=2_048, sequence_length=512, learning_rate=3e-4, held_out_tokens=1_024, autocast=True
)
REAL = Size(
    0,
    _REAL_TRAINING,
    _REAL_TRAINING.with_(learning_rate=1e-3, batch_tokens=1_024),
    2_048,
    2_048,
    without=("linear", "noisy", "ridge", "routing folded", "routing folded average"),  # minutes each; the average has a row
)
_PAIRS = BASE_TRAINING.with_(steps=120, batch_tokens=3_000, learning_rate=3e-3)
PAIRS = PairSize(base_steps=800, expert_training=_PAIRS, lora_training=_PAIRS, fit_tokens=131_072, eval_tokens=16_384)
QUICK_PAIRS = PairSize(
    8, _PAIRS.with_(steps=2), _PAIRS.with_(steps=2), 2_048, 1_024, without=("bigrams", "bigrams-top-1"), translated=4
)
