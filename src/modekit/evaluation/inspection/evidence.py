"""What a router that reads tokens knows of single ones: its table, which needs no text to be read.

Shape legend: E experts, J averages, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.evidence import read_table
from modekit.evaluation.inspection.result import TokenWeight

_SHOWN = 12


def evidence_of(checkpoint: Checkpoint) -> npt.NDArray[np.float32] | None:
    """What each token adds to the logits of each expert, (V, E), averages together; None where the router has no such table."""
    experts, mixture = len(checkpoint.names), checkpoint.record.recipe.mixture
    if checkpoint.shape.channels is not None:
        table_VN = read_table(*checkpoint.carrier)
        return np.asarray(table_VN.reshape(len(table_VN), -1, experts).sum(1))
    if mixture.fit is None or not mixture.fit.by_token or mixture.router.hashes:
        return None
    (gate_GN,) = checkpoint.gates()
    gate_EN = gate_GN[:experts, : gate_GN.shape[1] - mixture.fit.score.besides]
    return np.asarray(gate_EN.reshape(experts, -1, checkpoint.vocabulary).sum(1).T)


def strongest(
    table_VE: npt.NDArray[np.float32], often_V: npt.NDArray[np.int64], tokenizer: PreTrainedTokenizerBase, names: Sequence[str]
) -> dict[str, list[TokenWeight]]:
    """Per expert the tokens, of those that text has often, that speak most for it: above the mean of the other experts."""
    found = {}
    for place, name in enumerate(names):
        others = np.delete(table_VE[often_V], place, axis=1)
        lead_V = table_VE[often_V, place] - (others.mean(1) if others.shape[1] else 0)
        best = np.lexsort((often_V, -lead_V.round(6)))[:_SHOWN]
        found[name] = [
            TokenWeight(token=str(tokenizer.decode([int(often_V[at])])), weight=float(lead_V[at]))
            for at in best
            if lead_V[at] > 0
        ]
    return found
