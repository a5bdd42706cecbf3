"""Fine-tune a base model on a domain so that it mixes well: `modekit specialize BASE OUT --text ... --train mlp|lora|full`.

mlp     only the FFN moves, its biases included; attention, norms, embeddings and head stay bit-identical, so that a mixture of
such experts on the base's backbone loses nothing of them (FlexOlmo and DUME train this way)
lora    low-rank changes of every linear layer of the decoder; OUT is an adapter, an ordinary PEFT folder
full    everything moves, as in most models one finds; what moved outside the FFN cannot be carried by FFN experts
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.errors import ModekitError, SourceError, UnsupportedError
from modekit.experts.labelled import Generic, Labelled, Material, Reading, RelabelledPasses, read_material
from modekit.experts.moving import What, make_trainable
from modekit.experts.specialist import NewSpecialist, SpecialistFolder, SpecialistRecord, digest_of_source, held_out_losses
from modekit.files.output import refuse_existing, replaced_by
from modekit.files.typed import as_kind
from modekit.files.write import digest_of_data
from modekit.loaded.engine import seeded
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.text_training import ReadInPass, Training, train_on_text
from modekit.run import QUIET, Run
from modekit.sources.config import whole
from modekit.sources.source import open_source
from modekit.sources.tokenizer import beyond_rows, no_embedding_for
from modekit.text.splits import text_record
from modekit.text.tags import add_tags, labels_of, tag_ids, tag_of

RANK = 16
"""Of an adapter, when nothing is said."""


def checked_choice(train: str, rank: int | None, learning_rate: float | None) -> tuple[What, int, float]:
    """What moves, the rank and the peak learning rate, with the defaults of that kind of training.

    Raises ModekitError for a kind that there is not, and for a rank without an adapter.
    """
    if train not in get_args(What):
        raise ModekitError(
            "unknown choice", where="--train", found=train, expected="mlp, lora or full", remedy="write one of them"
        )
    if rank is not None and train != "lora":
        raise ModekitError("the setting has no effect", where="rank", found=rank, remedy="remove it, or add --train lora")
    rate = learning_rate if learning_rate is not None else 1e-3 if train == "lora" else 1e-4
    return cast(What, train), rank or RANK, rate


def specialize(
    base: Path,
    out: Path,
    texts: Sequence[str] | Labelled,
    *,
    root: Path,
    train: What = "mlp",
    rank: int = RANK,
    training: Training | None = None,
    generic: Generic | None = None,
    overwrite: bool = False,
    run: Run = QUIET,
) -> SpecialistRecord:
    """Train a specialist and write it: a plain model folder with the base's tokenizer and dtypes, or a LoRA adapter.

    `rank` is that of the adapter, and so is its alpha: scale 1. `texts` with labels are read with their tags (labelled.py): the
    tokenizer gets those that it does not have, and the model rows for them, which move whatever else does.

    Only documents of the fit split are read, so that the held-out ones stay held out. Of those `training.held_out_tokens` per
    domain are scored, before and after. Goes on after a kill from the last state in OUT.training (specialist.py).

    Returns what specialist.json in OUT says. Raises TextError,
    SourceError, OutputError, TrainingError, and InterruptError for Ctrl-C, which says what was kept.
    """
    training = training or Training()
    folder = SpecialistFolder(out)
    folder.tidy()
    refuse_existing(out, replaced_by(overwrite), sources=(base,))
    source = open_source("BASE", str(base), base, run=run)
    run.begin("read the text")
    reading = Reading(load_tokenizer(base, run=run), root, training)
    new = _new_tags(texts, reading, train, source.config)
    material = read_material(texts, generic, reading)
    read: ReadInPass | None = None
    if isinstance(texts, Labelled) and texts.randomise:
        read = RelabelledPasses(material.sequences, texts, reading).read
    # Of all that decides what comes out, but for the base's weights.
    of_text = text_record(material.fit, material.tokens)
    request = digest_of_data([train, rank, dataclasses.asdict(training), [of_text, *material.as_asked()], list(new)])
    wanted = NewSpecialist(folder, "specialize", request, (base,), overwrite, reading.tokenizer, material.fit)
    with folder.held(request, digest_of_source(source)):
        model = load_model(base, run=run)
        with seeded(training.seed, model.device):  # a new adapter's first weights
            save = make_trainable(model, source, train, rank, new)
        before = _before(model, material, folder, run)
        losses = train_on_text(model, material.sequences, training, read=read, folder=folder.path, run=run)
        after = held_out_losses(model, material.held_out, "after", run)
        record = SpecialistRecord.model_validate(
            {
                "specialist": train,
                "base_model": base.name,
                **({"rank": rank} if train == "lora" else {}),
                "training": {**dataclasses.asdict(training), "steps": len(losses)},
                "text": of_text,
                **material.as_data(),
                "training_loss": {"before": losses[0], "after": losses[-1]},
                **_held_out(before, after),
            }
        )
        wanted.write(record, save, run)
    return record


def _before(model: PreTrainedModel, material: Material, folder: SpecialistFolder, run: Run) -> dict[str, float]:
    """The losses of the base, which a run that was killed may have measured."""
    kept = folder.recall("before", lambda data: as_kind(data, dict[str, float]))
    if kept is None:
        kept = held_out_losses(model, material.held_out, "before", run)
        folder.keep("before", kept)
    return kept


def _new_tags(texts: Sequence[str] | Labelled, reading: Reading, train: What, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Give the tokenizer the tags that are asked for; ids of those that it did not have, and of any that the model has no row
    for. Raises MismatchError where other tokens have none, SourceError for an adapter, in which tags could not be kept,
    UnsupportedError for a model that has two embeddings.
    """
    rows = whole(config, "vocab_size")
    if not isinstance(texts, Labelled):
        _check_rows(reading.tokenizer, rows)
        return ()
    added = add_tags(reading.tokenizer, texts.texts, where="BASE")
    labels = labels_of(reading.tokenizer)
    _check_rows(reading.tokenizer, rows, but=set(map(tag_of, labels)))
    known = tag_ids(reading.tokenizer, labels)
    new = tuple(each for each in known if each in added or each >= rows)
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
    beyond = [token for token in beyond_rows(tokenizer.get_vocab(), rows) if token not in but]
    if beyond:
        tags = set(map(tag_of, labels_of(tokenizer)))
        first = "" if tags.isdisjoint(beyond) else "read text with --tags, which gives tags their rows, or "
        raise no_embedding_for(beyond, rows, where="BASE", remedy=f"{first}give the tokenizer that belongs to the model")


def _held_out(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, object]:
    """What the record says of losses: their mean over the domains, and each where there are several."""
    mean = {
        when: sum(losses.values()) / len(losses) if losses else None for when, losses in (("before", before), ("after", after))
    }
    each = {name: {"before": loss, "after": after[name]} for name, loss in before.items()}
    return {"held_out_loss": mean, **({"held_out_loss_by_label": each} if len(each) > 1 else {})}
