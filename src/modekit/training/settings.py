"""What `modekit train` does: which parameters move, towards what, on which text, for how long.

Every default that is a number has its source beside it. The settings of a run are kept in modekit.json, and
`modekit train OUT --settings FILE` reads them from YAML under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from modekit.errors import TrainingError
from modekit.files.read import UNREADABLE
from modekit.files.typed import problem_said, shortened
from modekit.recipes.strict import did_you_mean
from modekit.recipes.strict_yaml import read_yaml
from modekit.text.amounts import SAMPLE_TOKENS

Group = Literal["routers", "attention", "norms", "mlp", "embeddings", "head", "experts", "all"]
"""What may move; training/moving.py finds the parameters."""

_Divergence = Literal["distill", "distill_reverse", "forward_kl", "reverse_kl", "teacher_ce", "total_variation"]
Loss = Literal["lm", _Divergence, "label", "balance", "importance", "load", "mutual", "z", "consistency"]
"""See training/losses.py."""

Gate = Literal["base", "sinkhorn", "random", "domain-random", "dselect", "dense-to-sparse"]
"""See training/gates.py."""

RandomiseTo = Literal["half", "all", "others", "generic"]
"""What a label becomes that is drawn anew: half of them none, half another; any, its own among them; another; none."""

WEIGHTS: dict[Loss, float] = {
    **dict.fromkeys(get_args(Loss), 1.0),
    "label": 0.1,  # of our own: a tenth of a nat of routing against a nat of text (benchmarks/training.md)
    "balance": 0.01,  # alpha, arXiv:2101.03961, Section 2.2
    "importance": 0.1,  # w_importance, arXiv:1701.06538, Section 4
    "load": 0.1,  # w_load, arXiv:1701.06538, Section 4
    "mutual": 0.001,  # w_MI, arXiv:2212.08066
    "z": 0.001,  # c_z, arXiv:2202.08906, Section 3
    "consistency": 2.5,  # half the alpha of arXiv:2110.04260's script: there both passes' lm is a sum, here a mean
}
"""Weight of a loss that is named without one."""

DISTILLS = set(get_args(_Divergence))
"""Losses that need the domains' own experts as teachers."""
_READS_LABELS = "tags, regime: joint, the losses label and mutual, gate: domain-random, or distillation without a teacher"
_FEWEST_SELECT_TOKENS = 64
OF_ROUTERS = {"label", "balance", "importance", "load", "mutual", "z"}
"""Losses that are taken of what routers say."""


@dataclass(frozen=True)
class GateRow:
    """What follows from a gate: whether top_k says how many experts a token gets, whether it may get any number of them,
    whether two passes over a text differ, whether weights have a gradient, whether labels matter, and whether loads are equal.
    """

    reads_top_k: bool = False
    takes_any: bool = False
    draws: bool = False
    teaches: bool = True
    reads_labels: bool = False
    balances: bool = False

    @property
    def takes_one(self) -> bool:
        """Whether every token gets one expert."""
        return not (self.reads_top_k or self.takes_any)


GATES: Mapping[Gate, GateRow] = {
    "base": GateRow(balances=True),
    "sinkhorn": GateRow(reads_top_k=True),
    "random": GateRow(reads_top_k=True, draws=True, teaches=False),
    "domain-random": GateRow(draws=True, teaches=False, reads_labels=True),
    "dselect": GateRow(reads_top_k=True, takes_any=True),
    "dense-to-sparse": GateRow(takes_any=True, draws=True),
}
"""Gates, and what follows from them."""


class TrainSettings(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Settings of one run, each as docs/training.md says it; unknown keys and settings without effect are errors.

    Losses of distillation count times temperature^2 (arXiv:1503.02531, Section 2); `regime` joint is JEET and MoE-CE of
    arXiv:2407.19610; `randomise` is the domain randomisation of arXiv:2407.01126; `train_top_k` 0 trains densely what is sparse
    afterwards (DS-MoE, arXiv:2404.05567). None of it is the mixture's own, but at least 2 in native mixtures, whose
    renormalised weight is 1 and gives no gradient at 1.
    """

    what: list[Group] = Field(["routers"], min_length=1)
    lora: int | None = Field(None, ge=1)
    losses: dict[Loss, float] = Field({"lm": 1.0}, min_length=1)
    temperature: float = Field(1.0, gt=0)
    adaptive: bool = False
    regime: Literal["mixture", "joint"] = "mixture"
    teacher: str | None = None
    steps: int | None = Field(None, ge=1)
    batch_tokens: int = Field(4_096, ge=16)
    accumulate: int | None = Field(None, ge=1)
    sequence_length: int = Field(512, ge=8)
    learning_rate: float = Field(5e-3, gt=0, le=10)
    backbone_learning_rate: float = Field(1e-4, gt=0, le=10)
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.06, ge=0, lt=1)
    clip: float = Field(1.0, gt=0)
    train_top_k: int | None = Field(None, ge=0)
    gate: Gate | None = None
    capacity: float | None = Field(None, gt=0)
    overflow: Literal["drop", "next", "random"] = "drop"
    priority: Literal["position", "score"] = "position"
    mix: Literal["equal", "proportional", "temperature"] = "equal"
    mix_temperature: float = Field(2.0, ge=1)
    generic: list[str] = []
    generic_share: float = Field(0.1, gt=0, lt=1)
    randomise: float = Field(0.0, ge=0, lt=1)
    randomise_to: RandomiseTo = "half"
    tags: bool = False
    pack: bool | None = None
    share: float = Field(1.0, gt=0, le=1)
    select_tokens: int = Field(SAMPLE_TOKENS, ge=_FEWEST_SELECT_TOKENS)
    evaluate_every: int | None = Field(None, ge=1)
    patience: int = Field(4, ge=1)
    precision: Literal["float32", "bfloat16"] | None = None
    checkpointing: bool = False
    seed: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _read_given(cls, values: Any) -> Any:
        return {"what": ["all"], **values} if isinstance(values, dict) and values.get("regime") == "joint" else values

    @model_validator(mode="after")
    def _no_dead_settings(self) -> TrainSettings:
        said = self.model_fields_set
        dead = {
            "temperature": not DISTILLS & set(self.losses),
            "teacher": not DISTILLS & set(self.losses),
            "adaptive": self.adaptive and not ("lm" in self.losses and DISTILLS & set(self.losses)),
            "mix_temperature": self.mix != "temperature",
            "generic_share": not self.generic,
            "randomise": self.randomise > 0 and not self._reads_label,
            "randomise_to": self.randomise == 0,
            "learning_rate": not {"routers", "all"} & set(self.what) or self.is_joint,
            "train_top_k": self.is_joint or not self.gate_row.reads_top_k,
            "gate": self.is_joint and self.gate is not None,
            "capacity": self.capacity is not None and (self.is_joint or self.gate_row.balances),
            "overflow": self.capacity is None
            or (self.overflow == "random" and (self.gate_row.takes_one or self.train_top_k == 1)),
            "priority": self.capacity is None,
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
        self._check_gate()
        if set(self.losses) <= OF_ROUTERS and set(self.what) == {"head"}:
            raise ValueError("losses of routers do not reach the head; add lm or distill")
        if self.lora is not None and set(self.what) <= {"routers", "norms"}:
            raise ValueError("lora needs matrices that are worth it: name attention, mlp, embeddings, head, experts or all")
        return self

    def _check_gate(self) -> None:
        """Raise ValueError for what a gate cannot teach, and for two passes that are one."""
        if not self.gate_row.teaches and set(self.what) == {"routers"} and not OF_ROUTERS & set(self.losses):
            raise ValueError(
                f"gate: {self.gate} does not ask routers, so that none learns: train experts, or add a loss of routers"
            )
        if "consistency" in self.losses and not (self.gate_row.draws or self.overflow == "random"):
            drawing = [f"gate: {name}" for name, row in GATES.items() if row.draws]
            raise ValueError(f"consistency needs experts that are drawn: {', '.join(drawing)} or overflow: random")

    @property
    def _reads_label(self) -> bool:
        reads = {"label", "mutual"} | (DISTILLS if self.teacher is None else set())  # one teacher teaches every label alike
        return self.tags or self.is_joint or self.gate_row.reads_labels or bool(reads & set(self.losses))

    @property
    def gate_row(self) -> GateRow:
        """What follows from the gate, or the mixture's own routing."""
        return GateRow(reads_top_k=True) if self.gate is None else GATES[self.gate]

    @property
    def chooses(self) -> bool:
        """Whether experts are chosen in another way than the mixture's own."""
        return self.gate is not None or self.capacity is not None

    @property
    def is_joint(self) -> bool:
        """Whether text goes to the expert of its domain, one domain a step."""
        return self.regime == "joint"


def train_settings(values: dict[str, Any], *, where: str) -> TrainSettings:
    """Checked settings. Raises TrainingError with all problems and their places."""
    try:
        return TrainSettings.model_validate(values)
    except ValidationError as error:
        problems = []
        for each in error.errors():
            key = ".".join(str(part) for part in each["loc"] if not str(part).startswith("literal"))
            unknown = f"unknown key; {did_you_mean(key, TrainSettings.model_fields) or 'remove it'}"
            said = unknown if each["type"] == "extra_forbidden" else problem_said(each["msg"])
            problems.append(f"{key}: {said}" if key else said)
        raise TrainingError(
            "the settings of this training are wrong",
            where=where,
            found="; ".join(problems),
            remedy="correct them; docs/training.md names them all",
        ) from None


def losses_said(said: Sequence[str], known: Mapping[Any, float], *, where: str) -> dict[str, float]:
    """NAME or NAME=WEIGHT, each once -> weight, the known one where none is said.

    Raises TrainingError for what is neither, or a name twice.
    """
    weights: dict[str, float] = {}
    for each in said:
        name, sign, value = each.partition("=")
        try:
            weight = float(value) if sign else known.get(name, math.nan)
        except ValueError:
            weight = math.nan
        if math.isnan(weight) or name in weights or name not in known:
            raise TrainingError(
                "unknown loss or weight, or a loss that is named twice",
                where=where,
                found=each,
                expected=f"one of {', '.join(known)}, or NAME=WEIGHT",
                remedy="correct it",
            )
        weights[name] = weight
    return weights


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


def given_settings(said: Mapping[str, Any], file: Path | None, *, held_out_tokens: int | None = None) -> TrainSettings:
    """Settings of a file with what was said besides, which counts more. Raises TrainingError.

    `held_out_tokens` is how much held-out text per domain the tables were asked to read, if they were: where nothing says how
    much of it states are compared on, that is no more.
    """
    values = {**(read_settings(file) if file is not None else {}), **said}
    if held_out_tokens:
        default = int(TrainSettings.model_fields["select_tokens"].default)
        values.setdefault("select_tokens", max(_FEWEST_SELECT_TOKENS, min(default, held_out_tokens)))
    return train_settings(values, where=str(file) if file is not None else "modekit train")
