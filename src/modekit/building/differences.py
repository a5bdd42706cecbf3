"""By what experts differ from the backbone outside of their FFNs, read tensor by tensor.

Shape legend: O outputs, I inputs of a linear layer, R rank, D hidden size, X anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from modekit.planning.plan import Plan
from modekit.planning.tensors import PlannedTensor, as_in, low_rank, touched
from modekit.sources.adapter import AdapterSource
from modekit.sources.header import TensorRef
from modekit.sources.names import EMBEDDING, FINAL_NORM, HEAD, in_layer, split_layer, weight_of
from modekit.weights.made import Copy, Made
from modekit.weights.numeric import as_array, to_float32
from modekit.weights.reading import WeightReader
from modekit.weights.stored import FlatArray, read_float32

Singles = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """A matrix M (O, I): whole, or B A of (O, R) and (R, I)."""

    left: Singles
    right: Singles | None = None

    def times(self, columns_IX: Singles) -> Singles:
        """M columns, (O, X)."""
        if self.right is not None:
            columns_IX = self.right @ columns_IX
        return np.asarray(self.left @ columns_IX)

    def under(self, rows_XO: Singles) -> Singles:
        """Rows M, (X, I)."""
        product: Singles = rows_XO @ self.left
        if self.right is not None:
            product = product @ self.right
        return product


class Differences:
    """Of the experts of a plan."""

    def __init__(self, plan: Plan, read: WeightReader) -> None:
        self._plan, self._read = plan, read
        self._base = plan.sources[0]
        channels = plan.shape.channels
        assert channels is not None
        self._widening = channels.widening
        self._head = EMBEDDING if plan.family.is_tied(self._base) else HEAD
        self._whole: dict[str, Singles] = {}
        self._finite: set[TensorRef] = set()
        shards = plan.shards if plan.reused is None else plan.reused.otherwise
        self._made = {tensor.name: tensor for shard in shards for tensor in shard.tensors if tensor.role == "backbone"}

    @property
    def experts(self) -> range:
        """Their numbers."""
        return range(self._plan.experts)

    @property
    def layers(self) -> int:
        """Of the base."""
        return self._plan.layers - 1

    def attention(self, layer: int, expert: int, ones_D: Singles | None = None) -> tuple[Difference | None, ...]:
        """Of q, k and v of a layer of the base, over a stream x of size 1: the norm's weight is in it.

        With `ones`, w x ~ 1, biases are in it, too, but for the first layer, where `constants` are exact.
        """
        weights_D, own_D = self._vectors(in_layer(layer, f"{self._widening.before_attention}.weight"), expert)
        found: list[Difference | None] = []
        for name in self._projections(layer):
            plain = self.of(name, expert)
            if not np.array_equal(weights_D, own_D):
                found.append(Difference(self.own(name, expert) * own_D - self.shared(name) * weights_D))
            else:
                found.append(None if plain is None else _scaled(plain, weights_D))
        if ones_D is None or layer == 0:
            return tuple(found)
        biases = self.constants(layer, expert)
        return tuple(_added(plain, bias, ones_D) for plain, bias in zip(found, biases, strict=True))

    def constants(self, layer: int, expert: int) -> tuple[Difference | None, ...]:
        """Biases of q, k and v of a layer of the base, (O, 1)."""
        return tuple(self._bias(name.removesuffix("weight") + "bias", expert) for name in self._projections(layer))

    def _bias(self, name: str, expert: int) -> Difference | None:
        found = self.of(name, expert) if name in self._base.tensors else None
        return None if found is None else Difference(found.left[:, None])

    def shared_attention(self, layer: int) -> tuple[Singles, ...]:
        """q, k and v of the backbone over a stream of size 1."""
        weights_D = self.shared(in_layer(layer, f"{self._widening.before_attention}.weight"))
        return tuple(self.shared(name) * weights_D for name in self._projections(layer))

    def attention_rows(self, layer: int) -> list[int]:
        """Outputs of q, k and v."""
        return [self._base.tensor(name).shape[0] for name in self._projections(layer)]

    def _projections(self, layer: int) -> list[str]:
        return [in_layer(layer, f"{self._plan.family.parts[part]}.weight") for part in ("q", "k", "v")]

    def output(self, layer: int, expert: int) -> Difference | None:
        """Of o of a layer of the base."""
        return self.of(in_layer(layer, f"{self._plan.family.parts['o']}.weight"), expert)

    def ffn_norm(self, layer: int, expert: int) -> tuple[Singles, Singles]:
        """Weights (D,) of the norm before the FFN of a layer of the base: the shared ones, and the expert's."""
        return self._vectors(in_layer(layer, f"{self._widening.after_attention}.weight"), expert)

    def head_rows(self, expert: int, rows: slice) -> Singles:
        """Rows of the head's difference over a stream of size 1, (rows, D)."""
        weights_D, own_D = self._vectors(weight_of(FINAL_NORM), expert)
        return self._own_rows(self._head, expert, rows) * own_D - self._shared_rows(self._head, rows) * weights_D

    def embedding_rows(self, expert: int, rows: slice) -> Singles:
        """Rows of the embedding's difference, (rows, D)."""
        return self._own_rows(EMBEDDING, expert, rows) - self._shared_rows(EMBEDDING, rows)

    def of(self, name: str, expert: int) -> Difference | None:
        """Of a weight of the base; None where there is none."""
        source = self._plan.sources[1 + expert]
        plain = self._is_plain(name)
        if plain and (source is self._base or not touched(source, name)):
            return None
        change = low_rank(source, name)
        if plain and change is not None and isinstance(source, AdapterSource):
            rows = slice(*(change.rows or (0, change.b.shape[0])))
            return Difference(self._stored(change.b)[rows] * np.float32(change.scale), self._stored(change.a))
        return Difference(self.own(name, expert) - self.shared(name))

    def _stored(self, ref: TensorRef) -> Singles:
        self._read.check_all_finite([ref])
        return read_float32(self._read.opened, ref)

    def own(self, name: str, expert: int) -> Singles:
        """A tensor of the base as an expert has it."""
        ref = self._base.tensor(name)
        return to_float32(self._values(as_in(self._plan.sources[1 + expert], ref))[:]).reshape(ref.shape)

    def _values(self, made: Made) -> FlatArray:
        self._read.check_all_finite([ref for ref in made.refs if ref not in self._finite])
        self._finite.update(made.refs)
        return made.numbers(self._read)

    def shared(self, name: str) -> Singles:
        """A tensor of the base as the backbone has it."""
        tensor = self._backbone(name)
        parts = [to_float32(as_array(block, tensor.dtype)) for block in tensor.blocks(self._read)]
        return np.concatenate(parts).reshape(tensor.shape)

    def _backbone(self, name: str) -> PlannedTensor:
        """Without channels and the scales that they need."""
        layer, path = split_layer(name)
        made = self._made[in_layer(layer + 1, path) if isinstance(layer, int) else name]
        return replace(made, made=made.inner, shape=self._base.tensor(name).shape)

    def _is_plain(self, name: str) -> bool:
        """Whether the backbone has the base's tensor itself."""
        return self._backbone(name).made == Copy(self._base.tensor(name))

    def _vectors(self, name: str, expert: int) -> tuple[Singles, Singles]:
        return self.shared(name), self.own(name, expert)

    def _own_rows(self, module: str, expert: int, rows: slice) -> Singles:
        ref = self._base.tensor(weight_of(module))
        return _rows(self._values(as_in(self._plan.sources[1 + expert], ref)), ref.shape[1], rows)

    def _shared_rows(self, module: str, rows: slice) -> Singles:
        name = weight_of(module)
        if self._is_plain(name):
            ref = self._base.tensor(name)
            return _rows(self._values(Copy(ref)), ref.shape[1], rows)
        if name not in self._whole:
            self._whole[name] = self.shared(name)
        return self._whole[name][rows]


def _rows(flat: FlatArray, width: int, rows: slice) -> Singles:
    return to_float32(flat[rows.start * width : rows.stop * width]).reshape(-1, width)


def _added(plain: Difference | None, bias: Difference | None, ones_D: Singles) -> Difference | None:
    """A map and a bias as one map of a stream x with w x ~ 1."""
    if plain is None or bias is None:
        return plain if bias is None else Difference(bias.left, ones_D[None, :])
    if plain.right is None:
        return Difference(plain.left + bias.left * ones_D)
    return Difference(np.concatenate([plain.left, bias.left], axis=1), np.concatenate([plain.right, ones_D[None, :]]))


def _scaled(difference: Difference, weights_D: Singles) -> Difference:
    if difference.right is None:
        return Difference(difference.left * weights_D)
    return Difference(difference.left, difference.right * weights_D)
