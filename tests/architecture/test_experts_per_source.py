"""Experts that are named one per source: as many as there are sources, each of which may have several beams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modekit.loaded.load import load_model
from pair_models import built, inputs, logits_of, write_models, written

pytestmark = pytest.mark.filterwarnings("ignore")
MIXTURES: dict[str, dict[str, Any]] = {
    "whole models": {"modules": "all", "router": {"fit": "random", "granularity": "sequence", "per": "model"}},
    "FFNs": {"top_k": 2},
}


@pytest.fixture(scope="module", params=["t5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two full models."""
    return write_models(tmp_path_factory.mktemp("sources"), str(request.param))


@pytest.mark.parametrize("mixed", list(MIXTURES))
def test_fewer_experts_than_sources_are_refused(folder: Path, mixed: str) -> None:
    """Two for four sources might be meant for two beams of two sources, which an encoder never sees."""
    model, four = load_model(built(folder, MIXTURES[mixed], "one", "two")), inputs("right", (9, 6, 3, 5))
    model.use_expert(["one", "two"])
    for how in ({}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}):
        with pytest.raises(ValueError, match="use_expert was given 2 experts, for 4 sequences"):
            written(model, four, **how)
    with pytest.raises(ValueError, match="use_expert was given 2 experts, for 4 sequences"):
        logits_of(model, four)
    found = logits_of(model, inputs("right", (9, 6)))  # what was refused left nothing behind
    for row, name in enumerate(("one", "two")):
        model.use_expert(name)
        alone = logits_of(model, inputs("right", (9, 6)))[row]
        torch.testing.assert_close(found[row], alone, atol=1e-5 * float(alone.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("mixed", list(MIXTURES))
def test_beams_of_a_source_share_its_expert(folder: Path, mixed: str) -> None:
    model, said = load_model(built(folder, MIXTURES[mixed], "one", "two")), inputs("right", (9, 6))
    for how in ({}, {"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 2}):
        alone = []
        for name in ("one", "two"):
            model.use_expert(name)
            alone.append(written(model, said, **how))
        model.use_expert(["one", "two"])
        found, rows = written(model, said, **how), how.get("num_return_sequences", 1)
        assert torch.equal(found, torch.cat([alone[0][:rows], alone[1][rows:]])), how
