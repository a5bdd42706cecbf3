"""What the domains' own experts say about the training text, for distillation.

Each expert reads the text of its domain once, before the training starts; its last hidden states are kept on disk in
float16 and turned into logits batch by batch with its own head. So one teacher is in memory at a time, a step costs one
matrix product more, and the divergence is over the whole vocabulary.

Shape legend: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
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
from modekit.loaded.heads import Head, head_of
from modekit.loaded.load import load_model
from modekit.loaded.passes import tokens_per_batch
from modekit.loaded.shapes import mixture_of
from modekit.processes import processes
from modekit.routing.capture import to_float16
from modekit.run import Run
from modekit.text.sequences import make_batches
from modekit.training.batches import DomainSequences
from modekit.training.losses import GENERIC


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
            "the expert's own model is gone, and the mixture's head cannot stand in for it",
            where=f"distill: {corpus.name}",
            remedy="put the model back where the recipe found it, or train without distillation",
        )
    return DomainTeacher(expert, hidden_ND, Head(copy.deepcopy(head.linear), head.scale, head.cap))
