"""What several rows of the table of native architectures say: rules, settings that follow, and how channels fit in."""

from __future__ import annotations

from collections.abc import Mapping

from modekit.sources.families import FAMILIES
from modekit.sources.family import Config, whole
from modekit.sources.looked_up import LOOKED_UP
from modekit.sources.native_row import Rule, Widening


def _silu(config: Config) -> bool:
    return config.get("hidden_act", "silu") in {"silu", "swish"}


def heads_fill(native: str) -> Rule:
    """Heads are as wide as the stream has room for, which a native architecture assumes."""
    return _heads_fill, f"head_dim is not hidden_size / num_attention_heads, which {native} assumes"


def _heads_fill(config: Config) -> bool:
    heads = whole(config, "num_attention_heads")
    head_dim = config.get("head_dim")
    return whole(config, "hidden_size") % heads == 0 and head_dim in {None, whole(config, "hidden_size") // heads}


def mapping(config: Config, key: str) -> Config:
    """A setting of several."""
    found = config[key]
    assert isinstance(found, Mapping)
    return found


NO_MLP_BIAS: Rule = (lambda c: not c.get("mlp_bias"), "the FFN has biases (mlp_bias), the native experts have none")
SILU: Rule = (_silu, "the activation is not SiLU, which the native architecture's engines assume")

NO_ATTENTION = "its first layers have no attention that could average over the text"
HEADS_ARE_NORMED = Widening(recency=False)
"""Norms of queries and keys with weights that only the model's files know: a constant is no constant behind them."""
FAMILY = {family.model_type: family for family in (*FAMILIES, *LOOKED_UP)}
