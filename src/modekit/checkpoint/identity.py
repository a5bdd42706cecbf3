"""What names a mixture as it is: everything that is kept beside it is of this very mixture, or made anew.

sources            the digests of the models that it was made from, weights and settings, and which of them is whose
trained            the digests of the tensors that a training moved since
router_sha256      the gates
evidence_sha256    what a lexical router keeps in the embedding
weights            the weight files as they lie there now, but for the two that a router is written into
embedding          the embedding of a lexical router, where it has a file of its own
tokenizer          tokenizer, chat template, generation config, as they lie there now
config             config.json, as it lies there now
recipe_digest      what was made of all this, and what the experts are called

A weight file is read for its digest once: what was found is kept while its size, times and inode are what they were
(files/user_cache.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from modekit.checkpoint.record import MixtureRecord
from modekit.files.read import LARGE, UNREADABLE, read_bytes
from modekit.files.write import digest_of_data
from modekit.planning.modekit_shape import without_names
from modekit.planning.plan import ROUTER_FILE
from modekit.planning.tensors import EMBEDDING_FILE
from modekit.sources.config import Config
from modekit.sources.contents import known_blake3
from modekit.sources.tokenizer import COPIED_FILES


def identity_of(record: MixtureRecord, config: Config, folder: Path, weights: Iterable[Path]) -> dict[str, str]:
    """Of the mixture in a folder, by its record, config.json and weight files. Raises SourceError."""
    digests = {file.name: known_blake3(file) for file in sorted(weights) if file.name != ROUTER_FILE}
    made_from = [[source.digests for source in record.sources], record.expert_sources]
    return {
        "recipe_digest": record.recipe_digest,
        "sources": digest_of_data(made_from),
        "trained": digest_of_data(sorted(record.trained.items())) if record.trained else "",
        "router_sha256": record.router.sha256,
        "evidence_sha256": record.router.evidence,
        "embedding": digests.pop(EMBEDDING_FILE, ""),
        "weights": digest_of_data(digests),
        "tokenizer": digest_of_data([_content_digest(folder / name) for name in sorted(COPIED_FILES)]),
        "config": digest_of_data(without_names(config)),
    }


def _content_digest(path: Path) -> str:
    try:
        return hashlib.sha256(read_bytes(path, LARGE)).hexdigest()
    except UNREADABLE:
        return ""
