"""Channels besides the base's: how a lexical router is carried inside a plain native checkpoint.

Of P channels behind the base's D, J E carry what a token says of its domain (its row of the table, written into the
embedding), one a constant, and J E what attention makes of the former: their average over the text so far. The gates of all
layers read the latter. That attention is a head of a layer of its own, in front of the base's first, or, where a norm behind
attention forbids that, one more head in the first layer. benchmarks/lexical.md has the mathematics,
and why the rest of the model computes what it did. What experts differ by outside of their FFNs has channels, too (carry.py).

    embedding    [e, eps r W_x, 0, eps r c]     r = sqrt(mean(e^2) + norm eps), by which the first norm divides
    norms        w sqrt(D / (D + P)), norm eps times D / (D + P); the last norm is zero on the channels
    first layer  a key-value head and its group of query heads: values read eps W_x, outputs are written beside it; queries
                 and keys read the constant, and score the distance of two tokens (recency) or nothing (the mean)
    elsewhere    zeros, or what is carried

Shape legend: D hidden size, P channels, E experts, J averages, H head size, G query heads per key-value head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from modekit.planning.carry import STREAM_TOKENS, CarrySize, blocks_of
from modekit.recipes.recipe import Recipe
from modekit.sources.config import Config, whole, words
from modekit.sources.names import EMBEDDING, HEAD, split_layer, weight_of
from modekit.sources.natives import Widening
from modekit.weights.made import CarriedPart, Entry, FFNKind, MeasuredColumn, Pad

_EPS = 2.0**-12
"""Size of the evidence beside a stream of size 1: its square is what the norms see of it."""
_EPS_BEFORE_NORM = 2.0**-20
"""Where what attention adds is normed by itself, and may be much smaller than the stream."""
_AVERAGED = 2.0**-4
"""Of averages that a layer in front writes: embeddings may be small, and the base's first norm sees both."""
CONSTANT = 4.0
"""Of the constant channel, beside evidence of about that size: quantised together, neither is lost."""
_FFN_WIDTHS = ("intermediate_size", "moe_intermediate_size")
_ATTENTION: tuple[Literal["q", "k", "v", "o"], ...] = ("q", "k", "v", "o")
MEASURED_TOKENS = 1_024
"""Of all domains together, on which the size of the stream is measured: a dense pass of a large model is not free."""
_FARTHEST = 3_000.0  # tokens per radian of the slowest pair that scores a distance; slower ones would need too large numbers


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
        front: whether a layer in front of the base's averages the evidence.
        carry: what else has channels.
    """

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
    front: bool = False
    carry: CarrySize | None = None

    @property
    def group(self) -> int:
        """G."""
        return self.heads // self.kv_heads

    @property
    def more_heads(self) -> int:
        """Key-value heads besides the base's."""
        if not self.front:
            return 1
        return self.spare // (self.group * self.head_dim) if self.widening.whole_heads else 0

    @property
    def first_kv_head(self) -> int:
        """The key-value head that averages."""
        return 0 if self.front else self.kv_heads

    @property
    def more_units(self) -> int:
        """Hidden units of an expert besides its own."""
        return 0 if self.carry is None else self.carry.units

    @property
    def eps(self) -> float:
        """Size of the evidence."""
        return _EPS if self.widening.before_attention is not None else _EPS_BEFORE_NORM

    @property
    def evidence(self) -> slice:
        """Channels of the tokens' evidence, J E: average by average, expert by expert."""
        return slice(self.hidden, self.hidden + self.experts * len(self.decays))

    @property
    def context(self) -> slice:
        """Channels of the averages, in the same order."""
        return slice(self.evidence.stop, 2 * self.evidence.stop - self.hidden)

    @property
    def constant(self) -> int:
        """The channel that is the same for all tokens behind the first norm: the last one, or that before what is carried."""
        if self.carry is None:
            return self.hidden + self.spare - 1
        evident = 2 * self.experts * len(self.decays) + 1  # evidence, its averages, and the constant
        return self.hidden + blocks_of(evident + 1) - 1

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

    @property
    def row_scale(self) -> MeasuredColumn:
        """How r of an embedding's row is measured."""
        return MeasuredColumn(
            self.constant,
            self.eps * CONSTANT,
            self.embedding_scale,
            norm_eps=self.norm_eps if self.widening.before_attention is not None else None,
        )

    def widened(self, config: Config) -> dict[str, object]:
        """A config, the native or the dense one, with the channels and heads."""
        wide = {
            **config,
            "hidden_size": self.hidden + self.spare,
            "num_attention_heads": self.heads + self.group * self.more_heads,
            "num_key_value_heads": self.kv_heads + self.more_heads,
            "rms_norm_eps": self.norm_eps * self.hidden / (self.hidden + self.spare),
        }
        if self.front:
            wide |= self._one_layer_more(config)
        for key in _FFN_WIDTHS:
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
        if module in self.widening.over_heads:
            added = self.more_heads * (self.group if module == self.widening.over_heads[0] else 1)
            return Pad(columns=added * self.head_dim, scale=self.norm_scale)
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
        passed = range(self.inputs.start, self.inputs.stop) if carries else ()
        return Pad(columns=self.spare, scale=self.norm_scale, entries=tuple((0, column, self.norm_scale) for column in passed))

    def expert_pad(self, part: FFNKind, layer: int, expert: int | None = None) -> Pad:
        """How the FFN's gate, up (F, D) or down (D, F) in a layer of the result is widened."""
        carried = None if self.carry is None else CarriedPart(part, layer, expert)
        if part == "down":
            return Pad(rows=self.spare, columns=self.more_units, carried=carried)
        return Pad(rows=self.more_units, columns=self.spare, carried=carried)

    def notes(self, recipe: Recipe) -> Iterable[str]:
        """What a user should know of them."""
        share = self.spare / self.hidden
        added = "a layer in front" if self.front else f"one key-value head to its {self.kv_heads}"
        yield (
            f"the {recipe.mixture.router.fit} router adds {self.spare} channels to the base's {self.hidden} "
            f"({share:.1%}) and {added}; the rest computes the same"
        )
        if self.carry is not None:
            yield self._carry_note(self.carry)
        if recipe.mixture.router.decay is None and self.decays == (1.0,):
            yield "its evidence does not fade: this architecture averages over all of the text so far"

    def _carry_note(self, carry: CarrySize) -> str:
        parts = ", ".join(["attention", *(["head"] if carry.head else []), *(["embedding"] if carry.embedding else [])])
        return (
            f"{' and '.join(parts.rsplit(', ', 1))} of every expert: carried through {carry.channels} of these channels and "
            f"{carry.units} hidden units; `modekit verify --deep` measures how exactly; "
            f"a build first runs the base over up to {STREAM_TOKENS:,} tokens of the experts' text"
        )

    def _norm_entries(self, layer: int, module: str) -> tuple[Entry, ...]:
        """What norms let through of the channels: evidence to the first attention, averages to every router, and to all what
        they read of what is carried.
        """
        passed: list[int] = []
        if module == self.widening.after_attention:
            passed = list(range(self.context.start, self.context.stop))
            if self.carry is not None:
                passed += [self.still, *range(self.outputs.start, self.inputs.stop)]
        elif module == self.widening.before_attention and layer == 0:
            passed = [*range(self.evidence.start, self.evidence.stop), self.constant]
        elif module == self.widening.before_attention:
            passed = list(range(self.inputs.start, self.inputs.stop))
        return tuple((0, column, self.norm_scale) for column in passed)

    def _entries(self, part: str) -> tuple[Entry, ...]:
        """Of the heads that average, in the first layer."""
        size, count, query = self.head_dim, self.experts * len(self.decays), self.first_kv_head * self.group
        if part == "v":
            first = self.first_kv_head * size
            return tuple((first + number, self.evidence.start + number, 1.0) for number in range(count))
        if part == "o":
            places = ((number, number // self.experts) for number in range(count))
            written = _AVERAGED if self.front else 1.0
            return tuple(
                (self.context.start + number, (query + head) * size + number, written / self.residual_scale)
                for number, head in places
            )
        if self._reference is None:  # queries and keys of zero: the mean
            return ()
        if part == "k":
            return self._rotated(self.first_kv_head, [self._scores(self._reference)])
        return self._rotated(query, [self._scores(tau, self._reference) for tau in map(time_constant, self.decays)])

    @property
    def _reference(self) -> float | None:
        """The time constant that the key is made for; queries make others of it."""
        return next((tau for tau in map(time_constant, self.decays) if tau is not None), None)

    def _scores(self, tau: float | None, reference: float | None = None) -> list[float]:
        """One side of the products c_i, sum_i c_i cos(theta_i d) = const - d / tau: of a query for `reference`'s key, or of
        that key.
        """
        if tau is None:
            return [0.0] * len(self.turns)
        spacing = math.log(self.turns[0] / self.turns[1])
        products = (2 / math.pi * spacing / turn / self.score_scale if 1 / turn <= _FARTHEST else 0.0 for turn in self.turns)
        return [math.sqrt(each / (reference or tau)) * ((reference or tau) / tau) for each in products]

    def _rotated(self, first_head: int, heads: list[list[float]]) -> tuple[Entry, ...]:
        """Rows of the new heads that read the constant: a number for each pair, in its first place."""
        rows = range(0, self.head_dim, 2) if self.widening.interleaved else range(self.head_dim // 2)
        return tuple(
            ((first_head + head) * self.head_dim + row, self.constant, value / (self.eps * CONSTANT))
            for head, values in enumerate(heads)
            for row, value in zip(rows, values, strict=True)
            if value
        )


def time_constant(decay: float) -> float | None:
    """Tokens after which a token counts 1/e; None when it never fades."""
    return None if decay == 1.0 else -1.0 / math.log(decay)
