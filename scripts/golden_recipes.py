"""The golden checkpoints: every shape of result, kind of expert and way to make a tensor, in recipes of a few lines."""

from __future__ import annotations

from typing import Any

from golden_sources import ADAPTERS, DOMAINS

_TEXT = {"tokens_per_domain": 400, "sequence_length": 32}
_ROUTER = {"fit": "logistic", **_TEXT}
_CENTROID = {"fit": "centroid", **_TEXT}
_LEXICAL = {"fit": "lexical", "sequence_length": 32}
_ATTENTION = ["q", "k", "v", "o", "mlp"]


def _full(names: tuple[str, ...] = DOMAINS, **settings: Any) -> list[dict[str, Any]]:
    return [
        {"name": name, "model": f"../sources/{name}", "text": f"../sources/text/{name}.jsonl", **settings} for name in names
    ]


def _adapters(names: tuple[str, ...] = DOMAINS) -> list[dict[str, Any]]:
    texts = dict(zip(ADAPTERS, (*DOMAINS, "code"), strict=True))
    return [
        {"name": name, "adapter": f"../sources/{name}-adapter", "text": f"../sources/text/{texts[name]}.jsonl"}
        for name in names
    ]


RECIPES: dict[str, dict[str, Any]] = {
    "native-logistic": {"experts": _full(), "output": {"shard_size": "40KB"}, "mixture": {"router": _ROUTER}},
    "native-base-expert": {
        "experts": [*_full(), {"name": "general", "model": "base", "text": "../sources/text/law.jsonl"}],
        "mixture": {"router": {**_CENTROID, "keep_tokens": 16}, "top_k": 1},
    },
    "native-lexical": {"experts": _full(), "output": {"carry": "ffn"}, "mixture": {"router": _LEXICAL}},
    "native-lexical-whole": {
        "experts": _full(),
        "output": {"carry": "all", "rank": 4},
        "mixture": {"router": _LEXICAL, "top_k": 1, "backbone": "average"},
    },
    "native-lexical-adapters": {
        "experts": _adapters(("medicine", "law", "dora")),
        "output": {"format": "plain"},
        "mixture": {"router": _LEXICAL, "top_k": 1},
    },
    "modekit-lexical": {"experts": _full(), "output": {"format": "modekit"}, "mixture": {"router": _LEXICAL, "modules": "all"}},
    "native-linear-ties": {
        "experts": _full(),
        "mixture": {
            "method": "linear",
            "weights": {"medicine": 3, "law": 1, "code": 4},
            "backbone": {"method": "ties", "density": 0.3},
        },
    },
    "native-random-arithmetic": {
        "experts": _full(),
        "output": {"dtype": "bfloat16"},
        "mixture": {"router": {"fit": "random", "seed": 3}, "backbone": {"method": "task_arithmetic", "scale": 0.4}},
    },
    "native-centroid-average": {"experts": _full(), "mixture": {"router": _CENTROID, "backbone": "average"}},
    "native-folded": {
        "experts": _adapters(("medicine", "law", "dora")),
        "output": {"format": "plain"},
        "mixture": {"router": _ROUTER, "backbone": "average"},
    },
    "modekit-token": {"experts": _full(), "output": {"format": "modekit"}, "mixture": {"router": _ROUTER, "top_p": 0.9}},
    "modekit-context": {
        "experts": _full(),
        "mixture": {
            "modules": _ATTENTION,
            "layers": [1],
            "always_on": {"expert": "base", "weight": 0.2},
            "router": {**_ROUTER, "granularity": "context", "decay": [0.5, 0.9], "per": "projection"},
        },
    },
    "whole-sequence": {
        "experts": _full(),
        "mixture": {"modules": "all", "router": {**_ROUTER, "granularity": "sequence", "prefix": 8, "per": "model"}},
    },
    "adapters": {"experts": _adapters(), "mixture": {"router": {**_ROUTER, "granularity": "context"}}},
    "adapters-linear": {"experts": _adapters(("medicine", "dora")), "mixture": {"method": "linear"}},
    "adapters-arrow": {"experts": _adapters(), "mixture": {"router": {"fit": "arrow"}}},
    "low-rank": {"experts": _full(DOMAINS, **{"as": "lora", "rank": 3}), "mixture": {"router": {"fit": "arrow"}}},
}
"""Name of a checkpoint -> its recipe; the base model is the same for all."""
