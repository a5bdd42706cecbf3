"""What cannot come, or go: one clear error each, and nothing has changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import modekit.building.build as building
from adapter_folders import write_adapter
from conftest import Workshop, save, tiny_model
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import CheckpointError, ModekitError
from modekit.members.change import write_change
from modekit.members.edits import NewExpert, add_expert, remove_expert
from modekit.routing.fit import refit
from pair_models import make_pair_workshop
from refusal import refuse, tree

SHORT = {"tokens_per_domain": 200, "keep_tokens": 32, "sequence_length": 32}


@pytest.fixture
def two(bench: Workshop) -> Workshop:
    """Two experts in a mixture at OUT, and the third at hand."""
    bench.recipe["experts"][2:] = []
    return bench


def refuse_change(bench: Workshop, *args: object) -> str:
    before = tree(bench.root)
    message = refuse(*args)
    assert tree(bench.root) == before
    return message


def of_shop(shared: Workshop, name: str) -> tuple[str, str]:
    return "--model", str(shared.root / name)


@pytest.mark.parametrize(
    ("name", "says"), [("law", "two experts are named 'law'"), *((name, "rename it") for name in ("oracle", "mixture", "base"))]
)
def test_a_name_that_is_there_or_means_something_else(two: Workshop, shared_workshop: Workshop, name: str, says: str) -> None:
    assert says in refuse_change(two, "add", two.build(), "--name", name, *of_shop(shared_workshop, "code"))


@pytest.mark.parametrize("command", [("remove",), ("replace", "--model", "base")])
def test_a_name_that_is_not_there(two: Workshop, command: tuple[str, ...]) -> None:
    verb, *rest = command
    message = refuse_change(two, verb, two.build(), "tax", *rest)
    assert "no expert of this name exists" in message and "medicine, law" in message


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "sizes": (lambda folder: save(tiny_model(seed=5, intermediate_size=64), folder), "intermediate_size"),
    "family": (lambda folder: save(tiny_model("qwen2", seed=5), folder), "another family"),
    "nothing": (lambda folder: folder.mkdir(), "config.json"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_does_not_fit(two: Workshop, tmp_path: Path, kind: str) -> None:
    make, said = OTHERS[kind]
    out = two.build()
    make(tmp_path / "stranger")
    assert said in refuse_change(two, "add", out, "--name", "tax", "--model", tmp_path / "stranger")


@pytest.mark.parametrize("change", ["add", "remove", "replace"])
def test_a_tokenizer_file_of_the_base_is_gone(tmp_path: Path, change: str) -> None:
    """Its words would be the mixture's no longer."""
    bench = make_pair_workshop(tmp_path, "t5")
    (tmp_path / "base" / "spiece.model").write_bytes(b"pieces")
    out = bench.build(mixture={"router": {"fit": "random"}})
    (tmp_path / "base" / "spiece.model").unlink()
    model = ("--model", tmp_path / "code")
    args = {"add": ("--name", "tax", *model), "remove": ("law",), "replace": ("law", *model)}[change]
    message = refuse_change(bench, change, out, *args)
    assert (
        "the base model is not the one" in message
        and "spiece.model is another, or gone" in message
        and "put it back" in message
    )


def test_the_last_but_one(two: Workshop) -> None:
    message = refuse_change(two, "remove", two.build(), "law")
    assert "experts" in message and "2" in message


@pytest.mark.parametrize(
    ("mixture", "key"),
    [
        ({"method": "gating", "always_on": {"expert": "law", "weight": 0.3}}, "mixture.always_on"),
        ({"backbone": {"expert": "law"}}, "mixture.backbone"),
        ({"top_k": 3}, "mixture.top_k is 3"),
    ],
)
def test_an_expert_that_the_mixture_stands_on(bench: Workshop, mixture: dict[str, Any], key: str) -> None:
    out = bench.build(mixture={**mixture, "router": {"fit": "random"}})
    assert key in refuse_change(bench, "remove", out, "law")


def test_no_text_for_a_router_that_reads_it(two: Workshop, shared_workshop: Workshop) -> None:
    out = two.build(mixture={"router": {"fit": "logistic", **SHORT}})
    message = refuse_change(two, "add", out, "--name", "tax", *of_shop(shared_workshop, "code"))
    assert "needs text of every domain" in message and "tax" in message


def test_statistics_and_text_are_gone(bench: Workshop, shared_workshop: Workshop) -> None:
    shutil.copytree(shared_workshop.root / "text", bench.root / "text")
    for expert in bench.recipe["experts"]:
        expert["text"] = f"./text/{expert['name']}.jsonl"
    out = bench.build(mixture={"router": {"fit": "logistic", **SHORT}})
    (bench.root / "text" / "medicine.jsonl").unlink()
    shutil.rmtree(out / "router")
    message = refuse_change(bench, "remove", out, "law")
    assert "medicine" in message and "text" in message


def test_an_adapter_beside_whole_models_of_a_native_mixture(two: Workshop, tmp_path: Path) -> None:
    out = two.build(output={"format": "auto"})
    write_adapter(tmp_path / "tax", target_modules=["up_proj"], r=4, lora_alpha=8)
    message = refuse_change(two, "add", out, "--name", "tax", "--adapter", tmp_path / "tax", "--no-measure")
    assert "would need another architecture" in message


def test_a_model_that_changed_and_is_needed(bench: Workshop, shared_workshop: Workshop) -> None:
    shutil.copytree(shared_workshop.root / "medicine", bench.root / "medicine")
    bench.recipe["experts"][0]["model"] = "./medicine"
    out = bench.build(mixture={"backbone": "average", "router": {"fit": "random"}})
    save(tiny_model(seed=8), bench.root / "medicine")
    assert "has changed since the mixture was built" in refuse_change(bench, "remove", out, "law")


def test_neither_model_nor_adapter(two: Workshop) -> None:
    before = tree(two.root)
    message = refuse("add", two.root / "nothing", "--name", "tax", "--model", "base")
    assert "modekit.json is missing" in message and tree(two.root) == before
    out = two.build()
    assert "give either 'model' or 'adapter'" in refuse_change(two, "add", out, "--name", "tax")


def test_what_would_undo_a_training(bench: Workshop) -> None:
    from modekit.training.settings import TrainSettings, checked_settings
    from modekit.training.train import train

    out = bench.build(mixture={"backbone": "average", "router": {"fit": "random"}})
    asked = {
        "what": ["norms"],
        "steps": 2,
        "batch_tokens": 256,
        "sequence_length": 64,
        "select_tokens": 200,
        "backbone_learning_rate": 0.1,
    }
    assert train(open_checkpoint(out), checked_settings(asked, TrainSettings, where="test"), evaluate_tokens=None).improved
    assert "this change would undo that" in refuse_change(bench, "remove", out, "law")


def test_a_fit_while_it_was_made(bench: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever another command did to the mixture meanwhile is not undone; notes that came meanwhile stay."""
    out = bench.build()
    write_shards = building.write_shards

    def with_a_fit(*args: Any) -> None:
        write_shards(*args)
        refit(open_checkpoint(out), {"top_k": 1})

    monkeypatch.setattr(building, "write_shards", with_a_fit)
    with pytest.raises(CheckpointError, match="another command has changed"):
        write_change(open_checkpoint(out), remove_expert(open_checkpoint(out), "law"), out)
    assert open_checkpoint(out).record.recipe.top_k == 1 and open_checkpoint(out).names == ["medicine", "law", "code"]

    def with_notes(*args: Any) -> None:
        write_shards(*args)
        (out / "notes.txt").write_text("mine")

    monkeypatch.setattr(building, "write_shards", with_notes)
    write_change(open_checkpoint(out), remove_expert(open_checkpoint(out), "law"), out)
    assert (out / "notes.txt").read_text() == "mine" and open_checkpoint(out).names == ["medicine", "code"]


def test_the_folder_itself_as_out(two: Workshop, shared_workshop: Workshop) -> None:
    """Where NEW is OUT the change is in place; where NEW exists it is refused."""
    out = two.build()
    (two.root / "NEW").mkdir()
    (two.root / "NEW" / "mine.txt").write_text("mine")
    args = ("add", out, "--name", "tax", *of_shop(shared_workshop, "code"), "--no-measure", "--out", two.root / "NEW")
    assert "the output folder exists" in refuse_change(two, *args)


def test_an_error_in_the_middle_leaves_the_old_one(
    bench: Workshop, shared_workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = bench.build()
    before = tree(bench.root)

    def fails(*_args: object, **_options: object) -> None:
        raise ModekitError("the fit failed")

    monkeypatch.setattr("modekit.building.build.fit_router", fails)
    checkpoint = open_checkpoint(out)
    new = NewExpert({"model": str(shared_workshop.root / "code")}, bench.root)
    with pytest.raises(ModekitError, match="the fit failed"):
        write_change(checkpoint, add_expert(checkpoint, "tax", new), out)
    assert tree(bench.root) == before
