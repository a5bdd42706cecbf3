"""The numbers in the new rows and columns of tensors that carry more of an expert than its FFN.

planning/channels.py says what goes where, benchmarks/whole.md why it works. In every layer of the result (m = 0 in front):

    o            U = (eps / s_u) P a                                 P = sum_e O_e^T M_e
    gate, up     read U by W diag(w_post) O_e s_u / eps, as if it were in the stream
    K R_U units  pass O_e s_u / eps U on into the stream, and what that gives V, and clear U
    K R_V units  pass (eps / s_v) C h - V on into V
    down         writes (eps / s_v) C y into V for what the FFN adds to the stream
    q, k, v      of the next layer, or the head, read V by Q s_v / eps

In front, U of a token's embedding holds (eps / s_u) z, and O_e is what its expert's embedding is of it.

Shape legend: O rows of a tensor, F hidden units, D hidden size, P channels, R_U and R_V of them, K units per channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from modekit.building.differences import Differences, carry_bases
from modekit.building.update import CheckpointUpdate
from modekit.checkpoint.carried import CARRIED_FILE, Carried, read_carried
from modekit.checkpoint.record import STATISTICS_FOLDER
from modekit.errors import UnsupportedError
from modekit.files.write import write_file
from modekit.planning.carry import CarrySize
from modekit.planning.plan import Plan
from modekit.run import Run
from modekit.sources.contents import OpenFiles
from modekit.sources.names import EMBEDDING, FINAL_NORM, HEAD, weight_of
from modekit.text.sequences import TokenSequence
from modekit.weights.bases import ROWS
from modekit.weights.nearest import own_reads
from modekit.weights.numeric import Singles, blocks
from modekit.weights.padding import CarriedPart, FFNKind, Fill
from modekit.weights.reading import WeightReader

_EPS = 2.0**-6
"""Size of U and V over that of the stream: its square is what norms see of them."""


def carry(plan: Plan, folder: Path, update: CheckpointUpdate | None, run: Run) -> Carried:
    """By what a text shows, how the checkpoint in a folder carries more than FFNs; kept beside its weights. Raises
    UnsupportedError for a mixture that was trained.
    """
    channels = plan.shape.channels
    assert channels is not None and channels.carry is not None
    if update is not None and update.checkpoint.record.trained:
        raise UnsupportedError(
            "a mixture that was trained, and carries more of its experts than FFNs, cannot change its experts",
            where=str(update.checkpoint.folder),
            remedy="build it with the other experts, and train it again",
        )
    if not (folder / CARRIED_FILE).exists():  # else of a build that was killed: what it wrote reads and writes these channels
        write_file(folder / CARRIED_FILE, _measured(plan, channels.carry, folder / STATISTICS_FOLDER, run).write)
    return read_carried(folder)  # so that a build that goes on reads the same numbers


def _measured(plan: Plan, size: CarrySize, kept: Path, run: Run) -> Carried:
    from modekit.building.lost import measure_lost
    from modekit.routing.stream import read_texts

    with OpenFiles() as opened:
        read, texts = WeightReader(opened, plan.models), read_texts(plan, kept, run)
        carried = _bases(plan, size, read, [text.setting for text in texts], run)
        if size.is_exact:
            return carried
        return replace(carried, lost=measure_lost(plan, read, carried, [text.pieces for text in texts], run))


def _bases(plan: Plan, size: CarrySize, read: WeightReader, texts: Sequence[Sequence[TokenSequence]], run: Run) -> Carried:
    """By the stream of the texts, which is in memory meanwhile."""
    from modekit.building.lost import own_numbers
    from modekit.routing.stream import measure_stream

    rule = plan.recipe.mixture.merge
    own = rule is not None and rule.method == "average" and not size.is_exact
    weights = partial(own_numbers, plan, Differences(plan, read))
    stream = measure_stream(plan, weights, texts, run, own=own)
    reads = own_reads(stream) if own else None
    return replace(carry_bases(Differences(plan, read, reads), size, stream, run), reads=reads)


class _Expert(NamedTuple):
    """What an expert writes in a layer of the result: O (D, R_U); C of what reads V next, (R_V, D); weights (D,) of the norm
    before the FFN, the shared and its own.
    """

    outputs: Singles
    inputs: Singles
    norm: Singles
    own_norm: Singles


class Carrying:
    """Of one plan, with the bases that its checkpoint keeps."""

    def __init__(self, plan: Plan, read: WeightReader, carried: Carried) -> None:
        channels = plan.shape.channels
        assert channels is not None and channels.carry is not None
        self._channels, self._size = channels, channels.carry
        self._carried = carried
        self._differences = Differences(plan, read, carried.reads)
        self._expert = lru_cache(maxsize=2)(self._read_expert)
        self._outputs_read = lru_cache(maxsize=None)(self._read_outputs)

    def fill(self, part: CarriedPart, matrix: int) -> Fill:
        """Of the matrix with this number, where a tensor has several."""
        layer = part.layer or 0
        match part.kind:
            case "q" | "k" | "v":
                beside = self._in_columns((self._channels.inputs, self._reading(part.kind, layer)))
                return Fill(beside, more=self._more(self._differences.projections(layer - 1)["qkv".index(part.kind)]))
            case "o":
                return Fill(below=self._writing(layer), more=self._more(self._differences.output_projection(layer - 1)))
            case "head":
                return Fill(beside=self._head, more=self._more(weight_of(HEAD)))
            case "embedding":
                return Fill(beside=self._embedding)
            case "router":
                return self._reads_stream(layer, self._differences.gates(layer - 1, matrix), self._expert(layer, matrix))
            case "gate_up":
                return self._ffn("up" if matrix % 2 else "gate", layer, matrix // 2)
            case "gate" | "up" | "down":
                return self._ffn(part.kind, layer, matrix if part.expert is None else part.expert)

    def _more(self, name: str) -> Callable[[slice], Singles] | None:
        """What experts' own reads add to the average of a tensor of the base."""
        return partial(self._differences.beyond_average, name) if self._carried.reads is not None else None

    def _in_columns(self, *parts: tuple[slice, Singles]) -> Callable[[slice], Singles]:
        def beside(rows: slice) -> Singles:
            found = np.zeros((rows.stop - rows.start, self._channels.spare), np.float32)
            for channels, numbers in parts:
                found[:, self._below(channels)] = numbers[rows]
            return found

        return beside

    def _reading(self, kind: str, layer: int) -> Singles:
        """What q, k or v of a layer of the result make of V, (O, R_V)."""
        counts, place = self._differences.attention_rows(layer - 1), "qkv".index(kind)
        first = sum(counts[:place])
        said: Singles = self._carried.inputs[layer - 1][first : first + counts[place]]
        return np.asarray(said * np.float32(self._carried.input_sizes[layer - 1] / _EPS))

    def _writing(self, layer: int) -> Singles:
        """The rows of o in a layer of the result for all channels, (P, columns of the result)."""
        read_RA = self._outputs_read(layer - 1)
        columns = read_RA.shape[1] + self._channels.group * self._channels.more_heads * self._channels.head_dim
        rows = np.zeros((self._channels.spare, columns), np.float32)
        rows[self._below(self._channels.outputs), : read_RA.shape[1]] = read_RA * np.float32(
            _EPS / self._carried.output_sizes[layer]
        )
        return rows

    def _read_outputs(self, layer: int) -> Singles:
        """P (R_U, A) of a layer of the base: what of attention's output goes into U."""
        differences, duals_AR = self._differences, self._carried.outputs[layer]
        read_RA = np.zeros(duals_AR.T.shape, np.float32)
        for expert in differences.experts:
            change = differences.of(differences.output_projection(layer), expert)
            if change is not None:
                read_RA += change.under(change.times(duals_AR).T)
        return read_RA

    def _below(self, channels: slice) -> slice:
        return slice(channels.start - self._channels.hidden, channels.stop - self._channels.hidden)

    def _head(self, rows: slice) -> Singles:
        assert self._carried.head is not None
        said = self._carried.head[rows] * np.float32(self._carried.input_sizes[-1] / _EPS)
        return self._in_columns((self._channels.inputs, said))(slice(0, len(said)))

    def _embedding(self, rows: slice) -> Singles:
        scale, still, count = 1.0 / self._channels.embedding_scale, self._channels.still, rows.stop - rows.start
        parts = [(slice(still, still + 1), np.full((count, 1), self._carried.still * scale, np.float32))]
        if self._carried.embedding is not None:
            said = self._carried.embedding[rows] * np.float32(scale * _EPS / self._carried.output_sizes[0])
            parts.append((self._channels.outputs, said))
        return self._in_columns(*parts)(slice(0, count))

    def _ffn(self, kind: FFNKind, layer: int, number: int) -> Fill:
        said = self._expert(layer, number // max(1, self._channels.inner))
        own_FD = self._differences.ffn(kind, layer - 1, number) if layer > 0 else None
        if kind == "down":
            return self._down(layer, own_FD, said)
        below = self._gates(layer) if kind == "gate" else self._passed(layer, said)
        return self._reads_stream(layer, own_FD, said)._replace(below=below)

    def _reads_stream(self, layer: int, own_XD: Singles | None, said: _Expert) -> Fill:
        """What reads the stream behind attention reads U, too. The further units of up read what is passed on, and those of
        gate the constant.
        """
        own_scale = None if np.array_equal(said.norm, said.own_norm) else said.own_norm / _divisor(said.norm)
        beside = None
        if own_XD is not None and self._size.outputs:
            seen = own_XD * said.own_norm @ said.outputs * np.float32(self._carried.output_sizes[layer] / _EPS)
            beside = self._in_columns((self._channels.outputs, seen))
        return Fill(beside, None, own_scale)

    def _gates(self, layer: int) -> Singles:
        """Rows of the further units in gate, (K (R_U + R_V), D + P)."""
        units, channels = self._carried.units[layer], self._channels
        rows = np.zeros((self._size.units, channels.hidden + channels.spare), np.float32)
        rows[:, channels.still] = np.repeat(np.array(units.alphas) * units.size / self._carried.still, self._size.channels)
        return rows

    def _passed(self, layer: int, said: _Expert) -> Singles:
        """Rows of the further units in up, the same for every k: U, and what V is to become without what it is."""
        channels, size = self._channels, self._size
        once = np.zeros((size.channels, channels.hidden + channels.spare), np.float32)
        np.fill_diagonal(once[: size.outputs, channels.outputs], 1.0)
        once[size.outputs :, : channels.hidden] = said.inputs / _divisor(said.norm) * self._into_v(layer)
        np.fill_diagonal(once[size.outputs :, channels.inputs], -1.0)
        return np.tile(once, (size.terms, 1))

    def _into_v(self, layer: int) -> float:
        """Eps / s_v of what reads V behind a layer of the result."""
        return _EPS / (self._carried.input_sizes[layer] or 1.0)

    def _down(self, layer: int, own_DF: Singles | None, said: _Expert) -> Fill:
        """Down (D, F): the channels are rows below, the further units columns beside it."""
        channels, size, units = self._channels, self._size, self._carried.units[layer]
        stream_DR = said.outputs * np.float32(self._carried.output_sizes[layer] / _EPS)
        once = np.zeros((channels.hidden + channels.spare, size.channels), np.float32)
        once[: channels.hidden, : size.outputs] = stream_DR
        np.fill_diagonal(once[channels.outputs, : size.outputs], -1.0)
        once[channels.inputs, : size.outputs] = said.inputs @ stream_DR * self._into_v(layer)
        np.fill_diagonal(once[channels.inputs, size.outputs :], 1.0)
        factors = np.array(units.betas) * units.size / channels.residual_scale
        beside_OX = np.concatenate([once * np.float32(factor) for factor in factors], axis=1)
        below = np.zeros((channels.spare, channels.expert_hidden + size.units), np.float32)
        below[:, channels.expert_hidden :] = beside_OX[channels.hidden :]
        if own_DF is not None:
            written = said.inputs @ own_DF * self._into_v(layer)
            below[self._below(channels.inputs), : channels.expert_hidden] = written
        return Fill(lambda rows: beside_OX[rows], below)

    def _read_expert(self, layer: int, expert: int) -> _Expert:
        name = self._differences.ffn_norm_name(max(0, layer - 1))
        norm = self._differences.shared(name)
        own_norm = norm if layer == 0 else self._differences.own(name, expert)
        return _Expert(self._written(layer, expert), self._read_next(layer, expert), norm, own_norm)

    def _of_attention(self, layer: int, expert: int) -> Singles:
        """C (R_V, D): what an expert writes into V for a stream h of size 1, so that q, k and v become M h ~ Q C h."""
        start = 0
        inputs_NR = self._carried.inputs[layer]
        total = np.zeros((self._size.inputs, self._channels.hidden), np.float32)
        parts = self._differences.attention(layer, expert)
        counts = self._differences.attention_rows(layer)
        for part, count, share in zip(parts, counts, self._carried.input_shares[layer], strict=True):
            if part is not None:
                total += part.under(inputs_NR[start : start + count].T / np.square(share))
            start += count
        return total

    def _written(self, layer: int, expert: int) -> Singles:
        """O (D, R_U) of a layer of the result; in front, of embeddings."""
        nothing = np.zeros((self._channels.hidden, self._size.outputs), np.float32)
        if layer == 0:
            return nothing if self._carried.embedding is None else self._embedded(expert)
        change = self._differences.of(self._differences.output_projection(layer - 1), expert) if self._size.outputs else None
        return nothing if change is None else change.times(self._carried.outputs[layer - 1])

    def _embedded(self, expert: int) -> Singles:
        """What an expert's embedding makes of z, (D, R_U): least squares over the text's tokens."""
        carried, total = self._carried, np.zeros((self._channels.hidden, self._size.outputs))
        assert carried.embedding is not None and carried.shares is not None
        if expert not in self._differences.changing(weight_of(EMBEDDING)):
            return total.astype(np.float32)
        for rows in blocks(len(carried.embedding), ROWS):
            weighted = carried.embedding[rows] * carried.shares[rows, None]
            total += self._differences.embedding_rows(expert, rows).T @ weighted
        return (total * self._channels.embedding_scale).astype(np.float32)

    def _read_next(self, layer: int, expert: int) -> Singles:
        """C (R_V, D) of what reads V behind a layer of the result: the next layer's attention, or the head."""
        total = np.zeros((self._size.inputs, self._channels.hidden))
        if self._size.inputs and layer < self._differences.layers:
            return self._of_attention(layer, expert)
        if not self._size.inputs or self._carried.head is None:
            return total.astype(np.float32)
        if expert in self._differences.changing(weight_of(HEAD), weight_of(FINAL_NORM)):
            for part in blocks(len(self._carried.head), ROWS):
                total += self._carried.head[part].T @ self._differences.head_rows(expert, part)
        return total.astype(np.float32)


def _divisor(weights_D: Singles) -> Singles:
    """Weights of a norm to divide by: through one that is nothing, nothing can be read."""
    return np.where(np.abs(weights_D) > 1e-6 * np.abs(weights_D).max(), weights_D, np.float32(np.inf))
