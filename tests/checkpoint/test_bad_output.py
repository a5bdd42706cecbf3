"""A result that cannot be written, is interrupted, or is no checkpoint: the old folder stays, nothing new is left behind."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from conftest import Workshop, write_text
from modekit.building.build import build
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.errors import OutputError
from modekit.files.marker import CHANGED, Lock, WorkFolder
from modekit.planning.make import make_plan
from modekit.recipes.read import load_recipe
from refusal import borrow, checked, copy_expert, refuse, refuse_build, run_python, tree

FFN = "model.layers.2.mlp.down_proj.weight"
COMMAND = "import sys; from modekit.cli import main; sys.argv = ['modekit', *sys.argv[1:]]; main()"


@pytest.fixture
def bench(tmp_path: Path, shared_workshop: Workshop) -> Workshop:
    """A recipe over the shared models."""
    return borrow(shared_workshop, tmp_path)


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


def test_an_ordinary_file_is_never_overwritten(bench: Workshop) -> None:
    (bench.root / "OUT").write_text("mine")
    refuse_build(bench)
    assert "holds something else" in refuse_build(bench, "--overwrite")


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
        assert "cannot be written" in message
    assert tree(bench.root) == before


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250])
def test_a_name_that_the_file_system_refuses(bench: Workshop, name: str) -> None:
    recipe = bench.write()
    before = tree(bench.root)
    message = refuse("build", recipe, bench.root / name)
    assert "cannot be written" in message
    assert "File name too long" in message
    assert tree(bench.root) == before


def test_a_parent_that_is_not_writable(bench: Workshop) -> None:
    recipe = bench.write()
    locked = bench.root / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    # Root may write anywhere but into /proc.
    out = Path("/proc/modekit/OUT") if os.geteuid() == 0 and sys.platform == "linux" else locked / "OUT"
    message = refuse("build", recipe, out)
    assert str(out) in message
    assert "cannot be written" in message
    assert not list(locked.iterdir())


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


# A full disk, Ctrl-C


@pytest.mark.parametrize(("router", "limit"), [({"fit": "centroid"}, 60_000), ({"fit": "lexical"}, 40_000)])
def test_a_disk_that_fills_up_during_the_fit(bench: Workshop, router: dict[str, Any], limit: int) -> None:
    texts = write_text(bench.root / "long", documents=400)  # of which a lexical fit keeps more than the limit
    experts = [{**expert, "text": str(texts[expert["name"]])} for expert in bench.recipe["experts"]]
    recipe = bench.write(output={"shard_size": "20KB"}, mixture={"router": router}, experts=experts)
    before = tree(bench.root)
    done = run_python(
        COMMAND,
        "build",
        recipe,
        bench.root / "OUT",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    message = checked(done.returncode, done.stdout, done.stderr)
    assert "File too large" in message
    assert tree(bench.root) == before


@pytest.mark.parametrize(("moment", "exists"), [("write_tensor", False), ("write_index", True), ("fit_router", True)])
def test_ctrl_c(bench: Workshop, moment: str, exists: bool) -> None:
    if exists:
        bench.build()
    recipe = bench.write()
    before = tree(bench.root)
    interrupt = (
        "import os, signal, threading, modekit.building.build, modekit.files.staging\n"
        f"real = modekit.building.build.{moment}\n"
        "def interrupted(*args, **kwargs):\n"
        "    result = real(*args, **kwargs)\n"
        "    if threading.current_thread() is threading.main_thread():\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return result\n"
        f"modekit.building.build.{moment} = interrupted\n"
    )
    done = run_python(
        interrupt + COMMAND,
        "build",
        recipe,
        bench.root / "OUT",
        *(["--overwrite"] if exists else []),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    message = checked(done.returncode, done.stdout, done.stderr, expected=130)
    assert "interrupted; nothing was left behind" in message
    assert tree(bench.root) == before


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


@pytest.mark.parametrize("command", COMMANDS)
def test_a_record_that_was_edited(checkpoint: Path, tmp_path: Path, command: str) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "OUT")
    record = json.loads((folder / "modekit.json").read_text())
    for key, value in (("native_type", "switch"), ("recipe", {}), ("format", 3), ("unknown", 1)):
        (folder / "modekit.json").write_text(json.dumps({**record, key: value}))
        assert "modekit.json" in refuse(command, folder)


def test_a_linear_checkpoint_opens_again(bench: Workshop) -> None:
    for mixture in (
        {"method": "linear"},
        {"method": "linear", "weights": {"medicine": 1, "law": 2, "code": 3}},
        {"method": "gating", "router": {"fit": "random"}, "backbone": {"method": "average"}},
        {"router": {"fit": "random"}, "backbone": {"method": "ties", "density": 0.5}},
    ):
        checkpoint = open_checkpoint(bench.build(mixture=mixture))
        assert checkpoint.record.recipe.digest() == checkpoint.record.recipe_digest
        assert checkpoint.config["num_experts_per_tok"] == checkpoint.record.recipe.top_k


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
