"""Channels besides the base's: how a plain checkpoint carries a lexical router, and more of its experts than FFNs.

Of P channels behind the base's D, J E carry what a token says of its domain (its row of the table, written into the
embedding), one a constant, and J E what attention makes of the former: their average over the text so far, which the gates
read. That attention is a head of a layer of its own, in front of the base's first (benchmarks/lexical.md).

    embedding    [e, eps r W_x, 0, eps r c]     r = sqrt(mean(e^2) + norm eps), by which the first norm divides
    norms        w sqrt(D / (D + P)), norm eps times D / (D + P); the last norm is zero on the channels
    in front     values read eps W_x, outputs are written beside it; queries and keys read the constant, and score the
                 distance of two tokens (recency) or nothing (the mean)

What experts differ by in attention, head and embedding has two further sets (benchmarks/whole.md). Into U every layer's
attention writes what the experts' output projections are to make of it; V tells queries, keys and values, or the head, what the
expert differs by. Some more hidden units of every expert read and clear them.

Where the base is a mixture itself, E more hold penalties, by which its routers keep to one expert (penalties.py).

Shape legend: D hidden size, P, R_U, R_V channels, E experts, M experts that each of them has of its own, J averages, H head
size, G query heads per key-value head, F hidden units, K units per channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from modekit.errors import UnsupportedError
from modekit.planning.carry import CarrySize, blocks_of
from modekit.planning.penalties import LOUD, front_units
from modekit.planning.recency import turns_per_token
from modekit.recipes.recipe import Recipe
from modekit.sources.config import Config, number, whole, words
from modekit.sources.names import EMBEDDING, HEAD, split_layer, weight_of
from modekit.sources.native import Native, Widening
from modekit.weights.padding import CarriedPart, Entry, FFNKind, MeasuredColumn, Pad

_AVERAGED = 2.0**-4
"""Of averages: embeddings may be small, and the base's first norm sees both."""
CONSTANT = 4.0
"""Of the constant channel, beside evidence of about that size: quantised together, neither is lost."""
_DENSE_WIDTHS = ("intermediate_size", "moe_intermediate_size")
_ATTENTION: tuple[Literal["q", "k", "v", "o"], ...] = ("q", "k", "v", "o")
_LEAST_DECAY = 0.9  # a head whose scores fall faster is no good average of a text
_FARTHEST = 3_000.0  # tokens per radian of the slowest pair that scores a distance; slower ones would need too large numbers
MEASURED_TOKENS = 1_024
"""Of all domains together, on which the size of the stream is measured: a dense pass of a large model is not free."""


@dataclass(frozen=True)
class Channels:
    """Where everything lies, for one base and one recipe.

    Attributes:
        hidden, heads, kv_heads, head_dim, layers, expert_hidden: of the base: D, its heads, H, layers, F.
        spare: P.
        experts: E.
        decays: of the averages, J.
        widening: of the architecture.
        norm_eps: of the base's norms.
        score_scale, embedding_scale, residual_scale: by which the family multiplies scores, embeddings, what layers add.
        turns: of the rotary embedding, where evidence fades.
        carry: what else has channels.
        inner: M, where the base is a mixture itself; else 0.
        width_keys: of the config, for F.
        eps: size of the evidence beside a stream of size 1: its square is what the norms see of it.
    """

    eps: ClassVar[float] = 2.0**-12

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    expert_hidden: int
    spare: int
    experts: int
    decays: tuple[float, ...]
    widening: Widening
    norm_eps: float
    score_scale: float
    embedding_scale: float
    residual_scale: float
    turns: tuple[float, ...]
    carry: CarrySize | None = None
    inner: int = 0
    width_keys: tuple[str, ...] = ()

    @property
    def group(self) -> int:
        """G."""
        return self.heads // self.kv_heads

    @property
    def more_heads(self) -> int:
        """Key-value heads besides the base's; the first of all averages, in the layer in front."""
        return self.spare // (self.group * self.head_dim) if self.widening.whole_heads else 0

    @property
    def more_units(self) -> int:
        """Hidden units of an expert besides its own."""
        return 0 if self.carry is None else self.carry.units

    @property
    def evidence(self) -> slice:
        """Channels of the tokens' evidence, J E: average by average, expert by expert."""
        return slice(self.hidden, self.hidden + self.experts * len(self.decays))

    @property
    def context(self) -> slice:
        """Channels of the averages, in the same order."""
        return slice(self.evidence.stop, 2 * self.evidence.stop - self.hidden)

    @property
    def penalties(self) -> slice:
        """Channels that say how far every expert is from being chosen, where the base is a mixture itself."""
        return slice(self.context.stop, self.context.stop + (self.experts if self.inner else 0))

    @property
    def constant(self) -> int:
        """The channel that is the same for all tokens behind the first norm: the last one, or that before what is carried."""
        if self.carry is None:
            return self.hidden + self.spare - 1
        return self.hidden + blocks_of(self.penalties.stop - self.hidden + 2) - 1  # two that are constant

    @property
    def still(self) -> int:
        """The channel that is the same for all tokens in the stream itself, where anything is carried."""
        return self.constant - 1

    @property
    def outputs(self) -> slice:
        """U: what attention's output is multiplied with, for the experts; of embeddings, what tells experts apart."""
        return slice(self.constant + 1, self.constant + 1 + (0 if self.carry is None else self.carry.outputs))

    @property
    def inputs(self) -> slice:
        """V: what an expert adds to queries, keys and values of the next layer, or to the logits."""
        return slice(self.outputs.stop, self.outputs.stop + (0 if self.carry is None else self.carry.inputs))

    @property
    def norm_scale(self) -> float:
        """By which the weights of norms over all channels are multiplied, so that the base's channels come out as before."""
        return math.sqrt(self.hidden / (self.hidden + self.spare))

    def gate_factor(self, size: float) -> float:
        """By which a gate multiplies the averages where the stream before its norm has a size, to have those of the table."""
        return size / (_AVERAGED * self.eps)

    @property
    def row_scale(self) -> MeasuredColumn:
        """How r of an embedding's row is measured."""
        return MeasuredColumn(self.constant, self.eps * CONSTANT, self.embedding_scale, norm_eps=self.norm_eps)

    def widened(self, config: Config) -> dict[str, object]:
        """A config, the native or the dense one, with the channels and heads."""
        wide = {
            **config,
            "hidden_size": self.hidden + self.spare,
            "num_attention_heads": self.heads + self.group * self.more_heads,
            "num_key_value_heads": self.kv_heads + self.more_heads,
            "rms_norm_eps": self.norm_eps * self.hidden / (self.hidden + self.spare),
            **self._one_layer_more(config),
        }
        for key in self.width_keys:
            if config.get(key) is not None:
                wide[key] = self.expert_hidden + self.more_units
        if self.carry is not None and self.carry.head:
            wide["tie_word_embeddings"] = False
        if not self.widening.whole_heads or wide.get("head_dim") is not None:
            wide["head_dim"] = self.head_dim
        return wide

    def _one_layer_more(self, config: Config) -> dict[str, object]:
        """What a config, wide already or not, says of the layers; the one in front is of the first one's kind."""
        said: dict[str, object] = {"num_hidden_layers": self.layers + 1}
        if whole(config, "num_hidden_layers") == self.layers:
            if isinstance(config.get("layer_types"), list):
                said["layer_types"] = [*words(config, "layer_types")[:1], *words(config, "layer_types")]
            if config.get("max_window_layers") is not None:
                said["max_window_layers"] = whole(config, "max_window_layers") + 1
        return said

    def pad_of(self, name: str, shape: tuple[int, ...], parts: Mapping[str, str]) -> Pad | None:
        """How a tensor of the base, by its name in the result, is widened; None when it stays as it is.

        `parts`: of a layer of the result -> module.
        """
        layer, path = split_layer(name)
        if not isinstance(layer, int):
            return self._pad_outside(name)
        module, _, leaf = path.rpartition(".")
        if module in self.widening.norms:
            return Pad(columns=self.spare, scale=self.norm_scale, entries=self._norm_entries(layer, module))
        part = next((part for part in _ATTENTION if parts[part] == module), None)
        if part is None:
            over_heads = module.rpartition(".")[0] == parts["q"].rpartition(".")[0]
            return Pad(columns=self.spare) if shape[-1:] == (self.hidden,) and not over_heads else None
        heads = self.more_heads * self.head_dim
        added = {"q": self.group * heads, "k": heads, "v": heads, "o": self.spare}[part]
        if leaf == "bias":
            return Pad(columns=added)
        columns = self.group * heads if part == "o" else self.spare
        carries = self.carry is not None and layer > 0 and (self.carry.outputs if part == "o" else self.carry.inputs)
        return Pad(
            added,
            columns,
            entries=self._entries(part) if layer == 0 else (),
            carried=CarriedPart(part, layer) if carries else None,
        )

    def _pad_outside(self, name: str) -> Pad:
        """Of embedding, head and last norm."""
        if name == weight_of(EMBEDDING):
            carried = CarriedPart("embedding") if self.carry is not None else None
            return Pad(columns=self.spare, measured=self.row_scale, free=self.evidence, carried=carried)
        carries = self.carry is not None and self.carry.head
        if name == weight_of(HEAD):
            return Pad(columns=self.spare, carried=CarriedPart("head") if carries else None)
        passed = _places(self.inputs) if carries else ()
        return Pad(columns=self.spare, scale=self.norm_scale, entries=tuple((0, column, self.norm_scale) for column in passed))

    def expert_pad(self, part: FFNKind, layer: int, expert: int | None = None) -> Pad:
        """How the FFN's gate, up (F, D) or down (D, F) in a layer of the result is widened; without an expert, that of all."""
        carried = None if self.carry is None else CarriedPart(part, layer, expert)
        entries = front_units(self, part, expert is None) if self.inner and layer == 0 else ()
        if part == "down":
            return Pad(rows=self.spare, columns=self.more_units, entries=entries, carried=carried)
        return Pad(rows=self.more_units, columns=self.spare, entries=entries, carried=carried)

    def _norm_entries(self, layer: int, module: str) -> tuple[Entry, ...]:
        """What norms let through of the channels: evidence to the first attention, averages to every router, and to all what
        they read of what is carried.
        """
        passed: list[int] = []
        loud = range(0)
        if module == self.widening.after_attention:
            passed = [*_places(self.context)]
            if self.inner:
                heard = self.penalties if layer else self.context
                loud = _places(heard)
                passed = [] if layer else [self.constant]
            if self.carry is not None:
                passed += [self.still, *_places(self.outputs), *_places(self.inputs)]
        elif module == self.widening.before_attention and layer == 0:
            passed = [*_places(self.evidence), self.constant]
        elif module == self.widening.before_attention:
            passed = [*_places(self.inputs)]
        return tuple((0, column, self.norm_scale * factor) for part, factor in ((passed, 1), (loud, LOUD)) for column in part)

    def _entries(self, part: str) -> tuple[Entry, ...]:
        """Of the heads that average, in the first layer."""
        count = self.experts * len(self.decays)
        if part == "v":
            return tuple((number, self.evidence.start + number, 1.0) for number in range(count))
        if part == "o":
            heads, written = (number // self.experts for number in range(count)), _AVERAGED / self.residual_scale
            return tuple(
                (self.context.start + number, head * self.head_dim + number, written) for number, head in enumerate(heads)
            )
        taus = [None if decay == 1.0 else -1.0 / math.log(decay) for decay in self.decays]  # tokens until one counts 1/e
        reference = next((tau for tau in taus if tau is not None), None)  # that the key is made for; queries make others of it
        if reference is None:  # queries and keys of zero: the mean
            return ()
        sides = [(reference, None)] if part == "k" else [(tau, reference) for tau in taus]
        # Rows of the new heads read the constant: a number for each pair, in its first place.
        rows = range(0, self.head_dim, 2) if self.widening.interleaved else range(self.head_dim // 2)
        return tuple(
            (head * self.head_dim + row, self.constant, value / (self.eps * CONSTANT))
            for head, side in enumerate(sides)
            for row, value in zip(rows, _distance_scores(self.turns, self.score_scale, *side), strict=True)
            if value
        )


def _places(channels: slice) -> range:
    return range(channels.start, channels.stop)


def channels_of(recipe: Recipe, native: Native, dense: Config, carry: CarrySize | None = None) -> Channels | None:
    """The channels of a recipe over a dense config with every default written out; None when its router needs none.

    Raises UnsupportedError where the architecture, the number of experts or `output.channels` do not allow them.
    """
    widening = native.widening
    if not recipe.mixture.is_carried:
        return None
    if isinstance(widening, str):
        raise UnsupportedError(
            f"{native.native_type} cannot carry a {recipe.mixture.router.fit} router: {widening}",
            where="mixture.router.fit",
            remedy="choose another fit, or output: {format: modekit}",
        )
    size, heads, kv_heads = (whole(dense, key) for key in ("head_dim", "num_attention_heads", "num_key_value_heads"))
    group, experts, (decays, turns) = heads // kv_heads, len(recipe.experts), _decays_of(recipe, native, dense)
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


def _decays_of(recipe: Recipe, native: Native, dense: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The recipe's, else the fit's own where the architecture can say it, else that of the mean; and the rotary turns."""
    turns = turns_per_token(dense) if isinstance(native.widening, Widening) and native.widening.recency else None
    decays = tuple(recipe.mixture.router.decays)
    if recipe.mixture.router.decay is None and turns is None:
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


def _distance_scores(turns: Sequence[float], scale: float, tau: float | None, reference: float | None = None) -> list[float]:
    """One side of the products c_i by which attention, that multiplies scores by `scale`, weighs a distance: of a query for
    `reference`'s key, or of that key. `turns`: theta_i, in radians per token.

    Turned by the rotary embedding, a constant query and key score the distance d of two tokens: with products c_i of their
    pairs, sum_i c_i cos(theta_i d) = const - d / tau as far as a text goes (benchmarks/lexical.md).
    """
    if tau is None:
        return [0.0] * len(turns)
    spacing = math.log(turns[0] / turns[1])
    products = (2 / math.pi * spacing / turn / scale if 1 / turn <= _FARTHEST else 0.0 for turn in turns)
    return [math.sqrt(each / (reference or tau)) * ((reference or tau) / tau) for each in products]
