"""Which channels besides the base's a recipe needs, and whether an architecture can have them (channels.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from modekit.errors import SourceError, UnsupportedError
from modekit.planning.carry import CarrySize, blocks_of
from modekit.planning.channels import Channels
from modekit.recipes.recipe import Recipe
from modekit.sources.config import Config, number, whole
from modekit.sources.family import Family
from modekit.sources.native import Native, Widening
from modekit.sources.natives import choose_native

_OLD_STEP = 64  # of channels without a layer in front
_LEAST_DECAY = 0.9  # of recency: a head whose scores fall faster is no good average of a text


def channels_of(
    recipe: Recipe, native: Native, dense: Config, carry: CarrySize | None = None, *, front: bool = True
) -> Channels | None:
    """The channels of a recipe over a dense config with every default written out; None when its router needs none.

    Checkpoints of older versions have no layer in front.

    Raises UnsupportedError where the architecture, the number of experts or `output.channels` do not allow them.
    """
    fit = recipe.mixture.fit
    if fit is None or not fit.carried:
        return None
    if isinstance(native.widening, str):
        raise UnsupportedError(
            f"{native.native_type} cannot carry a {fit.label} router: {native.widening}",
            where="mixture.router.fit",
            remedy="choose another fit, or output: {format: modekit}",
        )
    front = front and native.widening.in_front
    if carry is not None and (native.split or not front):
        why = "its base has queries, keys and values in one tensor" if native.split else "it has norms behind attention"
        raise UnsupportedError(
            f"{native.native_type} cannot carry more of an expert than its FFN: {why}",
            where="output.carry",
            remedy="write output: {carry: ffn}, or output: {format: modekit}",
        )
    return _channels(recipe, native, native.widening, dense, carry, front)


def _channels(
    recipe: Recipe, native: Native, widening: Widening, dense: Config, carry: CarrySize | None, front: bool
) -> Channels:
    size, heads = whole(dense, "head_dim"), whole(dense, "num_attention_heads")
    group, experts = heads // whole(dense, "num_key_value_heads"), len(recipe.experts)
    decays, turns = _decays(recipe, native, dense)
    _check_room(experts, decays, group, size)
    return Channels(
        whole(dense, "hidden_size"),
        heads,
        whole(dense, "num_key_value_heads"),
        size,
        whole(dense, "num_hidden_layers"),
        whole(dense, "intermediate_size"),
        _spare(recipe, widening, _needed(2 * len(decays) * experts + 1, carry), group * size, front),
        experts,
        decays,
        widening,
        number(dense, "rms_norm_eps"),
        number(dense, "attention_multiplier", size**-0.5),
        number(dense, "embedding_multiplier", 1.0),
        number(dense, "residual_multiplier", 1.0),
        turns,
        front,
        carry,
    )


def _needed(evident: int, carry: CarrySize | None) -> int:
    """Channels of the router, and of what is carried, which begins with a block of its own."""
    return evident if carry is None else blocks_of(evident + 1) + carry.channels


def _check_room(experts: int, decays: Sequence[float], group: int, size: int) -> None:
    """Raise UnsupportedError unless one key-value head with its queries carries all evidence."""
    if len(decays) > group:
        raise UnsupportedError(
            "more averages than the new head has queries",
            where="mixture.router.decay",
            found=len(decays),
            expected=f"at most {group}, heads per key-value head of the base",
            remedy="name fewer decays",
        )
    if len(decays) * experts > size:
        raise UnsupportedError(
            "more experts than an attention head can carry evidence for",
            where="experts",
            found=len(decays) * experts,
            expected=f"experts times decays up to {size}, the size of a head",
            remedy="leave experts out, or output: {format: modekit}",
        )


def is_carried(family: Family, config: Config, experts: int) -> bool:
    """Whether a native architecture of this base carries a lexical router of its own choosing over so many experts."""
    row, _ = choose_native(family, config)
    if not row:
        return False
    names = [{"name": f"e{number}", "model": "./e", "text": "./t"} for number in range(experts)]
    recipe = Recipe.model_validate({"base_model": "b", "experts": names, "mixture": {"router": {"fit": "lexical"}}})
    try:
        return bool(channels_of(recipe, row, family.dense_config(config)))
    except UnsupportedError:
        return False


def _decays(recipe: Recipe, native: Native, dense: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The recipe's, else the fit's own where the architecture can say it, else that of the mean; and the rotary turns."""
    assert isinstance(native.widening, Widening)
    turns = turns_per_token(dense) if native.widening.recency else None
    asked = recipe.mixture.router.decay
    decays = tuple(recipe.mixture.router.decays)
    if asked is None and turns is None:
        return (1.0,), ()
    for decay in decays:
        if decay != 1.0 and turns is None:
            raise UnsupportedError(
                f"{native.native_type} with this base's norms or rotary embedding cannot say that older tokens fade",
                where="mixture.router.decay",
                found=decay,
                remedy="write decay: [1.0], the mean of the text so far",
            )
        if decay < _LEAST_DECAY:
            raise UnsupportedError(
                "an attention head cannot fade so fast",
                where="mixture.router.decay",
                found=decay,
                expected=f"{_LEAST_DECAY} to 1 in a native architecture",
                remedy="choose a decay in this range",
            )
    return decays, tuple(turns or ())


def _spare(recipe: Recipe, widening: Widening, needed: int, of_heads: int, front: bool) -> int:
    """P."""
    asked = recipe.output.channels
    if widening.whole_heads:
        fewest = -(-needed // of_heads) * of_heads if front else of_heads
        if needed > fewest or asked not in (None, fewest):
            raise UnsupportedError(
                "this architecture takes as many channels as its new heads are wide",
                where="output.channels",
                found=asked or f"{needed} needed",
                expected=fewest,
                remedy="leave output.channels out, or mix fewer experts",
            )
        return fewest
    if asked is not None and asked < needed:
        raise UnsupportedError(
            "too few channels for what they are to carry",
            where="output.channels",
            found=asked,
            expected=f"at least {needed}",
            remedy="leave it out, or raise it",
        )
    return asked or blocks_of(needed) if front else asked or -(-needed // _OLD_STEP) * _OLD_STEP


_LARGEST_HEAD = 2**16


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
