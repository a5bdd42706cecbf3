"""What the routers of one model share during a forward pass.

Shape legend: B batch, S sequence, G rows of the gate, E experts, O output features.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

_OF_A_PASS = ("listener", "keeper")  # what no copy of a model takes with it
_HELD = (
    "mask_BS",
    "ids_BS",
    "shape_BS",
    "sequences",
    "states",
    "forced",
    "encoding",
    "source_ids_BS",
    "source_mask_BS",
    "source_weights",
    "target_weights",
)


class Keeper(Protocol):
    """An engine that has tokens of many sequences in one row, and keeps what routers remember of each beside its keys and
    values. `key` names what is remembered.
    """

    def sums(self, key: str, values_BSG: torch.Tensor, decay: float, prefix: int | None) -> torch.Tensor:
        """What `causal_sums` gives for each sequence."""

    def ngram_rows(self, key: str, ids_BS: torch.Tensor, order: int, buckets: int) -> torch.Tensor:
        """What `ngram_rows` gives for each sequence."""


class Flow:
    """What the routers of one model share during a forward pass.

    Attributes:
        averages: whether any router averages over tokens.
        ids_BS: token ids of this pass; None when embeddings were given in their place.
        mask_BS: real tokens of this pass; None when all are.
        shape_BS: rows and tokens of this pass.
        padding: what generate says of pads (of a target), on its way past a family's own classes.
        kept: places of the tokens whose logits are asked for, when they were named one by one.
        states: router place -> state before this pass (from the cache).
        fresh: router place -> state after it.
        cache: of keys and values, as the pass was given it.
        forced: an expert's place, or one per sequence (B,), that gets all weight whatever the routers say.
        left_out: place of an expert that gets no weight; the routers choose among the others.
        listener: called with a router's place and its logits (B, S, E) or (B, S, O, E), when somebody wants to know them.
        keeper: who remembers in place of `states`, where an engine runs the model.
        common: weight of the base's own decoder beside the experts; 0.0 without one (modeling_modekit.py).
        beside: with `forced`: whether the common expert takes part all the same.
        sequences: B, while every sequence of the pass stands in the batch twice; None while it stands there once.
        pair: whether the model has an encoder (modekit_pairs.py). Then `encoding` says whether that is what runs, and routers
            that read ids read those of the source, `source_ids_BS`, whose real tokens are in `source_mask_BS` (None: all), and
            where one router serves all places, `source_weights` (B, 1, E) is what it decided in the encoder.
            `target_weights` (B, 1, E) stand in the decoder for all that was decided, with `forced`, whatever read the source.
        mixed: place -> its module.
    """

    encoding = False
    source_ids_BS: torch.Tensor | None = None
    source_mask_BS: torch.Tensor | None = None
    source_weights: torch.Tensor | None = None
    target_weights: torch.Tensor | None = None
    averages = False
    ids_BS: torch.Tensor | None = None
    mask_BS: torch.Tensor | None = None
    shape_BS: tuple[int, int] | None = None
    kept: torch.Tensor | None = None
    cache: Any = None
    forced: int | torch.Tensor | None = None
    left_out: int | None = None
    keeper: Keeper | None = None
    common = 0.0
    beside = False
    sequences: int | None = None
    listener: Callable[[str, torch.Tensor], None] | None = None

    def __init__(self, *, pair: bool = False) -> None:
        self.pair = pair
        self.mixed: dict[str, Any] = {}
        self.padding: dict[str, Any] = {}
        self.states: dict[str, torch.Tensor] = {}
        self.fresh: dict[str, torch.Tensor] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: value for key, value in self.__dict__.items() if key != "_lock"}
        return kept | dict.fromkeys(_OF_A_PASS)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def one_pass(self) -> AbstractContextManager[object]:
        """Held during a forward pass: two threads take turns, since a pass leaves its decisions in the modules."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    @property
    def streams(self) -> int:
        """How often every sequence stands in a pass's batch."""
        return 2 if self.common and (self.forced is None or self.beside) else 1

    @property
    def alone(self) -> int | None:
        """Place of the expert that has all weight in every token of this pass; None where routers or sequences differ."""
        return self.forced if isinstance(self.forced, int) and self.sequences is None else None

    def held(self) -> dict[str, Any]:
        """What a layer that is run again, for its gradient, must find as it was."""
        return {name: getattr(self, name) for name in _HELD}

    def hold(self, held: dict[str, Any]) -> None:
        """Be as one was."""
        self.__dict__.update(held)

    @contextmanager
    def changed(self, **attributes: Any) -> Iterator[None]:
        """While open, some attributes have other values."""
        before = {name: getattr(self, name) for name in attributes}
        self.hold(attributes)
        try:
            yield
        finally:
            self.hold(before)


class Recomputing:
    """Gradient checkpointing whose second run of a layer finds the masks, states and decisions of the first one's pass."""

    def __init__(self, flow: Flow, checkpoint: Callable[..., Any]) -> None:
        self._flow = flow
        self._checkpoint = checkpoint

    def __call__(self, layer: Callable[..., Any], *args: Any) -> Any:
        """As the checkpoint's own function is called."""
        flow = self._flow
        held = flow.held()
        weights = {name: mixed.weights for name, mixed in flow.mixed.items()}

        def run(*args: Any) -> Any:
            now = flow.held()
            flow.hold(held)
            for name, mixed in flow.mixed.items():
                mixed.weights = weights[name]
            try:
                return layer(*args)
            finally:
                flow.hold(now)

        return self._checkpoint(run, *args)
