"""Which channels besides the base's a recipe needs, and whether an architecture can have them (channels.py).

Shape legend: K units per channel, R_U and R_V channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from modekit.errors import CheckpointError, SourceError, UnsupportedError
from modekit.files.typed import shortened
from modekit.planning.channels import CarrySize, Channels, blocks_of
from modekit.planning.shape import BUILD_AGAIN, other_record
from modekit.planning.tensors import low_rank, touched
from modekit.recipes.recipe import Recipe
from modekit.sources.adapter import AdapterSource
from modekit.sources.config import Config, number, whole
from modekit.sources.family import Family
from modekit.sources.names import EMBEDDING, HEAD, in_layer, weight_of
from modekit.sources.native import Native, Widening
from modekit.sources.source import ModelSource

TERMS, EXACT_TERMS = 2, 3
"""K: with two units per channel the error is one in a hundred, which truncated changes hide; with three a thousandth."""
FULL_RANK = 64
"""R_U and R_V where changes have no small rank (benchmarks/whole.md)."""
_DENSE_WIDTHS = ("intermediate_size", "moe_intermediate_size")
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
    size, heads, kv_heads = (whole(dense, key) for key in ("head_dim", "num_attention_heads", "num_key_value_heads"))
    group, experts, (decays, turns) = heads // kv_heads, len(recipe.experts), _decays(recipe, native, dense)
    _check_evidence(experts, len(decays), group, size)
    inner, width_keys = (0, _DENSE_WIDTHS) if native.routed is None else (native.routed.count(dense), (native.width_key,))
    evident = 2 * len(decays) * experts + 1 + (experts if inner else 0)
    needed = evident if carry is None else blocks_of(evident + 1) + carry.channels  # what is carried begins with a block
    return Channels(
        hidden=whole(dense, "hidden_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        layers=whole(dense, "num_hidden_layers"),
        expert_hidden=whole(dense, width_keys[0]),
        spare=_spare(recipe, widening, needed, group * size),
        experts=experts,
        decays=decays,
        widening=widening,
        norm_eps=number(dense, "rms_norm_eps"),
        score_scale=number(dense, "attention_multiplier", size**-0.5),
        embedding_scale=number(dense, "embedding_multiplier", 1.0),
        residual_scale=number(dense, "residual_multiplier", 1.0),
        turns=turns,
        carry=carry,
        inner=inner,
        width_keys=width_keys,
    )


def _check_evidence(experts: int, decays: int, group: int, size: int) -> None:
    """Raise UnsupportedError unless so many heads of a size average all of it."""
    if decays > group or decays * experts > size:
        raise UnsupportedError(
            "an attention head cannot carry the evidence of so many experts and decays",
            where="experts" if decays <= group else "mixture.router.decay",
            found=f"{experts} experts, {decays} decays",
            expected=f"at most {group} decays, and {size} as experts times decays",
            remedy="name fewer, or write output: {format: modekit}",
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


def _decays(recipe: Recipe, native: Native, dense: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
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


def _spare(recipe: Recipe, widening: Widening, needed: int, of_heads: int) -> int:
    """P."""
    asked, fewest = recipe.output.channels, blocks_of(needed)
    if widening.whole_heads:
        fewest = -(-needed // of_heads) * of_heads
    if asked is not None and (asked < needed or (widening.whole_heads and asked != fewest)):
        raise UnsupportedError(
            "the channels do not hold what they are to carry, or no whole heads",
            where="output.channels",
            found=asked,
            expected=fewest if widening.whole_heads else f"at least {needed}",
            remedy="leave it out, or write that",
        )
    return asked or fewest


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


def carried_size(recipe: Recipe, sources: Sequence[ModelSource], family: Family, config: Config) -> CarrySize | None:
    """What a native checkpoint of a recipe carries; None where nothing but the FFN changes, or the recipe wants no more."""
    output = recipe.output
    if output.carry == "ffn":
        return None
    experts = [source for source, expert in zip(sources[1:], recipe.experts, strict=True) if not expert.is_base]
    changing = [source for source in experts if isinstance(source, AdapterSource) and reaches(source, sources[0], family)]
    if not changing and output.carry is None:
        return None
    tied = family.is_tied(sources[0])
    own = [any(touched(source, weight_of(module)) for source in experts) for module in (HEAD, EMBEDDING)]
    layers = whole(config, "num_hidden_layers")
    ranks = [[_rank(source, family, parts, layers) for source in experts] for parts in (("o",), ("q", "k", "v"))]
    outputs, inputs = (max(map(sum, zip(*each, strict=True))) for each in ranks)
    needed = (math.inf if own[1] else outputs, math.inf if own[tied] else inputs)  # to carry everything exactly
    most = output.rank or max(FULL_RANK, whole(config, "hidden_size") // 8)
    outputs, inputs = (blocks_of(int(each) if each <= most else output.rank or FULL_RANK) for each in needed)
    terms = EXACT_TERMS if max(needed) <= most else TERMS
    return CarrySize(outputs=outputs, inputs=inputs, terms=terms, head=own[tied], embedding=own[1])


def reaches(source: AdapterSource, base: ModelSource, family: Family) -> bool:
    """Whether an adapter changes more than FFNs."""
    ffn = f".{family.mlp_module}."
    changed = {*source.changes, *source.replaced}
    return any(name in base.tensors and ffn not in name for name in changed)


def _rank(source: ModelSource, family: Family, parts: Sequence[str], layers: int) -> list[float]:
    """Per layer, of what a source changes in some parts together; infinite where it has no small rank."""
    found = []
    for layer in range(layers):
        names = [in_layer(layer, f"{family.parts[part]}.weight") for part in parts]
        changes = [low_rank(source, name) for name in names if touched(source, name)]
        found.append(sum(math.inf if change is None else change.rank for change in changes))
    return found
