"""What a router that reads tokens says of a whole text: its logits after the last token, and no others.

Inside a mixture a router answers at every token (architecture/modekit_router.py). Here only the last answer is wanted, which is
one weighted sum over rows of a table. numpy takes a tenth of the time that torch's operations need to be called.

Shape legend: S tokens of the text, E experts, V rows of a table, J averages, G columns of the gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RoutingData = Mapping[str, Any]
"""The config's `modekit.routing` (planning/mixture_config.py) as plain data."""
_PRIME = 2**31 - 1


@dataclass(frozen=True)
class _Evidence:
    """One of the J things that are averaged.

    Attributes:
        rows_VE: what each row says for every expert, float32; one row after another in memory.
        order: tokens of an n-gram that chooses a row; None: a token chooses its own.
        decay: of what was seen before; None: the last token alone counts.
    """

    rows_VE: np.ndarray
    order: int | None
    decay: float | None

    def logits(self, ids_S: np.ndarray, prefix: int | None) -> np.ndarray:
        """(E,), float32."""
        said_E: np.ndarray = self.by_token(ids_S, prefix).sum(0)
        return said_E

    def by_token(self, ids_S: np.ndarray, prefix: int | None) -> np.ndarray:
        """What each token that counts adds to the logits, (N, E), float32."""
        rows_S = ids_S if self.order is None else rows_of_ngrams(ids_S, self.order, len(self.rows_VE))
        rows_S = rows_S if self.decay is None else rows_S[:prefix]
        weights_S = np.power(self.decay or 0.0, np.arange(len(rows_S) - 1, -1, -1), dtype=np.float32)  # 0**0 is 1
        added_SE: np.ndarray = (weights_S / weights_S.sum())[:, None] * self.rows_VE[rows_S]
        return added_SE


@dataclass(frozen=True)
class _Classifier:
    """A classifier of the first terms (architecture/modekit_terms.py): its table."""

    gate_VG: np.ndarray

    def logits(self, ids_S: np.ndarray, prefix: int | None) -> np.ndarray:
        """(E,), float32."""
        logits_E: np.ndarray = self.by_token(ids_S, prefix).sum(0) + self.gate_VG[-1, :-1]
        return logits_E

    def by_token(self, ids_S: np.ndarray, prefix: int | None) -> np.ndarray:
        """What each token that counts adds to the logits, (N, E), float32; what all texts have in common is not in it."""
        terms_T, counts_T = np.unique(ids_S[:prefix], return_counts=True)
        length = float(np.linalg.norm(counts_T * self.gate_VG[terms_T, -1]))
        added_SE: np.ndarray = self.gate_VG[ids_S[:prefix], :-1] / np.float32(length or 1.0)
        return added_SE


class LastToken:
    """A router with its gate."""

    def __init__(self, routing: RoutingData, gate_EG: np.ndarray) -> None:
        """`routing` is the config's `modekit.routing` (see `Router`) of a router that reads tokens."""
        averages = routing["averages"]
        orders: Sequence[int | None] = routing.get("orders") or [None] * len(averages)
        self._prefix = routing.get("prefix")
        self._tables: list[_Evidence] | list[_Classifier]
        if routing.get("score") == "tfidf":
            self._tables = [_Classifier(np.ascontiguousarray(gate_EG.T, dtype=np.float32))]
            return
        self._tables = [
            _Evidence(np.ascontiguousarray(part_EV.T, dtype=np.float32), order, average["decay"])
            for part_EV, order, average in zip(np.split(gate_EG, len(averages), axis=1), orders, averages, strict=True)
        ]

    @property
    def reads_first(self) -> bool:
        """Whether the first tokens of a text decide, and no others."""
        return self._prefix is not None

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """After the last of some tokens (E,), float32."""
        ids_S = np.asarray(ids, dtype=np.int64)
        total_E: np.ndarray = np.sum([table.logits(ids_S, self._prefix) for table in self._tables], axis=0)
        return total_E

    def by_token(self, ids: Sequence[int]) -> np.ndarray:
        """What each of some tokens adds to the logits after the last one, (S, E), float32; a token that is not read adds 0."""
        ids_S = np.asarray(ids, dtype=np.int64)
        added = [table.by_token(ids_S, self._prefix) for table in self._tables]
        padded = [np.pad(each, ((0, len(ids_S) - len(each)), (0, 0))) for each in added]
        total_SE: np.ndarray = np.stack(padded).sum(axis=0, dtype=np.float32)
        return total_SE


def rows_of_ngrams(ids_S: np.ndarray, order: int, buckets: int) -> np.ndarray:
    """Row of a table for the n-gram that ends in each token (S,), int64: what `ngram_rows` says of a text without pads.

    That is one of the files which are copied into checkpoints as they are, and works on batches; this is the same in numpy.
    """
    tokens = np.concatenate([np.zeros(order - 1, dtype=np.int64), ids_S + 1])
    hashed_S = np.zeros_like(ids_S)
    for start in range(order - 1, -1, -1):  # the newest token first
        hashed_S = (hashed_S * 1_000_003 + tokens[start : start + len(ids_S)] * 7_919 + 13) % _PRIME
    rows_S: np.ndarray = hashed_S % buckets
    return rows_S
