"""PHATGOOSE (arXiv:2402.05859): each expert learns alone, on its own text, a gate for its own change.

With everything else frozen, y = W x + sigmoid(v_e x) s_e B_e A_e x is trained for about a hundred steps; at inference
the standardised x is compared with the standardised v_e, and the experts with the largest scores are taken.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.loaded.models import load_model
from modekit.loaded.next_token import Training, train_language_model
from modekit.progress import Progress, silent
from modekit.recipes.recipe import Router
from modekit.text.sequences import TokenSequence

STEPS = 100
_LEARNING_RATE = 1e-3


def train_gates(
    checkpoint: Checkpoint,
    settings: Router,
    sequences: list[list[TokenSequence]],
    *,
    progress: Progress = silent,
) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """One gate per router slot, float32, trained expert by expert on `sequences` in recipe order."""
    model = load_model(checkpoint.folder).requires_grad_(False)
    gates = []
    for slot in checkpoint.slots:
        router = model.get_submodule(slot.name.removesuffix(".gate"))
        # The folder's own gates may be of another fit, with other rows and averages.
        router.routing = checkpoint.config["modekit"]["routing"]
        router.gate = torch.nn.Parameter(torch.zeros(slot.shape, device=model.device))
        gates.append(router.gate)
    training = Training(
        steps=settings.steps or STEPS, learning_rate=_LEARNING_RATE, sequence_length=settings.sequence_length,
        seed=settings.seed,
    )  # fmt: skip
    learned = [torch.zeros_like(gate) for gate in gates]
    flow = model.base_model.flow
    for expert, (name, own) in enumerate(zip(checkpoint.names, sequences, strict=True)):
        flow.forced, flow.solo = expert, True
        if any(any(place["ranks"][expert : expert + 1]) or expert in place["own"] for place in _places(checkpoint)):
            train_language_model(model, gates, own, training, progress=progress, stage=f"train gate {name}")
        for gate, result in zip(gates, learned, strict=True):
            result[expert] = gate.data[expert]
            gate.data.zero_()
    return [gate.float().cpu().numpy() for gate in learned]


def _places(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    return list(checkpoint.config["modekit"]["places"].values())
