"""PHATGOOSE (arXiv:2402.05859): each expert learns alone, on its own text, a gate for its own change.

With everything else frozen, y = W x + sigmoid(v_e x) s_e B_e A_e x is trained for about a hundred steps; at inference
the standardised x is compared with the standardised v_e, and the experts with the largest scores are taken.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.modekit import flow_of, place_routers
from modekit.loaded.text_training import Training, train_on_text
from modekit.routing.examples import examples_of
from modekit.routing.fitting import FittedRouter, Fitting
from modekit.text.held_out import fit_documents
from modekit.text.sequences import TokenSequence
from modekit.text.splits import text_record

STEPS = 100
_LEARNING_RATE = 1e-3


def learned_gates(fitting: Fitting) -> FittedRouter:
    """Gates trained expert by expert on the fit split of their text. Raises TextError."""
    recipe, settings = fitting.recipe, fitting.settings
    tokenizer = load_tokenizer(fitting.checkpoint.folder, run=fitting.run)
    texts = [fit_documents(expert, fitting.root, place, reads=fitting.reads) for place, expert in enumerate(recipe.experts)]
    sequences = [
        examples_of(tokenizer, documents, (place, expert), settings)
        for place, (expert, documents) in enumerate(zip(recipe.experts, texts, strict=True))
    ]
    counts = [sum(sequence.size for sequence in own) for own in sequences]
    gates = _train_gates(fitting, sequences)
    text = [text_record(documents, count) for documents, count in zip(texts, counts, strict=True)]
    return fitting.fitted(gates, text, {"tokens": counts}, "trained")


def _train_gates(fitting: Fitting, sequences: list[list[TokenSequence]]) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """One gate per router slot, float32, trained on `sequences` in recipe order."""
    checkpoint, settings = fitting.checkpoint, fitting.settings
    model = load_model(checkpoint.folder).requires_grad_(False)
    gates = place_routers(model, checkpoint.shape.mixture)  # those of the folder may stand elsewhere, of another fit
    training = Training(
        steps=settings.steps or STEPS,
        learning_rate=_LEARNING_RATE,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
    )
    learned = [torch.zeros_like(gate) for gate in gates]
    for expert, (name, own) in enumerate(zip(checkpoint.names, sequences, strict=True)):
        if any(place.has(expert) for place in checkpoint.shape.mixture.places.values()):
            with flow_of(model).changed(forced=expert, solo=True):
                train_on_text(model, own, training, run=fitting.run.about(f"gate of {name}"))
        for gate, result in zip(gates, learned, strict=True):
            result[expert] = gate.data[expert]
            gate.data.zero_()
    return [gate.float().cpu().numpy() for gate in learned]
