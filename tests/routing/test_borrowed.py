"""Rare words borrow evidence from words with similar embeddings, as far as embeddings tell anything."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from modekit.routing.lexical import with_borrowed
from modekit.sources.contents import read_header
from modekit.sources.header import TensorRef

TOKENS, HIDDEN, EXPERTS = 400, 8, 3


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def embedding_at(folder: Path, rows_VD: torch.Tensor) -> TensorRef:
    save_file({"model.embed_tokens.weight": rows_VD.contiguous()}, folder / "model.safetensors")
    return read_header(folder / "model.safetensors", where="test")["model.embed_tokens.weight"]


def test_words_that_no_text_has_take_the_evidence_of_words_alike(tmp_path: Path) -> None:
    rows_VD = random(TOKENS, HIDDEN, seed=0)
    whole_VN = rows_VD @ random(HIDDEN, EXPERTS, seed=1)
    counts_V = torch.where(torch.arange(TOKENS) % 5 == 0, 0.0, 100_000.0)
    table_VN = torch.where(counts_V[:, None] > 0, whole_VN, 0.0)
    found = with_borrowed(table_VN, counts_V, embedding_at(tmp_path, rows_VD), HIDDEN)
    torch.testing.assert_close(found, whole_VN, atol=0.02, rtol=0.0)  # the ridge is a thousandth
    torch.testing.assert_close(found[counts_V > 0], table_VN[counts_V > 0], atol=1e-3, rtol=0.0)


def test_what_is_said_often_counts_more_than_what_is_borrowed(tmp_path: Path) -> None:
    rows_VD = random(TOKENS, HIDDEN, seed=0)
    table_VN = rows_VD @ random(HIDDEN, EXPERTS, seed=1)
    table_VN[:2] = 30.0  # in the text these two speak for all, and their embeddings do not
    counts_V = torch.full((TOKENS,), 1_000.0)
    counts_V[0] = 2.0
    rare, often = with_borrowed(table_VN, counts_V, embedding_at(tmp_path, rows_VD), HIDDEN)[:2]
    assert (rare < 10.0).all() and (often > 28.0).all()


def test_embeddings_that_tell_nothing_lend_nothing(tmp_path: Path) -> None:
    table_VN, counts_V = random(TOKENS, EXPERTS, seed=1), 1.0 + torch.arange(TOKENS)
    for rows_VD in (random(TOKENS, HIDDEN, seed=0), torch.zeros(TOKENS, HIDDEN)):
        found = with_borrowed(table_VN, counts_V, embedding_at(tmp_path, rows_VD), HIDDEN)
        torch.testing.assert_close(found, table_VN, atol=0.1, rtol=0.0)
