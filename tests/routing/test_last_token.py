"""The last answer alone is the last of the answers that the router of a mixture gives to every token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from modekit.architecture.modekit_flow import Flow
from modekit.architecture.modekit_router import Router
from modekit.routing.text_router import LastToken

EXPERTS, VOCAB, BUCKETS = 3, 40, 64
NGRAM = {"score": "lexical", "ngram": {"order": 3, "buckets": BUCKETS}}
ROUTINGS: dict[str, dict[str, Any]] = {
    "the token itself": {"score": "lexical", "averages": [{"decay": 0.0}]},
    "mean": {"score": "lexical", "averages": [{"decay": 1.0}]},
    "fading": {"score": "lexical", "averages": [{"decay": 0.9}, {"decay": 0.5}]},
    "orders": {**NGRAM, "averages": [{"decay": 1.0}, {"decay": 0.9}], "orders": [1, 3]},
}


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("length", [1, 300])
@torch.no_grad()
def test_it_is_the_last_of_all_answers(name: str, length: int) -> None:
    routing = {"method": "gating", **ROUTINGS[name]}
    columns = BUCKETS if "ngram" in routing else VOCAB
    flow, parts = Flow(), len(routing["averages"])
    drawn = np.random.default_rng(length)
    gate_EG = drawn.normal(size=(EXPERTS, parts * columns)).astype(np.float32)
    ids = drawn.integers(0, VOCAB, length).tolist()
    whole = Router("text", {"width": columns, "rows": [1] * EXPERTS}, flow, EXPERTS, routing).eval()
    whole.gate = torch.nn.Parameter(torch.from_numpy(gate_EG))
    flow.ids_BS = torch.tensor([ids])
    expected_SE = whole.logits(torch.zeros(1, length, 1))[0].numpy()
    decays = [average["decay"] for average in routing["averages"]]
    found_E = LastToken(np.split(gate_EG.T, parts), decays, routing.get("orders", ())).by_token(ids).sum(0)
    assert found_E.dtype == np.float32 and found_E.shape == (EXPERTS,)
    np.testing.assert_allclose(found_E, expected_SE[-1], rtol=1e-4, atol=1e-5)
    assert length < 2 or not np.allclose(found_E, expected_SE[0], atol=1e-3)
