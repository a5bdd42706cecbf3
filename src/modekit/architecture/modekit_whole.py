"""What whole models with an encoder have besides layers of linear maps and norms: one embedding that encoder and decoder
share, positions that know of no sequences, a bias behind the head.

Shape legend: B batch, S sequence, D width, E experts, Q and K tokens that attend and are attended to, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .modekit_mixed import Mixed


class MixedPositions(Mixed):
    """Learned positions: a stack asks for those of all tokens at once, (1, S, D) or (B, S, D), whatever the tokens are."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(B, S, D); of one expert alone what its own module says."""
        return self._by_sequence(lambda module: module(*args, **kwargs), lambda y, weight_B: weight_B[:, None, None] * y)

    def _by_sequence(
        self, call: Callable[[nn.Module], torch.Tensor], weighted: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The sum over the modules that some sequence gives weight, of what each says and its weight (B,) per sequence."""
        alone = self.flow.alone
        if alone is not None:
            return call(self._module_of(alone))
        parts = self._parts(self._decided(self.weight)[:, 0])  # offloaded weights are nowhere until a module is called
        total: torch.Tensor | None = None
        for module, weight_B in parts:
            if torch.compiler.is_compiling() or bool(weight_B.any()) or (total is None and module is parts[-1][0]):
                y = call(module)
                y = weighted(y, weight_B.to(y))
                total = y if total is None else total + y
        assert total is not None
        return total


class MixedBuckets(MixedPositions):
    """Relative positions as T5 has them: a bias per head for the bucket of every distance, the same for all sequences."""

    def forward(self, buckets_QK: torch.Tensor) -> torch.Tensor:
        """(Q, K, B H), or (Q, K, H) of one expert alone; see `bias_by_sequence`."""
        return self._by_sequence(
            lambda module: module(buckets_QK), lambda y, weight_B: (weight_B[:, None] * y[:, :, None]).flatten(2)
        )


def bias_by_sequence(attention: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """In place of T5's `compute_bias`, which makes (1, H, Q, K): (B, H, Q, K) where sequences differ.

    The attention is a bound argument, which is copied with the model: a copy has its own.
    """
    bias = type(attention).compute_bias(attention, *args, **kwargs)
    of_sequences: torch.Tensor = bias.unflatten(1, (-1, attention.n_heads))[0]
    return of_sequences


class SharedEmbedding(nn.Module):
    """What encoder and decoder call their embedding, where it is the model's one: a place, whose tensors have one name."""

    def __init__(self, mixed: Mixed) -> None:
        super().__init__()
        self._mixed = [mixed]  # in a list, so that it is no attribute that saving or moving the module could touch

    @property
    def weight(self) -> torch.Tensor:
        """As the place says."""
        return self._mixed[0].weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, S) -> (B, S, D)."""
        y: torch.Tensor = self._mixed[0](ids)
        return y


class BiasedHead(nn.Module):
    """A head with the bias that the model would add to its logits, so that experts have both of their own."""

    def __init__(self, head: nn.Linear, bias_1V: torch.Tensor) -> None:
        super().__init__()
        self.in_features = head.in_features
        self.out_features = head.out_features
        self.weight = head.weight
        self.final_logits_bias = nn.Buffer(bias_1V.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, S, V), bit for bit as the model does in two steps."""
        return nn.functional.linear(x, self.weight) + self.final_logits_bias


KINDS: dict[str, type[Mixed]] = {
    "embed_positions": MixedPositions,
    "relative_attention_bias": MixedBuckets,
}
"""Last part of a place's name -> its class, where it is no plain one."""


def own_head(model: Any) -> None:
    """Let a model's head be a module of its own, with the bias of its logits, so that it can be a place."""
    head = model.lm_head
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    bias = getattr(model, "final_logits_bias", None)
    if bias is not None:
        model.lm_head = BiasedHead(head, bias)
        model.final_logits_bias = nn.Buffer(torch.zeros_like(bias), persistent=False)


def connect(model: Any, mixed: dict[str, Mixed]) -> None:
    """Let encoder and decoder use the places that are not where they look: the shared embedding, relative positions.

    Weights that were one are tied no more where one of them is a place.
    """
    shared = next((place for name, place in mixed.items() if name.rpartition(".")[2] == "shared"), None)
    if shared is not None:
        for stack in (model.get_encoder(), model.get_decoder()):
            stack.embed_tokens = SharedEmbedding(shared)
    for name, place in mixed.items():
        if isinstance(place, MixedBuckets):
            attention = model.get_submodule(name.rpartition(".")[0])
            attention.compute_bias = partial(bias_by_sequence, attention)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for prefix, part in model.named_modules():
        ties = part._tied_weights_keys if isinstance(part, PreTrainedModel) else None
        if ties:
            under = f"{prefix}." if prefix else ""
            part._tied_weights_keys = {key: to for key, to in ties.items() if {under + key, under + to} <= names}
