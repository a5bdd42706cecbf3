"""Gates from the adapters themselves, without text: Arrow, SpectR and SEQR.

All three score an expert by the length of what its adapter makes of x, |G_e x|; they differ in G_e. A router that
decides for several modules with the same input (q, k and v; gate and up) takes their changes as one, stacked.

    spectr   G_e with |G_e x| = |s B A x|: R of B's QR decomposition times A (SpectR and SEQR's exact form)
    seqr     the same, of length 1: an adapter does not win by being large. SEQR standardises by activations on a text;
             without one, the Frobenius norm stands for them
    arrow    the one direction that the change amplifies most: its first right singular vector (arXiv:2405.11157)

Shape legend: D width of what is read, R rank, O output, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
    rule = _RULES[fitting.settings.fit]
    return fitting.fitted([_gate(fitting, slot, rule).numpy() for slot in fitting.checkpoint.slots], [], {})


def _whole(change_RD: torch.Tensor, rows_RD: torch.Tensor) -> None:
    rows_RD[: len(change_RD)] = change_RD


def _whole_of_length_one(change_RD: torch.Tensor, rows_RD: torch.Tensor) -> None:
    _whole(change_RD, rows_RD)
    rows_RD /= torch.linalg.matrix_norm(rows_RD).clamp_min(1e-30)


def _first_direction(change_RD: torch.Tensor, rows_RD: torch.Tensor) -> None:
    if len(change_RD):
        _, _, directions = torch.linalg.svd(change_RD, full_matrices=False)
        rows_RD[0] = directions[0]


_Rule = Callable[[torch.Tensor, torch.Tensor], None]
"""(the change (R, D), R = 0 for the base; the expert's rows of the gate, zero): fills the rows. Both float64."""
_RULES: Mapping[str, _Rule] = {"spectr": _whole, "seqr": _whole_of_length_one, "arrow": _first_direction}


def _gate(fitting: Fitting, slot: RouterSlot, rule: _Rule) -> torch.Tensor:
    gates = []
    for expert, count in enumerate(slot.rows):
        rows_RD = torch.zeros((count, slot.width), dtype=torch.float64)
        rule(_stacked(fitting.checkpoint, slot, expert), rows_RD)
        gates.append(rows_RD)
    # A router that reads several averages scores their mean: the same rows for each part.
    gate = torch.cat(gates) / fitting.settings.temperature / slot.parts
    return gate.repeat(1, slot.parts).float()


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
