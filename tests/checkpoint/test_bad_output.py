"""A result that cannot be written, is interrupted, or is no checkpoint: the old folder stays, nothing new is left behind."""

from __future__ import annotations

import errno
import math
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from conftest import Workshop
from modekit.building.build import build
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import OutputError
from modekit.files.lock import Lock
from modekit.files.marker import CHANGED
from modekit.files.output import WorkFolder
from modekit.planning.make import make_plan
from modekit.recipes.read import load_recipe
from refusal import borrow, copy_expert, refuse, refuse_build, tree

FFN = "model.layers.2.mlp.down_proj.weight"


def spoil(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[FFN][0, 0] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# The folder


def test_a_folder_that_exists_needs_overwrite(bench: Workshop) -> None:
    bench.build()
    message = refuse_build(bench)
    assert str(bench.root / "OUT") in message
    assert "--overwrite" in message


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "letters/home.txt"])
def test_an_ordinary_folder_is_never_overwritten(bench: Workshop, name: str) -> None:
    (bench.root / "OUT" / name).parent.mkdir(parents=True)
    (bench.root / "OUT" / name).write_text("mine")
    assert "--overwrite" not in refuse_build(bench)  # it would be refused, too
    message = refuse_build(bench, "--overwrite")
    assert "holds something else" in message
    assert "move it away" in message


def test_neighbours_with_common_names_are_left_alone(bench: Workshop) -> None:
    for suffix in (".old", ".bak", ".tmp"):
        (bench.root / f"OUT{suffix}").mkdir()
        (bench.root / f"OUT{suffix}" / "letter.txt").write_text("mine")
    before = tree(bench.root)
    bench.build()
    bench.build()
    after = tree(bench.root)
    assert {path: after[path] for path in before} == before


def test_the_old_folder_stays_when_the_new_build_fails(bench: Workshop) -> None:
    bench.build()
    spoil(copy_expert(bench))
    message = refuse_build(bench, "--overwrite")
    assert f"experts[1] 'law' (./law): {FFN}" in message
    message = refuse_build(bench, "--overwrite", mixture={"router": {"fit": "logistic", "tokens_per_domain": 64}})
    assert f"experts[1] 'law' (./law): {FFN}" in message


def test_the_parent_is_a_file(bench: Workshop) -> None:
    (bench.root / "parent").write_text("mine")
    recipe = bench.write()
    before = tree(bench.root)
    for out in (bench.root / "parent" / "OUT", bench.root / "parent" / "deeper" / "OUT"):
        message = refuse("build", recipe, out)
        assert str(out) in message
        assert "cannot be written" in message and f"{bench.root / 'parent'} is a file" in message
        assert "free" not in message
    assert tree(bench.root) == before


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250])
def test_a_name_that_the_file_system_refuses(bench: Workshop, name: str) -> None:
    recipe = bench.write()
    before = tree(bench.root)
    message = refuse("build", recipe, bench.root / name)
    assert "cannot be written" in message
    assert "File name too long" in message
    assert tree(bench.root) == before


@pytest.mark.parametrize("name", ["/", "", "loop"])
def test_a_path_that_no_folder_can_have(bench: Workshop, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The root, an empty path, a link to itself."""
    recipe = bench.write()
    (bench.root / "loop").symlink_to("loop")
    monkeypatch.chdir(bench.root)
    for words in (("build", recipe, name, "--overwrite"), ("build", recipe, name), ("mix", "a", "b", "-o", name)):
        assert f"where:    {os.path.realpath(name)}" in refuse(*words)
    with pytest.raises(OutputError):
        build(make_plan(load_recipe(recipe), bench.root), Path(name))


# Folders that are no checkpoint, or no longer


def held(out: Path) -> WorkFolder:
    """OUT.partial, as a command makes it."""
    work = WorkFolder(out, "partial")
    work.take()
    return work


COMMANDS = ("eval", "verify", "fit")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_no_checkpoint(bench: Workshop, command: str) -> None:
    (bench.root / "letter.txt").write_text("mine")
    for folder in (bench.root, bench.root / "nowhere", bench.root / "letter.txt", Path(bench.recipe["base_model"])):
        message = refuse(command, folder)
        assert str(folder) in message
        assert "modekit.json" in message
    assert list(tree(bench.root)) == ["letter.txt"]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unfinished_build(bench: Workshop, command: str) -> None:
    partial = bench.root / "OUT.partial"
    held(bench.root / "OUT").lock.release()
    (partial / "journal").touch()
    (partial / "new").mkdir()
    for folder in (partial, bench.root / "OUT"):
        message = refuse(command, folder)
        assert str(folder) in message
        assert "run the same command again" in message
    shutil.copytree(bench.build("WHOLE"), partial / "new", dirs_exist_ok=True)
    for folder in (partial, partial / "new"):
        assert "unfinished" in refuse(command, folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, shared_workshop: Workshop) -> Path:
    """A whole checkpoint; copy it before damaging it."""
    return borrow(shared_workshop, tmp_path_factory.mktemp("whole")).build()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("modekit.json", b""),
        ("modekit.json", b"{}"),
        ("modekit.json", b"[1]"),
        ("modekit.json", b"\xff\xfe"),
        ("modekit.json", b'{"format": 2}'),
        ("config.json", None),
        ("config.json", b""),
        ("config.json", b"{}"),
        ("config.json", b"[]"),
        ("model.safetensors.index.json", None),
        ("model.safetensors.index.json", b"{"),
        ("model.safetensors.index.json", b'{"weight_map": {}}'),
        ("model-router.safetensors", None),
        ("model-router.safetensors", b"garbage" * 10),
        ("model-backbone-00001.safetensors", None),
        ("model-backbone-00001.safetensors", b"\x10"),
    ],
)
def test_a_damaged_checkpoint(checkpoint: Path, tmp_path: Path, command: str, file: str, content: bytes | None) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "OUT")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    before = tree(tmp_path)
    message = refuse(command, folder)
    assert str(folder) in message
    assert file in message or "gate" in message
    assert tree(tmp_path) == before


def test_where_nothing_can_be_written_what_is_there_is_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a mixture on a disk that is read alone, beside which a killed command has left its work."""
    folder, work = shutil.copytree(checkpoint, tmp_path / "OUT"), tmp_path / "OUT.partial"
    held(folder).lock.release()
    (folder / CHANGED).mkdir()

    def refused(_: Lock, **_given: float) -> bool:
        raise PermissionError(errno.EROFS, "Read-only file system", str(work))

    monkeypatch.setattr(Lock, "take", refused)
    assert open_checkpoint(folder).record == open_checkpoint(checkpoint).record
