"""A new fit is a row in FITS and a function: here is one, and nothing else knows of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modekit
from conftest import Workshop
from modekit.building.build import build
from modekit.building.preview import memory_of
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import RecipeError
from modekit.loaded.load import load_model
from modekit.planning.room import statistics_bytes
from modekit.recipes.fits import FITS, Fit
from modekit.recipes.read import parse_recipe
from modekit.recipes.schema import schema_text
from modekit.routing.fit import SETTERS, FittedRouter, Fitting
from modekit.routing.linear import RULES


def favour(fitting: Fitting) -> FittedRouter:
    """Gates that always say the last expert: its row is the temperature's inverse, the others' are zero."""
    gates = [np.zeros(slot.shape, np.float32) for slot in fitting.checkpoint.slots]
    for gate in gates:
        gate[-1] = 1 / fitting.settings.temperature
    return fitting.fitted(gates, [], {})


FAVOUR = Fit("favour", "one row of ones", "recipe", settings=("temperature",), native_as="gate")


@pytest.fixture(autouse=True)
def new_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FITS, FAVOUR.name, FAVOUR)
    monkeypatch.setitem(SETTERS, FAVOUR.name, favour)


@pytest.mark.parametrize("form", ["plain", "modekit"])
def test_it_goes_from_recipe_to_proof(workshop: Workshop, form: str) -> None:
    router = {"fit": "favour", "temperature": 0.5}
    plan = workshop.plan(mixture={"method": "routing", "router": router}, output={"format": form})
    assert memory_of(plan)["fit"] == 0 and statistics_bytes(plan) == 0
    checkpoint = build(plan, workshop.root / "OUT")
    assert is_proven(verify(checkpoint))
    gates = open_checkpoint(checkpoint.folder).gates()
    assert all((gate[-1] == 2).all() and not gate[:-1].any() for gate in gates)
    ids = torch.arange(8)[None] + 3
    assert torch.isfinite(load_model(checkpoint.folder)(input_ids=ids).logits).all()


def test_the_recipe_and_its_schema_know_it(workshop: Workshop) -> None:
    said = json.loads(schema_text())["$defs"]["Router"]["properties"]["fit"]
    assert said["enum"][-1] == "favour" and "favour: one row of ones" in said["description"]

    def refused(**router: Any) -> str:
        with pytest.raises(RecipeError) as caught:
            parse_recipe({**workshop.recipe, "mixture": {"router": router}})
        return str(caught.value)

    assert "'arrow', 'favour'" in refused(fit="nothing")
    assert "'l2' has no effect with fit: favour" in refused(fit="favour", l2=0.5)


def test_every_fit_has_a_function() -> None:
    assert list(SETTERS) == list(FITS)
    assert {row.name for row in FITS.values() if row.runs_models} == set(RULES)


def test_nobody_asks_which_fit_it_is() -> None:
    """A fit's row is asked, never its name."""
    source = Path(modekit.__file__).parent
    asks = re.compile(r"\.fit (==|!=|in|not in) [^a ]|\bfit (==|!=) [\"']")
    asked = [f"{file}: {line}" for file in source.rglob("*.py") for line in file.read_text().splitlines() if asks.search(line)]
    assert not [line for line in asked if "typer.Option" not in line]
