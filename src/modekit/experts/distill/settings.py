"""What a student learns from its teacher, and how much."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modekit.training.settings import Divergence, losses_said


class DistillSettings(BaseModel):
    """Settings of a distillation.

    Attributes:
        losses: name -> weight above 0; their weighted sum is the distillation loss.
        temperature: of both models' probabilities in it (2 in arXiv:2407.19610).
        weights: what cross-entropy counts, from 0 to 1; distillation counts the rest. At 1 the teacher is only compared with.
        adaptive: in place of it: whichever of the two losses rises counts less (student.py).
        alternate: steps move by cross-entropy and distillation in turn, beginning with cross-entropy.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    losses: dict[Divergence, Annotated[float, Field(gt=0)]] = Field({"forward_kl": 1.0}, min_length=1)
    temperature: float = Field(2.0, gt=0, le=1e3)
    weights: float = Field(0.5, ge=0, le=1)
    adaptive: bool = False
    alternate: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> DistillSettings:
        if self.adaptive and "weights" in self.model_fields_set:
            raise ValueError("weights has no effect with adaptive: leave one of them out")
        return self


def losses_of(said: list[str]) -> dict[str, float]:
    """NAME or NAME=WEIGHT, each once -> weight, 1 where none is said. Raises TrainingError."""
    return losses_said(said, dict.fromkeys(get_args(Divergence), 1.0), where="losses")
