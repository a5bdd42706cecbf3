"""Gates from the adapters themselves, without text: Arrow (arXiv:2405.11157).

An expert scores |w_e x|, w_e the one direction that its change amplifies most: the first right singular vector. A router that
decides for several modules with the same input (q, k and v; gate and up) takes their changes as one, stacked.

Shape legend: D width of what is read, R rank, O output, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import safe_open

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.planning.mixture_config import leader_of
from modekit.planning.routing_config import whole_module_unscored
from modekit.planning.shape import RouterSlot
from modekit.routing.fitting import FittedRouter, Fitting


def low_rank_gates(fitting: Fitting) -> FittedRouter:
    """One gate per router slot, float32. The base scores 0 everywhere.

    Raises UnsupportedError when an expert's part is no low-rank change.
    """
    return fitting.fitted([_gate(fitting, slot).numpy() for slot in fitting.checkpoint.slots], [], {})


def _gate(fitting: Fitting, slot: RouterSlot) -> torch.Tensor:
    gate_ED = torch.zeros((len(slot.rows), slot.width), dtype=torch.float64)
    for expert, w_D in enumerate(gate_ED):
        change_RD = _stacked(fitting.checkpoint, slot, expert)
        if len(change_RD):
            w_D[:] = torch.linalg.svd(change_RD, full_matrices=False)[2][0]
    # A router that reads several averages scores their mean: the same rows for each part.
    gate_ED = gate_ED / fitting.settings.temperature / slot.parts
    return gate_ED.repeat(1, slot.parts).float()


def _stacked(checkpoint: Checkpoint, slot: RouterSlot, expert: int) -> torch.Tensor:
    """(R, D) float64 with |stacked x| = |all changes of the expert that read x|; empty for the base."""
    mixture = checkpoint.shape.mixture
    parts = []
    for module in mixture.readers(leader_of(slot)):
        place = mixture.places[module]
        if expert in place.own:
            raise whole_module_unscored(checkpoint.record.recipe.experts[expert], module)
        if place.ranks[expert]:
            a_RD, b_OR = low_rank_tensors(checkpoint, module, place.ranks, expert)
            parts.append(place.scales[expert] * torch.linalg.qr(b_OR.double()).R @ a_RD.double())
    return torch.cat(parts) if parts else torch.zeros((0, slot.width), dtype=torch.float64)


def low_rank_tensors(
    checkpoint: Checkpoint, module: str, ranks: Sequence[int], expert: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R, D) and B (O, R) of one expert at a place, as the checkpoint holds them."""
    own, found = slice(sum(ranks[:expert]), sum(ranks[: expert + 1])), []
    for name, rows in ((f"{module}.lora_A", own), (f"{module}.lora_B", (slice(None), own))):
        with safe_open(checkpoint.tensors[name].file, framework="pt") as file:
            found.append(file.get_slice(name)[rows])
    return found[0], found[1]
