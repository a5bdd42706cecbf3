"""The head of a loaded model: what turns last hidden states into logits.

Shape legend: D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass
class Head:
    """What turns last hidden states into logits: a linear layer, and the factor and soft cap that some families apply."""

    linear: nn.Module
    scale: float
    cap: float | None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        logits: torch.Tensor = self.linear(hidden)
        logits = logits * self.scale if self.scale != 1.0 else logits
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits

    def equals(self, other: Head) -> bool:
        """Whether both give the same logits."""
        ours, theirs = dict(self.linear.state_dict()), dict(other.linear.state_dict())
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        return same and (self.scale, self.cap) == (other.scale, other.cap)


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model."""
    config = model.config
    scaling = getattr(config, "logits_scaling", None)
    scale = 1.0 / scaling if scaling else getattr(config, "logit_scale", None) or 1.0
    return Head(model.get_output_embeddings(), float(scale), getattr(config, "final_logit_softcapping", None))
