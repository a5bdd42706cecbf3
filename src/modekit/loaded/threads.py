"""Threads that share the work of a step of a small model on a processor.

A small model's products are too short to keep several cores busy with one of them at a time, and cores that wait for each
other after every product wait for whatever else the machine does. Threads with a share of a batch each wait once per step:
measured beside other work, half the processor time and less than half the wall time of two threads per product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


class Threads:
    """`count` threads, each with its part of torch's threads; 1 is the calling thread alone. Use in `with`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._torch_threads = torch.get_num_threads()
        each = max(1, self._torch_threads // count)
        self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(each,))
        if count > 1:
            torch.set_num_threads(each)  # of this thread, too: threads that wait for work would take it from the others

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self._torch_threads)

    def run(self, jobs: Iterable[Callable[[], object]]) -> None:
        """Run jobs, which must not share what they write, and wait for all."""
        for _ in self._pool.map(_call, jobs) if self.count > 1 else map(_call, jobs):
            pass

    def summed(
        self, loss_of: Callable[[int], torch.Tensor], count: int, parameters: Sequence[torch.nn.Parameter]
    ) -> torch.Tensor:
        """The sum of `count` losses, whose gradients are computed beside each other, and are there when it is given back.

        They are added in order, so that the result does not depend on which is done first.
        """

        def gradients(place: int) -> tuple[float, tuple[torch.Tensor, ...]]:
            loss = loss_of(place)
            return float(loss.detach()), torch.autograd.grad(loss, parameters, materialize_grads=True)

        first, *others = self._pool.map(gradients, range(count))
        for _, more in others:
            for whole, each in zip(first[1], more, strict=True):
                whole += each
        # A loss whose gradients are known: what is added is zero, and moves each parameter by its own.
        known = torch.stack([(each * gradient).sum() for each, gradient in zip(parameters, first[1], strict=True)]).sum()
        return first[0] + sum(loss for loss, _ in others) + (known - known.detach())


def _call(job: Callable[[], object]) -> None:
    job()
