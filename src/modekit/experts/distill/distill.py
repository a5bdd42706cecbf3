"""`modekit specialize STUDENT OUT --teacher MODEL`: a student learns from a text and from a teacher's output on it.

    OUT.training/       states of the training, so that the same command goes on after a kill; removed when all is done
    OUT                 the student: a plain model folder, or a LoRA adapter
    OUT/specialist.json teacher, losses, settings, held-out loss and distance to the teacher before and after
    OUT/distill.csv     both losses and the weight of cross-entropy, by step

The last state is what is taken: no held-out text chooses one, so that students of equal steps can be compared.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from modekit.evaluation.domains import Domain
from modekit.experts.distill.inputs import Mix, StudentAndTeacher, Texts, digest_of_sequences, open_pair, read_texts
from modekit.experts.distill.settings import DistillSettings
from modekit.experts.distill.student import CROSS_ENTROPY, DISTILLATION, SHARE, Lesson, Student, kl_to_teacher
from modekit.experts.moving import What, make_trainable
from modekit.experts.specialist import NewSpecialist, SpecialistFolder, SpecialistRecord, digest_of_source, held_out_losses
from modekit.experts.specialize import RANK
from modekit.files.output import refuse_existing, replaced_by
from modekit.files.write import digest_of_data
from modekit.loaded.engine import Loop, seeded
from modekit.loaded.load import load_model
from modekit.loaded.text_training import Training
from modekit.run import QUIET, Run
from modekit.text.sequences import TokenSequence
from modekit.text.splits import text_record
from modekit.training.batches import Batches, plan_parts, steps_of_one_pass
from modekit.training.end_to_end import loop_of
from modekit.training.request import memory_errors
from modekit.training.settings import TrainSettings, train_settings

_MOST_ROWS = 1_000


@dataclass(frozen=True)
class Distillation:
    """What is asked for.

    Attributes:
        student, teacher: model folders, of any size and family, with one tokenizer.
        texts: files, folders or data sets, relative to `root`; only documents of the fit split are learned from.
        train, rank: what of the student moves; see specialize.py.
        training: how long and how fast; by_length and autocast have no effect.
        settings: what is learned from the teacher.
        mix: how several texts share the steps; see inputs.py.
    """

    student: Path
    teacher: Path
    texts: Sequence[str]
    root: Path
    train: What = "mlp"
    rank: int = RANK
    training: Training = field(default_factory=Training)
    settings: DistillSettings = field(default_factory=DistillSettings)
    mix: Mix | None = None


def distill(asked: Distillation, out: Path, *, overwrite: bool = False, run: Run = QUIET) -> SpecialistRecord:
    """Train a student and write it to `out`: a plain model folder with its tokenizer and dtypes, or a LoRA adapter.

    Goes on after a kill, and ends in the same bytes. Returns what specialist.json in OUT says. Raises SourceError,
    MismatchError (another tokenizer), TextError, TrainingError, OutputError.
    """
    folder = SpecialistFolder(out)
    folder.tidy()
    refuse_existing(out, replaced_by(overwrite), sources=(asked.student, asked.teacher))
    run.begin("read the text")
    pair = open_pair(asked.student, asked.teacher, run=run)
    texts = read_texts(asked.texts, asked.root, pair.tokenizer, asked.training, asked.mix)
    engine = _engine_settings(asked.training, asked.mix)
    request, state = _digests(asked, pair, texts)
    wanted = NewSpecialist(folder, "distill", request, (asked.student, asked.teacher), overwrite, pair.tokenizer, texts.fit)
    with folder.held(request, state):
        with memory_errors():
            lesson = Lesson(load_model(asked.teacher, run=run), pair.vocabulary, asked.settings)
            student = load_model(asked.student, run=run)
            with seeded(engine.seed, student.device):  # a new adapter's first weights
                save = make_trainable(student, pair.student, asked.train, asked.rank)
            before = _measured(student, lesson, texts.held_out, "before", run)
            steps, corpora = engine.steps or steps_of_one_pass(texts.corpora, engine), texts.corpora
            parts = plan_parts(corpora, engine, steps=steps, experts=len(corpora), parts=1, pack=False)
            batches, loop = Batches(corpora, parts, pad_id=0), loop_of(engine, steps, student.device)
            going = Loop(Student(student, lesson, engine, steps), batches, loop, folder.path, run)
            going.go()
            student.eval()
            after = _measured(student, lesson, texts.held_out, "after", run)
        taken = going.history
        draws = [draw for part in parts for row in part.rows for draw in row]
        tokens = sum(len(corpora[draw.corpus].sequences[draw.sequence].ids) for draw in draws)
        measured = {name: {"before": value, "after": after[name]} for name, value in before.items()}
        record = SpecialistRecord.model_validate(
            {**_settings(asked, pair, texts, len(taken), tokens), **_losses(taken), **measured}
        )
        wanted.write(record, save, run, distill=_table(taken))
    return record


def _engine_settings(training: Training, mix: Mix | None) -> TrainSettings:
    """The same settings as those of a mixture's training: everything that moves has the backbone's rate."""
    same = ("steps", "batch_tokens", "seed", "sequence_length", "weight_decay", "warmup", "clip")
    values = {
        "what": ["all"],
        "backbone_learning_rate": training.learning_rate,
        **{name: getattr(training, name) for name in same},
        **({"regime": "joint"} if mix == "turns" else {}),
    }
    return train_settings(values, where="modekit specialize --teacher")


def _digests(asked: Distillation, pair: StudentAndTeacher, texts: Texts) -> tuple[str, str]:
    """Of what is asked for, and of what it starts from."""
    what = [
        asked.train,
        asked.rank,
        dataclasses.asdict(asked.training),
        asked.settings.model_dump(mode="json"),
        asked.mix,
        digest_of_sequences(texts.sequences),
        digest_of_sequences(texts.held_out),
    ]
    return digest_of_data(what), digest_of_data([digest_of_source(pair.student), pair.teacher_digest])


def _measured(
    student: PreTrainedModel, lesson: Lesson, held_out: Sequence[TokenSequence], when: str, run: Run
) -> dict[str, float | None]:
    """Loss of held-out text, and how far the student is from its teacher there; None of each without such text."""
    domain = Domain("held-out", None, list(held_out))
    loss = held_out_losses(student, [domain], when, run).get(domain.name)
    run.begin(f"compare {when}")
    return {"held_out_loss": loss, "held_out_kl": kl_to_teacher(student, lesson, held_out)}


def _settings(asked: Distillation, pair: StudentAndTeacher, texts: Texts, steps: int, tokens: int) -> dict[str, object]:
    """What the record says of what was asked for."""
    settings = asked.settings
    return {
        "specialist": asked.train,
        "base_model": asked.student.name,
        **({"rank": asked.rank} if asked.train == "lora" else {}),
        "teacher": {
            "name": pair.teacher.spec,
            "digest": pair.teacher_digest,
            "losses": settings.losses,
            "temperature": settings.temperature,
            "weights": "adaptive" if settings.adaptive else settings.weights,
            "combined": "in turn" if settings.alternate else "sum",
        },
        "training": {**dataclasses.asdict(asked.training), "steps": steps, "tokens_read": tokens},
        "text": text_record(texts.fit, sum(corpus.tokens for corpus in texts.corpora)),
    }


def _losses(steps: Sequence[Mapping[str, float]]) -> dict[str, object]:
    """What the record says of the steps."""
    named = {"training_loss": CROSS_ENTROPY, "distillation_loss": DISTILLATION}
    losses = {name: {"before": steps[0][key], "after": steps[-1][key]} for name, key in named.items()}
    return {**losses, "cross_entropy_weight": sum(each[SHARE] for each in steps) / len(steps)}


def _table(steps: Sequence[Mapping[str, float]]) -> bytes:
    """Losses and weight by step: of every step, or of _MOST_ROWS evenly spaced ones."""
    every = -(-len(steps) // _MOST_ROWS)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "cross_entropy", "distillation", "cross_entropy_weight"])
    for entry in steps[::every]:
        figures = (f"{entry[name]:.6g}" for name in (CROSS_ENTROPY, DISTILLATION, SHARE))
        writer.writerow([int(entry["step"]), *figures])
    return text.getvalue().encode()
