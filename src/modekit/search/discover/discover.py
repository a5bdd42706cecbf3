"""`modekit discover --text FOLDER [OUT]`: unlabelled documents -> domains, in words, and as text for the next expert.

    first reading -> a sample -> words, points -> how many, groups, names -> what a mixture serves -> second reading -> OUT

Documents are read twice and never all in memory. The same text and seed give the same bytes, in whatever order documents come
but for that in which they are written.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.files.output import Replace, refuse_existing
from modekit.files.staging import Staging, staging
from modekit.files.write import appearing, create, write_json
from modekit.recipes.paths import locate
from modekit.recipes.strict import BASE
from modekit.routing.text_router import TextRouter
from modekit.run import QUIET, ProgressCount, Run
from modekit.search.discover.documents import DocumentSample, UnlabelledDocuments, describe_groups, name_of
from modekit.search.discover.grouping import WORTH, Grouping, gains, group_documents
from modekit.search.discover.result import (
    RESULT_FILE,
    Coverage,
    DiscoverSettings,
    Discovery,
    DocumentGroup,
    TextRead,
    TriedNumber,
)
from modekit.text.document import text_of
from modekit.text.records import data_of

_TOGETHER = 512  # documents that are assigned at once
_BUFFER = 2**16
_MOSTLY = 0.5  # of a group is served: then somebody has to ask whether that is right


@dataclass(frozen=True)
class Unlabelled:
    """What is grouped: texts (paths relative to `root`, or hub data sets), and the mixture that may serve them."""

    texts: Sequence[str]
    root: Path
    mixture: Checkpoint | None = None


def discover(
    unlabelled: Unlabelled,
    settings: DiscoverSettings,
    *,
    out: Path | None = None,
    replace: Replace = "nothing",
    run: Run = QUIET,
) -> Discovery:
    """Group documents into domains, and write each as a .jsonl that other commands read, beside discover.json.

    Without `out` nothing is written; `replace` says what may be there. Raises TextError for text that cannot be read or holds
    fewer documents than domains, UnsupportedError for a mixture whose router needs the model, OutputError.
    """
    mixture = unlabelled.mixture
    texts = (locate(text, unlabelled.root) for text in unlabelled.texts)
    sources = [path for path in (*texts, None if mixture is None else mixture.folder) if path is not None]
    if out is not None:
        refuse_existing(out, replace, sources=sources)
    meter = None if mixture is None else CoverageMeter(mixture, run)
    documents = UnlabelledDocuments(unlabelled.texts, unlabelled.root)
    run.begin("read documents")
    sample = documents.sample(settings.sample, settings.seed)
    grouping = group_documents(sample, settings, run)
    labels = grouping.clusters.labels
    count = int(labels.max()) + 1
    words = describe_groups(sample.beginnings, labels, count)
    names = [name_of(number, own) for number, own in enumerate(words, 1)]
    own = [[sample.beginnings[place] for place in np.flatnonzero(labels == number).tolist()] for number in range(count)]
    coverage: list[Coverage | None] = [None] * count
    if meter is not None:
        work = ProgressCount(run, sum(min(ROUTED, len(each)) for each in own))
        coverage = [meter.measure(each, partial(work.advance, "ask the router", 1)) for each in own]
    mixture_name = None if mixture is None else mixture.folder.name
    with ExitStack() as opened:
        stage = None
        if out is not None:
            digest = f"discover {settings.model_dump()} {sample.sha256} {mixture_name}"
            stage = opened.enter_context(staging(out, digest, "texts", sources=sources, replace=replace, sync=run.sync))
        sizes = _assign_all(documents, sample, grouping, names, stage, run)
        groups = [
            DocumentGroup(name=name, file=f"{name}.jsonl", documents=number, characters=characters, words=own, served=served)
            for name, (number, characters), own, served in zip(names, sizes, words, coverage, strict=True)
        ]
        result = _result(settings, sample, grouping, mixture_name, groups)
        if stage is not None:
            write_json(stage.folder / RESULT_FILE, result.model_dump(mode="json"), sync=False)
    return result


def _result(
    settings: DiscoverSettings,
    sample: DocumentSample,
    grouping: Grouping,
    mixture: str | None,
    groups: list[DocumentGroup],
) -> Discovery:
    return Discovery(
        settings=settings,
        text=TextRead(documents=sample.documents, sha256=sample.sha256),
        domains=len(groups),
        chosen="held-out likelihood" if grouping.held_out else "given",
        worth=WORTH,
        tried=[
            TriedNumber(domains=number, held_out=round(each, 6), gain=None if gain is None else round(gain, 6))
            for number, (each, gain) in enumerate(zip(grouping.held_out, gains(grouping.held_out), strict=True), 1)
        ],
        mixture=mixture,
        groups=groups,
        next=None if mixture is None else max(groups, key=lambda group: group.unserved).name,
        notes=shared_experts(groups),
    )


def shared_experts(groups: Sequence[DocumentGroup]) -> list[str]:
    """A note for every expert that serves several groups: it may be none for some of them."""
    serves: dict[str, list[str]] = {}
    for each in groups:
        if each.served is not None and each.served.expert is not None and each.served.served >= _MOSTLY:
            serves.setdefault(each.served.expert, []).append(each.name)
    return [
        f"'{expert}' serves {', '.join(names)}: a router knows only the text of its experts, and may send "
        "foreign text to the nearest one"
        for expert, names in serves.items()
        if len(names) > 1
    ]


def _assign_all(
    documents: UnlabelledDocuments,
    sample: DocumentSample,
    grouping: Grouping,
    names: Sequence[str],
    stage: Staging | None,
    run: Run,
) -> list[tuple[int, int]]:
    """Read again, write where there is a place to, and count documents and characters of every group. Raises TextError when the
    text has changed.
    """
    numbers, characters = [0] * len(names), [0] * len(names)
    read = (document for _, document in documents.read())
    with ExitStack() as opened:
        files: list[io.BufferedWriter] = []
        for path in [] if stage is None else [stage.folder / f"{name}.jsonl" for name in names]:
            temporary = opened.enter_context(appearing(path, sync=False))
            files.append(opened.enter_context(io.BufferedWriter(create(temporary), _BUFFER)))
        while together := list(islice(read, _TOGETHER)):
            for document, label in zip(together, grouping.assign([text_of(each) for each in together]), strict=True):
                numbers[label] += 1
                characters[label] += len(text_of(document))
                if files:
                    line = json.dumps(data_of(document), ensure_ascii=False, sort_keys=True)
                    files[label].write(f"{line}\n".encode())
            run.progress("group documents", min(sum(numbers), sample.documents), sample.documents)
        documents.check_same(sample)
    return list(zip(numbers, characters, strict=True))


SURE = 0.9
"""Probability from which a router is certain of an expert."""
ROUTED = 200
"""Largest number of documents of a group that are routed."""


class CoverageMeter:
    """A mixture's router, for documents that have no label."""

    def __init__(self, mixture: Checkpoint, run: Run) -> None:
        """Raises UnsupportedError when the router needs the model."""
        self._router = TextRouter(mixture, run=run)
        self._not_experts = {BASE, *(expert.name for expert in mixture.record.recipe.experts if expert.is_base)}

    def measure(self, documents: Sequence[str], advance: Callable[[], None]) -> Coverage:
        """Of a group, by its first documents; `advance` is called after each."""
        led: Counter[str] = Counter()
        sure: Counter[str] = Counter()
        certainty = 0.0
        routed = documents[:ROUTED]
        for document in routed:
            decision = self._router.decide(document)
            leads = max(decision.probabilities.values())
            led[decision.expert] += 1
            certainty += leads
            if decision.expert not in self._not_experts and leads >= SURE:
                sure[decision.expert] += 1
            advance()
        count = max(1, len(routed))
        return Coverage(
            documents=len(routed),
            experts={name: round(led[name] / count, 6) for name in _most_first(led)},
            certainty=round(certainty / count, 6),
            served=round(sum(sure.values()) / count, 6),
            expert=next(iter(_most_first(sure)), None),
        )


def _most_first(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda name: (-counts[name], name))
