"""A student and its teacher, from folders to a folder: what is learned, what is kept, how it goes on, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Workshop, character_tokenizer, make_workshop, save, tiny_model
from modekit.cli.experts import print_specialist
from modekit.errors import MismatchError, OutputError, TextError, TrainingError, UnsupportedError
from modekit.experts.distill import CROSS_ENTROPY, DISTILLATION, Lesson, Student, Teaching, kl_to_teacher
from modekit.experts.settings import DistillSettings
from modekit.experts.specialist import SpecialistRecord
from modekit.experts.specialize import specialize
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.text_training import Training
from modekit.run import Run
from modekit.text.held_out import read_text
from modekit.text.sequences import TokenSequence, encode
from modekit.training.batches import Batches, DomainSequences, plan_parts, predicted_in
from modekit.training.losses import distillation
from modekit.training.settings import TrainSettings, checked_settings
from pair_models import make_pair_workshop
from refusal import refuse, tree
from trained import StoppedError, stopped_at

TRAINING = Training(steps=12, batch_tokens=256, sequence_length=32, learning_rate=5e-3)


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    """A student, and a teacher of another family and size that has learned a text."""
    made = make_workshop(tmp_path, num_hidden_layers=1)
    save(tiny_model("qwen2", seed=9, hidden_size=48, num_hidden_layers=2), tmp_path / "untaught")
    specialize(
        tmp_path / "untaught",
        tmp_path / "teacher",
        ["./text/law.jsonl"],
        root=tmp_path,
        train="full",
        training=TRAINING.with_(steps=60),
    )
    character_tokenizer().save_pretrained(tmp_path / "teacher")  # transformers makes Qwen's own of it
    return made


def asked(shop: Workshop, **changes: Any) -> dict[str, Any]:
    """Arguments of `specialize` but for OUT."""
    given = {"teacher": shop.root / "teacher", "settings": DistillSettings(), "mix": None, **changes}
    teaching = Teaching(given.pop("teacher"), given.pop("settings"), given.pop("mix"))
    start = {"base": shop.root / "base", "texts": ["./text/law.jsonl"], "root": shop.root, "training": TRAINING}
    return {**start, "teaching": teaching, **given}


def distill(given: dict[str, Any], out: Path, **more: Any) -> SpecialistRecord:
    return specialize(out=out, **given, **more)


@pytest.mark.slow
def test_a_taught_student_is_nearer_to_the_teacher_than_one_without(shop: Workshop) -> None:
    """At equal steps on equal text, on held-out text, whichever loss says how far it is."""
    teacher = load_model(shop.root / "teacher")
    tokenizer = load_tokenizer(shop.root / "base")
    documents = read_text(["./text/law.jsonl"], root=shop.root, where="t").split("report")
    held_out = encode(tokenizer, documents, max_tokens=4_000, sequence_length=32)
    lesson = Lesson(teacher, 96, DistillSettings())
    long, distances = TRAINING.with_(steps=80), {}
    for name, settings in {
        "plain": DistillSettings(weights=0.999_999),
        "forward_kl": DistillSettings(),
        "reverse_kl": DistillSettings(losses={"reverse_kl": 1.0}),
        "total_variation": DistillSettings(losses={"total_variation": 1.0}, temperature=1.0),
    }.items():
        record = distill(asked(shop, train="full", settings=settings, training=long), shop.root / name).as_data()
        distances[name] = record["held_out_kl"]["after"]
    measured = kl_to_teacher(load_model(shop.root / "forward_kl"), lesson, held_out)
    assert measured == pytest.approx(distances["forward_kl"], rel=1e-3)
    plain = distances.pop("plain")
    assert all(value < 0.9 * plain for value in distances.values()), (plain, distances)


def test_the_record_tells_of_the_teacher(shop: Workshop) -> None:
    record = distill(asked(shop), shop.root / "new").as_data()
    assert json.loads((shop.root / "new" / "specialist.json").read_text()) == record
    said = record["teacher"]
    assert (said["name"], said["losses"], said["temperature"], said["weights"]) == ("teacher", {"forward_kl": 1.0}, 2.0, 0.5)
    assert len(said["digest"]) == 64 and record["training"]["steps"] == 12
    assert record["held_out_loss"]["after"] < record["held_out_loss"]["before"]
    assert record["held_out_kl"]["after"] < record["held_out_kl"]["before"]
    rows = list(csv.DictReader((shop.root / "new" / "distill.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 13)]
    assert {"loss_lm", "loss_distill"} <= set(rows[0])
    assert not list(shop.root.glob("new.*"))


def test_texts_of_a_taught_student_are_said_to_have_no_tags(capsys: pytest.CaptureFixture[str]) -> None:
    losses = {"before": 2.0, "after": 1.5}
    said = {"specialist": "mlp", "base_model": "b", "training": {"steps": 3}, "text": {}, "training_loss": losses}
    of_texts = {"held_out_loss": losses, "held_out_loss_by_label": {"--text a": losses, "--text b": losses}}
    for labels, words in ((None, "each: --text a"), ({"tags": ["a", "b"]}, "with their tags: --text a")):
        print_specialist(Path("OUT"), SpecialistRecord.model_validate({**said, **of_texts, "labels": labels}))
        assert words in capsys.readouterr().out


@pytest.mark.usefixtures("a_state_after_every_step")
def test_a_training_goes_on_and_ends_in_the_same_bytes(shop: Workshop) -> None:
    wanted = asked(shop, train="lora", settings=DistillSettings(weights=0.25))
    distill(wanted, shop.root / "whole")
    with pytest.raises(StoppedError):
        distill(wanted, shop.root / "new", run=stopped_at(8))
    assert list((shop.root / "new.training").glob("checkpoint-*")) and not (shop.root / "new").exists()
    with pytest.raises(TrainingError, match="an unfinished training is in the way"):
        distill(asked(shop, train="lora"), shop.root / "new")
    seen: list[tuple[str, int]] = []
    distill(wanted, shop.root / "new", run=Run(progress=lambda stage, done, total: seen.append((stage, done))))
    assert min(done for stage, done in seen if stage == "train") >= 6  # it did not begin anew
    assert tree(shop.root / "new") == tree(shop.root / "whole")
    assert not (shop.root / "new.training").exists()


@pytest.mark.parametrize("others", [False, True])
def test_what_a_kill_left_of_tidying_up_goes_with_the_next_command(shop: Workshop, others: bool) -> None:
    (shop.root / "new").mkdir()
    left = shop.root / "new.training"
    left.mkdir()
    (left / "lock").touch()
    if others:
        (left / "notes.txt").write_text("mine")
    with pytest.raises(OutputError):
        distill(asked(shop), shop.root / "new")
    assert left.exists() == others


# What is refused.


def test_a_teacher_of_another_tokenizer_is_refused_by_the_tokens_that_differ(shop: Workshop) -> None:
    path = shop.root / "teacher" / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(data))
    with pytest.raises(MismatchError, match=r"teacher's tokenizer differs from the student's in 2 tokens[^!]*'a' \(student"):
        distill(asked(shop), shop.root / "new")


def test_a_teacher_without_embeddings_for_the_tokens_is_refused(shop: Workshop) -> None:
    save(tiny_model("qwen2", seed=9, hidden_size=48, num_hidden_layers=2, vocab_size=64), shop.root / "narrow")
    with pytest.raises(MismatchError, match=r"32 tokens that the model has no embedding for[^!]*--teacher"):
        distill(asked(shop, teacher=shop.root / "narrow"), shop.root / "new")
    assert not list(shop.root.glob("new*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("temperature=3",), "temperature"),
        (("--teacher", "nowhere"), "model folder does not exist"),
        (("--teacher", "text"), "config.json"),
        (("--teacher", "teacher", "losses=kl"), "unknown loss or weight"),
    ],
)
def test_dead_and_wrong_options_are_refused(
    small_workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    root = shutil.copytree(small_workshop.root, tmp_path / "root", ignore=shutil.ignore_patterns("OUT*"))
    (root / "medicine").rename(root / "teacher")
    before = tree(root)
    monkeypatch.chdir(root)
    assert said in refuse("specialize", "base", "NEW", "--text", "text/law.jsonl", *words)
    assert tree(root) == before


def test_encoders_and_pairs_are_refused(shop: Workshop, tmp_path: Path) -> None:
    make_pair_workshop(tmp_path / "pairs", "bart")
    pairs = asked(shop, base=tmp_path / "pairs" / "base", teacher=tmp_path / "pairs" / "law")
    with pytest.raises(UnsupportedError, match="models with an encoder are not distilled yet"):
        distill(pairs, tmp_path / "new")
    with pytest.raises(TextError, match="a model without an encoder reads plain text"):
        distill(asked(shop, texts=["./pairs/law.jsonl"]), tmp_path / "new")


@pytest.mark.parametrize(
    "values",
    [
        {"losses": {"forward_kl": 0.0}},
        {"temperature": float("nan")},
    ],
)
def test_wrong_and_dead_settings_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(TrainingError, match="the settings of this training are wrong"):
        checked_settings(dict(values), DistillSettings, where="test")


def test_losses_are_said_by_name_or_with_a_weight() -> None:
    for said in (["forward_kl", "total_variation=0.5"], "forward_kl,total_variation=0.5"):
        found = checked_settings({"losses": said}, DistillSettings, where="test")
        assert found.losses == {"forward_kl": 1.0, "total_variation": 0.5}
    for wrong in (["kl"], ["forward_kl=x"], ["forward_kl=nan"], ["forward_kl", "forward_kl=2"], [""]):
        with pytest.raises(TrainingError, match="unknown loss or weight"):
            checked_settings({"losses": wrong}, DistillSettings, where="test")


NAMES = ["forward_kl", "reverse_kl", "teacher_ce", "total_variation"]


def logits(seed: int, scale: float = 1.0, tokens: int = 6, vocabulary: int = 11) -> torch.Tensor:
    return scale * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def test_losses_are_their_formulas_at_a_temperature() -> None:
    student, teacher = logits(1), logits(2)
    q, p = (student / 2).softmax(-1), (teacher / 2).softmax(-1)
    wanted = {
        "forward_kl": 4 * (p * (p / q).log()).sum(),
        "reverse_kl": 4 * (q * (q / p).log()).sum(),
        "teacher_ce": -4 * (p * q.log()).sum(),
        "total_variation": (p - q).abs().sum() / 2,
    }
    for name, value in wanted.items():
        assert distillation(name, student, teacher, 2.0) == pytest.approx(float(value), rel=1e-4), name


# Tokens that count.


def student_of(**changes: Any) -> Student:
    model, teacher = tiny_model(num_hidden_layers=1), tiny_model(seed=4, num_hidden_layers=1)
    lesson = Lesson(teacher, 96, DistillSettings(**changes))
    return Student(model, lesson, checked_settings({"what": ["all"]}, TrainSettings, where="test"))


def batch_of(sequences: list[TokenSequence], pad_id: int = 0) -> dict[str, torch.Tensor]:
    corpus = DomainSequences("text", 0, sequences)
    asked = checked_settings(
        {"what": ["all"], "batch_tokens": sum(len(each.ids) for each in sequences)}, TrainSettings, where="test"
    )
    item = Batches([corpus], plan_parts([corpus], asked, steps=1, experts=1, parts=1, pack=False))[0]
    item["input_ids"][~item["real"]] = pad_id
    return item


LONG, SHORT = TokenSequence(tuple(range(4, 36))), TokenSequence(tuple(range(40, 57)))


@pytest.mark.parametrize("name", NAMES)
def test_pads_change_no_loss(name: str) -> None:
    student = student_of(losses={name: 1.0})
    together = student(**batch_of([LONG, SHORT]))
    other_pads = student(**batch_of([LONG, SHORT], pad_id=77))
    assert float(together.detach()) == pytest.approx(float(other_pads.detach()), rel=1e-6)
    alone = [float(student(**batch_of([each])).detach()) for each in (LONG, SHORT)]
    assert float(together.detach()) == pytest.approx((31 * alone[0] + 16 * alone[1]) / 47, rel=1e-5)


def test_tags_and_what_stands_first_behind_them_are_no_targets() -> None:
    """As where a text is scored: what counts is what counts without tags, in training and in the distance to the teacher."""
    student = student_of(weights=0.25, temperature=1.0)
    texts = [LONG.with_tag(90, 0), SHORT, SHORT.with_tag(91, 0)]
    item = batch_of(texts)
    assert int(predicted_in(item).sum()) == int(item["targets"]) == sum(each.scored for each in texts) == 31 + 16 + 16
    teacher = student._lesson.teacher
    cross_entropy = distance = 0.0
    for text in texts:
        ids, first = torch.tensor([text.ids]), 1 if text.tag is None else 2
        with torch.no_grad():
            ours, theirs = (model(ids).logits[0, first - 1 : -1].log_softmax(-1) for model in (student.model, teacher))
        cross_entropy -= float(ours.gather(-1, ids[0, first:, None]).sum())
        distance += float((theirs.exp() * (theirs - ours)).sum())
    student(**item)
    figures = student.drain()
    assert figures[CROSS_ENTROPY] == pytest.approx(cross_entropy / 63, rel=1e-5)
    assert figures[DISTILLATION] == pytest.approx(distance / 63, rel=1e-4)
    assert kl_to_teacher(student.model, student._lesson, texts) == pytest.approx(distance / 63, rel=1e-4)


def test_the_teacher_is_no_part_of_what_is_trained_and_gets_no_gradient(tmp_path: Path) -> None:
    student = student_of()
    assert {name.partition(".")[0] for name, _ in student.named_parameters()} == {"model"}
    student(**batch_of([LONG])).backward()
    teacher = student._lesson.teacher
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_the_loss_is_the_weighted_sum_of_text_and_teacher() -> None:
    student = student_of(weights=0.25)
    loss = float(student(**batch_of([LONG])).detach())
    figures = student.drain()
    assert loss == pytest.approx(0.25 * figures[CROSS_ENTROPY] + 0.75 * figures[DISTILLATION], rel=1e-6)
