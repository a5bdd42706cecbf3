"""A text's stream through the base model: sizes before every norm and a sample of what is read there (weights/bases.py).

Shape legend: B batch, S sequence, N tokens, T sampled tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from modekit.errors import SourceError, TextError
from modekit.loaded.load import decoder_layers, load_model, load_tokenizer
from modekit.planning.carry import STREAM_TOKENS
from modekit.planning.channels import Channels
from modekit.planning.plan import Plan
from modekit.routing.token_text import load_token_text
from modekit.run import Run
from modekit.sources.config import whole
from modekit.sources.names import in_layer
from modekit.text.held_out import fit_documents
from modekit.text.sequences import TokenSequence, encode, make_batches
from modekit.weights.bases import LayerStream, Stream

_SAMPLE, _BYTES = 1_024, 2**28
"""The most tokens, and bytes, of the sample."""
_MEASURE = "measure the stream"


def measure_stream(plan: Plan, kept: Path, run: Run) -> Stream:
    """Run the base over the beginning of every domain's fit text; where that is gone, over the tokens that `kept` has of it.

    Raises SourceError and TextError.
    """
    channels, base = plan.shape.channels, plan.sources[0]
    assert channels is not None
    model = load_model(base.folder, run=run)
    sequences = _sequences(plan, kept, model.get_input_embeddings().weight.shape[0], run)
    total = sum(each.size for each in sequences)
    layers = len(decoder_layers(model))
    width = 4 * layers * (channels.hidden + channels.heads * channels.head_dim)
    taps = _Taps(channels, every=max(1, -(-total // max(128, min(_SAMPLE, _BYTES // width)))))
    run.begin(_MEASURE, total)
    with ExitStack() as hooks, torch.inference_mode():
        taps.attach(plan, model, hooks)
        for batch in make_batches(sequences, tokens=1_024):
            taps.mask = batch.mask.bool()
            model.model(input_ids=batch.input_ids.to(model.device), attention_mask=batch.mask.long().to(model.device))
            run.progress(_MEASURE, min(total, len(torch.cat(taps.sizes["last"]))), total)
    if not torch.cat(taps.sizes["last"]).isfinite().all():
        raise SourceError(
            "the base model computes NaN or Inf",
            where=f"base_model ({base.spec})",
            remedy="the model is damaged: save or download it again",
        )
    ids = np.concatenate([np.asarray(each.ids, np.int64) for each in sequences])
    return taps.stream(layers, np.bincount(ids, minlength=whole(plan.config, "vocab_size")))


def _sequences(plan: Plan, kept: Path, rows: int, run: Run) -> list[TokenSequence]:
    """Of tokens that the base has: `rows`, which may be fewer than the mixture's."""
    tokenizer, settings = load_tokenizer(plan.sources[0].folder, run=run), plan.recipe.mixture.router
    share = max(64, STREAM_TOKENS // plan.experts)
    found: list[TokenSequence] = []
    for number, expert in enumerate(plan.recipe.experts):
        try:
            documents = fit_documents(expert, plan.root, number, reads=plan.family.reads)
        except TextError:
            text = load_token_text(kept / f"{expert.name}.safetensors", whole(plan.config, "vocab_size"))
            if text is None:
                raise
            own = (tuple(each for each in sequence.ids if each < rows) for sequence in text.beginning(share))
            found += [TokenSequence(ids, 0) for ids in own if ids]
            continue
        found += encode(tokenizer, documents, max_tokens=share, sequence_length=min(share, settings.sequence_length))
    return found


class _Taps:
    """What hooks have read, place by place; `mask` (B, S) says which tokens of the running batch are real."""

    mask: torch.Tensor

    def __init__(self, channels: Channels, *, every: int) -> None:
        self._channels, self._every = channels, every
        self.sizes: dict[str, list[torch.Tensor]] = {}
        self._samples: dict[str, list[torch.Tensor]] = {}

    def attach(self, plan: Plan, model: nn.Module, hooks: ExitStack) -> None:
        """Hooks before the norms and output projections of every layer, and before the last norm."""
        widening = self._channels.widening

        def tap(module: str, hook: Callable[[nn.Module, tuple[torch.Tensor, ...]], None]) -> None:
            hooks.enter_context(model.get_submodule(module).register_forward_pre_hook(hook))

        for layer in range(self._channels.layers):
            for name in (widening.before_attention, widening.after_attention):
                assert name is not None
                tap(in_layer(layer, name), partial(self._sized, f"{layer}.{name}", name == widening.before_attention))
            tap(in_layer(layer, plan.family.parts["o"]), partial(self._plain, f"{layer}.o"))
        tap("model.norm", partial(self._sized, "last", True))

    def _sized(self, place: str, samples: bool, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        real_ND = args[0][self.mask].float()
        sizes_N = (real_ND.square().mean(-1) + self._channels.norm_eps).sqrt()
        self.sizes.setdefault(place, []).append(sizes_N.cpu())
        if samples:
            self._samples.setdefault(place, []).append((real_ND / sizes_N[:, None])[:: self._every].cpu())

    def _plain(self, place: str, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._samples.setdefault(place, []).append(args[0][self.mask].float()[:: self._every].cpu())

    def stream(self, layers: int, counts: np.ndarray) -> Stream:
        """All of it."""
        widening = self._channels.widening

        def joined(parts: list[torch.Tensor]) -> np.ndarray:
            return torch.cat(parts).numpy()

        return Stream(
            tuple(
                LayerStream(
                    joined(self.sizes[f"{layer}.{widening.before_attention}"]),
                    joined(self.sizes[f"{layer}.{widening.after_attention}"]),
                    joined(self._samples[f"{layer}.{widening.before_attention}"]),
                    joined(self._samples[f"{layer}.o"]),
                )
                for layer in range(layers)
            ),
            joined(self._samples["last"]),
            counts,
        )
