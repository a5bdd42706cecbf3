"""Models that changed since a mixture was built are noticed before they are scored, and said; nothing of them is kept."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import modekit
from adapter_folders import lora, write_adapter
from conftest import Workshop, save, tiny_model, write_text
from domain_mixtures import adapter_experts, built
from modekit.building.verify import is_proven
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.checkpoint.sources import why_not
from modekit.errors import ModekitError, TrainingError
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.inspection.inspect import inspect_text
from modekit.evaluation.inspection.likeness import similarity
from modekit.evaluation.results import Results
from modekit.members.admission import measure_admission
from modekit.members.change import before_change, write_change
from modekit.members.edits import NewExpert, add_expert
from modekit.sources import digests
from modekit.training.train import train
from refusal import borrow, copy_base, copy_expert
from trained import short_settings

CHANGED = "has changed since the mixture was built"


@pytest.fixture
def bench(small_workshop: Workshop, tmp_path: Path) -> Workshop:
    """With a base and an expert of its own."""
    bench = borrow(small_workshop, tmp_path / "bench")
    copy_base(bench)
    copy_expert(bench, 1)
    return bench


def change(folder: Path, factor: float = 1.2) -> None:
    """Other numbers in a file of the same size, with the time that the file had."""
    file = next(iter(sorted(folder.glob("*.safetensors"))))
    before = file.stat()
    save_file({name: tensor * factor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def scores(checkpoint: Checkpoint) -> Results:
    return evaluate(checkpoint, tokens_per_domain=100, sequence_length=32)


def losses(results: Results) -> dict[str, list[float]]:
    return {row.name: [score.loss for score in row.scores.values()] for row in results.rows}


def test_an_expert_that_changed_is_left_out_and_comes_back(bench: Workshop) -> None:
    checkpoint = open_checkpoint(bench.build())
    before = losses(scores(checkpoint))
    kept = shutil.copytree(bench.root / "law", bench.root / "kept")
    (checkpoint.folder / "results" / "eval.json").unlink()
    change(bench.root / "law")
    found = scores(checkpoint)
    said = next(note for note in found.notes if CHANGED in note)
    assert "experts[1] 'law' (model.safetensors)" in said and "modekit replace" in said
    assert losses(found) == {name: each for name, each in before.items() if name not in {"law", "weight average"}}
    shutil.rmtree(bench.root / "law")
    kept.rename(bench.root / "law")
    assert losses(scores(checkpoint)) == before


def test_a_base_that_changed_is_no_base(bench: Workshop) -> None:
    checkpoint = open_checkpoint(bench.build())
    change(bench.root / "base")
    found = scores(checkpoint)
    assert {row.name for row in found.rows} == {"medicine", "law", "code", "oracle", "mixture"}
    text = inspect_text(checkpoint, "fever artery lesion dose").as_data()
    assert text["base_loss"] is None and "base_model (model.safetensors) has changed" in text["notes"][-1]
    alike, (note,) = similarity(checkpoint)
    assert alike == [] and "base_model (model.safetensors) has changed" in note


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_settings_are_looked_at_where_they_count(bench: Workshop, file: str) -> None:
    checkpoint = open_checkpoint(bench.build())
    path = bench.root / "law" / file
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "rms_norm_eps": 0.5, "transformers_version": "0"}))
    assert ("law' (config.json) has changed" in str(why_not(checkpoint, 1))) == (file == "config.json")
    path.write_text(json.dumps({**said, "transformers_version": "0"}))
    assert why_not(checkpoint, 1) is None


@pytest.fixture
def adapters(tmp_path: Path) -> Checkpoint:
    """Of two adapters, of which one has another scale since."""
    save(tiny_model(), tmp_path / "base")
    mixture = {"top_k": 1, "router": {"fit": "random"}}
    made = built(tmp_path, {"base_model": "./base", "experts": adapter_experts(tmp_path), "mixture": mixture})
    write_adapter(tmp_path / "law-adapter", lora("mlp.up_proj", 48, 32, seed=1), lora_alpha=16)
    return made


def test_an_adapter_of_another_scale_is_another_model(adapters: Checkpoint) -> None:
    found = scores(adapters)
    assert "law (adapter_config.json)" in " ".join(found.notes).replace("'", "")
    assert {"base", "medicine", "oracle", "mixture"} == {row.name for row in found.rows}


def test_what_did_not_change_is_read_once(bench: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every expert is asked for, and each asks for the base."""
    past = time.time() - 60
    checkpoint = open_checkpoint(bench.build())
    for name in ("base", "law"):
        os.utime(bench.root / name / "model.safetensors", (past, past))
    experts = (None, *range(len(checkpoint.names)))
    assert all(why_not(checkpoint, expert) is None for expert in experts)
    read: list[Path] = []
    whole = digests.blake3_of
    monkeypatch.setattr(digests, "blake3_of", lambda path, *rest: read.append(path) or whole(path, *rest))
    assert why_not(checkpoint, None) is None and why_not(checkpoint, 1) is None and not read
    change(bench.root / "law")
    assert "(model.safetensors)" in str(why_not(checkpoint, 1)) and read


def test_it_does_not_teach(bench: Workshop) -> None:
    """A training towards what lies there now would teach something else."""
    checkpoint = open_checkpoint(bench.build(output={"format": "modekit"}))
    change(bench.root / "law", 3.0)
    settings = short_settings(losses={"forward_kl": 1.0})
    with pytest.raises(TrainingError, match=r"(?s)own model, which is to teach, is not what it was.*expert 'law'"):
        train(checkpoint, settings, out=bench.root / "TRAINED", evaluate_tokens=None)


def with_place(bench: Workshop) -> tuple[Checkpoint, NewExpert]:
    """A mixture of the first two, and the third, who comes."""
    *first, last = bench.recipe["experts"]
    new = NewExpert({key: last[key] for key in ("model", "text")}, bench.root)
    return open_checkpoint(bench.build(experts=first)), new


def test_nothing_is_let_in_beside_a_base_that_changed(bench: Workshop) -> None:
    checkpoint, new = with_place(bench)
    change(bench.root / "base")
    with pytest.raises(ModekitError, match="not the one that the mixture was built with"):
        write_change(checkpoint, add_expert(checkpoint, "code", new), bench.root / "ADDED")


def test_who_comes_is_not_compared_with_what_changed(bench: Workshop) -> None:
    checkpoint, new = with_place(bench)
    change(bench.root / "law")
    nearest = measure_admission(before_change(checkpoint, add_expert(checkpoint, "code", new))).nearest
    assert nearest is not None and nearest[0] == "medicine"


def test_what_stays_is_not_made_of_other_settings(tmp_path: Path) -> None:
    """An adapter that is needed again, in another form, must be what it was: its scale is in no weight."""
    save(tiny_model(), tmp_path / "base")
    texts = write_text(tmp_path / "text", ("medicine", "law", "code"))
    tensors = {**lora("mlp.up_proj", 48, 32), **lora("self_attn.q_proj", 32, 32)}
    for name in texts:
        write_adapter(tmp_path / name, tensors, target_modules=["up_proj", "q_proj"], lora_alpha=8)
    experts = [{"name": name, "adapter": f"./{name}", "as": "full", "text": str(text)} for name, text in texts.items()]
    mixture = {"top_k": 1, "router": {"fit": "random"}, "backbone": "average"}
    recipe = {"base_model": "./base", "experts": experts, "mixture": mixture, "output": {"format": "plain"}}
    checkpoint = modekit.build(modekit.plan(recipe, root=tmp_path), tmp_path / "OUT")
    removed = modekit.remove(checkpoint, "law", out=tmp_path / "REMOVED")
    assert is_proven(modekit.verify(removed))  # the backbone is merged of those who stay, with what they change of it
    write_adapter(tmp_path / "medicine", tensors, target_modules=["up_proj", "q_proj"], lora_alpha=16)
    with pytest.raises(ModekitError, match="has changed since the mixture was built"):
        modekit.remove(checkpoint, "law", out=tmp_path / "AGAIN")


def test_verify_looks_at_settings_too(adapters: Checkpoint) -> None:
    checks = {check.name: check for check in modekit.verify(adapters)}
    assert "adapter_config.json" in checks["source experts[1] 'law'"].detail
    assert checks["source experts[1] 'law'"].verdict == "failed" and checks["source base_model"].verdict == "proven"
