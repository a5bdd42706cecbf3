"""Gates of the survey (arXiv 2407.06204): cosine, groups, thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from architecture.test_architecture import greedy, in_pieces
from conftest import Workshop, make_workshop
from modekit.architecture.modekit_router import cosine, select
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import RecipeError, UnsupportedError
from modekit.loaded.load import load_model
from modekit.members.change import write_change
from modekit.members.edits import remove_expert
from modekit.recipes.mixture import Router
from modekit.routing.inputs import DomainStatistics, SlotStatistics
from modekit.routing.linear import fit_gates

pytestmark = pytest.mark.filterwarnings("ignore")
LITTLE: dict[str, Any] = {"tokens_per_domain": 512, "sequence_length": 96, "keep_tokens": 256}
GATES: dict[str, dict[str, Any]] = {
    "cosine": {"method": "routing", "top_k": 2, "router": {"fit": "cosine", **LITTLE}},
    "cosine in context": {"method": "gating", "router": {"fit": "cosine", "granularity": "context", **LITTLE}},
    "groups": {"method": "routing", "groups": 2, "router": {"fit": "logistic", **LITTLE}},
    "threshold": {"method": "routing", "threshold": 0.3, "router": {"fit": "logistic", **LITTLE}},
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=2)


def built(shop: Workshop, gate: str) -> Path:
    """A mixture, which is built once."""
    out = shop.root / gate.replace(" ", "_")
    if not out.exists():
        shop.build(out.name, mixture=GATES[gate], output={"format": "modekit"})
    return out


def opened(shop: Workshop, gate: str) -> PreTrainedModel:
    return load_model(built(shop, gate), dtype=torch.float32).eval()


EVERY = pytest.mark.parametrize("gate", GATES)


def logits(model: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, **kwargs).logits


def weights(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Router -> weights (B, S, E) in a pass."""
    logits(model, ids)
    return {name: each.weights for name, each in model.base_model.flow.mixed.items() if each.router is not None}


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)


@EVERY
def test_weights_sum_to_one_and_as_many_experts_take_part_as_is_said(shop: Workshop, gate: str, ids: torch.Tensor) -> None:
    found, active = weights(opened(shop, gate), ids), set()
    for weights_BSE in found.values():
        close(weights_BSE.sum(-1), torch.ones(weights_BSE.shape[:-1]))
        active |= set((weights_BSE > 0).sum(-1).flatten().tolist())
    said = GATES[gate]
    if said["method"] == "gating":
        assert active == {3}
    elif "threshold" in said:
        assert len(active) > 1 and active <= {1, 2, 3}
    else:
        assert active == {2}
    spread = max(float(each.flatten(0, 1).std(0).max()) for each in found.values())
    assert spread > 0.005, "no decision differs from any other"


@EVERY
def test_cache_and_left_padding_are_the_whole_pass(shop: Workshop, gate: str, ids: torch.Tensor) -> None:
    model = opened(shop, gate)
    whole = logits(model, ids)
    close(in_pieces(model, ids, [7, 1, 2, 1]), whole)
    padded = torch.cat([torch.zeros_like(ids[:, :6]), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 6).long().expand_as(padded)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    close(logits(model, padded, attention_mask=mask, position_ids=positions)[:, 6:], whole)
    text = greedy(model, ids)
    assert torch.equal(text, greedy(model, ids, use_cache=False))
    assert torch.equal(text, greedy(model, padded, attention_mask=mask)[:, 6:])


# --- scores


def test_cosine_is_the_papers_formula() -> None:
    draw = torch.Generator().manual_seed(1)
    x, vectors, projection = (torch.randn(shape, generator=draw) for shape in ((5, 8), (3, 2), (2, 8)))
    gate = torch.cat([nn.functional.pad(vectors, (0, 6)), projection])
    expected = torch.stack([nn.functional.cosine_similarity(x @ projection.T, each[None]) for each in vectors], -1)
    close(cosine(x @ gate.T, gate, 3), expected * vectors.norm(dim=1).mean())


def test_a_cosine_gate_fits_what_a_linear_one_cannot() -> None:
    """Of x of very different lengths, which say nothing."""
    draw = torch.Generator().manual_seed(3)
    centres = torch.randn((3, 8), generator=draw).double()

    def domain(place: int) -> DomainStatistics:
        noise, lengths = (torch.randn((300, width), generator=draw).double() for width in (8, 1))
        x = (centres[place] + noise) * (2 * lengths).exp()
        return DomainStatistics(300, (SlotStatistics(x.sum(0), torch.zeros(8).double(), x.half(), 300),), {})

    domains = [domain(place) for place in range(3)]
    found = {}
    for fit in ("logistic", "cosine"):
        (gate,) = fit_gates(Router(fit=fit), domains)
        products = [each.slots[0].sample_ND.float() @ gate.T for each in domains]
        scores = [cosine(each, gate, 3) if fit == "cosine" else each for each in products]
        found[fit] = -sum(float(each.log_softmax(-1)[:, place].mean()) for place, each in enumerate(scores)) / 3
    assert found["cosine"] < found["logistic"] - 0.02, found


# --- choice


def test_the_best_of_each_group_is_chosen() -> None:
    logits_E = torch.tensor([1.0, 4.0, 3.0, 2.0, 0.0])  # groups of 3 and 2
    found = select(logits_E, {"method": "routing", "groups": 2, "top_k": 2})
    close(
        found,
        torch.tensor([0.0, 4.0, float("-inf"), 2.0, 0.0]).where(torch.tensor([0, 1, 0, 1, 0]) > 0, -torch.inf).softmax(-1),
    )
    found = select(logits_E, {"method": "routing", "groups": 2, "top_k": 2}, left_out=1)
    assert (found > 0).tolist() == [False, False, True, True, False]
    always = {"method": "routing", "groups": 2, "top_k": 2, "always_on": {"expert": 0, "weight": None}}
    assert (select(logits_E, always) > 0).tolist() == [True, False, False, True, False]


def test_whoever_reaches_its_threshold_is_chosen_or_the_best_where_none_does() -> None:
    logits_TE = torch.tensor([[0.5, 0.3, 0.2], [0.34, 0.33, 0.33], [0.9, 0.05, 0.05], [0.25, 0.7, 0.05]]).log()
    found = select(logits_TE, {"method": "routing", "threshold": [0.4, 0.25, 0.1]})
    assert (found > 0).tolist() == [[True, True, True], [False, True, True], [True, False, False], [False, True, False]]
    none = select(logits_TE, {"method": "routing", "threshold": [0.95] * 3})
    assert torch.equal(none, nn.functional.one_hot(logits_TE.argmax(-1), 3).float())
    close(found[0], torch.tensor([0.5, 0.3, 0.2]))


# --- recipes and refusals


def refused(shop: Workshop, output: dict[str, Any] | None = None, **mixture: Any) -> str:
    with pytest.raises((RecipeError, UnsupportedError)) as caught:
        shop.plan(mixture=mixture, output=output or {})
    return str(caught.value)


LOGISTIC = {"fit": "logistic"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"top_k": 2, "groups": 2}, "give one of top_k, top_p, groups, threshold"),
    ({"method": "gating", "threshold": 0.2}, "'threshold' has no effect with method 'gating'"),
    ({"threshold": {"law": 0.2}}, "must name every expert"),
    ({"router": {"fit": "lexical", "granularity": "sequence"}}, "reads token ids by itself"),
    ({"router": {"fit": "random", "l2": 2.0}}, "'l2' has no effect with fit: random"),
    ({"router": {"fit": "cosine", "per": "feature"}}, "one decision per module"),
]


@pytest.mark.parametrize(("mixture", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_what_makes_no_sense_together_is_refused(shop: Workshop, mixture: dict[str, Any], says: str) -> None:
    assert says in refused(shop, **{"router": LOGISTIC, **mixture})


def test_experts_come_and_go(shop: Workshop, ids: torch.Tensor) -> None:
    """Rows that are no expert's follow; thresholds by name lose one that goes."""
    threshold = {"medicine": 0.3, "law": 0.4, "code": 0.2}
    mixture = {"method": "routing", "threshold": threshold, "router": GATES["cosine"]["router"]}
    out = shop.build("members", mixture=mixture, output={"format": "modekit"})
    checkpoint = open_checkpoint(out)
    checkpoint = write_change(checkpoint, remove_expert(checkpoint, "law"), shop.root / "fewer")
    assert checkpoint.record.recipe.mixture.threshold == {"medicine": 0.3, "code": 0.2}
    assert is_proven(verify(checkpoint, reload=False))
    found = weights(load_model(checkpoint.folder, dtype=torch.float32), ids)
    assert all(each.shape[-1] == 2 for each in found.values())
