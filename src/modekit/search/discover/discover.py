"""`modekit discover --text FOLDER [OUT]`: unlabelled documents -> domains, in words, and as text for the next expert.

    first reading -> a sample -> units, points -> how many, groups, words -> what a mixture serves -> second reading -> OUT

Documents are read twice and never all in memory. The same text and seed give the same bytes, in whatever order documents come
but for that in which they are written.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.files.output import Replace, refuse_existing
from modekit.files.staging import Staging, staging
from modekit.files.write import appearing, create, write_json
from modekit.recipes.paths import locate
from modekit.routing.text_router import TextRouter
from modekit.run import QUIET, Run
from modekit.search.discover.discovery import RECORD, Discovery, Group
from modekit.search.discover.evidence import Labels
from modekit.search.discover.learned import Learned, learn, space_of
from modekit.search.discover.names import name_of, words_about
from modekit.search.discover.serves import ASKED, Serving, check_tokenizer
from modekit.search.discover.settings import DiscoverSettings, check_settings
from modekit.search.discover.stream import Sample, Stream
from modekit.text.document import Document, text_of
from modekit.text.records import data_of

_TOGETHER = 512  # documents that are put to groups at once
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
    fewer documents than domains, UnsupportedError for a mixture whose router needs the model, MismatchError for one with
    another tokenizer than the base model, OutputError, SourceError.
    """
    check_settings(settings)
    if out is not None:
        refuse_existing(out, replace, sources=_read_from(unlabelled, settings))
    serving = _serving(unlabelled, settings, run)
    stream = Stream(unlabelled.texts, unlabelled.root)
    run.begin("read documents")
    sample = stream.sample(settings.sample, settings.seed)
    found = learn(sample, settings, space_of(settings, run), run)
    groups = _groups(sample, found.grouping.labels, serving, run)
    discovery = Discovery(
        settings,
        groups,
        found.tried,
        {"documents": sample.documents, "sha256": sample.sha256},
        None if unlabelled.mixture is None else unlabelled.mixture.folder.name,
        _notes(groups),
    )
    if out is None:
        _put_to_groups(stream, sample, found, groups, None, run)
        return discovery
    digest = f"discover {settings.as_data()} {sample.sha256} {discovery.mixture}"
    with staging(out, digest, "texts", sources=_read_from(unlabelled, settings), replace=replace, sync=run.sync) as stage:
        _put_to_groups(stream, sample, found, groups, stage, run)
        write_json(stage.folder / RECORD, discovery.as_data(), sync=False)
    return discovery


def _read_from(unlabelled: Unlabelled, settings: DiscoverSettings) -> list[Path]:
    """What the command reads, on disk."""
    texts = (locate(text, unlabelled.root) for text in unlabelled.texts)
    mixture = None if unlabelled.mixture is None else unlabelled.mixture.folder
    return [path for path in (*texts, settings.model, mixture) if path is not None]


def _serving(unlabelled: Unlabelled, settings: DiscoverSettings, run: Run) -> Serving | None:
    if unlabelled.mixture is None:
        return None
    router = TextRouter(unlabelled.mixture, run=run)
    if settings.model is not None:
        check_tokenizer(settings.model, unlabelled.mixture.folder)
    return Serving(unlabelled.mixture, router)


def _groups(sample: Sample, labels: Labels, serving: Serving | None, run: Run) -> list[Group]:
    count = int(labels.max()) + 1
    about = words_about(sample.beginnings, labels, count)
    groups = [Group(name_of(number, words), words) for number, words in enumerate(about, 1)]
    if serving is None:
        return groups
    own = [[sample.beginnings[place] for place in np.flatnonzero(labels == number).tolist()] for number in range(count)]
    total, asked = sum(min(ASKED, len(each)) for each in own), 0

    def advance() -> None:
        nonlocal asked
        asked += 1
        run.progress("ask the router", asked, total)

    for each, documents in zip(groups, own, strict=True):
        each.served = serving.of(documents, advance)
    return groups


def _notes(groups: Sequence[Group]) -> list[str]:
    """What to be wary of: an expert that serves several groups may be none for some of them."""
    serves: dict[str, list[str]] = {}
    for each in groups:
        if each.served is not None and each.served.expert is not None and each.served.served >= _MOSTLY:
            serves.setdefault(each.served.expert, []).append(each.name)
    return [
        f"'{expert}' serves {', '.join(names)}: a router knows the text of its experts alone, and may take what is "
        "foreign to all of them for the nearest"
        for expert, names in serves.items()
        if len(names) > 1
    ]


def _put_to_groups(
    stream: Stream, sample: Sample, found: Learned, groups: Sequence[Group], stage: Staging | None, run: Run
) -> None:
    """Read again, count, and write where there is a place to. Raises TextError when the text has changed."""
    done = 0
    documents = (document for _, document in stream.read())
    with ExitStack() as opened:
        files = [opened.enter_context(_appearing(stage.folder / each.file)) for each in groups] if stage is not None else []
        while together := list(islice(documents, _TOGETHER)):
            for document, label in zip(together, found.labels([text_of(each) for each in together]), strict=True):
                groups[label].documents += 1
                groups[label].characters += len(text_of(document))
                if files:
                    files[label].write(_line(document))
            done += len(together)
            run.progress("group documents", min(done, sample.documents), sample.documents)
        stream.check_same(sample)


@contextmanager
def _appearing(path: Path) -> Iterator[io.BufferedIOBase]:
    with appearing(path, sync=False) as temporary, io.BufferedWriter(create(temporary), _BUFFER) as stream:
        yield stream


def _line(document: Document) -> bytes:
    """A record as `text/records.py` reads it."""
    return (json.dumps(data_of(document), ensure_ascii=False, sort_keys=True) + "\n").encode()
