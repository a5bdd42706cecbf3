"""Mixtures of models with an encoder: the installed classes of a family of pairs (translation models), with modules replaced.

The encoder reads a source as a whole, once; the decoder writes its target token by token and reads the encoder's output. So
routers that read hidden states decide per token of the text that their layer runs on, and their averages are of the whole
source in the encoder and causal in the decoder. Routers that read token ids read the source alone, in either, and decide
once: what is written is another language. The source's ids, and the decision of a router that serves all layers, go with the
encoder's output, so that they follow its sequences into beams.

Shape legend: B batch, S tokens of the source.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration_modekit import family_config
from .modekit_flow import Flow
from .modekit_router import one_hot
from .modekit_whole import connect, own_head
from .modeling_modekit import PADDING, InBoth, ModekitModel, finish_pass, install, members_of, start_pass

_IDS, _WEIGHTS = "source_ids", "source_weights"
"""Entries of an encoder's output."""


# Hooks get the flow as a bound argument, which is copied with the model: a copy has its own.


def _before_encoder(flow: Flow, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the routers what the source is."""
    given = _given(module, args, kwargs)
    flow.encoding = True
    flow.source_weights = None
    start_pass(flow, given)
    flow.source_ids_BS = flow.ids_BS
    flow.source_mask_BS = flow.mask_BS
    _check_one_each(flow, given)


def _after_encoder(flow: Flow, _module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
    """Let the source's ids, and what one router for all places says of it, go with the output."""
    flow.encoding = False
    flow.fresh = {}
    if output is None:  # it was interrupted
        return
    leaders = {id(mixed.leader): mixed.leader for mixed in flow.mixed.values()}
    if len(leaders) == 1:
        (leader,) = leaders.values()
        if leader.weights is not None:  # it stands in the encoder, and says the same of every token
            flow.source_weights = leader.weights[:, :1]
    for name, carried in ((_IDS, flow.source_ids_BS), (_WEIGHTS, flow.source_weights)):
        if carried is not None and hasattr(output, "keys"):
            output[name] = carried


def _before_decoder(flow: Flow, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give the routers the pads and their averages so far, and the target's own expert where the caller names one: it may
    differ from the source's.
    """
    given = _given(module, args, kwargs)
    start_pass(flow, {**given, **flow.padding})
    flow.target_weights = _target_weights(flow, given)


def _after_decoder(flow: Flow, _module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
    """Keep the routers' averages beside the keys and values."""
    if output is not None:
        finish_pass(flow, output)


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All that a module was called with, by name."""
    if not args:  # as transformers calls it, token by token
        return kwargs
    names = [name for name in inspect.signature(module.forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _tokens(given: dict[str, Any]) -> Any:
    """What an encoder or decoder reads, ids (B, S) or embeddings (B, S, D)."""
    return given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]


def _check_one_each(flow: Flow, given: dict[str, Any]) -> None:
    """Raise ValueError unless one expert is named for all sources, or one for each: an encoder runs before there are beams."""
    tokens = _tokens(given)
    named = torch.as_tensor(0 if flow.forced is None else flow.forced).numel()
    if tokens is not None and 1 < named != len(tokens):
        raise ValueError(f"use_expert was given {named} experts, for {len(tokens)} sequences")


def _target_weights(flow: Flow, given: dict[str, Any]) -> torch.Tensor | None:
    """(B, 1, E) of the experts that were named; None where the routers decide. Raises ValueError as `one_hot` does."""
    tokens = _tokens(given)
    if flow.forced is None or tokens is None:
        return None
    experts = len(next(iter(flow.mixed.values())).ranks)
    return one_hot(flow.forced, (tokens.shape[0], 1, experts), tokens.device)


class MixtureForSeq2SeqLM(InBoth):
    """Mixed into a family's model for pairs: replaces the places in encoder and decoder."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        flow = self.base_model.flow = Flow(pair=True)
        if "lm_head" in config.modekit["places"]:
            own_head(self)
        install(self, "", config, flow)  # type: ignore[arg-type]
        connect(self, flow.mixed)
        encoder, decoder = self.get_encoder(), self.get_decoder()  # type: ignore[attr-defined]
        for part, before, after in ((encoder, _before_encoder, _after_encoder), (decoder, _before_decoder, _after_decoder)):
            part.register_forward_pre_hook(functools.partial(before, flow), with_kwargs=True)
            part.register_forward_hook(functools.partial(after, flow), with_kwargs=True, always_call=True)
        self.post_init()  # type: ignore[attr-defined]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the family does, which runs the encoder by itself; torch calls no hook of a module that an interrupt leaves."""
        flow = self.base_model.flow
        with flow.one_pass():
            try:
                return super().generate(*args, **kwargs)  # type: ignore[misc]
            finally:
                flow.encoding = False

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As the family does; the routers see which tokens are pads even where it makes a 4-D mask of it (a static cache)."""
        inputs, mask = super().prepare_inputs_for_generation(*args, **kwargs), kwargs.get("decoder_attention_mask")  # type: ignore[misc]
        if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            inputs[PADDING] = mask
        return inputs


@functools.cache
def pair_class(config_class: Any) -> Any:
    """The model of the family that a config class (from `family_config`) descends from."""
    dense_config = config_class.__mro__[1]
    dense = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[dense_config]
    members = {**members_of(config_class, "ModekitForSeq2SeqLM"), "__module__": __name__, "forward": _forward_of(dense)}
    return type("ModekitForSeq2SeqLM", (MixtureForSeq2SeqLM, dense), {**members, "_auto_class": "AutoModelForSeq2SeqLM"})


def _forward_of(dense: Any) -> Callable[..., Any]:
    """A pass of the family's model; the source is what its encoder reads, or has read."""
    arguments = list(inspect.signature(dense.forward).parameters)[1:]

    @functools.wraps(dense.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        flow = self.base_model.flow
        with flow.one_pass():
            given = {**dict(zip(arguments, args, strict=False)), **kwargs}
            encoded: Any = given.get("encoder_outputs")
            carried = dict(encoded) if hasattr(encoded, "keys") else {}
            flow.source_ids_BS = carried.get(_IDS, given.get("input_ids"))
            flow.source_weights = carried.get(_WEIGHTS)
            flow.source_mask_BS = given.get("attention_mask")
            flow.padding = {PADDING: kwargs.pop(PADDING)} if PADDING in kwargs else {}
            try:
                return dense.forward(self, *args, **kwargs)
            finally:
                flow.padding = {}
                flow.encoding = False

    return forward


class ModekitForSeq2SeqLM(ModekitModel):
    """What AutoModelForSeq2SeqLM is given: opens as the model of the checkpoint's family."""

    @classmethod
    def _class_for(cls, config_class: Any) -> Any:
        return pair_class(config_class)


def __getattr__(name: str) -> Any:
    """The class of a family, which pickle looks for under its qualified name."""
    kind, _, dense_type = name.partition("_")
    if kind == "ModekitForSeq2SeqLM" and dense_type in CONFIG_MAPPING:
        config_class: Any = family_config(dense_type)
        return pair_class(config_class)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
