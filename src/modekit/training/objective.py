"""A mixture and what it is trained towards, as one module: a batch goes in, a loss comes out; and the teachers of distillation.

The loss is computed inside `forward`, so that DDP and FSDP see the whole of it. Each expert reads the text of its domain once,
before the training starts; its last hidden states are kept on disk in float16 and turned into logits batch by batch with its
own head. So one teacher is in memory at a time, and the divergence is over the whole vocabulary.

Shape legend: B rows, S sequence, N predicted tokens, T real tokens, D width, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.sources import why_not
from modekit.errors import TrainingError
from modekit.evaluation.domains import Domain
from modekit.files.write import make_folder, remove
from modekit.loaded.experts import load_expert_source
from modekit.loaded.head import Head
from modekit.loaded.load import load_model
from modekit.loaded.mixture import RouterTrace
from modekit.loaded.passes import backbone_of, inputs_of, logits_at, reads_target, tokens_per_batch
from modekit.loaded.shapes import mixture_of
from modekit.processes import processes
from modekit.routing.inputs import to_float16
from modekit.run import Run
from modekit.text.sequences import NO_LABEL, Batch, make_batches
from modekit.training.batches import DomainSequences, predicted_in
from modekit.training.engine import JudgedModule
from modekit.training.losses import DIVERGENCES, GENERIC, distillation, domain_label, language_model, load_balance, z_loss
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
    checkpoint: Checkpoint, corpora: Sequence[DomainSequences], folder: Path, teacher: Path | None = None, *, run: Run
) -> list[DomainTeacher | None]:
    """One teacher per corpus; None for text of no domain, unless `teacher` names a model that teaches all.

    Else the teacher is the expert's own model, with all that it learned. Raises TrainingError where that is gone or changed.
    """
    found: list[DomainTeacher | None] = []
    of_all = load_model(teacher, run=run) if teacher is not None else None
    for corpus in corpora:
        path = folder / f"teacher-{corpus.expert}-{processes().rank}.bin"
        if of_all is None and corpus.expert == GENERIC:
            found.append(None)
            continue
        model = of_all if of_all is not None else _own_model(checkpoint, corpus.expert, run)
        hidden_ND, head = _read(model, corpus, path, run), Head(model)
        known = (each.head for each in found if each is not None and each.head.equals(head))
        head = next(known, head)  # the base's head is kept once
        found.append(DomainTeacher(corpus.expert if of_all is None else None, hidden_ND, head))
    return found


def _own_model(checkpoint: Checkpoint, expert: int, run: Run) -> PreTrainedModel:
    reason = why_not(checkpoint, expert, run=run)
    if reason is not None:
        raise TrainingError(
            "the expert's own model, which is to teach, is not what it was",
            where=f"expert '{checkpoint.names[expert]}'",
            found=reason,
            remedy="put it back where the recipe found it, name one teacher for all, or train on lm",
        )
    return load_expert_source(checkpoint, expert, run=run)


def _read(model: PreTrainedModel, corpus: DomainSequences, path: Path, run: Run) -> torch.Tensor:
    """Last hidden states (N, D) of all tokens of a corpus, in a file."""
    model.requires_grad_(False)
    make_folder(path.parent)
    remove(path)
    done = 0
    run.begin(f"teacher {corpus.name}", corpus.tokens)
    hidden_ND = torch.empty(0)
    with torch.no_grad():
        for batch in make_batches(corpus.sequences, tokens=tokens_per_batch(model)):
            states_BSD = backbone_of(model)(**inputs_of(model, batch), use_cache=False)[0]
            if not done:
                numbers = corpus.tokens * states_BSD.shape[-1]
                hidden_ND = torch.from_file(str(path), shared=True, size=numbers, dtype=torch.float16)
                hidden_ND = hidden_ND.view(corpus.tokens, -1)
            within = torch.arange(batch.mask.shape[1])
            positions = (corpus.starts[torch.tensor(batch.rows)][:, None] + within)[batch.mask]
            hidden_ND[positions] = to_float16(states_BSD[batch.mask.to(states_BSD.device)].float())
            done += len(positions)
            run.progress(f"teacher {corpus.name}", done, corpus.tokens)
    return hidden_ND


class Objective(JudgedModule):
    """A mixture with its losses. Nothing but the mixture has parameters.

    `train_top_k` is how many experts a token gets in training, None: as the checkpoint says. `packed`: rows hold several
    sequences.
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
    ) -> None:
        super().__init__(mixture, settings, {str(name): weight for name, weight in settings.losses.items()})
        self._no_split_modules = mixture._no_split_modules
        self._checkpoint, self._teachers, self._train_top_k, self._packed = checkpoint, teachers, train_top_k, packed
        self._top_k = train_top_k or checkpoint.record.recipe.top_k
        loaded = mixture_of(mixture, checkpoint)
        gates = {id(gate) for gate in loaded.gates()}
        self.gate_names = [name for name, parameter in mixture.named_parameters() if id(parameter) in gates]
        # Modules of experts that no token of a batch takes are not run in the modekit architecture, and losses of routers do
        # not reach what stands behind the last one.
        own = any(parameter.requires_grad and ".experts." in name for name, parameter in mixture.named_parameters())
        self.skips_parameters: bool = (own and not checkpoint.shape.plain) or settings.losses.keys() <= OF_ROUTERS
        loaded.set_top_k(train_top_k)
        sources = checkpoint.record.expert_sources
        self._base = sources.index(0) if 0 in sources else None

    def losses(self, batch: Batch, item: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those that the settings name, by their names there."""
        mixture, names = mixture_of(self.model, self._checkpoint), self.settings.losses
        own = mixture.on_own_text(int(item["expert"])) if self.settings.is_joint else nullcontext()
        with own, mixture.traced() if OF_ROUTERS & names.keys() else nullcontext() as trace:
            # Packed rows hold several sequences: positions that begin anew keep them apart.
            apart = {"input_ids": batch.input_ids, "position_ids": item["position_ids"]}
            predicted, wanted_N = _predicted(item)
            logits_NV = logits_at(self.model, apart if self._packed else inputs_of(self.model, batch), predicted)
            losses = {"lm": language_model(logits_NV, wanted_N)} if "lm" in names else {}
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
            real, labels = self._of_slot(slot, logits, item)
            per_token = logits.reshape(*real.shape, -1, logits.shape[-1])  # with one decision per output feature each is one
            logits_NE = per_token[real].flatten(0, 1)
            labels_N = labels[real].repeat_interleave(per_token.shape[2])
            share = 1.0 / (max(self._checkpoint.slots[slot].features, 1) * len(said))
            for name in (name for name in self.settings.losses if name in OF_ROUTERS):
                value = self._router_loss(name, logits_NE, labels_N) * share
                losses[name] = losses[name] + value if name in losses else value

    def _router_loss(self, name: str, logits_NE: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        if name == "label":
            return domain_label(logits_NE, labels_N, self._base)
        return load_balance(logits_NE, self._top_k) if name == "balance" else z_loss(logits_NE)

    def _of_slot(self, slot: int, logits: torch.Tensor, item: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Which decisions of a router count, and their labels, (B, S): of a source's tokens, a target's, or the one for all."""
        real, labels, target = item["real"], item["labels"], item.get("target")
        if target is not None and reads_target(self._checkpoint.slots[slot].name):
            real, labels = target != NO_LABEL, labels[:, :1].expand(target.shape)
        if target is not None and logits.shape[1] == 1:
            real, labels = real[:, :1], labels[:, :1]
        return real.to(logits.device), labels.to(logits.device)

    def scored(self, select: Sequence[Domain], run: Run, wrapped: nn.Module) -> dict[str, float]:
        """With routers that choose as the checkpoint's config says and not as they do in training."""
        mixture_of(self.model, self._checkpoint).set_top_k(None)
        try:
            return super().scored(select, run, wrapped)
        finally:
            mixture_of(self.model, self._checkpoint).set_top_k(self._train_top_k)


def _predicted(item: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which logits predict a token, (B, S - 1) or (B, T) of pairs, and the tokens (N,)."""
    target = item.get("target")
    if target is not None:
        return target != NO_LABEL, target[target != NO_LABEL]
    predicted = predicted_in(item)
    return predicted, item["input_ids"][:, 1:][predicted]
