"""A wrong recipe: every problem in one message, each with its key and what to do, before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from modekit.errors import RecipeError
from modekit.recipes.read import parse_recipe
from refusal import refuse, tree

EXPERTS = [{"name": "law", "model": "./law"}, {"name": "code", "model": "./code"}]
RANDOM = {"router": {"fit": "random"}}
WEIGHTS = {"law": 1.0, "code": 2.0}
GOOD: dict[str, Any] = {"base_model": "./base", "experts": EXPERTS, "mixture": RANDOM}


def refuse_recipe(folder: Path, recipe: object) -> list[str]:
    """Plan and build a recipe; the problems listed."""
    path = folder / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe), encoding="utf-8")
    planned = refuse("plan", path)
    assert refuse("build", path, folder / "OUT") == planned
    assert list(tree(folder)) == ["recipe.yaml"]
    assert str(path) in planned
    return [line.removeprefix("  - ") for line in planned.splitlines() if line.startswith("  - ")]


def with_mixture(**mixture: Any) -> dict[str, Any]:
    return {**GOOD, "mixture": mixture}


def with_router(**router: Any) -> dict[str, Any]:
    return with_mixture(router={**RANDOM["router"], **router})


def with_weights(**weights: float) -> dict[str, Any]:
    return with_mixture(method="linear", weights={**WEIGHTS, **weights})


def with_merge(method: str, **said: Any) -> dict[str, Any]:
    return with_mixture(**RANDOM, backbone={"method": method, **said})


def with_law(**said: Any) -> dict[str, Any]:
    return {**GOOD, "experts": [{**EXPERTS[0], **said}, EXPERTS[1]]}


NAMED = ("not a name", "letters, digits, '_', '.' and '-', 64 at most")
ONE_PROBLEM: list[tuple[str, dict[str, Any], list[str]]] = [
    ("misspelt key", {**GOOD, "expets": []}, ["expets: unknown key; did you mean 'experts'?"]),
    ("base for base_model", {**GOOD, "base": "./base"}, ["base: unknown key; did you mean 'base_model'?"]),
    ("misspelt key of an expert", with_law(modle="x"), ["experts[0].modle: unknown key; did you mean 'model'?"]),
    (
        "misspelt setting of a router",
        with_router(temprature=2),
        ["mixture.router.temprature: unknown key; did you mean 'temperature'?"],
    ),
    (
        "misspelt setting of a merge",
        with_merge("ties", densty=0.5),
        ["mixture.backbone.densty: unknown key; did you mean 'density'?"],
    ),
    ("unknown key", {**GOOD, "zzz": 1}, ["zzz: unknown key", "remove it"]),
    ("missing key", {"experts": EXPERTS, "mixture": RANDOM}, ["base_model: missing"]),
    ("no experts", {**GOOD, "experts": []}, ["experts", "at least 1"]),
    ("duplicate names", {**GOOD, "experts": [EXPERTS[0], EXPERTS[0]]}, ["experts", "two experts are named 'law'"]),
    ("name of something else", with_law(name="base"), ["experts", "cannot be named 'base'"]),
    ("name that is no file name", with_law(name="../law"), ["experts[0].name", "'../law'"]),
    ("unknown method", with_mixture(method="switch"), ["mixture.method: must be 'linear', 'gating' or 'routing'", "'switch'"]),
    ("unknown fit", with_router(fit="magic"), ["mixture.router.fit", "'centroid'", "'magic'"]),
    ("top_k over E", with_mixture(**RANDOM, top_k=3), ["mixture.top_k is 3", "only 2 experts"]),
    ("top_k of zero", with_mixture(**RANDOM, top_k=0), ["mixture.top_k", "greater than or equal to 1", "found 0"]),
    ("temperature of zero", with_router(temperature=0), ["mixture.router.temperature"]),
    ("1e-4 as YAML reads it", with_router(fit="auto", l2="1e-4"), ["mixture.router.l2: YAML takes", "like 1.0e-4", "'1e-4'"]),
    ("infinite temperature", with_router(temperature=float("inf")), ["mixture.router.temperature", "finite"]),
    ("router under linear", with_mixture(method="linear", **RANDOM), ["mixture: 'router' has no effect", "remove it"]),
    ("weights under routing", with_mixture(**RANDOM, weights=WEIGHTS), ["mixture: 'weights' has no effect", "remove it"]),
    ("top_k under gating", with_mixture(method="gating", top_k=2, **RANDOM), ["mixture: 'top_k' has no effect", "remove it"]),
    ("weights that miss an expert", with_mixture(method="linear", weights={"law": 1}), ["mixture.weights", "law, code"]),
    ("negative weight", with_weights(code=-1), ["mixture.weights.code: must be greater than or equal to 0"]),
    ("weights all zero", with_weights(law=0, code=0), ["mixture: 'weights'", "not all zero"]),
    ("weight that is no number", with_weights(code=float("nan")), ["mixture.weights.code", "finite"]),
    ("list of weights", with_mixture(method="linear", weights=[1, 3]), ["mixture.weights", "must be a valid dictionary"]),
    (
        "negative_prompts without centroid",
        with_law(negative_prompts=["x"]),
        ["'negative_prompts' have no effect", "remove them"],
    ),
    (
        "density under average",
        with_merge("average", density=0.5),
        ["mixture.backbone: 'density' has no effect with method 'average'", "remove it"],
    ),
    ("density out of range", with_merge("ties", density=2), ["mixture.backbone.density", "less than or equal to 1", "found 2"]),
    ("unknown backbone", with_mixture(**RANDOM, backbone="avrage"), ["mixture.backbone", "'average'", "'avrage'"]),
    (
        "backbone of a stranger",
        with_mixture(**RANDOM, backbone={"expert": "poetry"}),
        ["mixture.backbone.expert 'poetry'", "law, code"],
    ),
    (
        "merge of nothing",
        {**with_mixture(**RANDOM, backbone="ties"), "experts": [{"name": "x", "model": "base"}]},
        ["mixture.backbone cannot be merged", "every expert"],
    ),
    (
        "fit without text",
        with_router(fit="logistic"),
        [
            "router fit 'logistic' needs text",
            "law, code",
            "add experts[].text",
            "experts[].prompts",
            "fit: arrow",
            "text: self",
        ],
    ),
    ("unknown dtype", {**GOOD, "output": {"dtype": "int8"}}, ["output.dtype", "'bfloat16'", "'int8'"]),
    ("unknown size", {**GOOD, "output": {"shard_size": "5 parsecs"}}, ["output.shard_size", "not a size", "GB"]),
    ("a size of 400 digits", {**GOOD, "output": {"shard_size": f"{'9' * 400}GB"}}, ["output.shard_size", "not a size"]),
    ("endless size", {**GOOD, "output": {"shard_size": "infGB"}}, ["output.shard_size", "not a size"]),
    ("eval of a bad name", {**GOOD, "eval": {"a b": "./x.txt"}}, ["eval.a b: not a name"]),
    ("name of two words", with_law(name="a b"), ["experts[0].name", *NAMED]),
    ("name that is too long", with_law(name="a" * 65), ["experts[0].name", *NAMED]),
    ("label of two words", with_law(labels=["a b"]), ["experts[0].labels[0]", *NAMED]),
    ("text without a path", with_law(text=""), ["experts[0].text[0]", "at least 1"]),
    ("empty prompt", with_law(prompts=[""]), ["experts[0].prompts[0]", "at least 1"]),
    (
        "experts as a mapping",
        {**GOOD, "experts": {"law": "./law"}},
        ["experts: must be a list; write", "{name: law, model: ./law}"],
    ),
    ("a decay that is no list", with_router(fit="lexical", decay=0.95), ["router.decay: must be a list; write [0.95]"]),
    ("router by one word", with_mixture(router="lexical"), ["mixture.router", "must be a valid dictionary"]),
    ("expert without a path", {**GOOD, "experts": ["", EXPERTS[1]]}, ["experts[0]", "write ./law, or {name: law"]),
    ("expert by a number", {**GOOD, "experts": ["./law", 3]}, ["experts[1]", "neither a path nor a mapping of keys"]),
    ("misspelt fit", with_router(fit="lexicl"), ["mixture.router.fit", "did you mean 'lexical'?", "'lexicl'"]),
    ("misspelt method", with_mixture(method="routng", **RANDOM), ["mixture.method", "did you mean 'routing'?"]),
    ("misspelt part", with_mixture(modules=["corss_q"], **RANDOM), ["mixture.modules[0]", "did you mean 'cross_q'?"]),
]


@pytest.mark.parametrize(("recipe", "parts"), [case[1:] for case in ONE_PROBLEM], ids=[case[0] for case in ONE_PROBLEM])
def test_one_problem_is_one_line_that_names_its_key(tmp_path: Path, recipe: dict[str, Any], parts: list[str]) -> None:
    problems = refuse_recipe(tmp_path, recipe)
    assert len(problems) == 1, problems
    for part in parts:
        assert part in problems[0]
    assert "pattern" not in problems[0] and "[key]" not in problems[0]


def test_several_problems_are_reported_together(tmp_path: Path) -> None:
    recipe = {
        "base_modle": "./base",
        "experts": [{"name": "law"}, {"name": "code", "model": "./code", "text": 3}],
        "mixture": {"method": "gating", "top_k": 1, "weights": {"law": 1.0}, "router": {"l2": -1}},
        "output": {"dtype": "int8", "shard_size": "big"},
    }
    problems = refuse_recipe(tmp_path, recipe)
    places = [problem.split(":")[0] for problem in problems]
    assert places == [
        "base_model",
        "experts[0]",
        "experts[1].text",
        "mixture.router.l2",
        "output.dtype",
        "output.shard_size",
        "base_modle",
    ]


def test_settings_that_contradict_each_other_are_reported_together(tmp_path: Path) -> None:
    expert = {**EXPERTS[0], "negative_prompts": ["x"]}
    mixture = {"method": "gating", "top_k": 1, "weights": {"law": 1.0}}
    assert len(refuse_recipe(tmp_path, {**GOOD, "mixture": mixture})) == 2
    recipe = {
        **GOOD,
        "experts": [expert],
        "mixture": {"top_k": 3, "backbone": {"expert": "poetry"}, "router": {"fit": "logistic"}},
    }
    problems = refuse_recipe(tmp_path, recipe)
    assert len(problems) == 4
    for part in ("top_k is 3", "'poetry'", "needs text", "'negative_prompts'"):
        assert any(part in problem for problem in problems)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "not a mapping"),
        ("- base_model\n", "not a mapping"),
        ("base_model: [\n", "in recipe.yaml, line 2"),
        ("base_model: a\nbase_model: b\n", "'base_model' is given twice"),
        ("base_model: \x00\n", "not YAML"),
        ("base_model: a\nexperts:\n\t- law\n", "indent with spaces: YAML takes no tabs"),
    ],
    ids=["empty", "list", "open bracket", "key given twice", "binary", "tab"],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    message = refuse("build", path, tmp_path / "OUT")
    assert part in message
    assert str(path) in message
    assert list(tree(tmp_path)) == ["recipe.yaml"]


def test_a_recipe_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    assert "the recipe does not exist" in refuse("plan", tmp_path / "recipe.yaml")
    assert "this is a folder" in refuse("plan", tmp_path) and "Errno" not in refuse("plan", tmp_path)
    recipe = tmp_path / "recipe.yaml"
    assert str(recipe) not in refuse("plan", tmp_path)
    recipe.touch()  # as in a folder that `modekit mix` wrote
    assert f"give the path of {recipe}" in refuse("plan", tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"base_model: caf\xe9\n")
    assert "cannot be read" in refuse("plan", tmp_path / "latin.yaml")


def test_a_colon_in_place_of_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("base_model: a\nexperts: ['law:./law-lora']\n")
    assert "write law=./law-lora" in refuse("plan", tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("wrong", "home"), [({"mixture": {"fit": "random"}}, "router"), ({"top_k": 1}, "mixture"), ({"dtype": "source"}, "output")]
)
def test_a_key_in_the_wrong_place_is_told_where_it_belongs(wrong: dict[str, Any], home: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown key; it belongs in {home}"):
        parse_recipe({"base_model": "./base", "experts": EXPERTS, **wrong})
