"""Text of a domain: files, folders or hub data sets -> documents -> splits -> token sequences -> padded batches.

A document belongs to exactly one split, decided by the hash of its own text, so that no text that set a router or
trained an expert is ever scored, whatever file it comes from and in whatever order:

    fit     80 %   router fits, specialists
    select  10 %   choosing between variants
    report  10 %   every number that is shown

Shape legend: B batch, S sequence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modekit.errors import TextError
from modekit.recipes.paths import locate

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Split = Literal["fit", "select", "report"]
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet", ".md", ".py")
TRAINED_FILE = "trained-on.txt"  # beside a specialist: digests of its documents, one per line
SELECTED_FILE = "selected-by.txt"  # beside a trained mixture: digests of documents by which its state was chosen
TRAINED_DIGITS = 16
_HUB_DOCUMENTS = 100_000  # read of a hub data set at most: far more than any fit or evaluation uses
_PASSAGE = 2_000  # characters of a passage cut from plain text


def digest_of(document: str) -> str:
    """sha256 of a document's text, surrounding white space aside."""
    return hashlib.sha256(document.strip().encode("utf-8", "surrogatepass")).hexdigest()


def digests_in(path: Path) -> set[str]:
    """Digests that a file keeps, one per line; none without the file."""
    return set(path.read_text(encoding="utf-8").split()) if path.exists() else set()


def split_of(document: str) -> Split:
    """The split a document belongs to."""
    place = int(digest_of(document)[:8], 16) % 100
    return "fit" if place < 80 else "select" if place < 90 else "report"


def read_documents(specs: Sequence[str], *, root: Path, where: str) -> list[str]:
    """All documents of a domain, in an order that depends only on their text; exact duplicates once.

    Plain text (.txt, .md, .py) is cut at blank lines into passages of about 2,000 characters; .jsonl and .parquet hold
    one document per record in `text`. Anything that is no path is taken for a hub data set (split `train`).

    Raises TextError when nothing is there, or it is empty or binary.
    """
    documents: dict[str, str] = {}
    for spec in specs:
        for document in _read_spec(spec, root=root, where=where):
            if document.strip():
                documents[digest_of(document)] = document.strip()
    if not documents:
        raise TextError("the text is empty", where=where, found=", ".join(specs), remedy="give text with at least one document")
    return [documents[key] for key in sorted(documents)]


def documents_of_split(documents: Iterable[str], split: Split) -> list[str]:
    """The documents that belong to one split."""
    return [document for document in documents if split_of(document) == split]


def is_local(spec: str, root: Path) -> bool:
    """Whether a text is a file or folder, there or not, rather than a hub data set."""
    return spec.endswith(TEXT_SUFFIXES) or spec.startswith((".", "/", "~")) or locate(spec, root) is not None


def check_present(specs: Sequence[str], *, root: Path, where: str) -> None:
    """Raise TextError when a text on disk is not there; nothing is read."""
    for spec in specs:
        if is_local(spec, root) and locate(spec, root) is None:
            raise TextError("the text does not exist", where=where, found=str(root / spec), remedy="correct the path")


def _read_spec(spec: str, *, root: Path, where: str) -> Iterator[str]:
    path = locate(spec, root)
    if path is not None and path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
        if not files:
            raise TextError(
                "the folder holds no text", where=where, found=str(path), expected=", ".join(TEXT_SUFFIXES),
                remedy="put text there, or correct the path",
            )  # fmt: skip
        for file in files:
            yield from _read_file(file, where=where)
    elif path is not None:
        yield from _read_file(path, where=where)
    else:
        check_present([spec], root=root, where=where)
        yield from _read_hub(spec, where=where)


def _read_file(file: Path, *, where: str) -> Iterator[str]:
    place = f"{where}: {file.name}"
    if file.suffix not in TEXT_SUFFIXES:
        raise TextError(
            "the kind of text file is not known", where=place, found=file.suffix or "no suffix",
            expected=", ".join(TEXT_SUFFIXES), remedy="rename or convert it",
        )  # fmt: skip
    if file.suffix == ".parquet":
        yield from _read_parquet(file, where=place)
        return
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            "the text is not UTF-8 (binary file?)", where=place, found=f"byte {error.start}: {error.reason}",
            remedy="save it as UTF-8",
        ) from None  # fmt: skip
    except OSError as error:
        raise TextError("the text cannot be read", where=place, found=error.strerror, remedy="make it readable") from None
    if "\x00" in text:
        raise TextError("the text holds NUL characters (binary file?)", where=place, remedy="give plain text")
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028 inside a record
            if line.strip():
                yield _record_text(line, where=f"{place}:{number}")
    else:
        yield from _passages(text)


def _record_text(line: str, *, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise TextError(
            "not a JSON record with a string in 'text'", where=where, found=line[:60], expected='{"text": "..."}',
            remedy="correct or remove the line",
        )  # fmt: skip
    return text.encode("utf-8", "replace").decode()  # an escaped half of a surrogate pair is no character


def _passages(text: str) -> Iterator[str]:
    """Paragraphs (separated by blank lines) joined in order until a passage is about _PASSAGE characters."""
    passage = ""
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        passage += paragraph + "\n\n"
        if len(passage) >= _PASSAGE:
            yield passage
            passage = ""
    yield passage


def _read_parquet(file: Path, *, where: str) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise TextError("reading .parquet needs pyarrow", where=where, remedy="pip install 'modekit[data]'") from None
    try:
        column = parquet.read_table(file, columns=["text"]).column("text")
    except Exception as error:  # pyarrow's errors share no base class
        raise TextError(
            "the parquet file has no readable column 'text'", where=where, found=str(error).splitlines()[0],
            remedy="save the documents as strings in a column named 'text'",
        ) from None  # fmt: skip
    for value in column.to_pylist():
        if isinstance(value, str):
            yield value


def _read_hub(spec: str, *, where: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise TextError(
            "no such file or folder, and hub data sets cannot be read without the library", where=where, found=spec,
            remedy="correct the path, or pip install 'modekit[data]' for hub data sets",
        ) from None  # fmt: skip
    try:
        for record in islice(load_dataset(spec, split="train", streaming=True), _HUB_DOCUMENTS):
            if isinstance(record.get("text"), str):
                yield record["text"]
    except Exception as error:  # network, missing data set, missing split: the library raises many kinds
        raise TextError(
            "no such file or folder, and no hub data set that can be reached", where=where,
            found=f"{spec}: {type(error).__name__}",
            remedy="correct the path, or connect to the hub",
        ) from None  # fmt: skip


@dataclass(frozen=True)
class TokenSequence:
    """A piece of one document: token ids, and the bytes of text that its second to last token cover."""

    ids: tuple[int, ...]
    scored_bytes: int


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids (B, S) int64 and the mask of real tokens (B, S) bool; `rows` are places in the input."""

    input_ids: torch.Tensor
    mask: torch.Tensor
    rows: tuple[int, ...]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    *,
    max_tokens: int,
    sequence_length: int,
    shortest_rest: int = 2,
) -> list[TokenSequence]:
    """Documents cut into sequences of at most `sequence_length` tokens, until there are `max_tokens`.

    A document is never joined to another. Pieces of a single token are dropped (nothing in them can be predicted), and
    so is what is left of a document when it is shorter than `shortest_rest`.
    """
    sequences: list[TokenSequence] = []
    total = 0
    for document in documents:
        encoded = tokenizer(document, return_offsets_mapping=tokenizer.is_fast, verbose=False)
        ids: list[int] = encoded["input_ids"]
        offsets: list[tuple[int, int]] | None = encoded.get("offset_mapping")
        for start in range(0, len(ids), sequence_length):
            stop = min(start + sequence_length, len(ids), start + max_tokens - total)
            if stop - start < (shortest_rest if start else 2):
                continue
            if offsets is None:
                scored = len(tokenizer.decode(ids[start + 1 : stop]).encode())
            else:
                end = max(offset[1] for offset in offsets[start + 1 : stop])  # special tokens have (0, 0)
                scored = len(document[offsets[start + 1][0] : end].encode())
            sequences.append(TokenSequence(tuple(ids[start:stop]), scored))
            total += stop - start
        if total >= max_tokens - 1:
            break
    return sequences


def make_batches(sequences: Sequence[TokenSequence], *, tokens: int = 8_192, pad_id: int = 0) -> Iterator[Batch]:
    """Batches of about `tokens` padded tokens; sequences of similar length share one, so that little is padding."""
    import torch

    order = sorted(range(len(sequences)), key=lambda row: (-len(sequences[row].ids), row))
    while order:
        longest = len(sequences[order[0]].ids)
        rows, order = order[: max(1, tokens // longest)], order[max(1, tokens // longest) :]
        input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), longest), dtype=torch.bool)
        for place, row in enumerate(rows):
            ids = sequences[row].ids
            input_ids[place, : len(ids)] = torch.tensor(ids)
            mask[place, : len(ids)] = True
        yield Batch(input_ids, mask, tuple(rows))


def text_record(documents: Sequence[str], tokens: int) -> dict[str, Any]:
    """What a result remembers of a text: how much, and a digest of the documents it used."""
    together = hashlib.sha256("".join(digest_of(document) for document in documents).encode()).hexdigest()
    return {"documents": len(documents), "tokens": tokens, "sha256": together}
