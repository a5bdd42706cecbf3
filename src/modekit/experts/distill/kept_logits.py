"""A teacher's output at every token, and how far a student is from it: beside the student, or kept for several students.

    FOLDER/teacher.json          of which teacher, tokenizer and text, at which temperatures (Header)
    FOLDER/logits.safetensors    in blocks of whole sequences: ids.N (T, K) int32, log_probs.N (T, K) float32, at temperature 1,
                                 log_rest.N (T, R) float32: log sum p^(1/T) over the other tokens, for each temperature

Kept are the teacher's top_k tokens at each place, and all others as one class. Divergences over such classes are at most those
over the vocabulary, and the same where the student shares out what is left as the teacher does. The folder appears whole; a
pass that was killed goes on after its last block. Blocks are read as they are needed: memory does not grow with the text.

Shape legend: B rows, S sequence, T tokens of a block, N predicted tokens, K kept tokens, C = K + 1 classes, R temperatures,
V vocabulary.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel

from modekit.errors import MismatchError, SourceError
from modekit.evaluation.loss import tokens_per_pass
from modekit.files.output import is_there
from modekit.files.read import SMALL, UNREADABLE
from modekit.files.staging import staging
from modekit.files.tensors import Entry, write_all
from modekit.files.typed import Digest, Label, read_as
from modekit.files.write import digest_of_data, write_json
from modekit.run import Run
from modekit.sources.contents import OpenFiles
from modekit.sources.model import read_header
from modekit.text.sequences import TokenSequence, make_batches
from modekit.training.losses import tempered

Item = Mapping[str, torch.Tensor]
"""input_ids, real, position (B, S): where each token stands among those of all sequences."""


@dataclass(frozen=True)
class FullLogits:
    """A teacher's output at N tokens: logits (N, V)."""

    logits_NV: torch.Tensor

    def beside(self, student_NV: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of a student's logits and of the teacher, at a temperature, over the whole vocabulary."""
        return tempered(student_NV, temperature), tempered(self.logits_NV, temperature)


@dataclass(frozen=True)
class TopLogits:
    """The teacher's top_k tokens (N, K) int64, their log-probabilities (N, K) float32 at temperature 1, and the rest's.

    `log_rest_N` is, by temperature T, log sum p^(1/T) over the other tokens; None where there are no others.
    """

    ids_NK: torch.Tensor
    log_probs_NK: torch.Tensor
    log_rest_N: Callable[[float], torch.Tensor | None]

    def beside(self, student_NV: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The same over the kept tokens and, as one class, all others."""
        student = tempered(student_NV, temperature)
        student_NK = student.gather(-1, self.ids_NK)
        teacher_NK = self.log_probs_NK / temperature
        rest = self.log_rest_N(temperature)
        if rest is None:
            return student_NK, teacher_NK.log_softmax(-1)
        others = student.scatter(-1, self.ids_NK, -torch.inf).logsumexp(-1, keepdim=True)
        teacher_NC = torch.cat([teacher_NK, rest[:, None]], -1).log_softmax(-1)
        return torch.cat([student_NK, others], -1), teacher_NC


class LoadedTeacher:
    """The teacher's model, which never learns; `vocabulary` ids are those of the tokenizer that both models have."""

    classes = "the whole vocabulary"
    """What distributions are compared over, in words."""

    def __init__(self, model: PreTrainedModel, vocabulary: int) -> None:
        self._model = model.requires_grad_(False).eval()
        self._vocabulary = vocabulary

    def output_of(self, item: Item, predicted: torch.Tensor) -> FullLogits:
        """Of the predicted tokens of a batch."""
        with torch.no_grad():
            output = self._model(input_ids=item["input_ids"], attention_mask=item["real"].long(), use_cache=False)
            return FullLogits(output.logits[:, :-1][predicted][:, : self._vocabulary])


HEADER_FILE, LOGITS_FILE = "teacher.json", "logits.safetensors"
_BLOCK = 4_096  # tokens
_NAMES = ("ids", "log_probs", "log_rest")
_DTYPES = {"ids": ("I32", np.int32), "log_probs": ("F32", np.float32), "log_rest": ("F32", np.float32)}
_Size = Annotated[int, Field(ge=1, le=2**40, strict=True)]


class Header(BaseModel):
    """What kept logits are of.

    Attributes:
        teacher: what it was called.
        teacher_digest, tokenizer_digest, text_digest: of its weights, of what ids stand for, of all sequences.
        vocabulary: tokens that it says something of.
        top_k: how many of them are kept at each place.
        temperatures: at which the rest is known.
        tokens: places, of all sequences.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    teacher: Label
    teacher_digest: Digest
    tokenizer_digest: Digest
    text_digest: Digest
    vocabulary: _Size
    top_k: _Size
    temperatures: Annotated[tuple[Annotated[float, Field(gt=0, le=1e3, strict=True)], ...], Field(min_length=1, max_length=16)]
    tokens: _Size

    @property
    def widths(self) -> dict[str, int]:
        """Columns of the three tensors of a block, in the order of the file."""
        return {"ids": self.top_k, "log_probs": self.top_k, "log_rest": len(self.temperatures)}


def read_kept(folder: Path) -> Header | None:
    """The header of kept logits; None where there is no folder. Raises SourceError when it cannot be read.

    What a kill left beside a folder that is whole goes first. Raises OutputError where that cannot be done.
    """
    if not is_there(folder):
        return None
    try:
        return read_as(folder / HEADER_FILE, Header, SMALL)
    except UNREADABLE as error:
        raise SourceError(
            "no kept logits of a teacher that could be read",
            where=str(folder / HEADER_FILE),
            found=error,
            expected="what --keep-teacher wrote",
            remedy="name another folder, or remove this one to have it made again",
        ) from None


def check_kept(folder: Path, found: Header, wanted: Header) -> None:
    """Raise MismatchError that says which of teacher, tokenizer, text, top_k and temperature are others than wanted.

    `wanted` has the one temperature that is needed besides 1.
    """
    said = {
        "another teacher, or another state of it": found.teacher_digest != wanted.teacher_digest,
        "another tokenizer": found.tokenizer_digest != wanted.tokenizer_digest,
        "other text, or cut otherwise": (found.text_digest, found.tokens) != (wanted.text_digest, wanted.tokens),
        f"{found.vocabulary} tokens, not {wanted.vocabulary}": found.vocabulary != wanted.vocabulary,
        f"the top {found.top_k}, not {wanted.top_k}": found.top_k != wanted.top_k,
        f"temperatures {', '.join(f'{each:g}' for each in found.temperatures)}": not (
            set(wanted.temperatures) <= set(found.temperatures)
        ),
    }
    different = [what for what, is_so in said.items() if is_so]
    if different:
        raise MismatchError(
            "the kept logits are not those that this distillation needs",
            where=str(folder),
            found="; ".join(different),
            remedy="name another folder, or remove this one to have it made again",
        )


def _blocks_of(sequences: Sequence[TokenSequence]) -> list[list[TokenSequence]]:
    """Consecutive sequences, of about _BLOCK tokens."""
    blocks: list[list[TokenSequence]] = []
    size = _BLOCK
    for sequence in sequences:
        if size + len(sequence.ids) > _BLOCK:
            blocks.append([])
            size = 0
        blocks[-1].append(sequence)
        size += len(sequence.ids)
    return blocks


def _entries(header: Header, blocks: Sequence[Sequence[TokenSequence]]) -> list[Entry]:
    """Of the file's header, in order."""
    sizes = [sum(len(sequence.ids) for sequence in block) for block in blocks]
    widths = header.widths.items()
    return [
        (f"{name}.{number}", _DTYPES[name][0], (tokens, width), 4 * tokens * width)
        for number, tokens in enumerate(sizes)
        for name, width in widths
    ]


def keep(folder: Path, header: Header, model: PreTrainedModel, sequences: Sequence[TokenSequence], *, run: Run) -> None:
    """One pass of the teacher over all sequences, written as it goes. Raises OutputError."""
    blocks = _blocks_of(sequences)
    model.eval()

    @lru_cache(maxsize=1)  # the tensors of a block are written one after the other
    def arrays(number: int) -> dict[str, np.ndarray]:
        return _arrays(model, header, blocks[number])

    def write(number: int, stream: io.FileIO) -> None:
        name = _NAMES[number % len(_NAMES)]
        write_all(stream, memoryview(arrays(number // len(_NAMES))[name].tobytes()))
        run.progress("teacher", number + 1, len(blocks) * len(_NAMES))

    with staging(folder, f"teacher {digest_of_data(header.model_dump(mode='json'))}", "teacher", sync=run.sync) as stage:
        stage.write_shard(LOGITS_FILE, _entries(header, blocks), write)
        write_json(stage.folder / HEADER_FILE, header.model_dump(mode="json"))


def _arrays(model: PreTrainedModel, header: Header, block: Sequence[TokenSequence]) -> dict[str, np.ndarray]:
    """The teacher's output on a block."""
    starts = torch.tensor([0, *(len(sequence.ids) for sequence in block)]).cumsum(0)
    found = {name: np.empty((int(starts[-1]), width), _DTYPES[name][1]) for name, width in header.widths.items()}
    with torch.inference_mode():
        for batch in make_batches(block, tokens=min(2_048, tokens_per_pass(model.config))):
            mask = batch.mask.to(model.device)
            output = model(input_ids=batch.input_ids.to(mask.device), attention_mask=mask.long(), use_cache=False)
            places = (starts[torch.tensor(batch.rows)][:, None] + torch.arange(batch.mask.shape[1]))[batch.mask].numpy()
            for name, values in zip(_NAMES, _kept_of(output.logits[mask][:, : header.vocabulary], header), strict=True):
                found[name][places] = values.cpu().numpy()
    return found


def _kept_of(logits_NV: torch.Tensor, header: Header) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids (N, K), log-probabilities (N, K), and the rest's (N, R), which is -inf where all is kept."""
    log_probs_NV = logits_NV.float().log_softmax(-1)
    top = log_probs_NV.topk(header.top_k, dim=-1)
    others = log_probs_NV.scatter(-1, top.indices, -torch.inf)
    rest_NR = torch.stack([(others / temperature).logsumexp(-1) for temperature in header.temperatures], -1)
    return top.indices.int(), top.values, rest_NR


class KeptTeacher:
    """A teacher's kept output, read batch by batch."""

    def __init__(self, folder: Path, header: Header, sequences: Sequence[TokenSequence]) -> None:
        self._folder, self._header = folder, header
        self.classes = (
            "the whole vocabulary" if header.top_k == header.vocabulary else f"the teacher's top {header.top_k} and the rest"
        )
        blocks = _blocks_of(sequences)
        self._refs = read_header(folder / LOGITS_FILE, where="--keep-teacher")
        expected = {name: (dtype, shape) for name, dtype, shape, _ in _entries(header, blocks)}
        if {name: (ref.dtype, ref.shape) for name, ref in self._refs.items()} != expected:
            raise self._damaged("tensors of other names or shapes")
        self._ends = list(accumulate(sum(len(sequence.ids) for sequence in block) for block in blocks))
        self._files = OpenFiles()

    def output_of(self, item: Item, predicted: torch.Tensor) -> TopLogits:
        """Of the predicted tokens of a batch."""
        places = item["position"][:, :-1][predicted.to(item["position"].device)].tolist()
        parts = [self._read(block, start, stop) for block, start, stop in self._runs(places)]
        device = item["input_ids"].device
        ids, log_probs, rest = (torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in _NAMES)
        finite = bool(log_probs.isfinite().all()) and not bool(rest.isnan().any())
        if not finite or int(ids.min()) < 0 or int(ids.max()) >= self._header.vocabulary:
            raise self._damaged("ids beyond the vocabulary, or values that are no number")
        return TopLogits(ids.long().to(device), log_probs.to(device), partial(self._rest, rest.to(device)))

    def _rest(self, rest_NR: torch.Tensor, temperature: float) -> torch.Tensor | None:
        if self._header.top_k == self._header.vocabulary:
            return None
        return rest_NR[:, self._header.temperatures.index(temperature)]

    def _runs(self, places: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Block, and from where to where in it: places that follow each other are read at once."""
        start = 0
        for end in range(1, len(places) + 1):
            block = bisect_right(self._ends, places[start])
            last = end == len(places) or places[end] != places[end - 1] + 1 or places[end] == self._ends[block]
            if last:
                before = self._ends[block - 1] if block else 0
                yield block, places[start] - before, places[end - 1] + 1 - before
                start = end

    def _read(self, block: int, start: int, stop: int) -> dict[str, np.ndarray]:
        found = {}
        for name in _NAMES:
            ref = self._refs[f"{name}.{block}"]
            content = self._files.read(ref, 4 * ref.shape[1] * start, 4 * ref.shape[1] * stop)
            found[name] = np.frombuffer(content, _DTYPES[name][1]).reshape(stop - start, ref.shape[1])
        return found

    def _damaged(self, found: str) -> SourceError:
        return SourceError(
            "the kept logits are damaged",
            where=str(self._folder / LOGITS_FILE),
            found=found,
            remedy="remove the folder to have it made again",
        )


Teacher: TypeAlias = LoadedTeacher | KeptTeacher
