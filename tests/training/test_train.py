"""`modekit train`: what moves and what does not, losses, text, resume, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import modekit.training.objective as objective_module
import modekit.training.train as train_module
from adapter_folders import export_adapter, train_adapter
from conftest import DOMAINS, Workshop, logits_of, make_workshop, save, tiny_model
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import OutputError, TextError, TrainingError
from modekit.evaluation.domains import held_out_domains, recipe_texts
from modekit.evaluation.evaluate import evaluate
from modekit.loaded.engine import NotFiniteError
from modekit.loaded.load import load_model, load_tokenizer
from modekit.run import Run
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import SELECTED_FILE, TRAINED_FILE, digest_of, digests_in
from modekit.training.batches import Batches, DomainSequences, plan_parts
from modekit.training.end_to_end import packs
from modekit.training.engine import JudgedModule
from modekit.training.losses import (
    GENERIC,
    domain_label,
    language_model,
    load_balance,
    z_loss,
)
from modekit.training.moving import moving_of
from modekit.training.objective import Objective, make_teachers
from modekit.training.settings import TrainSettings, checked_settings
from modekit.training.train import TrainedMixture, train
from sources.test_families import QWEN3_5
from trained import StoppedError, moved, short_settings, stopped, stopped_at, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore")
CONTEXT = {"method": "routing", "top_k": 2, "router": {"fit": "random", "granularity": "context"}}


def settings_of(**changes: Any) -> TrainSettings:
    values = {"learning_rate": 0.02, "backbone_learning_rate": 0.002, **changes}
    what = values.get("what", ["routers"])
    if what == ["routers"]:
        values.pop("backbone_learning_rate", None)  # which would have no effect
    if not {"routers", "all"} & set(what):
        values.pop("learning_rate", None)
    return short_settings(**values)


def built(workshop: Workshop, name: str = "OUT", mixture: dict[str, Any] | None = None) -> Checkpoint:
    return open_checkpoint(workshop.build(name, **({"mixture": mixture} if mixture else {})))


def run(checkpoint: Checkpoint, **changes: Any) -> TrainedMixture:
    return train(checkpoint, settings_of(**changes), evaluate_tokens=None)


# What moves.


@pytest.mark.parametrize("mixture", [None, CONTEXT], ids=["native", "context"])
@pytest.mark.parametrize("what", ["routers", "attention", "norms", "embeddings", "head", "experts", "mlp"])
def test_only_what_was_named_has_other_bytes(workshop: Workshop, mixture: dict[str, Any] | None, what: str) -> None:
    checkpoint = built(workshop, mixture=mixture)
    before = tensors_of(checkpoint.folder)
    groups = moving_of(load_model(checkpoint.folder), checkpoint)
    if not groups[what]:  # type: ignore[index]
        with pytest.raises(TrainingError, match=f"no {what} to train"):
            run(checkpoint, what=[what])
        return
    rate = {"learning_rate": 0.3} if what == "routers" else {"backbone_learning_rate": 0.01}
    done = run(checkpoint, what=[what], **rate)
    changed = moved(before, tensors_of(checkpoint.folder))
    assert done.improved
    assert changed, "nothing moved"
    assert all(group_of(name) == what for name in changed), changed
    assert changed == {name for name in before if group_of(name, mixture) == what} or what in {"routers", "experts"}
    opened = open_checkpoint(checkpoint.folder)
    assert is_proven(verify(opened)), [check for check in verify(opened) if check.verdict != "proven"]
    assert set(opened.record.trained) == (set() if what == "routers" else changed)


def group_of(name: str, mixture: dict[str, Any] | None = None) -> str:
    """The group of a tensor on disk, told by its name here and nowhere else."""
    if ".experts." in name:
        return "experts"
    if name.endswith((".router.gate", "mlp.gate.weight", "block_sparse_moe.gate.weight")):
        return "routers"
    if "embed_tokens" in name:
        return "embeddings"
    if "lm_head" in name:
        return "head"
    if ".self_attn." in name:
        return "attention"
    return "mlp" if ".mlp." in name else "norms"


FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": {"head_dim": 8}, "cohere2": {}}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_parameter_is_in_one_group_and_constants_in_none(tmp_path: Path, model_type: str) -> None:
    checkpoint = built(make_workshop(tmp_path, model_type, **FAMILIES[model_type]))
    assert checkpoint.shape.plain
    model = load_model(checkpoint.folder)
    groups = moving_of(model, checkpoint)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    named = [name for group, names in groups.items() for name in names if not (tied and group == "head")]
    assert len(named) == len(set(named))
    left = set(dict(model.named_parameters())) - set(named)
    native = checkpoint.shape.native
    constants = (*(constant.name for constant in native.constants), *native.empty)
    assert all(any(path in name for path in constants) for name in left), left
    assert len(groups["routers"]) == checkpoint.layers
    assert groups["attention"] and groups["experts"] and groups["norms"] and groups["embeddings"] and groups["head"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_mixture_is_what_plain_transformers_loads(workshop: Workshop, ids: torch.Tensor, tied: bool) -> None:
    """And worth what the record says."""
    for seed, name in enumerate(("base", *DOMAINS)):
        save(tiny_model(seed=seed, tie_word_embeddings=tied), workshop.root / name)
    checkpoint = built(workshop)
    before = logits_of(checkpoint.folder, ids)
    done = run(checkpoint, what=["all"], backbone_learning_rate=0.02)
    assert done.improved
    assert not torch.allclose(before, logits_of(checkpoint.folder, ids))
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    texts, tokenizer = recipe_texts(done.checkpoint), load_tokenizer(done.checkpoint.folder)
    for place, name in enumerate(done.checkpoint.names):
        text = texts.own(place)
        assert text is not None
        select = encode(tokenizer, texts.select_of(text), max_tokens=400, sequence_length=64)
        assert mean_loss(loaded, select) == pytest.approx(done.record.select_loss[name]["after"], abs=1e-4)


def mean_loss(model: Any, sequences: Any) -> float:
    total, count = 0.0, 0
    for sequence in sequences:
        row = torch.tensor([sequence.ids])
        with torch.inference_mode():
            logits = model.eval()(input_ids=row).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
        count += row.shape[1] - 1
    return total / count


def test_tensors_keep_their_dtype_and_another_folder_leaves_the_first_alone(workshop: Workshop) -> None:
    for name in ("base", *DOMAINS):
        save(AutoModelForCausalLM.from_pretrained(workshop.root / name, dtype=torch.bfloat16), workshop.root / name)
    checkpoint = built(workshop)
    before = tensors_of(checkpoint.folder)
    out = workshop.root / "elsewhere" / "TRAINED"
    done = train(checkpoint, settings_of(what=["routers", "head"]), out=out, evaluate_tokens=None)
    assert done.improved and not moved(before, tensors_of(checkpoint.folder))
    assert {tensor.dtype for tensor in tensors_of(out).values()} == {torch.bfloat16}
    assert is_proven(verify(open_checkpoint(out)))
    assert not (workshop.root / "elsewhere" / "TRAINED.training").exists()
    with pytest.raises(OutputError, match="the output folder exists"):
        train(checkpoint, settings_of(what=["head"]), out=out, evaluate_tokens=None)


def test_one_expert_per_token_is_trained_with_two_and_said_so(workshop: Workshop) -> None:
    checkpoint = built(workshop, mixture={"method": "routing", "top_k": 1, "router": {"fit": "random"}})
    done = run_routers(checkpoint)
    assert any("trained with 2 experts per token" in note for note in done.record.notes)
    assert done.improved
    assert open_checkpoint(checkpoint.folder).config["num_experts_per_tok"] == 1
    assert is_proven(verify(open_checkpoint(checkpoint.folder)))


def run_routers(checkpoint: Checkpoint, **changes: Any) -> TrainedMixture:
    return run(checkpoint, **{"learning_rate": 0.3, **changes})


# Losses.


def test_losses_are_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator)
    p = logits.softmax(-1)
    targets = torch.tensor([0, 3, 1, 1, 2])
    assert language_model(logits, targets) == pytest.approx(float(-p.log()[range(5), targets].sum()), rel=1e-5)
    labels = torch.tensor([0, 3, GENERIC, 1, 2])
    own = -p.log()[[0, 1, 3, 4], [0, 3, 1, 2]].sum()
    assert domain_label(logits, labels, None) == pytest.approx(float(own - p.log()[2].mean()), rel=1e-5)
    assert domain_label(logits, labels, 2) == pytest.approx(float(own - p.log()[2, 2]), rel=1e-5)
    assert z_loss(logits) == pytest.approx(float(logits.exp().sum(-1).log().square().sum()), rel=1e-5)
    sent = torch.zeros(5, 4)
    for row in range(5):
        sent[row, logits[row].topk(2).indices] = 0.5
    assert load_balance(logits, 2) == pytest.approx(5 * 4 * float((sent.mean(0) * p.mean(0)).sum()), rel=1e-5)


ALL = {"lm": 1.0, "forward_kl": 0.5, "reverse_kl": 0.3, "label": 0.2, "balance": 0.01, "z": 0.001}


@pytest.mark.parametrize("mixture", [None, CONTEXT], ids=["native", "context"])
def test_padding_and_packing_change_no_loss(workshop: Workshop, mixture: dict[str, Any] | None) -> None:
    checkpoint = built(workshop, mixture=mixture)
    corpora = small_corpora()
    teachers = make_teachers(
        checkpoint, corpora, workshop.root / "work", run=Run(trust_remote_code=False, progress=lambda *_: None)
    )
    names = {name: weight for name, weight in ALL.items() if name != "balance"}  # a product over a batch
    settings = settings_of(losses=names, what=["all"])

    def total(packed: bool, parts: int) -> dict[str, float]:
        objective = Objective(
            load_model(checkpoint.folder), checkpoint, settings, teachers=teachers, train_top_k=None, packed=packed
        )
        planned = plan_parts(corpora, settings, steps=1, experts=3, parts=parts, pack=packed)
        batches = Batches(corpora, planned)
        losses = sum(float(objective(**batches[number]).detach()) for number in range(parts))
        return {"total": losses, **objective.drain()}

    alone = total(False, 40)
    assert total(False, 1) == pytest.approx(alone, rel=1e-4)
    if mixture is None:
        assert total(True, 1) == pytest.approx(alone, rel=1e-4)
        assert total(True, 3) == pytest.approx(alone, rel=1e-4)


def small_corpora() -> list[DomainSequences]:
    generator = torch.Generator().manual_seed(3)
    return [
        DomainSequences(
            name,
            expert,
            [TokenSequence(tuple(torch.randint(3, 96, (size,), generator=generator).tolist())) for size in (9, 31, 17, 24)],
        )
        for expert, name in enumerate(DOMAINS)
    ]


def test_a_teacher_says_what_its_expert_says_of_every_token(workshop: Workshop) -> None:
    checkpoint = built(workshop)
    corpora = small_corpora()
    teachers = make_teachers(
        checkpoint, corpora, workshop.root / "work", run=Run(trust_remote_code=False, progress=lambda *_: None)
    )
    for corpus, teacher in zip(corpora, teachers, strict=True):
        assert teacher is not None
        model = load_model(workshop.root / corpus.name)
        start = 0
        for sequence in corpus.sequences:
            wanted = logits_of(model, torch.tensor([sequence.ids]))[0]
            got = teacher.logits(torch.arange(start, start + len(sequence.ids)), torch.device("cpu"))
            assert torch.allclose(got, wanted, atol=2e-2 * float(wanted.abs().max()))
            start += len(sequence.ids)


@pytest.mark.parametrize("loss", ["label", "balance", "z", "forward_kl"])
def test_each_loss_falls_when_it_is_trained_on(workshop: Workshop, loss: str) -> None:
    router = {"fit": "random", "temperature": 0.05}  # gates that are far from even
    checkpoint = built(workshop, mixture={"method": "routing", "top_k": 2, "router": router})
    run_routers(checkpoint, losses={loss: 1.0}, steps=8, batch_tokens=2000, learning_rate=0.05, patience=99)
    rows = log_of(checkpoint)
    values = [float(row[f"loss_{loss}"]) for row in rows if row.get(f"loss_{loss}")]
    assert values[-1] < values[0], values


def log_of(checkpoint: Checkpoint) -> list[dict[str, str]]:
    path = checkpoint.folder / "results" / "train.csv"
    return list(csv.DictReader(path.read_text().splitlines()))


# Text.


def sequence(length: int) -> TokenSequence:
    return TokenSequence(tuple(range(3, 3 + length)))


def test_more_parts_read_the_same_step_and_rows_never_overflow() -> None:
    corpora, settings = small_corpora(), settings_of(batch_tokens=150, sequence_length=40)

    def per_step(parts: int) -> list[list[tuple[int, int]]]:
        planned = plan_parts(corpora, settings, steps=6, experts=3, parts=parts, pack=True)
        steps = [planned[start : start + parts] for start in range(0, len(planned), parts)]
        assert len(planned) == 6 * parts
        return [sorted((d.corpus, d.sequence) for part in step for row in part.rows for d in row) for step in steps]

    assert per_step(1) == per_step(2) == per_step(5)
    for part in plan_parts(corpora, settings, steps=6, experts=3, parts=2, pack=True):
        for row in part.rows:
            assert sum(len(corpora[draw.corpus].sequences[draw.sequence].ids) for draw in row) <= 40


def test_every_sequence_is_read_once_before_any_is_read_twice() -> None:
    corpora = [DomainSequences("law", 0, [sequence(10)] * 12)]
    parts = plan_parts(corpora, settings_of(batch_tokens=40), steps=3, experts=3, parts=1, pack=True)
    read = [draw.sequence for part in parts for row in part.rows for draw in row]
    assert sorted(read) == list(range(12))


def test_only_fit_documents_move_anything_and_no_table_shows_them(workshop: Workshop) -> None:
    checkpoint = built(workshop)
    extra = workshop.root / "more.jsonl"
    extra.write_text("".join(json.dumps({"text": f"{number} court waiver tort deed"}) + "\n" for number in range(40)))
    done = train(checkpoint, settings_of(what=["head"]), texts={"law": [str(extra)]}, evaluate_tokens=None)
    assert done.improved and list(done.record.text) == list(DOMAINS)  # the others are read from the recipe
    ours = {digest_of(json.loads(line)["text"])[:16] for line in extra.read_text().splitlines()}
    trained_on = ours & digests_in(checkpoint.folder / TRAINED_FILE)
    selected_by = ours & digests_in(checkpoint.folder / SELECTED_FILE)
    assert 20 < len(trained_on) < 40 and 0 < len(selected_by) < 15
    recipe = workshop.recipe | {"eval": {"law": "./more.jsonl"}}
    again = open_checkpoint(checkpoint.folder)
    record = again.record.model_copy(update={"recipe": again.record.recipe.model_validate(recipe)})
    held_out = held_out_domains(Checkpoint(checkpoint.folder, record), tokens_per_domain=10**6, sequence_length=64)
    law = next(domain for domain in held_out if domain.name == "law")
    assert len(law.sequences) == 40 - len(trained_on) - len(selected_by)


def test_a_share_of_the_documents_is_the_same_every_time(workshop: Workshop) -> None:
    checkpoint = built(workshop)
    half = run(checkpoint, what=["head"], share=0.5).record.text
    whole = run(built(workshop, "TWO"), what=["head"]).record.text
    assert all(0 < half[name]["documents"] < whole[name]["documents"] for name in DOMAINS)


# Going on, and not going on.


@pytest.mark.parametrize("step", [1, 4])
def test_a_killed_training_ends_as_if_it_had_not_been_killed(workshop: Workshop, step: int) -> None:
    mixture = {**CONTEXT, "router": {**CONTEXT["router"], "jitter": 0.1, "noise": 0.1}}  # type: ignore[dict-item]
    changes = {"what": ["routers", "attention"], "steps": 6, "evaluate_every": 2}
    whole, cut = built(workshop, "WHOLE", mixture), built(workshop, "CUT", mixture)
    run(whole, **changes)
    with pytest.raises(StoppedError):
        train(cut, settings_of(**changes), evaluate_tokens=None, run=stopped_at(step))
    assert (workshop.root / "CUT.training" / "settings.json").exists() == (step > 2)  # else there is nothing to go on from
    run(cut, **changes)
    assert not moved(tensors_of(whole.folder), tensors_of(cut.folder))
    assert log_of(whole) == log_of(cut)
    assert not (workshop.root / "CUT.training").exists()


def test_a_state_that_a_kill_cut_short_is_not_gone_on_from(workshop: Workshop) -> None:
    checkpoint = built(workshop)
    changes = {"what": ["attention"], "steps": 6, "evaluate_every": 2}
    with pytest.raises(StoppedError):
        train(checkpoint, settings_of(**changes), evaluate_tokens=None, run=stopped_at(5))
    states = sorted((workshop.root / "OUT.training").glob("checkpoint-*"))
    (states[-1] / "complete").unlink()
    (states[-1] / "model.safetensors").write_bytes(b"cut short")
    done = run(checkpoint, **changes)
    whole = built(workshop, "WHOLE")
    run(whole, **changes)
    assert done.improved and not moved(tensors_of(whole.folder), tensors_of(checkpoint.folder))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("history.json", b'{"history": [{"lo'),
        ("model.safetensors", b"cut short"),
        ("optimizer.safetensors", b"cut short"),
    ],
)
def test_a_damaged_state_says_what_to_remove(workshop: Workshop, file: str, content: bytes) -> None:
    """Whole when it was written, and changed since: the error is modekit's own, and what it says to do helps."""
    checkpoint = built(workshop)
    changes = {"what": ["attention"], "steps": 6, "evaluate_every": 2}
    with pytest.raises(StoppedError):
        train(checkpoint, settings_of(**changes), evaluate_tokens=None, run=stopped_at(5))
    state = workshop.root / "OUT.training" / "checkpoint-4"
    (state / file).write_bytes(content)
    with pytest.raises(TrainingError, match="what an unfinished training left is damaged") as error:
        run(checkpoint, **changes)
    assert str(state) in str(error.value.where) and "checkpoint-4" in str(error.value.remedy)
    shutil.rmtree(state)
    assert run(checkpoint, **changes).improved


def test_a_state_of_other_parameters_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps are done, and nothing of it would reach the mixture."""
    checkpoint = built(workshop)
    changes = {"what": ["attention"], "steps": 6, "evaluate_every": 2}
    with monkeypatch.context() as patched, pytest.raises(StoppedError):
        patched.setattr(train_module, "write_trained", stopped)
        train(checkpoint, settings_of(**changes), evaluate_tokens=None)
    for state in (workshop.root / "OUT.training").glob("checkpoint-*/model.safetensors"):
        save_file({name.replace("model.", "mixture.", 1): each for name, each in load_file(state).items()}, state)
    with pytest.raises(TrainingError, match=r"than those that move\n.*OUT\.training to begin again"):
        run(checkpoint, **changes)


def test_another_training_does_not_take_over_an_unfinished_one(workshop: Workshop) -> None:
    checkpoint = built(workshop)
    with pytest.raises(StoppedError):
        train(checkpoint, settings_of(what=["head"]), evaluate_tokens=None, run=stopped_at(3))
    with pytest.raises(TrainingError, match="an unfinished training is in the way"):
        run(checkpoint, what=["head"], seed=5)
    assert run(checkpoint, what=["head"]).improved


def test_a_loss_that_is_not_finite_stops_and_keeps_the_best_state(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = built(workshop)
    real, calls = objective_module.language_model, {"train": 0}

    def broken(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            calls["train"] += 1
            if calls["train"] == 4:
                return real(logits, targets) * math.nan
        return real(logits, targets)

    monkeypatch.setattr(objective_module, "language_model", broken)
    done = run(checkpoint, what=["head"], steps=9)
    assert done.failed is not None and done.improved
    assert "step 4" in str(done.failed) and "of medicine" in str(done.failed)
    assert any("ended after step 3 of 9: a loss was not finite;" in note for note in done.record.notes)
    assert is_proven(verify(open_checkpoint(checkpoint.folder)))
    losses = done.record.select_loss
    assert sum(each["after"] for each in losses.values()) < sum(each["before"] for each in losses.values())


def test_a_training_that_does_not_help_changes_nothing(workshop: Workshop) -> None:
    checkpoint = built(workshop)
    before = tensors_of(checkpoint.folder)
    done = run(checkpoint, what=["all"], backbone_learning_rate=5.0, learning_rate=5.0)
    assert not done.improved and any("nothing was changed" in note for note in done.record.notes)
    assert not moved(before, tensors_of(checkpoint.folder)) and not open_checkpoint(checkpoint.folder).record.training


def test_too_little_memory_is_said_with_what_to_do(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = built(workshop)

    def full(*_: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")
        return torch.tensor(1.0)

    monkeypatch.setattr(objective_module, "language_model", full)
    with pytest.raises(TrainingError, match="not enough memory") as caught:
        run(checkpoint, what=["head"])
    assert "accumulate" in str(caught.value)


# Results, and what is refused.


def test_results_show_before_and_after(workshop: Workshop) -> None:
    checkpoint = built(workshop)
    done = train(checkpoint, settings_of(what=["head"]), evaluate_tokens=400)
    assert done.results is not None
    names = [row.name for row in done.results.rows]
    assert "mixture before" in names and "mixture" in names and "oracle after" in names
    data = json.loads((checkpoint.folder / "results" / "train.json").read_text())
    assert [row["name"] for row in data["results"]["rows"]] == names
    assert data["training"]["settings"]["what"] == ["head"]
    assert "mixture before" in (checkpoint.folder / "results" / "train.md").read_text()
    assert {"loss", "loss_lm", "eval_law_loss", "learning_rate", "step"} <= set(log_of(checkpoint)[0])
    record = open_checkpoint(checkpoint.folder).record
    assert len(record.training) == 1 and len(record.training[0].text["law"]["sha256"]) == 64


def test_a_second_training_and_a_later_fit_keep_what_was_trained(workshop: Workshop) -> None:
    from modekit.routing.fit import refit

    fit = {"fit": "logistic", "tokens_per_domain": 600, "sequence_length": 32, "keep_tokens": 64}
    checkpoint = built(workshop, mixture={"method": "routing", "top_k": 2, "router": fit})
    statistics = (checkpoint.folder / "router" / "law.safetensors").read_bytes()
    assert run(checkpoint, what=["attention"]).improved
    assert run(checkpoint, what=["head"], seed=1).improved
    record = open_checkpoint(checkpoint.folder).record
    assert len(record.training) == 2 and {group_of(name) for name in record.trained} == {"attention", "head"}
    fitted = refit(open_checkpoint(checkpoint.folder), {"router": {"temperature": 2.0}})
    assert fitted.record.trained == record.trained
    assert (checkpoint.folder / "router" / "law.safetensors").read_bytes() != statistics  # routers read other states now
    assert is_proven(verify(open_checkpoint(checkpoint.folder)))


def test_an_edited_trained_tensor_is_found(workshop: Workshop) -> None:
    checkpoint = built(workshop)
    run(checkpoint, what=["head"])
    path = checkpoint.folder / "modekit.json"
    record = json.loads(path.read_text())
    record["trained"] = dict.fromkeys(record["trained"], "0" * 64)
    path.write_text(json.dumps(record))
    failed = [check.name for check in verify(open_checkpoint(checkpoint.folder)) if check.verdict == "failed"]
    assert failed == ["trained tensors"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"step": 2}, "step: "),
        ({"losses": {"lm": 0}}, "above 0"),
        ({"temperature": 2.0}, "without effect here: temperature"),
        ({"backbone_learning_rate": 0.1}, "without effect here: backbone_learning_rate"),
        ({"what": ["head"], "learning_rate": 0.1}, "without effect here: learning_rate"),
        ({"what": ["head"], "losses": {"label": 1.0}}, "do not reach the head"),
    ],
)
def test_settings_that_are_wrong_or_dead_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        checked_settings(values, TrainSettings, where="test")


def test_a_domain_without_text_is_named(workshop: Workshop) -> None:
    checkpoint = built(workshop)
    empty = workshop.root / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(TextError, match="the text is empty") as caught:
        train(checkpoint, settings_of(what=["head"]), texts={"law": [str(empty)]}, evaluate_tokens=None)
    assert "--text law" in str(caught.value)
    few = workshop.root / "few.jsonl"
    few.write_text(json.dumps({"text": "one document only, whose hash decides where it goes"}))
    with pytest.raises(TextError, match="no document is left for"):
        train(checkpoint, settings_of(what=["head"]), texts={"law": [str(few)]}, evaluate_tokens=None)
    with pytest.raises(TextError, match="there is no expert for this domain"):
        train(checkpoint, settings_of(what=["head"]), texts={"laws": [str(few)]}, evaluate_tokens=None)


def test_a_mixture_without_routers_has_none_to_train(workshop: Workshop) -> None:
    checkpoint = built(workshop, mixture={"method": "linear"})
    for changes in ({}, {"what": ["head"], "losses": {"lm": 1.0, "label": 1.0}}):
        with pytest.raises(TrainingError, match="no router to train"):
            run(checkpoint, **changes)
    before = tensors_of(checkpoint.folder)
    assert run(checkpoint, what=["all"]).improved
    changed = moved(before, tensors_of(checkpoint.folder))
    assert not changed & {slot.name for slot in checkpoint.slots}  # its zero gates are what makes it linear
    assert is_proven(verify(open_checkpoint(checkpoint.folder)))


# What an independent reader found.


def adapters(workshop: Workshop, mixture: dict[str, Any]) -> Checkpoint:
    """Two adapters and the base."""
    for rank, name in ((3, "law"), (2, "code")):
        config = LoraConfig(r=rank, target_modules=["q_proj", "down_proj"])
        train_adapter(workshop.root / "base", config, workshop.root / f"{name}-lora")
    experts = [{"name": n, "adapter": f"./{n}-lora", "text": f"./text/{n}.jsonl"} for n in ("law", "code")]
    experts.append({"name": "general", "model": "base", "text": "./text/medicine.jsonl"})
    return open_checkpoint(workshop.build("OUT", experts=experts, mixture=mixture))


def test_adapters_move_themselves_under_low_rank_training(workshop: Workshop) -> None:
    checkpoint = adapters(workshop, {"method": "routing", "top_k": 2, "router": {"fit": "random"}})
    done = run(checkpoint, what=["all"], losses={"lm": 1.0, "label": 0.1, "forward_kl": 0.1})
    assert done.improved and is_proven(verify(open_checkpoint(checkpoint.folder)))
    export_adapter(open_checkpoint(checkpoint.folder), "law", workshop.root / "law-again", overwrite=False)
    record = json.loads((workshop.root / "law-again" / "export.json").read_text())
    said = [note for note in record["notes"] if "modekit train" in note]
    assert len(said) == 2 and "it was trained on" in said[0] and "stands on a trained backbone" in said[1]


def test_routers_that_score_by_a_norm_can_be_trained_beside_the_base(workshop: Workshop) -> None:
    checkpoint = adapters(workshop, {"method": "routing", "top_k": 2, "router": {"fit": "arrow"}})
    done = run(checkpoint, learning_rate=0.05)
    assert done.failed is None and done.improved


def test_a_part_without_rows_has_no_loss(workshop: Workshop) -> None:
    done = run_routers(built(workshop), losses={"lm": 1.0, "balance": 0.01}, accumulate=20)
    assert done.failed is None


def test_a_training_does_not_touch_what_another_left(workshop: Workshop) -> None:
    checkpoint = built(workshop)
    precious = workshop.root / "OUT.training" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    with pytest.raises(TrainingError, match="in the way"):
        run(checkpoint, what=["head"])
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_5_text"])
def test_packed_documents_do_not_see_each_other_in_any_family(tmp_path: Path, family: str) -> None:
    overrides = QWEN3_5 if family == "qwen3_5_text" else FAMILIES[family]
    checkpoint = built(make_workshop(tmp_path, family, **overrides))
    corpora, settings = small_corpora(), settings_of(what=["all"])
    packed = packs(checkpoint)
    assert packed == (family != "qwen3_5_text")
    if not packed:
        return
    losses = []
    for pack in (False, True):
        objective = Objective(load_model(checkpoint.folder), checkpoint, settings, teachers=[], train_top_k=None, packed=pack)
        batches = Batches(corpora, plan_parts(corpora, settings, steps=1, experts=3, parts=1, pack=pack))
        losses.append(float(objective(**batches[0]).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("what", "call"), [("evaluate", 1), ("write_trained", 1), ("evaluate", 2)])
def test_a_kill_after_the_last_step_is_gone_on_from_too(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, what: str, call: int
) -> None:
    """Before the table before, before the mixture is written, and once it is."""
    whole, cut = built(workshop, "WHOLE"), built(workshop, "CUT")
    settings = settings_of(what=["head"])
    train(whole, settings, evaluate_tokens=400)
    calls = iter([getattr(train_module, what)] * (call - 1) + [stopped])
    with monkeypatch.context() as patched, pytest.raises(StoppedError):
        patched.setattr(train_module, what, lambda *args, **more: next(calls)(*args, **more))
        train(cut, settings, evaluate_tokens=400)
    done = train(cut, settings, evaluate_tokens=400)
    assert done.improved and len(done.checkpoint.record.training) == 1
    assert not moved(tensors_of(whole.folder), tensors_of(cut.folder))
    assert done.results is not None and "mixture before" in [row.name for row in done.results.rows]
    assert not list(workshop.root.glob("*.training"))


def test_what_a_kill_leaves_of_the_first_settings_is_no_others_folder(workshop: Workshop) -> None:
    checkpoint = built(workshop)
    (workshop.root / "OUT.training").mkdir()
    (workshop.root / "OUT.training" / ".modekit.0123456789abcdef.tmp").write_text("{")
    assert run(checkpoint, what=["head"]).improved
    assert not (workshop.root / "OUT.training").exists()


@pytest.mark.parametrize("removed", [1, 3])
def test_a_kill_while_the_folder_is_removed_stops_nobody(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    """With nothing but the log removed, or the states, or also what says how it ended."""
    checkpoint, unlink, count = built(workshop), Path.unlink, 0

    def killed(path: Path, missing_ok: bool = False) -> None:
        nonlocal count
        if path.parent.name == "OUT.training" and path.exists():
            count += 1
            if count > removed:
                raise StoppedError
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(StoppedError):
            train(checkpoint, settings_of(what=["head"]), evaluate_tokens=400)
    assert (workshop.root / "OUT.training" / "settings.json").exists()
    trained = tensors_of(checkpoint.folder)
    assert train(open_checkpoint(checkpoint.folder), settings_of(what=["head"]), evaluate_tokens=400).record
    assert not (workshop.root / "OUT.training").exists()
    if removed <= 1:  # the training still says that it is done
        assert not moved(trained, tensors_of(checkpoint.folder))
        assert json.loads((checkpoint.folder / "results" / "train.json").read_text())["results"] is not None


def test_memory_settings_may_change_when_a_training_goes_on(workshop: Workshop) -> None:
    checkpoint, whole = built(workshop), built(workshop, "WHOLE")
    changes = {"what": ["head"], "steps": 4, "evaluate_every": 2}
    run(whole, **changes)
    with pytest.raises(StoppedError):
        train(checkpoint, settings_of(**changes), evaluate_tokens=None, run=stopped_at(3))
    run(checkpoint, **changes, accumulate=2, checkpointing=True)
    first, second = tensors_of(whole.folder), tensors_of(checkpoint.folder)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_one_table_is_on_one_text(workshop: Workshop) -> None:
    """Even when the recipe evaluates on text that is then trained on."""
    more = workshop.root / "more.jsonl"
    more.write_text("".join(json.dumps({"text": f"{number} court waiver tort deed"}) + "\n" for number in range(60)))
    checkpoint = open_checkpoint(workshop.build("OUT", eval={"law": "./more.jsonl"}))
    done = train(checkpoint, settings_of(what=["head"]), texts={"law": [str(more)]}, evaluate_tokens=10**6)
    assert done.results is not None
    after = evaluate(done.checkpoint, tokens_per_domain=10**6, sequence_length=512)
    assert done.results.row("mixture").scores["law"].loss == pytest.approx(after.row("mixture").scores["law"].loss)


def test_labels_of_some_domains_alone_are_refused(workshop: Workshop) -> None:
    experts = [{key: value for key, value in expert.items() if key != "text"} for expert in workshop.recipe["experts"]]
    checkpoint = open_checkpoint(workshop.build("OUT", experts=experts))
    law = {"law": [str(workshop.root / "text" / "law.jsonl")]}
    with pytest.raises(TrainingError, match="labels of some domains alone"):
        train(checkpoint, settings_of(what=["attention"], losses={"label": 1.0}), texts=law, evaluate_tokens=None)
    done = train(checkpoint, settings_of(what=["head"]), texts=law, evaluate_tokens=None)
    assert done.improved and any("no text of medicine, code" in note for note in done.record.notes)


def test_training_ends_when_held_out_loss_no_longer_falls(workshop: Workshop) -> None:
    done = run(built(workshop), what=["head"], backbone_learning_rate=0.3, steps=40, patience=2, share=0.1)
    assert 0 < done.record.steps < 40
    note = next(note for note in done.record.notes if note.startswith("ended after step"))
    best = int(note.rpartition("step ")[2].split()[0])
    assert done.record.steps == best + 2  # two comparisons, one after each step, without a better one


def test_products_in_bfloat16_train_float32_weights(workshop: Workshop) -> None:
    first, second = built(workshop, "FIRST"), built(workshop, "SECOND")
    assert run(first, what=["head"]).improved and run(second, what=["head"], precision="bfloat16").improved
    one, two = (tensors_of(each.folder)["lm_head.weight"] for each in (first, second))
    assert one.dtype == two.dtype == torch.float32
    assert not torch.equal(one, two) and torch.allclose(one, two, atol=0.02)


# Several processes.


def test_an_error_of_a_loss_goes_from_process_to_process() -> None:
    error = NotFiniteError.at("step 3: 2 of law", "loss nan")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_log_has_the_losses_of_all_processes(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = built(workshop)
    objective = Objective(load_model(checkpoint.folder), checkpoint, settings_of(), teachers=[], train_top_k=None, packed=False)
    monkeypatch.setattr("modekit.training.engine.processes", lambda: SimpleNamespace(add_up=lambda figures: 2 * figures))
    objective._sums = {"lm": 1.5}
    assert JudgedModule.drain(objective) == {"loss_lm": 3.0} and objective._sums == {}


def test_heads_of_experts_are_no_head(workshop: Workshop) -> None:
    router = {"fit": "lexical", "orders": [1, 2], "buckets": 64}
    checkpoint = built(workshop, mixture={"modules": "all", "router": router})
    groups = moving_of(load_model(checkpoint.folder), checkpoint)
    assert groups["head"] == [] and any("lm_head" in name for name in groups["experts"])
    with pytest.raises(TrainingError, match="no head"):
        run(checkpoint, what=["head"])
