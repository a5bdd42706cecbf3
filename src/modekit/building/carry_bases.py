"""How much of every difference goes through which channel, by a text's stream: what a build keeps as carried.safetensors.

Shape legend: N outputs of q, k and v together, T sampled tokens, D hidden size, V vocabulary, R_U and R_V channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modekit.building.differences import Difference, Differences
from modekit.checkpoint.carried import Carried
from modekit.planning.carry import EXACT_TERMS, CarrySize
from modekit.run import Run
from modekit.weights.bases import LayerStream, Stream, input_duals, output_basis, row_basis
from modekit.weights.pass_through import PassThrough, fit_pass_through

Singles = npt.NDArray[np.float32]

_STILL = 2.0**-5
"""Of the smallest stream: the channel that is the same everywhere, which all norms see."""
_HEAD_TOKENS = 256
_HEAD_COLUMNS = 2_048
"""Of all experts together: their Gram matrix is bounded, however many they are."""
_SMALL = 2.0**-6
_ROWS = 4_096
_RIDGE = 1e-3
"""Of a direction's mean share: a sample has about as many tokens as the stream has directions."""


def carry_bases(differences: Differences, size: CarrySize, stream: Stream, run: Run) -> Carried:
    """All of it, layer by layer."""
    steps = differences.layers + size.head + size.embedding
    run.begin("find what experts differ by", steps)
    units = [_units(stream.layers[0].before_attention, size)]
    found: list[_OfLayer] = []
    for layer, each in enumerate(stream.layers):
        units.append(_units(each.before_ffn, size))
        found.append(_of_layer(differences, size, layer, each))
        run.progress("find what experts differ by", layer + 1, steps)
    head, head_size = _head(differences, size, stream) if size.head else (None, 0.0)
    shares = (stream.counts + 1.0) / (stream.counts + 1.0).sum()
    embedding = _embedding(differences, size, shares) if size.embedding else None
    run.progress("find what experts differ by", steps, steps)
    return Carried(
        tuple(units),
        (1.0 / units[0].size, *(each.output_size for each in found)),
        (*(each.input_size for each in found), head_size),
        _STILL * min(each.size for each in units),
        tuple(each.inputs for each in found) if size.inputs else (),
        tuple(each.shares for each in found) if size.inputs else (),
        tuple(each.outputs for each in found) if size.outputs else (),
        head,
        embedding,
        shares.astype(np.float32) if size.embedding else None,
        tuple(each.ones for each in found) if size.biases else (),
    )


def attention_inputs(inputs_NR: Singles, shares_3: Singles, parts: Sequence[Difference | None], rows: Sequence[int]) -> Singles:
    """C (R_V, D): what an expert writes into V for a stream h of size 1, so that q, k and v become M h ~ Q C h."""
    total, start = None, 0
    for part, count, share in zip(parts, rows, shares_3, strict=True):
        if part is not None:
            said = part.under(inputs_NR[start : start + count].T / np.square(share))
            total = said if total is None else total + said
        start += count
    return np.zeros((inputs_NR.shape[1], 0), np.float32) if total is None else total


@dataclass(frozen=True)
class _OfLayer:
    """Bases of one layer of the base, with the sizes of what goes through them."""

    inputs: Singles
    shares: Singles
    input_size: float
    outputs: Singles
    output_size: float
    ones: Singles


def _units(sizes_N: Singles, size: CarrySize) -> PassThrough:
    return fit_pass_through(sizes_N, size.terms)


def _of_layer(differences: Differences, size: CarrySize, layer: int, stream: LayerStream) -> _OfLayer:
    ones = ones_of(stream.read) if size.biases else None
    inputs, shares, input_size = _inputs(differences, size, layer, stream, ones) if size.inputs else _NOTHING
    outputs, _, output_size = _outputs(differences, size, layer, stream) if size.outputs else _NOTHING
    return _OfLayer(inputs, shares, input_size, outputs, output_size, _NOTHING[1] if ones is None else ones)


_NOTHING = np.zeros((0, 0), np.float32), np.ones(3, np.float32), 1.0


def ones_of(sample_TD: Singles) -> Singles:
    """The w (D,) with w x ~ 1 for a text's stream of size 1, as far as tokens share a direction: ridge regression."""
    sample = sample_TD.astype(np.float64)
    gram_DD = sample.T @ sample
    ridge = _RIDGE * np.trace(gram_DD) / len(gram_DD) * np.eye(len(gram_DD))
    return np.linalg.solve(gram_DD + ridge, sample.sum(0)).astype(np.float32)


def _inputs(
    differences: Differences, size: CarrySize, layer: int, stream: LayerStream, ones_D: Singles | None
) -> tuple[Singles, Singles, float]:
    """Q, the sizes of q, k and v that errors are measured by, and the root mean square of C x."""
    real, read_DT = len(stream.read), _wider_sample(stream.read, size, size.inputs).T
    constant_1T = (np.arange(read_DT.shape[1]) < real).astype(np.float32)[None]
    shares_3 = np.array([_size(each @ stream.read.T) for each in differences.shared_attention(layer)], np.float32)
    rows = differences.attention_rows(layer)
    products = []
    for expert in differences.experts:
        read = [(differences.attention(layer, expert, ones_D), read_DT)]
        if ones_D is not None and layer == 0:
            read.append((differences.constants(layer, expert), constant_1T))
        said = [_stacked(parts, columns, rows, shares_3) for parts, columns in read if any(part is not None for part in parts)]
        if said:
            products.append(np.sum(said, axis=0))
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


def _outputs(differences: Differences, size: CarrySize, layer: int, stream: LayerStream) -> tuple[Singles, Singles, float]:
    """G, and the root mean square of P a over that of the stream."""
    changes = [change for expert in differences.experts if (change := differences.output(layer, expert)) is not None]
    if not changes:
        return np.zeros((stream.attended.shape[1], size.outputs), np.float32), _NOTHING[1], 1.0
    real, attended_TA = len(stream.attended), _wider_sample(stream.attended, size, size.outputs)
    products = [change.times(attended_TA.T) for change in changes]
    duals_AR = input_duals(products, attended_TA, size.outputs)
    read = sum(change.times(duals_AR).T @ product[:, :real] for change, product in zip(changes, products, strict=True))
    return duals_AR, _NOTHING[1], (_size(np.asarray(read)) or 1.0) / float(np.median(stream.before_ffn))


def _wider_sample(sample_TI: Singles, size: CarrySize, rank: int) -> Singles:
    """A sample and, where all that experts differ by has room, small inputs of every direction behind it: a short text, or a
    first layer that sees few tokens, does not show all that a change reads.
    """
    if size.terms < EXACT_TERMS:
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
    width = sample_DT.shape[1] * len(differences.experts)
    gram_XX = np.zeros((width, width))
    for rows in in_rows(count):
        product = _head_products(differences, rows, sample_DT).astype(np.float64)
        gram_XX += product.T @ product
    values, vectors = np.linalg.eigh(gram_XX)
    kept = min(size.inputs, int((values > 1e-14 * values[-1]).sum()))
    turn_XR = vectors[:, ::-1][:, :kept] / np.sqrt(values[::-1][:kept])
    basis_VR = np.zeros((count, size.inputs), np.float32)
    for rows in in_rows(count):
        basis_VR[rows, :kept] = _head_products(differences, rows, sample_DT) @ turn_XR
    return basis_VR, float(np.sqrt(values[::-1][:kept].sum() / (size.inputs * tokens * len(differences.experts)))) or 1.0


def _head_products(differences: Differences, rows: slice, sample_DT: Singles) -> Singles:
    return np.concatenate([differences.head_rows(expert, rows) @ sample_DT for expert in differences.experts], axis=1)


def _embedding(differences: Differences, size: CarrySize, shares_V: npt.NDArray[np.float64]) -> Singles:
    def rows(start: int, stop: int) -> list[Singles]:
        return [differences.embedding_rows(expert, slice(start, stop)) for expert in differences.experts]

    return row_basis(rows, len(shares_V), shares_V, size.outputs)


def in_rows(count: int) -> list[slice]:
    """Slices that cover the rows of a vocabulary, some thousand at a time."""
    return [slice(start, min(count, start + _ROWS)) for start in range(0, count, _ROWS)]


def _size(array: Singles) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))
