"""An adapter's regular expressions mean what `re` takes them for, and never take long."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_folders import write_adapter
from conftest import Workshop
from modekit.errors import SourceError
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.sources.adapter_config import parse_settings
from modekit.sources.patterns import ModulePatterns
from mutations import inputs, limited
from refusal import borrow

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp")
NAMES = [f"model.layers.{layer}.{part}" for layer in (0, 1, 12) for part in PARTS]
NAMES += ["lm_head", "model.embed_tokens", "model.norm", "", "model.layers.1.self_attn.q_proj\n", "MODEL.Q_PROJ"]
ATOMS = [
    "q_proj",
    "up_proj",
    "mlp",
    "layers",
    "model",
    r"\.",
    ".",
    ".*",
    ".*?",
    ".+",
    r"\d",
    r"\d+",
    "[0-9]",
    "[01]+",
    "[^.]*",
    r"[a-z_\d]+",
    "(q|k|v)_proj",
    "(?:self_attn|mlp)",
    "(?=m)",
    "(?!.*norm)",
    "(?<=_)",
    r"\b",
    "^",
    "$",
    r"\w+",
    r"\W",
    "(?i:MODEL)",
    "(a|b)?",
    "|",
    "x{0,2}",
    r"\d{1,2}",
    ".{3,}",
    "(?P<n>l)",
    "[]a]",
    "[^]]",
    r"[\]]",
    r"\Z",
    r"\A",
    r"\s",
    "é",
    "(?s:.)",
    "(?:o)*",
    "()",
    "_{2}",
]
HANGS = ["(a|a)*$", r"(?:[a-z]|\w)*[A-Z]", r"(.|a)*(.|\w)*\d", r"(?:(?:.|a)*|.)*[^-a]"]


@inputs(1_500)
@given(st.lists(st.sampled_from(ATOMS), min_size=1, max_size=6), st.sampled_from(NAMES))
def test_what_is_accepted_means_the_same(atoms: list[str], name: str) -> None:
    pattern = "".join(atoms)
    try:
        theirs = re.compile(pattern)
    except re.error:
        with pytest.raises(SourceError, match="no regular expression"):
            ModulePatterns().fullmatch(pattern, name)
        return
    patterns = ModulePatterns()
    assert patterns.fullmatch(pattern, name) == (theirs.fullmatch(name) is not None)
    ours, match = patterns.match(pattern, name), theirs.match(name)
    assert (ours is None) == (match is None)
    assert ours is None or match is None or (ours.span() == match.span() and ours.groups() == match.groups())
    assert patterns.ends(pattern, name) == (re.match(rf"(.*\.)?({pattern})$", name) is not None)


@pytest.mark.parametrize(
    "pattern", ["q_proj", "proj", "self_attn.q_proj", "1.mlp", "mlp", "", ".", "model.layers.1.mlp", "up.proj"]
)
@pytest.mark.parametrize("name", NAMES)
def test_plain_names_as_patterns(pattern: str, name: str) -> None:
    assert ModulePatterns().ends(pattern, name) == (re.match(rf"(.*\.)?({pattern})$", name) is not None)


@pytest.mark.parametrize("pattern", HANGS)
def test_a_pattern_that_would_hang_is_stopped(pattern: str) -> None:
    patterns = ModulePatterns("law: adapter_config.json", seconds=0.5)
    begin = time.perf_counter()
    with pytest.raises(SourceError) as caught:
        patterns.fullmatch(pattern, "a" * 70 + "-")
    assert time.perf_counter() - begin < 20
    assert "takes too long" in str(caught.value)
    assert pattern in str(caught.value) and "law: adapter_config.json" in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:",
        "[[:alpha:]]",
        "a{e<=1}",
        "a{b",
        "(?x)a # )",
        "(?#(a)b",
        "((((a?){99}){99}){99}){99}",
        "(a?){1000000}",
        r"\p{L}",
        "(?V1)a",
        "(?R)",
        "a{4294967296}",
        "(?:" * 5_000 + ")" * 5_000,
        "a{" + "9" * 5_000 + "}",
        "x" * 30_000,
        r"\L<x>",
        "(?|a|b)",
    ],
    ids=lambda pattern: pattern[:12],
)
def test_patterns_that_other_tools_take_otherwise_or_that_are_too_large(pattern: str) -> None:
    with limited(), pytest.raises(SourceError) as caught:
        ModulePatterns().fullmatch(pattern, "aaa")
    assert len(str(caught.value)) < 1_000


def test_thousands_of_plain_patterns_are_quick() -> None:
    names = [f"model.layers.{layer}.{part}_proj" for layer in range(100) for part in ("q", "k", "v", "o", "gate", "up", "down")]
    config = {"peft_type": "LORA", "target_modules": ["x"], "rank_pattern": dict.fromkeys(names, 8)}
    settings: Any = parse_settings(config, where="law")
    begin = time.process_time()
    assert [settings.rank(name) for name in names] == [8] * len(names)
    assert time.process_time() - begin < 10


HANG = r"(?:[a-z0-9_]|\w|[^A-Z]|[a-z.0-9])*[A-Z]"


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": HANG},
        {"exclude_modules": HANG},
        {"rank_pattern": {HANG: 4}},
        {"alpha_pattern": {HANG: 4}},
        {"modules_to_save": [HANG]},
        {"layers_to_transform": [0], "layers_pattern": HANG},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_no_pattern_hangs_a_plan(
    tmp_path: Path, shared_workshop: Workshop, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modekit.sources.patterns._SECONDS", 0.5)
    monkeypatch.setattr(ModulePatterns.__init__, "__defaults__", ("", 0.5, *ModulePatterns.__init__.__defaults__[2:]))
    bench = borrow(shared_workshop, tmp_path)
    write_adapter(tmp_path / "law", **changes)
    bench.recipe["experts"] = [bench.recipe["experts"][0], {"name": "law", "adapter": "./law"}]
    with limited(), pytest.raises(SourceError, match="takes too long"):
        make_plan(parse_recipe(bench.recipe), tmp_path)
