"""Models of the modekit architecture: the installed transformers classes of a dense family, with modules replaced.

Nothing of a family's modelling code is copied: its own classes are built, then every place that the config names is wrapped in
a `Mixed` module. `family_classes` makes the two classes of a family; `ModekitModel` and `ModekitForCausalLM` open as these.

Shape legend: B batch, S sequence.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel, modeling_utils
from transformers.cache_utils import Cache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration_modekit import ModekitConfig, family_config
from .modekit_any import MixedAny
from .modekit_cache import CarriesRouterStates, remembering
from .modekit_flow import Flow, Recomputing
from .modekit_inside import Inside, MixedInside
from .modekit_mixed import Chain, Mixed, put_in_place
from .modekit_router import Router, places_of
from .modekit_whole import KINDS, BiasedHead, SharedEmbedding

_LAYER = re.compile(r".*?\.(layers|block)\.\d+\.")


class InBoth:
    """Mixed into every class of a family."""

    config: Any
    base_model: Any

    def use_expert(self, expert: str | int | Sequence[str | int] | torch.Tensor | None) -> None:
        """Give all weight to one expert, by name, label or place, or to one per sequence (B,); None gives the routers back."""
        self.base_model.flow.forced = places_of(expert, self.config.modekit)

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module)
        super()._init_weights(module)  # type: ignore[misc]

    def _set_gradient_checkpointing(self, *, gradient_checkpointing_func: Any = None, **kwargs: Any) -> None:
        if gradient_checkpointing_func is not None:
            places = self.config.modekit["places"]
            shared = any(_layer_of(name) != _layer_of(place["router"]) for name, place in places.items())
            if shared and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
                raise ValueError("a router that serves several layers gets no gradient with use_reentrant; set it to False")
            kwargs["gradient_checkpointing_func"] = Recomputing(self.base_model.flow, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(**kwargs)  # type: ignore[misc]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As the family does; refused where experts have embeddings of their own."""
        ends = (self.get_input_embeddings(), self.get_output_embeddings())  # type: ignore[attr-defined]
        if any(isinstance(module, Mixed | SharedEmbedding) for module in ends):
            raise NotImplementedError("this mixture's experts have embeddings of their own: resize the models it is built from")
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]


def _layer_of(place: str) -> str:
    found = _LAYER.match(place)
    return "" if found is None else found[0]


class MixtureModel(InBoth):
    """Mixed into a family's base model: replaces the places, and carries masks and states to the routers."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.flow = Flow()
        prefix = f"{self.base_model_prefix}."  # type: ignore[attr-defined]
        install(self, prefix, config, self.flow)  # type: ignore[arg-type]
        self.post_init()  # type: ignore[attr-defined]


class MixtureForCausalLM(InBoth):
    """Mixed into a family's causal language model: its base model and, where the config says so, its head are mixtures."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        flow = self.base_model.flow = Flow()
        inner = _inner(self)
        config_class = config.__class__
        dense_model: Any = type(inner)
        inner.__class__ = _mixture_class(dense_model, config_class)
        inner.flow = flow
        # By its class a model is known to record hidden states and attentions.
        getattr(modeling_utils, "_CAN_RECORD_REGISTRY", {}).update({str(inner.__class__): inner._can_record_outputs})
        install(self, "", config, flow)  # type: ignore[arg-type]
        self.post_init()  # type: ignore[attr-defined]

    def prepare_inputs_for_generation(
        self, *args: Any, attention_mask: Any = None, inputs_embeds: Any = None, **kwargs: Any
    ) -> Any:
        """As the family does; the routers see which tokens are pads even where it makes a 4-D mask of it.

        `inputs_embeds` is named because generate looks for the name.
        """
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            *args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        if attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2):
            inputs[PADDING] = attention_mask
        return inputs


def _inner(causal: Any) -> Any:
    """The model within a causal one that all passes go through: its base model, or what holds the layers."""
    name = causal.config.modekit.get("derived", {}).get("layers", "").rpartition(".")[0]
    while name and not isinstance(causal.get_submodule(name), PreTrainedModel):
        name = name.rpartition(".")[0]
    return causal.get_submodule(name) if name else causal.base_model


def install(root: nn.Module, prefix: str, config: PreTrainedConfig, flow: Flow) -> None:
    """Wrap the places under `root` that the config names; their paths start with `prefix`."""
    modekit: dict[str, Any] = config.modekit
    kinds, other = ({}, MixedAny) if "derived" in modekit else (KINDS, Mixed)
    head = modekit.get("derived", {}).get("head", "lm_head")
    for name, place in modekit["places"].items():
        if name.startswith(prefix):
            parent, _, leaf = name.removeprefix(prefix).rpartition(".")
            owner = root.get_submodule(parent) if parent else root
            calls = place.get("calls") or []
            dense: Any = Chain(owner, calls) if calls else getattr(owner, leaf, None)
            kind = MixedInside if place.get("inside") else kinds.get(leaf, other)
            module = kind(name, dense, place, flow, len(modekit["experts"]), modekit["routing"])
            put_in_place(owner, calls or [leaf], module)
            module.is_head, flow.mixed[name] = name == head, module
    for name, module in flow.mixed.items():
        module.follow(flow.mixed[modekit["places"][name]["router"]])


def initialise(module: nn.Module) -> None:
    """A mixture made from a config alone starts as its base: gates and B are zero, A is small and random."""
    if isinstance(module, Router) and hasattr(module, "gate"):
        nn.init.zeros_(module.gate)
    if isinstance(module, Mixed | Inside):
        if any(module.ranks):
            nn.init.normal_(module.lora_A, std=0.02)
            nn.init.zeros_(module.lora_B)
        if isinstance(module, Mixed) and module.biased:
            nn.init.zeros_(module.lora_bias)
    if isinstance(module, BiasedHead):
        nn.init.zeros_(module.final_logits_bias)


@functools.cache
def family_classes(config_class: Any) -> tuple[Any, Any]:
    """Base model and causal language model of the family that a config class (from `family_config`) descends from."""
    dense_config = config_class.__mro__[1]
    dense_causal = MODEL_FOR_CAUSAL_LM_MAPPING[dense_config]
    members = {**members_of(config_class, "ModekitForCausalLM"), "forward": _causal_forward_of(dense_causal)}
    members["_auto_class"] = "AutoModelForCausalLM"
    causal = type("ModekitForCausalLM", (MixtureForCausalLM, dense_causal), members)
    dense_model = MODEL_MAPPING.get(dense_config, None)
    return dense_model and _mixture_class(dense_model, config_class), causal


@functools.cache
def _mixture_class(dense_model: Any, config_class: Any) -> Any:
    """A base model's class with a mixture's pass."""
    members = {**members_of(config_class, "ModekitModel"), "forward": _forward_of(dense_model), "_auto_class": "AutoModel"}
    return type("ModekitModel", (MixtureModel, dense_model), members)


def members_of(config_class: Any, name: str) -> dict[str, Any]:
    """What all classes of a family have."""
    # generate must not compile the whole pass on its own: what is kept between passes changes shape with the batch.
    members = {"__module__": __name__, "config_class": config_class, "_can_compile_fullgraph": False, "_tp_plan": {}}
    return {**members, "__qualname__": f"{name}_{config_class.__mro__[1].model_type}"}


def _forward_of(dense_model: Any) -> Callable[..., Any]:
    """A pass of the family's base model, with what routers and a common expert need around it."""
    arguments = list(inspect.signature(dense_model.forward).parameters)[1:]

    @functools.wraps(dense_model.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        flow = self.flow
        kwargs.pop("logits_to_keep", None)  # by which Gemma 4 leaves tokens out of its last layers: routers read them all
        with flow.one_pass():
            given = {**dict(zip(arguments, args, strict=False)), **flow.padding, **kwargs}
            flow.padding = {}
            start_pass(flow, given)
            kwargs.pop(PADDING, None)
            if flow.streams == 1:
                output = dense_model.forward(self, *args, **kwargs)
                finish_pass(flow, output)
                return output
            sequences = flow.sequences = flow.shape_BS[0] // 2
            try:
                doubled = {name: _twice(value, sequences) for name, value in given.items() if name != PADDING}
                output = dense_model.forward(self, **doubled)
                finish_pass(flow, output)
                return _averaged(output, sequences, flow.common)
            finally:
                flow.sequences = None

    return forward


# A common expert beside the others: the base's own decoder reads every text, too (MoE-CE, arXiv 2407.19610). Every sequence of
# a pass stands in the batch twice. In the first half the routers decide; in the second no expert has any weight, so that every
# place is the base's. Behind the decoder the two are averaged, and the head, which all share, reads that:
#
#     h = (1 - w) h_routed + w h_common                         h (B, S, D), w = always_on.weight


def _twice(value: Any, sequences: int) -> Any:
    """An argument of a pass with every sequence in it twice: B rows become 2B. Masks by kind of layer come in a dict."""
    if isinstance(value, dict):
        return {key: _twice(each, sequences) for key, each in value.items()}
    if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == sequences:
        return torch.cat([value, value])
    return value


def _averaged(output: Any, sequences: int, weight: float) -> Any:
    """A pass's output for B sequences: the last hidden states averaged, all else as the routed half has it."""
    routed = output[0][:sequences]
    common = output[0][sequences:]
    hidden = (1.0 - weight) * routed + weight * common
    if isinstance(output, tuple):
        return (hidden, *(tuple(one[:sequences] for one in each) if isinstance(each, tuple) else each for each in output[1:]))
    output["last_hidden_state"] = hidden
    for key in ("hidden_states", "attentions"):
        if output.get(key) is not None:
            output[key] = tuple(each[:sequences] for each in output[key])
    return output


def _causal_forward_of(dense_causal: Any) -> Callable[..., Any]:
    """A pass of the family's causal language model."""
    arguments = list(inspect.signature(dense_causal.forward).parameters)[1:]

    @functools.wraps(dense_causal.forward)
    def causal_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        flow = self.base_model.flow
        with flow.one_pass():
            kept = {**dict(zip(arguments, args, strict=False)), **kwargs}.get("logits_to_keep")
            flow.kept = kept if isinstance(kept, torch.Tensor) else None
            flow.padding = {PADDING: kwargs.pop(PADDING)} if PADDING in kwargs else {}
            return dense_causal.forward(self, *args, **kwargs)

    return causal_forward


def __getattr__(name: str) -> Any:
    """The class of a family, which pickle looks for under its qualified name."""
    kind, _, dense_type = name.partition("_")
    if kind in {"ModekitModel", "ModekitForCausalLM"} and dense_type in CONFIG_MAPPING:
        config_class: Any = family_config(dense_type)
        return family_classes(config_class)[kind != "ModekitModel"]
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


PADDING = "routers_attention_mask"
"""Argument of a pass that generate makes: the 2-D mask of the tokens (None: no pads), whatever attention is given."""


def start_pass(flow: Flow, kwargs: dict[str, Any]) -> None:
    """Tell the routers which tokens are real and where their averages stood.

    Raises ValueError where an average would not be that of the row's own tokens: several sequences share a row, pads are not
    named, or the tokens before were not read by these routers.
    """
    for mixed in flow.mixed.values():
        mixed.weights = None
    flow.ids_BS = tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    given = kwargs.get("attention_mask")
    mask = given if isinstance(given, torch.Tensor) and given.ndim == 2 else kwargs.get(PADDING)
    flow.mask_BS = None if mask is None or tokens is None else mask[:, -tokens.shape[1] :]
    flow.shape_BS = None if tokens is None else (flow.streams * tokens.shape[0], tokens.shape[1])
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    flow.cache = cache
    flow.states = cache.router_states if isinstance(cache, CarriesRouterStates) else {}
    flow.fresh = {}
    filled = isinstance(cache, Cache) and not torch.compiler.is_compiling() and _holds_text(cache)
    if filled and getattr(cache, "streams", 1) != flow.streams:
        raise ValueError("the cache was filled with the common expert and is read without it, or the reverse")
    if not _averages(flow) or flow.keeper is not None or flow.forced is not None:
        return
    if given is not None and mask is None and PADDING not in kwargs and kwargs.get("cu_seq_lens_q") is None:
        raise ValueError("context and sequence routers must know which tokens are pads: give the 2-D attention_mask (B, S)")
    if filled and not flow.states:
        raise ValueError(
            "context and sequence routers must have read what the cache holds, and cannot take tokens back: give the cache as "
            "this mixture returned it, or the whole text; generate without an assistant model or prompt lookup"
        )
    if _is_packed(flow, kwargs):
        raise ValueError("context and sequence routers read one sequence per row; give packed sequences as rows with padding")


def _holds_text(cache: Cache) -> bool:
    try:
        return bool(cache.get_seq_length())
    except ValueError:  # no layer of it counts tokens
        return any(bool(getattr(layer, "has_previous_state", False)) for layer in cache.layers)


def _averages(flow: Flow) -> bool:
    """Whether an average of what runs now is taken; in a decoder beside an encoder only some routers read what it writes."""
    if not flow.pair or flow.encoding:
        return flow.averages
    routers = (mixed.router for mixed in flow.mixed.values())
    return flow.averages and any(router is not None and router.reads_target for router in routers)


def _is_packed(flow: Flow, kwargs: dict[str, Any]) -> bool:
    """Whether positions do not count from 0 where no mask and no earlier tokens explain it."""
    positions = kwargs.get("position_ids")
    if kwargs.get("cu_seq_lens_q") is not None:
        return True
    if positions is None or flow.mask_BS is not None or flow.states or torch.compiler.is_compiling():
        return False
    return bool((positions != torch.arange(positions.shape[-1], device=positions.device)).any())


def finish_pass(flow: Flow, output: Any) -> None:
    """Keep the routers' averages beside the keys and values."""
    values = output.values() if hasattr(output, "values") else output
    cache = next((value for value in (*values, flow.cache) if isinstance(value, Cache)), None)
    if isinstance(cache, CarriesRouterStates) and not flow.fresh:  # an expert was forced: the averages miss these tokens
        cache.router_states = {}
    elif cache is not None and (flow.fresh or flow.sequences is not None):
        remembering(cache)
        cache.router_states = flow.fresh
        cache.streams = 1 if flow.sequences is None else 2
    flow.states = {}
    flow.fresh = {}
    flow.cache = None


class ModekitModel:
    """What AutoModel is given: opens as the base model of the checkpoint's family."""

    _place = 0

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """The family's model from a checkpoint folder or hub id."""
        config = config if config is not None else ModekitConfig.from_pretrained(path)
        return cls._class_for(config.__class__).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        return cls._class_for(config.__class__)._from_config(config, **kwargs)

    @classmethod
    def _class_for(cls, config_class: Any) -> Any:
        return family_classes(config_class)[cls._place]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: the family's classes say where their code is."""


class ModekitForCausalLM(ModekitModel):
    """What AutoModelForCausalLM is given: opens as the causal language model of the checkpoint's family."""

    _place = 1
