"""Specialists: what moves, what stays bit-identical, what text they read."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import modekit.loaded.text_training as training_module
from conftest import VOCAB, Workshop, save
from modekit.errors import TrainingError, UnsupportedError
from modekit.experts.moving import What
from modekit.experts.specialist import BeforeAfter, SpecialistRecord
from modekit.experts.specialize import specialize
from modekit.loaded.load import load_model
from modekit.loaded.text_training import Training
from modekit.recipes.read import parse_recipe
from modekit.run import DETAIL, QUIET, Run
from modekit.sources.open import Opener
from modekit.text.splits import TRAINED_FILE, digests_in, split_of
from pair_models import built, inputs, logits_of, make_pair_workshop, pair_model
from refusal import tree
from rounding import assert_close
from tiny_decoders import tiny_decoder
from trained import StoppedError, moved, stopped_at, tensors_of

TRAINING = Training(steps=12, batch_tokens=256, sequence_length=32, learning_rate=5e-3)


def fell(loss: BeforeAfter | None) -> bool:
    return loss is not None and loss.before is not None and loss.after is not None and loss.after < loss.before


def run(workshop: Workshop, name: str, base: str = "base", text: str = "./text/law.jsonl", **more: Any) -> SpecialistRecord:
    root = workshop.root
    return specialize(root / base, root / name, [text], root=root, **{"training": TRAINING, **more})


def test_mlp_moves_the_ffn_and_leaves_the_rest_bit_identical(workshop: Workshop) -> None:
    record = run(workshop, "new")
    before = tensors_of(workshop.root / "base")
    assert moved(before, tensors_of(workshop.root / "new")) == {name for name in before if ".mlp." in name}
    assert fell(record.held_out_loss)
    assert json.loads((workshop.root / "new" / "specialist.json").read_text()) == record.as_data()


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_the_ffn_of_both_stacks_moves_with_its_biases(model_type: str, tmp_path: Path) -> None:
    make_pair_workshop(tmp_path, model_type)
    specialize(tmp_path / "base", tmp_path / "new", ["./law.jsonl"], root=tmp_path, training=TRAINING)
    before, ffn = tensors_of(tmp_path / "base"), (".fc1.", ".fc2.", ".DenseReluDense.")
    in_ffn = {name for name in before if any(part in name for part in ffn)}
    assert moved(before, tensors_of(tmp_path / "new")) == in_ffn
    assert_close(logits_of(load_model(built(tmp_path, {}, "new")), inputs()), logits_of(load_model(tmp_path / "new"), inputs()))


def test_mixed_dtypes_of_the_base_are_kept(workshop: Workshop) -> None:
    """bf16 matrices and fp32 norms, as some bases have: whatever did not move is bit-identical."""
    before = load_file(workshop.root / "base" / "model.safetensors")
    before = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in before.items()}
    save_file(before, workshop.root / "base" / "model.safetensors", metadata={"format": "pt"})
    run(workshop, "new")
    assert all(".mlp." in name for name in moved(before, tensors_of(workshop.root / "new")))


@pytest.mark.parametrize("train", ["mlp", "lora"])
def test_routed_experts_of_a_mixture_move_in_its_own_dtype(train: What, workshop: Workshop) -> None:
    """PEFT's all-linear leaves those of gpt-oss out."""
    base = save(tiny_decoder("gpt_oss", vocab_size=VOCAB).bfloat16(), workshop.root / "base")
    assert fell(run(workshop, "new", train=train).held_out_loss)
    if train == "mlp":
        before = tensors_of(base)
        assert moved(before, tensors_of(workshop.root / "new")) == {name for name in before if ".mlp." in name}
        return
    opener = Opener(workshop.root, QUIET)
    recipe = parse_recipe({"base_model": "./base", "experts": [{"name": "new", "adapter": "./new"}]})
    changed = opener.expert(0, recipe.experts[0], opener.base(recipe)).changes  # type: ignore[attr-defined]
    assert {name.partition(".layers.1.")[2] for name in changed} >= {f"mlp.experts.{each}_proj" for each in ("gate_up", "down")}


def test_nothing_else_is_changed_by_a_training(workshop: Workshop) -> None:
    draws = [np.random.get_state()[1].tolist(), random.getstate()]
    run(workshop, "new")
    assert [np.random.get_state()[1].tolist(), random.getstate()] == draws
    configs = [json.loads((workshop.root / name / "config.json").read_text()) for name in ("base", "new")]
    assert configs[0] == configs[1] and configs[0]["use_cache"] is True


def test_only_the_fit_split_is_read(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = training_module.encode

    def spy(tokenizer: Any, documents: Any, **kwargs: Any) -> Any:
        documents = list(documents)
        seen.extend(documents if kwargs["max_tokens"] == TRAINING.max_tokens else [])
        return real(tokenizer, documents, **kwargs)

    monkeypatch.setattr(training_module, "encode", spy)
    run(workshop, "new")
    assert seen and {split_of(document) for document in seen} == {"fit"}


def test_a_loss_that_is_not_finite_stops_and_leaves_nothing(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="not finite"):
        run(workshop, "new", training=TRAINING.with_(learning_rate=1e30, clip=1e30))
    assert not list(workshop.root.glob("new*"))


@pytest.mark.usefixtures("a_state_after_every_step")
@pytest.mark.parametrize("train", ["mlp", "lora"])
def test_a_training_goes_on_after_a_kill_and_ends_in_the_same_bytes(workshop: Workshop, train: What) -> None:
    whole = run(workshop, "whole", train=train)
    with pytest.raises(StoppedError):
        run(workshop, "new", train=train, run=stopped_at(8))
    kept = {path.name for path in (workshop.root / "new.training").glob("checkpoint-*")}
    assert kept == {"checkpoint-6", "checkpoint-7"}  # the step that was reported last was not kept yet
    seen: list[tuple[str, int]] = []
    record = run(workshop, "new", train=train, run=Run(progress=lambda stage, done, total: seen.append((stage, done))))
    assert min(done for stage, done in seen if stage.startswith("train")) == 7
    assert not any(stage == "score before" for stage, _ in seen)  # that was kept, too
    assert record == whole
    assert not (workshop.root / "new.training").exists()
    assert tree(workshop.root / "new") == tree(workshop.root / "whole")


@pytest.mark.usefixtures("a_state_after_every_step")
def test_a_training_does_not_go_on_where_its_held_out_text_is_another(workshop: Workshop) -> None:
    """The loss before would be of the old one, and that after of the new one."""
    with pytest.raises(StoppedError):
        run(workshop, "new", run=stopped_at(4))
    file = workshop.root / "text" / "law.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    lines.remove(next(line for line in lines if split_of(json.loads(line)["text"]) == "report"))
    file.write_text("".join(lines))
    with pytest.raises(TrainingError, match="an unfinished training is in the way"):
        run(workshop, "new")


@pytest.mark.usefixtures("a_state_after_every_step")
@pytest.mark.parametrize("damage", ["short", "other"])
def test_a_damaged_state_is_one_clear_error(workshop: Workshop, damage: str) -> None:
    with pytest.raises(StoppedError):
        run(workshop, "new", run=stopped_at(4))
    file = workshop.root / "new.training" / "checkpoint-3" / "model.safetensors"
    if damage == "short":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        save_file({"parameter.0": torch.zeros(3)}, file)
    with pytest.raises(TrainingError, match="what an unfinished training left is damaged"):
        run(workshop, "new")


def test_held_out_text_is_scored_up_to_a_bound_and_every_phase_is_named_first(workshop: Workshop) -> None:
    """However much text there is: so many tokens before, and as many after."""
    seen: list[tuple[str, int, int]] = []
    seeing = Run(progress=lambda stage, done, total: seen.append((stage, done, total)))
    run(workshop, "new", training=TRAINING.with_(held_out_tokens=100), run=seeing)
    for when in ("score before", "score after"):
        assert 0 < max(total for stage, _, total in seen if stage == when) < 100
        assert next(done for stage, done, _ in seen if stage == when) == 0
    phases = list(dict.fromkeys(stage.partition(DETAIL)[0] for stage, _, _ in seen))
    assert phases == ["read the text", "load a model", "score before", "train", "score after", "write"]
    assert next(done for stage, done, _ in seen if stage == "train") == 0
    assert any("loss " in stage for stage, _, _ in seen)


def test_the_seed_decides_all_that_is_drawn(tmp_path: Path) -> None:
    """First weights of an adapter, and dropout; the caller's own generator goes on as it was."""
    make_pair_workshop(tmp_path, "bart")
    pair_model("bart", dropout=0.1).save_pretrained(tmp_path / "base")
    found = []
    for number in (1, 2):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        specialize(
            tmp_path / "base", tmp_path / f"new{number}", ["./law.jsonl"], root=tmp_path, train="lora", training=TRAINING
        )
        assert torch.equal(torch.get_rng_state(), before)
        found.append(load_file(next((tmp_path / f"new{number}").glob("*.safetensors"))))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_what_the_base_was_trained_on_goes_along(workshop: Workshop) -> None:
    """No table may show text that the specialist knows from the model that it was made from."""
    run(workshop, "new")
    run(workshop, "newer", base="new", text="./text/code.jsonl")
    first, both = (digests_in(workshop.root / name / TRAINED_FILE) for name in ("new", "newer"))
    assert first and first < both


def test_an_adapter_of_a_base_of_the_hub_says_what_peft_opens_it_by(workshop: Workshop) -> None:
    record = run(workshop, "lora", train="lora", hub=("org/base", "c0ffee"))
    config = json.loads((workshop.root / "lora" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"], record.base_model) == ("org/base", "c0ffee", "org/base")


def test_ffns_of_gpt2_are_trained_and_where_none_is_found_a_sentence_says_so(workshop: Workshop) -> None:
    save(tiny_decoder("gpt2", vocab_size=VOCAB), workshop.root / "gpt2")
    assert fell(run(workshop, "new", "gpt2").held_out_loss)
    save(tiny_decoder("mamba", vocab_size=VOCAB), workshop.root / "mamba")
    with pytest.raises(UnsupportedError, match="no FFN was found"):
        run(workshop, "other", "mamba")
