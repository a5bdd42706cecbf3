"""Mixtures of models with an encoder, over pairs: what routers read, fits, evaluation and inspection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import DOMAINS, Workshop
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import TextError, UnsupportedError
from modekit.evaluation.domains import held_out_domains
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.inspection.inspect import inspect, inspect_text
from modekit.evaluation.inspection.passes import Decided, token_losses, traced_losses
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.passes import losses_of, reads_target
from modekit.loaded.shapes import expert_view, mixture_of
from modekit.planning.mixture_config import averages_of, prefix_of
from modekit.routing.inputs import GateInput, run_with_inputs
from modekit.text.sequences import TokenSequence, encode, make_batches
from pair_models import make_pair_workshop, pair_tokenizer, pairs
from refusal import borrow

PARTS = ["cross_q", "cross_k", "cross_v", "o", "up"]
RANDOM = {"fit": "random", "seed": 1}
MIXTURES: dict[str, dict[str, Any]] = {
    "token": {"method": "routing", "top_k": 2, "router": RANDOM},
    "context": {"method": "gating", "router": {**RANDOM, "granularity": "context"}},
    "source": {"method": "gating", "router": {**RANDOM, "granularity": "sequence", "per": "model"}},
    "projection": {"method": "gating", "modules": PARTS, "router": {**RANDOM, "per": "projection"}},
}
SMALL: dict[str, Any] = {"tokens_per_domain": 300, "sequence_length": 64}


@pytest.fixture(scope="module", params=["t5"])
def pair_workshop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_pair_workshop(tmp_path_factory.mktemp("pairs"), request.param)


@pytest.fixture(scope="module")
def sequences() -> list[TokenSequence]:
    return encode(pair_tokenizer(), pairs(12), max_tokens=10_000, sequence_length=64)


def built(shared: Workshop, root: Path, mixture: dict[str, Any]) -> Checkpoint:
    return open_checkpoint(borrow(shared, root).build(mixture=mixture))


@pytest.mark.parametrize("name", MIXTURES)
def test_what_is_captured_times_a_gate_is_what_the_router_says(
    pair_workshop: Workshop, tmp_path: Path, sequences: list[TokenSequence], name: str
) -> None:
    """Of the free mixture, so that both read the same."""
    checkpoint = built(pair_workshop, tmp_path, MIXTURES[name])
    view, router = expert_view(checkpoint), checkpoint.record.recipe.mixture.router
    mixture = mixture_of(view.model, checkpoint)
    gates, sides = mixture.gates(), view.in_decoder()
    assert sides == [reads_target(slot.name) for slot in checkpoint.slots]
    assert {True, False} == set(sides) or name == "source"
    taken: dict[int, dict[int, torch.Tensor]] = {}

    def consume(slot: int, x_TD: torch.Tensor, places_T: torch.Tensor) -> None:
        taken.setdefault(slot, {}).update(zip(places_T.tolist(), x_TD @ gates[slot].T, strict=True))

    run_with_inputs(view, sequences, GateInput(averages_of(router), prefix_of(router)), consume)
    starts = [0, 0]
    for sequence in sequences:
        with torch.inference_mode(), mixture.traced() as trace:
            losses_of(view.model, next(make_batches([sequence])))
        lengths = len(sequence.ids), len(sequence.target)
        for slot, logits in enumerate(trace):
            side = sides[slot]
            assert logits.shape[1] in (1, lengths[side])
            found = torch.stack([taken[slot][starts[side] + place] for place in range(lengths[side])])
            torch.testing.assert_close(found, logits[0].expand(lengths[side], -1), atol=1e-4, rtol=1e-4)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    assert all(len(found) == starts[sides[slot]] for slot, found in taken.items())


@pytest.mark.parametrize(
    "mixture",
    [
        {"method": "routing", "router": {"fit": "logistic"}},
        {"method": "gating", "router": {"fit": "logistic", "granularity": "sequence", "per": "model"}},
        {"method": "routing", "router": {"fit": "lexical", "orders": [1, 2], "buckets": 512}},
        {"method": "routing", "modules": PARTS, "router": {"fit": "centroid", "per": "projection"}},
    ],
    ids=["logistic", "per model", "bigrams", "projection"],
)
def test_it_is_fitted_scored_and_inspected(pair_workshop: Workshop, tmp_path: Path, mixture: dict[str, Any]) -> None:
    checkpoint = built(pair_workshop, tmp_path, mixture)
    results = evaluate(checkpoint, **SMALL)
    rows = {row.name: row for row in results.rows}
    domains = held_out_domains(checkpoint, **SMALL)
    model = load_model(checkpoint.folder)
    for domain in domains:
        losses = token_losses(model, domain.sequences, lambda _: None)
        mean = sum(map(np.sum, losses)) / domain.scored_tokens
        assert rows["mixture"].scores[domain.name].loss == pytest.approx(mean, rel=1e-4)
    data = inspect(checkpoint, **SMALL).as_data()
    positions = checkpoint.shape.positions
    for domain in domains:
        entry = data["per_domain"][domain.name]
        assert entry["loss"] == pytest.approx(rows["mixture"].scores[domain.name].loss, rel=1e-4)
        assert np.shape(entry["shares"]) == (len(positions), len(DOMAINS))
        np.testing.assert_allclose(np.sum(entry["shares"], axis=1), 1, atol=1e-4)
        assert all(0 <= value <= 1 for value in entry["agreement"])
    assert len(data["texts"]) == sum(min(3, len(domain.sequences)) for domain in domains)
    for text in data["texts"]:
        source = [token["loss"] is None for token in text["tokens"]].index(False)
        for position, weights in zip(positions, text["weights"], strict=True):
            own = slice(source, None) if reads_target(position.name) else slice(source)
            np.testing.assert_allclose(np.sum(weights, axis=1)[own], 1, atol=1e-4)
            assert np.sum(weights) == pytest.approx(len(text["tokens"][own]), rel=1e-4)  # and nothing on the other side
    with pytest.raises(UnsupportedError, match="this is one text"):
        inspect_text(checkpoint, "fever")


def test_decisions_are_of_each_pair_alone(pair_workshop: Workshop, tmp_path: Path, sequences: list[TokenSequence]) -> None:
    checkpoint = built(pair_workshop, tmp_path, MIXTURES["context"])
    model = load_model(checkpoint.folder)

    def decided(chosen: list[TokenSequence]) -> list[Decided]:
        found: dict[int, Decided] = {}
        traced_losses(model, checkpoint, chosen, found.__setitem__, lambda _: None)
        return [found[key] for key in sorted(found)]

    together = decided(sequences)
    alone = [each for sequence in sequences for each in decided([sequence])]
    for sequence, first, second in zip(sequences, together, alone, strict=True):
        assert np.array_equal(first.reads_RS, second.reads_RS) and first.reads_RS.any(0).all()
        np.testing.assert_allclose(first.weights_RSE, second.weights_RSE, atol=1e-5)
        of_source = first.weights_RSE[first.reads_RS[:, 0], : len(sequence.ids), 0]
        assert all(len({*row.round(4)}) == 1 for row in of_source)


def test_plain_text_is_refused(pair_workshop: Workshop, tmp_path: Path) -> None:
    workshop = borrow(pair_workshop, tmp_path)
    for name in DOMAINS:
        (workshop.root / f"{name}.txt").write_text("\n\n".join(f"{name} {number} " * 300 for number in range(60)))
        next(expert for expert in workshop.recipe["experts"] if expert["name"] == name)["text"] = f"./{name}.txt"
    with pytest.raises(TextError, match="needs pairs"):
        workshop.build(mixture={"method": "routing", "router": {"fit": "logistic"}})
    checkpoint = open_checkpoint(workshop.build(mixture=MIXTURES["token"]))
    with pytest.raises(TextError, match="needs pairs"):
        evaluate(checkpoint, **SMALL)
    assert load_tokenizer(checkpoint.folder) is not None
