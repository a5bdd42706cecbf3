"""Cheap training: every gate alone, on kept activations with domain labels. One pass forward over the text, none back.

What a router reads while the domain's own expert is active is kept once (evenly spaced tokens, float16, within
`cache_bytes`); each gate then starts from what it is and descends the cross-entropy of the domains in small batches. Of all
states passed, the one with the lowest cross-entropy on the select split is taken.

Shape legend: D width of what a gate takes, E experts, N kept tokens of all domains, T tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import TrainingError
from modekit.evaluation.loss import score_domain
from modekit.loaded.load import load_model
from modekit.loaded.mixture import ExpertView
from modekit.loaded.shapes import expert_view, mixture_of
from modekit.routing.capture import GateInput, run_with_inputs, to_float16
from modekit.run import Run
from modekit.text.sequences import TokenSequence
from modekit.training.batches import DomainSequences, shares
from modekit.training.folder import TrainingOutcome
from modekit.training.request import Request
from modekit.training.settings import TrainSettings

_BATCH = 1_024  # kept tokens per step
_PASSES = 20  # over the kept tokens, when no number of steps is given


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


def train_gates(
    request: Request,
    run: Run,
) -> tuple[TrainingOutcome, dict[str, torch.Tensor]]:
    """Train gates on kept activations: how that went, and the gates, to be taken when held-out loss falls.

    Raises TrainingError where a router's score is not linear in what its gate reads.
    """
    checkpoint = request.checkpoint
    result = train_cheap(
        checkpoint, request.corpora, {text.corpus.expert: text.select for text in request.texts}, request.settings, run
    )
    model = load_model(checkpoint.folder, run=run)
    domains = [text.held_out for text in request.texts]

    def losses() -> dict[str, float]:
        return {domain.name: score_domain(model, domain, lambda _: None).loss for domain in domains}

    before = losses()
    gates = mixture_of(model, checkpoint).gates()
    for parameter, gate in zip(gates, result.gates, strict=True):
        parameter.data = gate.to(parameter)
    after = losses()
    better = sum(after.values()) < sum(before.values())
    notes = [] if better else ["the trained gates are no better on held-out text than those before: nothing was changed"]
    pairs = ", ".join(f"{old:.3f} -> {new:.3f}" for old, new in zip(result.before, result.after, strict=True))
    notes.append(f"cross-entropy of the domains per router on held-out text: {pairs}")
    named = {slot.name: gate for slot, gate in zip(checkpoint.slots, result.gates, strict=True)}
    outcome = TrainingOutcome(
        steps=result.steps,
        best_step=result.steps if better else 0,
        before=before,
        after=after if better else before,
        notes=notes,
        parameters=sum(gate.numel() for gate in gates),
        tokens=result.tokens,
    )
    return outcome, named


def train_cheap(
    checkpoint: Checkpoint,
    corpora: Sequence[DomainSequences],
    select: Mapping[int, Sequence[TokenSequence]],
    settings: TrainSettings,
    run: Run,
) -> CheapResult:
    """Train every gate; nothing is written. `select` is held-out text by the index of its expert.

    Raises TrainingError where a router's score is not linear in what its gate reads.
    """
    _refuse_other_scores(checkpoint)
    slots, widths = len(checkpoint.slots), [slot.width for slot in checkpoint.slots]
    routing = checkpoint.shape.routing
    averages, prefix = [average.as_written() for average in routing.averages], routing.prefix
    bytes_per_token = 2 * sum(width * len(averages) for width in widths)
    total = sum(corpus.tokens for corpus in corpora) + sum(s.size for texts in select.values() for s in texts)
    keep = min(1.0, settings.cache_bytes / (bytes_per_token * total))
    keeper = GateInputsReader(expert_view(checkpoint, run=run), averages, prefix, slots, keep)
    kept = keeper.read({corpus.expert: corpus.sequences for corpus in corpora}, "read", run)
    held_out = keeper.read(select, "read held-out", run)
    mix = {corpus.expert: share for corpus, share in zip(corpora, shares(corpora, settings), strict=True)}
    gates, before, after, steps = [], [], [], 0
    run.begin("train gates", slots)
    for slot, gate in enumerate(map(torch.from_numpy, checkpoint.gates())):
        trained, losses, taken = _descend(gate, kept[slot], held_out[slot], mix, settings)
        steps = max(steps, taken)
        gates.append(trained)
        before.append(losses[0])
        after.append(losses[1])
        run.progress("train gates", slot + 1, slots)
    return CheapResult(gates, before, after, total, steps)


def _refuse_other_scores(checkpoint: Checkpoint) -> None:
    if checkpoint.shape.family.pair:
        raise TrainingError(
            "a cheap training reads text of one model without an encoder",
            where="speed",
            remedy="train it end to end (without --cheap)",
        )
    if checkpoint.shape.routing.score != "linear" or any(slot.features for slot in checkpoint.slots):
        raise TrainingError(
            "a cheap training needs routers with one linear gate",
            where="speed",
            found=checkpoint.record.recipe.mixture.router.fit,
            remedy="train it end to end (without --cheap), or build with a linear router",
        )


@dataclass(frozen=True)
class _HeldOut:
    """Kept tokens of held-out text, in units of `scale`; every domain counts the same."""

    x_ND: torch.Tensor
    labels_N: torch.Tensor
    shares_N: torch.Tensor

    @classmethod
    def of(cls, kept: GateInputs, scale: float, experts: int) -> _HeldOut:
        counts_N = torch.bincount(kept.labels_N, minlength=experts).clamp_min(1)[kept.labels_N]
        shares_N = 1.0 / counts_N.float()
        return cls(kept.x_ND.float() / scale, kept.labels_N, shares_N / shares_N.sum())

    @torch.no_grad()
    def loss(self, weights_ED: torch.Tensor) -> float:
        """Mean cross-entropy of the domains, nats."""
        losses_N = torch.nn.functional.cross_entropy(self.x_ND @ weights_ED.T, self.labels_N, reduction="none")
        return float((losses_N * self.shares_N).sum())


def _descend(
    gate_ED: torch.Tensor, kept: GateInputs, held_out: GateInputs, mix: Mapping[int, float], settings: TrainSettings
) -> tuple[torch.Tensor, tuple[float, float], int]:
    """AdamW from the gate as it is; the state with the lowest held-out cross-entropy, that loss before and after, and the
    number of steps taken.
    """
    scale = float(kept.x_ND.float().square().mean().sqrt().clamp_min(1e-30))
    # In units of the inputs' size one rate fits every layer.
    weights_ED = (gate_ED * scale).requires_grad_(True)
    shares_N = _shares(kept.labels_N, mix)
    compared = _HeldOut.of(held_out, scale, len(gate_ED))
    steps = settings.steps or math.ceil(len(kept.labels_N) * _PASSES / _BATCH)
    optimizer = torch.optim.AdamW([weights_ED], lr=settings.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    generator = torch.Generator().manual_seed(settings.seed)
    first = best = compared.loss(weights_ED)
    best_gate = gate_ED.clone()
    every, without, step = max(1, steps // 40), 0, -1
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1.0 - step / steps)
        rows = torch.multinomial(shares_N, _BATCH, replacement=True, generator=generator)
        loss = torch.nn.functional.cross_entropy(kept.x_ND[rows].float() / scale @ weights_ED.T, kept.labels_N[rows])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if (step + 1) % every == 0:
            now = compared.loss(weights_ED)
            without = 0 if now < best else without + 1
            if now < best:
                best, best_gate = now, weights_ED.detach() / scale
            if without > 2 * settings.patience:
                break
    return best_gate.clone(), (first, best), step + 1


def _shares(labels_N: torch.Tensor, mix: Mapping[int, float]) -> torch.Tensor:
    """How often each token is drawn, (N,): domains by their share, the tokens of a domain alike."""
    shares_N = torch.zeros(len(labels_N))
    for expert, share in mix.items():
        own = labels_N == expert
        shares_N[own] = share / max(1, int(own.sum()))
    return shares_N


@dataclass(frozen=True)
class GateInputs:
    """What one router's gate took: (N, D) float16, and the domain's expert (N,) of each token."""

    x_ND: torch.Tensor
    labels_N: torch.Tensor


@dataclass(frozen=True)
class GateInputsReader:
    """Keeps a `share` of the tokens for each of `slots` gates, which read `averages` and a `prefix` of their inputs."""

    view: ExpertView
    averages: Sequence[Mapping[str, float | None]]
    prefix: int | None
    slots: int
    share: float

    def read(self, texts: Mapping[int, Sequence[TokenSequence]], stage: str, run: Run) -> list[GateInputs]:
        """One forward pass over text by the index of its expert; what is kept, per gate."""
        whole = sum(sequence.size for sequences in texts.values() for sequence in sequences)
        done = 0

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            run.progress(stage, done, whole)

        parts: list[list[GateInputs]] = [[] for _ in range(self.slots)]
        for expert, sequences in texts.items():
            domain = _DomainInputs(sum(len(sequence.ids) for sequence in sequences), self.share)
            self.view.use_expert(expert)
            run_with_inputs(self.view, sequences, [GateInput(self.averages, self.prefix, {})], domain.consume, advance)
            for slot in range(self.slots):
                parts[slot].append(GateInputs(domain.kept[slot], torch.full((domain.count,), expert)))
        return [
            GateInputs(torch.cat([part.x_ND for part in each]), torch.cat([part.labels_N for part in each])) for each in parts
        ]


class _DomainInputs:
    """The kept tokens of one domain: `count` of them, evenly spaced; per gate (count, D) float16."""

    def __init__(self, tokens: int, share: float) -> None:
        self.count = max(1, int(tokens * share))
        self.kept: dict[int, torch.Tensor] = {}
        self._row_of = torch.full((tokens,), -1)
        self._row_of[torch.linspace(0, tokens - 1, self.count, dtype=torch.float64).round().long()] = torch.arange(self.count)

    def consume(self, _way: int, slot: int, x_TD: torch.Tensor, positions_T: torch.Tensor) -> None:
        """Take what one gate took of a batch's tokens, which stand at these positions of the domain's text."""
        rows = self._row_of[positions_T]
        wanted = rows >= 0
        if slot not in self.kept:
            self.kept[slot] = torch.zeros((self.count, x_TD.shape[1]), dtype=torch.float16)
        self.kept[slot][rows[wanted]] = to_float16(x_TD[wanted.to(x_TD.device)])
