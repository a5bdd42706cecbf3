"""Words that the text of a fit has rarely, or not at all: they take the evidence of words whose embeddings are alike.

Ridge regression over the tokens that the text has goes from their rows of the base's embedding to their rows of the table;
what it says of a token counts as much as some occurrences of that token. How many, and how strong the ridge is, say tokens
that are kept aside: embeddings that tell nothing lend nothing.

Shape legend: V vocabulary, B rows of a block, D the base's hidden size, N columns of the table.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.evidence import rows_of
from modekit.sources.contents import OpenFiles
from modekit.sources.model import DTYPE_NAMES, TensorRef
from modekit.sources.names import embedding_in, weight_of
from modekit.weights.numeric import as_array, to_float32

_PRIOR = 25.0  # occurrences of a token that what it borrows counts as much as, were it all that there is to know
_RIDGES = [10.0**power for power in range(-3, 4, 2)]  # of the mean square of an embedding's column
_ASIDE = 8  # one token of so many chooses the ridge
_LEAST = 1e-30  # where all rows are zeros


def shared_embedding(checkpoint: Checkpoint) -> TensorRef | None:
    """The embedding, in full precision, that all experts have; None where there is no such one."""
    found = checkpoint.tensors.get(weight_of(embedding_in(checkpoint.tensors)))
    return found if found is not None and found.shape[:1] == (checkpoint.vocabulary,) and found.dtype in DTYPE_NAMES else None


def with_borrowed(table_VN: torch.Tensor, counts_V: torch.Tensor, embedding: TensorRef, hidden: int) -> torch.Tensor:
    """The table with what its rarer tokens borrow. `counts_V`: occurrences of each; `hidden`: D, of the embedding's columns."""
    weights_V = counts_V / (counts_V + _PRIOR)
    own, held = torch.zeros(2, *[hidden + table_VN.shape[1]] * 2, dtype=torch.float64)  # X, Y transposed times X, Y
    with OpenFiles() as opened:
        for start, x_BD in _blocks(opened, embedding, hidden):
            seen = start + counts_V[start : start + len(x_BD)].nonzero()[:, 0]
            aside = seen % _ASIDE == 0
            for rows, product in ((seen[~aside], own), (seen[aside], held)):
                both = torch.cat([x_BD[rows - start], table_VN[rows]], dim=1)
                product += ((both * weights_V[rows, None]).t() @ both).double()
        explained, ridge = max((_explained(_solved(own, hidden, each), held), each) for each in _RIDGES)
        prior, into_DN = _PRIOR * max(0.0, explained), _solved(own + held, hidden, ridge).float()
        said = [x_BD @ into_DN for _, x_BD in _blocks(opened, embedding, hidden)]
    return torch.lerp(table_VN, torch.cat(said), prior / (counts_V + prior).clamp_min(_LEAST)[:, None])


def _solved(product: torch.Tensor, hidden: int, ridge: float) -> torch.Tensor:
    """What takes X to Y, (D, N)."""
    gram_DD = product[:hidden, :hidden].clone()
    gram_DD.diagonal().add_((ridge * gram_DD.diagonal().mean()).clamp_min(_LEAST))
    return torch.linalg.solve(gram_DD, product[:hidden, hidden:])  # type: ignore[no-any-return]


def _explained(into_DN: torch.Tensor, held: torch.Tensor) -> float:
    """Share of the squares of tokens that are kept aside."""
    hidden = len(into_DN)
    less = (into_DN * (2 * held[:hidden, hidden:] - held[:hidden, :hidden] @ into_DN)).sum()
    return float(less / held.diagonal()[hidden:].sum().clamp_min(_LEAST))


def _blocks(opened: OpenFiles, embedding: TensorRef, hidden: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Some rows (B, D), and the number of the first."""
    for start, rows in rows_of(opened, embedding):
        yield start, torch.from_numpy(to_float32(as_array(rows, embedding.dtype)).reshape(-1, embedding.shape[1])[:, :hidden])
