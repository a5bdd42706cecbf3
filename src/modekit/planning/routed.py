"""N fine-tunes of one mixture with M experts in one plain mixture of its family: N M experts, and the base's own top k.

The n-th fine-tune's e-th expert is number n M + e. Its gate is the fine-tune's own less a penalty (penalties.py), so that all
that is chosen for a token comes from one fine-tune, and is what that would choose, with its weights. Routed parameters are N
times the base's; those that are active stay.

Shape legend: D hidden size, P channels besides, F hidden units, E experts of the recipe (N), M experts of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from modekit.errors import UnsupportedError
from modekit.files.figures import bytes_of
from modekit.files.typed import shortened
from modekit.planning.carry import CarrySize, reaches
from modekit.planning.mixture_config import Routing
from modekit.planning.native import NativeForm, widened
from modekit.planning.native_shape import NativeShape
from modekit.planning.penalties import gate_pad, pairs
from modekit.planning.shape import Parameters, RouterSlot, Tensors, other_record
from modekit.planning.tensors import CodeOf, PlannedTensor
from modekit.recipes.recipe import Recipe
from modekit.sources.adapter import AdapterSource
from modekit.sources.config import Config, whole
from modekit.sources.header import ITEMSIZE, TensorRef
from modekit.sources.names import in_layer
from modekit.sources.native import Native, Routed
from modekit.sources.rows import member_of, rows_of
from modekit.sources.source import ModelSource
from modekit.weights.made import Copy, Fold, Join, Made, Zeros, as_in
from modekit.weights.padding import FFNKind, Pad

_MODEKIT = "output: {format: modekit}"
_MOST = 2**15  # a base's own experts; names of all are made
_NOT_ONE = "a plain checkpoint carries no attention here: a token's experts' weights do not sum to one (norm_topk_prob: false)"


@dataclass(frozen=True)
class RoutedShape(NativeShape):
    """A mixture of fine-tunes of a mixture. Nothing of its routers is fitted but the evidence in the embedding."""

    @property
    def slots(self) -> tuple[RouterSlot, ...]:
        """None that is fitted: gates are the fine-tunes' own."""
        return ()

    @classmethod
    def _check_counts(cls, config: Config, recipe: Recipe, where: str, native: Native, dense: Config) -> None:
        count = _routed(native).count(dense)
        expected = {native.num_experts_key: len(recipe.experts) * count, native.top_k_key: dense.get(native.top_k_key)}
        for key, number in expected.items():
            if config.get(key) != number or not 1 <= count <= _MOST:
                raise other_record(f"{where}: {key}", shortened(repr(config.get(key))), number)

    @property
    def inner(self) -> int:
        """M."""
        assert self.channels is not None
        return self.channels.inner

    @property
    def routing(self) -> Routing:
        """Of the recipe's experts one."""
        return super().routing.model_copy(update={"top_k": 1})

    def rerouted(self, recipe: Recipe, tensors: Tensors) -> RoutedShape:
        """The evidence decides, and no setting of config.json."""
        return self

    def refusals(self, recipe: Recipe) -> list[str]:
        """Settings of a recipe's mixture that this form cannot say."""
        return [*super().refusals(recipe), *_beyond(recipe)]

    def parameters(self, sizes: Mapping[str, int], dense: int) -> Parameters:
        """Active are top k experts of each layer, as in the base."""
        count = self.experts * self.inner
        one = self._one_expert(sizes)
        total = sum(sizes.values())
        chosen = whole(self.config, self.native.top_k_key)
        channels = self.channels
        assert channels is not None
        idle = 3 * channels.hidden * channels.expert_hidden * channels.layers * (self.inner - chosen)
        return Parameters(total, one * self.inner, total - one * (count - chosen), dense, idle)


class RoutedForm(NativeForm):
    """The tensors of one recipe's result. Raises UnsupportedError where it is not of this form."""

    kind = RoutedShape

    def __init__(self, recipe: Recipe, sources: tuple[ModelSource, ...], native: Native, code_of: CodeOf) -> None:
        self._routed = _routed(native)
        if beyond := _beyond(recipe):
            raise UnsupportedError(
                f"a plain {native.native_type} of fine-tunes of one cannot say {', '.join(beyond)}",
                where="mixture",
                remedy=f"leave it out, or write {_MODEKIT}",
            )
        if recipe.mixture.top_k is None:
            recipe = recipe.model_copy(update={"mixture": recipe.mixture.model_copy(update={"top_k": 1})})
        super().__init__(recipe, sources, native, code_of)
        units = pairs(len(recipe.experts))
        if units > self._sizes[0]:
            raise UnsupportedError(
                f"experts of {self._sizes[0]} hidden units have no room for {units}, which so many fine-tunes need",
                where="experts",
                found=len(recipe.experts),
                remedy=f"name fewer, or write {_MODEKIT}",
            )

    def _carried_size(self) -> CarrySize | None:
        """Nothing where the weights of the chosen do not sum to one. Raises UnsupportedError where that is asked for."""
        if self._routed.sums_to_one(self._dense):
            return super()._carried_size()
        adapters = (each for each in self._sources[1:] if isinstance(each, AdapterSource))
        asked = self._recipe.output.carry
        more = any(reaches(each, self._base, self._family) for each in adapters)
        if asked == "all" or (asked is None and more):
            raise UnsupportedError(_NOT_ONE, where="output.carry", remedy=f"write output: {{carry: ffn}}, or {_MODEKIT}")
        return None

    def notes(self) -> Iterable[str]:
        """What a user should know of this form: what it costs, and what it loses."""
        yield from super().notes()
        base = self._base
        top_k = whole(self._dense, self._native.top_k_key)
        refs = [base.tensor(in_layer(layer, path)) for layer in range(self._layers) for path in self._routed.own[:2]]
        size = bytes_of(sum(ref.numel * ITEMSIZE[self.code_of(ref)] for ref in refs))
        active = base.parameters - sum(ref.numel for ref in refs) // self._inner * (self._inner - top_k)
        yield (
            f"{len(self._recipe.experts)} x {self._inner} experts in every layer, {size} for each fine-tune; a token "
            f"has {top_k} of them, as in the base, of which {active:,} parameters are active"
        )
        if not self._routed.sums_to_one(self._dense):
            yield f"{_NOT_ONE}, and what fine-tunes change besides experts and gates is lost"
        if self._routed.shared_down:
            yield "the expert that all tokens have (shared_expert) is the backbone's: what fine-tunes change of it is lost"

    def _with_channels(self, tensor: PlannedTensor) -> PlannedTensor:
        assert self._channels is not None
        if tensor.name.endswith(f".{self._routed.shared_down}") and self._routed.shared_down:
            return widened(tensor, Pad(rows=self._channels.spare))
        return super()._with_channels(tensor)

    def experts(self) -> Iterator[PlannedTensor]:
        """All of them, and their gates."""
        assert self._channels is not None
        yield from super().experts()
        for layer in range(self._layers + 1):
            ref = self._base.tensor(in_layer(max(0, layer - 1), self._routed.gate))
            shape = (len(self._recipe.experts), *ref.shape)
            count = len(self._recipe.experts)
            given = Join(tuple(as_in(source, ref) for source in self._sources[1:]), experts=tuple(range(count)))
            made: Made = given if layer else Zeros(shape)
            name = in_layer(layer, self._native.router)
            gates = widened(PlannedTensor(name, self.router_dtype, shape, "expert", made), gate_pad(self._channels, layer))
            yield replace(gates, shape=(count * self._inner, gates.shape[-1]))

    def _in_base(self, layer: int, part: str) -> TensorRef:
        return _cut(self._base.tensor(in_layer(layer, self._routed.path(part))), 0, part)

    def _of(self, source: ModelSource, layer: int, part: FFNKind) -> Sequence[Made]:
        given = as_in(source, self._base.tensor(in_layer(layer, self._routed.path(part))))
        return [own_part(given, part, number) for number in range(self._inner)]


def own_part(given: Copy | Fold, part: FFNKind, number: int) -> Made:
    """Gate, up or down of one of a fine-tune's own experts, of what it has of the tensor that holds it."""
    half = given.shape[1] // 2
    ref = _cut(given.ref, number, part)
    rows = {"gate": (0, half), "up": (half, 2 * half)}.get(part)
    return Fold(ref, replace(given.change, member=number, rows=rows)) if isinstance(given, Fold) else Copy(ref)


def _cut(ref: TensorRef, number: int, part: str) -> TensorRef:
    """Gate, up (F, D) or down (D, F) of one of a mixture's own experts, which its class keeps as (M, 2 F, D) and (M, D, F)."""
    one = member_of(ref, number)
    half = one.shape[0] // 2
    return one if part == "down" else rows_of(one, 0, half) if part == "gate" else rows_of(one, half, 2 * half)


def _routed(native: Native) -> Routed:
    assert native.routed is not None
    return native.routed


def _beyond(recipe: Recipe) -> list[str]:
    """What of a recipe this form cannot say."""
    mixture = recipe.mixture
    found = [] if mixture.is_carried else ["a router other than fit: lexical"]
    return found + [f"top_k: {mixture.top_k}"] * (mixture.top_k not in (None, 1)) + ["weights"] * (mixture.weights is not None)
