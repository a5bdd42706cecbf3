"""How alike the experts are: the cosine between what each changed of the base model in its layers (likeness.py)."""

from __future__ import annotations

import numpy as np

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.sources import why_not
from modekit.evaluation.inspection.likeness import compare
from modekit.evaluation.inspection.result import Similarity
from modekit.run import QUIET, Run
from modekit.sources.adapter import is_adapter, open_adapter
from modekit.sources.class_names import named_by_class
from modekit.sources.names import split_layer
from modekit.sources.source import ModelSource, open_source


def similarity(checkpoint: Checkpoint, run: Run = QUIET) -> Similarity:
    """Compare the experts' own models; memory does not grow with them. Two experts that changed nothing are alike (1); one that
    changed something and one that did not have 0. Nothing is compared where a model is gone, or is another one now.

    Raises SourceError for weights that are not finite.
    """
    names = checkpoint.names
    lacking = [(name, why_not(checkpoint, place, run=run)) for place, name in enumerate(names)]
    lacking = [("base", why_not(checkpoint, None, run=run)), *lacking]
    reasons = [f"{name} ({reason})" for name, reason in lacking if reason]
    if reasons:
        return Similarity([], "", [f"experts were not compared, for want of a model: {reasons[0]}"])
    base, experts = _models(checkpoint)
    compared = [name for name in checkpoint.shape.family.own_names(base) if split_layer(name)[0] is not None]
    found = compare(base, experts, compared, run)
    lengths = np.sqrt(np.diag(found.products))
    scale = np.outer(lengths, lengths)
    alike = np.clip(np.divide(found.products, scale, out=np.zeros_like(scale), where=scale > 0), -1.0, 1.0)
    alike[np.outer(lengths == 0, lengths == 0)] = 1.0
    np.fill_diagonal(alike, 1.0)
    same = [name for at, name in enumerate(names) if not found.products[at, at] and experts[at] is not base]
    notes = [f"{', '.join(same)} changed nothing of the base model's layers"] if same else []
    return Similarity(
        alike.tolist(), f"what the experts changed of the base model in {len(compared)} tensors of its layers", notes
    )


def _models(checkpoint: Checkpoint) -> tuple[ModelSource, list[ModelSource]]:
    """The base, and each expert's own; no code is run to open them."""
    record, trusted = checkpoint.record, Run(trust_remote_code=True)
    places = [(source.spec, checkpoint.source_folder(source)) for source in record.sources]
    base = named_by_class(open_source("base_model", *places[0], run=trusted))

    def opened(place: int) -> ModelSource:
        label, (spec, folder) = record.sources[place].label, places[place]
        if place == 0:
            return base
        if is_adapter(folder):
            return open_adapter(label, spec, folder, base)
        return named_by_class(open_source(label, spec, folder, run=trusted))

    return base, [opened(place) for place in record.expert_sources]
