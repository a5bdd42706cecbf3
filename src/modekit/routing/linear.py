"""Linear gates: from what routers read of the domains, centroid (closed form), logistic (a convex problem), cosine
(from a start in closed form); from the adapters themselves, without text, Arrow (arXiv:2405.11157); and a trained
router over experts that come and go: rows that stay are what the training made them, a new one is fitted beside them.

Every fit ends in one bias-free gate per router, because that is what native architectures hold; the temperature is folded into
it. Domains count equally, however much text each had.

Shape legend: D width of what a gate takes, E experts, N kept tokens of all domains, R dimensions, or rank, O output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy, normalize, pad

from modekit.architecture import modekit_router
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import RouterRecord
from modekit.errors import RecipeError
from modekit.planning.mixture_config import leader_of
from modekit.planning.modekit_shape import whole_module_unscored
from modekit.planning.reuse import Origins
from modekit.planning.shape import RouterSlot
from modekit.recipes.mixture import Router
from modekit.routing.fit import FittedRouter, Fitting
from modekit.routing.inputs import DomainStatistics, read_domains
from modekit.run import QUIET, Run

_TEMPERATURES = [2.0 ** (step / 4) for step in range(-40, 41)]
_TINY = 1e-30  # where all is zero
_HOLD = 10.0  # times l2, of a cosine gate to its start
_UNCALIBRATED_TEMPERATURE = 0.3  # for rows of length 1, when no tokens were kept to choose it on


def fit_gates(settings: Router, domains: Sequence[DomainStatistics], run: Run = QUIET) -> list[torch.Tensor]:
    """One gate (E, D) in float32 per router, for domains in the order of the experts.

    Raises RecipeError when logistic has no kept tokens to fit on.
    """
    rule = RULES[settings.fit]
    count = len(domains[0].slots)
    slots = run.over(f"solve {settings.fit}", range(count), count)
    return [(rule(slot, domains, settings) / settings.temperature).float() for slot in slots]


def centroid(slot: int, domains: Sequence[DomainStatistics], settings: Router) -> torch.Tensor:
    """w_e = mean of x over domain e (less the mean over its negative prompts), at length 1, at the best temperature."""
    means_ED = torch.stack([domain.slots[slot].mean_D - domain.slots[slot].negative_D for domain in domains])
    return _calibrated(normalize(means_ED, eps=_TINY), slot, domains)


def _calibrated(weights_ED: torch.Tensor, slot: int, domains: Sequence[DomainStatistics]) -> torch.Tensor:
    """The gate divided by the temperature that gives the kept tokens' domains the largest likelihood."""
    if any(domain.slots[slot].sample_ND.shape[0] == 0 for domain in domains):
        return normalize(weights_ED, eps=_TINY) / _UNCALIBRATED_TEMPERATURE
    tokens = _kept_tokens(slot, domains)
    logits_NE: torch.Tensor = tokens.x_ND @ weights_ED.float().T
    best: float = min(_TEMPERATURES, key=lambda temperature: float(tokens.loss(logits_NE / temperature)))
    return weights_ED / best


@dataclass(frozen=True)
class _KeptTokens:
    """Kept x (N, D) in float32, the domain of each, and its share: domains weigh the same, shares sum to 1."""

    x_ND: torch.Tensor
    labels_N: torch.Tensor
    shares_N: torch.Tensor

    def loss(self, logits_NE: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the domains under logits."""
        losses_N = cross_entropy(logits_NE, self.labels_N, reduction="none")
        return (losses_N * self.shares_N).sum()


def _kept_tokens(slot: int, domains: Sequence[DomainStatistics]) -> _KeptTokens:
    """Of all domains. Raises RecipeError where one of them has none."""
    counts = [domain.slots[slot].sample_ND.shape[0] for domain in domains]
    if not all(counts):
        raise RecipeError(
            "this fit needs kept tokens and there are none",
            where="mixture.router.keep_tokens",
            expected="at least 1",
            remedy="fit again with keep_tokens > 0, or choose centroid",
        )
    return _KeptTokens(
        torch.cat([domain.slots[slot].sample_ND.float() for domain in domains]),
        torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
        torch.cat([torch.full((count,), 1.0 / (count * len(counts))) for count in counts]),
    )


def logistic(slot: int, domains: Sequence[DomainStatistics], settings: Router) -> torch.Tensor:
    """Multinomial logistic regression on the kept x, without intercept, by L-BFGS from zero."""
    start_ED = torch.zeros(len(domains), len(domains[0].slots[slot].sum_D))
    return logistic_beside(slot, domains, settings, start_ED, range(len(domains))).double()


def logistic_beside(
    slot: int, domains: Sequence[DomainStatistics], settings: Router, gate_ED: torch.Tensor, new: Sequence[int]
) -> torch.Tensor:
    """Rows (N, D) float32 of the experts `new` of a gate whose other rows are as `gate_ED` has them: logistic regression."""
    kept = _kept_tokens(slot, domains)
    scale = kept.x_ND.square().mean().sqrt().clamp_min(_TINY)
    tokens = replace(kept, x_ND=kept.x_ND / scale)  # at mean square 1
    others_ED = gate_ED.float() * scale
    rows_ND = torch.zeros((len(new), tokens.x_ND.shape[1]), requires_grad=True)

    def loss() -> torch.Tensor:
        weights_ED = others_ED.index_copy(0, torch.tensor([*new]), rows_ND)
        return tokens.loss(tokens.x_ND @ weights_ED.T) + settings.l2 * rows_ND.square().sum()

    _minimise(loss, rows_ND)
    return (rows_ND.detach() / scale).float()


def cosine(slot: int, domains: Sequence[DomainStatistics], settings: Router) -> torch.Tensor:
    """W the discriminants of the domains (whitened by the second moment), v_e where W takes the mean of x; then descent."""
    means_ED = torch.stack([domain.slots[slot].mean_D for domain in domains])
    tokens = _kept_tokens(slot, domains)
    x_ND = tokens.x_ND.double()
    moment_DD = x_ND.T @ (x_ND * tokens.shares_N[:, None])
    moment_DD.diagonal().add_(max(settings.l2, 1e-12) * moment_DD.diagonal().mean())  # l2 does not depend on the scale of x
    root_DD = torch.linalg.cholesky(moment_DD)
    white_DE: torch.Tensor = torch.linalg.solve_triangular(root_DD, means_ED.T, upper=False)
    size = settings.dimensions or len(domains)
    directions_DR = torch.linalg.svd(white_DE, full_matrices=False)[0][:, :size]
    projection_RD = torch.linalg.solve_triangular(root_DD.T, directions_DR, upper=True).T
    vectors_ER = pad(normalize(white_DE.T @ directions_DR, eps=_TINY), (0, means_ED.shape[1] - size))
    return _descended(torch.cat([vectors_ER / _UNCALIBRATED_TEMPERATURE, projection_RD]), slot, domains, settings)


def _descended(gate_GD: torch.Tensor, slot: int, domains: Sequence[DomainStatistics], settings: Router) -> torch.Tensor:
    """The cosine gate that lowers the loss of the kept tokens, by L-BFGS from this one, to which l2 holds it."""
    tokens = _kept_tokens(slot, domains)
    start_GD = gate_GD.float()
    sizes_G1 = torch.linalg.vector_norm(start_GD, dim=1, keepdim=True).clamp_min(_TINY)
    moved_GD = torch.zeros_like(start_GD, requires_grad=True)

    def loss() -> torch.Tensor:
        gate_GD = start_GD + sizes_G1 * moved_GD
        logits_NE = modekit_router.cosine(tokens.x_ND @ gate_GD.T, gate_GD, len(domains))
        return tokens.loss(logits_NE) + _HOLD * settings.l2 * moved_GD.square().sum()

    _minimise(loss, moved_GD)
    found: torch.Tensor = (start_GD + sizes_G1 * moved_GD.detach()).double()
    return found


def _minimise(loss: Callable[[], torch.Tensor], weights: torch.Tensor) -> None:
    """By L-BFGS, from where the weights are."""
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, tolerance_grad=1e-6, tolerance_change=1e-9, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]


RULES: Mapping[str, Callable[[int, Sequence[DomainStatistics], Router], torch.Tensor]] = {
    "centroid": centroid,
    "logistic": logistic,
    "cosine": cosine,
}
"""Name of a fit -> (slot, domains in the order of the experts, settings) -> gate (E, D) at temperature 1, float64."""


def solve_gates(fitting: Fitting) -> FittedRouter:
    """Read what is not kept, and solve. Raises TextError and RecipeError."""
    domains = read_domains(fitting)
    solved = zip(fit_gates(fitting.settings, domains, fitting.run), fitting.checkpoint.slots, strict=True)
    # A gate with one decision per output feature starts as one decision for all of them.
    gates = [gate.repeat(max(1, slot.features), 1).numpy() for gate, slot in solved]
    text = [domain.source["text"] for domain in domains]
    return fitting.fitted(gates, text, {"tokens": [domain.tokens for domain in domains]})


# Of adapters, without text. An expert scores |w_e x|, w_e the one direction that its change amplifies most: the first right
# singular vector. A router that decides for several modules with the same input (q, k and v; gate and up) takes their changes
# as one, stacked.


def low_rank_gates(fitting: Fitting) -> FittedRouter:
    """One gate per router slot, float32. The base scores 0 everywhere.

    Raises UnsupportedError when an expert's part is no low-rank change.
    """
    gates = []
    for slot in fitting.checkpoint.slots:
        gate_ED = np.zeros((slot.experts, slot.width))
        for expert, w_D in enumerate(gate_ED):
            changes = list(_changes(fitting.checkpoint, slot, expert))
            if changes:
                w_D[:] = torch.linalg.svd(torch.cat(changes), full_matrices=False)[2][0].numpy()
        # A router that reads several averages scores their mean: the same rows for each part.
        gate_ED = gate_ED / fitting.settings.temperature / slot.parts
        gates.append(np.tile(gate_ED, slot.parts).astype(np.float32))
    return fitting.fitted(gates, [], {})


def _changes(checkpoint: Checkpoint, slot: RouterSlot, expert: int) -> Iterator[torch.Tensor]:
    """(R, D) float64 for every change of an expert that reads x: together they have |stacked x| = |all changes of x|."""
    mixture = checkpoint.shape.mixture
    for module in mixture.readers(leader_of(slot)):
        place = mixture.places[module]
        if expert in place.own:
            raise whole_module_unscored(checkpoint.record.recipe.experts[expert], module)
        if place.ranks[expert]:
            own, found = slice(sum(place.ranks[:expert]), sum(place.ranks[: expert + 1])), []
            for name, rows in ((f"{module}.lora_A", own), (f"{module}.lora_B", (slice(None), own))):
                with safe_open(checkpoint.tensors[name].file, framework="pt") as file:
                    found.append(file.get_slice(name)[rows].double())
            a_RD, b_OR = found
            yield place.scales[expert] * torch.linalg.qr(b_OR).R @ a_RD


def trained_gates(fitting: Fitting, before: Checkpoint, origins: Origins) -> FittedRouter:
    """Gates for the experts of a checkpoint, of which `origins` says who they were in `before`, whose router was trained.

    Raises RecipeError where the rows of a gate do not stand by themselves, or a new one cannot be fitted.
    """
    slots, record, fit = fitting.checkpoint.slots, before.record.router, fitting.recipe.mixture.fit
    new = [place for place, origin in enumerate(origins) if origin is None]
    alone = fitting.checkpoint.shape.channels is None and not any(slot.features or slot.shared for slot in before.slots)
    alone = alone and [(slot.name, slot.shape[1]) for slot in slots] == [(slot.name, slot.shape[1]) for slot in before.slots]
    if not alone or (new and not (fit is not None and fit.runs_models)):
        raise RecipeError(
            "the router was trained, and who is in the mixture cannot change beside what the training made",
            where=str(before.folder),
            found=f"fit: {fit.name}" if alone and fit is not None else "a router that is set as a whole",
            remedy="pass --refit, which sets it again from the text and the kept statistics, and train it again afterwards",
        )
    gates = []
    for slot, gate in zip(slots, before.gates(), strict=True):
        gates.append(np.zeros(slot.shape, np.float32))
        for place, origin in enumerate(origins):
            if origin is not None:
                gates[-1][place] = gate[origin]
    renamed = {before.names[at]: name for name, at in zip(fitting.recipe.names, origins, strict=True) if at is not None}
    text = {renamed[name]: said for name, said in record.text.items() if name in renamed}
    if new:
        domains = read_domains(fitting)
        for number, gate in enumerate(gates):
            gate[new] = logistic_beside(number, domains, fitting.settings, torch.from_numpy(gate), new).numpy()
        text = {name: each.source["text"] for name, each in zip(fitting.recipe.names, domains, strict=True)}
    said = RouterRecord(status="trained", settings=record.settings, sha256="", text=text, report=record.report)
    return FittedRouter(gates, said)
