"""What is measured before an expert is added: what it brings on its own text, whom it resembles, what its licence says.

    loss of base, mixture, the nearest expert that is there and the new one, on the new one's held-out text
              (select split), in nats per token; where it replaces an expert, of that one in place of mixture and nearest
    drift     |D| / |base|        cosine, distance    of D to that of each expert that is there        (likeness.py)

D is the difference from the base, here in the tensors of the first, the middle and the last layer; of encoder and decoder
each, where there are both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from modekit.building.text import write_texts
from modekit.building.update import CheckpointUpdate
from modekit.checkpoint.sources import changed_weights
from modekit.errors import ModekitError, TextError, some_of
from modekit.evaluation.domains import Domain
from modekit.evaluation.inspection.likeness import compare
from modekit.evaluation.results import Score, is_gap
from modekit.members.change import opened_expert
from modekit.members.licences import licence_of, sources_of
from modekit.recipes.layers import layer_at
from modekit.run import QUIET, Run
from modekit.sources.names import split_layer
from modekit.sources.open import Opener
from modekit.sources.source import ModelSource
from modekit.text.amounts import SAMPLE_TOKENS
from modekit.text.held_out import RecipeTexts
from modekit.text.sequences import encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SERVED = 0.9  # of the expert's gain that the mixture, or one of its experts, has already
_NEAR_COSINE = 0.95  # of two differences from the base: above it, two experts are nearly one
_SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class Finding:
    """What the user should know of an expert before it comes, and what to do; an error refuses it."""

    level: Literal["error", "warning", "note"]
    what: str
    found: str = ""
    to_do: str = ""


@dataclass(frozen=True)
class Admission:
    """What was found: losses (nats per token; none without text) and the tokens read for them, the way from the base, name,
    cosine and distance of the nearest expert whose model is there, and what follows.
    """

    expert: str
    losses: Mapping[str, float]
    tokens: int
    drift: float
    nearest: tuple[str, float, float] | None
    findings: Sequence[Finding]

    @property
    def refused(self) -> list[Finding]:
        """Findings that refuse it."""
        return [finding for finding in self.findings if finding.level == "error"]


def measure_admission(before: CheckpointUpdate, *, tokens: int = SAMPLE_TOKENS, run: Run = QUIET) -> Admission:
    """Measure the new expert of a planned change, which first writes its text where it is to.

    Raises TextError, OutputError, and SourceError when a model cannot be loaded.
    """
    (place,) = (place for place, origin in enumerate(before.origins) if origin is None)
    write_texts(before.plan, run, but=before.statistics)
    name = before.plan.recipe.names[place]
    others = _models_that_are_there(before, place, run)
    drift, nearest = _likeness(before, place, others, run)
    missed = [each.name for each in before.plan.recipe.experts if each.name not in (*others, name) and not each.is_base]
    scores, read = _scores(before, place, None if nearest is None else nearest[0], tokens, run)
    losses = {row: score.loss for row, score in scores.items()}
    findings = [*_of_scores(scores, nearest), *_of_likeness(drift, nearest, missed), *_of_licences(before, place)]
    return Admission(name, losses, read, drift, nearest, findings)


def _scores(before: CheckpointUpdate, place: int, nearest: str | None, tokens: int, run: Run) -> tuple[dict[str, Score], int]:
    from modekit.experts.specialist import held_out_scores
    from modekit.loaded.experts import give_rows, load_expert
    from modekit.loaded.load import load_model, load_tokenizer
    from modekit.loaded.shapes import mixture_of

    plan = before.plan
    checkpoint = before.checkpoint
    mixture = before.checkpoint.folder
    base = plan.sources[0]
    source = plan.sources[1 + place]
    expert = plan.recipe.experts[place]
    texts = RecipeTexts(plan.recipe, plan.root, models=[base.folder, source.folder], mixture=mixture)
    try:
        own = texts.own(place)
    except TextError:
        if expert.name not in before.statistics:
            raise
        own = None  # its text is gone, and what is kept of it sets the router
    chosen = texts.select_of(own) if own is not None else []
    sequences = encode(load_tokenizer(mixture, run=run), chosen, max_tokens=tokens, sequence_length=_SEQUENCE_LENGTH)
    if not sequences:
        return {}, 0
    count = sum(len(sequence.ids) for sequence in sequences)
    domain = Domain(expert.name, place, sequences)

    def score(model: PreTrainedModel, row: str, source: ModelSource | None = None) -> None:
        if source is not None:
            give_rows(model, source, base)
        found[row] = held_out_scores(model, [domain], row, run)[domain.name]

    found: dict[str, Score] = {}
    score(load_model(base.folder, run=run), "base", base)
    model = load_model(mixture, run=run)
    replaces = expert.name in checkpoint.names
    if not replaces:
        score(model, "mixture")
    if (rival := expert.name if replaces else nearest) is not None:
        with mixture_of(model, checkpoint).forced(checkpoint.names.index(rival)):
            score(model, "replaced" if replaces else "nearest")
    score(load_expert(base.folder, source.folder, run=run), "expert", source)
    return found, count


def _models_that_are_there(before: CheckpointUpdate, place: int, run: Run) -> dict[str, ModelSource]:
    """The other experts' models, as far as they can be opened and are what they were."""
    checkpoint = before.checkpoint
    plan = before.plan
    opener = Opener(before.plan.root, run)
    found: dict[str, ModelSource] = {}
    for number, (expert, origin) in enumerate(zip(plan.recipe.experts, before.origins, strict=True)):
        opened = None if expert.is_base or origin is None else opened_expert(checkpoint, opener, origin, plan.sources[0])
        if opened is not None and number != place:
            with suppress(ModekitError, OSError):
                if not changed_weights(before.sources[plan.sources[1 + number]], opened.folder, run):
                    found[expert.name] = opened
    return found


def _likeness(
    before: CheckpointUpdate, place: int, others: Mapping[str, ModelSource], run: Run
) -> tuple[float, tuple[str, float, float] | None]:
    """Its drift, and name, cosine and distance of the nearest expert whose model is there."""
    plan = before.plan
    base = plan.sources[0]
    new = plan.sources[1 + place]
    if plan.recipe.experts[place].is_base:
        return 0.0, None
    names = plan.family.own_names(base)
    sizes = plan.family.sizes(base.config)  # layers of each stack
    looked_at = {layer_at(stack, number) for stack, count in sizes.items() for number in (0, count // 2, count - 1)}
    sample = [name for name in names if split_layer(name)[0] in looked_at]
    assert sample, looked_at
    found = compare(base, [new, *others.values()], sample, run)
    if not found.drift:  # in those layers: perhaps in others
        return compare(base, [new], names, run).drift, None
    pairs = ((name, found.to(number)) for number, name in enumerate(others, 1))
    return found.drift, max(((name, *pair) for name, pair in pairs if pair), key=lambda each: each[1], default=None)


def _of_scores(scores: Mapping[str, Score], nearest: tuple[str, float, float] | None) -> Iterator[Finding]:
    if not scores:
        to_do = "give --text, a few hundred documents"
        yield Finding("note", "what it brings was not measured", "no held-out text of its own", to_do)
        return
    base = scores["base"].loss
    expert = scores["expert"].loss
    found = f"{', '.join(f'{row} {score.loss:.3f}' for row, score in scores.items())} nats per token"
    if not expert < base:  # nor where it is no number
        yield Finding(
            "error",
            "it is not better than the base model on its own text",
            found,
            "check that model and text belong together",
        )
        return
    shares = {row: (base - score.loss) / (base - expert) for row, score in scores.items()}
    if not is_gap(scores["base"], scores["expert"]):
        yield Finding(
            "warning",
            "what it gains over the base model is next to nothing, or within the noise",
            found,
            "give more text to measure on",
        )
    elif is_gap(scores["expert"], scores.get("replaced", scores["expert"])):
        what = "the expert that it replaces is better on this text"
        yield Finding("warning", what, found, "keep that one, or train this one longer")
    elif nearest is not None and shares.get("nearest", 0.0) >= _SERVED:
        what = f"{nearest[0]} has {shares['nearest']:.0%} of its gain: text of either may go to the other, which costs both"
        yield Finding("warning", what, found, f"modekit replace OUT {nearest[0]} --model ... puts it in that one's place")
    elif shares.get("mixture", 0.0) >= _SERVED:
        what = f"the mixture has {shares['mixture']:.0%} of its gain without it"
        yield Finding("warning", what, found, "an expert for another domain would bring more")


def _of_likeness(drift: float, nearest: tuple[str, float, float] | None, missed: Sequence[str]) -> Iterator[Finding]:
    if missed:
        yield Finding("note", f"it was not compared with {some_of(missed)}", "their models are gone or have changed")
    if nearest is not None and nearest[1] >= _NEAR_COSINE:
        other, cosine, distance = nearest
        yield Finding(
            "error",
            f"it is nearly the same model as {other}",
            f"cosine {cosine:.3f}, distance {distance:.3f} of the longer way from the base",
            f"put it in that one's place: modekit replace OUT {other} --model ...",
        )
    if not drift:
        yield Finding("note", "it equals the base model", to_do="give --model base, which needs no tensors of its own")


def _of_licences(before: CheckpointUpdate, place: int) -> Iterator[Finding]:
    licence, _ = licence_of(before.plan.sources[1 + place].folder)
    others = {each.licence for each in sources_of(before.checkpoint)}
    if licence not in others:
        yield Finding(
            "warning",
            "its licence is another than those of the mixture",
            f"{licence}; {some_of(sorted(others))}",
            "see whether what you do with the mixture agrees with all of them",
        )
