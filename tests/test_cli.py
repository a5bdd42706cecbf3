"""The command line on a whole walk, as a user would."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from conftest import Workshop

ROUTER = {"fit": "ridge", "tokens_per_domain": 600, "sequence_length": 32}


def modekit(workshop: Workshop, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "modekit", *arguments], cwd=workshop.root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_walk_from_recipe_to_results(workshop: Workshop) -> None:
    workshop.write(mixture={"method": "routing", "top_k": 2, "router": ROUTER})
    assert "MixtralForCausalLM" in modekit(workshop, "plan", "recipe.yaml")
    assert "router fitted" in modekit(workshop, "build", "recipe.yaml", "OUT")
    assert "proven" in modekit(workshop, "verify", "OUT")
    table = modekit(workshop, "eval", "OUT", "--tokens", "300", "--sequence-length", "32")
    assert "oracle" in table and "mixture" in table
    assert "logistic, fitted" in modekit(workshop, "fit", "OUT", "--fit", "logistic", "--temperature", "2")
    data = json.loads(modekit(workshop, "eval", "OUT", "--tokens", "300", "--sequence-length", "32", "--json"))
    assert [row["name"] for row in data["rows"]][-1] == "mixture"
    assert all(check["verdict"] == "proven" for check in json.loads(modekit(workshop, "verify", "OUT", "--json")))


def test_specialize(workshop: Workshop) -> None:
    done = modekit(
        workshop, "specialize", "base", "mine", "--text", "text/law.jsonl", "--steps", "2", "--sequence-length", "32"
    )
    assert "held-out loss" in done
    assert (workshop.root / "mine" / "model.safetensors").exists()


@pytest.mark.parametrize("command", ["", "plan", "build", "fit", "eval", "verify", "specialize", "demo", "schema"])
def test_help_of_every_command_starts_without_torch(command: str) -> None:
    script = (
        f"import sys; sys.argv = ['modekit', *{command!r}.split(), '--help']\n"
        "from modekit.cli import app\n"
        "try: app()\nfinally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Usage" in done.stdout, done.stderr
