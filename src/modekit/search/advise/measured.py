"""What the text of a recipe says about its experts: everything of advice that runs a model or counts words."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modekit.run import Run
from modekit.search.advise.examined import Examined
from modekit.search.advise.findings import Finding
from modekit.search.advise.gain import Gains
from modekit.search.advise.judge import helps, of_confusion, of_gains
from modekit.search.advise.rules import NEARLY_ALL
from modekit.sources.contents import OpenFiles
from modekit.sources.tokenizer import TOKENIZER_FILES
from modekit.text.sequences import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from modekit.search.advise.confusion import Confusion


@dataclass(frozen=True)
class Measured:
    """What text said. `gains` and `confusion` are None where there is none.

    Attributes:
        texts: index of an expert -> record of its select text.
        unread: indices of experts whose text cannot be read.
        fittable: indices of experts that have documents for a router fit.
        speed: floating-point operations per second of the passes that were run here.
    """

    texts: Mapping[int, Mapping[str, Any]]
    unread: frozenset[int]
    fittable: frozenset[int]
    gains: Gains | None
    confusion: Confusion | None
    speed: float | None = None


NOTHING = Measured({}, frozenset(), frozenset(), None, None)
_NO_TOKENIZER = Finding(
    "warning",
    "base_model",
    "it has no tokenizer, so that no text can be read",
    to_do="save the tokenizer into the base model's folder",
)


def measure_text(
    examined: Examined,
    *,
    tokens: int,
    run: Run,
) -> tuple[Measured, list[Finding]]:
    """Read what text there is and measure what it allows."""
    recipe, models, base = examined.recipe, examined.models, examined.models.base
    if not any((base.folder / name).exists() for name in TOKENIZER_FILES):
        return NOTHING, [_NO_TOKENIZER]
    from modekit.loaded.load import load_tokenizer
    from modekit.search.advise.confusion import measure_confusion
    from modekit.search.advise.texts import read_texts

    tokenizer = load_tokenizer(base.folder, run=run)
    folders = [base.folder, *(source.folder for source in models.experts.values())]
    texts, findings = read_texts(recipe, examined.root, folders, tokenizer, tokens)
    unread = frozenset(index for index, expert in enumerate(recipe.experts) if expert.text and index not in texts)
    fittable = frozenset(index for index, text in texts.items() if text.fit)
    texts = {index: text for index, text in texts.items() if index in examined.usable}
    confusion = measure_confusion(tokenizer, recipe.experts, texts)
    findings += of_confusion(recipe, confusion) if confusion is not None else []
    scored = {index: text.sequences for index, text in texts.items() if text.sequences}
    gains = speed = None
    if scored:
        gains, speed = _gains(examined, scored, run)
        findings += of_gains(recipe, gains, examined.moved, scored)
    records = {index: text.record for index, text in texts.items()}
    return Measured(records, unread, fittable, gains, confusion, speed), findings


def _gains(
    examined: Examined,
    scored: Mapping[int, Sequence[TokenSequence]],
    run: Run,
) -> tuple[Gains, float | None]:
    """Losses of parts of every expert; of FFNs on the average of all, too, where the FFN alone does not carry the gain. And
    how fast the passes were.
    """
    from modekit.loaded.load import load_model
    from modekit.search.advise.part_scores import PatchedBase, measure, on_average

    opened = OpenFiles()
    try:
        base = examined.models.base
        model = load_model(base.folder, run=run)
        patched = PatchedBase(model, [base, *examined.sources], examined.groups, examined.drift.moved, opened)
        started = time.perf_counter()
        gains = measure(patched, scored, examined.usable, run=run)
        seconds = time.perf_counter() - started
        own = [index for index in examined.moved if helps(gains, index)]
        ffn = [gains.share(index, gains.parts[index]["ffn"]).value for index in own if index in gains.parts]
        if ffn and min(ffn) < NEARLY_ALL:
            gains = gains.with_average(on_average(patched, scored, own, run=run))
        return gains, gains.tokens * 2 * _weights(model) / seconds if seconds > 0 else None
    finally:
        opened.close()


def _weights(model: PreTrainedModel) -> int:
    """Weights that every token passes: all but an embedding that is looked up and is not the head as well."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    every = sum(parameter.numel() for parameter in model.parameters())
    return int(every - (0 if embedding is head else embedding.numel()))
