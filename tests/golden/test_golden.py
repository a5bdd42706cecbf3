"""The same recipe gives the same bytes as before: every shape of result, kind of expert and way to make a tensor.

`scripts/golden.py` made them. After a change that is meant to change bytes, they are made anew by it, and the change log
says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

import golden
from command_line import modekit
from golden_recipes import RECIPES

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden.json").read_text())
TOLERANCE = {"native-logistic": 2e-2, "modekit-token": 2e-2}
CLOSED_FORM = 2e-3
"""Of a gate's or factor's largest number. Fits run float32 passes, whose last bits depend on the processor's instructions and
threads. Between instruction sets (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_CBWR, one and two threads) closed forms moved by
up to 2e-4, the logistic fit, whose search ends where its gradient is 1e-6, by up to 2.2e-3."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every golden checkpoint, built by the code under test through its command line."""
    return golden.build_all(tmp_path_factory.mktemp("golden"), modekit)


@pytest.mark.parametrize("name", RECIPES)
def test_files_are_bit_for_bit_the_same(checkpoints: Path, name: str) -> None:
    assert golden.digests_of(checkpoints / name) == GOLDEN["checkpoints"][name]["files"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_config_says_the_same(checkpoints: Path, name: str) -> None:
    wanted: dict[str, Any] = GOLDEN["checkpoints"][name]["config"]
    found = golden.config_of(checkpoints / name)
    if transformers.__version__ != GOLDEN["transformers"]:  # whose configs may have gained defaults
        found = {key: found.get(key) for key in wanted}
    assert found == wanted


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe["mixture"].get("method") != "linear"])
def test_fitted_numbers_are_the_same_within_rounding(checkpoints: Path, name: str) -> None:
    prefix = f"{name}/"
    numbers = load_file(HERE / "numbers.safetensors").items()
    wanted = {key.removeprefix(prefix): value for key, value in numbers if key.startswith(prefix)}
    found = golden.numbers_of(checkpoints / name)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        most = TOLERANCE.get(name, CLOSED_FORM) * np.abs(value).max()
        np.testing.assert_allclose(found[key], value, rtol=0, atol=most, err_msg=key)
