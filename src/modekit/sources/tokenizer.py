"""Do two models read text the same way? Compared by file, without loading a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modekit.errors import MismatchError, SourceError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def read_vocabulary(folder: Path, *, where: str) -> dict[str, int] | None:
    """Token -> id from tokenizer.json or vocab.json; None when the folder has neither."""
    path = next((folder / name for name in ("tokenizer.json", "vocab.json") if (folder / name).exists()), None)
    if path is None:
        return None
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "vocab.json":
            return {str(token): int(index) for token, index in raw.items()}
        vocab = raw["model"]["vocab"]
        pairs = vocab.items() if isinstance(vocab, dict) else ((entry[0], index) for index, entry in enumerate(vocab))
        tokens = {str(token): int(index) for token, index in pairs}
        tokens.update({str(added["content"]): int(added["id"]) for added in raw.get("added_tokens", [])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise SourceError(
            "the tokenizer cannot be read",
            where=f"{where}: {path.name}",
            found=error,
            remedy="download or save the model again",
        ) from None
    return tokens


def _merges(folder: Path) -> list[str] | None:
    """BPE merges of tokenizer.json as 'left right'; None without that file or merges."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    merges = json.loads(path.read_text(encoding="utf-8"))["model"].get("merges")
    return None if merges is None else [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]


def check_same_tokenizer(base: Path, expert: Path, *, where: str) -> None:
    """Raise MismatchError that names the tokens in which an expert's tokenizer differs from the base model's.

    A folder without tokenizer files is taken to use the base model's.
    """
    ours = read_vocabulary(base, where="base_model")
    theirs = read_vocabulary(expert, where=where)
    if ours is None or theirs is None:
        return
    if ours == theirs:
        if None not in (_merges(base), _merges(expert)) and _merges(base) != _merges(expert):
            raise MismatchError(
                "the expert's tokenizer has the base model's tokens but joins them by other merges", where=where,
                remedy="use experts fine-tuned without changing the tokenizer",
            )  # fmt: skip
        return
    differing = sorted(
        {token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)},
        key=lambda token: (ours.get(token, theirs.get(token, 0)), token),
    )
    shown = ", ".join(f"{token!r} (base {ours.get(token, '-')}, expert {theirs.get(token, '-')})" for token in differing[:5])
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    raise MismatchError(
        f"the expert's tokenizer differs from the base model's in {len(differing)} tokens",
        where=where,
        found=shown + more,
        expected="the same token for the same id",
        remedy="use experts fine-tuned without changing the tokenizer, or put the base's tokenizer files into the expert's "
        "folder if only the files differ",
    )


def check_ids_fit(folder: Path, vocab_size: int, *, where: str) -> None:
    """Raise MismatchError when a tokenizer has ids for which the model has no embedding."""
    vocabulary = read_vocabulary(folder, where=where)
    beyond = sorted(token for token, index in (vocabulary or {}).items() if index >= vocab_size)
    if beyond:
        raise MismatchError(
            f"the tokenizer has {len(beyond)} tokens that the model has no embedding for", where=where,
            found=", ".join(map(repr, beyond[:5])), expected=f"ids below vocab_size {vocab_size}",
            remedy="give the tokenizer that belongs to the model, or resize the model's embeddings",
        )  # fmt: skip
