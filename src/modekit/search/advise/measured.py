"""What the text of a recipe says about its experts: everything of advice that runs a model or counts words."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modekit.progress import Progress
from modekit.recipes.recipe import Recipe
from modekit.search.advise.checks import Models
from modekit.search.advise.drift import Drift
from modekit.search.advise.findings import Finding
from modekit.search.advise.gain import Gains
from modekit.search.advise.groups import Group
from modekit.search.advise.judge import helps, of_gains, of_words
from modekit.search.advise.rules import NEARLY_ALL
from modekit.sources.model import Mappings
from modekit.sources.tokenizer import TOKENIZER_FILES
from modekit.text.documents import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from modekit.search.advise.words import Words


@dataclass(frozen=True)
class Measured:
    """What text said. `gains` and `words` are None where there is none.

    Attributes:
        texts: place of an expert -> record of its select text.
        unread: places of experts whose text cannot be read.
        fittable: places of experts that have documents for a router fit.
        speed: floating-point operations per second of the passes that were run here.
    """

    texts: Mapping[int, Mapping[str, Any]]
    unread: frozenset[int]
    fittable: frozenset[int]
    gains: Gains | None
    words: Words | None
    speed: float | None = None


NOTHING = Measured({}, frozenset(), frozenset(), None, None)
_NO_TOKENIZER = Finding(
    "warning", "base_model", "it has no tokenizer, so that no text can be read",
    to_do="save the tokenizer into the base model's folder",
)  # fmt: skip


def measure_text(
    recipe: Recipe, root: Path, models: Models, groups: Mapping[str, Group], drift: Drift, usable: Sequence[int], *,
    tokens: int, trust_remote_code: bool, progress: Progress,
) -> tuple[Measured, list[Finding]]:  # fmt: skip
    """Read what text there is and measure what it allows; `usable` are the places of experts that can be mixed."""
    base = models.base
    if not any((base.folder / name).exists() for name in TOKENIZER_FILES):
        return NOTHING, [_NO_TOKENIZER]
    from modekit.loaded.models import load_tokenizer
    from modekit.search.advise.texts import read_texts
    from modekit.search.advise.words import compare_words

    tokenizer = load_tokenizer(base.folder, trust_remote_code=trust_remote_code)
    folders = [base.folder, *(source.folder for source in models.experts.values())]
    texts, findings = read_texts(recipe, root, folders, tokenizer, tokens)
    unread = frozenset(place for place, expert in enumerate(recipe.experts) if expert.text and place not in texts)
    fittable = frozenset(place for place, text in texts.items() if text.fit)
    texts = {place: text for place, text in texts.items() if place in usable}
    words = compare_words(tokenizer, texts)
    findings += of_words(recipe, words) if words is not None else []
    scored = {place: text.sequences for place, text in texts.items() if text.sequences}
    gains = speed = None
    if scored:
        gains, speed = _gains(models, len(recipe.experts), groups, drift, usable, scored, trust_remote_code, progress)
        findings += of_gains(recipe, gains, [place for place in usable if drift.moved[place]], scored)
    records = {place: text.record for place, text in texts.items()}
    return Measured(records, unread, fittable, gains, words, speed), findings


def _gains(
    models: Models, count: int, groups: Mapping[str, Group], drift: Drift, usable: Sequence[int],
    scored: Mapping[int, Sequence[TokenSequence]], trust_remote_code: bool, progress: Progress,
) -> tuple[Gains, float | None]:  # fmt: skip
    """Losses of parts of every expert; of FFNs on the average of all, too, where the FFN alone does not carry the gain. And
    how fast the passes were.
    """
    from modekit.loaded.models import load_model
    from modekit.search.advise.swapped import Swapped, measure, on_average

    mappings = Mappings()
    try:
        sources = [models.base, *(models.experts.get(place, models.base) for place in range(count))]
        model = load_model(models.base.folder, trust_remote_code=trust_remote_code)
        swapped = Swapped(model, sources, groups, drift.moved, mappings)
        started = time.perf_counter()
        gains = measure(swapped, scored, usable, progress=progress)
        seconds = time.perf_counter() - started
        own = [place for place in usable if drift.moved[place] and helps(gains, place)]
        ffn = [gains.share(place, gains.parts[place]["ffn"]).value for place in own if place in gains.parts]
        if ffn and min(ffn) < NEARLY_ALL:
            gains = gains.with_average(on_average(swapped, scored, own, progress=progress))
        return gains, gains.tokens * 2 * _weights(model) / seconds if seconds > 0 else None
    finally:
        mappings.close()


def _weights(model: PreTrainedModel) -> int:
    """Weights that every token passes: all but an embedding that is looked up and is not the head as well."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    every = sum(parameter.numel() for parameter in model.parameters())
    return int(every - (0 if embedding is head else embedding.numel()))
