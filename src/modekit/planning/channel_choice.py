"""Which channels besides the base's a recipe needs, and whether an architecture can have them (channels.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from modekit.errors import CheckpointError, SourceError, UnsupportedError
from modekit.files.typed import shortened
from modekit.planning.carry import CarrySize, blocks_of
from modekit.planning.channels import Channels
from modekit.planning.shape import BUILD_AGAIN, other_record
from modekit.recipes.recipe import Recipe
from modekit.sources.config import Config, number, whole
from modekit.sources.natives import Native, Widening

_STEP = 64  # of channels without a layer in front
_LEAST_DECAY = 0.9  # of recency: a head whose scores fall faster is no good average of a text


def channels_of(recipe: Recipe, native: Native, dense: Config, carry: CarrySize | None = None) -> Channels | None:
    """The channels of a recipe over a dense config with every default written out; None when its router needs none.

    Raises UnsupportedError where the architecture, the number of experts or `output.channels` do not allow them.
    """
    fit, widening = recipe.mixture.fit, native.widening
    if fit is None or not fit.carried:
        return None
    if isinstance(widening, str):
        raise UnsupportedError(
            f"{native.native_type} cannot carry a {fit.name} router: {widening}",
            where="mixture.router.fit",
            remedy="choose another fit, or output: {format: modekit}",
        )
    if carry is not None and not widening.in_front:
        raise UnsupportedError(
            f"{native.native_type} cannot carry more of an expert than its FFN: it has norms behind attention",
            where="output.carry",
            remedy="write output: {carry: ffn}, or output: {format: modekit}",
        )
    size, heads, kv_heads = (whole(dense, key) for key in ("head_dim", "num_attention_heads", "num_key_value_heads"))
    group, experts, (decays, turns) = heads // kv_heads, len(recipe.experts), _decays(recipe, native, dense)
    _check_room(experts, decays, group, size)
    evident = 2 * len(decays) * experts + 1
    needed = evident if carry is None else blocks_of(evident + 1) + carry.channels  # what is carried begins with a block
    return Channels(
        hidden=whole(dense, "hidden_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        layers=whole(dense, "num_hidden_layers"),
        expert_hidden=whole(dense, "intermediate_size"),
        spare=_spare(recipe, widening, needed, group * size),
        experts=experts,
        decays=decays,
        widening=widening,
        norm_eps=number(dense, "rms_norm_eps"),
        score_scale=number(dense, "attention_multiplier", size**-0.5),
        embedding_scale=number(dense, "embedding_multiplier", 1.0),
        residual_scale=number(dense, "residual_multiplier", 1.0),
        turns=turns,
        front=widening.in_front,
        carry=carry,
    )


def channels_said_by(
    config: Config, recipe: Recipe, where: str, native: Native, dense: Config, carry: CarrySize | None
) -> Channels | None:
    """Those of a finished checkpoint. Raises CheckpointError where its record cannot have them, or config.json has others."""
    try:
        channels = channels_of(recipe, native, dense, carry)
        wide = {} if channels is None else channels.widened(config)
    except (UnsupportedError, SourceError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            "modekit.json does not say a base that could carry this router",
            where=f"{where}: dense_config",
            found=shortened(str(error)),
            remedy=BUILD_AGAIN,
        ) from None
    for key, value in wide.items():
        if config.get(key) != value:
            raise other_record(f"{where}: {key}", shortened(repr(config.get(key))), value)
    return channels


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


def _spare(recipe: Recipe, widening: Widening, needed: int, of_heads: int) -> int:
    """P."""
    asked, front = recipe.output.channels, widening.in_front
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
    return asked or blocks_of(needed) if front else asked or -(-needed // _STEP) * _STEP


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
