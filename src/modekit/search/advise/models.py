"""Can the experts be mixed, do they read text as the base does, and how far did they move? From files, without torch.

`plan` and `build` stop at the first of these with an error. Here each becomes a finding, and an expert that a build would
refuse is left out of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modekit.errors import ModekitError, SourceError
from modekit.planning.pieces import piece_of
from modekit.recipes.recipe import Expert, Recipe
from modekit.run import Run
from modekit.search.advise.drift import Drift, compare, groups_of
from modekit.search.advise.result import Finding, Group, finding_of
from modekit.sources.adapter import AdapterSource
from modekit.sources.compatibility import check_complete, check_dtypes, check_same_architecture, check_sizes
from modekit.sources.families import family_of, own_family
from modekit.sources.family import Family
from modekit.sources.model import DTYPE_NAMES, ModelSource
from modekit.sources.names import HEAD, module_of
from modekit.sources.open import Opener
from modekit.sources.tokenizer import TOKENIZER_FILES, chat_template
from modekit.sources.vocabulary import Vocabulary, one_vocabulary


@dataclass(frozen=True)
class ComparedModels:
    """The models of a recipe, and how far experts moved. `experts`: those that can be opened and fit the base, by their index
    in the recipe; a base expert is the base's source.
    """

    recipe: Recipe
    root: Path
    base: ModelSource
    family: Family
    experts: Mapping[int, ModelSource]
    findings: Sequence[Finding]
    groups: Mapping[str, Group]
    drift: Drift
    usable: Sequence[int]

    @property
    def sources(self) -> list[ModelSource]:
        """One per expert; the base's for those that cannot be mixed."""
        return [self.experts.get(index, self.base) for index in range(len(self.recipe.experts))]

    @property
    def moved(self) -> list[int]:
        """Of the usable: those that differ from the base."""
        return [index for index in self.usable if self.drift.moved[index]]

    def is_low_rank(self, index: int) -> bool:
        """Whether an expert is an adapter, or is to be kept as one."""
        adapter = isinstance(self.experts[index], AdapterSource)
        return adapter or self.recipe.experts[index].is_low_rank


def compare_models(recipe: Recipe, root: Path, *, run: Run) -> ComparedModels:
    """Open and check every model, and read every tensor once. Raises what is wrong with the base model."""
    opener = Opener(root, run)
    base = opener.base(recipe)
    where = f"base_model ({base.spec})"
    family = family_of(base.config, where=where)
    check_sizes(base, family)
    check_dtypes(base)
    check_complete(base, family, family.layers(base.config))
    experts: dict[int, ModelSource] = {}
    remarked: list[tuple[Expert, ModelSource]] = []
    findings: list[Finding] = []
    one_vocabulary((base,), family, "mean")  # whether its tokenizer can be read
    for index, expert in enumerate(recipe.experts):
        try:
            source = opener.expert(index, expert, base)
        except ModekitError as error:
            findings.append(finding_of(error, expert.name))
            continue
        others = (base, *experts.values())
        refused = [] if expert.is_base else list(_refusals(expert.name, source, others, family))
        findings += refused
        if not expert.is_base:
            remarked.append((expert, source))
        if not refused:
            experts[index] = source
    vocabulary = one_vocabulary((base, *experts.values()), family, recipe.mixture.tokens or "mean")
    findings += [each for expert, source in remarked for each in _remarks(expert, source, base, vocabulary)]
    experts = dict(zip(experts, vocabulary.sources[1:], strict=True))
    base = vocabulary.sources[0]
    groups = groups_of(base, family)
    drift = compare(base, [experts.get(index, base) for index in range(len(recipe.experts))], groups, run=run)
    if drift.base_damaged:
        raise SourceError(
            "the weights hold NaN or Inf",
            where=f"{where}: {drift.base_damaged[0]}",
            remedy="the model is damaged: save or download it again",
        )
    usable = [index for index in experts if not drift.damaged[index]]
    return ComparedModels(recipe, root, base, family, experts, findings, groups, drift, usable)


def _refusals(name: str, source: ModelSource, others: tuple[ModelSource, ...], family: Family) -> Iterator[Finding]:
    """What a build beside others, the base first, would refuse; every check speaks for itself, so that one does not hide the
    next.
    """
    base = others[0]
    layers = family.layers(base.config)

    def shapes() -> None:
        for ref in base.tensors.values():
            if ref.name in source.tensors and (family.pair or module_of(ref.name) not in (family.embedding, HEAD)):
                piece_of((base, source), 1, ref)

    of_full_models: list[Callable[[], object]] = [
        lambda: check_sizes(source, own_family(source.config, family)),
        lambda: check_dtypes(source),
        lambda: check_same_architecture(base, source, family),
        lambda: check_complete(source, family, layers),
        shapes,
    ]

    def tokenizers() -> None:
        one_vocabulary((*others, source), family, "mean")

    for check in [*([] if isinstance(source, AdapterSource) else of_full_models), tokenizers]:
        try:
            check()
        except ModekitError as error:
            yield finding_of(error, name)


def _remarks(expert: Expert, source: ModelSource, base: ModelSource, vocabulary: Vocabulary) -> Iterator[Finding]:
    """What a build takes without a word and a user may be surprised by."""
    name = expert.name
    if isinstance(source, AdapterSource):
        yield from (Finding("note", name, note) for note in source.notes)
    elif not any((source.folder / file).exists() for file in TOKENIZER_FILES):
        yield Finding("note", name, "the folder has no tokenizer; the base model's is taken to be its own")
    ours, theirs = chat_template(vocabulary.tokenizer.source.folder), chat_template(source.folder)
    if theirs is not None and ours != theirs:
        whose = vocabulary.tokenizer.owner
        yield Finding(
            "warning",
            name,
            f"its chat template is not {whose}, and a mixture has {whose}",
            "none there" if ours is None else "another one there",
            "if all experts share it, put it into the base model's folder before building; else prompt as each expert knows",
        )
    if not isinstance(source, AdapterSource):
        yield from _remarks_on_model(expert, source, base, vocabulary)


def _remarks_on_model(expert: Expert, source: ModelSource, base: ModelSource, vocabulary: Vocabulary) -> Iterator[Finding]:
    """Of a full model: where its settings are not the base's."""
    name = expert.name
    ends = [model.config.get("eos_token_id") for model in (base, source)]
    if ends[0] != ends[1] and not vocabulary.tokenizer.eos:
        yield Finding(
            "warning",
            name,
            "it ends its answers with another token than the base model",
            f"eos_token_id {ends[1]}, base {ends[0]}",
            "name both in the base model's generation_config.json before building",
        )
    ours_dtypes, theirs_dtypes = _dtypes(base), _dtypes(source)
    if ours_dtypes != theirs_dtypes:
        yield Finding(
            "note",
            name,
            "its tensors have another dtype than the base model's",
            f"{theirs_dtypes}, base {ours_dtypes}",
            f"a build casts to the base model's; output: {{dtype: {theirs_dtypes.split(', ')[0]}}} keeps these as they are",
        )
    if expert.lora_rank is not None:
        yield Finding(
            "note",
            name,
            f"as: lora keeps a part of rank {expert.lora_rank}; the figures here are of the whole model",
            to_do="`modekit extract` shows what a rank loses",
        )


def _dtypes(source: ModelSource) -> str:
    """The float dtypes of a model, the most frequent (by bytes) first."""
    sizes: dict[str, int] = {}
    for ref in source.tensors.values():
        if ref.dtype in DTYPE_NAMES:
            sizes[DTYPE_NAMES[ref.dtype]] = sizes.get(DTYPE_NAMES[ref.dtype], 0) + ref.nbytes
    return ", ".join(sorted(sizes, key=lambda dtype: -sizes[dtype]))
