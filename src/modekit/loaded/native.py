"""The native shape, loaded: routers are overruled by what they read, and one expert at a time is a dense model.

What native routers return differs between versions of transformers; what they read does not, so that everything here goes
by that.

Shape legend: B batch, S sequence, D width, E experts, T tokens, M experts of each, F hidden units, X twice as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from safetensors import safe_open
from torch import nn

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import RECORD_FILE
from modekit.errors import CheckpointError
from modekit.files.typed import said_by
from modekit.loaded.layers import LayerByLayer, by_layer
from modekit.loaded.load import LOADING, decoder_layers, in_float64
from modekit.loaded.mixture import LoadedMixture, RouterTrace
from modekit.loaded.passes import removed
from modekit.planning.channels import CONSTANT, Channels
from modekit.planning.native_shape import NativeShape
from modekit.planning.plan import Shape
from modekit.planning.shape import other_record
from modekit.recipes.layers import Layer
from modekit.run import QUIET, Run
from modekit.sources.config import Config, whole
from modekit.sources.names import in_layer, split_layer
from modekit.sources.native import Native
from modekit.sources.remote_code import check_no_code

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
_FAR = 10_000.0  # between two logits: softmax gives the lower one exactly nothing


class NativeMixture(LoadedMixture):
    """A mixture in a native architecture, as transformers loads it."""

    @property
    def native(self) -> Native:
        """The row of the architecture."""
        return native_of(self.checkpoint)

    def routers(self) -> list[nn.Module]:
        """The router of every layer; each reads its first argument, (B, S, D) or (T, D)."""
        return [layer.get_submodule(self.native.router_module) for layer in decoder_layers(self.model)]

    def gates(self) -> list[nn.Parameter]:
        shape = (len(self.checkpoint.names) * self.checkpoint.shape.inner, int(self.model.config.hidden_size))
        return [next(parameter for parameter in router.parameters() if parameter.shape == shape) for router in self.routers()]

    def experts(self) -> Iterator[nn.Parameter]:
        """Whole FFNs: all of a block but its gate."""
        gates = {id(gate) for gate in self.gates()}
        for layer in decoder_layers(self.model):
            yield from (each for each in self.ffn(layer).parameters() if id(each) not in gates)

    def constants(self) -> Iterator[nn.Parameter]:
        """Those of the architecture's row that are no buffers in memory; where whole experts are carried, the layer in front
        and the gates, too, which must say the same in every layer.
        """
        if self._carrying is not None:
            yield from decoder_layers(self.model)[0].parameters()
            yield from self.gates()
        named = dict(self.model.named_parameters())
        paths = (*(constant.name for constant in self.native.constants), *self.native.empty)
        names = (in_layer(layer, path) for layer in range(self.checkpoint.layers) for path in paths)
        yield from (named[name] for name in names if name in named)

    @property
    def _carrying(self) -> Channels | None:
        """The channels, where they carry more than the router's evidence."""
        channels = self.checkpoint.shape.channels
        return channels if channels is not None and channels.carry is not None else None

    def own_corner(self, name: str, parameter: nn.Parameter) -> tuple[slice, ...] | None:
        """Without the channels, heads and hidden units through which whole experts are carried. Gate and up in one tensor,
        (E, 2 F, D), are told apart: four slices of (E, 2, F, D).
        """
        channels = self._carrying
        if channels is None:
            return None
        if parameter.ndim == 3:
            units = channels.expert_hidden + channels.more_units
            if parameter.shape[1:] == (2 * units, channels.hidden + channels.spare):
                return (slice(None), slice(None), slice(channels.expert_hidden), slice(channels.hidden))
            return (slice(None), slice(channels.hidden), slice(channels.expert_hidden))
        pad = channels.pad_of(name, (*parameter.shape[:-1], channels.hidden), self.native.family.decoder.parts)
        if pad is None:
            return None
        ends = (*(pad.rows,) * (parameter.ndim - 1), pad.columns)
        return tuple(slice(size - end) for size, end in zip(parameter.shape, ends, strict=True))

    def ffn(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(self.native.block_module)

    def prepare_training(self) -> None:
        """A loop over experts is faster than grouped products on a processor (benchmarks/training.md)."""
        if self.model.device.type == "cpu":
            self.model.set_experts_implementation("eager")

    def set_top_k(self, top_k: int | None) -> None:
        chosen = top_k or whole(self.checkpoint.config, self.native.top_k_key)
        for layer in decoder_layers(self.model):
            for module in self.ffn(layer).modules():
                if hasattr(module, "top_k"):
                    setattr(module, "top_k", chosen)  # noqa: B010

    def forced(self, expert: int) -> AbstractContextManager[None]:
        """The expert's logit is 10,000 and the others' less by twice as much: softmax is exactly one-hot."""

        def change(logits: torch.Tensor) -> torch.Tensor:
            return torch.full_like(logits, -_FAR).index_fill(-1, torch.tensor([expert], device=logits.device), _FAR)

        return self._changed_logits(change)

    @contextmanager
    def left_out(self, expert: int) -> Iterator[None]:
        """The expert's logit is far below the others'."""

        def change(logits: torch.Tensor) -> torch.Tensor:
            index = torch.tensor([expert], device=logits.device)
            best = logits.index_fill(-1, index, float("-inf")).max(-1, keepdim=True).values
            return (logits - best).index_fill(-1, index, -_FAR)

        with self._changed_logits(change), self._scaled_blocks(expert):
            yield

    @contextmanager
    def traced(self) -> Iterator[RouterTrace]:
        """Logits are taken from what routers read, outside the layer, so that a layer that is computed again for its gradient
        runs the same operations.
        """
        routers = self.routers()
        trace = RouterTrace(len(routers), self.gates())

        def read(number: int, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            trace.said[number] = args[0]

        handles = [router.register_forward_pre_hook(partial(read, number)) for number, router in enumerate(routers)]
        with removed(handles):
            yield trace

    @contextmanager
    def _changed_logits(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """While open, every router decides by `change(logits)`, logits (..., E).

        A router reads the logits in place of x, as the first E of D numbers, through the gate [I | 0], so that its own code
        sees exactly them (E <= D). They must be finite: a weight of zero is a logit far below the others.
        """
        handles, gates = [], []
        for router, gate in zip(self.routers(), self.gates(), strict=True):
            gates.append((gate, gate.data))
            handles.append(router.register_forward_pre_hook(partial(_read_logits, change, gate.data)))
            gate.data = torch.eye(*gate.shape, dtype=gate.dtype, device=gate.device)
        try:
            with removed(handles):
                yield
        finally:
            for gate, data in gates:
                gate.data = data

    @contextmanager
    def _scaled_blocks(self, left_out: int) -> Iterator[None]:
        """Where given weights w_e are folded into the experts as E w_e, routers without one of them say 1 / (E - 1): what the
        blocks give is scaled so that the others weigh w_e / (1 - w).
        """
        weights = self.checkpoint.record.recipe.mixture.weights
        handles = []
        if weights is not None:
            shares = [weights[name] / sum(weights.values()) for name in self.checkpoint.names]
            count, rest = len(shares), 1.0 - shares[left_out]
            factor = (count - 1) / (count * rest) if rest > 0 else 1.0
            for layer in decoder_layers(self.model):
                handles.append(self.ffn(layer).register_forward_hook(lambda _module, _args, y: y * factor))
        with removed(handles):
            yield


def _read_logits(
    change: Callable[[torch.Tensor], torch.Tensor], gate_ED: torch.Tensor, _module: nn.Module, args: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """What a router is given in place of its input: the changed logits, filled up with zeros to D."""
    logits = change(nn.functional.linear(args[0], gate_ED))
    return (nn.functional.pad(logits, (0, args[0].shape[-1] - logits.shape[-1])), *args[1:])


def native_of(checkpoint: Checkpoint) -> Native:
    """The row of a native checkpoint."""
    assert isinstance(checkpoint.shape, NativeShape)
    return checkpoint.shape.native


class DenseView:
    """The backbone of a native checkpoint with one expert's FFN at a time, as a model of the dense family's own class: the
    cost of a dense pass, one layer in memory whatever the number of layers and experts.

    Weights are memory-mapped and taken as they are where the dtype allows.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, run: Run = QUIET) -> None:
        self._checkpoint, self._native, self._dtype, self._expert = checkpoint, native_of(checkpoint), dtype, 0
        run.begin(LOADING)
        said, channels = checkpoint.record.dense_config, checkpoint.shape.channels
        wide = said if channels is None else channels.widened(said)
        _check_sizes(checkpoint, wide)
        check_no_code(said, where=f"{checkpoint.folder}: {RECORD_FILE}", run=run)
        block = f"{self._native.router.split('.')[0]}."  # what the native layer has in place of the dense FFN
        self._shared = by_layer(name for name in checkpoint.tensors if not split_layer(name)[1].startswith(block))
        try:
            layers = LayerByLayer(said, wide, dtype)
            layers.use(self._weights)
        except Exception as error:  # configs check themselves, each in its own way
            raise CheckpointError(
                "one expert of the mixture is no model of the base's kind",
                where=f"{checkpoint.folder}: dense_config",
                found=said_by(error),
                remedy="build the mixture again",
            ) from None
        self.model = layers.model

    def use_expert(self, expert: int) -> None:
        """From now on the FFN of every layer is that of expert `expert` (index in recipe order)."""
        self._expert = expert

    def router_inputs(self) -> list[nn.Module]:
        """The FFN block of each layer; its input is what the router of that layer reads."""
        return [layer.get_submodule(self._native.family.decoder.ffn) for layer in decoder_layers(self.model)]

    def in_decoder(self) -> list[bool]:
        return [False] * len(self.router_inputs())

    def _weights(self, layer: Layer | None) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, self._read(name)) for name in self._shared.get(layer, []))
        if isinstance(layer, int):
            yield from own_ffn(self._checkpoint.shape, layer, self._expert, self._read)

    def _read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        with safe_open(self._checkpoint.tensors[name].file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name) if rows == slice(None) else file.get_slice(name)[rows]
        return tensor.to(self._dtype)


def own_ffn(
    shape: Shape, layer: int, expert: int, read: Callable[[str, slice], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The FFN of one expert in a layer of the result, by what the base's class calls it; of an expert that is a mixture itself
    its experts and gates. `read` gives a tensor, or rows of its first axis.
    """
    assert isinstance(shape, NativeShape)
    native, routed, count = shape.native, shape.routed, max(1, shape.inner)
    own = slice(expert * count, (expert + 1) * count)
    if native.fused is not None:
        both_MXD, down_MDF = (read(in_layer(layer, path), own) for path in native.fused)
    else:
        paths = [in_layer(layer, (native.experts or {})[part]) for part in ("gate", "up", "down")]
        numbers = range(own.start, own.stop)
        gate, up, down_MDF = (torch.stack([read(path.format(expert=each), slice(None)) for each in numbers]) for path in paths)
        both_MXD = torch.cat([gate, up], dim=1)
    if routed is not None:
        gates = read(in_layer(layer, native.router), own)
        yield in_layer(layer, routed.gate_up), both_MXD
        yield in_layer(layer, routed.down), down_MDF
        yield in_layer(layer, routed.gate), gates
    else:
        parts = zip(("gate", "up", "down"), (*both_MXD[0].chunk(2), down_MDF[0]), strict=True)
        yield from ((in_layer(layer, shape.family.decoder.mlp[part]), matrix) for part, matrix in parts)


def _check_sizes(checkpoint: Checkpoint, wide: Config) -> None:
    """An edited record must not make a model of another size than the weights."""
    for key in _SIZES:
        if wide.get(key) != checkpoint.config.get(key):
            raise other_record(f"{checkpoint.folder}: dense_config.{key}", wide.get(key), checkpoint.config.get(key))


_CHOSEN, _NEVER = 16.0, 1_000.0
"""Nats of evidence: of an expert that is forced, where no other has any; of one that is left out, less than it has."""


class RoutedMixture(NativeMixture):
    """A mixture of fine-tunes of one mixture, as transformers loads it."""

    def forced(self, expert: int) -> AbstractContextManager[None]:
        """Every token speaks for one expert and no other."""
        return self._evidence(expert, _CHOSEN, others=0.0)

    @contextmanager
    def left_out(self, expert: int) -> Iterator[None]:
        """Every token speaks against one expert."""
        with self._evidence(expert, -_NEVER, others=1.0):
            yield

    @contextmanager
    def traced(self) -> Iterator[RouterTrace]:
        """Logits of the experts of the recipe: of each the largest of its own experts."""
        with super().traced() as trace:
            yield DomainTrace(trace, len(self.checkpoint.names), int(self.model.config.num_experts_per_tok))

    @contextmanager
    def _evidence(self, expert: int, nats: float, *, others: float) -> Iterator[None]:
        """What every row of the embedding says, times `others`, and so much of one expert besides."""
        channels, _ = self.checkpoint.carrier
        weight: torch.Tensor = self.model.get_input_embeddings().weight.data
        said_VN = weight[:, channels.evidence].clone()
        sizes_V = in_float64(weight[:, channels.constant]) / CONSTANT
        unit = float(sizes_V.median() / channels.eps) * channels.embedding_scale
        changed_VN = said_VN * others
        changed_VN[:, expert :: channels.experts] += (nats * unit * sizes_V).to(changed_VN)[:, None]
        weight[:, channels.evidence] = changed_VN
        try:
            yield
        finally:
            weight[:, channels.evidence] = said_VN


class DomainTrace(RouterTrace):
    """Of routers that choose among all experts of all fine-tunes, what they say of each fine-tune."""

    def __init__(self, trace: RouterTrace, experts: int, top_k: int) -> None:
        super().__init__(0, None)
        self._trace, self._experts, self._top_k = trace, experts, top_k

    def inner(self) -> Iterator[torch.Tensor]:
        """Weights of the M experts of every layer, of whichever fine-tune was chosen; they sum to one."""
        for _, logits in self._trace.by_slot():
            chosen = logits.topk(self._top_k)
            weights = torch.zeros_like(logits).scatter(-1, chosen.indices, chosen.values.softmax(-1))
            yield weights.reshape(*logits.shape[:-1], self._experts, -1).sum(-2).cpu()

    def by_slot(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Logits (..., E) of every layer."""
        for slot, logits in self._trace.by_slot():
            yield slot, logits.reshape(*logits.shape[:-1], self._experts, -1).amax(-1)
