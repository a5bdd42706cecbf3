"""Labels at test time: which label every text is told by, and what a model reads then (arXiv 2407.01126).

    right   the label of the domain's own expert; of an unseen domain that of the expert that knows its name, else none
    wrong   that of the expert behind the right one, the first behind the last; unseen domains without a right one have those
            of the experts in turn
    none    no label

A label is told by `gate`, where all weight is its expert's, or by `tag`, the reserved token of text/tags.py before the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from modekit.errors import MismatchError, ModekitError, TextError
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import BASE
from modekit.text.sequences import TokenSequence
from modekit.text.tags import labels_of, opening_ids, place_of_tag, tag_ids, tag_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from modekit.checkpoint.checkpoint import Checkpoint

_Found = TypeVar("_Found")
By = Literal["gate", "tag"]
Told = Literal["right", "wrong", "none"]
TOLD: tuple[Told, ...] = get_args(Told)
_WORDS: Mapping[By, str] = {"gate": "label", "tag": "tag"}


@dataclass(frozen=True)
class Labels:
    """Which labels are told, in the order of the rows, and how. Raises ModekitError for others than there are."""

    by: By = "gate"
    told: tuple[Told, ...] = TOLD

    def __post_init__(self) -> None:
        if not set(self.told) <= set(TOLD) or len(set(self.told)) < len(self.told):
            raise ModekitError(
                "no such labels",
                where="--labels",
                found=", ".join(map(str, self.told)),
                expected=f"some of {', '.join(TOLD)}, each once, or all",
                remedy="write right,wrong",
            )
        if self.by not in get_args(By):
            raise ModekitError(
                "no such way to tell a label", where="--by", found=self.by, expected="gate or tag", remedy="name one"
            )

    def row(self, model: str, told: Told) -> str:
        """Name of a model's row under such labels: "mixture, right label", "base, no tag"."""
        return f"{model}, {'no' if told == 'none' else told} {_WORDS[self.by]}"

    def untold(self, model: str, found: Mapping[str, _Found], texts: Iterable[Sequence[TokenSequence]]) -> _Found | None:
        """Of what was found, by name of row, what labels are compared with: the model without one, or as it is,
        where no text has a tag of its own.
        """
        as_it_is = self.by == "gate" or not have_tags(texts)
        return found.get(self.row(model, "none"), found.get(model) if as_it_is else None)

    def rows(self) -> list[tuple[str, Told]]:
        """The models that are told, each with every kind of label."""
        models = ("mixture", BASE) if self.by == "tag" else ("mixture",)
        return [(model, told) for model in models for told in self.told]


def labels_asked(labels: str | Sequence[str] | None, by: By | None) -> Labels | None:
    """What is asked for: "all", some of right, wrong and none (or with commas between), all where only the way is given.

    None without either. Raises ModekitError.
    """
    said: Any = [each.strip() for each in labels.split(",")] if isinstance(labels, str) else labels
    if not said and by is None:
        return None
    return Labels(by or "gate", tuple(said) if said and list(said) != ["all"] else TOLD)


def experts_told(told: Told, domains: Mapping[str, int | None], recipe: Recipe) -> dict[str, int | None]:
    """Domain -> place of the expert whose label it is told; None: no label. A domain that has no such label is left out.

    `domains`: name -> place of its own expert, None for an unseen one.
    """
    if told == "none":
        return dict.fromkeys(domains)
    experts = len(recipe.names)
    right = {name: recipe.expert_of(name) if own is None else own for name, own in domains.items()}
    if told == "right":
        return {name: place for name, place in right.items() if place is not None}
    strangers = [name for name, place in right.items() if place is None]
    wrong = {name: strangers.index(name) % experts if place is None else (place + 1) % experts for name, place in right.items()}
    return {name: place for name, place in wrong.items() if place != right[name]}  # of a single expert no label is wrong


def tags_told(places: Mapping[str, int | None], recipe: Recipe, known: Sequence[str]) -> dict[str, str | None]:
    """Domain -> the label whose tag stands before its text: its own name, where that leads to the expert told and has a tag
    (`known`), else the expert's.
    """
    found: dict[str, str | None] = {}
    for name, place in places.items():
        own = place is not None and name in known and recipe.expert_of(name) == place
        found[name] = None if place is None else name if own else recipe.names[place]
    return found


def check_labels(checkpoint: Checkpoint, labels: Labels, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise MismatchError when a mixture cannot be told labels so."""
    recipe = checkpoint.record.recipe
    if labels.by == "gate" and recipe.mixture.weights is not None:
        raise MismatchError(
            "a label cannot be told by the gate: no expert is whole in this mixture",
            where=f"{checkpoint.folder}: --labels",
            found="mixture.weights, which are folded into the experts",
            remedy="leave --labels out, or build without weights",
        )
    missing = [name for name in recipe.names if name not in labels_of(tokenizer)] if labels.by == "tag" else []
    if missing:
        raise MismatchError(
            "a label cannot be told by a tag: the tokenizer has none for it",
            where=f"{checkpoint.folder}: --by tag",
            found=f"no tag for {', '.join(missing)}",
            expected=f"a token for every expert, such as {tag_of(missing[0])}",
            remedy="make base and experts with `modekit specialize --tags` and build again, or take --by gate",
        )


def longest_with_tag(sequence_length: int, config: Mapping[str, Any]) -> int:
    """How long a text may be so that a tag before it fits into the model's positions, too."""
    positions: int | None = config.get("max_position_embeddings")
    return sequence_length if positions is None else max(2, min(sequence_length, positions - 1))


def with_tag(tokenizer: PreTrainedTokenizerBase, sequences: Sequence[TokenSequence], label: str | None) -> list[TokenSequence]:
    """The same sequences, each with a label's tag where `encode` puts it, in place of one that it has; None: without any.

    What is predicted stays.
    """
    if label is None:
        return [each.with_tag(None) for each in sequences]
    (tag,), opening = tag_ids(tokenizer, [label]), opening_ids(tokenizer)
    return [each.with_tag(tag, place_of_tag(opening, each.ids)) for each in sequences]


def have_tags(texts: Iterable[Sequence[TokenSequence]]) -> bool:
    """Whether some text has a tag of its own."""
    return any(each.tag is not None for text in texts for each in text)


def no_place_for_a_tag(domain: str) -> TextError:
    """The error for conversations under `--by tag`."""
    return TextError(
        "a conversation has no place for a tag: its template decides what stands first",
        where=domain,
        expected="text, or pairs",
        remedy="take --by gate",
    )


def notes_of_labels(labels: Labels, domains: Mapping[str, int | None], recipe: Recipe) -> Iterator[str]:
    """What has to be said of the labels that were told."""
    if "right" in labels.told:
        right = experts_told("right", domains, recipe)
        mapped = [
            f"{name} is {recipe.names[right[name] or 0]}'s" for name, own in domains.items() if own is None and name in right
        ]
        without = [name for name in domains if name not in right]
        said = [*([", ".join(mapped)] if mapped else []), *([f"{', '.join(without)}: none"] if without else [])]
        if said:
            yield f"right {_WORDS[labels.by]}s of unseen domains: {'; '.join(said)}"
    if "wrong" in labels.told:
        wrong = experts_told("wrong", domains, recipe)
        known = experts_told("right", domains, recipe)
        said = [
            f"{whose}: {', '.join(f'{name} was told {recipe.names[place or 0]}' for name, place in told)}"
            for whose, told in (
                ("the next expert's", [each for each in wrong.items() if each[0] in known]),
                ("one expert's after another, where none is right", [each for each in wrong.items() if each[0] not in known]),
            )
            if told
        ]
        if said:
            yield f"wrong {_WORDS[labels.by]}s, {'; '.join(said)}"


@dataclass(frozen=True)
class Gain:
    """What a label gains over none, or costs where it is below 0; so many digits are shown, and the standard error if known."""

    gain: float
    unit: str
    digits: int
    error: float | None = None


def worth_of_labels(labels: Labels, gains: Mapping[tuple[str, Told], Sequence[Gain]]) -> Iterator[str]:
    """What right labels and wrong ones gain over none, or cost, in one line per model."""
    for model in dict.fromkeys(model for model, _ in gains):
        parts = [f"a {told} one {_worth(told, gains[model, told])}" for told in TOLD if (model, told) in gains]
        yield f"{model}, a {_WORDS[labels.by]} against none, mean over the domains: {', '.join(parts)}"


def _worth(told: Told, gains: Sequence[Gain]) -> str:
    """Such as "gains 0.3 BLEU and costs 0.1 chrF"; what is 0 as it is shown is said as one expects it of right and wrong."""
    verb, parts = "", []
    for each in gains:
        shown = f"{abs(each.gain):.{each.digits}f}"
        signed = ("costs" if each.gain < 0 else "gains") if float(shown) else verb or ("gains" if told == "right" else "costs")
        error = "" if each.error is None else f" ± {each.error:.{each.digits}f}"
        parts.append(f"{'' if signed == verb else f'{signed} '}{shown}{error} {each.unit}")
        verb = signed
    return " and ".join(parts)
