"""Models in memory: the mixture as transformers loads it, and the dense view of each expert inside a checkpoint.

The dense view is the backbone with one expert's FFN, in the dense family's own class: it is what the mixture computes
when its router always takes that expert (promise 2), at the cost of a dense forward pass and with one dense model in
memory whatever the number of experts. Weights are memory-mapped and taken as they are where the dtype allows.

Shape legend: L layers, D hidden, F expert hidden, E experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
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
from modekit.errors import CheckpointError, SourceError
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
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
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
        _check_sizes(checkpoint)
        config = AutoConfig.for_model(**checkpoint.record.dense_config)
        block = f".{family.router.split('.')[0]}."  # everything the native layer has in place of the dense FFN
        state = {name: self._read(name) for name in checkpoint.tensors if not (".layers." in name and block in name)}
        for layer in range(checkpoint.layers):
            state.update(self._ffn(layer, 0))
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

    def _ffn(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Dense names -> tensors of one expert in one layer."""
        family = self._checkpoint.family
        prefix = LAYER.format(layer=layer)
        if family.experts is not None:
            parts = {part: self._read(prefix + name.format(expert=expert)) for part, name in family.experts.items()}
        else:
            assert family.fused is not None
            gate_up = self._read(prefix + family.fused[0], expert)
            gate, up = gate_up.chunk(2, dim=0)
            parts = {"gate": gate, "up": up, "down": self._read(prefix + family.fused[1], expert)}
        return {prefix + family.mlp[part]: tensor.contiguous() for part, tensor in parts.items()}

    def _read(self, name: str, expert: int | None = None) -> torch.Tensor:
        with safe_open(self._checkpoint.tensors[name].file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name) if expert is None else file.get_slice(name)[expert]
        return tensor.to(self._dtype)


def _check_sizes(checkpoint: Checkpoint) -> None:
    """An edited record must not make a model of another size than the weights."""
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"):
        if checkpoint.record.dense_config.get(key) != checkpoint.config.get(key):
            raise CheckpointError(
                "modekit.json and config.json disagree", where=f"{checkpoint.folder}: dense_config.{key}",
                found=checkpoint.record.dense_config.get(key), expected=checkpoint.config.get(key),
                remedy="build the mixture again",
            )  # fmt: skip


@contextmanager
def forced_expert(model: PreTrainedModel, checkpoint: Checkpoint, expert: int) -> Iterator[None]:
    """While open, the router of every layer of a loaded mixture gives all weight to one expert.

    The router reads ones instead of x, through a gate that makes logits of 10,000 for the expert and 0 for the others,
    so that softmax is exactly one-hot. What routers return differs between versions of transformers; what they read
    does not.
    """
    handles, gates = [], []
    shape = (len(checkpoint.names), int(model.config.hidden_size))
    for layer in decoder_layers(model):
        router = layer.get_submodule(checkpoint.family.router_module)
        gate = next(parameter for parameter in router.parameters() if parameter.shape == shape)
        gates.append((gate, gate.data))
        gate.data = torch.zeros_like(gate.data)
        gate.data[expert] = 10_000.0 / shape[1]
        handles.append(router.register_forward_pre_hook(lambda _, args: (torch.ones_like(args[0]), *args[1:])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for gate, data in gates:
            gate.data = data
