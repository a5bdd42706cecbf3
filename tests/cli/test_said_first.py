"""What is wrong with the models is said before anything is written, in lines of 80 columns."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_folders import lora, write_adapter
from command_line import ended
from conftest import Workshop, save, tiny_model
from modekit.cli import printing, shell
from modekit.cli.printing import console_for
from refusal import tree

RANDOM = {"router": {"fit": "random"}}


@pytest.fixture
def bench(tmp_path: Path, small_workshop: Workshop) -> Workshop:
    """Base, a fine-tune that lies near it, and an adapter, each with a text of its own."""
    for name in ("base", "text"):
        shutil.copytree(small_workshop.root / name, tmp_path / name)
    near = tiny_model(num_hidden_layers=1)
    for parameter in near.parameters():
        parameter.data.mul_(1.1)
    save(near, tmp_path / "law")
    write_adapter(tmp_path / "code", lora("mlp.up_proj", 48, 32, layers=1, seed=1))
    experts = [
        {"name": name, key: f"./{name}", "text": f"./text/{name}.jsonl"}
        for name, key in (("law", "model"), ("code", "adapter"))
    ]
    return Workshop(tmp_path, {"base_model": "./base", "experts": experts, "mixture": RANDOM})


def a_stranger(bench: Workshop) -> None:
    save(tiny_model(seed=77, num_hidden_layers=1), bench.root / "law")


def no_tokenizer(bench: Workshop) -> None:
    for name in ("base", "law"):
        for file in (bench.root / name).glob("*token*"):
            file.unlink()


def other_merges(bench: Workshop) -> None:
    """As in the days before tokenizer.json."""
    for name, merges in (("base", "b c\na b"), ("law", "a b\nb c")):
        (bench.root / name / "tokenizer.json").unlink()
        (bench.root / name / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}))
        (bench.root / name / "merges.txt").write_text(f"#version: 0.2{' of ' + name}\n{merges}\n")


def one_text(bench: Workshop) -> None:
    shutil.copyfile(bench.root / "text" / "law.jsonl", bench.root / "text" / "code.jsonl")


WRONG: dict[str, tuple[Callable[[Workshop], None], str]] = {
    "a stranger": (a_stranger, "was it made from this base?"),
    "no tokenizer": (no_tokenizer, "base_model: its folder has no tokenizer"),
    "one text": (one_text, "law and code have one text"),
}


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is drawn on the standard error of a terminal of 80 columns."""
    drawn = io.StringIO()
    monkeypatch.setattr(printing, "err", console_for(file=drawn, width=80, force_terminal=True, color_system=None))
    return drawn


@pytest.mark.parametrize("name", WRONG)
def test_a_note_comes_before_the_first_byte(
    bench: Workshop, terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    change, message = WRONG[name]
    said_before = list[str]()
    monkeypatch.setattr("modekit.building.build.staging", lambda *_, **__: said_before.append(terminal.getvalue()) or 1 / 0)
    ended("build", bench.write(), bench.root / "OUT")
    assert message not in " ".join(said_before[0].split())
    change(bench)
    ended("build", bench.write(), bench.root / "OUT")
    assert message in " ".join(said_before[1].split()), said_before[1]
    assert all(len(line) <= 80 for line in said_before[1].splitlines())
    assert message in " ".join(ended("plan", bench.write())[1].split())


def test_what_cannot_be_mixed_is_refused(bench: Workshop, terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "has the same tokens as the base model's but joins them by other merges"
    other_merges(bench)
    before, recipe = tree(bench.root), bench.write()
    monkeypatch.setattr(shell, "err", printing.err)
    code, stdout, _ = ended("build", recipe, bench.root / "OUT")
    said = terminal.getvalue()
    assert code == 2 and stdout == "" and message in " ".join(said.split())
    assert all(len(line) <= 80 for line in said[said.index("error:") :].splitlines())
    recipe.unlink()
    assert tree(bench.root) == before
