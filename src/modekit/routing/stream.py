"""A text's stream through the base, or through each expert: sizes before every norm, and a sample of what is read there
(weights/bases.py).

Shape legend: B batch, S sequence, N tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.errors import SourceError, TextError
from modekit.loaded.layers import LayerByLayer, Weights
from modekit.loaded.load import decoder_layers, load_tokenizer, not_loaded
from modekit.loaded.passes import removed
from modekit.planning.carry import LOST_TOKENS, PIECE_TOKENS, SAMPLE_BYTES, SAMPLE_TOKENS, STREAM_TOKENS
from modekit.planning.plan import Plan
from modekit.routing.token_text import load_token_text
from modekit.run import Run
from modekit.sources.config import whole
from modekit.sources.names import EMBEDDING, in_layer, weight_of
from modekit.text.document import Document
from modekit.text.held_out import fit_documents
from modekit.text.sequences import TokenSequence, encode, make_batches
from modekit.weights.bases import LayerStream, Stream, principal_rows

_LAST = "model.norm"
Cut = Callable[[int, int], list[TokenSequence]]
"""At most so many tokens of a document, in pieces of at most so many."""


def measure_stream(
    plan: Plan, weights: Callable[[int], Weights], texts: Sequence[Sequence[TokenSequence]], run: Run, *, own: bool
) -> Stream:
    """Run the base, whose numbers are `weights` of -1, over the texts of all domains. With `own` each expert reads its own
    text instead. Raises SourceError.
    """
    channels = plan.shape.channels
    assert channels is not None
    by_layers = base_by_layers(plan)
    model = by_layers.model
    widening, layers = channels.widening, range(len(decoder_layers(model)))
    before, after, output = (
        [in_layer(layer, str(part)) for layer in layers]
        for part in (widening.before_attention, widening.after_attention, plan.family.decoder.parts["o"])
    )
    width = 4 * len(layers) * (channels.hidden + channels.heads * channels.head_dim)
    most = max(128, min(SAMPLE_TOKENS, SAMPLE_BYTES // width))
    taps = _Taps(channels.norm_eps, [*before, *after, _LAST], [*before, *output, _LAST], most)
    stage, whole_text = f"read the text with {'the experts' if own else 'the base'}", [each for text in texts for each in text]
    run.begin(stage, total := sum(each.size for each in whole_text))
    for reader, read in enumerate(texts) if own else [(-1, whole_text)]:
        by_layers.use(weights(reader))
        for done in taps.run(model, read, plan.sources[1 + reader].where):
            run.progress(stage, min(done, total), total)
        if own:
            taps.condense(max(1, most // len(texts)))
    sizes, samples = ({name: torch.cat(parts) for name, parts in each.items()} for each in (taps.sizes, taps.samples))
    tokens = [token for each in whole_text for token in each.ids]
    return Stream(
        tuple(
            LayerStream(sizes[first].numpy(), sizes[second].numpy(), samples[first].numpy(), samples[third].numpy())
            for first, second, third in zip(before, after, output, strict=True)
        ),
        samples[_LAST].numpy(),
        np.bincount(tokens, minlength=whole(plan.config, "vocab_size")),
    )


def base_by_layers(plan: Plan) -> LayerByLayer:
    """The base, without weights yet. Raises SourceError."""
    base = plan.sources[0]
    try:
        return LayerByLayer(base.on_disk or base.config, {})
    except Exception as error:  # by what a config says, anything may go wrong
        raise not_loaded(base.where, error) from None


class _Taps:
    """What modules read: of some the size of every token, and of some a sample, at size 1 where it is known."""

    def __init__(self, norm_eps: float, sized: Sequence[str], sampled: Sequence[str], most: int) -> None:
        self._norm_eps, self._most = norm_eps, most
        self.sizes: dict[str, list[torch.Tensor]] = {name: [] for name in sized}
        self.samples: dict[str, list[torch.Tensor]] = {name: [] for name in sampled}
        self._condensed = 0

    def run(self, model: PreTrainedModel, sequences: Sequence[TokenSequence], where: str) -> Iterator[int]:
        """Let a model read; about so many tokens at most are sampled. Yields how many were read in all. Raises SourceError."""
        every, masks = max(1, -(-sum(each.size for each in sequences) // self._most)), list[torch.Tensor]()

        def tap(name: str, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x_ND = args[0][masks[-1]].float()
            if name in self.sizes:
                size_N = (x_ND.square().mean(-1) + self._norm_eps).sqrt()
                self.sizes[name].append(size_N.cpu())
                x_ND = x_ND / size_N[:, None]
            if name in self.samples:
                self.samples[name].append(x_ND[::every].clone().cpu())  # a view would keep all

        names = {**self.sizes, **self.samples}
        with removed([model.get_submodule(name).register_forward_pre_hook(partial(tap, name)) for name in names]):
            for batch in make_batches(sequences, tokens=1_024):
                masks.append(batch.mask.bool())
                with torch.inference_mode():
                    model.model(input_ids=batch.input_ids.to(model.device), attention_mask=batch.mask.long().to(model.device))
                if not self.sizes[_LAST][-1].isfinite().all():
                    raise SourceError(
                        "the model computes NaN or Inf",
                        where=where,
                        remedy="the model is damaged: save or download it again",
                    )
                yield sum(map(len, self.sizes[_LAST]))

    def condense(self, rows: int) -> None:
        """Keep so many rows of what was sampled since the last time."""
        for parts in self.samples.values():
            sample = torch.cat(parts[self._condensed :]).numpy()
            parts[self._condensed :] = [torch.from_numpy(principal_rows(sample, rows))]
        self._condensed += 1


class MeasuredText(NamedTuple):
    """Of one domain's fit text: what sets what is carried, and pieces of other documents, on which is measured what is lost."""

    setting: list[TokenSequence]
    pieces: list[TokenSequence]


def read_texts(plan: Plan, kept: Path, run: Run) -> list[MeasuredText]:
    """Of every domain, by its fit text, or, where that is gone, by the tokens that `kept` has of it; all are known to the base.
    Raises TextError.
    """
    tokenizer, vocabulary = load_tokenizer(plan.sources[0].folder, run=run), whole(plan.config, "vocab_size")
    rows = plan.sources[0].tensor(weight_of(EMBEDDING)).shape[0]
    share, texts = max(64, STREAM_TOKENS // plan.shape.experts), list[MeasuredText]()
    longest = min(share, plan.recipe.mixture.router.sequence_length)
    for number, expert in enumerate(plan.recipe.experts):
        try:
            documents = fit_documents(expert, plan.root, number, reads=plan.family.reads)
        except TextError:
            text = load_token_text(kept / f"{expert.name}.safetensors", vocabulary)
            if text is None:
                raise
            cuts: list[Cut] = [partial(_cut, ids[ids < rows]) for ids, _ in text.sequences()]
        else:
            cuts = [partial(_encoded, tokenizer, document) for document in documents]
        texts.append(_measured_text(cuts, share, longest))
    return texts


def _encoded(tokenizer: PreTrainedTokenizerBase, document: Document, tokens: int, longest: int) -> list[TokenSequence]:
    return encode(tokenizer, [document], max_tokens=tokens, sequence_length=longest)


def _cut(ids: torch.Tensor, tokens: int, longest: int) -> list[TokenSequence]:
    parts = [part.tolist() for part in torch.split(ids[:tokens], longest)]
    return [TokenSequence(tuple(part)) for part in parts if len(part) > 1]


def _measured_text(documents: Sequence[Cut], share: int, longest: int) -> MeasuredText:
    """The first `share` tokens, and pieces of the documents behind; of those before where these are too few."""
    setting, left, used = list[TokenSequence](), share, 0
    while left > 1 and used < len(documents):
        sequences = documents[used](left, longest)
        setting += sequences
        left -= sum(sequence.size for sequence in sequences)
        used += 1
    others = (*documents[used:], *reversed(documents[:used]))
    return MeasuredText(setting, _in_turn(cut(LOST_TOKENS, PIECE_TOKENS) for cut in others))


def _in_turn(by_document: Iterable[Sequence[TokenSequence]]) -> list[TokenSequence]:
    """LOST_TOKENS or more: a piece of each document, each from another part of it, before there is a second one of any."""
    rotated, total = list[Sequence[TokenSequence]](), 0
    for number, own in enumerate(by_document):
        first = number % max(1, len(own))
        rotated.append([*own[first:], *own[:first]])
        total += sum(piece.size for piece in own[:1])
        if total >= LOST_TOKENS:
            break
    return [piece for turn in zip_longest(*rotated) for piece in turn if piece is not None]
