"""Models of the modekit architecture: the installed transformers classes of a dense family, with modules replaced.

Nothing of a family's modelling code is copied: its own classes are built, then every place that the config names is
wrapped in a `Mixed` module. `family_classes` makes the two classes of a family; `ModekitModel` and
`ModekitForCausalLM` are what the Auto classes are given, and open as the family's.

Shape legend: B batch, S sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig
from transformers.cache_utils import Cache

from .configuration_modekit import ModekitConfig
from .modekit_mixed import Mixed
from .modekit_router import Flow, Router


class CarriesRouterStates:
    """Mixed into the class of a key-value cache: the routers' running averages go wherever its sequences go.

    They are no layer of the cache, since transformers looks through its layers for lengths and masks.
    """

    router_states: dict[str, torch.Tensor]

    def _change(self, rule: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.router_states = {place: rule(state) for place, state in self.router_states.items()}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the sequences in another order (beam search)."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._change(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._change(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some sequences."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._change(lambda state: state[indices.to(state.device)])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[misc]
        self.router_states = {}

    def crop(self, *_args: Any, **_kwargs: Any) -> None:
        """Refused: an average cannot be taken back, so that assisted decoding needs a token router."""
        raise NotImplementedError("a context or sequence router cannot take tokens back; generate without an assistant model")


@functools.cache
def _carrier(cache_class: Any) -> Any:
    return type(cache_class.__name__, (CarriesRouterStates, cache_class), {"__module__": __name__})


class MixtureModel:
    """Mixed into a family's base model: replaces the places, and carries masks and states to the routers."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.flow = Flow()
        prefix = f"{self.base_model_prefix}."  # type: ignore[attr-defined]
        install(self, prefix, config, self.flow)  # type: ignore[arg-type]
        self.post_init()  # type: ignore[attr-defined]

    def use_expert(self, expert: str | int | torch.Tensor | None) -> None:
        """Give all weight to one expert (name or place, or one place per sequence (B,)); None gives the routers back."""
        names = self.config.modekit["experts"]  # type: ignore[attr-defined]
        if isinstance(expert, str):
            if expert not in names:
                raise ValueError(f"there is no expert '{expert}'; there are {', '.join(names)}")
            self.flow.forced = names.index(expert)
        else:
            self.flow.forced = expert

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module)
        super()._init_weights(module)  # type: ignore[misc]


class MixtureForCausalLM:
    """Mixed into a family's causal language model: its base model and, where the config says so, its head are mixtures."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        model = family_classes(config.__class__)[0](config)
        setattr(self, self.base_model_prefix, model)  # type: ignore[attr-defined]
        install(self, "", config, model.flow, only="lm_head")  # type: ignore[arg-type]
        self.post_init()  # type: ignore[attr-defined]

    def use_expert(self, expert: str | int | torch.Tensor | None) -> None:
        """Give all weight to one expert (name or place, or one place per sequence (B,)); None gives the routers back."""
        self.base_model.use_expert(expert)  # type: ignore[attr-defined]

    def prepare_inputs_for_generation(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        """As the family does; the routers see which tokens are pads even where it makes a 4-D mask of it."""
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            self.base_model.flow.padding = attention_mask  # type: ignore[attr-defined]
        return super().prepare_inputs_for_generation(*args, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module)
        super()._init_weights(module)  # type: ignore[misc]


def install(root: nn.Module, prefix: str, config: PreTrainedConfig, flow: Flow, only: str | None = None) -> None:
    """Wrap the places under `root` (all, or `only` one) that the config names; their names start with `prefix`."""
    modekit: dict[str, Any] = config.modekit
    here: list[str] = []
    for name, place in modekit["places"].items():
        if name == only if only is not None else name.startswith(prefix):
            parent, _, leaf = name.removeprefix(prefix).rpartition(".")
            owner = root.get_submodule(parent) if parent else root
            module = Mixed(name, getattr(owner, leaf), place, flow, len(modekit["experts"]), modekit["routing"])
            setattr(owner, leaf, module)
            flow.mixed[name] = module
            here.append(name)
    for name in here:
        flow.mixed[name].follow(flow.mixed[modekit["places"][name]["router"]])


def initialise(module: nn.Module) -> None:
    """A mixture made from a config alone starts as its base: gates and B are zero, A is small and random."""
    if isinstance(module, Router) and hasattr(module, "gate"):
        nn.init.zeros_(module.gate)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, Mixed):
        if any(module.ranks):
            nn.init.normal_(module.lora_A, std=0.02)
            nn.init.zeros_(module.lora_B)
        if module.biased:
            nn.init.zeros_(module.lora_bias)


@functools.cache
def family_classes(config_class: Any) -> tuple[Any, Any]:
    """Base model and causal language model of the family that a config class (from `family_config`) descends from."""
    dense_config = config_class.__mro__[1]
    dense_model, dense_causal = MODEL_MAPPING[dense_config], MODEL_FOR_CAUSAL_LM_MAPPING[dense_config]

    @functools.wraps(dense_model.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        start_pass(self.flow, args, kwargs)
        output = dense_model.forward(self, *args, **kwargs)
        finish_pass(self.flow, output)
        return output

    # generate must not compile the whole pass on its own: what is kept between passes changes shape with the batch.
    shared = {"__module__": __name__, "config_class": config_class, "_can_compile_fullgraph": False}
    model = type("ModekitModel", (MixtureModel, dense_model), {**shared, "forward": forward, "_auto_class": "AutoModel"})
    causal = type("ModekitForCausalLM", (MixtureForCausalLM, dense_causal), {**shared, "_auto_class": "AutoModelForCausalLM"})
    return model, causal


def start_pass(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the routers which tokens are real and where their averages stood."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        mask = flow.padding if mask is not None else None
    flow.mask_BS = None if mask is None or tokens is None else mask[:, -tokens.shape[1] :]
    flow.padding = None
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    flow.states = cache.router_states if isinstance(cache, CarriesRouterStates) else {}
    flow.fresh = {}


def finish_pass(flow: Flow, output: Any) -> None:
    """Keep the routers' averages beside the keys and values."""
    values = output.values() if hasattr(output, "values") else output
    cache = next((value for value in values if isinstance(value, Cache)), None)
    if cache is not None and flow.fresh:
        if not isinstance(cache, CarriesRouterStates):
            cache.__class__ = _carrier(cache.__class__)
        cache.router_states = flow.fresh
        flow.states, flow.fresh = {}, {}


class ModekitModel:
    """What AutoModel is given: opens as the base model of the checkpoint's family."""

    _place = 0

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """The family's model from a checkpoint folder or hub id."""
        config = config if config is not None else ModekitConfig.from_pretrained(path)
        return family_classes(config.__class__)[cls._place].from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        return family_classes(config.__class__)[cls._place]._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: the family's classes say where their code is."""


class ModekitForCausalLM(ModekitModel):
    """What AutoModelForCausalLM is given: opens as the causal language model of the checkpoint's family."""

    _place = 1
