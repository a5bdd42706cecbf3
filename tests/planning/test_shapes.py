"""The two shapes of result are asked alike: nobody else asks which it is, or takes names and configs apart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import modekit
from conftest import Workshop
from modekit.checkpoint.open import open_checkpoint
from modekit.loaded.load import load_model
from modekit.loaded.native import NativeMixture
from modekit.loaded.shapes import ModekitMixture, mixture_of
from modekit.planning.mixture_config import MixtureConfig
from modekit.planning.modekit_shape import ModekitShape
from modekit.planning.native_shape import NativeShape
from modekit.planning.plan import open_shape
from modekit.recipes.read import load_recipe

SOURCE = Path(modekit.__file__).parent
ADDED = {"router": {"fit": "random", "granularity": "context", "decay": [0.5, 0.9]}}


def lines_with(pattern: str, allowed: set[str]) -> Iterator[str]:
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(pattern, line) and not any(name.startswith(each) for each in allowed):
                yield f"{name}:{number}: {line.strip()}"


def test_nobody_asks_which_shape_it_is() -> None:
    """But the planner, which chooses, and the shapes themselves."""
    shapes = {f"{room}/{name}.py" for room, names in _SHAPES.items() for name in names}
    assert not list(
        lines_with(r"native(_type)? is (not )?None|isinstance\([^)]*Shape\b", {"planning/make.py", "planning/plan.py", *shapes})
    )
    assert not list(lines_with(r"(checkpoint|plan)\.native\b", set()))


_SHAPES = {"planning": ("native_shape", "modekit_shape"), "loaded": ("native", "modekit")}


def test_nobody_reads_the_raw_config_of_a_mixture() -> None:
    """But the shape that opens it, and the code that is copied into checkpoints and knows nothing of modekit."""
    assert not list(
        lines_with(
            r"""^[^"#`]*(config|dict)\w*(\["modekit"\]|\.get\("modekit")""",
            {"planning/modekit_shape.py", "sources/towers.py", "architecture/"},
        )
    )


def test_names_of_layers_are_taken_apart_in_one_place() -> None:
    code = r"""^(?!\s*(\"\"\"|#)).*(model\\?\.layers\\?\.[{(\\]|["']model\.embed_tokens|["']lm_head)"""
    assert not list(lines_with(code, {"sources/names.py", "architecture/"}))


@pytest.mark.parametrize("kind", ["plain", "modekit"])
def test_a_plan_says_what_its_checkpoint_says(bench: Workshop, kind: str) -> None:
    changes = {"mixture": {"top_k": 2, "router": {"fit": "random"}}, "output": {"format": kind}}
    checkpoint = open_checkpoint(bench.build(**changes))
    plan = bench.plan(**changes)
    ours, theirs = plan.shape, checkpoint.shape
    assert type(ours) is type(theirs) is {"plain": NativeShape, "modekit": ModekitShape}[kind]
    assert ours.plain == (kind == "plain") and dict(ours.config) == dict(theirs.config)
    assert (ours.slots, ours.positions, ours.routing) == (theirs.slots, theirs.positions, theirs.routing)
    counted, planned = checkpoint.parameters, plan.parameters()
    assert (counted.total, counted.active) == (planned["total"], planned["active"])
    loaded = mixture_of(load_model(checkpoint.folder), checkpoint)
    assert type(loaded) is {"plain": NativeMixture, "modekit": ModekitMixture}[kind]
    assert [tuple(gate.shape) for gate in loaded.gates()] == [slot.shape for slot in ours.slots]


def test_another_routing_is_another_checkpoint(bench: Workshop) -> None:
    """Nothing is written into the one that was asked."""
    checkpoint = open_checkpoint(bench.build(output={"format": "modekit"}))
    before = dict(checkpoint.config)
    held = set(vars(checkpoint))
    changed = checkpoint.with_recipe(load_recipe(bench.write(mixture=ADDED, output={"format": "modekit"})))
    assert changed.config != before and len(changed.shape.routing.averages) == 2
    assert changed.slots[0].parts == 2
    assert dict(checkpoint.config) == before and set(vars(checkpoint)) == held


def test_a_mixture_config_is_written_as_it_was_read(bench: Workshop) -> None:
    """Key by key: what was not set is not written."""
    checkpoint = open_checkpoint(bench.build(mixture=ADDED, output={"format": "modekit"}))
    written = checkpoint.config["modekit"]
    assert "biased" not in next(iter(written["places"].values())) and "ngram" not in written["routing"]
    assert MixtureConfig.model_validate(written).as_written() == written
    again = checkpoint.shape.rerouted(checkpoint.record.recipe, checkpoint.tensors)
    assert again.config == checkpoint.config


def test_a_row_of_the_table_opens_what_a_record_names(bench: Workshop) -> None:
    checkpoint = open_checkpoint(bench.build(output={"format": "plain"}))
    record = checkpoint.record
    shape = open_shape(checkpoint.config, record.recipe, "here", record.native_type, record.dense_config, None)
    assert (
        isinstance(shape, NativeShape)
        and shape.native_type == "mixtral"
        and shape == checkpoint.shape.__class__(checkpoint.config, record.recipe, "here", shape.native)
    )
