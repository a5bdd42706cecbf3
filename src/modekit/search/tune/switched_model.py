"""One loaded model that becomes one candidate after the other: only what differs is read.

Shape legend: E experts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from modekit.architecture.modekit_router import Router
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.router_file import Gates
from modekit.loaded.load import load_model
from modekit.loaded.modekit import routers_at
from modekit.planning.mixture_config import MixtureConfig
from modekit.run import QUIET, Run
from modekit.sources.model import TensorRef
from modekit.weights.numeric import as_array, to_bytes, to_float32

_Bytes = tuple[int, int, int]


class SwitchedModel:
    """A modekit model under changing weights and routers."""

    def __init__(self, *, run: Run = QUIET) -> None:
        self._run = run
        self._places: dict[str, dict[str, object]] | None = None
        self._bytes: dict[str, _Bytes] = {}
        self._model: PreTrainedModel | None = None
        self.loads = 0

    def clear(self) -> None:
        """Give the memory back."""
        self._model, self._places, self._bytes = None, None, {}

    def put(self, shared: Checkpoint, gates: Gates) -> PreTrainedModel:
        """The mixture of shared weights under their routing and these gates."""
        places = structure(shared.shape.mixture)
        refs = {name: ref for name, ref in shared.tensors.items() if not name.endswith(".router.gate")}
        if self._model is None or places != self._places:
            self.clear()
            self._model = load_model(shared.folder, run=self._run)
            self.loads += 1
        else:
            self._read(self._model, {name: ref for name, ref in refs.items() if self._bytes[name] != _bytes_of(ref)})
        self._places, self._bytes = places, {name: _bytes_of(ref) for name, ref in refs.items()}
        _route(self._model, shared, gates)
        return self._model

    def _read(self, model: PreTrainedModel, refs: dict[str, TensorRef]) -> None:
        """Put tensors of other weights into the model."""
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        by_file: dict[Path, list[str]] = {}
        for name, ref in refs.items():
            by_file.setdefault(ref.file, []).append(name)
        for file, names in by_file.items():
            with safe_open(file, framework="pt") as tensors:
                for name in names:
                    state[name].data.copy_(tensors.get_tensor(name))


def structure(mixture: MixtureConfig) -> dict[str, dict[str, object]]:
    """Where routers stand and what they read; a gate's rows are set with the gate."""
    return {name: place.model_dump(exclude_unset=True, exclude={"rows"}) for name, place in mixture.places.items()}


def _route(model: PreTrainedModel, shared: Checkpoint, gates: Gates) -> None:
    """Let every router of the model decide as the routing of the weights says."""
    routing = shared.shape.routing.as_written()
    for module in model.modules():  # also those that a routing of fixed weights has no gates for
        if isinstance(module, Router):
            module.set(routing)
    for router, slot, gate in zip(routers_at(model, shared.slots), shared.slots, gates, strict=True):
        code = shared.tensors[slot.name].dtype  # in which a build would write it
        rounded = to_float32(as_array(to_bytes(gate.ravel(), code), code)).reshape(gate.shape)
        held = torch.nn.Parameter(torch.from_numpy(rounded.copy()).to(model.device), requires_grad=False)
        router.set(routing, slot.rows, held)


def _bytes_of(ref: TensorRef) -> _Bytes:
    """Where a tensor's bytes lie, whatever the file is called here."""
    stat = ref.file.stat()
    return stat.st_dev, stat.st_ino, ref.start
