"""The head of a causal language model: what its own class makes of hidden states.

Shape legend: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from modekit.loaded.passes import backbone_of


class _Output(BaseModelOutput):  # type: ignore[misc]
    """Of a backbone: whatever else a class asks it for, there is none."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _KeptStates(nn.Module):
    """Stands where a model had its backbone, and gives the hidden states (1, N, D) that are put here."""

    hidden: torch.Tensor

    def forward(self, *_: object, **_arguments: object) -> _Output:
        """Whatever is read."""
        return _Output(last_hidden_state=self.hidden)


class Head:
    """What a model's own class makes of hidden states: a copy of the model without its backbone, of the same weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._states = _KeptStates()
        same = {id(each): each for each in model.parameters()}
        self._model = copy.deepcopy(model, {**same, id(backbone_of(model)): self._states})

    def __call__(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits (N, V)."""
        self._states.hidden = hidden_ND[None]
        ids = torch.zeros(1, len(hidden_ND), dtype=torch.int64, device=hidden_ND.device)
        logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
        return logits

    def equals(self, other: Head) -> bool:
        """Whether both give the same logits, being of experts of one base."""
        ours, theirs = self._model.state_dict(), other._model.state_dict()
        return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
