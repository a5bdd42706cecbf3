"""Which text may I read? The one answer, over the recipe, the folders of models and mixture, and the split.

Whoever asks gets the documents in this table, less those that have *set* something (prompts, and for `report` the fit split of
every expert's text), *trained* a model (trained-on.txt beside base, experts and mixture), or, for `report`, *chosen* the state
of the mixture (selected-by.txt beside it).

    asks                         of                                                  split        less
    router fit                   experts[].prompts, experts[].text                   all, fit     -
    specialize (with a teacher)  --text                                              fit          -
    specialize, loss shown       --text                                              report       -
    train, to move by            --text of the domain, else experts[].text; generic  fit          -
    train, to compare states     the same                                            select       set, trained
    densify                      as train
    densify, its table           experts[].text, or the recipe's eval                 report       set, trained, chosen
    eval, inspect, tasks         the recipe's eval, whole; else experts[].text,      all,         set, trained, chosen
                                   report split                                      report
    tasks: which terms are known experts[].prompts, experts[].text                   all, fit     -
    data balance                 --text                                              all          -
    data tokenizer               --text                                              fit          -
    data tokenizer, fertility    --text                                              report       -

What a training's states were compared on is kept in selected-by.txt, and is not shown.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from modekit.errors import SourceError, TextError
from modekit.recipes.recipe import Expert, Recipe
from modekit.sources.digests import known_blake3
from modekit.sources.family import Reads
from modekit.text.document import Document, check_kind, reads_of
from modekit.text.documents import find_text, read_documents
from modekit.text.sequences import none_fits
from modekit.text.splits import SELECTED_FILE, TRAINED_DIGITS, TRAINED_FILE, Split, digests_in, documents_of_split, mark_of
from modekit.text.written import check_written, texts_of

MORE = "give more documents: separate them by blank lines, or write one record per document into a .jsonl"
"""What to do where too few documents were found."""
_FEWEST_BYTES = 2_000  # of a text that says what its domain is


@dataclass(frozen=True)
class DomainText:
    """All documents of one text that a recipe or a command names; `found` says in words how many there are."""

    documents: Sequence[Document]
    where: str
    found: str | None

    def split(self, split: Split) -> list[Document]:
        """What may set and train (fit), what may choose (select) or be shown (report), if nothing was made from it."""
        return documents_of_split(self.documents, split)

    def nothing_left(self, what: str, *, expected: str | None = None, remedy: str = MORE) -> TextError:
        """The error to raise when no document is left, with what there was."""
        return TextError(what, where=self.where, found=self.found, expected=expected, remedy=remedy)

    def none_fits(self, documents: Sequence[Document], sequence_length: int) -> TextError:
        """The error to raise when no sequence could be made of some of them."""
        return none_fits(documents, sequence_length, where=self.where, found=self.found)


@dataclass(frozen=True)
class HeldOutText:
    """Documents of one domain that may be shown; `expert` is the place of its expert, None for an unseen domain;
    `used`: how many more might, had nothing been made from or chosen by them.
    """

    name: str
    expert: int | None
    documents: Sequence[Document]
    text: DomainText
    used: int


def read_text(specs: Sequence[str], *, root: Path, where: str) -> DomainText:
    """The text that files, folders and data sets give together. Raises TextError when there is none."""
    documents = read_documents(specs, root=root, where=where)
    return DomainText(documents, where, f"{len(documents):,} document{'' if len(documents) == 1 else 's'}")


def check_texts(recipe: Recipe, root: Path) -> list[str]:
    """What to say of the texts that a recipe gives, before any is read. Raises TextError for one that is not there, whoever
    would read it.
    """
    for domain, specs in recipe.eval.items():
        find_text(specs, root=root, where=f"eval.{domain}")
    notes, texts = list[str](), dict[str, tuple[int, list[Path | str]]]()
    for place, expert in enumerate(recipe.experts):
        found = [] if expert.writes_text else find_text(expert.text or [], root=root, where=_where(expert, place))
        size = sum(map(_bytes_of, found))
        if found:
            texts[expert.name] = size, found
        if 0 < size < _FEWEST_BYTES:
            notes.append(f"{expert.name}: {size} bytes of text are too little to learn a domain from")
    return [*notes, *_one_text(texts)]


def _bytes_of(text: Path | str) -> int:
    """Of a file; one that cannot be looked at, and a hub data set, count nothing."""
    try:
        return text.stat().st_size if isinstance(text, Path) else 0
    except OSError:
        return 0


def _one_text(texts: Mapping[str, tuple[int, Sequence[Path | str]]]) -> Iterator[str]:
    """Experts whose texts are the same files, or copies of them; those of equal size are read."""
    same, sizes = dict[object, list[str]](), [size for size, _ in texts.values()]
    for name, (size, found) in texts.items():
        if sizes.count(size) > 1:
            with suppress(SourceError):  # a file that cannot be read, which who reads it says
                content = sorted(known_blake3(each) if isinstance(each, Path) else each for each in found)
                same.setdefault(tuple(content), []).append(name)
    are = "have one text: no router can choose between them by it; correct the paths"
    yield from (f"{' and '.join(names)} {are}" for names in same.values() if len(names) > 1)


def _where(expert: Expert, place: int) -> str:
    return f"experts[{place}] '{expert.name}': text"


def fit_documents(expert: Expert, root: Path, place: int, *, reads: Reads | None = None) -> list[Document]:
    """The documents that may set the router for an expert: its prompts, and the fit split of its text.

    Raises TextError when none are left, and where they are not what the base `reads` (None: not known).
    """
    where = _where(expert, place)
    check_written(expert, root, where)
    text = read_text(texts_of(expert), root=root, where=where) if expert.text else DomainText((), where, None)
    fit, prompts = text.split("fit"), expert.prompts or []
    if reads is not None:
        check_kind(fit, reads, where=where)
    if prompts and "pairs" in (reads, *map(reads_of, fit)):
        raise TextError(
            "prompts are plain text, and cannot be combined with pairs",
            where=where.replace(": text", ": prompts"),
            found=repr(prompts[0][:60]),
            expected="no prompts: a model with an encoder needs a target for every source",
            remedy="remove them, or give them with their targets as text",
        )
    documents = [*prompts, *fit]
    if not documents:
        raise text.nothing_left("no document is left for the fit after the held-out split")
    return documents


def unseen(documents: Iterable[Document], seen: Collection[str]) -> list[Document]:
    """Documents whose marks are not `seen`."""
    return [document for document in documents if mark_of(document) not in seen]


class RecipeTexts:
    """The texts of a recipe, each read once, and what has been made from them so far.

    `models` are the folders of base and experts, `mixture` is that of the mixture where there is one. All methods raise
    TextError when a text cannot be read; a domain of which no document is left is still there, without documents.
    """

    def __init__(self, recipe: Recipe, root: Path, *, models: Sequence[Path] = (), mixture: Path | None = None) -> None:
        self._recipe, self._root = recipe, root
        self._read: dict[str, DomainText] = {}
        folders = [*models, *([mixture] if mixture is not None else [])]
        trained = {digest for folder in folders for digest in digests_in(folder / TRAINED_FILE)}
        prompts = (p for expert in recipe.experts for p in [*(expert.prompts or []), *(expert.negative_prompts or [])])
        self._made = {*_marks(trained), *map(mark_of, prompts)}
        self._chosen = _marks(digests_in(mixture / SELECTED_FILE)) if mixture is not None else set()

    def own(self, place: int) -> DomainText | None:
        """All of experts[place].text."""
        expert = self._recipe.experts[place]
        where = _where(expert, place)
        check_written(expert, self._root, where)
        return self._text(texts_of(expert), where) if expert.text else None

    def fit(self, place: int) -> list[Document]:
        """The documents that may set the router for an expert, none where it has no text."""
        own = self.own(place)
        return [*(self._recipe.experts[place].prompts or []), *(own.split("fit") if own is not None else [])]

    def select_of(self, text: DomainText) -> list[Document]:
        """The documents of a text, one of the recipe's or another, that may choose."""
        return unseen(text.split("select"), self._made)

    def report(self, seen: Collection[str] = ()) -> list[HeldOutText]:
        """What may be shown, of the experts' domains and then of unseen ones: all that `eval` gives, else the experts' own.

        `seen`: digests, or marks, of further documents that something was made from or chosen by.
        """
        names = self._recipe.names
        used = {*self._made, *self._chosen, *_marks(seen)}
        used |= {mark_of(document) for place in range(len(names)) for document in self.fit(place)}
        found = []
        for name in [*names, *(name for name in self._recipe.eval if name not in names)]:
            place = names.index(name) if name in names else None
            given, own = self._given(name), None if place is None else self.own(place)
            text = given or own
            if text is not None:
                shown = text.documents if given is not None else text.split("report")
                left = unseen(shown, used)
                found.append(HeldOutText(name, place, left, text, len(shown) - len(left)))
        return found

    def _given(self, name: str) -> DomainText | None:
        return self._text(self._recipe.eval[name], f"eval.{name}") if name in self._recipe.eval else None

    def _text(self, specs: Sequence[str], where: str) -> DomainText:
        if where not in self._read:
            self._read[where] = read_text(specs, root=self._root, where=where)
        return self._read[where]


def _marks(digests: Iterable[str]) -> set[str]:
    return {digest[:TRAINED_DIGITS] for digest in digests}
