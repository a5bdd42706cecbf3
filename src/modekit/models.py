"""Models in memory: the mixture as transformers loads it, and the dense view of each expert inside a checkpoint.

The dense view is the backbone with one expert's FFN, in the dense family's own class: it is what the mixture computes
when its router always takes that expert (promise 2), at the cost of a dense forward pass and with one dense model in
memory whatever the number of experts. Weights are memory-mapped and taken as they are where the dtype allows.

Shape legend: L layers, D hidden, F expert hidden, E experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from modekit.checkpoint import Checkpoint
from modekit.errors import SourceError
from modekit.families import LAYER

transformers_logging.disable_progress_bar()


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises SourceError when it has none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            "the model folder has no usable tokenizer", where=str(folder), found=str(error).splitlines()[0],
            remedy="save the base model's tokenizer into the base model's folder",
        ) from None  # fmt: skip
    return tokenizer


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model from a folder, on the default device, for evaluation."""
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise SourceError("transformers cannot load the model", where=str(folder), found=str(error).splitlines()[0]) from None
    return model.to(default_device()).eval()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a loaded model."""
    layers = model.model.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


class DenseView:
    """The backbone of a checkpoint with one expert's FFN at a time, as a dense model.

    `model` is ready for evaluation; `use_expert` swaps the FFN of every layer without touching the backbone.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = default_device()
        family = checkpoint.family
        config = AutoConfig.for_model(**checkpoint.record.dense_config)
        experts = {name for layer in range(checkpoint.layers) for name in self._ffn_names(layer)}
        skipped = {name for name in checkpoint.tensors if self._is_mixture_only(name)}
        state = {name: self._read(name) for name in checkpoint.tensors if name not in skipped}
        for layer in range(checkpoint.layers):
            state.update(self._ffn(layer, 0))
        assert experts <= state.keys()
        self.model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=state, dtype=dtype
        )
        self.model.to(self._device).eval()
        self._family = family

    def use_expert(self, expert: int) -> None:
        """Put expert `expert` (place in recipe order) into every layer."""
        parameters = dict(self.model.named_parameters())
        for layer in range(self._checkpoint.layers):
            for name, tensor in self._ffn(layer, expert).items():
                parameters[name].data = tensor.to(self._device)

    def ffn_modules(self) -> list[nn.Module]:
        """The FFN block of each layer; its input is what the router of that layer reads."""
        return [layer.get_submodule(self._family.mlp_module) for layer in decoder_layers(self.model)]

    def _ffn_names(self, layer: int) -> list[str]:
        return [LAYER.format(layer=layer) + suffix for suffix in self._checkpoint.family.mlp.values()]

    def _is_mixture_only(self, name: str) -> bool:
        family = self._checkpoint.family
        prefixes = {family.block_module, family.router.split(".")[0], (family.mlp_module)}
        return any(f".{prefix}." in name for prefix in prefixes) and ".layers." in name

    def _ffn(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Dense names -> tensors of one expert in one layer; a linear mixture's folded weight is taken out again."""
        family = self._checkpoint.family
        prefix = LAYER.format(layer=layer)
        if family.experts is not None:
            parts = {part: self._read(prefix + name.format(expert=expert)) for part, name in family.experts.items()}
        else:
            assert family.fused is not None
            gate_up = self._read(prefix + family.fused[0], expert)
            gate, up = gate_up.chunk(2, dim=0)
            parts = {"gate": gate, "up": up, "down": self._read(prefix + family.fused[1], expert)}
        weights = self._checkpoint.record.recipe.mixture.weights
        if weights is not None:
            share = weights[self._checkpoint.names[expert]] / sum(weights.values())
            parts["down"] = parts["down"] / max(share * len(weights), 1e-30)
        return {prefix + family.mlp[part]: tensor.contiguous() for part, tensor in parts.items()}

    def _read(self, name: str, expert: int | None = None) -> torch.Tensor:
        with safe_open(self._checkpoint.tensors[name].file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name) if expert is None else file.get_slice(name)[expert]
        return tensor.to(self._dtype)


@contextmanager
def forced_expert(model: PreTrainedModel, checkpoint: Checkpoint, expert: int) -> Iterator[None]:
    """While open, the router of every layer of a loaded mixture gives all weight to one expert."""

    def force(_module: nn.Module, _args: object, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Any:
        logits, weights, index = output
        # Slot 0 takes the forced expert with weight 1; the other slots keep distinct experts with weight 0.
        others = [other for other in range(logits.shape[-1]) if other != expert]
        order = torch.tensor([expert, *others], device=index.device)[: index.shape[-1]]
        forced = torch.zeros_like(weights)
        forced[..., 0] = 1
        return logits, forced, order.expand_as(index).contiguous()

    with _hooks(model, checkpoint, force):
        yield


@contextmanager
def _hooks(model: PreTrainedModel, checkpoint: Checkpoint, hook: Callable[..., Any]) -> Iterator[None]:
    handles = [
        layer.get_submodule(checkpoint.family.router_module).register_forward_hook(hook) for layer in decoder_layers(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def average_state(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of several models' tensors, in float64, rounded once to the first model's dtype."""
    first = states[0]
    return {
        name: (sum(state[name].double() for state in states) / len(states)).to(tensor.dtype)  # type: ignore[union-attr]
        for name, tensor in first.items()
    }
