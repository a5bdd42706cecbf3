"""Labels at test time: which label every text gets, and what a model reads then (arXiv 2407.01126).

    right   the label of the domain's own expert; of an unseen domain that of the expert that knows its name, else none
    wrong   that of the expert behind the right one, the first behind the last; unseen domains without a right one have those
            of the experts in turn
    none    no label

A label acts by `gate`, where all weight is its expert's, or by `tag`, the reserved token of text/tags.py before the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from modekit.errors import MismatchError, ModekitError
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import BASE
from modekit.text.sequences import TokenSequence
from modekit.text.tags import labels_of, opening_ids, place_of_tag, tag_ids, tag_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from modekit.checkpoint.checkpoint import Checkpoint
    from modekit.evaluation.domains import Domain

_Found = TypeVar("_Found")
By = Literal["gate", "tag"]
LabelKind = Literal["right", "wrong", "none"]
LABEL_KINDS: tuple[LabelKind, ...] = get_args(LabelKind)
_GIVEN: tuple[LabelKind, ...] = ("right", "wrong")
_WORDS: Mapping[By, str] = {"gate": "label", "tag": "tag"}


@dataclass(frozen=True)
class Labels:
    """Which kinds of labels texts get, in the order of the rows, and how they act. Raises ModekitError for unknown ones."""

    by: By = "gate"
    kinds: tuple[LabelKind, ...] = LABEL_KINDS

    def __post_init__(self) -> None:
        if not set(self.kinds) <= set(LABEL_KINDS) or len(set(self.kinds)) < len(self.kinds):
            raise ModekitError(
                "no such labels",
                where="--labels",
                found=", ".join(map(str, self.kinds)),
                expected=f"some of {', '.join(LABEL_KINDS)}, each once, or all",
                remedy="write right,wrong",
            )
        if self.by not in get_args(By):
            raise ModekitError(
                "no such way for a label to act", where="--by", found=self.by, expected="gate or tag", remedy="name one"
            )

    def row(self, model: str, kind: LabelKind) -> str:
        """Name of a model's row under such labels: "mixture, right label", "base, no tag"."""
        return f"{model}, {'no' if kind == 'none' else kind} {_WORDS[self.by]}"

    def unlabelled(self, model: str, found: Mapping[str, _Found], texts: Iterable[Sequence[TokenSequence]]) -> _Found | None:
        """Of what was found, by name of row, what labels are compared with: the model without one, or as it is,
        where no text has a tag of its own.
        """
        as_it_is = self.by == "gate" or not have_tags(texts)
        return found.get(self.row(model, "none"), found.get(model) if as_it_is else None)

    def rows(self) -> list[tuple[str, LabelKind]]:
        """The models that read labels, each with every kind of label."""
        models = ("mixture", BASE) if self.by == "tag" else ("mixture",)
        return [(model, kind) for model in models for kind in self.kinds]


def labels_asked(labels: str | Sequence[str] | None, by: By | None) -> Labels | None:
    """What is asked for: "all", some of right, wrong and none (or with commas between), all where only the way is given.

    None without either. Raises ModekitError.
    """
    said: Any = [each.strip() for each in labels.split(",")] if isinstance(labels, str) else labels
    if not said and by is None:
        return None
    return Labels(by or "gate", tuple(said) if said and list(said) != ["all"] else LABEL_KINDS)


def label_places(kind: LabelKind, domains: Mapping[str, int | None], recipe: Recipe) -> dict[str, int | None]:
    """Domain -> place of the expert whose label it gets; None: no label. A domain that has no such label is left out.

    `domains`: name -> place of its own expert, None for an unseen one.
    """
    if kind == "none":
        return dict.fromkeys(domains)
    experts = len(recipe.names)
    right = {name: recipe.expert_of(name) if own is None else own for name, own in domains.items()}
    if kind == "right":
        return {name: place for name, place in right.items() if place is not None}
    strangers = [name for name, place in right.items() if place is None]
    wrong = {name: strangers.index(name) % experts if place is None else (place + 1) % experts for name, place in right.items()}
    return {name: place for name, place in wrong.items() if place != right[name]}  # of a single expert no label is wrong


def label_tags(places: Mapping[str, int | None], recipe: Recipe, known: Sequence[str]) -> dict[str, str | None]:
    """Domain -> the label whose tag stands before its text: its own name, where that leads to the same expert and has a tag
    (`known`), else the expert's.
    """
    found: dict[str, str | None] = {}
    for name, place in places.items():
        own = place is not None and name in known and recipe.expert_of(name) == place
        found[name] = None if place is None else name if own else recipe.names[place]
    return found


def check_labels(checkpoint: Checkpoint, labels: Labels, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise MismatchError when labels cannot act on a mixture so."""
    recipe = checkpoint.record.recipe
    if labels.by == "gate" and recipe.mixture.weights is not None:
        raise MismatchError(
            "a label cannot act by the gate: no expert is whole in this mixture",
            where=f"{checkpoint.folder}: --labels",
            found="mixture.weights, which are folded into the experts",
            remedy="leave --labels out, or build without weights",
        )
    missing = [name for name in recipe.names if name not in labels_of(tokenizer)] if labels.by == "tag" else []
    if missing:
        raise MismatchError(
            "a label cannot act by a tag: the tokenizer has none for it",
            where=f"{checkpoint.folder}: --by tag",
            found=f"no tag for {', '.join(missing)}",
            expected=f"a token for every expert, such as {tag_of(missing[0])}",
            remedy="make base and experts with `modekit specialize --tags` and build again, or take --by gate",
        )


def longest_with_tag(sequence_length: int, checkpoint: Checkpoint) -> int:
    """How long a text may be so that a tag before it fits into the model's positions, too."""
    positions = checkpoint.config.get("max_position_embeddings")
    return max(2, min(sequence_length, positions - 1)) if isinstance(positions, int) else sequence_length


def with_tag(tokenizer: PreTrainedTokenizerBase, sequences: Sequence[TokenSequence], label: str | None) -> list[TokenSequence]:
    """The same sequences, each with a label's tag where `encode` puts it, in place of one that it has; None: without any."""
    if label is None:
        return [each.with_tag(None) for each in sequences]
    (tag,), opening = tag_ids(tokenizer, [label]), opening_ids(tokenizer)
    return [each.with_tag(tag, place_of_tag(opening, each.ids)) for each in sequences]


def have_tags(texts: Iterable[Sequence[TokenSequence]]) -> bool:
    """Whether some text has a tag of its own."""
    return any(each.tag is not None for text in texts for each in text)


@dataclass(frozen=True)
class Gain:
    """What a label gains over none, below 0 where it costs; so many digits are shown, and the standard error if known."""

    gain: float
    unit: str
    digits: int
    error: float | None = None

    def __str__(self) -> str:
        """Such as "+0.312 ± 0.010 nats per token"."""
        error = "" if self.error is None else f" ± {self.error:.{self.digits}f}"
        return f"{self.gain:+.{self.digits}f}{error} {self.unit}"


def label_notes(
    labels: Labels,
    domains: Sequence[Domain],
    recipe: Recipe,
    found: Mapping[str, _Found],
    gains: Callable[[_Found, _Found], Sequence[Gain]],
) -> Iterator[str]:
    """Which labels domains were given, and what labels are worth: the `gains` of what was `found`, by name of row."""
    own = {domain.name: domain.expert for domain in domains}
    for kind in _GIVEN:
        places = label_places(kind, own, recipe)
        names = [name for name in own if kind == "wrong" or own[name] is None]
        given = [f"{name} -> {recipe.names[places[name] or 0] if name in places else 'none'}" for name in names]
        if given and kind in labels.kinds:
            yield f"{kind} {_WORDS[labels.by]}s{' of unseen domains' if kind == 'right' else ''}: {', '.join(given)}"
    texts = [domain.sequences for domain in domains]
    for model in dict.fromkeys(model for model, _ in labels.rows()):
        without, worth = labels.unlabelled(model, found, texts), []
        for kind in _GIVEN:
            with_label = found.get(labels.row(model, kind))
            if with_label is not None and without is not None and (said := gains(with_label, without)):
                worth.append(f"{kind} {', '.join(map(str, said))}")
        if worth:
            yield f"{model}, gain of a {_WORDS[labels.by]} over none, mean over the domains: {'; '.join(worth)}"
