"""Channels besides the base's: how a lexical router is carried inside a plain native checkpoint.

Of P channels behind the base's D, J E carry what a token says of its domain (its row of the table, written into the
embedding), one a constant, and J E what one more attention head, in the first layer, makes of the former: their average over
the text so far. The gates of all layers read the latter. docs/lexical.md has the mathematics, and why the rest of the model
computes what it did.

    embedding    [e, eps r W_x, 0, eps r c]     r = sqrt(mean(e^2) + norm eps), by which the first norm divides
    norms        w sqrt(D / (D + P)), norm eps times D / (D + P); the last norm is zero on the channels
    first layer  a key-value head and its group of query heads: values read eps W_x, outputs are written beside it; queries
                 and keys read the constant, and score the distance of two tokens (recency) or nothing (the mean)
    elsewhere    zeros

Shape legend: D hidden size, P channels, E experts, J averages, H head size, G query heads per key-value head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from modekit.errors import UnsupportedError
from modekit.planning.pieces import Entry, MeasuredColumn, Pad
from modekit.recipes.recipe import Recipe
from modekit.sources.family import Config, Family, number, whole
from modekit.sources.names import EMBEDDING, HEAD, split_layer, weight_of
from modekit.sources.native import choose_native
from modekit.sources.native_row import Native, Widening
from modekit.sources.rotary import turns_per_token

_EPS = 2.0**-12
"""Size of the evidence beside a stream of size 1: its square is what the norms see of it."""
_EPS_BEFORE_NORM = 2.0**-20
"""Where what attention adds is normed by itself, and may be much smaller than the stream."""
CONSTANT = 4.0
"""Of the constant channel, beside evidence of about that size: quantised together, neither is lost."""
_STEP = 64
_FARTHEST = 3_000.0  # tokens per radian of the slowest pair that scores a distance; slower ones would need too large numbers
_LEAST_DECAY = 0.9  # of recency: a head whose scores fall faster is no good average of a text


@dataclass(frozen=True)
class Channels:
    """Where everything lies, for one base and one recipe.

    Attributes:
        hidden, heads, kv_heads, head_dim: of the base: D, its heads, H.
        spare: P.
        experts: E.
        decays: of the averages, J.
        widening: of the architecture.
        norm_eps: of the base's norms.
        score_scale, embedding_scale, residual_scale: by which the family multiplies scores, embeddings, what layers add.
        turns: of the rotary embedding, where evidence fades.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    spare: int
    experts: int
    decays: tuple[float, ...]
    widening: Widening
    norm_eps: float
    score_scale: float
    embedding_scale: float
    residual_scale: float
    turns: tuple[float, ...]

    @property
    def group(self) -> int:
        """G."""
        return self.heads // self.kv_heads

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
        """The channel that is the same for all tokens: the last one."""
        return self.hidden + self.spare - 1

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
            "num_attention_heads": self.heads + self.group,
            "num_key_value_heads": self.kv_heads + 1,
            "rms_norm_eps": self.norm_eps * self.hidden / (self.hidden + self.spare),
        }
        if not self.widening.whole_heads or wide.get("head_dim") is not None:
            wide["head_dim"] = self.head_dim
        return wide

    def pad_of(self, name: str, shape: tuple[int, ...], family: Family) -> Pad | None:
        """How a tensor of the base is widened; None when it stays as it is."""
        layer, path = split_layer(name)
        if not isinstance(layer, int):
            if name == weight_of(EMBEDDING):
                return Pad(columns=self.spare, measured=self.row_scale, free=self.evidence)
            return Pad(columns=self.spare, scale=1.0 if name == weight_of(HEAD) else self.norm_scale)
        module, _, leaf = path.rpartition(".")
        if module in self.widening.norms:
            return Pad(columns=self.spare, scale=self.norm_scale, entries=self._norm_entries(layer, module))
        if module in self.widening.over_heads:
            added = self.group if module == self.widening.over_heads[0] else 1
            return Pad(columns=added * self.head_dim, scale=self.norm_scale)
        part = next((part for part in ("q", "k", "v", "o") if family.parts[part] == module), None)
        if part is None:
            return Pad(columns=self.spare) if shape[-1:] == (self.hidden,) else None
        added = {"q": self.group * self.head_dim, "k": self.head_dim, "v": self.head_dim, "o": self.spare}[part]
        if leaf == "bias":
            return Pad(columns=added)
        columns = self.group * self.head_dim if part == "o" else self.spare
        return Pad(added, columns, entries=self._entries(part) if layer == 0 else ())

    def expert_pad(self, part: str) -> Pad:
        """How the FFN's gate, up (F, D) or down (D, F) is widened."""
        return Pad(rows=self.spare) if part == "down" else Pad(columns=self.spare)

    def notes(self, recipe: Recipe) -> Iterable[str]:
        """What a user should know of them."""
        share = self.spare / self.hidden
        yield (
            f"the {recipe.mixture.router.fit} router adds {self.spare} channels to the base's {self.hidden} "
            f"({share:.1%}) and one key-value head to its {self.kv_heads}; the rest computes the same"
        )
        if recipe.mixture.router.decay is None and self.decays == (1.0,):
            yield "its evidence does not fade: this architecture averages over all of the text so far"

    def _norm_entries(self, layer: int, module: str) -> tuple[Entry, ...]:
        """What norms let through of the channels: evidence to the first attention, averages to every router."""
        passed: list[int] = []
        if module == self.widening.after_attention:
            passed = list(range(self.context.start, self.context.stop))
        elif module == self.widening.before_attention and layer == 0:
            passed = [*range(self.evidence.start, self.evidence.stop), self.constant]
        return tuple((0, column, self.norm_scale) for column in passed)

    def _entries(self, part: str) -> tuple[Entry, ...]:
        """Of the new heads in the first layer."""
        size, count = self.head_dim, self.experts * len(self.decays)
        if part == "v":
            first = self.kv_heads * size
            return tuple((first + number, self.evidence.start + number, 1.0) for number in range(count))
        if part == "o":
            places = ((number, number // self.experts) for number in range(count))
            return tuple(
                (self.context.start + number, (self.heads + head) * size + number, 1.0 / self.residual_scale)
                for number, head in places
            )
        if self._reference is None:  # queries and keys of zero: the mean
            return ()
        if part == "k":
            return self._rotated(self.kv_heads, [self._scores(self._reference)])
        return self._rotated(self.heads, [self._scores(tau, self._reference) for tau in map(time_constant, self.decays)])

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


def channels_of(recipe: Recipe, native: Native, dense: Config) -> Channels | None:
    """The channels of a recipe over a dense config with every default written out; None when its router needs none.

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
    return _channels(recipe, native, native.widening, dense)


def _channels(recipe: Recipe, native: Native, widening: Widening, dense: Config) -> Channels:
    size, heads = whole(dense, "head_dim"), whole(dense, "num_attention_heads")
    group, experts = heads // whole(dense, "num_key_value_heads"), len(recipe.experts)
    decays, turns = _decays(recipe, native, dense)
    _check_room(experts, decays, group, size)
    return Channels(
        whole(dense, "hidden_size"),
        heads,
        whole(dense, "num_key_value_heads"),
        size,
        _spare(recipe, widening, 2 * len(decays) * experts + 1, group * size),
        experts,
        decays,
        widening,
        number(dense, "rms_norm_eps"),
        number(dense, "attention_multiplier", size**-0.5),
        number(dense, "embedding_multiplier", 1.0),
        number(dense, "residual_multiplier", 1.0),
        turns,
    )


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


def _spare(recipe: Recipe, widening: Widening, needed: int, of_heads: int) -> int:
    """P."""
    asked = recipe.output.channels
    if widening.whole_heads:
        if needed > of_heads or asked not in (None, of_heads):
            raise UnsupportedError(
                "this architecture takes as many channels as its new heads are wide",
                where="output.channels",
                found=asked or f"{needed} needed",
                expected=of_heads,
                remedy="leave output.channels out, or mix fewer experts",
            )
        return of_heads
    if asked is not None and asked < needed:
        raise UnsupportedError(
            "too few channels for the evidence of so many experts",
            where="output.channels",
            found=asked,
            expected=f"at least {needed}",
            remedy="leave it out, or raise it",
        )
    return asked or -(-needed // _STEP) * _STEP
