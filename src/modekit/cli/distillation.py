"""Options of `specialize` that need a teacher, and what it asks for with one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from modekit.cli.shell import refuse_without_effect, resolved
from modekit.errors import ModekitError

if TYPE_CHECKING:
    from modekit.experts.distill.distill import Distillation
    from modekit.experts.distill.inputs import Mix
    from modekit.experts.distill.settings import DistillSettings
    from modekit.experts.moving import What
    from modekit.loaded.text_training import Training


@dataclass(frozen=True)
class TeacherOptions:
    """What the expert learns from a teacher besides the text."""

    teacher: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of a model to learn from; any size, BASE's tokenizer (docs/distill.md)."),
    ] = None
    distill: Annotated[
        list[str] | None,
        typer.Option(help="NAME or NAME=WEIGHT; repeatable: forward_kl (default), reverse_kl, teacher_ce, total_variation."),
    ] = None
    temperature: Annotated[float | None, typer.Option(help="Softmax temperature of teacher and student (default 2).")] = None
    weights: Annotated[
        float | None, typer.Option(help="Weight of the text loss (0 to 1); the teacher loss gets the rest (default 0.5).")
    ] = None
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Adapt the weights: a loss that rises counts less (instead of --weights).")
    ] = False
    alternate: Annotated[
        bool, typer.Option("--alternate", help="Alternate steps on text and teacher, instead of their sum.")
    ] = False
    mix: Annotated[
        str | None,
        typer.Option(
            help="How several --text share the steps (default: shuffled together). equal: as much of each in every step; "
            "turns: one text per step."
        ),
    ] = None
    keep_teacher: Annotated[
        Path | None, typer.Option(help="Folder for the teacher's answers; the next command reads them from there.")
    ] = None
    teacher_top_k: Annotated[
        int | None, typer.Option(min=1, help="Most probable tokens to keep per position (--keep-teacher; default 64).")
    ] = None

    def check(self) -> None:
        """Raise ModekitError for an option that changes nothing."""
        named = {f"--{name.replace('_', '-')}": value or None for name, value in vars(self).items() if name != "teacher"}
        if self.teacher is None:
            refuse_without_effect("a teacher (--teacher MODEL)", named)
        if self.keep_teacher is None:
            refuse_without_effect(
                "a folder for what the teacher says (--keep-teacher)", {"--teacher-top-k": self.teacher_top_k}
            )

    def _settings(self) -> DistillSettings:
        from modekit.experts.distill.settings import distill_settings, losses_of

        said = {
            "losses": losses_of(self.distill) if self.distill else None,
            "temperature": self.temperature,
            "weights": self.weights,
            "adaptive": self.adaptive or None,
            "alternate": self.alternate or None,
        }
        return distill_settings({name: value for name, value in said.items() if value is not None}, where="--teacher")

    def asked(self, student: Path, text: list[str], train: What, rank: int, training: Training) -> Distillation:
        """What is asked for with a teacher. Raises TrainingError, and SourceError where there is no teacher."""
        from modekit.experts.distill.distill import Distillation
        from modekit.experts.distill.settings import TOP_K
        from modekit.sources.open import model_folder

        assert self.teacher is not None
        root = Path.cwd()
        settings = self._settings()
        kept = resolved(self.keep_teacher) if self.keep_teacher is not None else None
        teacher = model_folder(self.teacher, None, root=root, label="--teacher")
        return Distillation(
            student,
            teacher,
            text,
            root,
            train,
            rank,
            training,
            settings,
            kept,
            self.teacher_top_k or TOP_K,
            self._mix(text),
        )

    def _mix(self, text: list[str]) -> Mix | None:
        if self.mix is not None and self.mix not in ("equal", "turns"):
            raise ModekitError(
                "unknown choice", where="--mix", found=self.mix, expected="equal or turns", remedy="write one of them"
            )
        if self.mix is not None and len(text) < 2:
            refuse_without_effect("several texts (--text A --text B)", {"--mix": self.mix})
        return cast("Mix | None", self.mix)
