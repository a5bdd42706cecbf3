"""Fine-tune a base model on a domain so that it mixes well: `modekit specialize BASE OUT --text ... --train mlp|lora|full`.

mlp     only the FFN moves; attention, norms, embeddings and head stay bit-identical, so that a mixture of such
experts on the base's backbone loses nothing of them (FlexOlmo and DUME train this way)
lora    low-rank changes of every linear layer of the decoder; OUT is an adapter, an ordinary PEFT folder
full    everything moves, as in most models one finds; what moved outside the FFN cannot be carried by FFN experts
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

from modekit.errors import ModekitError
from modekit.evaluation.domains import Domain
from modekit.evaluation.loss import score_domain
from modekit.experts.moving import What, adapter, weights
from modekit.files.output import refuse_existing, replaced_by
from modekit.files.staging import staging
from modekit.files.write import disk_errors, write_file, write_json
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.next_token import Training, train_language_model, training_sequences
from modekit.run import QUIET, Run
from modekit.sources.model import SPECIALIST_FILE, open_source
from modekit.text.held_out import read_text
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import TRAINED_FILE, mark_of, text_record

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
        raise ModekitError("the setting has no effect", where="--rank", found=rank, remedy="remove it, or add --train lora")
    rate = learning_rate if learning_rate is not None else 1e-3 if train == "lora" else 1e-4
    return cast(What, train), rank or RANK, rate


def specialize(
    base: Path,
    out: Path,
    texts: Sequence[str],
    *,
    root: Path,
    train: What = "mlp",
    rank: int = RANK,
    training: Training | None = None,
    overwrite: bool = False,
    run: Run = QUIET,
) -> dict[str, Any]:
    """Train a specialist and write it: a plain model folder with the base's tokenizer and dtypes, or a LoRA adapter.

    `rank` is that of the adapter, and so is its alpha: scale 1.

    Only documents of the fit split are read, so that the held-out ones stay held out. Returns what specialist.json in OUT
    says: text, settings, and held-out loss before and after. Raises TextError, SourceError, OutputError.
    """
    training = training or Training()
    refuse_existing(out, replaced_by(overwrite), sources=(base,))
    source = open_source("BASE", str(base), base, run=run)
    tokenizer = load_tokenizer(base, run=run)
    fit, sequences, held_out = read_training_text(texts, root, tokenizer, training)
    model = load_model(base, run=run)
    parameters, save = adapter(model, base, rank) if train == "lora" else weights(model, train, source)
    domain = Domain("held-out", None, held_out, {})
    before = score_domain(model, domain, lambda _: None).loss if held_out else None
    with staging(
        out,
        f"specialize {training} {train} {rank} {text_record(fit, 0)} {[str(file) for file in source.files]}",
        "adapter" if train == "lora" else "model",
        sources=(base,),
        replace=replaced_by(overwrite),
        sync=run.sync,
    ) as stage:
        losses = train_language_model(model, parameters, sequences, training, run=run)
        after = score_domain(model, domain, lambda _: None).loss if held_out else None
        record = {
            "specialist": train,
            "base_model": base.name,
            **({"rank": rank} if train == "lora" else {}),
            "training": {**dataclasses.asdict(training), "steps": len(losses)},
            "text": text_record(fit, sum(sequence.size for sequence in sequences)),
            "training_loss": {"first": losses[0], "last": losses[-1]},
            "held_out_loss": {"before": before, "after": after},
        }
        with disk_errors(stage.folder):
            save(stage.folder)
        if train != "lora":
            tokenizer.save_pretrained(stage.folder)
        write_file(stage.folder / TRAINED_FILE, "".join(f"{mark_of(document)}\n" for document in fit).encode())
        write_json(stage.folder / SPECIALIST_FILE, record)
    return record


def read_training_text(
    texts: Sequence[str], root: Path, tokenizer: Any, training: Training
) -> tuple[list[str], list[TokenSequence], list[TokenSequence]]:
    """Documents to train on, the same as sequences, and sequences that are held out. Raises TextError when nothing is left."""
    text = read_text(texts, root=root, where="--text")
    fit = text.fit()
    sequences = training_sequences(tokenizer, fit, training)
    if not sequences:
        raise text.nothing_left("no document is left for training after the held-out split")
    held_out = encode(tokenizer, text.report(), max_tokens=training.held_out_tokens, sequence_length=training.sequence_length)
    return fit, sequences, held_out
