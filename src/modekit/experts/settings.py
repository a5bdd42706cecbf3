"""Settings of `modekit specialize`, and among them what a student learns from its teacher, and how much."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field

from modekit.training.settings import Divergence, RandomiseTo, weighed

Mix = Literal["equal", "turns"]
"""How several texts share the steps (distill.py)."""
_WEIGHED = BeforeValidator(partial(weighed, dict.fromkeys(get_args(Divergence), 1.0)))


class DistillSettings(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Settings of a distillation, whose loss is the weighted sum of `losses`. Where `weights` is 1 the teacher is only compared
    with. The temperature is that of arXiv:2407.19610.
    """

    losses: Annotated[dict[Divergence, Annotated[float, Field(gt=0)]], _WEIGHED] = Field(
        {"forward_kl": 1.0},
        min_length=1,
        description="--teacher: names, or names with weights: forward_kl (default), reverse_kl, teacher_ce, total_variation.",
    )
    temperature: float = Field(2.0, gt=0, le=1e3, description="--teacher: softmax temperature of teacher and student.")
    weights: float = Field(0.5, ge=0, le=1, description="--teacher: weight of the text loss, the teacher's is the rest.")


class SpecialistSettings(DistillSettings):
    """All of them. A setting whose description begins with an option has no effect without it."""

    rank: int = Field(16, ge=1, description="--train lora: rank of the adapter.")
    steps: int | None = Field(None, ge=1, description="Optimiser steps; default: once over the text.")
    learning_rate: float | None = Field(None, gt=0, le=10, description="Peak learning rate (default 1e-4; lora 1e-3).")
    batch_tokens: int = Field(4_096, ge=2, description="Tokens per step.")
    sequence_length: int = Field(512, ge=8, description="Longest piece of a document, in tokens.")
    seed: int = Field(0, ge=0, description="Random seed of the text order.")
    mix: Mix | None = Field(
        None, description="--teacher: equal: as much of each --text in every step; turns: one per step; default: shuffled."
    )
    randomise: float = Field(0.0, ge=0, lt=1, description="--tags: probability of a random label.")
    randomise_to: RandomiseTo = Field(
        "all", description="--tags: labels to draw from: all (its own, too), others, generic (none), half."
    )
    generic_share: float = Field(0.3, gt=0, lt=1, description="--generic: its share of the tokens.")
