"""By what experts differ from the backbone outside of their FFNs, read tensor by tensor, and how much of every difference goes
through which channel, by a text's stream: what a build keeps as carried.safetensors.

Shape legend: O outputs, I inputs of a linear layer, R rank, D hidden size, X anything, N outputs of q, k and v together,
T sampled tokens, V vocabulary, R_U and R_V channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from modekit.checkpoint.carried import Carried
from modekit.planning.carry import SAMPLE_TOKENS, CarrySize
from modekit.planning.changes import low_rank, touched
from modekit.planning.plan import Plan
from modekit.planning.routed import own_part
from modekit.planning.tensors import PlannedTensor
from modekit.run import Run
from modekit.sources.adapter import AdapterSource
from modekit.sources.header import TensorRef
from modekit.sources.names import EMBEDDING, FINAL_NORM, HEAD, in_layer, split_layer, weight_of
from modekit.weights.bases import ROWS, LayerStream, Stream, fit_pass_through, input_duals, output_basis, row_basis, signed
from modekit.weights.flat import read_float32
from modekit.weights.made import Copy, Made, as_in
from modekit.weights.nearest import OwnReads, nearest_duals
from modekit.weights.numeric import Singles, as_array, blocks, rounded, to_float32
from modekit.weights.padding import FFNKind
from modekit.weights.reading import WeightReader

_STILL = 2.0**-5
"""Of the smallest stream: the channel that is the same everywhere, which all norms see."""
_HEAD_TOKENS = 256
_HEAD_COLUMNS = 2_048
"""Of all experts together: their Gram matrix is bounded, however many they are."""
_SMALL = 2.0**-6


@dataclass(frozen=True)
class Difference:
    """A matrix M (O, I): whole, or B A of (O, R) and (R, I)."""

    left: Singles
    right: Singles | None = None

    def times(self, columns_IX: Singles) -> Singles:
        """M columns, (O, X)."""
        return np.asarray(self.left @ (columns_IX if self.right is None else self.right @ columns_IX))

    def under(self, rows_XO: Singles) -> Singles:
        """Rows M, (X, I)."""
        product: Singles = rows_XO @ self.left
        return product if self.right is None else product @ self.right

    def scaled(self, weights_I: Singles) -> Difference:
        """With weights before its inputs."""
        if self.right is None:
            return Difference(self.left * weights_I)
        return Difference(self.left, self.right * weights_I)


class Differences:
    """Of the experts of a plan."""

    def __init__(self, plan: Plan, read: WeightReader, reads: OwnReads | None = None) -> None:
        self._plan, self._read, self._reads = plan, read, reads
        self._base = plan.sources[0]
        channels = plan.shape.channels
        assert channels is not None
        self._widening, self._inner, self._routed = channels.widening, channels.inner, plan.shape.routed
        self._stored = {weight_of(HEAD): weight_of(EMBEDDING)} if plan.family.is_tied(self._base) else {}
        self._whole: dict[str, Singles] = {}
        self._finite: set[TensorRef] = set()
        shards = plan.shards if plan.reused is None else plan.reused.otherwise
        self._made = {tensor.name: tensor for shard in shards for tensor in shard.tensors if tensor.role == "backbone"}
        self._group, self._sample = lru_cache(maxsize=4)(self._beyond), lru_cache(maxsize=2)(self._read_sample)
        self.experts, self.layers = range(plan.shape.experts), len(plan.family.layers(plan.config)) - 1

    def attention(self, layer: int, expert: int) -> tuple[Difference | None, ...]:
        """Of q, k and v of a layer of the base, over a stream of size 1: the norm's weight is in it."""
        norm = self.attention_norm(layer)
        weights_D, own_D = self.shared(norm), self.own(norm, expert)
        names = self.projections(layer)
        if not np.array_equal(weights_D, own_D):
            return tuple(Difference(self.own(name, expert) * own_D - self.shared(name) * weights_D) for name in names)
        changes = (self.of(name, expert) for name in names)
        return tuple(change and change.scaled(weights_D) for change in changes)

    def attention_rows(self, layer: int) -> list[int]:
        """Outputs of q, k and v."""
        return [self._base.tensor(name).shape[0] for name in self.projections(layer)]

    def attention_norm(self, layer: int) -> str:
        """What the weights of the norm before q, k and v are called."""
        return in_layer(layer, weight_of(str(self._widening.before_attention)))

    def projections(self, layer: int) -> list[str]:
        """What q, k and v are called."""
        return [in_layer(layer, f"{self._plan.family.decoder.parts[part]}.weight") for part in ("q", "k", "v")]

    def output_projection(self, layer: int) -> str:
        """What o is called."""
        return in_layer(layer, weight_of(self._plan.family.decoder.parts["o"]))

    def ffn_norm_name(self, layer: int) -> str:
        """What the weights of the norm before the FFN are called."""
        return in_layer(layer, weight_of(self._widening.after_attention))

    def head_rows(self, expert: int, rows: slice) -> Singles:
        """Rows of the head's difference over a stream of size 1, (rows, D)."""
        norm = weight_of(FINAL_NORM)
        weights_D, own_D = self.shared(norm), self.own(norm, expert)
        return self.own(weight_of(HEAD), expert, rows) * own_D - self._shared_rows(weight_of(HEAD), rows) * weights_D

    def embedding_rows(self, expert: int, rows: slice) -> Singles:
        """Rows of the embedding's difference, (rows, D)."""
        name = weight_of(EMBEDDING)
        return self.own(name, expert, rows) - self._shared_rows(name, rows)

    def changing(self, *names: str) -> list[int]:
        """Experts that have one of these tensors otherwise than the backbone, or may have."""
        return [expert for expert in self.experts if any(self._may_differ(name, expert) for name in names)]

    def _may_differ(self, name: str, expert: int) -> bool:
        source = self._plan.sources[1 + expert]
        return not self._is_plain(name) or (source is not self._base and touched(source, self._stored.get(name, name)))

    def of(self, name: str, expert: int) -> Difference | None:
        """Of a weight of the base; None where there is none."""
        if not self._may_differ(name, expert):
            return None
        source, plain = self._plan.sources[1 + expert], self._is_plain(name)
        change = low_rank(source, name)
        if plain and change is not None and isinstance(source, AdapterSource):
            self._read.check_all_finite([change.a, change.b])
            b, a = (read_float32(self._read.opened, ref) for ref in (change.b, change.a))
            return Difference(b * np.float32(change.scale), a)
        return Difference(self.own(name, expert) - self.shared(name))

    def ffn(self, kind: FFNKind, layer: int, number: int) -> Singles:
        """Gate, up or down of the expert with this number, of all that experts have of their own in a layer of the base."""
        if self._routed is None:
            return self.own(in_layer(layer, self._plan.family.decoder.mlp[kind]), number)
        expert, inner = divmod(number, self._inner)
        given = as_in(self._plan.sources[1 + expert], self._base.tensor(in_layer(layer, self._routed.path(kind))))
        return self._numbers(own_part(given, kind, inner), None)

    def gates(self, layer: int, expert: int) -> Singles:
        """Of an expert that is a mixture itself, (M, D)."""
        assert self._routed is not None
        return self.own(in_layer(layer, self._routed.gate), expert)

    def own(self, name: str, expert: int, rows: slice | None = None) -> Singles:
        """A tensor of the base, or some of its rows, as an expert has it. A tied head is its embedding."""
        return self._numbers(as_in(self._plan.sources[1 + expert], self._of_base(name)), rows)

    def _of_base(self, name: str) -> TensorRef:
        return self._base.tensor(self._stored.get(name, name))

    def _numbers(self, made: Made, rows: slice | None) -> Singles:
        self._read.check_all_finite([ref for ref in made.refs if ref not in self._finite])
        self._finite.update(made.refs)
        flat, shape = made.numbers(self._read), made.shape
        if rows is None:
            return to_float32(flat[:]).reshape(shape)
        return to_float32(flat[rows.start * shape[1] : rows.stop * shape[1]]).reshape(-1, shape[1])

    def shared(self, name: str) -> Singles:
        """A tensor of the base as the backbone has it."""
        tensor = self._backbone(name)
        if self._reads is not None and _is_brought_nearer(self._planned(name)):
            rows = slice(0, tensor.shape[0])
            nearest = self._average(name, rows) + self.beyond_average(name, rows)
            return rounded(nearest, tensor.dtype)
        parts = [to_float32(as_array(block, tensor.dtype)) for block in tensor.blocks(self._read)]
        return np.concatenate(parts).reshape(tensor.shape)

    def _average(self, name: str, rows: slice) -> Singles:
        return self._numbers(self._backbone(name).made, rows)

    def beyond_average(self, name: str, rows: slice) -> Singles:
        """What rows of a matrix that all share have besides the experts' average, (rows, I): what brings it nearest to each
        expert's on what that one reads (weights/nearest.py). The same whatever rows are asked for.
        """
        first = rows.start // ROWS
        groups = [self._group(name, number) for number in range(first, -(-rows.stop // ROWS))]
        return np.concatenate(groups)[rows.start - first * ROWS : rows.stop - first * ROWS]

    def _beyond(self, name: str, group: int) -> Singles:
        assert self._reads is not None
        rows = slice(group * ROWS, min(self._of_base(name).shape[0], (group + 1) * ROWS))
        average = self._average(name, rows)
        norm, inputs_TI, duals_TI, parts = self._sample(name)
        found = np.zeros_like(average)
        for expert, part in enumerate(parts):
            reads_TI = inputs_TI[part]
            shared, own = (1.0, 1.0) if norm is None else (self.shared(norm), self.own(norm, expert))
            its = self.own(name, expert, rows) @ (reads_TI * own).T
            found += (its - average @ (reads_TI * shared).T) @ duals_TI[part]
        return found

    def _read_sample(self, name: str) -> tuple[str | None, Singles, Singles, list[slice]]:
        """Of a matrix: the norm before it; what is read there, without that norm's weights, (T, I); S (T, I); which rows are of
        which expert. Raises ValueError where they are no sample of it.
        """
        assert self._reads is not None
        layer, _ = split_layer(name)
        norm: str | None = weight_of(FINAL_NORM)
        inputs_TI = self._reads.last
        if isinstance(layer, int):
            is_output = name == self.output_projection(layer)
            norm = None if is_output else self.attention_norm(layer)
            inputs_TI = (self._reads.attended if is_output else self._reads.read)[layer]
        rows, rest = divmod(len(inputs_TI), len(self.experts))
        too_many = rows > max(1, SAMPLE_TOKENS // len(self.experts))
        if rest or too_many or not rows or inputs_TI.shape[1:] != self._of_base(name).shape[1:]:
            raise ValueError(f"rows of {inputs_TI.shape} are no sample of what {name} reads")
        parts = [slice(expert * rows, (expert + 1) * rows) for expert in self.experts]
        return norm, inputs_TI, nearest_duals(inputs_TI if norm is None else inputs_TI * self.shared(norm)), parts

    def _backbone(self, name: str) -> PlannedTensor:
        """Without channels and the scales that they need."""
        made = self._planned(name)
        return replace(made, made=made.inner, shape=self._of_base(name).shape)

    def _planned(self, name: str) -> PlannedTensor:
        """As the result has it."""
        layer, path = split_layer(name)
        return self._made[in_layer(layer + 1, path) if isinstance(layer, int) else name]

    def _is_plain(self, name: str) -> bool:
        """Whether the backbone has the base's tensor itself."""
        return self._backbone(name).made == Copy(self._of_base(name))

    def _shared_rows(self, name: str, rows: slice) -> Singles:
        if self._is_plain(name):
            return self._numbers(Copy(self._of_base(name)), rows)
        if name not in self._whole:
            self._whole[name] = self.shared(name)
        return self._whole[name][rows]


def _is_brought_nearer(tensor: PlannedTensor) -> bool:
    """Whether experts' differences from a matrix that all share are carried; embeddings gain nothing by it."""
    carried = None if tensor.pad is None else tensor.pad.carried
    return carried is not None and carried.kind != "embedding"


def carry_bases(differences: Differences, size: CarrySize, stream: Stream, run: Run) -> Carried:
    """All of it, layer by layer."""
    stage, steps = "compare the experts", differences.layers + size.head + size.embedding
    run.begin(stage, steps)
    units = [fit_pass_through(stream.layers[0].before_attention, size.terms)]
    inputs, input_shares, outputs = (list[Singles]() for _ in range(3))
    input_sizes, output_sizes = list[float](), [1.0 / units[0].size]
    for layer, each in enumerate(stream.layers):
        units.append(fit_pass_through(each.before_ffn, size.terms))
        input_size = output_size = 1.0
        if size.inputs:
            basis, parts, input_size = _inputs(differences, size, layer, each)
            inputs.append(basis)
            input_shares.append(parts)
        if size.outputs:
            duals, output_size = _outputs(differences, size, layer, each)
            outputs.append(duals)
        input_sizes.append(input_size)
        output_sizes.append(output_size)
        run.progress(stage, layer + 1, steps)
    head, head_size = _head(differences, size, stream) if size.head else (None, 0.0)
    shares = (stream.counts + 1.0) / (stream.counts + 1.0).sum()
    embedding = _embedding(differences, size, shares) if size.embedding else None
    run.progress(stage, steps, steps)
    return Carried(
        tuple(units),
        tuple(output_sizes),
        (*input_sizes, head_size),
        _STILL * min(each.size for each in units),
        tuple(inputs),
        tuple(input_shares),
        tuple(outputs),
        head,
        embedding,
        shares.astype(np.float32) if size.embedding else None,
    )


def _inputs(differences: Differences, size: CarrySize, layer: int, stream: LayerStream) -> tuple[Singles, Singles, float]:
    """Q, the sizes of q, k and v that errors are measured by, and the root mean square of C x."""
    real, read_DT = len(stream.read), _wider_sample(stream.read, size, size.inputs).T
    weights_D = differences.shared(differences.attention_norm(layer))
    shared = (differences.shared(name) * weights_D for name in differences.projections(layer))
    shares_3 = np.array([_size(each @ stream.read.T) for each in shared], np.float32)
    rows = differences.attention_rows(layer)
    changes = (differences.attention(layer, expert) for expert in differences.experts)
    products = [_stacked(parts, read_DT, rows, shares_3) for parts in changes if any(part is not None for part in parts)]
    if not products:
        return np.zeros((sum(rows), size.inputs), np.float32), shares_3, 1.0
    basis_NR = output_basis(products, size.inputs)
    written = [basis_NR.T @ product[:, :real] for product in products]
    scaled = basis_NR * np.repeat(shares_3, rows)[:, None]
    return scaled, shares_3, _size(np.concatenate(written, axis=1)) or 1.0


def _stacked(parts: Sequence[Difference | None], columns_IX: Singles, rows: Sequence[int], shares_3: Singles) -> Singles:
    """What q, k and v differ by, over the sizes of each, (N, X)."""
    nothing = (np.zeros((count, columns_IX.shape[1]), np.float32) for count in rows)
    found = zip(parts, nothing, shares_3, strict=True)
    return np.concatenate([none if part is None else part.times(columns_IX) / share for part, none, share in found])


def _outputs(differences: Differences, size: CarrySize, layer: int, stream: LayerStream) -> tuple[Singles, float]:
    """G, and the root mean square of P a over that of the stream."""
    name = differences.output_projection(layer)
    changes = [change for expert in differences.experts if (change := differences.of(name, expert)) is not None]
    if not changes:
        return np.zeros((stream.attended.shape[1], size.outputs), np.float32), 1.0
    real, attended_TA = len(stream.attended), _wider_sample(stream.attended, size, size.outputs)
    products = [change.times(attended_TA.T) for change in changes]
    duals_AR = input_duals(products, attended_TA, size.outputs)
    read = sum(change.times(duals_AR).T @ product[:, :real] for change, product in zip(changes, products, strict=True))
    return duals_AR, (_size(np.asarray(read)) or 1.0) / float(np.median(stream.before_ffn))


def _wider_sample(sample_TI: Singles, size: CarrySize, rank: int) -> Singles:
    """A sample and, where all that experts differ by has room, small inputs of every direction behind it: a short text, or a
    first layer that sees few tokens, does not show all that a change reads.
    """
    if not size.is_exact:
        return sample_TI
    inputs = np.random.default_rng(0).standard_normal((rank, sample_TI.shape[1]), np.float32)
    return np.concatenate([sample_TI, inputs * np.float32(_SMALL * _size(sample_TI))])


def _head(differences: Differences, size: CarrySize, stream: Stream) -> tuple[Singles, float]:
    """Q (V, R_V), and the root mean square of C x."""
    sample_DT = stream.last[:: max(1, len(stream.last) // _HEAD_TOKENS)].T
    count, tokens, most = len(stream.counts), sample_DT.shape[1], max(1, _HEAD_COLUMNS // len(differences.experts))
    if tokens > most:  # random mixtures of tokens: the same energy in every direction, on average
        mixed_TX = np.random.default_rng(0).standard_normal((tokens, most)) / np.sqrt(most)
        sample_DT = sample_DT @ mixed_TX.astype(np.float32)
    width = sample_DT.shape[1] * len(differences.changing(weight_of(HEAD), weight_of(FINAL_NORM)))
    gram_XX = np.zeros((width, width))
    for rows in blocks(count, ROWS):
        product = _head_products(differences, rows, sample_DT).astype(np.float64)
        gram_XX += product.T @ product
    values, vectors = np.linalg.eigh(gram_XX)
    kept = min(size.inputs, int((values > 1e-14 * values[-1]).sum()))
    turn_XR = signed(vectors[:, ::-1][:, :kept]) / np.sqrt(values[::-1][:kept])
    basis_VR = np.zeros((count, size.inputs), np.float32)
    for rows in blocks(count, ROWS):
        basis_VR[rows, :kept] = _head_products(differences, rows, sample_DT) @ turn_XR
    return basis_VR, float(np.sqrt(values[::-1][:kept].sum() / (size.inputs * tokens * len(differences.experts)))) or 1.0


def _head_products(differences: Differences, rows: slice, sample_DT: Singles) -> Singles:
    changing = differences.changing(weight_of(HEAD), weight_of(FINAL_NORM))
    return np.concatenate([differences.head_rows(expert, rows) @ sample_DT for expert in changing], axis=1)


def _embedding(differences: Differences, size: CarrySize, shares_V: npt.NDArray[np.float64]) -> Singles:
    changing = differences.changing(weight_of(EMBEDDING))

    def rows(part: slice) -> list[Singles]:
        return [differences.embedding_rows(expert, part) for expert in changing]

    return row_basis(rows, shares_V, size.outputs)


def _size(array: Singles) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))
