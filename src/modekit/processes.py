"""One process of several that a launcher (torchrun, accelerate launch) started, or the only one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Processes:
    """The `rank` of this process among `count`."""

    rank: int
    count: int

    @property
    def is_main(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every process's tensor, in its dtype, on its device."""
        if self.count == 1:
            return tensor
        import torch.distributed

        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        summed = tensor.to(device, copy=True)
        torch.distributed.all_reduce(summed)
        return summed.to(tensor.device)

    def agree(self, value: Any) -> Any:
        """The main process's value."""
        if self.count == 1:
            return value
        import torch.distributed

        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.barrier()


ALONE = Processes(0, 1)


def launched() -> int:
    """How many processes a launcher started, from its environment; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def prints() -> bool:
    """Whether this process, by its environment, is the one of all that prints."""
    return launched() == 1 or int(os.environ.get("RANK") or 0) == 0


@cache
def processes() -> Processes:
    """Join the other processes, once."""
    if launched() == 1:
        return ALONE
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return Processes(state.process_index, state.num_processes)
