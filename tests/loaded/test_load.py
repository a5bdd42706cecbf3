"""Loading leaves transformers as it was, and so does everything that overrules a mixture's routers for a while."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from adapter_folders import write_adapter
from conftest import Workshop, logits_of, make_workshop
from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.checkpoint.sources import why_not
from modekit.errors import ModekitError, SourceError
from modekit.evaluation.evaluate import evaluate
from modekit.loaded import load
from modekit.loaded.experts import average_of, load_expert, load_expert_source
from modekit.loaded.shapes import flow_of, mixture_of
from modekit.planning.make import make_plan
from modekit.processes import DEVICE_VARIABLE
from modekit.recipes.read import load_recipe
from modekit.run import Run
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
    with flow.changed(forced=0), flow.changed(forced=1):
        assert flow.forced == 1
    assert torch.equal(logits_of(model, ids), free)


OWN_CODE = "from transformers import LlamaForCausalLM\n\n\nclass OwnModel(LlamaForCausalLM):\n    own = True\n"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Of experts over a base whose config has auto_map; `law` is an adapter."""
    workshop: Workshop = make_workshop(tmp_path_factory.mktemp("own"))
    base = workshop.root / "base"
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}}))
    (base / "modeling_own.py").write_text(OWN_CODE)
    write_adapter(workshop.root / "lora")
    workshop.recipe["experts"][1] = {"name": "law", "adapter": "./lora", "text": "./text/law.jsonl"}
    plan = make_plan(load_recipe(workshop.write()), workshop.root, run=Run(trust_remote_code=True))
    return build(plan, workshop.root / "OUT")


def test_an_adapter_over_a_base_with_code_of_its_own_is_loaded_when_that_is_trusted(mixture: Checkpoint) -> None:
    model = load_expert_source(mixture, 1, run=Run(trust_remote_code=True))
    assert model is not None and getattr(model, "own", False)
    base = AutoModelForCausalLM.from_pretrained(mixture.recipe_root / "base", trust_remote_code=False)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, base.state_dict()[name])]
    assert changed and all("up_proj" in name for name in changed)


def test_without_trust_it_is_refused_by_name(mixture: Checkpoint) -> None:
    with pytest.raises(SourceError, match="--trust-remote-code"):
        load_expert_source(mixture, 1)


def test_a_table_has_the_row_of_such_an_adapter(mixture: Checkpoint) -> None:
    results = evaluate(mixture, tokens_per_domain=100, sequence_length=32, run=Run(trust_remote_code=True), write=False)
    assert [row.name for row in results.rows] == ["base", "medicine", "law", "code", "weight average", "oracle", "mixture"]


def test_what_is_gone_is_said_to_be(mixture: Checkpoint, tmp_path: Path) -> None:
    assert why_not(Checkpoint(tmp_path / "OUT", mixture.record), 0) == "it is no longer where the recipe found it"


def test_the_average_is_that_of_all(mixture: Checkpoint) -> None:
    root = mixture.recipe_root
    folders = [root / "medicine", root / "code"]
    average = average_of([lambda folder=folder: load_expert(root / "base", folder) for folder in folders]).state_dict()
    one, other = (load_expert(root / "base", folder).state_dict() for folder in folders)
    for name, tensor in average.items():
        assert torch.allclose(tensor, (one[name] + other[name]) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "there", "found"),
    [
        ("auto", (), "cpu"),
        ("auto", ("mps",), "mps"),
        ("auto", ("cuda", "mps"), "cuda:0"),
        ("cpu", ("cuda", "mps"), "cpu"),
        ("mps", ("cuda", "mps"), "mps"),
        ("cuda", ("mps",), None),
        ("mps", (), None),
    ],
)
def test_a_device_is_the_one_that_is_asked_for_or_the_best(
    monkeypatch: pytest.MonkeyPatch, asked: str, there: tuple[str, ...], found: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    monkeypatch.setenv(DEVICE_VARIABLE, asked)
    if found is None:
        with pytest.raises(ModekitError, match="torch finds no such device here"):
            load.default_device()
    else:
        assert str(load.default_device()) == found
