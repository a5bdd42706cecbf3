"""The rows of the table: which models are run on which text, and how each is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.sources import why_not
from modekit.errors import TextError
from modekit.evaluation.domains import Domain
from modekit.evaluation.identity import mixture_identities
from modekit.evaluation.labels import Labels, have_tags, label_places, label_tags, with_tag
from modekit.evaluation.results import Kind
from modekit.loaded.experts import average_of, load_recorded
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.recipes.strict import BASE
from modekit.run import Run
from modekit.sources.adapter import is_adapter
from modekit.text.tags import labels_of

ALONE = "without the base beside it"
"""Row of a mixture whose base runs apart (always_on): what its experts are worth without it."""


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
    hashes = [" ".join(source.digests) for source in record.sources]
    load = partial(load_recorded, checkpoint, run=run)
    if BASE in there:
        yield RowJob(BASE, "base", hashes[0], partial(load, 0), dense=True)
    experts = [(name, place) for name, place in zip(checkpoint.names, record.expert_sources, strict=True) if place != 0]
    for name, place in experts:
        if name in there:
            # An adapter is nothing without its base; a full model is itself, wherever it comes from.
            of_base = is_adapter(checkpoint.source_folder(record.sources[place]))
            identity = f"{hashes[0]} {hashes[place]}" if of_base else hashes[place]
            yield RowJob(name, "expert", identity, partial(load, place), dense=True)
    if {BASE, *(name for name, _ in experts)} <= set(there):
        members = list(dict.fromkeys(record.expert_sources))
        identity = "average " + " ".join(hashes[place] for place in members)
        loads = [partial(load, place) for place in members]
        yield RowJob("weight average", "average", identity, partial(average_of, loads), dense=True)


def mixture_jobs(checkpoint: Checkpoint, run: Run, *, experts: bool = False) -> Iterator[RowJob]:
    """The mixture, where asked forced on each of its experts; with each domain's own expert forced, and as it is."""
    experts_id, router_id = mixture_identities(checkpoint)
    load = partial(load_model, checkpoint.folder, run=run)
    if checkpoint.record.recipe.mixture.weights is None:
        for place, name in enumerate(checkpoint.names) if experts else ():
            yield RowJob(
                name,
                "expert",
                f"forced {name} {experts_id}",
                load,
                within=partial(_forced, checkpoint, place),
            )
        yield RowJob(
            "oracle",
            "oracle",
            f"oracle {experts_id}",
            load,
            text=lambda domain: None if domain.expert is None else domain,
            within=lambda model, domain: mixture_of(model, checkpoint).forced(domain.expert or 0),
        )
    yield RowJob("mixture", "mixture", f"{experts_id} {router_id}", load)
    if checkpoint.shape.routing.runs_common:
        yield RowJob(
            ALONE,
            "mixture",
            f"alone {experts_id} {router_id}",
            load,
            within=lambda model, _domain: mixture_of(model, checkpoint).without_common(),
        )


def _forced(checkpoint: Checkpoint, place: int, model: PreTrainedModel, _domain: Domain) -> AbstractContextManager[None]:
    return mixture_of(model, checkpoint).forced(place)


def label_jobs(
    checkpoint: Checkpoint,
    labels: Labels,
    domains: Sequence[Domain],
    tokenizer: PreTrainedTokenizerBase,
    unlabelled: Sequence[RowJob],
) -> list[RowJob]:
    """Jobs of the mixture with a label of every text and, by tag, of the base, where that is among the `unlabelled` jobs. A row
    without labels is the model as it is, unless texts have tags of their own. Raises TextError for conversations under tags.
    """
    recipe, known = checkpoint.record.recipe, labels_of(tokenizer)
    plain = {job.name: job for job in unlabelled if job.name in (BASE, "mixture")}
    seen = {domain.name: domain.expert for domain in domains}
    chats = next((domain.name for domain in domains if domain.chats), None)
    if labels.by == "tag" and chats is not None:
        raise TextError(
            "a conversation has no place for a tag: its template decides what comes first",
            where=chats,
            remedy="take --by gate",
        )
    jobs = []
    for model, kind in labels.rows():
        places = label_places(kind, seen, recipe)
        if model not in plain or not places:
            continue
        job = replace(plain[model], name=labels.row(model, kind), kind="label")
        if kind != "none" and labels.by == "gate":
            job = _by_gate(checkpoint, job, places)
        elif kind != "none" or have_tags(domain.sequences for domain in domains):
            job = _by_tag(job, label_tags(places, recipe, known), tokenizer)
        jobs.append(job)
    return jobs


def _by_gate(checkpoint: Checkpoint, job: RowJob, places: Mapping[str, int | None]) -> RowJob:
    """All weight on the expert whose label a domain gets; what the router would say is no part of the row."""
    experts_id, _ = mixture_identities(checkpoint)
    return replace(
        job,
        identity=f"told {dict(places)} {experts_id}",
        text=lambda domain: domain if domain.name in places else None,
        within=lambda model, domain: mixture_of(model, checkpoint).forced(places[domain.name] or 0),
    )


def _by_tag(job: RowJob, tags: Mapping[str, str | None], tokenizer: PreTrainedTokenizerBase) -> RowJob:
    """The tag of a label before every text."""

    def text(domain: Domain) -> Domain | None:
        if domain.name not in tags:
            return None
        return replace(domain, sequences=with_tag(tokenizer, domain.sequences, tags[domain.name]))

    return replace(job, identity=f"tagged {dict(tags)} {job.identity}", text=text)
