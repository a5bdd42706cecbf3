"""A model of which one layer is in memory at a time, beside what lies outside of all; it computes what the whole one does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from modekit.loaded.load import decoder_layers, default_device
from modekit.recipes.layers import Layer
from modekit.sources.config import Config
from modekit.sources.names import split_layer

Weights = Callable[[Layer | None], Iterable[tuple[str, torch.Tensor]]]
"""Of a layer, or of what lies outside of all: parameters by name."""


def by_layer(names: Iterable[str]) -> dict[Layer | None, list[str]]:
    """Names of tensors by the layer that they are in; under None those outside of all."""
    found: dict[Layer | None, list[str]] = {}
    for name in names:
        found.setdefault(split_layer(name)[0], []).append(name)
    return found


class LayerByLayer:
    """A causal language model for evaluation, on the default device. A layer has its weights while it runs."""

    def __init__(self, said: Config, wide: Config, dtype: torch.dtype = torch.float32) -> None:
        """By a config, with sizes that its class may refuse. Raises what transformers does."""
        self._device = default_device()
        config: PreTrainedConfig = AutoConfig.for_model(**PreTrainedConfig._decode_special_floats(dict(said)))
        for key, value in wide.items():
            if said.get(key) != value:  # a config checks sizes as they are in models that people make, when it is made
                setattr(config, key, value)
        with init_empty_weights():  # buffers, which follow from the config, are made
            self.model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config, dtype=dtype).eval()
        for module in self.model.modules():
            module._buffers.update({name: each.to(self._device) for name, each in module.named_buffers(recurse=False)})
        for number, layer in enumerate(decoder_layers(self.model)):
            layer.register_forward_pre_hook(partial(self._read, number))
            layer.register_forward_hook(_let_go)

    def use(self, weights: Weights) -> None:
        """Have these: outside of the layers from now on, in a layer when it runs. A tied head is their embedding."""
        self._weights = weights
        self._read(None)
        self.model.tie_weights()

    def let_go(self) -> None:
        """Of the weights outside of the layers, too; who holds them still, as a head does, keeps them."""
        outside = [name for name, each in self.model.named_parameters() if each.numel() and not each.is_meta]
        self.put((name, torch.empty(0)) for name in outside)
        self.model.tie_weights()

    def _read(self, layer: Layer | None, *_of_hook: object) -> None:
        self.put(self._weights(layer))

    def put(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Have these by name; in a layer while it runs."""
        for name, tensor in weights:
            module, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(module), leaf, nn.Parameter(tensor.to(self._device), requires_grad=False))


def _let_go(module: nn.Module, *_: object) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
