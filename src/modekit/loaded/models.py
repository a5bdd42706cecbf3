"""Models of a mixture as transformers loads them, and a checkpoint seen as one expert at a time.

A view computes what the mixture computes when its routers always take one expert (promise 2). Of a native checkpoint it is
the dense family's own class with the backbone and one expert's FFN: the cost of a dense pass, one dense model in memory
whatever the number of experts. Of a modekit checkpoint it is the mixture itself, whose routers are overruled.

Shape legend: L layers, D width, F expert hidden, E experts, T tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import CheckpointError, SourceError
from modekit.sources.adapter import AdapterSource
from modekit.sources.families import LAYER
from modekit.sources.model import Mappings
from modekit.sources.native import Native
from modekit.weights.folding import Folded, folded_bias, reader
from modekit.weights.numeric import as_array, to_float32

transformers_logging.disable_progress_bar()

_FAR = 10_000.0  # between two logits: softmax gives the lower one exactly nothing


def default_device() -> torch.device:
    """The accelerator if there is one (this process's own under a launcher), else the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")


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


@dataclass
class Head:
    """What turns last hidden states into logits: a linear layer, and the factor and soft cap that some families apply."""

    linear: nn.Module
    scale: float
    cap: float | None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        logits: torch.Tensor = self.linear(hidden)
        logits = logits * self.scale if self.scale != 1.0 else logits
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits

    def equals(self, other: Head) -> bool:
        """Whether both give the same logits."""
        ours, theirs = dict(self.linear.state_dict()), dict(other.linear.state_dict())
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        return same and (self.scale, self.cap) == (other.scale, other.cap)


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model."""
    config = model.config
    scaling = getattr(config, "logits_scaling", None)
    scale = 1.0 / scaling if scaling else getattr(config, "logit_scale", None) or 1.0
    return Head(model.get_output_embeddings(), float(scale), getattr(config, "final_logit_softcapping", None))


class ExpertView(Protocol):
    """A checkpoint as a model that is one expert at a time."""

    model: PreTrainedModel

    def use_expert(self, expert: int) -> None:
        """Be expert `expert` (place in recipe order)."""

    def router_inputs(self) -> list[nn.Module]:
        """Per router slot, a module whose first argument is what the router reads, (B, S, D)."""


def expert_view(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> ExpertView:
    """A checkpoint as one expert at a time, ready for evaluation."""
    return ModekitView(checkpoint, dtype=dtype) if checkpoint.native is None else DenseView(checkpoint, dtype=dtype)


class ModekitView:
    """A modekit checkpoint whose routers are overruled."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> None:
        self.model = load_model(checkpoint.folder, dtype=dtype)
        self._slots = checkpoint.slots

    def use_expert(self, expert: int) -> None:
        """Give all weight to an expert."""
        self.model.use_expert(expert)

    def router_inputs(self) -> list[nn.Module]:
        """The routers themselves; where one is yet to stand, the place whose input it will read."""
        places = [self.model.get_submodule(slot.name.removesuffix(".router.gate")) for slot in self._slots]
        return [place if place.router is None else place.router for place in places]


class DenseView:
    """The backbone of a native checkpoint with one expert's FFN at a time, as a dense model.

    `use_expert` swaps the FFN of every layer without touching the backbone. Weights are memory-mapped and taken as they
    are where the dtype allows.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = default_device()
        self._native = _native(checkpoint)
        _check_sizes(checkpoint)
        config = AutoConfig.for_model(**checkpoint.record.dense_config)
        block = f".{self._native.router.split('.')[0]}."  # everything the native layer has in place of the dense FFN
        state = {name: self._read(name) for name in checkpoint.tensors if not (".layers." in name and block in name)}
        for layer in range(checkpoint.layers):
            state.update(self._ffn(layer, 0))
        self.model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=state, dtype=dtype
        )
        self.model.to(self._device).eval()

    def use_expert(self, expert: int) -> None:
        """Put expert `expert` (place in recipe order) into every layer."""
        parameters = dict(self.model.named_parameters())
        for layer in range(self._checkpoint.layers):
            for name, tensor in self._ffn(layer, expert).items():
                parameters[name].data = tensor.to(self._device)

    def router_inputs(self) -> list[nn.Module]:
        """The FFN block of each layer; its input is what the router of that layer reads."""
        return [layer.get_submodule(self._native.family.mlp_module) for layer in decoder_layers(self.model)]

    def _ffn(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Dense names -> tensors of one expert in one layer."""
        native = self._native
        prefix = LAYER.format(layer=layer)
        if native.experts is not None:
            parts = {part: self._read(prefix + name.format(expert=expert)) for part, name in native.experts.items()}
        else:
            assert native.fused is not None
            gate_up = self._read(prefix + native.fused[0], expert)
            gate, up = gate_up.chunk(2, dim=0)
            parts = {"gate": gate, "up": up, "down": self._read(prefix + native.fused[1], expert)}
        return {prefix + native.family.mlp[part]: tensor.contiguous() for part, tensor in parts.items()}

    def _read(self, name: str, expert: int | None = None) -> torch.Tensor:
        with safe_open(self._checkpoint.tensors[name].file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name) if expert is None else file.get_slice(name)[expert]
        return tensor.to(self._dtype)


def _native(checkpoint: Checkpoint) -> Native:
    assert checkpoint.native is not None
    return checkpoint.native


def native_routers(model: PreTrainedModel, checkpoint: Checkpoint) -> list[nn.Module]:
    """The router of every layer of a loaded native mixture; each reads its first argument, (B, S, D) or (T, D)."""
    path = _native(checkpoint).router_module
    return [layer.get_submodule(path) for layer in decoder_layers(model)]


def gate_parameters(model: PreTrainedModel, checkpoint: Checkpoint) -> list[nn.Parameter]:
    """The gate of every router slot of a loaded mixture, in the order of the slots."""
    if checkpoint.native is None:
        return [model.get_parameter(slot.name) for slot in checkpoint.slots]
    shape = (len(checkpoint.names), int(model.config.hidden_size))
    return [
        next(parameter for parameter in router.parameters() if parameter.shape == shape)
        for router in native_routers(model, checkpoint)
    ]


def set_top_k(model: PreTrainedModel, checkpoint: Checkpoint, top_k: int | None) -> None:
    """Let every router of a loaded mixture choose `top_k` experts per token; None: as many as the checkpoint says.

    The config is not changed.
    """
    if checkpoint.native is None:
        configured = checkpoint.config["modekit"]["routing"]
        chosen = configured if top_k is None else {**configured, "method": "routing", "top_k": top_k, "top_p": None}
        for slot in checkpoint.slots:
            model.get_submodule(slot.name.removesuffix(".gate")).routing = dict(chosen)
        return
    for layer in decoder_layers(model):
        for module in layer.get_submodule(checkpoint.native.block_module).modules():
            if hasattr(module, "top_k"):
                setattr(module, "top_k", top_k or int(checkpoint.config[checkpoint.native.top_k_key]))  # noqa: B010


def load_adapted(base: Path, adapter: AdapterSource, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The base model with an adapter folded into its weights, in float32, for evaluation."""
    model = load_model(base, trust_remote_code=trust_remote_code)
    parameters = dict(model.named_parameters())
    mappings = Mappings()
    try:
        read = reader(mappings)
        for name in {*adapter.changes, *adapter.bias_changes, *adapter.replaced}:
            parameter = parameters[name]
            values = parameter.detach().cpu().float().numpy().ravel()
            if name in adapter.replaced:
                values = to_float32(as_array(mappings.view(adapter.replaced[name]), adapter.replaced[name].dtype))
            if name in adapter.changes:
                rows, columns = parameter.shape
                values = Folded(adapter.changes[name], values, (rows, columns), read)[:]
            elif name in adapter.bias_changes:
                values = folded_bias(adapter.bias_changes[name], values, read)
            parameter.data = torch.from_numpy(values.copy()).view(parameter.shape).to(parameter)
    finally:
        mappings.close()
    return model


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
def changed_logits(
    model: PreTrainedModel, checkpoint: Checkpoint, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """While open, every router of a loaded native mixture decides by `change(logits)`, logits (..., E).

    What routers return differs between versions of transformers; what they read does not. A router reads the logits in place
    of x, as the first E of D numbers, through the gate [I | 0], so that its own code sees exactly them (E <= D). They must be
    finite: a weight of zero is a logit far below the others.
    """
    handles, gates = [], []
    for router, gate in zip(native_routers(model, checkpoint), gate_parameters(model, checkpoint), strict=True):
        gates.append((gate, gate.data))

        def read(_: nn.Module, args: tuple[torch.Tensor, ...], gate_ED: torch.Tensor = gate.data) -> tuple[torch.Tensor, ...]:
            logits = change(nn.functional.linear(args[0], gate_ED))
            return (nn.functional.pad(logits, (0, args[0].shape[-1] - logits.shape[-1])), *args[1:])

        gate.data = torch.eye(*gate.shape, dtype=gate.dtype, device=gate.device)
        handles.append(router.register_forward_pre_hook(read))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for gate, data in gates:
            gate.data = data


@contextmanager
def forced_expert(model: PreTrainedModel, checkpoint: Checkpoint, expert: int) -> Iterator[None]:
    """While open, every router of a loaded mixture gives all weight to one expert.

    Of a native router its logit is 10,000 and the others' 0, so that softmax is exactly one-hot.
    """
    if checkpoint.native is None:
        model.use_expert(expert)
        try:
            yield
        finally:
            model.use_expert(None)
        return

    def change(logits: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(logits).index_fill(-1, torch.tensor([expert], device=logits.device), _FAR)

    with changed_logits(model, checkpoint, change):
        yield


@contextmanager
def left_out_expert(model: PreTrainedModel, checkpoint: Checkpoint, expert: int) -> Iterator[None]:
    """While open, every router of a loaded mixture chooses among the other experts, whose weights sum to one again."""
    if checkpoint.native is None:
        flow = model.base_model.flow
        flow.left_out = expert
        try:
            yield
        finally:
            flow.left_out = None
        return

    def change(logits: torch.Tensor) -> torch.Tensor:
        place = torch.tensor([expert], device=logits.device)
        best = logits.index_fill(-1, place, float("-inf")).max(-1, keepdim=True).values
        return (logits - best).index_fill(-1, place, -_FAR)

    with changed_logits(model, checkpoint, change), _scaled_blocks(model, checkpoint, expert):
        yield


@contextmanager
def _scaled_blocks(model: PreTrainedModel, checkpoint: Checkpoint, left_out: int) -> Iterator[None]:
    """Where given weights w_e are folded into native experts as E w_e, routers without one of them say 1 / (E - 1): what the
    blocks give is scaled so that the others weigh w_e / (1 - w).
    """
    weights = checkpoint.record.recipe.mixture.weights
    handles = []
    if weights is not None:
        shares = [weights[name] / sum(weights.values()) for name in checkpoint.names]
        count, rest = len(shares), 1.0 - shares[left_out]
        factor = (count - 1) / (count * rest) if rest > 0 else 1.0
        for layer in decoder_layers(model):
            block = layer.get_submodule(_native(checkpoint).block_module)
            handles.append(block.register_forward_hook(lambda _module, _args, y: y * factor))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
