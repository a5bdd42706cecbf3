"""The rows of the table: which models are run on which text, how each is loaded, and the one loop that runs them.

Labels at test time (arXiv 2407.01126):

    right   the label of the domain's own expert; of an unseen domain that of the expert that knows its name, else none
    wrong   that of the expert behind the right one, the first behind the last; unseen domains without a right one have those
            of the experts in turn

A label acts by `gate`, where all weight is its expert's, or by `tag`, the reserved token of text/tags.py before the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.sources import why_not
from modekit.errors import MismatchError, TextError
from modekit.evaluation.domains import Advance, Domain
from modekit.evaluation.results import Kind
from modekit.loaded.experts import average_of, load_expert_source
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.recipes.mixture import CHOICES
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import BASE
from modekit.run import ProgressCount, Run
from modekit.sources.adapter import is_adapter
from modekit.text.sequences import TokenSequence
from modekit.text.tags import labels_of, opening_ids, place_of_tag, tag_ids, tag_of

_DECIDES = {"method", *CHOICES, "always_on", "weights", "router"}
"""Keys of a mixture that say how its router decides; the others say what its experts are."""
ALONE = "without the base beside it"
"""Row of a mixture whose base runs apart (always_on): what its experts are worth without it."""
Labels = Literal["gate", "tag"]
"""How labels act."""
_Score = TypeVar("_Score")


def row_identity(model: str, checkpoint: Checkpoint, domains: Sequence[Domain]) -> str:
    """Names a model on text, as the mixture's tokenizer reads it: sha256 of all three."""
    texts = [domain.record for domain in domains]
    return hashlib.sha256(f"{model} {checkpoint.identity['tokenizer']} {texts}".encode()).hexdigest()


def mixture_identities(checkpoint: Checkpoint) -> tuple[str, str]:
    """What the experts are, which is all that the oracle runs, and how the router decides between them.

    Both are of `Checkpoint.identity`, but for what experts are called, which changes no row.
    """
    said, mixture = checkpoint.identity, checkpoint.record.recipe.mixture
    experts_id = f"{said['sources']} {mixture.model_dump(mode='json', exclude=_DECIDES)} {said['trained']} {said['weights']}"
    decides = mixture.model_dump(mode="json", include=_DECIDES)
    return experts_id, f"{decides} {said['router_sha256']} {said['evidence_sha256']} {said['embedding']} {said['config']}"


@dataclass(frozen=True)
class RowJob:
    """A row to run: what it is made from, and the model, as large as the base where it is `dense`, else as the mixture.

    `text` is what is read of a domain, None where it is not scored; `within` is open while that is scored: the oracle is
    another model in each domain.
    """

    name: str
    kind: Kind
    identity: str
    load: Callable[[], PreTrainedModel]
    text: Callable[[Domain], Domain | None] = lambda domain: domain
    within: Callable[[PreTrainedModel, Domain], AbstractContextManager[None]] = lambda _model, _domain: nullcontext()
    dense: bool = False


def row_jobs(checkpoint: Checkpoint, *, run: Run) -> tuple[list[RowJob], list[str]]:
    """Jobs in the order of the table, and why rows are left out: models that are gone, or other ones now."""
    experts = [(place, name) for place, name in enumerate(checkpoint.names) if checkpoint.record.expert_sources[place] != 0]
    reasons = {BASE: why_not(checkpoint, None, run=run), **{name: why_not(checkpoint, at, run=run) for at, name in experts}}
    notes = [f"{name} left out: {reason}" for name, reason in reasons.items() if reason]
    if checkpoint.record.recipe.mixture.weights is not None:
        notes.append("oracle left out: given weights are folded into the experts, so none of them is whole in the mixture")
    there = {name for name, reason in reasons.items() if not reason}
    return [*_source_jobs(checkpoint, there, run), *mixture_jobs(checkpoint, run)], notes


def _source_jobs(checkpoint: Checkpoint, there: Collection[str], run: Run) -> Iterator[RowJob]:
    """Base, experts, and their average, as far as their models are `there`."""
    record = checkpoint.record
    rows = [] if record.tokens is None else [checkpoint.identity["sources"]]  # of tokens that models lack, made of all models
    hashes = [" ".join([*source.digests, *rows]) for source in record.sources]
    load = partial(load_expert_source, checkpoint, run=run)
    if BASE in there:
        yield RowJob(BASE, "base", hashes[0], partial(load, None), dense=True)
    experts = [(name, at) for at, name in enumerate(checkpoint.names) if record.expert_sources[at] != 0]
    for name, at in experts:
        if name in there:
            # An adapter is nothing without its base; a full model is itself, wherever it comes from.
            place = record.expert_sources[at]
            of_base = is_adapter(checkpoint.source_folder(record.sources[place]))
            identity = f"{hashes[0]} {hashes[place]}" if of_base else hashes[place]
            yield RowJob(name, "expert", identity, partial(load, at), dense=True)
    if {BASE, *(name for name, _ in experts)} <= set(there):
        members = {place: at for at, place in enumerate(record.expert_sources)}
        identity = "average " + " ".join(hashes[place] for place in members)
        loads = [partial(load, at) for at in members.values()]
        yield RowJob("weight average", "average", identity, partial(average_of, loads), dense=True)


def mixture_jobs(checkpoint: Checkpoint, run: Run, *, experts: bool = False) -> Iterator[RowJob]:
    """The mixture, where asked forced on each of its experts; with each domain's own expert forced, and as it is."""
    experts_id, router_id = mixture_identities(checkpoint)
    job = RowJob("mixture", "mixture", f"{experts_id} {router_id}", partial(load_model, checkpoint.folder, run=run))
    if checkpoint.record.recipe.mixture.weights is None:
        for place, name in enumerate(checkpoint.names) if experts else ():
            forced = _forced(checkpoint, job, f"forced {name} {experts_id}", place)
            yield replace(forced, name=name, kind="expert", dense=True)
        oracle = _forced(checkpoint, job, f"oracle {experts_id}")
        yield replace(oracle, name="oracle", kind="oracle")
    yield job
    if checkpoint.shape.routing.runs_common:
        yield replace(
            job,
            name=ALONE,
            identity=f"alone {job.identity}",
            within=lambda model, _domain: mixture_of(model, checkpoint).without_common(),
        )


def run_jobs(
    checkpoint: Checkpoint,
    jobs: Sequence[RowJob],
    domains: Sequence[Domain],
    score: Callable[[PreTrainedModel, Domain, Advance], _Score],
    run: Run,
    known: Callable[[RowJob, Domain], _Score | None] = lambda _job, _text: None,
) -> Iterator[tuple[RowJob, tuple[int, int], dict[str, _Score]]]:
    """Every job with its parameters, in all and active, and its scores by domain; what is `known` is not scored again.

    One model is in memory at a time; jobs in a row that run the same one load it once.
    """
    work, sizes = ProgressCount(run, sum(domain.scored_tokens for domain in domains) * len(jobs)), checkpoint.parameters
    model: PreTrainedModel | None = None
    loaded: object = None
    for job in jobs:
        advance, scores = partial(work.advance, f"score {job.name}"), dict[str, _Score]()
        advance(0)
        for domain in domains:
            text = job.text(domain)
            found = None if text is None else known(job, text)
            if text is None or found is not None:
                advance(domain.scored_tokens)
            else:
                if model is None or job.load is not loaded:
                    model = None  # it goes before the next one comes
                    model, loaded = job.load(), job.load
                with job.within(model, text):
                    found = score(model, text, advance)
            if found is not None:
                scores[domain.name] = found
        yield job, (sizes.dense, sizes.dense - sizes.idle) if job.dense else (sizes.total, sizes.active), scores


def _forced(checkpoint: Checkpoint, job: RowJob, identity: str, to: int | Mapping[str, int] | None = None) -> RowJob:
    """All weight on one expert, on one by the name of each domain, or (None) on each domain's own; domains that have none are
    not scored. The router is no part of such a row.
    """

    def expert(domain: Domain) -> int | None:
        return to if isinstance(to, int) else domain.expert if to is None else to.get(domain.name)

    return replace(
        job,
        identity=identity,
        text=lambda domain: None if expert(domain) is None else domain,
        within=lambda model, domain: mixture_of(model, checkpoint).forced(expert(domain) or 0),
    )


def label_jobs(
    checkpoint: Checkpoint,
    labels: Labels,
    domains: Sequence[Domain],
    tokenizer: PreTrainedTokenizerBase,
    unlabelled: Sequence[RowJob],
    wrong: bool = True,
) -> Iterator[RowJob]:
    """The mixture with right and, if asked for, wrong labels and, by tag, the base, where that is among the `unlabelled` jobs;
    where texts have tags of their own, both without any, too. Raises MismatchError, and TextError for conversations under tags.
    """
    recipe, (experts_id, _) = checkpoint.record.recipe, mixture_identities(checkpoint)
    _check_labels(checkpoint, labels, domains, tokenizer)
    for job in unlabelled:
        if job.name != "mixture" and (job.name != BASE or labels == "gate"):
            continue
        for kind, places in zip(("right", "wrong"), label_places(domains, recipe), strict=True):
            if labels == "gate":
                told = _forced(checkpoint, job, f"told {places} {experts_id}", places)
            else:
                told = _tagged(job, label_tags(places, recipe, labels_of(tokenizer)), tokenizer)
            if places and (wrong or kind == "right"):
                yield replace(told, name=f"{job.name}, {kind} {'label' if labels == 'gate' else 'tag'}", kind="label")
        if any(sequence.tag is not None for domain in domains for sequence in domain.sequences):
            none = dict.fromkeys(domain.name for domain in domains)
            yield replace(_tagged(job, none, tokenizer), name=f"{job.name}, no tag", kind="label")


def _tagged(job: RowJob, tags: Mapping[str, str | None], tokenizer: PreTrainedTokenizerBase) -> RowJob:
    """The tag of a label before every text, or none."""

    def text(domain: Domain) -> Domain | None:
        if domain.name not in tags:
            return None
        return replace(domain, sequences=with_tag(tokenizer, domain.sequences, tags[domain.name]))

    return replace(job, identity=f"tagged {dict(tags)} {job.identity}", text=text)


def label_places(domains: Sequence[Domain], recipe: Recipe) -> tuple[dict[str, int], dict[str, int]]:
    """Domain -> place of the expert whose label is its right one, and its wrong one. Domains without such are left out."""
    experts, right, wrong, strangers = len(recipe.names), dict[str, int](), dict[str, int](), 0
    for domain in domains:
        place = _expert_of(domain.name, recipe) if domain.expert is None else domain.expert
        if place is None:
            wrong[domain.name], strangers = strangers % experts, strangers + 1
        else:
            right[domain.name] = place
            wrong |= {domain.name: (place + 1) % experts} if experts > 1 else {}
    return right, wrong


def _expert_of(label: str, recipe: Recipe) -> int | None:
    """Place of the expert that a label leads to: by its name, else by its other labels; None where there is none."""
    return recipe.names.index(label) if label in recipe.names else recipe.other_labels.get(label)


def label_tags(places: Mapping[str, int], recipe: Recipe, known: Sequence[str]) -> dict[str, str]:
    """Domain -> the label whose tag stands before its text: its own name, where that leads to the same expert and has a tag
    (`known`), else the expert's.
    """
    own = {name for name, place in places.items() if name in known and _expert_of(name, recipe) == place}
    return {name: name if name in own else recipe.names[place] for name, place in places.items()}


def _check_labels(
    checkpoint: Checkpoint, labels: Labels, domains: Sequence[Domain], tokenizer: PreTrainedTokenizerBase
) -> None:
    if labels == "gate":
        if checkpoint.record.recipe.mixture.weights is not None:
            raise MismatchError(
                "a label cannot act by the gate: no expert is whole in this mixture",
                where=f"{checkpoint.folder}: --labels gate",
                found="mixture.weights, which are folded into the experts",
                remedy="leave --labels out, or build without weights",
            )
        return
    known, chats = labels_of(tokenizer), [domain.name for domain in domains if domain.chats]
    missing = [name for name in checkpoint.names if name not in known]
    if missing:
        raise MismatchError(
            "a label cannot act by a tag: the tokenizer has none for it",
            where=f"{checkpoint.folder}: --labels tag",
            found=f"no tag for {', '.join(missing)}",
            expected=f"a token for every expert, such as {tag_of(missing[0])}",
            remedy="make base and experts with `modekit specialize --tags` and build again, or take --labels gate",
        )
    if chats:
        raise TextError(
            "a conversation has no place for a tag: its template decides what comes first",
            where=chats[0],
            remedy="take --labels gate",
        )


def with_tag(tokenizer: PreTrainedTokenizerBase, sequences: Sequence[TokenSequence], label: str | None) -> list[TokenSequence]:
    """The same sequences, each with a label's tag where `encode` puts it, in place of one that it has; None: without any."""
    if label is None:
        return [each.with_tag(None) for each in sequences]
    (tag,), opening = tag_ids(tokenizer, [label]), opening_ids(tokenizer)
    return [each.with_tag(tag, place_of_tag(opening, each.ids)) for each in sequences]
