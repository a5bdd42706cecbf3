"""PHATGOOSE (arXiv:2402.05859): each expert learns alone, on its own text, a gate for its own change.

With everything else frozen, y = W x + sigmoid(v_e x) s_e B_e A_e x is trained for about a hundred steps; at inference
the standardised x is compared with the standardised v_e, and the experts with the largest scores are taken.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.loaded.load import load_model
from modekit.loaded.modekit import flow_of, routers_at
from modekit.loaded.next_token import Training, train_language_model
from modekit.progress import Progress, silent
from modekit.recipes.recipe import Router
from modekit.text.documents import TokenSequence

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
    gates = [torch.nn.Parameter(torch.zeros(slot.shape, device=model.device)) for slot in checkpoint.slots]
    mixture = checkpoint.shape.mixture
    for router, slot, gate in zip(routers_at(model, checkpoint.slots), checkpoint.slots, gates, strict=True):
        # The folder's own gates may be of another fit, with other rows and averages.
        router.set(mixture.routing.as_written(), slot.rows, gate)
    training = Training(
        steps=settings.steps or STEPS, learning_rate=_LEARNING_RATE, sequence_length=settings.sequence_length,
        seed=settings.seed,
    )  # fmt: skip
    learned = [torch.zeros_like(gate) for gate in gates]
    for expert, (name, own) in enumerate(zip(checkpoint.names, sequences, strict=True)):
        if any(place.has(expert) for place in mixture.places.values()):
            with flow_of(model).forcing(expert, solo=True):
                train_language_model(model, gates, own, training, progress=progress, stage=f"train gate {name}")
        for gate, result in zip(gates, learned, strict=True):
            result[expert] = gate.data[expert]
            gate.data.zero_()
    return [gate.float().cpu().numpy() for gate in learned]
