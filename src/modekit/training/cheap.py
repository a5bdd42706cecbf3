"""Cheap training: every gate alone, on kept activations with domain labels. One pass forward over the text, none back.

What a router reads while the domain's own expert is active is kept once (evenly spaced tokens, float16, within
`cache_bytes`); each gate then starts from what it is and descends the cross-entropy of the domains in small batches. Of all
states passed, the one with the lowest cross-entropy on the select split is taken.

Shape legend: D width of what a gate takes, E experts, N kept tokens of all domains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import TrainingError
from modekit.loaded.models import ExpertView, expert_view
from modekit.progress import Progress
from modekit.routing.capture import run_with_inputs, to_float16
from modekit.text.sequences import TokenSequence
from modekit.training.batches import Corpus, shares
from modekit.training.settings import TrainSettings

_BATCH = 1_024  # kept tokens per step
_PASSES = 20  # over the kept tokens, when no number of steps is given


@dataclass(frozen=True)
class Kept:
    """What one router's gate took: (N, D) float16, and the domain's expert (N,) of each token."""

    x_ND: torch.Tensor
    labels_N: torch.Tensor


@dataclass(frozen=True)
class CheapResult:
    """Gates (E, D) float32 in the order of the slots, per slot the cross-entropy of the domains before and after, tokens read,
    and the most steps that a gate took.
    """

    gates: list[torch.Tensor]
    before: list[float]
    after: list[float]
    tokens: int
    steps: int


def train_cheap(
    checkpoint: Checkpoint,
    corpora: Sequence[Corpus],
    select: Mapping[int, Sequence[TokenSequence]],
    settings: TrainSettings,
    progress: Progress,
) -> CheapResult:
    """Train every gate; nothing is written. `select` is held-out text by the place of its expert.

    Raises TrainingError where a router's score is not linear in what its gate reads.
    """
    _refuse_other_scores(checkpoint)
    view = expert_view(checkpoint)
    slots, widths = len(checkpoint.slots), [slot.width for slot in checkpoint.slots]
    averages, prefix = _averages(checkpoint)
    bytes_per_token = 2 * sum(width * len(averages) for width in widths)
    total = sum(corpus.tokens for corpus in corpora) + sum(len(s.ids) for texts in select.values() for s in texts)
    keep = min(1.0, settings.cache_bytes / (bytes_per_token * total))
    kept = _capture(
        view, {corpus.expert: corpus.sequences for corpus in corpora}, averages, prefix, slots, keep, progress, "read"
    )
    held_out = _capture(view, select, averages, prefix, slots, keep, progress, "read held-out")
    mix = {corpus.expert: share for corpus, share in zip(corpora, shares(corpora, settings), strict=True)}
    gates, before, after, steps = [], [], [], 0
    for slot, gate in enumerate(map(torch.from_numpy, checkpoint.gates())):
        trained, losses, taken = _descend(gate, kept[slot], held_out[slot], mix, settings)
        steps = max(steps, taken)
        gates.append(trained)
        before.append(losses[0])
        after.append(losses[1])
        progress("train gates", slot + 1, slots)
    return CheapResult(gates, before, after, total, steps)


def _refuse_other_scores(checkpoint: Checkpoint) -> None:
    routing = checkpoint.config.get("modekit", {}).get("routing", {}) if checkpoint.native is None else {}
    if routing.get("score", "linear") != "linear" or any(slot.features for slot in checkpoint.slots):
        raise TrainingError(
            "a cheap training needs routers with one linear gate", where="speed",
            found=checkpoint.record.recipe.mixture.router.fit,
            remedy="train it end to end (without --cheap), or build with a linear router",
        )  # fmt: skip


def _averages(checkpoint: Checkpoint) -> tuple[Sequence[Mapping[str, float | None]], int | None]:
    if checkpoint.native is not None:
        return [{"decay": None}], None
    routing = checkpoint.config["modekit"]["routing"]
    return routing["averages"], routing["prefix"]


def _capture(
    view: ExpertView, texts: Mapping[int, Sequence[TokenSequence]], averages: Sequence[Mapping[str, float | None]],
    prefix: int | None, slots: int, keep: float, progress: Progress, stage: str,
) -> list[Kept]:  # fmt: skip
    """Every `1 / keep`-th token of what every router reads, under each domain's own expert."""
    whole = sum(len(sequence.ids) for sequences in texts.values() for sequence in sequences)
    done = 0
    parts: list[list[Kept]] = [[] for _ in range(slots)]
    for expert, sequences in texts.items():
        total = sum(len(sequence.ids) for sequence in sequences)
        count = max(1, int(total * keep))
        wanted = torch.linspace(0, total - 1, count, dtype=torch.float64).round().long()
        row_of = torch.full((total,), -1)
        row_of[wanted] = torch.arange(count)
        kept: dict[int, torch.Tensor] = {}

        def consume(slot: int, x_TD: torch.Tensor, places_T: torch.Tensor) -> None:
            rows = row_of[places_T]  # noqa: B023  (used within this turn of the loop)
            found = rows >= 0
            if slot not in kept:  # noqa: B023
                kept[slot] = torch.zeros((count, x_TD.shape[1]), dtype=torch.float16)  # noqa: B023
            kept[slot][rows[found]] = to_float16(x_TD[found.to(x_TD.device)])  # noqa: B023

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(stage, done, whole)

        view.use_expert(expert)
        run_with_inputs(view, sequences, averages, prefix, consume, advance)
        for slot in range(slots):
            parts[slot].append(Kept(kept[slot], torch.full((count,), expert)))
    return [Kept(torch.cat([part.x_ND for part in each]), torch.cat([part.labels_N for part in each])) for each in parts]


def _descend(
    gate_ED: torch.Tensor, kept: Kept, held_out: Kept, mix: Mapping[int, float], settings: TrainSettings
) -> tuple[torch.Tensor, tuple[float, float], int]:
    """AdamW from the gate as it is; the state with the lowest held-out cross-entropy, that loss before and after, and the
    number of steps taken.
    """
    scale = float(kept.x_ND.float().square().mean().sqrt().clamp_min(1e-30))
    # In units of the inputs' size one rate fits every layer.
    weights_ED = (gate_ED * scale).requires_grad_(True)
    shares_N = torch.zeros(len(kept.labels_N))
    for expert, share in mix.items():
        own = kept.labels_N == expert
        shares_N[own] = share / max(1, int(own.sum()))
    held_x_ND = held_out.x_ND.float() / scale
    held_shares_N = 1.0 / torch.bincount(held_out.labels_N, minlength=len(gate_ED)).clamp_min(1)[held_out.labels_N].float()
    held_shares_N = held_shares_N / held_shares_N.sum()

    def held_out_loss() -> float:
        with torch.no_grad():
            losses_N = torch.nn.functional.cross_entropy(held_x_ND @ weights_ED.T, held_out.labels_N, reduction="none")
            return float((losses_N * held_shares_N).sum())

    steps = settings.steps or math.ceil(len(kept.labels_N) * _PASSES / _BATCH)
    optimizer = torch.optim.AdamW([weights_ED], lr=settings.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    generator = torch.Generator().manual_seed(settings.seed)
    first = best = held_out_loss()
    best_gate = gate_ED.clone()
    every, without, step = max(1, steps // 40), 0, -1
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1.0 - step / steps)
        rows = torch.multinomial(shares_N, _BATCH, replacement=True, generator=generator)
        loss = torch.nn.functional.cross_entropy(kept.x_ND[rows].float() / scale @ weights_ED.T, kept.labels_N[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % every == 0:
            now = held_out_loss()
            without = 0 if now < best else without + 1
            if now < best:
                best, best_gate = now, weights_ED.detach() / scale
            if without > 2 * settings.patience:
                break
    return best_gate.clone(), (first, best), step + 1
