"""A mixture of the modekit architecture as vLLM's own class; imported by vLLM alone (see vllm_plugin.py).

vLLM puts the new tokens of many requests into one row, and the keys and values of each token into a slot of a paged cache. What
a router remembers of a text after a token is kept under the number of the token's slot. So it goes wherever the keys go: into
prefixes that requests share, over pre-emptions, from one chunk of a long prompt to the next.

A request may share what another one computes in the very same pass: attention writes all keys before it reads any, and states
are taken in the order in which they follow from each other.

Shape legend: B sequences, S tokens of each in this pass, T tokens of the row, G values, W numbers of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.transformers import TransformersForCausalLM

from modekit.architecture.modekit_router import causal_sums, ngram_rows
from modekit.files.typed import as_kind
from modekit.planning.mixture_config import MixtureConfig

_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""Attention backends that say where each request's tokens lie."""
Step = Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
"""From values (B, S, ...) and the state before them (B, W): results (B, S, ...), and the state after each token (B, S, W)."""


class ModekitForCausalLM(TransformersForCausalLM):  # type: ignore[misc]
    """The mixture's transformers modules under vLLM's attention, linear layers and head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.logits_processor.scale /= getattr(self.config, "logits_scaling", 1.0)  # Granite's, which vLLM leaves out
        flow = self.model.flow
        if as_kind(self.config.modekit, MixtureConfig).routing.remembers:
            from vllm.model_executor.layers.attention import Attention

            attention = next(module for module in self.model.modules() if isinstance(module, Attention))
            backend = attention.attn_backend.get_name()
            if backend not in _BACKENDS:
                raise ValueError(
                    f"vLLM cannot serve this mixture's router with {backend}: start it with --attention-backend, "
                    f"one of {', '.join(_BACKENDS)}"
                )
            flow.keeper = attention.modekit_slots = Slots(attention.layer_name, vllm_config)


class PassMetadata(Protocol):
    """What an attention backend knows of a pass."""

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor


@dataclass(frozen=True)
class PassLayout:
    """Where the tokens of a pass belong.

    Attributes:
        groups: of sequences that have as many tokens in this pass: places in the row (B, S), and the slot of the token before
            each (B,), -1 at the beginning of a text. Whoever goes on from a token of this pass stands after it.
        slots: of each token (T,).
    """

    groups: Sequence[tuple[torch.Tensor, torch.Tensor]]
    slots: torch.Tensor


def layout_of(metadata: PassMetadata, block_size: int) -> PassLayout:
    """Where tokens belong, from what an attention backend knows of a pass. Raises RuntimeError where its blocks are not
    numbered as here.
    """
    starts = metadata.query_start_loc.long()
    counts = starts.diff()
    first = metadata.seq_lens.long()[: len(counts)] - counts  # position of each sequence's first token in this pass
    slots = metadata.slot_mapping.long()
    table = metadata.block_table.long()
    positions = torch.stack([first, first - 1]).clamp_min(0)
    here, before = table.gather(1, (positions // block_size).T).T * block_size + positions % block_size
    there = slots[starts[:-1].clamp_max(len(slots) - 1)]
    if bool(((here != there) & (counts > 0) & (there >= 0)).any()):
        raise RuntimeError("vLLM's cache has blocks of another size than modekit knows; please report it")
    before = torch.where(first > 0, before, -1)
    levels, groups = _levels(first, before, starts, slots), []
    for level, count in sorted(set(zip(levels.tolist(), counts.tolist(), strict=True))):
        members = ((counts == count) & (levels == level)).nonzero().squeeze(-1)
        if count:
            places = starts[members][:, None] + torch.arange(count, device=starts.device)
            groups.append((places, before[members]))
    return PassLayout(groups, slots)


def _levels(first: torch.Tensor, before: torch.Tensor, starts: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """How many sequences of this pass stand before each (B,), since it goes on from a token that another one has in it."""
    levels = torch.zeros_like(first)
    slots = slots[: int(starts[-1])]
    if not bool(torch.isin(before, slots[slots >= 0]).any()):
        return levels
    places = {slot: place for place, slot in enumerate(slots.tolist()) if slot >= 0}
    for sequence in first.argsort().tolist():  # whose beginning another one shares begins before it
        place = places.get(int(before[sequence]))
        if place is not None:
            owner = int(torch.searchsorted(starts, place, right=True)) - 1
            levels[sequence] = levels[owner] + 1
    return levels


class Slots:
    """Keeps for the routers what they have read of each sequence, slot by slot (modekit_flow's `Keeper`)."""

    def __init__(self, layer: str, vllm_config: VllmConfig) -> None:
        self._layer, self._cache = layer, vllm_config.cache_config
        self._states: dict[str, torch.Tensor] = {}
        self._seen: tuple[Any, PassLayout] | None = None

    def sums(self, key: str, values_BSG: torch.Tensor, decay: float, prefix: int | None) -> torch.Tensor:
        """State of each sequence after each of its tokens, (1, T, G + 2)."""
        states: torch.Tensor = torch.ops.modekit.sums(values_BSG, self._layer, key, decay, prefix)
        return states

    def ngram_rows(self, key: str, ids_BS: torch.Tensor, order: int, buckets: int) -> torch.Tensor:
        """Rows of the n-grams of each sequence's own tokens, (1, T)."""
        rows: torch.Tensor = torch.ops.modekit.ngram_rows(ids_BS, self._layer, key, order, buckets)
        return rows

    def scan(self, key: str, values: torch.Tensor, step: Step) -> torch.Tensor:
        """Go on with every sequence of a row of values (1, T, ...); returns the row of results (1, T, ...)."""
        row = self._row()
        if row is None:  # vLLM tries the model before there is a cache
            return step(values, None)[0].clone()  # which begins where memory does, as compiled code expects
        results = None
        for places_BS, before_B in row.groups:
            kept = self._states.get(key)
            state = None if kept is None else torch.where(before_B[:, None] >= 0, kept[before_B], torch.zeros_like(kept[:1]))
            result, states_BSW = step(values[0, places_BS], state)
            if kept is None:
                # One state per slot of vLLM's cache, and one more, -1, for tokens that are none.
                slots = self._cache.num_gpu_blocks * self._cache.block_size + 1
                kept = self._states[key] = states_BSW.new_zeros((slots, states_BSW.shape[-1]))
            kept[row.slots[places_BS]] = states_BSW
            if results is None:  # what belongs to no sequence stays zero
                results = result.new_zeros((*values.shape[:2], *result.shape[2:]))
            results[0, places_BS] = result
        return step(values, None)[0].clone() if results is None else results

    def _row(self) -> PassLayout | None:
        """Of the running pass; looked at once for all routers."""
        metadata = get_forward_context().attn_metadata
        if not metadata:
            return None
        metadata = metadata[self._layer]
        if self._seen is None or self._seen[0] is not metadata:
            self._seen = metadata, layout_of(metadata, self._cache.block_size)
        return self._seen[1]


def _slots_of(layer: str) -> Slots:
    """Those of the running model, by the name of its attention layer: a compiled pass calls the operations below with names."""
    slots: Slots = get_forward_context().no_compile_layers[layer].modekit_slots
    return slots


@torch.library.custom_op("modekit::sums", mutates_args=())
def _sums(values: torch.Tensor, layer: str, key: str, decay: float, prefix: int | None) -> torch.Tensor:
    def step(values_BSG: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        mask_BS = torch.ones(values_BSG.shape[:2], device=values_BSG.device)
        states_BSW = causal_sums(values_BSG, mask_BS, decay, state, prefix=prefix)
        return states_BSW, states_BSW

    return _slots_of(layer).scan(key, values, step)


@torch.library.custom_op("modekit::ngram_rows", mutates_args=())
def _ngram_rows(ids: torch.Tensor, layer: str, key: str, order: int, buckets: int) -> torch.Tensor:
    def step(ids_BS: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        rows_BS, _ = ngram_rows(ids_BS, torch.ones_like(ids_BS), state, order, buckets)
        before = ids_BS.new_zeros((len(ids_BS), order - 1)) if state is None else state
        tokens = torch.cat([before, ids_BS + 1], dim=1)
        last = [tokens[:, back : back + ids_BS.shape[1]] for back in range(1, order)]  # the newest order - 1 at each token
        return rows_BS, torch.stack(last, dim=-1) if last else tokens.new_zeros((*ids_BS.shape, 0))

    return _slots_of(layer).scan(key, ids.long(), step)


_sums.register_fake(lambda values, *_: values.new_empty((*values.shape[:2], values.shape[2] + 2)))
_ngram_rows.register_fake(lambda ids, *_: torch.empty_like(ids, dtype=torch.int64))
