"""Experts in short form: a path, a hub id or the word base, with a name before it or without."""

from __future__ import annotations

from pathlib import Path

import pytest

import modekit
from modekit.recipes.paths import new_name, spelled_out
from modekit.recipes.read import load_recipe


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folders of an adapter, a model, a model with an adapter in it, and one whose name has an equals sign."""
    for name in ("law/final_model", "tax", "both", "a=b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    for name in ("law/final_model", "both"):
        (tmp_path / name / "adapter_config.json").touch()
    (tmp_path / "both" / "model-00001-of-00001.safetensors").touch()
    return tmp_path


def experts(root: Path, *said: object) -> list[object]:
    found = spelled_out({"experts": list(said)}, root)["experts"]
    assert isinstance(found, list)
    return found


def test_what_a_folder_holds_is_found_out(root: Path) -> None:
    assert experts(root, "./law/final_model", "tax", "base", "both") == [
        {"name": "law", "adapter": "./law/final_model"},
        {"name": "tax", "model": "tax"},
        {"name": "general", "model": "base"},
        {"name": "both", "model": "both"},  # opening it says what is wrong
    ]


def test_a_name_may_be_given_and_no_two_are_alike(root: Path) -> None:
    full = {"name": "tax", "model": "./other"}
    found = experts(root, full, "court=./law/final_model", "./tax", "more=base", "a=b", "x y=tax")
    assert [each["name"] for each in found if isinstance(each, dict)] == ["tax", "court", "tax-2", "more", "a-b", "x y"]
    assert found[0] is full and found[4] == {"name": "a-b", "model": "a=b"}


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("runs/law/checkpoint-500", "law"),
        ("law-lora/", "law-lora"),
        ("../law/lora/final", "law"),
        ("checkpoint-5", "checkpoint-5"),
        ("org/Law 7B (v2)", "Law-7B-v2"),
        ("a/base", "base-2"),
        ("..", "expert"),
        ("x" * 100, "x" * 60),
    ],
)
def test_a_name_is_the_part_of_the_path_that_says_something(spec: str, name: str) -> None:
    assert new_name(spec, {"base", "oracle", "mixture"}) == name


def test_the_hub_is_asked_what_an_id_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def hf_hub_download(spec: str, file: str) -> str:
        asked.append(f"{spec}/{file}")
        if spec != "org/lora":
            raise FileNotFoundError(file)
        return file

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    found = experts(root, "org/lora", "tax=org/model", "./org/none", "none")
    assert found == [
        {"name": "org", "adapter": "org/lora"},
        {"name": "tax", "model": "org/model"},
        {"name": "none", "model": "./org/none"},
        {"name": "none-2", "model": "none"},
    ]
    assert asked == ["org/lora/adapter_config.json", "org/model/adapter_config.json"]


def test_a_recipe_says_the_same_in_short(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "recipe.yaml").write_text("base_model: ./tax\nexperts: [law/final_model, base]\nmixture: {method: linear}\n")
    read = load_recipe(root / "recipe.yaml")
    assert [(each.name, each.adapter, each.model) for each in read.experts] == [
        ("law", "law/final_model", None),
        ("general", None, "base"),
    ]
    monkeypatch.chdir(root)
    said = {"base_model": "./tax", "experts": ["law/final_model", "base"], "mixture": {"method": "linear"}}
    assert modekit.recipe(said).digest() == read.digest()


def test_what_is_no_short_form_is_left_as_it_is(root: Path) -> None:
    for raw in ({}, {"experts": None}, {"experts": "law"}, {"experts": [{"name": "a"}]}):
        assert spelled_out(raw, root) is raw
    assert experts(root, "", 3, None, "tax")[:3] == ["", 3, None]
