"""Fine-tune a base model on a domain so that it mixes well: `modekit specialize BASE OUT --text ... --train mlp|lora|full`.

mlp     only the FFN moves, its biases included; attention, norms, embeddings and head stay bit-identical, so that a mixture of
such experts on the base's backbone loses nothing of them (FlexOlmo and DUME train this way)
lora    low-rank changes of every linear layer of the decoder; OUT is an adapter, an ordinary PEFT folder
full    everything moves, as in most models one finds; what moved outside the FFN cannot be carried by FFN experts
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.checkpoint.open import open_checkpoint
from modekit.checkpoint.record import RECORD_FILE
from modekit.errors import SourceError, UnsupportedError
from modekit.experts.distill import CROSS_ENTROPY, DISTILLATION, Lesson, Teaching, kl_to_teacher
from modekit.experts.labelled import Generic, Labelled, Material, Reading, read_material, relabelled
from modekit.experts.moving import Save, What, make_trainable
from modekit.experts.specialist import BeforeAfter, SpecialistFolder, SpecialistRecord, digest_of_source, held_out_scores
from modekit.files.change import refuse_existing
from modekit.files.copies import library_writes
from modekit.files.marker import Kind
from modekit.files.place import Replace, replaced_by
from modekit.files.staging import staging
from modekit.files.typed import as_kind
from modekit.files.write import digest_of_data, write_file, write_json
from modekit.loaded.engine import seeded
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.text_training import ReadInPass, Training, train_on_text
from modekit.run import QUIET, Run
from modekit.sources.class_names import named_by_class
from modekit.sources.config import OF_A_MIXTURE, whole
from modekit.sources.source import SPECIALIST_FILE, open_source
from modekit.sources.tokenizer import check_ids_fit
from modekit.text.documents import folders_of
from modekit.text.splits import TRAINED_FILE, digests_in, mark_of
from modekit.text.tags import add_tags, labels_of, tag_ids, tag_of
from modekit.training.engine import log_of
from modekit.training.request import memory_errors


def specialize(
    base: Path,
    out: Path,
    texts: Sequence[str] | Labelled,
    *,
    root: Path,
    train: What = "mlp",
    rank: int = 16,
    hub: tuple[str, str] | None = None,
    training: Training,
    generic: Generic | None = None,
    teaching: Teaching | None = None,
    overwrite: bool = False,
    run: Run = QUIET,
) -> SpecialistRecord:
    """Train a specialist and write it: a plain model folder with the base's tokenizer and dtypes, or a LoRA adapter.

    `rank` is that of the adapter, and so is its alpha: scale 1. `hub`: id and commit of a base that is the hub's.
    `texts` with labels are read with their tags (labelled.py): the tokenizer gets those that it does not have, and the model
    rows for them, which move whatever else does. With a teacher (distill.py), which knows no tags, `training.by_length` and
    `autocast` have no effect.

    Only documents of the fit split are read, so that the held-out ones stay held out. Of those `training.held_out_tokens` per
    domain are scored, before and after. Goes on after a kill from the last state in OUT.training (specialist.py).

    Returns what specialist.json in OUT says. Raises TextError, MismatchError (a teacher with another tokenizer), SourceError,
    UnsupportedError (a plain mixture), OutputError, TrainingError, and InterruptError for Ctrl-C, which says what was kept.
    """
    folder = SpecialistFolder(out)
    folder.tidy()
    sources = (base,) if teaching is None else (base, teaching.teacher)
    given = [*(texts.texts.values() if isinstance(texts, Labelled) else [texts]), generic.texts if generic else []]
    refuse_existing(out, replaced_by(overwrite), sources=[*sources, *folders_of(given, root)])
    source = named_by_class(open_source("BASE", str(base), base, run=run))
    if (base / RECORD_FILE).exists() and open_checkpoint(base).shape.channels is not None:
        raise UnsupportedError(
            "channels lead each token of this mixture to its expert, and training would move them",
            where=f"BASE ({base.name})",
            remedy=OF_A_MIXTURE,
        )
    run.begin("read the text")
    reading = Reading(load_tokenizer(base, run=run), root, training)
    teacher = None if teaching is None else teaching.open(source, run)
    new = _new_tags(texts, reading, train, source.config)
    material = read_material(texts, generic, reading, apart=teaching is not None and teaching.mix is not None)
    read: ReadInPass | None = None
    if isinstance(texts, Labelled) and texts.randomise:
        read = relabelled(material.sequences, texts, reading)
    digests = [digest_of_source(each) for each in (source, teacher) if each is not None]
    # Of all that decides what comes out, but for the weights of base and teacher.
    learned = None if teaching is None else [teaching.as_data(), teaching.mix]
    request = digest_of_data([train, rank, dataclasses.asdict(training), material.as_asked(), list(new), learned])
    work = _Work(folder, request, sources, reading, material, run)
    with folder.held(request, digest_of_data(digests)), memory_errors():
        lesson = None
        if teaching is not None and teacher is not None:
            lesson = teaching.lesson(source, teacher, reading.tokenizer, run)
        model = load_model(base, run=run)
        with seeded(training.seed, model.device):  # a new adapter's first weights
            save = make_trainable(model, source, train, rank, new, hub)
        before = folder.recall("before", lambda data: as_kind(data, Measured)) or work.measured(model, lesson, "before")
        folder.keep("before", before.model_dump(mode="json"))
        said, log = work.learned(model, read, teaching, lesson, digests[-1])
        after = work.measured(model, lesson, "after")
        name = base.name if hub is None else hub[0]
        about = {"specialist": train, "base_model": name, **({"rank": rank} if train == "lora" else {})}
        record = SpecialistRecord.model_validate({**about, **said, **material.record, **before.until(after)})
        work.write(record, save, log, replaced_by(overwrite))
    return record


@dataclass(frozen=True)
class _Work:
    """Where an expert goes, by which request (a digest of all that decides what comes out), of which folders, and of what."""

    folder: SpecialistFolder
    request: str
    sources: tuple[Path, ...]
    reading: Reading
    material: Material
    run: Run

    def learned(
        self, model: PreTrainedModel, read: ReadInPass | None, teaching: Teaching | None, lesson: Lesson | None, digest: str
    ) -> tuple[dict[str, object], bytes | None]:
        """Train on the text, or with a teacher: what the record says of it, and with a teacher the log of its steps."""
        training, folder, asked = self.reading.training, self.folder.path, dataclasses.asdict(self.reading.training)
        if teaching is None or lesson is None:
            losses = train_on_text(model, self.material.sequences, training, read=read, folder=folder, run=self.run)
            return {"training": {**asked, "steps": len(losses)}, "training_loss": _ends(losses)}, None
        steps, tokens = teaching.teach(model, lesson, self.material, training, folder, self.run)
        said = {
            "teacher": {"name": teaching.teacher.name, "digest": digest, **teaching.as_data()},
            "training": {**asked, "steps": len(steps), "tokens_read": tokens},
            "training_loss": _ends([each[CROSS_ENTROPY] for each in steps]),
            "distillation_loss": _ends([each[DISTILLATION] for each in steps]),
        }
        return said, log_of(steps)

    def measured(self, model: PreTrainedModel, lesson: Lesson | None, when: str) -> Measured:
        """What held-out text says of the model."""
        held_out = self.material.held_out
        scores, kl = held_out_scores(model, held_out, when, self.run), None
        if lesson is not None:
            self.run.begin(f"compare {when}")
            kl = kl_to_teacher(model, lesson, [sequence for domain in held_out for sequence in domain.sequences])
        return Measured(losses={name: score.loss for name, score in scores.items()}, kl=kl)

    def write(self, record: SpecialistRecord, save: Save, log: bytes | None, replace: Replace) -> None:
        """Put it in its place: weights, log, and the record, which is announced first, so that a kill then costs nothing.

        Raises OutputError.
        """
        self.run.begin("write")
        is_adapter, made_by, data = record.specialist == "lora", f"specialize {self.request}", record.as_data()
        kind: Kind = "adapter" if is_adapter else "model"
        with staging(self.folder.out, made_by, kind, sources=self.sources, replace=replace, sync=self.run.sync) as stage:
            with library_writes(stage.folder) as written:
                save(written)
                if not is_adapter:
                    self.reading.tokenizer.save_pretrained(written)
            if log is not None:
                write_file(stage.folder / "distill.csv", log)
            self.folder.announce(data)
            older = {digest for source in self.sources for digest in digests_in(source / TRAINED_FILE)}
            marks = dict.fromkeys([*map(mark_of, self.material.fit), *sorted(older)])
            write_file(stage.folder / TRAINED_FILE, "".join(f"{mark}\n" for mark in marks).encode())
            write_json(stage.folder / SPECIALIST_FILE, data)


class Measured(BaseModel, frozen=True):
    """Held-out losses by domain, and with a teacher how far it is; None where there is no held-out text."""

    losses: dict[str, float]
    kl: float | None = None

    def until(self, after: Measured) -> dict[str, object]:
        """What the record says of both: the mean over the domains, and each where there are several."""
        means = [sum(each.losses.values()) / len(each.losses) if each.losses else None for each in (self, after)]
        each = {name: _ends((loss, after.losses[name])) for name, loss in self.losses.items()}
        return {
            "held_out_loss": _ends(means),
            **({"held_out_loss_by_label": each} if len(each) > 1 else {}),
            **({"held_out_kl": _ends((self.kl, after.kl))} if self.kl is not None else {}),
        }


def _ends(values: Sequence[float | None]) -> BeforeAfter:
    return BeforeAfter(before=values[0], after=values[-1])


def _new_tags(texts: Sequence[str] | Labelled, reading: Reading, train: What, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Give the tokenizer the tags that are asked for; ids of those that it did not have, and of any that the model has no row
    for. Raises MismatchError where other tokens have none, SourceError for an adapter, in which tags could not be kept,
    UnsupportedError for a model that has two embeddings.
    """
    rows = whole(config, "vocab_size")
    if not isinstance(texts, Labelled):
        _check_rows(reading.tokenizer, rows)
        return ()
    added = add_tags(reading.tokenizer, texts.texts)
    labels = labels_of(reading.tokenizer)
    _check_rows(reading.tokenizer, rows, but=set(map(tag_of, labels)))
    known = tag_ids(reading.tokenizer, labels)
    new = tuple(each for each in known if each in added or each >= rows)
    if new and train == "mlp" and reading.training.weight_decay:
        raise UnsupportedError(
            "weight decay would move rows of the embedding beside those of new tags",
            where="weight_decay",
            found=reading.training.weight_decay,
            remedy="leave it out, or train all",
        )
    if new and config.get("share_encoder_decoder_embeddings") is False:
        raise UnsupportedError(
            "encoder and decoder have an embedding each: new tags have no place",
            where="BASE, --tags",
            found="share_encoder_decoder_embeddings: false",
            remedy="choose a base model that shares its embedding",
        )
    if new and train == "lora":
        raise SourceError(
            "an adapter has no place for new tags: they are rows of the embedding, and tokens of the tokenizer",
            where="--tags --train lora",
            found=f"{len(new)} tags that BASE does not have, or has no rows for",
            expected="a base that knows them",
            remedy="make it first: modekit specialize BASE WITH-TAGS --tags --train mlp",
        )
    return new


def _check_rows(tokenizer: PreTrainedTokenizerBase, rows: int, *, but: Collection[str] = ()) -> None:
    """Raise MismatchError for tokens, `but` those that will get them, that a model with so many rows has none for."""
    tokens = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows and token not in but}
    tags = tokens.keys() & set(map(tag_of, labels_of(tokenizer)))
    first = "read text with --tags, which gives tags their rows, or " if tags else ""
    check_ids_fit(tokens, rows, where="BASE", remedy=f"{first}give the tokenizer that belongs to the model")
