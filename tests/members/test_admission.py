"""What is measured before an expert is let in, and what the commands say."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from command_line import ended, modekit
from conftest import Workshop, save, tiny_model
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.experts.specialize import specialize
from modekit.loaded.text_training import Training
from modekit.members.admission import Admission, measure_admission
from modekit.members.change import before_change, write_change
from modekit.members.edits import NewExpert, add_expert, replace_expert
from refusal import borrow

FEW = ("--tokens", "300")


@pytest.fixture(scope="module")
def shop(shared_workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A mixture of two, a specialist for code that is one, its twin, one that learnt less, and a model that knows nothing of
    code.
    """
    root = tmp_path_factory.mktemp("door")
    made = borrow(shared_workshop, root)
    made.recipe["experts"][2:] = []
    (root / "text").mkdir()
    shutil.copyfile(shared_workshop.root / "text" / "code.jsonl", root / "text" / "code.jsonl")
    for name, steps in (("python", 30), ("medic", 30), ("beginner", 15)):
        training = Training(steps=steps, learning_rate=1e-2, batch_tokens=512, sequence_length=64, seed=steps)
        text = shared_workshop.root / "text" / "medicine.jsonl" if name == "medic" else root / "text" / "code.jsonl"
        specialize(
            shared_workshop.root / "base", root / name, [str(text)], root=root, train="mlp", rank=None, training=training
        )
    shutil.copytree(shared_workshop.root / "code", root / "stranger")
    _nudged(root / "python", root / "twin")
    made.recipe["experts"][1] = {**made.recipe["experts"][1], "model": "./medic"}
    made.build()
    return made


def _nudged(folder: Path, to: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-6)
    model.save_pretrained(to)


def door(shop: Workshop, model: str, *, text: bool = True) -> Admission:
    checkpoint = open_checkpoint(shop.root / "OUT")
    said = {"model": f"./{model}", **({"text": ["./text/code.jsonl"]} if text else {})}
    new = NewExpert(said, shop.root)
    return measure_admission(before_change(checkpoint, add_expert(checkpoint, "code", new)), tokens=300)


def test_a_specialist_brings_what_was_measured(shop: Workshop) -> None:
    found = door(shop, "python")
    assert found.losses["expert"] < found.losses["base"] - 0.1
    assert found.refused == [] and 0 < found.drift < 1 and 200 < found.tokens <= 300
    assert found.nearest is not None and found.nearest[0] in ("medicine", "law") and found.nearest[1] < 0.9


def test_one_that_knows_its_domain_less_than_the_base_is_kept_out(shop: Workshop) -> None:
    found = door(shop, "stranger")
    assert found.losses["expert"] > found.losses["base"]
    assert [finding.what for finding in found.refused] == ["it is not better than the base model on its own text"]


def test_who_it_was_not_compared_with_is_said(shop: Workshop) -> None:
    (shop.root / "medic").rename(shop.root / "away")
    try:
        found = door(shop, "python")
    finally:
        (shop.root / "away").rename(shop.root / "medic")
    assert "note: it was not compared with law" in [f"{finding.level}: {finding.what}" for finding in found.findings]


@pytest.fixture(scope="module")
def three(shop: Workshop) -> Checkpoint:
    """The mixture with the specialist for code."""
    checkpoint = open_checkpoint(shop.root / "OUT")
    new = NewExpert({"model": "./python", "text": "./text/code.jsonl"}, shop.root)
    return write_change(checkpoint, add_expert(checkpoint, "code", new), shop.root / "THREE")


def test_one_that_knows_what_another_knows_already_is_named(shop: Workshop, three: Checkpoint) -> None:
    new = NewExpert({"model": "./beginner", "text": "./text/code.jsonl"}, shop.root)
    found = measure_admission(before_change(three, add_expert(three, "again", new)), tokens=300)
    assert [*found.losses] == ["base", "mixture", "nearest", "expert"] and found.losses["nearest"] < found.losses["base"]
    assert found.nearest is not None and found.nearest[0] == "code" and not found.refused
    assert any(each.what.startswith("code has 1") and "modekit replace OUT code" in each.to_do for each in found.findings)


@pytest.mark.parametrize("model", ["twin", "beginner"])
def test_one_that_replaces_another_is_compared_with_it(shop: Workshop, three: Checkpoint, model: str) -> None:
    edit = replace_expert(three, "code", NewExpert({"model": f"./{model}"}, shop.root))
    found = measure_admission(before_change(three, edit), tokens=300)
    assert [*found.losses] == ["base", "replaced", "expert"] and not found.refused
    better = any("the expert that it replaces is better" in each.what for each in found.findings)
    assert better == (model == "beginner")


def test_a_twin_is_kept_out(shop: Workshop, three: Checkpoint) -> None:
    root, checkpoint = shop.root, three
    new = NewExpert({"model": "./twin", "text": ["./text/code.jsonl"]}, root)
    found = measure_admission(before_change(checkpoint, add_expert(checkpoint, "again", new)), tokens=300)
    assert found.nearest is not None and found.nearest[0] == "code" and found.nearest[1] > 0.999
    assert "nearly the same model as code" in found.refused[0].what


def test_a_model_whose_loss_is_no_number_is_kept_out(workshop: Workshop) -> None:
    checkpoint = open_checkpoint(workshop.build(experts=workshop.recipe["experts"][:2]))
    model = tiny_model(seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1e20 if "mlp" in name else 1.0)  # finite, and what comes of it is not
    save(model, workshop.root / "huge")
    new = NewExpert({"model": "./huge", "text": "./text/code.jsonl"}, workshop.root)
    found = measure_admission(before_change(checkpoint, add_expert(checkpoint, "code", new)), tokens=100)
    assert [finding.what for finding in found.refused] == ["it is not better than the base model on its own text"]


def test_without_text_that_is_said(shop: Workshop) -> None:
    found = door(shop, "python", text=False)
    assert found.losses == {} and found.refused == []
    assert "was not measured" in found.findings[0].what


def test_a_licence_that_differs_is_said(shop: Workshop) -> None:
    readme = shop.root / "python" / "README.md"
    readme.write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    try:
        found = door(shop, "python")
    finally:
        readme.unlink()
    assert any(finding.found == "cc-by-nc-4.0; no licence found" for finding in found.findings)
    assert found.refused == []


@pytest.fixture
def at(shop: Workshop, tmp_path: Path) -> Iterator[Path]:
    """A copy of the mixture, typed at from the folder of the models."""
    shutil.copytree(shop.root / "OUT", shop.root / "COPY")
    before = Path.cwd()
    os.chdir(shop.root)
    yield shop.root / "COPY"
    os.chdir(before)
    shutil.rmtree(shop.root / "COPY")


def test_the_commands(at: Path) -> None:
    said = modekit("add", "COPY", "--name", "code", "--model", "./python", "--text", "./text/code.jsonl", *FEW)
    assert "3 experts (medicine, law, code)" in said and "select split" in said and "code moved" in said
    record = open_checkpoint(at).record
    assert record.recipe.experts[2].model == "./python" and record.recipe.experts[2].text == ["./text/code.jsonl"]
    assert "2 experts" in modekit("remove", "COPY", "medicine")
    modekit("replace", "COPY", "law", "--model", "./twin", "--no-measure")
    record = open_checkpoint(at).record
    assert record.recipe.names == ["law", "code"] and "law was replaced: ./twin" in record.history[-1].said
    assert [each.what for each in record.history] == ["add", "remove", "replace"]


def test_the_door_refuses_and_can_be_forced(at: Path) -> None:
    args = ("add", "COPY", "--name", "code", "--model", "./stranger", "--text", "./text/code.jsonl", *FEW)
    code, said, error = ended(*args)
    assert code == 2 and "the expert is not added" in error and "not better than the base" in said and "not better" not in error
    assert open_checkpoint(at).names == ["medicine", "law"] and not at.with_name("COPY.partial").exists()
    modekit(*args, "--force")
    assert open_checkpoint(at).names == ["medicine", "law", "code"]
