"""A text's stream through the base model: sizes before every norm and a sample of what is read there (weights/bases.py).

Shape legend: B batch, S sequence, N tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from modekit.errors import SourceError, TextError
from modekit.loaded.layers import LayerByLayer, by_layer
from modekit.loaded.load import decoder_layers, load_tokenizer, not_loaded, read_tensor
from modekit.loaded.passes import removed
from modekit.planning.carry import SAMPLE_BYTES, SAMPLE_TOKENS, STREAM_TOKENS
from modekit.planning.plan import Plan
from modekit.routing.token_text import load_token_text
from modekit.run import Run
from modekit.sources.config import whole
from modekit.sources.contents import OpenFiles
from modekit.sources.names import in_layer
from modekit.text.held_out import fit_documents
from modekit.text.sequences import TokenSequence, encode, make_batches
from modekit.weights.bases import LayerStream, Stream

_MEASURE, _LAST = "read the text with the base", "model.norm"


def measure_stream(plan: Plan, kept: Path, run: Run) -> Stream:
    """Run the base over the beginning of every domain's fit text; where that is gone, over the tokens that `kept` has of it.

    Raises SourceError and TextError.
    """
    channels, base = plan.shape.channels, plan.sources[0]
    assert channels is not None
    by_layers = base_by_layers(plan)
    model = by_layers.model
    sequences = [each for own in beginnings(plan, kept, model.get_input_embeddings().weight.shape[0], run) for each in own]
    widening, layers = channels.widening, range(len(decoder_layers(model)))
    before, after, output = (
        [in_layer(layer, str(part)) for layer in layers]
        for part in (widening.before_attention, widening.after_attention, plan.family.decoder.parts["o"])
    )
    width = 4 * len(layers) * (channels.hidden + channels.heads * channels.head_dim)
    taps = _Taps(channels.norm_eps, [*before, *after, _LAST], [*before, *output, _LAST])
    with OpenFiles() as opened:
        names = by_layer(plan.family.own_names(base))
        by_layers.use(lambda layer: ((each, read_tensor(opened, base.tensors[each]).float()) for each in names.get(layer, [])))
        taps.run(model, sequences, max(128, min(SAMPLE_TOKENS, SAMPLE_BYTES // width)), run)
    sizes, samples = ({name: torch.cat(parts) for name, parts in each.items()} for each in (taps.sizes, taps.samples))
    if not sizes[_LAST].isfinite().all():
        remedy = "the model is damaged: save or download it again"
        raise SourceError("the base model computes NaN or Inf", where=base.where, remedy=remedy)
    return Stream(
        tuple(
            LayerStream(sizes[first].numpy(), sizes[second].numpy(), samples[first].numpy(), samples[third].numpy())
            for first, second, third in zip(before, after, output, strict=True)
        ),
        samples[_LAST].numpy(),
        np.bincount([token for each in sequences for token in each.ids], minlength=whole(plan.config, "vocab_size")),
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

    def __init__(self, norm_eps: float, sized: Sequence[str], sampled: Sequence[str]) -> None:
        self._norm_eps = norm_eps
        self.sizes: dict[str, list[torch.Tensor]] = {name: [] for name in sized}
        self.samples: dict[str, list[torch.Tensor]] = {name: [] for name in sampled}

    def run(self, model: PreTrainedModel, sequences: Sequence[TokenSequence], most: int, run: Run) -> None:
        """Let a model read; the sample has about so many tokens at most."""
        total, masks = sum(each.size for each in sequences), list[torch.Tensor]()
        every = max(1, -(-total // most))

        def tap(name: str, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x_ND = args[0][masks[-1]].float()
            if name in self.sizes:
                sizes_N = (x_ND.square().mean(-1) + self._norm_eps).sqrt()
                self.sizes[name].append(sizes_N.cpu())
                x_ND = x_ND / sizes_N[:, None]
            if name in self.samples:
                self.samples[name].append(x_ND[::every].clone().cpu())  # a view would keep all

        run.begin(_MEASURE, total)
        names = {**self.sizes, **self.samples}
        with removed([model.get_submodule(name).register_forward_pre_hook(partial(tap, name)) for name in names]):
            for batch in make_batches(sequences, tokens=1_024):
                masks.append(batch.mask.bool())
                with torch.inference_mode():
                    model.model(input_ids=batch.input_ids.to(model.device), attention_mask=batch.mask.long().to(model.device))
                run.progress(_MEASURE, min(total, sum(map(len, self.sizes[_LAST]))), total)


def beginnings(plan: Plan, kept: Path, rows: int, run: Run, most: int = STREAM_TOKENS) -> list[list[TokenSequence]]:
    """Of every domain's fit text at most so many tokens, all of which the base has: `rows`, perhaps fewer than the mixture's.
    Raises TextError.
    """
    tokenizer, settings = load_tokenizer(plan.sources[0].folder, run=run), plan.recipe.mixture.router
    share = min(most, max(64, STREAM_TOKENS // plan.shape.experts))
    found: list[list[TokenSequence]] = []
    for number, expert in enumerate(plan.recipe.experts):
        try:
            documents = fit_documents(expert, plan.root, number, reads=plan.family.reads)
        except TextError:
            text = load_token_text(kept / f"{expert.name}.safetensors", whole(plan.config, "vocab_size"))
            if text is None:
                raise
            own = (tuple(each for each in sequence.ids if each < rows) for sequence in text.beginning(share))
            found.append([TokenSequence(ids) for ids in own if ids])
            continue
        found.append(encode(tokenizer, documents, max_tokens=share, sequence_length=min(share, settings.sequence_length)))
    return found
