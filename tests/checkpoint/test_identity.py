"""A mixture is named by its bytes: what was found out about other weights, gates or settings is never shown as its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import modekit
from adapter_folders import lora, write_adapter
from conftest import Workshop, save, tiny_model, write_text
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.inspection.inspect import inspect
from modekit.evaluation.inspection.result import Inspection
from modekit.evaluation.results import Results
from modekit.evaluation.tasks.results import TaskResults
from modekit.members.change import write_change
from modekit.members.edits import NewExpert, replace_expert
from modekit.training.folder import TrainingFolder, state_of
from refusal import borrow, copy_expert

FINDERS = (Results.find, Inspection.find, TaskResults.find)


def other_weights(folder: Path, factor: float = 1.5) -> None:
    """A model or adapter of other numbers under the same path, in files of the same size."""
    file = next(iter(sorted(folder.glob("*.safetensors"))))
    save_file({name: tensor * factor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.fixture
def bench(small_workshop: Workshop, tmp_path: Path) -> Workshop:
    bench = borrow(small_workshop, tmp_path)
    copy_expert(bench, 1)
    return bench


def replaced(bench: Workshop, out: Path) -> None:
    before = open_checkpoint(out)
    new = NewExpert({"model": "./law", "text": bench.recipe["experts"][1]["text"]}, bench.root)
    write_change(before, replace_expert(before, "law", new), out)


def built_again(bench: Workshop, out: Path) -> None:
    modekit.build(modekit.plan(bench.write(), root=bench.root), out, overwrite=True)


@pytest.mark.parametrize("anew", [replaced, built_again])
def test_new_weights_under_the_same_path_are_another_mixture(bench: Workshop, anew: Callable[[Workshop, Path], None]) -> None:
    out = bench.build()
    before = open_checkpoint(out)
    other_weights(bench.root / "law")
    anew(bench, out)
    after = open_checkpoint(out)
    assert after.record.recipe_digest == before.record.recipe_digest
    assert after.record.router.sha256 == before.record.router.sha256  # a random router does not depend on the experts
    assert after.identity != before.identity


def test_what_was_found_out_before_is_not_shown_after(bench: Workshop) -> None:
    out = bench.build()
    before = open_checkpoint(out)
    scored = losses(before)
    inspect(before, tokens_per_domain=100, sequence_length=32)
    TaskResults({}, notes=["of before"], checkpoint=before.identity).write(before)
    problems: list[str] = []
    assert all(find(before, problems) for find in FINDERS) and not problems
    other_weights(bench.root / "law")
    replaced(bench, out)
    after = open_checkpoint(out)
    assert (out / "results" / "inspect.json").exists()
    for find in FINDERS:
        assert find(after, problems) is None
    assert len(problems) == 3
    assert {name for name, found in losses(after).items() if found == scored[name]} == {"base", "medicine", "code"}


def test_an_adapter_with_another_scale_is_another_mixture(tmp_path: Path) -> None:
    """The weights are the same; what adapter_config.json makes of them is not. In a native mixture no name and shape tells."""
    save(tiny_model(), tmp_path / "base")
    texts = write_text(tmp_path / "text", ("medicine", "law"))
    experts = [{"name": name, "adapter": f"./{name}", "as": "full", "text": str(text)} for name, text in texts.items()]
    for seed, name in enumerate(texts):
        write_adapter(tmp_path / name, lora("mlp.up_proj", 48, 32, seed=seed), lora_alpha=8)
    mixture: dict[str, Any] = {"top_k": 1, "router": {"fit": "random"}}
    recipe = {"base_model": "./base", "experts": experts, "mixture": mixture, "output": {"format": "plain"}}
    identities = []
    for alpha in (8, 16):
        write_adapter(tmp_path / "law", lora("mlp.up_proj", 48, 32, seed=1), lora_alpha=alpha)
        modekit.build(modekit.plan(recipe, root=tmp_path), tmp_path / "OUT", overwrite=True)
        identities.append(open_checkpoint(tmp_path / "OUT").identity)
    assert identities[0]["recipe_digest"] == identities[1]["recipe_digest"]
    assert identities[0] != identities[1]


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_file_beside_the_weights_belongs_to_it(bench: Workshop, file: str) -> None:
    out = bench.build()
    before = open_checkpoint(out).identity
    said = json.loads((out / file).read_text())
    said["max_length" if file != "tokenizer.json" else "truncation"] = 7 if file != "tokenizer.json" else None
    said["version"] = "1.1"
    (out / file).write_text(json.dumps(said))
    assert open_checkpoint(out).identity != before


def losses(checkpoint: Checkpoint) -> dict[str, dict[str, float]]:
    rows = evaluate(checkpoint, tokens_per_domain=100, sequence_length=32).rows
    return {row.name: {domain: score.loss for domain, score in row.scores.items()} for row in rows}


def test_a_shard_of_the_mixture_that_changed_is_scored_and_put_back_is_too(bench: Workshop) -> None:
    """The mixture that is there is scored, whatever modekit.json says that it was made from."""
    out = bench.build()
    before = open_checkpoint(out)
    expected, identity = losses(before), before.identity
    shard = next(iter(sorted(out.glob("model-expert-*.safetensors"))))
    kept = shard.read_bytes()
    save_file({name: tensor * 0.1 for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    changed = open_checkpoint(out)
    assert changed.identity != identity and not Results.read(changed).belongs_to(changed)
    found = losses(changed)
    assert {name for name in found if found[name] != expected[name]} == {"oracle", "mixture"}
    shard.write_bytes(kept)
    again = open_checkpoint(out)
    assert again.identity == identity and losses(again) == expected


def test_another_tokenizer_makes_every_row_anew(bench: Workshop) -> None:
    out = bench.build()
    before = {row.name: row.identity for row in evaluate(open_checkpoint(out), tokens_per_domain=100, sequence_length=32).rows}
    (out / "tokenizer.json").write_text((out / "tokenizer.json").read_text() + "\n")
    after = {row.name: row.identity for row in evaluate(open_checkpoint(out), tokens_per_domain=100, sequence_length=32).rows}
    assert before.keys() == after.keys() and not set(before.values()) & set(after.values())


def test_a_training_of_other_weights_is_not_gone_on_with(bench: Workshop) -> None:
    out = bench.build()
    folder = TrainingFolder(bench.root / "TRAINED")

    def take() -> None:
        folder.take("a request", state_of(open_checkpoint(out)))

    take()
    (folder.path / "checkpoint-1").mkdir()
    take()  # the same mixture: it goes on
    other_weights(bench.root / "law")
    built_again(bench, out)
    with pytest.raises(modekit.ModekitError, match="what it started from is no longer the same"):
        take()
