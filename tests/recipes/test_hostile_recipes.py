"""A recipe that a stranger made to break: one of modekit's errors, soon, in few words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from conftest import Workshop
from modekit.errors import RecipeError
from modekit.planning.make import make_plan
from modekit.recipes.read import load_recipe, parse_recipe
from mutations import limited
from refusal import borrow, refuse

GOOD = "base_model: ./base\nexperts: [{name: law, model: ./law}]\nmixture: {router: {fit: random}}\n"


def refused(path: Path, text: str | bytes, *words: str) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with limited(), pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert len(message) < 5_000
    message.encode()
    for word in (str(path), *words):
        assert word in message, message
    return message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    "value",
    [
        "2001-99-99",
        "!!int x",
        "!!int ''",
        "!!bool x",
        "!!float x",
        "!!timestamp x",
        "!!map [a]",
        "!!binary é",
        "!!set [a]",
        "9" * 5_000,
        "-" + "9" * 5_000,
        "0x" + "f" * 9_000,
        '"\\ud800"',
        "!!python/object/apply:os.system [x]",
        "[" * 400,
        "{a: " * 400,
        "[" * 100_000,
        "*nobody",
        "&a [*a]",
    ],
    ids=lambda value: value[:12],
)
@pytest.mark.parametrize("key", ["base_model", "output", "zzz"])
def test_values_that_are_none(path: Path, key: str, value: str) -> None:
    refused(path, f"{GOOD}more: {{{key}: {value}}}\n", "not YAML")
    refused(path, f"{key}: {value}\n", "not YAML")


def test_a_key_that_is_half_a_character(path: Path) -> None:
    refused(path, '"\\ud800": 1\n' + GOOD, "not YAML")


def test_bombs_of_aliases(path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    refused(path, "\n".join(levels), "more than 262,144 characters")
    merges = ["a0: &a0 {k: v}"] + [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 60)]
    refused(path, "\n".join(merges), "more than 262,144 characters")
    long = f"a: &a '{'x' * 100_000}'\n" + GOOD + "eval: {law: [" + "*a, " * 1_000 + "]}\n"
    refused(path, long, "more than 262,144 characters")


def test_aliases_that_stand_for_little_are_fine(path: Path) -> None:
    path.write_text(GOOD.replace("name: law", "name: &name law") + "eval: {*name : [./law.txt]}\n")
    assert load_recipe(path).eval == {"law": ["./law.txt"]}


def test_files_of_any_size(path: Path) -> None:
    refused(path, "a: [" + "1, " * 300_000 + "]\n", "more than 262,144 bytes")
    refused(path, "# " + "x" * 2**20 + "\n" + GOOD, "more than 262,144 bytes")
    refused(path, "x" * 1_000_000)
    refused(path, "? " * 100_000 + "\n")
    refused(path, "- " * 100_000 + "\n")


def test_a_pipe_is_not_waited_for(path: Path, tmp_path: Path) -> None:
    os.mkfifo(path)
    for wait in (path, Path("/dev/zero")):
        with limited(), pytest.raises(RecipeError, match="cannot be read"):
            load_recipe(wait)


def test_thousands_of_problems_are_counted(path: Path) -> None:
    message = refused(path, GOOD + "".join(f"key{number}: 1\n" for number in range(20_000)), "20000 problems", "and 19980 more")
    assert message.count("unknown key") == 20
    refused(path, GOOD + f"{'k' * 1_000}: 1\n", "unknown key")
    refused(path, GOOD.replace("./base", f"[{'x' * 100_000}]"), "base_model")


def test_more_experts_than_a_mixture_can_have(path: Path) -> None:
    experts = "".join(f"- {{name: e{number}, model: base}}\n" for number in range(1_025))
    refused(path, f"base_model: ./base\nmixture: {{router: {{fit: random}}}}\nexperts:\n{experts}", "1024 experts at most")


@pytest.mark.parametrize("layers", ["0-99999999999", "0-" + "9" * 4_000, 10**12, "99999999999"])
def test_layers_without_end(tmp_path: Path, shared_workshop: Workshop, layers: object) -> None:
    bench = borrow(shared_workshop, tmp_path)
    bench.recipe["mixture"] = {**bench.recipe["mixture"], "layers": [layers]}
    with limited(), pytest.raises(RecipeError, match="there is no such layer"):
        make_plan(parse_recipe(bench.recipe), tmp_path)
    message = refuse("plan", bench.write())
    assert "mixture.layers" in message and len(message) < 6_000


@pytest.mark.parametrize("weights", [{"law": 1e308, "code": 1e308}, {"law": 10**400, "code": 1}])
def test_weights_whose_sum_is_endless(weights: dict[str, float]) -> None:
    experts = [{"name": name, "model": f"./{name}"} for name in weights]
    with pytest.raises(RecipeError, match="weights"):
        parse_recipe({"base_model": "./base", "experts": experts, "mixture": {"method": "linear", "weights": weights}})
