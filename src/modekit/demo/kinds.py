"""Kinds of demo: what its experts are, how they are mixed, and how much work it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from modekit.demo.models import BATCH_TOKENS, SEQUENCE_LENGTH
from modekit.loaded.next_token import Training

Experts = Literal["mlp", "full", "lora"]
"""What is trained of an expert."""
What = Experts | Literal["modular"]
"""modular: students of one teacher (modular.py)."""

_ROUTING = {"method": "routing", "top_k": 2}
_FOLDED = {"output": {"format": "native"}}
MIXTURES: dict[Experts, dict[str, dict[str, Any]]] = {
    "mlp": {
        "linear": {"mixture": {"method": "linear"}},
        "noisy": {"mixture": {**_ROUTING, "router": {"fit": "random"}}},
        "ridge": {"mixture": {**_ROUTING, "router": {"fit": "ridge"}}},
        "routing": {"mixture": _ROUTING},
        "context": {"mixture": {**_ROUTING, "router": {"granularity": "context"}}},
        "ngram": {"mixture": {**_ROUTING, "router": {"fit": "ngram"}}},
        "lexical": {"mixture": {**_ROUTING, "router": {"fit": "lexical"}}},
        "lexical-top-1": {"mixture": {**_ROUTING, "top_k": 1, "router": {"fit": "lexical"}}},
    },
    "full": {
        "linear": {"mixture": {"method": "linear"}},
        "routing": {"mixture": _ROUTING},
        **{f"routing {backbone}": {"mixture": {**_ROUTING, "backbone": backbone}}
           for backbone in ("average", "task_arithmetic", "ties")},
        "sequence whole": {
            "mixture": {**_ROUTING, "modules": "all", "router": {"granularity": "sequence", "per": "model"}}
        },
        "ngram whole": {"mixture": {**_ROUTING, "modules": "all", "router": {"fit": "ngram"}}},
    },
    "lora": {
        "linear": {"mixture": {"method": "linear"}},
        "routing": {"mixture": _ROUTING},
        "context": {"mixture": {**_ROUTING, "router": {"granularity": "context"}}},
        "ngram": {"mixture": {**_ROUTING, "router": {"fit": "ngram"}}},
        "lexical": {"mixture": {**_ROUTING, "router": {"fit": "lexical"}}},
        "lexical-top-1": {"mixture": {**_ROUTING, "top_k": 1, "router": {"fit": "lexical"}}},
        "routing folded": {"mixture": _ROUTING, **_FOLDED},
        "routing folded average": {"mixture": {**_ROUTING, "backbone": "average"}, **_FOLDED},
    },
}  # fmt: skip
"""What the experts are -> name -> what the recipe says. `routing` is what a recipe gets that says nothing about the router;
what stands behind a space changes what the experts can carry, and gets an oracle row of its own."""


REFITTED = {"ridge": "routing"}
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


_TRAINING = Training(
    steps=80, batch_tokens=BATCH_TOKENS, sequence_length=SEQUENCE_LENGTH, learning_rate=3e-3, weight_decay=0.05,
    by_length=True, autocast=True,
)  # fmt: skip
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
