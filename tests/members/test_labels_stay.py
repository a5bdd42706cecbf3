"""Other labels of experts in a finished mixture: plain transformers takes them, and they stay right as experts come and go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapter_folders import lora, write_adapter
from command_line import modekit
from conftest import Workshop, make_workshop
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import CheckpointError, RecipeError
from modekit.members.change import write_change
from modekit.members.edits import NewExpert, add_expert, remove_expert, replace_expert
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from refusal import refuse

LABELS = {"law": ["court", "contracts"], "code": ["python"]}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = make_workshop(tmp_path_factory.mktemp("labels"), num_hidden_layers=1)
    write_adapter(
        made.root / "adapter", lora("mlp.up_proj", 48, 32, 2, layers=1), target_modules=["up_proj"], r=2, lora_alpha=8
    )
    return made


def recipe(labels: dict[str, list[str]], output: str = "modekit") -> dict[str, Any]:
    experts = [{"name": name, "model": f"./{name}"} for name in ("medicine", "law", "code")]
    for expert in experts:
        expert |= {"labels": labels[expert["name"]]} if expert["name"] in labels else {}  # type: ignore[dict-item]
    return {"base_model": "./base", "experts": experts, "mixture": {"router": {"fit": "random"}}, "output": {"format": output}}


def built(shop: Workshop, out: Path, labels: dict[str, list[str]], output: str = "modekit") -> Checkpoint:
    return build(make_plan(parse_recipe(recipe(labels, output)), shop.root), out)


def test_plain_transformers_takes_a_label(shop: Workshop, tmp_path: Path) -> None:
    checkpoint = built(shop, tmp_path / "OUT", LABELS)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    ids = torch.arange(4, 24).reshape(2, 10)

    def logits(expert: Any) -> torch.Tensor:
        model.use_expert(expert)
        with torch.inference_mode():
            found: torch.Tensor = model(input_ids=ids).logits
        return found

    assert torch.equal(logits("court"), logits("law")) and torch.equal(logits("contracts"), logits(1))
    assert not torch.equal(logits("python"), logits("court"))
    assert torch.equal(logits(["court", "python"]), logits([1, 2]))
    with pytest.raises(ValueError, match="there is no expert 'mail'; there are medicine, law, code, contracts, court, python"):
        model.use_expert("mail")
    nobody = [["court", None], ["court", "mail"], ["court", []], [["court"]], [0.0, 1], [3, "law"], ["law", -1], [], {}]
    nobody += [["law", True], [True, "law"], (0, True), torch.empty(0, dtype=torch.int64)]
    for wrong in nobody:
        with pytest.raises(ValueError, match=r"there is no expert .*; there are medicine, law, code, contracts, court, python"):
            model.use_expert(wrong)
    assert torch.equal(logits([torch.tensor(1), "python"]), logits(torch.tensor([1, 2])))
    assert is_proven(verify(checkpoint))


@pytest.mark.parametrize("labels", [None, ["court"], "court", {"court": "law"}, {"court": None}, {"court": 9}, {"court": [1]}])
def test_labels_that_somebody_wrote_into_config_are_one_clear_error(shop: Workshop, tmp_path: Path, labels: Any) -> None:
    folder = built(shop, tmp_path / "OUT", LABELS).folder
    config = json.loads((folder / "config.json").read_text())
    config["modekit"]["labels"] = labels
    (folder / "config.json").write_text(json.dumps(config))
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    for wrong in ("court", ["law", "court"]):
        with pytest.raises(ValueError, match=r"there is no expert .*court.*; there are medicine, law, code"):
            model.use_expert(wrong)
    model.use_expert(["law", "code"])


def test_labels_go_with_their_experts(shop: Workshop, tmp_path: Path) -> None:
    before = built(shop, tmp_path / "OUT", LABELS)

    def said(checkpoint: Checkpoint) -> dict[str, int]:
        found: dict[str, int] = json.loads((checkpoint.folder / "config.json").read_text())["modekit"].get("labels", {})
        assert found == open_checkpoint(checkpoint.folder).record.recipe.other_labels
        return found

    removed = write_change(before, remove_expert(before, "medicine"), tmp_path / "removed")
    assert said(removed) == {"court": 0, "contracts": 0, "python": 1}
    replaced = write_change(
        before, replace_expert(before, "law", NewExpert({"model": "./medicine"}, shop.root)), tmp_path / "new"
    )
    assert said(replaced) == said(before)
    more = NewExpert({"model": "./medicine", "labels": ["duties", "court"]}, shop.root)
    replaced = write_change(before, replace_expert(before, "law", more), tmp_path / "newer")
    assert said(replaced) == {**said(before), "duties": 1}
    more = NewExpert({"adapter": "./adapter", "labels": ["letters"]}, shop.root)
    added = write_change(before, add_expert(before, "mail", more), tmp_path / "added")
    assert said(added) == {**said(before), "letters": 3}
    assert all(is_proven(verify(each, reload=False)) for each in (removed, replaced, added))
    with pytest.raises(RecipeError, match="already; a label leads to one expert"):
        add_expert(before, "contracts", more)


def test_an_expert_that_comes_brings_labels(shop: Workshop, tmp_path: Path) -> None:
    out = str(built(shop, tmp_path / "OUT", LABELS).folder)
    options = ("add", out, "--name", "mail", "--adapter", str(shop.root / "adapter"), "--no-measure", "--no-fsync")
    assert "label 'court' is known already" in refuse(*options, "labels=[court]")
    modekit(*options, "labels=[letters, post]")
    assert open_checkpoint(tmp_path / "OUT").shape.mixture.labels["post"] == 3


@pytest.mark.parametrize("labels", [{"court": 2}, {"court": 1, "contracts": 1}, {"law": 1}, {"court": 9}, {"court": "law"}])
def test_labels_of_other_experts_are_damage(shop: Workshop, tmp_path: Path, labels: dict[str, Any]) -> None:
    folder = built(shop, tmp_path / "OUT", LABELS).folder
    config = json.loads((folder / "config.json").read_text())
    config["modekit"]["labels"] = labels
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"disagree|does not say what is mixed"):
        open_checkpoint(folder)
