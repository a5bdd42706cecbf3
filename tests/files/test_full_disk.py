"""A disk that is full: the command says so, and where; nothing has changed, and nothing is left behind."""

from __future__ import annotations

import os
import re
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from command_line import ended, modekit
from conftest import Workshop
from kills import exit_code, watched
from modekit.planning.make import make_plan
from modekit.planning.room import disk_needed
from modekit.recipes.read import load_recipe
from refusal import borrow, refuse, tree

FEW = ("--tokens", "200")
SHORT = ("steps=3", "batch_tokens=256", "sequence_length=64", "select_tokens=200")
COMMANDS: dict[str, tuple[Sequence[str], int]] = {
    "build": (("build", "recipe.yaml", "NEW"), 5_000),
    "build over": (("build", "recipe.yaml", "OUT", "--overwrite"), 20_000),
    "fit": (("fit", "OUT", "fit=centroid"), 3_000),
    "eval": (("eval", "OUT", *FEW), 1_000),
    "inspect": (("inspect", "OUT", *FEW), 1_000),
    "report": (("report", "OUT"), 4_000),
    "train": (("train", "OUT", "what=experts", "backbone_learning_rate=0.01", *SHORT, *FEW), 60_000),
    "specialize": (("specialize", "BASE", "NEW", "--text", "TEXT", "steps=1"), 20_000),
    "specialize with a teacher": (
        ("specialize", "BASE", "NEW", "--text", "TEXT", "steps=2", "--teacher", "MODEL"),
        20_000,
    ),
    "data balance": (("data", "balance", "NEW", "--tokenizer", "BASE", "--text", "a=TEXT", "--text", "b=OTHER"), 500),
    "data tokenizer": (("data", "tokenizer", "NEW", "--vocabulary", "300", "--text", "a=TEXT"), 4_000),
    "extract": (("extract", "MODEL", "NEW", "--base", "BASE", "--rank", "2"), 1_000),
}
"""What a user types, and how many bytes a file may have."""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, small_workshop: Workshop) -> Workshop:
    made = borrow(small_workshop, tmp_path_factory.mktemp("full"), 2)
    made.build()
    return made


def run_on_a_full_disk(root: Path, words: Sequence[str], limit: int) -> tuple[int, str]:
    """The command in a process whose files may not grow beyond a limit; exit code and what it said of an error."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.chdir(root)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            code, _, stderr = ended(*words)
            os.write(writing, stderr.encode()[-4000:])
            os._exit(int(str(code)))
        except BaseException:
            os._exit(99)
    os.close(writing)
    with watched(process), os.fdopen(reading, "rb") as stream:
        said = stream.read().decode()
    return exit_code(process), said


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(shop: Workshop, tmp_path: Path, name: str) -> None:
    words, limit = COMMANDS[name]
    expert = shop.recipe["experts"][0]
    paths = {"BASE": shop.recipe["base_model"], "MODEL": expert["model"], "TEXT": expert["text"]}
    paths |= {"a=TEXT": f"a={expert['text']}", "b=OTHER": f"b={shop.recipe['experts'][1]['text']}"}
    root = shutil.copytree(shop.root, tmp_path / "root")
    before = tree(root)
    code, said = run_on_a_full_disk(root, [paths.get(word, word) for word in words], limit)
    assert code == 2, said
    assert "File too large" in said or "is the disk full?" in said
    assert re.search(rf"\n  where:    {re.escape(str(root))}/\S", said), said
    after = tree(root)
    kept = {path for path in after if path.split("/")[0] in {"OUT.training", "NEW.training"}}  # to go on from
    assert {path: content for path, content in after.items() if path not in kept} == before
    assert not [path for path in kept if ".tmp" in path]


def let_be_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_a_build_for_which_there_is_no_room_is_not_begun(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = shop.write()
    needed, out = disk_needed(make_plan(load_recipe(recipe), shop.root)), tmp_path / "OUT"
    with monkeypatch.context() as patch:
        let_be_free(patch, needed - 1)
        said = refuse("build", recipe, out)
        assert f"found:    {needed - 1:,} bytes free" in said
        assert f"expected: {needed:,} bytes" in said
        assert "free 1 bytes" in said
        assert str(out) in said
        assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        let_be_free(patch, needed)
        modekit("build", recipe, out)
