"""Experts that are keys and values before the text: prefixes (arXiv:2101.00190) and prompts (arXiv:2104.08691), token by token.

A soft prompt stands before the text and sees nothing else, so that both kinds are constant keys K_e and values V_e in every
layer. Of each layer's attention, a token t gets

    y_t = sum_e w_e(t) softmax(q_t [K_e; K_<=t]) [V_e; V_<=t]

and experts without a prefix, whose K_e is empty, are the attention over the text alone. Nothing looks ahead; with all weight on
one expert it is that expert's own model. There the text stands behind P places: keys are turned back by P here, so that text
begins at 0 whatever prefixes stand side by side.

Shape legend: B batch, S sequence, T tokens of the keys, P of a prefix, E experts, D width, H heads of keys, C width of a head.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from .modekit_flow import Flow
from .modekit_mixed import Mixed

_NAME = "modekit_prefix"
_KNOWN = ("eager", "sdpa")
_SAME = 1e-3
"""By which share of the largest number two keys of one token may differ where positions do not count."""
Pair = tuple[torch.Tensor, torch.Tensor]


class MixedPrefix(Mixed):
    """The prefixes of one layer's attention, and the router if the place has one. Its entry in `modekit.places` has besides:
    prefixes: tokens of each expert's prefix; 0 without one. prompted: experts whose prefix is a prompt.
    widths: of what is stored here of each: 2 H C, keys and values side by side; of a prompt D, in the first layer alone.
    """

    def __init__(
        self, name: str, dense: nn.Module, place: Mapping[str, Any], flow: Flow, experts: int, routing: Mapping[str, Any]
    ) -> None:
        super().__init__(name, dense, place, flow, experts, routing)
        self.name = name
        self.lengths: list[int] = list(place["prefixes"])
        self.prompted: list[int] = list(place.get("prompted", []))
        for expert, (length, width) in enumerate(zip(self.lengths, place["widths"], strict=True)):
            if width:
                self.register_parameter(f"expert_{expert}", nn.Parameter(torch.zeros(length, width)))
        self.pairs: dict[int, Pair] = {}  # expert -> its keys and values (H, P, C)
        self._of_pass: torch.Tensor | None = None
        self.turn: Pair | None = None
        self._config: list[Any] = []
        self._kind: type = object

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own keys and values."""
        return {**super().__getstate__(), "pairs": {}, "_of_pass": None, "turn": None}

    def stand_in(self, attention: Any) -> None:
        """Let an attention call this place first, and attend by its function."""
        self._flow[0].prefixed = True
        self._config, self._kind = [attention.config], type(attention)
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation = _NAME
        attention.register_forward_pre_hook(_before_attention, with_kwargs=True)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """What the attention reads, as it is; the router of this place reads it, too."""
        self._of_pass = self._decided(x_BSD)
        return x_BSD

    def attend(self, attention: Any, query: torch.Tensor, *text: Any, **more: Any) -> Any:
        """What the attention's own function gives of a text's keys, values and mask, summed over the experts: (B, S, heads, C),
        and no weights.
        """
        plain, (keys, values, mask) = partial(self._function(), attention, query, **more), text
        flow = self._flow[0]
        if flow.probe is not None:
            flow.probe[self.name] = (keys, values, self.turn)
            return plain(keys, values, mask)
        assert self._of_pass is not None
        weights_BSE = self._of_pass.to(query)
        parts: list[tuple[Pair | None, torch.Tensor]] = []
        parts += [(pair, weights_BSE[..., expert]) for expert, pair in self.pairs.items()]
        always_on = {} if self.leader.router is None else self.leader.router.routing.get("always_on") or {}
        if not all(self.lengths) or always_on.get("expert", 0) is None:  # the base, which is in no list
            parts.append((None, 1.0 - weights_BSE[..., list(self.pairs)].sum(-1)))
        total: torch.Tensor | None = None
        for number, (pair, weight_BS) in enumerate(parts):
            idle = not torch.compiler.is_compiling() and not bool(weight_BS.any())
            if idle and (total is not None or number + 1 < len(parts)):
                continue
            y = plain(keys, values, mask)[0] if pair is None else plain(*_behind(pair, query, keys, values, mask))[0]
            y = y * weight_BS[..., None, None]
            total = y if total is None else total + y
        return total, None

    def _function(self) -> Callable[..., Any]:
        name = self._config[0]._attn_implementation
        if name not in _KNOWN:
            raise ValueError(f"prefixes are read with attn_implementation {' or '.join(_KNOWN)}, not {name}")
        own = sys.modules[self._kind.__module__].eager_attention_forward
        function: Callable[..., Any] = own if name == "eager" else AttentionInterface()[name]
        return function

    def stored(self) -> list[tuple[int, int]]:
        """Changes with the tensors of this place."""
        own = [each for name, each in self.named_parameters(recurse=False) if name.startswith("expert_")]
        return [(each.data_ptr(), 0 if each.is_inference() else each._version) for each in own]

    def keep(self, expert: int, found: tuple[torch.Tensor, torch.Tensor, Pair]) -> None:
        """Make an expert's keys and values of what is stored here, and of a pass that showed how the layer rotates keys."""
        keys_BHTC, values_BHTC, (cos, sin) = found
        if expert in self.prompted:
            self.pairs[expert] = keys_BHTC[0], values_BHTC[0]
            return
        heads, width = keys_BHTC.shape[1], keys_BHTC.shape[3]
        stored = self.get_parameter(f"expert_{expert}").to(keys_BHTC)
        keys, values = stored.view(self.lengths[expert], 2, heads, width).permute(1, 2, 0, 3)
        apart = (keys_BHTC[0] - keys_BHTC[1]).abs().max()  # of one token, P places apart
        if apart > _SAME * keys_BHTC.abs().max():  # this layer has positions
            size = (cos.square() + sin.square()).sqrt()  # what yarn and longrope scale queries and keys with
            turn = sys.modules[self._kind.__module__].apply_rotary_pos_emb
            part, rest = keys[None].split([cos.shape[-1], width - cos.shape[-1]], dim=-1)
            turned = turn(part, part, (cos / size)[1:], (sin / size)[1:])[1]
            keys = torch.cat([turned, rest], dim=-1)[0].to(stored)
        self.pairs[expert] = keys, values


def prepare(model: Any) -> None:
    """Before a pass: every expert's keys and values, kept where no gradients are asked for, by a pass of the base model."""
    flow: Flow = model.flow
    if not flow.prefixed or flow.probe is not None:
        return
    places = [mixed for mixed in flow.mixed.values() if isinstance(mixed, MixedPrefix)]
    first, like = places[0], model.get_input_embeddings().weight
    known = next((keys for keys, _ in first.pairs.values()), like)
    made_of = [like.dtype, like.device, *(each.stored() for each in places)]
    if flow.prefixed_by == made_of and not torch.is_grad_enabled() and not known.requires_grad:
        return
    for expert, length in enumerate(first.lengths):
        if not length:
            continue
        if expert in first.prompted:
            given = first.get_parameter(f"expert_{expert}").to(like)[None]
            positions = torch.arange(-length, 0, device=like.device)[None]
        else:  # any token, which alone attends to itself wherever it stands
            given = torch.linspace(-1, 1, like.shape[1]).to(like).expand(2, 1, -1)
            positions = torch.tensor([[0], [-length]], device=like.device)
        flow.probe = {}
        try:
            with flow.forcing(expert):
                model(inputs_embeds=given, position_ids=positions, use_cache=False)
            for place in places:
                place.keep(expert, flow.probe[place.name])
        finally:
            flow.probe = None
    flow.prefixed_by = made_of


prepare_ahead = torch.no_grad()(prepare)
"""The same before others watch what passes read."""


def _before_attention(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    place = attention.prefix
    place.turn = kwargs.get("position_embeddings")
    place(args[0] if args else kwargs["hidden_states"])


def _attend(attention: Any, *args: Any, **kwargs: Any) -> Any:
    return attention.prefix.attend(attention, *args, **kwargs)


AttentionInterface.register(_NAME, _attend)


def _behind(pair: Pair, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Any) -> tuple[Any, Any, Any]:
    """Keys, values and mask of the text with a prefix before it, which every token sees."""
    asked, (prefix_keys, prefix_values) = query.shape[2], (each.to(keys).expand(len(keys), -1, -1, -1) for each in pair)
    if mask is None and asked > 1:  # by which sdpa means causal
        keys, values = keys[:, :, :asked], values[:, :, :asked]
        mask = query.new_full((1, 1, asked, asked), torch.finfo(query.dtype).min).triu(1)
    if mask is not None:
        mask = mask[..., : keys.shape[2]]
        shape = (*mask.shape[:-1], prefix_keys.shape[2])
        seen = mask.new_ones(shape) if mask.dtype == torch.bool else mask.new_zeros(shape)
        mask = torch.cat([seen, mask], dim=-1)
    return torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2), mask
