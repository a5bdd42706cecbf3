"""What names a mixture as it is: everything that is kept beside it is of this very mixture, or made anew.

sources            the digests of the models that it was made from, weights and settings, and which of them is whose
trained            the digests of the tensors that a training moved since
router_sha256      the gates
evidence_sha256    what a lexical router keeps in the embedding
files              config.json, tokenizer, chat template, as they lie there now
recipe_digest      what was made of all this, and what the experts are called

A recipe and these sources give the same bytes every time, so that no gigabyte of the mixture itself has to be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modekit.checkpoint.record import Record
from modekit.files.read import LARGE, UNREADABLE, read_bytes
from modekit.planning.copied_files import COPIED_FILES
from modekit.planning.modekit_shape import without_names


def identity_of(record: Record, config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Of the mixture in a folder, by its record and config.json."""
    made_from = [[source.digests for source in record.sources], record.expert_sources]
    return {
        "recipe_digest": record.recipe_digest,
        "sources": _digest_of(made_from),
        "trained": _digest_of(sorted(record.trained.items())) if record.trained else "",
        "router_sha256": record.router.sha256,
        "evidence_sha256": record.router.evidence,
        "files": _digest_of([without_names(config), *(_content_digest(folder / name) for name in sorted(COPIED_FILES))]),
    }


def _content_digest(path: Path) -> str:
    try:
        return hashlib.sha256(read_bytes(path, LARGE)).hexdigest()
    except UNREADABLE:
        return ""


def _digest_of(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
