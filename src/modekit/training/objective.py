"""A mixture and what it is trained towards, as one module: a batch goes in, a loss comes out; and the teachers of distillation.

The loss is computed inside `forward`, so that DDP and FSDP see the whole of it. Each expert reads the text of its domain once,
before the training starts; its last hidden states are kept on disk in float16 and turned into logits batch by batch with its
own head. So one teacher is in memory at a time, and the divergence is over the whole vocabulary.

Shape legend: B rows, S sequence, N predicted tokens, T real tokens, D width, V vocabulary, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modekit.architecture.modekit_mixed import Mixed
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.sources import why_not
from modekit.errors import TrainingError
from modekit.files.write import make_folder, remove
from modekit.loaded.experts import load_expert_source
from modekit.loaded.load import load_model
from modekit.loaded.mixture import RouterTrace
from modekit.loaded.passes import Head, head_of, inputs_of, reads_target, tokens_per_batch
from modekit.loaded.shapes import mixture_of
from modekit.processes import processes
from modekit.routing.inputs import to_float16
from modekit.run import Run
from modekit.text.sequences import NO_LABEL, Batch, make_batches
from modekit.training.batches import DomainSequences, predicted_in
from modekit.training.engine import JudgedModule
from modekit.training.gates import DROPPED, Decisions, TrainingGate
from modekit.training.losses import (
    DIVERGENCES,
    GENERIC,
    consistency,
    distillation,
    domain_label,
    importance,
    language_model,
    load,
    load_balance,
    mutual,
    tempered,
    z_loss,
)
from modekit.training.settings import OF_ROUTERS, TrainSettings


@dataclass(frozen=True)
class DomainTeacher:
    """Of one domain: hidden states of all its tokens, (N, D) float16 mapped from disk, and the head that reads them.

    `expert` is the index of the expert that says them; None: a model that teaches all domains.
    """

    expert: int | None
    hidden_ND: torch.Tensor
    head: Head

    def logits(self, positions_N: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Logits (N, V) of the tokens at some positions of the corpus."""
        return self.head(self.hidden_ND[positions_N.cpu()].to(device, torch.float32))


def make_teachers(
    checkpoint: Checkpoint,
    corpora: Sequence[DomainSequences],
    folder: Path,
    teacher: Path | None = None,
    *,
    lost: Mapping[int, str] = {},
    run: Run,
) -> list[DomainTeacher | None]:
    """One teacher per corpus; None for text of no domain, unless `teacher` names a model that teaches all.

    Else the teacher is the expert's own model, with all that it learned, or, for those that are `lost`, the mixture with this
    expert forced, which has what the mixture carries of it.
    """
    found: list[DomainTeacher | None] = []
    of_all = load_model(teacher, run=run) if teacher is not None else None
    for corpus in corpora:
        path = folder / f"teacher-{corpus.expert}-{processes().rank}.bin"
        if of_all is not None:
            found.append(_read(of_all, corpus, None, path, run))
        elif corpus.expert != GENERIC:
            found.append(_read_own(checkpoint, corpus, path, is_lost=corpus.expert in lost, run=run))
        else:
            found.append(None)
    heads: list[Head] = []
    for each in found:  # experts that share the base's head share one copy of it
        if each is not None:
            same = next((head for head in heads if head.equals(each.head)), None)
            if same is None:
                heads.append(each.head)
            else:
                each.head.linear = same.linear
    return found


def lost_teachers(checkpoint: Checkpoint, corpora: Sequence[DomainSequences], *, run: Run) -> dict[int, str]:
    """Expert -> why its own model cannot teach what the mixture has of it: it is gone, or another by now."""
    experts = dict.fromkeys(corpus.expert for corpus in corpora if corpus.expert != GENERIC)
    reasons = {expert: why_not(checkpoint, expert, run=run) for expert in experts}
    return {expert: reason for expert, reason in reasons.items() if reason is not None}


def _read_own(checkpoint: Checkpoint, corpus: DomainSequences, path: Path, *, is_lost: bool, run: Run) -> DomainTeacher:
    if not is_lost:
        return _read(load_expert_source(checkpoint, corpus.expert, run=run), corpus, corpus.expert, path, run)
    model = load_model(checkpoint.folder, run=run)
    with mixture_of(model, checkpoint).forced(corpus.expert):
        return _read(model, corpus, corpus.expert, path, run)


def _read(model: PreTrainedModel, corpus: DomainSequences, expert: int | None, path: Path, run: Run) -> DomainTeacher:
    model.requires_grad_(False)
    make_folder(path.parent)
    remove(path)
    width = int(model.config.hidden_size)
    hidden_ND = torch.from_file(str(path), shared=True, size=corpus.tokens * width, dtype=torch.float16).view(-1, width)
    done = 0
    run.begin(f"teacher {corpus.name}", corpus.tokens)
    with torch.inference_mode():
        for batch in make_batches(corpus.sequences, tokens=tokens_per_batch(model)):
            mask = batch.mask.to(model.device)
            output = model.model(input_ids=batch.input_ids.to(model.device), attention_mask=mask.long(), use_cache=False)
            within = torch.arange(batch.mask.shape[1])
            positions = (corpus.starts[torch.tensor(batch.rows)][:, None] + within)[batch.mask]
            hidden_ND[positions] = to_float16(output.last_hidden_state[mask].float())
            done += len(positions)
            run.progress(f"teacher {corpus.name}", done, corpus.tokens)
    head = head_of(model)
    if isinstance(head.linear, Mixed):
        raise TrainingError(
            "the expert's own model is missing, and the mixture's head cannot stand in for it",
            where=f"distill: {corpus.name}",
            remedy="put the model back where the recipe found it, or train without distillation",
        )
    return DomainTeacher(expert, hidden_ND, Head(copy.deepcopy(head.linear), head.scale, head.cap))


class Objective(JudgedModule):
    """A mixture with its losses. Nothing but the mixture has parameters.

    `train_top_k` is how many experts a token gets in training, None: as the checkpoint says. `packed`: rows hold several
    sequences. `logged` is what steps logged so far.
    """

    def __init__(
        self,
        mixture: PreTrainedModel,
        checkpoint: Checkpoint,
        settings: TrainSettings,
        *,
        teachers: Sequence[DomainTeacher | None],
        train_top_k: int | None,
        packed: bool,
        steps: int = 1,
    ) -> None:
        super().__init__(mixture, settings, steps)
        self._no_split_modules = mixture._no_split_modules
        self._checkpoint = checkpoint
        self._teachers = list(teachers)
        self._train_top_k = len(checkpoint.names) if settings.gate_row.takes_any else train_top_k
        self._top_k = train_top_k or checkpoint.record.recipe.top_k
        self._gate = TrainingGate(settings, self._top_k, _groups(checkpoint)) if settings.chooses else None
        self._item: Mapping[str, torch.Tensor] = {}
        self.logged: list[Mapping[str, float]] = []
        self._packed = packed
        gates = {id(gate) for gate in mixture_of(mixture, checkpoint).gates()}
        self.gate_names = [name for name, parameter in mixture.named_parameters() if id(parameter) in gates]
        # Modules of experts that no token of a batch takes are not run in the modekit architecture, and losses of routers do
        # not reach what stands behind the last one.
        own = any(parameter.requires_grad and ".experts." in name for name, parameter in mixture.named_parameters())
        own = (own and not checkpoint.shape.plain) or settings.chooses
        self.skips_parameters: bool = own or settings.losses.keys() <= OF_ROUTERS
        mixture_of(mixture, checkpoint).set_top_k(self._train_top_k)
        if self._gate is not None:
            mixture_of(mixture, checkpoint).choose_by(self._choose)
        sources = checkpoint.record.expert_sources
        self._base = sources.index(0) if 0 in sources else None

    def losses(self, batch: Batch, item: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those that the settings name, by their names there."""
        mixture = mixture_of(self.model, self._checkpoint)
        wanted = OF_ROUTERS & self.settings.losses.keys()
        own = mixture.on_own_text(int(item["expert"])) if self.settings.is_joint else nullcontext()
        self._item = item
        with own, mixture.traced() if wanted else nullcontext() as trace:
            # Packed rows hold several sequences: positions that begin anew keep them apart.
            apart = {"input_ids": batch.input_ids, "position_ids": item["position_ids"]}
            inputs = apart if self._packed else inputs_of(self.model, batch)
            logits = self.model(**inputs, use_cache=False).logits
            losses = self._losses(logits, item, trace)
        if "consistency" in self.settings.losses:
            self._add_consistency(losses, logits, self.model(**inputs, use_cache=False).logits)
        return losses

    def _losses(
        self, logits: torch.Tensor, item: Mapping[str, torch.Tensor], trace: RouterTrace | None
    ) -> dict[str, torch.Tensor]:
        predicted, wanted_N = _predicted(item)
        logits_NV = logits[:, : predicted.shape[1]][predicted]
        losses: dict[str, torch.Tensor] = {}
        names = self.settings.losses
        if "lm" in names:
            losses["lm"] = language_model(logits_NV, wanted_N)
        for name in (name for name in DIVERGENCES if name in names):
            losses[name] = self._distillation(name, logits_NV, predicted, item)
        if trace is not None:
            self._add_router_losses(losses, item, trace)
        return losses

    def _distillation(
        self, name: str, logits_NV: torch.Tensor, predicted: torch.Tensor, item: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """From each domain's own expert; a sequence whose label was taken or changed has no teacher."""
        corpus_N, position_N = item["corpus"][:, :-1][predicted], item["position"][:, :-1][predicted]
        label_N = item["labels"][:, :-1][predicted]
        total = logits_NV.sum() * 0.0  # keeps the graph when no token has a teacher
        for number, teacher in enumerate(self._teachers):
            if teacher is None:
                continue
            taught_N = corpus_N == number
            if teacher.expert is not None:
                taught_N &= label_N == teacher.expert
            rows = taught_N.nonzero().squeeze(-1)
            if len(rows):
                with torch.no_grad():
                    wanted = teacher.logits(position_N[rows], logits_NV.device)
                total = total + distillation(name, logits_NV[rows], wanted, self.settings.temperature)
        return total

    def _add_router_losses(self, losses: dict[str, torch.Tensor], item: Mapping[str, torch.Tensor], trace: RouterTrace) -> None:
        said = list(trace.by_slot())
        for slot, logits in said:
            at = self._of_slot(slot, logits, item)
            logits_TE = at.rows(logits)
            share = 1.0 / (max(self._checkpoint.slots[slot].features, 1) * len(said))
            for name in (name for name in self.settings.losses if name in OF_ROUTERS):
                value = self._router_loss(name, logits_TE, at.each(at.labels, len(logits_TE))) * share
                losses[name] = losses[name] + value if name in losses else value

    def _router_loss(self, name: str, logits_TE: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        if name == "label":
            return domain_label(logits_TE, labels_T, self._base)
        if name == "balance":
            return load_balance(logits_TE, self._top_k)
        if name == "load":  # noise as in V-MoE (arXiv:2106.05974), where the mixture has none of its own
            deviation = self._checkpoint.shape.routing.noise or 1.0 / logits_TE.shape[-1]
            return load(logits_TE, logits_TE + torch.randn_like(logits_TE) * deviation, self._top_k, deviation)
        if name == "mutual":
            return mutual(logits_TE, labels_T)
        return importance(logits_TE) if name == "importance" else z_loss(logits_TE)

    def _add_consistency(self, losses: dict[str, torch.Tensor], first: torch.Tensor, second: torch.Tensor) -> None:
        """How far two passes' predictions are from each other; the text is learnt by both of them, each by half."""
        predicted, wanted_N = _predicted(self._item)
        both = [logits[:, : predicted.shape[1]][predicted] for logits in (first, second)]
        losses["consistency"] = consistency(*(tempered(logits_NV, 1.0) for logits_NV in both))
        if "lm" in losses:
            losses["lm"] = 0.5 * (losses["lm"] + language_model(both[1], wanted_N))

    def _choose(self, slot: int, logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weights in training, by the gate."""
        assert self._gate is not None
        self._gate.progress = len(self.logged) / self.steps
        return self._gate.weights(self._of_slot(slot, logits, self._item), logits, weights)

    def _of_slot(self, slot: int, logits: torch.Tensor, item: Mapping[str, torch.Tensor]) -> Decisions:
        """Which decisions of a router count: of a source's tokens or a target's, or the one for all."""
        real, labels, places, target = item["real"], item["labels"], item["position_ids"], item.get("target")
        if target is not None and reads_target(self._checkpoint.slots[slot].name):
            real, labels = target != NO_LABEL, labels[:, :1].expand(target.shape)
            places = torch.arange(target.shape[1], device=target.device).expand(target.shape)
        if target is not None and logits.shape[1] == 1:
            real, labels, places = real[:, :1], labels[:, :1], places[:, :1]
        return Decisions(*(each.to(logits.device) for each in (real, labels, places)))

    def weights(self, losses: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        """The settings' weights; adaptive ones give the larger of lm and distillation the larger share."""
        weights: dict[str, float] = {name: weight for name, weight in self.settings.losses.items() if name in losses}
        if self.settings.adaptive:
            shared = [name for name in ("lm", *DIVERGENCES) if name in losses]
            whole, values = sum(weights[name] for name in shared), {name: float(losses[name].detach()) for name in shared}
            total = sum(values.values())
            if total > 0:
                weights |= {name: whole * value / total for name, value in values.items()}
        return weights

    @contextmanager
    def as_configured(self) -> Iterator[None]:
        """While open, routers choose as the checkpoint's config says and not as they do in training."""
        mixture_of(self.model, self._checkpoint).set_top_k(None)
        try:
            yield
        finally:
            mixture_of(self.model, self._checkpoint).set_top_k(self._train_top_k)

    def drain(self) -> dict[str, float]:
        """Besides the losses what capacity dropped."""
        losses = super().drain() | (self._gate.drain() if self._gate else {})
        self.logged.append(losses)
        return losses

    def go_on(self, history: Sequence[Mapping[str, float]]) -> None:
        """With what the steps before a kill logged."""
        self.logged = [entry for entry in history if "loss" in entry]

    def notes(self) -> list[str]:
        """What the record says: the mean shares of decisions that capacity dropped."""
        rates = [[entry[name] for name in DROPPED] for entry in self.logged if DROPPED[0] in entry]
        shares = ", ".join(f"{sum(each) / len(rates):.3f}" for each in zip(*rates, strict=True))
        return [f"capacity {self.settings.capacity} dropped, by quarter of the sequence: {shares}"] if rates else []


def _predicted(item: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which logits predict a token, (B, S - 1) or (B, T) of pairs, and the tokens (N,)."""
    target = item.get("target")
    if target is not None:
        return target != NO_LABEL, target[target != NO_LABEL]
    predicted = predicted_in(item)
    return predicted, item["input_ids"][:, 1:][predicted]


def _groups(checkpoint: Checkpoint) -> torch.Tensor:
    """Which experts are of one domain, (E, E): those that have the same text."""
    texts = [None if expert.writes_text else expert.text for expert in checkpoint.record.recipe.experts]
    return torch.tensor([[a == b or (x is not None and x == y) for b, y in enumerate(texts)] for a, x in enumerate(texts)])
