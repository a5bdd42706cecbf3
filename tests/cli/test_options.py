"""Options as dataclasses, and the commands that are made of them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modekit.cli.training as training
from command_line import ended, modekit
from conftest import Workshop
from modekit.cli.shell import app
from modekit.cli.words import SETTINGS, described, said_in
from modekit.errors import ModekitError
from modekit.recipes.edit import changes_of
from modekit.training.settings import given_settings
from refusal import borrow


def test_a_field_without_a_default_is_an_option_that_must_be_given(tmp_path: Path) -> None:
    message = " ".join(ended("mix", tmp_path, tmp_path)[2].split())
    assert "Missing option '--out'" in message and "object at" not in message
    assert "MISSING" not in modekit("mix", "--help") and "[required]" in modekit("mix", "--help")


def test_a_misspelt_choice_is_answered_with_those_that_are(tmp_path: Path) -> None:
    message = " ".join(refuse_usage("eval", tmp_path, "--labels", "tags").split())
    assert "'--labels': 'tags' is not one of 'gate', 'tag'" in message
    assert "Value error" not in message


def refuse_usage(*args: object) -> str:
    """The message about options that could not be read."""
    code, stdout, stderr = ended(*args)
    assert (code, stdout) == (2, "") and "to do:" in stderr
    return stderr


def test_no_command_takes_more_than_six_parameters() -> None:
    groups = [each.typer_instance for each in app.registered_groups if each.typer_instance is not None]
    for command in [each for group in (app, *groups) for each in group.registered_commands]:
        assert command.callback is not None
        written = inspect.unwrap(command.callback, stop=lambda each: not hasattr(each, "__wrapped__"))
        count = written.__code__.co_argcount + written.__code__.co_kwonlyargcount
        assert count <= 6, f"{command.name or written.__name__}: {count}"


def test_the_version_is_said_without_torch() -> None:
    script = (
        "import sys; sys.argv = ['modekit', '--version']\nfrom modekit.cli import main\n"
        "try: main()\nfinally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("modekit 0.")


def test_a_build_says_what_it_wrote(shared_workshop: Workshop, tmp_path: Path) -> None:
    workshop = borrow(shared_workshop, tmp_path)
    router = {"fit": "logistic", "tokens_per_domain": 300, "sequence_length": 32}
    recipe = workshop.write(mixture={"method": "routing", "top_k": 2, "router": router})
    code, stdout, stderr = ended("build", recipe, tmp_path / "my OUT")
    assert code == 0
    said = next(line for line in stdout.splitlines() if not line.startswith(("note: ", "next: ")))
    after = stdout.splitlines()[-1]
    assert "router logistic, fitted" in said
    assert after.startswith(f"next: modekit eval '{tmp_path / 'my OUT'}' --tokens ")  # as a shell reads it
    # Progress went beside it, and counts the text of all domains together.
    stages = [line for line in stderr.splitlines() if "  read " in line]
    assert [line.split()[2].rstrip(":") for line in stages] == ["medicine", "law", "code"]
    shares = [int(line.split(": ")[1].split(" %")[0]) for line in stages]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] >= 65  # each is said before its text is read
    assert "logistic, fitted, method routing, top_k 2" in modekit("fit", tmp_path / "my OUT", "fit=logistic", "temperature=2")


def test_a_specialisation_says_its_losses(small_workshop: Workshop, tmp_path: Path) -> None:
    said = ("--text", small_workshop.root / "text" / "law.jsonl", "steps=2", "sequence_length=32")
    assert "held-out loss" in modekit("specialize", small_workshop.root / "base", tmp_path / "mine", *said)


def test_words_of_fit_are_changes_of_the_mixture() -> None:
    assert changes_of(said_in(None, "fit")) == {}
    words = ["method=routing", "fit=logistic", "top_k=1", "l2=0.5", "decay=[0.9]", "chat=false"]
    router = {"fit": "logistic", "l2": 0.5, "decay": [0.9], "chat": False}
    assert changes_of(said_in(words, "fit")) == {"method": "routing", "top_k": 1, "router": router}


def test_words_of_train_are_settings() -> None:
    said = given_settings(training.train_words(["losses=lm=2,z", "what=routers", "select_tokens=128"]), None)
    wanted = {"losses": {"lm": 2.0, "z": 0.001}, "what": ["routers"], "select_tokens": 128}
    assert said.model_dump(exclude_unset=True) == wanted
    for word, hint in (
        ("step=3", "did you mean 'steps'?"),
        ("--steps", "did you mean 'steps'?"),
        ("batch-tokens=1", "batch_tokens"),
        ("losses=[1]", "one of lm, forward_kl"),
    ):
        with pytest.raises(ModekitError, match=re.escape(hint)):
            given_settings(training.train_words([word]), None)


@pytest.mark.parametrize("words", [["--device", "cuda"], ["--device=cuda"]])
def test_a_device_may_stand_anywhere_and_one_that_is_not_there_is_said(
    words: list[str], small_workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEKIT_DEVICE", "cpu")  # given back afterwards
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = ("--text", small_workshop.root / "text" / "law.jsonl", "steps=1", "sequence_length=32")
    code, _, stderr = ended("specialize", *words, small_workshop.root / "base", tmp_path / "mine", *said)
    assert code == 2 and "torch finds no such device here" in stderr and "expected: auto, cpu" in stderr
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("value", ["2001-99-99", "9" * 5_000, "[" * 3_000, "[1"], ids=["date", "digits", "depth", "open"])
def test_a_value_that_is_none_is_said(value: str) -> None:
    with pytest.raises(ModekitError, match="the value cannot be read"):
        training.train_words([f"steps={value}"])


def test_a_setting_is_given_once() -> None:
    with pytest.raises(ModekitError, match="a setting is given twice"):
        training.train_words(["steps=1", "steps=2"])


@pytest.mark.parametrize("command", [*SETTINGS])
def test_help_lists_the_settings_that_a_command_takes(command: str) -> None:
    keys = [line.partition(":")[0].partition(" (")[0] for line in described(command).split("\n\n")[1:]]
    assert keys and "model" not in keys and "text" not in keys
    for key in keys:
        assert said_in([f"{key}=1"], command) == {key: 1}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("sum", "steps=9"), "--by distil"),
        (("best", "--scale", "0.5"), "--by sum or distil"),
    ],
)
def test_densify_says_which_merge_reads_an_option(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    message = refuse_usage("densify", tmp_path, tmp_path / "DENSE", "--by", *options)
    assert f"where:    {options[1].partition('=')[0]}\n" in message and f"expected: {said}\n" in message
