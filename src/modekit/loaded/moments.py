"""How much an error of a module's weight changes the loss, from what a text shows of the module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.passes import check_text, losses_of
from modekit.planning.budgets import SENSITIVITY_TOKENS
from modekit.run import Run
from modekit.text.document import Document
from modekit.text.sequences import TokenSequence, encode, make_batches, none_fits

_SEQUENCE_LENGTH = 512


def sensitivities(
    model: PreTrainedModel,
    names: Sequence[str],
    sequences: Sequence[TokenSequence],
    *,
    advance: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[str, float]:
    """Module -> E[x^2] E[g^2] over a text: mean squares of a number that it reads, and of the gradient of the text's loss (in
    nats, summed over tokens) by a number that it gives. An embedding reads one 1 among V numbers.

    Sums are float64. `advance(tokens done, tokens to do)` is called after each batch. Raises TextError for text of another
    kind than the model reads.
    """
    check_text(model, sequences)
    read, given = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    outputs: dict[str, torch.Tensor] = {}
    total, done = sum(sequence.size for sequence in sequences), 0

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def listen(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            x, outputs[name] = args[0].detach(), y
            read[name] += x.numel() / module.num_embeddings if isinstance(module, nn.Embedding) else _sum_of_squares(x)

        return listen

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # so that all that follows has gradients
    try:
        for batch in make_batches(sequences, tokens=1):  # one sequence each, without pads
            loss = losses_of(model, batch).sum()
            for name, g in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
                given[name] += _sum_of_squares(g)
            outputs.clear()
            done += batch.tokens
            advance(done, total)
    finally:
        for handle in handles:
            handle.remove()
    return {name: read[name] / total * given[name] / total for name in names}


def sensitivities_on(
    folder: Path, base: Path, documents: Sequence[Document], names: Sequence[str], run: Run
) -> dict[str, float]:
    """The same of a model in a folder, over documents that the base's tokenizer reads.

    Raises SourceError, and TextError when there is nothing to read.
    """
    sequences = encode(
        load_tokenizer(base, run=run), documents, max_tokens=SENSITIVITY_TOKENS, sequence_length=_SEQUENCE_LENGTH
    )
    if not sequences:
        raise none_fits(documents, _SEQUENCE_LENGTH, where=str(folder), most=SENSITIVITY_TOKENS)
    return sensitivities(load_model(folder, run=run), names, sequences, advance=partial(run.progress, "read text"))


def _sum_of_squares(x_XI: torch.Tensor) -> float:
    """Over all tokens, of the mean over a token's numbers."""
    return float(x_XI.double().square().sum()) / x_XI.shape[-1]
