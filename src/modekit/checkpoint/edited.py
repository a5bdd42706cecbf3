"""Whether somebody changed a mixture's config or tokenizer by hand: what is scored is then not what was built."""

from __future__ import annotations

from collections.abc import Iterator

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.files.read import LARGE, UNREADABLE, read_bytes
from modekit.sources.tokenizer import TOKENIZER_FILES, copied_content

_KEPT = ("rope_theta", "rope_parameters", "rope_scaling", "sliding_window", "rms_norm_eps", "max_position_embeddings")
"""Of config.json: what a mixture has as its base had it, where both have the key."""


def edited_notes(checkpoint: Checkpoint) -> Iterator[str]:
    """A sentence where files are not as the build wrote them. Tokenizer files are compared while the base's folder is there."""
    record, config = checkpoint.record, checkpoint.config
    dense = record.dense_config
    keys = [key for key in _KEPT if key in dense and key in config and dense[key] != config[key]]
    files = [f"config.json ({', '.join(keys)})"] if keys else []
    base = checkpoint.source_folder(record.sources[0])
    for name in TOKENIZER_FILES if record.tokens is None else ():
        try:
            if copied_content(base / name) != read_bytes(checkpoint.folder / name, LARGE):
                files.append(name)
        except UNREADABLE:
            continue
    if files:
        yield f"changed by hand since the build: {', '.join(files)}; `modekit verify` compares every file"
