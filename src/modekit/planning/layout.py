"""What the planner asks of a shape while it lays a recipe out: names, tensors, notes. native.py and modekit.py answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from modekit.planning.plan import PlannedTensor
from modekit.planning.shape import Shape
from modekit.sources.model import TensorRef

CodeOf = Callable[[TensorRef], str]
"""The safetensors dtype of what is made from a tensor."""


class Layout(Protocol):
    """How the experts of one recipe lie in one shape of result."""

    unties: bool
    """Whether head and embedding, one tensor in the base, are two in the result."""
    router_dtype: str

    def backbone_name(self, name: str) -> str | None:
        """What a tensor of the base is called in the backbone; None when it is not kept. Raises UnsupportedError."""

    def mixed_names(self) -> set[str]:
        """Tensors of the base of which experts have their own."""

    def widened(self, tensor: PlannedTensor) -> PlannedTensor:
        """A tensor of the backbone as the result holds it: with channels besides the base's, where a router needs any."""

    def tensors(self) -> Iterable[PlannedTensor]:
        """Everything that is neither backbone nor gate."""

    def shape(self, where: str) -> Shape:
        """What the headers of the result will say; `where` names it in messages."""

    @property
    def mixes_more(self) -> str:
        """What a recipe has to say so that more parts and layers are mixed, for messages."""

    def notes(self) -> Iterable[str]:
        """What a user should know of this shape."""
