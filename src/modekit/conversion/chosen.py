"""How often a text chooses each expert of a plain mixture, and the loss on it.

Shape legend: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from modekit.conversion.near import Array64
from modekit.evaluation.domains import Domain
from modekit.evaluation.loss import score_domain
from modekit.loaded.load import decoder_layers, load_model, load_tokenizer
from modekit.run import Run
from modekit.sources.native_row import Native
from modekit.text.held_out import read_text
from modekit.text.sequences import TokenSequence, encode

_LENGTH, _SHORTEST = 512, 64


@dataclass(frozen=True)
class MeasuredMixture:
    """`counts_LE`: tokens of the fit split that chose each expert; `loss`: of the report split, None where that is empty."""

    counts_LE: Array64
    loss: float | None
    held_out: Domain

    def loss_of(self, folder: Path, run: Run) -> float | None:
        """Of another model on the same held-out text."""
        return _loss(load_model(folder, run=run), self.held_out)


def measure_text(
    folder: Path, native: Native, texts: Sequence[str], root: Path, tokens: int, run: Run
) -> MeasuredMixture | None:
    """Run a mixture over some of a text; None without text. Raises TextError."""
    if not texts:
        return None
    tokenizer, share = load_tokenizer(folder, run=run), max(_SHORTEST, tokens // len(texts))
    fit, shown = list[TokenSequence](), list[TokenSequence]()
    for text in (read_text([spec], root=root, where="--text") for spec in texts):  # each has the same share
        fit += encode(tokenizer, text.fit(), max_tokens=share, sequence_length=_LENGTH)
        shown += encode(tokenizer, text.report(), max_tokens=share, sequence_length=_LENGTH)
        if not fit:
            raise text.nothing_left("no document is left to read")
    model, held_out = load_model(folder, run=run), Domain("held-out", None, shown)
    run.begin("read the text")
    counts = _counts(model, native, Domain("text", None, fit))
    return MeasuredMixture(counts, _loss(model, held_out), held_out)


def _counts(model: PreTrainedModel, native: Native, text: Domain) -> Array64:
    layers = decoder_layers(model)
    counts_LE = torch.zeros(len(layers), int(getattr(model.config, native.num_experts_key)), dtype=torch.float64)

    def count(layer: int, chosen: torch.Tensor) -> None:
        counts_LE[layer] += torch.bincount(chosen.flatten().cpu(), minlength=counts_LE.shape[1])

    def listening(layer: int, router: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return router.register_forward_hook(lambda _module, _args, output: count(layer, output[-1]))

    handles = [listening(place, layer.get_submodule(native.router_module)) for place, layer in enumerate(layers)]
    try:
        score_domain(model, text, lambda _tokens: None)
    finally:
        for handle in handles:
            handle.remove()
    return counts_LE.numpy()


def _loss(model: PreTrainedModel, text: Domain) -> float | None:
    return score_domain(model, text, lambda _tokens: None).loss if text.sequences else None
