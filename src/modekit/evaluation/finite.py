"""No figure comes from a model whose output is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from modekit.errors import CheckpointError


def not_finite(what: str, where: str) -> CheckpointError:
    """The error of a model that gives NaN or Inf."""
    return CheckpointError(f"{what} not finite", where=where, remedy="look for what is damaged with `modekit verify`")


@contextmanager
def only_finite(model: PreTrainedModel, name: str, advance: Callable[[int], object] = lambda _: None) -> Iterator[None]:
    """While open, a pass whose logits are not finite raises CheckpointError. `advance` gets the number of texts of each pass
    that does not go on from a cache.
    """

    def check(_: object, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if not torch.isfinite(output.logits).all():
            raise not_finite("what the model says is", name)
        ids_BS = arguments[0] if arguments else keywords.get("input_ids")
        if ids_BS is not None and ids_BS.shape[1] > 1:
            advance(len(ids_BS))

    hook = model.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
