"""Attention that weighs the newer tokens more: which decays of evidence an architecture can say, and queries and keys that do.

A constant query and a constant key, turned by the rotary embedding, score the distance d of two tokens: with products c_i of
their pairs, sum_i c_i cos(theta_i d) = const - d / tau as far as a text goes (benchmarks/lexical.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from modekit.errors import SourceError, UnsupportedError
from modekit.recipes.recipe import Recipe
from modekit.sources.config import Config, number, whole
from modekit.sources.native import Native, Widening

_LEAST_DECAY = 0.9  # a head whose scores fall faster is no good average of a text
_FARTHEST = 3_000.0  # tokens per radian of the slowest pair that scores a distance; slower ones would need too large numbers
_LARGEST_HEAD = 2**16


def decays_of(recipe: Recipe, native: Native, dense: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The recipe's, else the fit's own where the architecture can say it, else that of the mean; and the rotary turns."""
    assert isinstance(native.widening, Widening)
    turns = turns_per_token(dense) if native.widening.recency else None
    asked = recipe.mixture.router.decay
    decays = tuple(recipe.mixture.router.decays)
    if asked is None and turns is None:
        return (1.0,), ()
    for decay in decays:
        if decay < _LEAST_DECAY or (decay != 1.0 and turns is None):
            raise UnsupportedError(
                f"attention of {native.native_type} with this base's norms and rotary embedding cannot fade so",
                where="mixture.router.decay",
                found=decay,
                expected="1.0, the mean of the text so far" if turns is None else f"{_LEAST_DECAY} to 1",
                remedy="correct the decay, or write output: {format: modekit}",
            )
    return decays, tuple(turns or ())


def time_constant(decay: float) -> float | None:
    """Tokens after which a token counts 1/e; None when it never fades."""
    return None if decay == 1.0 else -1.0 / math.log(decay)


def distance_scores(turns: Sequence[float], scale: float, tau: float | None, reference: float | None = None) -> list[float]:
    """One side of the products c_i by which attention, that multiplies scores by `scale`, weighs a distance: of a query for
    `reference`'s key, or of that key. `turns`: theta_i, in radians per token.
    """
    if tau is None:
        return [0.0] * len(turns)
    spacing = math.log(turns[0] / turns[1])
    products = (2 / math.pi * spacing / turn / scale if 1 / turn <= _FARTHEST else 0.0 for turn in turns)
    return [math.sqrt(each / (reference or tau)) * ((reference or tau) / tau) for each in products]


def turns_per_token(config: Config) -> list[float] | None:
    """Angle theta_i of each of the H / 2 pairs, in radians per token; None where it is not the same for all texts, is scaled
    together with the scores (yarn, longrope, dynamic), or is not said in numbers that could be meant.

    `config` is a family's dense config with every default written out. default and linear: theta^(-2 i / H), by the factor;
    llama3: long waves by the factor, short ones not, those between in between (arXiv:2407.21783).
    """
    rope = config["rope_parameters"]
    assert isinstance(rope, Mapping)
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
        return None
    try:
        turns = _turns(rope, whole(config, "head_dim"))
    except (ArithmeticError, LookupError, SourceError, TypeError, ValueError):
        return None
    usable = turns is not None and len(turns) > 1 and all(math.isfinite(turn) and turn > 0 for turn in turns)
    return turns if usable else None


def _turns(rope: Config, size: int) -> list[float] | None:
    kind, theta = rope.get("rope_type", "default"), number(rope, "rope_theta")
    if not (0 < size <= _LARGEST_HEAD and 0 < theta < math.inf):
        return None
    plain = [theta ** (-2 * pair / size) for pair in range(size // 2)]
    if kind == "default":
        return plain
    if kind == "linear":
        return [angle / number(rope, "factor") for angle in plain]
    if kind == "llama3":
        return [_llama3(angle, rope) for angle in plain]
    return None


def _llama3(angle: float, rope: Config) -> float:
    factor, low, high = (number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    waves = number(rope, "original_max_position_embeddings") * angle / (2 * math.pi)
    if waves < low:
        return angle / factor
    if waves > high:
        return angle
    share = (waves - low) / (high - low)
    return (1 - share) * angle / factor + share * angle
