"""Loading leaves transformers as it was, and so does everything that overrules a mixture's routers for a while."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from conftest import Workshop, logits_of
from modekit.checkpoint.open import open_checkpoint
from modekit.loaded import load
from modekit.loaded.modekit import flow_of
from modekit.loaded.shapes import mixture_of
from refusal import borrow


@pytest.fixture
def drawn() -> Iterator[None]:
    """Progress bars as transformers has them for whoever did not ask for less."""
    logging.enable_progress_bar()
    yield
    logging.disable_progress_bar()


def test_importing_hides_no_bars(drawn: None) -> None:
    """They were hidden for the whole process by an import."""
    importlib.reload(load)
    assert logging.is_progress_bar_enabled()


def test_bars_are_hidden_while_a_model_loads(drawn: None, shared_workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        seen.append(logging.is_progress_bar_enabled())
        raise OSError("no model")

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(load.SourceError):
        load.load_model(shared_workshop.root / "base")
    assert seen == [False] and logging.is_progress_bar_enabled()


def test_routers_are_given_back(shared_workshop: Workshop, tmp_path: Path, ids: torch.Tensor) -> None:
    """Also when something goes wrong meanwhile."""
    workshop = borrow(shared_workshop, tmp_path)
    checkpoint = open_checkpoint(workshop.build(output={"format": "modekit"}))
    model = load.load_model(checkpoint.folder)
    mixture, flow = mixture_of(model, checkpoint), flow_of(model)
    free = logits_of(model, ids)
    for overruled in (mixture.forced(1), mixture.left_out(1), mixture.traced(), flow.changed(forced=1, beside=True)):
        with pytest.raises(KeyError), overruled:
            raise KeyError
        assert (flow.forced, flow.left_out, flow.listener) == (None, None, None)
    with flow.forcing(0), flow.forcing(1):
        assert flow.forced == 1
    assert torch.equal(logits_of(model, ids), free)
