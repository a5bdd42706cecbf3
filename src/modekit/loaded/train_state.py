"""The state of a next-token training between two steps, so that a kill does not lose all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

_RANDOM = "random"
Parameters = Sequence[torch.nn.Parameter]
Optimizers = Sequence[torch.optim.Optimizer]


@dataclass(frozen=True)
class TrainState:
    """The loss of every step so far, and as tensors: what moves, what the optimisers know, torch's random state."""

    losses: list[float]
    tensors: Mapping[str, torch.Tensor]


class States(Protocol):
    """Where a training keeps its states."""

    def restore(self, parameters: Parameters, optimizers: Optimizers) -> list[float]:
        """Put the last state back, and return the losses so far; none where there is no state."""

    @property
    def is_due(self) -> bool:
        """Whether a state should be kept now."""

    def keep(self, state: TrainState) -> None:
        """Keep a state in place of those before it."""


class NoStates:
    """A training that begins anew after a kill."""

    is_due = False

    def restore(self, parameters: Parameters, optimizers: Optimizers) -> list[float]:
        """No losses."""
        return []

    def keep(self, state: TrainState) -> None:
        """Keep nothing."""


NO_STATES = NoStates()


def take_state(parameters: Parameters, optimizers: Optimizers, losses: Sequence[float]) -> TrainState:
    """The state as it is now."""
    tensors = {f"parameter.{place}": parameter.detach() for place, parameter in enumerate(parameters)}
    for number, optimizer in enumerate(optimizers):
        for place, known in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{place}.{name}": tensor for name, tensor in known.items()}
    return TrainState(list(losses), {**tensors, _RANDOM: torch.get_rng_state()})


def restore(state: TrainState, parameters: Parameters, optimizers: Optimizers) -> list[float]:
    """Put a state back, and return the losses so far. Raises ValueError or LookupError for one of another training."""
    for place, parameter in enumerate(parameters):
        found = state.tensors.get(f"parameter.{place}")
        if found is None or found.shape != parameter.shape or not torch.isfinite(found).all():
            raise ValueError(f"parameter {place} is not there, of another shape, or not finite")
        parameter.data.copy_(found)
    for number, optimizer in enumerate(optimizers):
        owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        known: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in state.tensors.items():
            kind, _, rest = name.partition(f".{number}.")
            if kind == "optimizer":
                owner, _, what = rest.partition(".")
                if tensor.shape not in {owned[int(owner)].shape, torch.Size([])} or not torch.isfinite(tensor).all():
                    raise ValueError(f"{name} is of another shape, or not finite")
                known.setdefault(int(owner), {})[what] = tensor
        if len(known) != len(owned):
            raise ValueError(f"optimiser {number} knows {len(known)} of {len(owned)} parameters")
        optimizer.load_state_dict({**optimizer.state_dict(), "state": known})
    torch.set_rng_state(state.tensors[_RANDOM])
    return list(state.losses)
