"""The command line on a whole walk, as a user would."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from command_line import modekit as here
from conftest import Workshop

ROUTER = {"fit": "logistic", "tokens_per_domain": 600, "sequence_length": 32}


def modekit(workshop: Workshop, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "modekit", *arguments], cwd=workshop.root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_walk_from_recipe_to_results(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first steps in processes of their own, as a user types them; the others without the seconds that one takes."""
    workshop.write(mixture={"method": "routing", "top_k": 2, "router": ROUTER})
    assert "MixtralForCausalLM" in modekit(workshop, "plan", "recipe.yaml")
    assert "router logistic, fitted" in modekit(workshop, "build", "recipe.yaml", "OUT")
    table = modekit(workshop, "eval", "OUT", "--tokens", "300", "--sequence-length", "32")
    assert "oracle" in table and "mixture" in table
    monkeypatch.chdir(workshop.root)
    assert "proven" in here("verify", "OUT")
    assert "logistic, fitted, method routing, top_k 2" in here("fit", "OUT", "fit=logistic", "temperature=2")
    data = json.loads(here("eval", "OUT", "--tokens", "300", "--sequence-length", "32", "--json"))
    assert [row["name"] for row in data["rows"]][-1] == "mixture"
    assert all(check["verdict"] == "proven" for check in json.loads(here("verify", "OUT", "--json")))


def test_specialize(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop.root)
    done = here("specialize", "base", "mine", "--text", "text/law.jsonl", "steps=2", "sequence_length=32")
    assert "held-out loss" in done
    assert (workshop.root / "mine" / "model.safetensors").exists()


COMMANDS = (
    "",
    "plan",
    "build",
    "fit",
    "eval",
    "verify",
    "specialize",
    "extract",
    "export",
    "demo",
    "push",
    "data",
    "data balance",
    "data tokenizer",
)


def test_help_of_every_command_starts_without_torch() -> None:
    """One after the other in one process, which whatever one of them imports would stay in."""
    script = f"""
import sys
from modekit.cli import app
for command in {COMMANDS!r}:
    sys.argv = ["modekit", *command.split(), "--help"]
    try:
        app()
    except SystemExit as end:
        assert not end.code, command
    assert not {{"torch", "transformers"}} & set(sys.modules), command
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("Usage") == len(COMMANDS), done.stderr
