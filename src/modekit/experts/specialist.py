"""An expert that is trained alone, by `specialize` or with a teacher: what is kept while it is made, and its record.

OUT.training/checkpoint-N/    states (loaded/states.py), so that the same command goes on after a kill
OUT.training/before.json      the held-out loss before the first step
OUT/specialist.json           how it was made (SpecialistRecord)
OUT/<TRAINED_FILE>            marks of the documents that it was made of
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

from pydantic import BaseModel
from transformers import PreTrainedModel

from modekit.evaluation.domains import Domain, score_domain
from modekit.evaluation.results import Score
from modekit.experts.moving import What
from modekit.files.read import SMALL, UNREADABLE, read_bytes
from modekit.files.write import digest_of_data, json_bytes
from modekit.run import ProgressCount, Run
from modekit.sources.digests import blake3_of
from modekit.sources.source import SPECIALIST_FILE, ModelSource
from modekit.training.folder import WRITING, StatesFolder


class BeforeAfter(BaseModel, frozen=True):
    """A loss in nats per predicted token before the first step and after the last, or of these two steps; None without text."""

    before: float | None
    after: float | None


class SpecialistRecord(BaseModel, frozen=True):
    """specialist.json: how an expert was made. What does not apply is not in the file.

    Attributes:
        specialist: what moved.
        base_model: hub id of the model that it was made from, or the name of its folder.
        rank: of an adapter.
        teacher: its name and digest, `losses` with their weights, `weights` of the text against it.
        distillation_loss, held_out_kl: with a teacher alone.
        training: the settings (loaded/text_training.py), with the steps taken, and with a teacher the tokens read.
        text: how much it was trained on, and a digest of the documents.
        held_out_kl: mean KL(teacher || student) of held-out text.
        labels: `tags` that were read; `randomise`, with which probability others were drawn, and `randomise_to`, which.
        generic: as `text`, of no domain, with its `share` of all tokens.
        training_loss: cross-entropy of the text.
        held_out_loss: mean over the domains; by label where there are several.
    """

    specialist: What
    base_model: str
    rank: int | None = None
    teacher: dict[str, object] | None = None
    training: dict[str, int | float | bool | None]
    text: dict[str, object]
    labels: dict[str, object] | None = None
    generic: dict[str, object] | None = None
    training_loss: BeforeAfter
    distillation_loss: BeforeAfter | None = None
    held_out_loss: BeforeAfter
    held_out_loss_by_label: dict[str, BeforeAfter] | None = None
    held_out_kl: BeforeAfter | None = None

    def as_data(self) -> dict[str, object]:
        """Plain data for JSON."""
        return self.model_dump(mode="json", exclude_unset=True)


class SpecialistFolder(StatesFolder):
    """OUT.training of a model or adapter that is made alone."""

    record_file = SPECIALIST_FILE

    def announce(self, data: dict[str, object]) -> None:
        """Say, before it is written, what OUT will say of how it was made."""
        self.keep(WRITING, hashlib.sha256(json_bytes(data)).hexdigest())

    def digest_in_out(self) -> str | None:
        """Of what OUT says of how it was made, which nobody else writes."""
        try:
            return hashlib.sha256(read_bytes(self.out / self.record_file, SMALL)).hexdigest()
        except UNREADABLE:
            return None


def digest_of_source(source: ModelSource) -> str:
    """Of a model's config and weights as they are now."""
    return digest_of_data([dict(source.config), [[file.name, blake3_of(file)] for file in source.files]])


def held_out_scores(model: PreTrainedModel, domains: Sequence[Domain], when: str, run: Run) -> dict[str, Score]:
    """Held-out loss by domain, of those that have held-out text; `when` is said as progress."""
    scored = [domain for domain in domains if domain.sequences]
    advance = partial(ProgressCount(run, max(1, sum(domain.scored_tokens for domain in scored))).advance, f"score {when}")
    advance(0)
    return {domain.name: score_domain(model, domain, advance) for domain in scored}
