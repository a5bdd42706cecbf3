"""What a student is told of its teacher: every loss is what its name says, pads and ends of documents never count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_model
from modekit.experts.distill.student import CROSS_ENTROPY, DISTILLATION, Lesson, Student, kl_to_teacher
from modekit.experts.settings import DistillSettings
from modekit.text.sequences import TokenSequence
from modekit.training.batches import Batches, DomainSequences, plan_parts, predicted_in
from modekit.training.losses import distillation
from modekit.training.settings import train_settings

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
    return Student(model, lesson, train_settings({"what": ["all"]}, where="test"), 10)


def batch_of(sequences: list[TokenSequence], pad_id: int = 0) -> dict[str, torch.Tensor]:
    corpus = DomainSequences("text", 0, sequences)
    asked = train_settings({"what": ["all"], "batch_tokens": sum(len(each.ids) for each in sequences)}, where="test")
    return Batches([corpus], plan_parts([corpus], asked, steps=1, experts=1, parts=1, pack=False), pad_id)[0]


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


def test_alternating_steps_move_by_one_loss_each_beginning_with_the_text() -> None:
    student = student_of(alternate=True, weights=0.25)
    said: list[tuple[float, dict[str, float]]] = []
    for _ in range(2):
        loss = float(student(**batch_of([LONG])).detach())
        said.append((loss, student.drain()))
    assert said[0][0] == pytest.approx(2 * 0.25 * said[0][1][CROSS_ENTROPY], rel=1e-6)
    assert said[1][0] == pytest.approx(2 * 0.75 * said[1][1][DISTILLATION], rel=1e-6)
