"""A loaded mixture, whatever its shape: its gates, and routers that are overruled or traced for a while.

native.py and shapes.py answer for the shapes; the latter has the table of them.

Shape legend: B batch, S sequence, T target of a pair, D width, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint


class RouterTrace:
    """Logits of the last pass, per router slot, float32, with their graph: (B, S, E), or (B, S, O, E) per feature.

    In the decoder of a model with an encoder S is the target's; where a router decides once for a whole source it is 1.
    """

    def __init__(self, slots: int, gates: list[nn.Parameter] | None) -> None:
        self._gates = gates
        self.said: list[torch.Tensor | None] = [None] * slots

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Logits in the order of the slots, of the routers that have run."""
        return (logits for _, logits in self.by_slot())

    def inner(self) -> Iterator[torch.Tensor]:
        """Where the base is a mixture itself, and its experts are of every one of the recipe's: their weights, (..., M)."""
        return iter(())

    def by_slot(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The same with the number of each slot."""
        for slot, said in enumerate(self.said):
            if said is not None:
                gate = None if self._gates is None else self._gates[slot]
                yield slot, said if gate is None else nn.functional.linear(said.float(), _whole(gate).float())


def _whole(gate: Any) -> torch.Tensor:
    """A gate of which this process may hold a shard; its gradient is the processes' mean, as that of the sharded pass is."""
    whole: torch.Tensor = gate
    if hasattr(gate, "full_tensor"):
        from torch.distributed.tensor import Partial

        whole = gate.full_tensor(grad_placements=[Partial("avg")] * gate.device_mesh.ndim)
    return whole


@dataclass(frozen=True)
class LoadedMixture(ABC):
    """A model that transformers has loaded from a checkpoint."""

    model: PreTrainedModel
    checkpoint: Checkpoint

    @abstractmethod
    def gates(self) -> list[nn.Parameter]:
        """The gate of every router slot, in the order of the slots."""

    @abstractmethod
    def experts(self) -> Iterator[nn.Parameter]:
        """What each expert has of its own."""

    def constants(self) -> Iterator[nn.Parameter]:
        """What the architecture wants and must stay zero."""
        return iter(())

    def own_corner(self, name: str, parameter: nn.Parameter) -> tuple[slice, ...] | None:
        """The rows and columns of a parameter that the base has, too; None: all of it. What is behind them stays as built."""
        return None

    @abstractmethod
    def ffn(self, layer: nn.Module) -> nn.Module:
        """What stands where a decoder layer of the family has its FFN."""

    def prepare_training(self) -> None:  # noqa: B027
        """Take the way to compute the experts that is fastest in training on this machine."""

    @abstractmethod
    def set_top_k(self, top_k: int | None) -> None:
        """Let every router choose `top_k` experts per token; None: as many as the checkpoint says. The config stays."""

    @abstractmethod
    def forced(self, expert: int) -> AbstractContextManager[None]:
        """While open, every router gives all weight to one expert."""

    def on_own_text(self, expert: int) -> AbstractContextManager[None]:
        """While open, text goes to one expert (-1: to none) as if the routers had chosen it: a common expert takes part."""
        return self.forced(expert)

    def without_common(self) -> AbstractContextManager[None]:
        """While open, the chosen experts have no common one beside them."""
        return nullcontext()

    @abstractmethod
    def left_out(self, expert: int) -> AbstractContextManager[None]:
        """While open, every router chooses among the other experts, whose weights sum to one again."""

    @abstractmethod
    def traced(self) -> AbstractContextManager[RouterTrace]:
        """While open, every pass leaves its routers' logits in the trace."""


class ExpertView(Protocol):
    """A checkpoint as a model that is one expert at a time: it computes what the mixture does whose routers always take that
    expert (promise 2).
    """

    model: PreTrainedModel

    def use_expert(self, expert: int) -> None:
        """Be expert `expert` (index in recipe order)."""

    def router_inputs(self) -> list[nn.Module]:
        """Per router slot, a module whose first argument is what the router reads, (B, S, D), or of a target (B, T, D)."""

    def in_decoder(self) -> list[bool]:
        """Per router slot, whether it reads tokens of the target, as most routers in the decoder of a model with an encoder."""
