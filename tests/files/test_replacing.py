"""Only what modekit wrote may modekit replace or remove, and nothing that a command reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import modekit.building.build as building
from command_line import modekit
from conftest import Workshop
from modekit.building.build import build
from modekit.errors import OutputError
from modekit.files.change import refuse_existing
from modekit.files.marker import foreign_files, read_marker
from modekit.files.output import work_of
from modekit.files.staging import staging
from refusal import borrow, refuse, tree


@pytest.fixture
def bench(tmp_path: Path, small_workshop: Workshop) -> Workshop:
    return borrow(small_workshop, tmp_path, 2)


def put_a_letter(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "letter.txt").write_text("mine")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_appears_during_a_build_is_not_replaced(
    bench: Workshop, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    out, real = bench.root / "OUT", building.write_index
    plan = bench.plan()

    def write_index(*args: object) -> None:
        put_a_letter(out)
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(building, "write_index", write_index)
    with pytest.raises(OutputError, match="appeared at the output path meanwhile"):
        build(plan, out, overwrite=overwrite)
    assert tree(out) == {"letter.txt": b"mine"}
    monkeypatch.undo()
    shutil.rmtree(out)  # as the message says
    build(plan, out)
    assert not work_of(out).path.exists()
    assert foreign_files(out) == []


@pytest.mark.parametrize("how", ["a journal", "a journal and a lock", "a link", "a mixture", "another's work"])
def test_a_folder_of_the_users_with_the_work_folders_name(bench: Workshop, how: str) -> None:
    partial, elsewhere = bench.root / "OUT.partial", bench.root / "elsewhere"
    if how == "a link":
        put_a_letter(elsewhere)
        (elsewhere / "journal").write_text("Dear diary\n")
        partial.symlink_to(elsewhere)
    elif how == "a mixture":
        bench.build("OUT.partial")
    elif how == "another's work":
        with pytest.raises(OutputError), staging(bench.root / "OTHER", "x", "model") as stage:
            shutil.copytree(stage.folder.parent, partial)
            raise OutputError("enough")
    else:
        partial.mkdir()
        (partial / "journal").write_text("Dear diary\n")
        if "lock" in how:
            (partial / "lock").write_text("")
    recipe = bench.write()
    before = tree(bench.root)
    message = refuse("build", recipe, bench.root / "OUT")
    assert "that modekit did not make is in the way" in message
    assert "OUT.partial" in message
    assert tree(bench.root) == before


def test_files_of_the_user_in_an_output_are_not_overwritten(bench: Workshop) -> None:
    out = bench.build()
    (out / "notes").mkdir()
    (out / "notes" / "monday.txt").write_text("mine")
    recipe = bench.write()
    before = tree(bench.root)
    message = refuse("build", recipe, out, "--overwrite")
    assert "notes/monday.txt" in message
    assert tree(bench.root) == before
    (out / "notes" / "monday.txt").unlink()
    modekit("build", recipe, out, "--overwrite")


def test_a_small_file_that_the_user_changed_is_the_users(bench: Workshop) -> None:
    out = bench.build()
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 1}))
    assert foreign_files(out) == ["config.json"]
    assert "config.json" in refuse("build", bench.write(), out, "--overwrite")


def test_what_commands_added_is_modekits_own(bench: Workshop) -> None:
    out = bench.build(mixture={"router": {"fit": "centroid", "tokens_per_domain": 64}})
    for words in (("eval", "--tokens", "100"), ("inspect", "--tokens", "100"), ("report",), ("fit", "fit=logistic")):
        modekit(words[0], out, *words[1:])
        assert foreign_files(out) == [], words
    bench.build(mixture={"router": {"fit": "centroid", "tokens_per_domain": 64}})


def test_a_training_in_place_keeps_what_the_user_put_there(bench: Workshop) -> None:
    out = bench.build()
    (out / "notes.txt").write_text("mine")
    (out / "link").symlink_to("../recipe.yaml")
    modekit(
        "train",
        out,
        "what=experts",
        "backbone_learning_rate=0.01",
        "steps=2",
        "batch_tokens=128",
        "sequence_length=32",
        "select_tokens=100",
        "--tokens",
        "0",
    )
    assert json.loads((out / "modekit.json").read_text())["trained"]
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "link").readlink() == Path("../recipe.yaml")
    assert foreign_files(out) == ["link", "notes.txt"]


@pytest.mark.parametrize("out", ["source", "source/OUT", ".", "link", "link/OUT", "source/../source"])
def test_an_output_and_its_sources_are_apart_by_real_path(tmp_path: Path, out: str) -> None:
    root = tmp_path / "models"
    (root / "source").mkdir(parents=True)
    (root / "link").symlink_to(root / "source")
    before = tree(tmp_path)
    with (
        pytest.raises(OutputError, match="holds or lies in "),
        staging(root / out, "x", "model", sources=[root / "source"]),
    ):
        raise AssertionError
    with pytest.raises(OutputError, match="holds or lies in "):
        refuse_existing(root / out, "modekit's own", sources=[root / "source"])
    assert tree(tmp_path) == before


def test_a_build_does_not_replace_the_folder_that_its_experts_lie_in(bench: Workshop) -> None:
    out = bench.build()
    shutil.copytree(bench.recipe["experts"][0]["model"], out / "adapters" / "medicine")
    experts = [{**bench.recipe["experts"][0], "model": "./OUT/adapters/medicine"}, bench.recipe["experts"][1]]
    recipe = bench.write(experts=experts)
    before = tree(bench.root)
    assert "adapters/medicine" in refuse("build", recipe, out, "--overwrite")
    assert tree(bench.root) == before


def test_nothing_is_written_into_a_folder_that_is_read_as_text(bench: Workshop) -> None:
    """A fit that reads the text again would learn from what a mixture there keeps."""
    text = bench.root / "text"
    shutil.copytree(Path(bench.recipe["experts"][0]["text"]).parent, text)
    first, second = bench.recipe["experts"][:2]
    recipe = bench.write(experts=[{**first, "text": "./text"}, second])
    base = bench.recipe["base_model"]
    before = tree(bench.root)
    for command in (
        ("build", recipe, text / "OUT"),
        ("specialize", base, text / "OUT", "--text", text, "steps=1"),
        ("specialize", base, text / "OUT", "--text", f"law={text}", "--tags", "steps=1"),
    ):
        assert f"lies in {text}" in refuse(*command)
        assert tree(bench.root) == before


def test_every_folder_that_is_made_says_so(bench: Workshop) -> None:
    out = bench.build()
    marker = read_marker(out)
    assert marker is not None
    assert (marker.kind, marker.of) == ("checkpoint", "")
    assert set(marker.files) == {name for name in tree(out) if name != ".modekit"}
