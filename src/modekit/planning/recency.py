"""Whether attention of an architecture can weigh the newer tokens more: by the turns of its rotary embedding (channels.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from modekit.errors import SourceError
from modekit.sources.config import Config, number, whole
from modekit.sources.native import Native, Widening

_LARGEST_HEAD = 2**16
_READS: Mapping[object, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kind -> the settings that change its angles."""


def fades(native: Native, dense: Config) -> bool:
    """Whether its attention can weigh the newer tokens more."""
    return isinstance(native.widening, Widening) and native.widening.recency and turns_per_token(dense) is not None


def turns_per_token(config: Config) -> list[float] | None:
    """Angle theta_i of each of the H / 2 pairs, in radians per token; None where it is not the same for all texts, is scaled
    together with the scores (yarn, longrope, dynamic), or is not said in numbers that could be meant.

    `config` is a family's dense config with every default written out. default and linear: theta^(-2 i / H), by the factor;
    llama3: long waves by the factor, short ones not, those between in between (arXiv:2407.21783).
    """
    rope = config["rope_parameters"]
    assert isinstance(rope, Mapping)
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
        return None
    try:
        turns = _turns(kind, number(rope, "rope_theta"), whole(config, "head_dim"), [number(rope, key) for key in _READS[kind]])
    except (ArithmeticError, LookupError, SourceError, TypeError, ValueError):
        return None
    usable = turns is not None and len(turns) > 1 and all(math.isfinite(turn) and turn > 0 for turn in turns)
    return turns if usable else None


def _turns(kind: object, theta: float, size: int, given: Sequence[float]) -> list[float] | None:
    if not (0 < size <= _LARGEST_HEAD and 0 < theta < math.inf):
        return None
    plain = [theta ** (-2 * pair / size) for pair in range(size // 2)]
    if kind == "linear":
        return [angle / given[0] for angle in plain]
    return [_llama3(angle, *given) for angle in plain] if kind == "llama3" else plain


def _llama3(angle: float, factor: float, low: float, high: float, longest: float) -> float:
    waves = longest * angle / (2 * math.pi)
    if waves < low:
        return angle / factor
    if waves > high:
        return angle
    share = (waves - low) / (high - low)
    return (1 - share) * angle / factor + share * angle
