"""What `modekit train` does: which parameters move, towards what, on which text, for how long.

Every default that is a number has its source beside it. The settings of a run are kept in modekit.json, and
`modekit train OUT --settings FILE` reads them from YAML under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from modekit.errors import TrainingError
from modekit.files.read import UNREADABLE
from modekit.files.typed import as_kind, shortened
from modekit.recipes.read import read_yaml
from modekit.text.amounts import SAMPLE_TOKENS

_Kind = TypeVar("_Kind", bound=BaseModel)

Group = Literal["routers", "attention", "norms", "mlp", "embeddings", "head", "experts", "all"]
"""What may move; training/moving.py finds the parameters."""

Divergence = Literal["forward_kl", "reverse_kl", "teacher_ce", "total_variation"]
Loss = Literal["lm", Divergence, "label", "balance", "z"]
"""See training/losses.py."""

RandomiseTo = Literal["half", "all", "others", "generic"]
"""What a label becomes that is drawn anew: half of them none, half another; any, its own among them; another; none."""

WEIGHTS: dict[Loss, float] = {
    **dict.fromkeys(get_args(Loss), 1.0),
    "label": 0.1,  # of our own: a tenth of a nat of routing against a nat of text (benchmarks/training.md)
    "balance": 0.01,  # alpha, arXiv:2101.03961, Section 2.2
    "z": 0.001,  # c_z, arXiv:2202.08906, Section 3
}
"""Weight of a loss that is named without one."""

DISTILLS = set(get_args(Divergence))
"""Losses that need teachers: the domains' own experts, or one for all."""
OF_ROUTERS = {"label", "balance", "z"}
"""Losses that are taken of what routers say."""
_READS_LABELS = "tags, regime: joint, the loss label, or distillation without a teacher"


def weighed(known: Mapping[Any, float], said: object) -> object:
    """NAME or NAME=WEIGHT, in a list or between commas, each once -> weight, the known one where none is said.

    Raises TrainingError for what is neither, or a name twice. What is no list stays as it is.
    """
    weights, listed = dict[str, float](), said.split(",") if isinstance(said, str) else said
    if not isinstance(listed, list):
        return said
    for each in listed:
        name, sign, value = str(each).partition("=")  # YAML may hold anything
        try:
            weight = float(value) if sign else known.get(name, math.nan)
        except ValueError:
            weight = math.nan
        if math.isnan(weight) or name in weights or name not in known:
            raise TrainingError(
                "unknown loss or weight, or a loss that is named twice",
                where="losses",
                found=each,
                expected=f"one of {', '.join(known)}, or NAME=WEIGHT",
                remedy="correct it",
            )
        weights[name] = weight
    return weights


class TrainSettings(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Settings of one run; unknown keys and settings without effect are errors.

    Losses of distillation count times temperature^2 (arXiv:1503.02531, Section 2); `regime` joint is JEET and MoE-CE of
    arXiv:2407.19610; `randomise` is the domain randomisation of arXiv:2407.01126; `train_top_k` 0 trains densely what is sparse
    afterwards (DS-MoE, arXiv:2404.05567).
    """

    what: list[Group] = Field(["routers"], min_length=1, description=f"Groups that move: {', '.join(get_args(Group))}.")
    losses: Annotated[dict[Loss, float], BeforeValidator(partial(weighed, WEIGHTS))] = Field(
        {"lm": 1.0}, min_length=1, description=f"Names, or names with weights (default lm): {', '.join(WEIGHTS)}."
    )
    temperature: float = Field(1.0, gt=0, description="Softmax temperature of distillation.")
    regime: Literal["mixture", "joint"] = Field("mixture", description="joint: text of one domain a step, for its expert.")
    teacher: str | None = Field(None, description="Folder or hub id of one teacher for all domains, not their experts.")
    steps: int | None = Field(None, ge=1, description="Optimiser steps; default: once over the text.")
    batch_tokens: int = Field(4_096, ge=16, description="Tokens per step, of all processes.")
    accumulate: int | None = Field(None, ge=1, description="Parts of a step per process (default 1; 2 without packing).")
    sequence_length: int = Field(512, ge=8, description="Longest piece of a document, in tokens.")
    learning_rate: float = Field(5e-3, gt=0, le=10, description="Peak learning rate of the routers.")
    backbone_learning_rate: float = Field(1e-4, gt=0, le=10, description="Peak learning rate of everything else.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of everything but routers.")
    warmup: float = Field(0.06, ge=0, lt=1, description="Share of the steps over which rates rise.")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    train_top_k: int | None = Field(None, ge=0, description="Experts per token in training alone; 0: all.")
    mix: Literal["equal", "proportional", "temperature"] = Field("equal", description="Tokens per domain (docs/training.md).")
    mix_temperature: float = Field(2.0, ge=1, description="mix=temperature: domains count by size^(1 / this).")
    generic: list[str] = Field([], description="Text of no domain.")
    generic_share: float = Field(0.1, gt=0, lt=1, description="Share of the tokens for generic text.")
    randomise: float = Field(0.0, ge=0, lt=1, description="Probability of a random label.")
    randomise_to: RandomiseTo = Field("half", description="Labels to draw from: half, all, others, generic.")
    tags: bool = Field(False, description="Read every text with the reserved token of its domain.")
    share: float = Field(1.0, gt=0, le=1, description="Share of the documents to train on.")
    select_tokens: int = Field(SAMPLE_TOKENS, ge=64, description="Held-out tokens per domain that states are compared on.")
    evaluate_every: int | None = Field(None, ge=1, description="Steps between states that are compared (default: a tenth).")
    patience: int = Field(4, ge=1, description="Comparisons without a better state until training ends.")
    precision: Literal["float32", "bfloat16"] | None = Field(
        None, description="Precision of matrix products (default bfloat16 on accelerators that have it)."
    )
    checkpointing: bool = Field(False, description="Compute activations again in the backward pass, to save memory.")
    seed: int = Field(0, ge=0, description="Random seed.")

    @model_validator(mode="before")
    @classmethod
    def _read_given(cls, values: Any) -> Any:
        return {"what": ["all"], **values} if isinstance(values, dict) and values.get("regime") == "joint" else values

    @model_validator(mode="after")
    def _no_dead_settings(self) -> TrainSettings:
        said = self.model_fields_set
        reads = {"label"} | (DISTILLS if self.teacher is None else set())  # one teacher teaches every label alike
        reads_label = self.tags or self.is_joint or reads & set(self.losses)
        dead = {
            "temperature": not DISTILLS & set(self.losses),
            "teacher": not DISTILLS & set(self.losses),
            "mix_temperature": self.mix != "temperature",
            "generic_share": not self.generic,
            "randomise": self.randomise > 0 and not reads_label,
            "randomise_to": self.randomise == 0,
            "learning_rate": not {"routers", "all"} & set(self.what) or self.is_joint,
            "train_top_k": self.is_joint,
            "backbone_learning_rate": set(self.what) == {"routers"},
            "weight_decay": set(self.what) == {"routers"} and self.weight_decay > 0,
        }
        found = [key for key, is_dead in dead.items() if is_dead and key in said]
        if found:
            needed = f", or add what reads labels: {_READS_LABELS}" if "randomise" in found else ""
            raise ValueError(f"settings without effect here: {', '.join(found)}; remove them{needed}")
        if any(weight <= 0 for weight in self.losses.values()):
            raise ValueError("weights of losses must be above 0; leave a loss out to turn it off")
        if self.is_joint and ("routers" in self.what or OF_ROUTERS & set(self.losses)):
            raise ValueError("regime: joint trains no router: remove what and losses of routers")
        if set(self.losses) <= OF_ROUTERS and set(self.what) == {"head"}:
            raise ValueError("losses of routers do not reach the head; add lm or forward_kl")
        return self

    @property
    def is_joint(self) -> bool:
        """Whether text goes to the expert of its domain, one domain a step."""
        return self.regime == "joint"


def checked_settings(values: Mapping[str, object], kind: type[_Kind], *, where: str) -> _Kind:
    """Checked settings of a kind. Raises TrainingError with the first thing wrong."""
    try:
        return as_kind(values, kind)
    except ValueError as error:
        raise TrainingError(
            "the settings of this training are wrong",
            where=where,
            found=error,
            remedy="correct them; docs/training.md names them all",
        ) from None


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises TrainingError when there is none."""
    try:
        values = read_yaml(path)
    except UNREADABLE as error:
        found, remedy = getattr(error, "strerror", None), f"correct the {'path' if isinstance(error, OSError) else 'file'}"
        raise TrainingError(
            "the settings file cannot be read", where=str(path), found=found or shortened(error), remedy=remedy
        ) from None
    if not isinstance(values, dict):
        raise TrainingError(
            "the settings file holds no mapping", where=str(path), expected="what: [routers]", remedy="correct it"
        )
    return values


def given_settings(said: Mapping[str, Any], file: Path | None) -> TrainSettings:
    """Settings of a file with what was said besides, which counts more. Raises TrainingError."""
    values = {**(read_settings(file) if file is not None else {}), **said}
    return checked_settings(values, TrainSettings, where=str(file) if file is not None else "modekit train")
