"""Fine-tune a base model on a domain so that it mixes well: `modekit specialize BASE OUT --text ... --train mlp|lora|full`.

mlp     only the FFN moves; attention, norms, embeddings and head stay bit-identical, so that a mixture of such
experts on the base's backbone loses nothing of them (FlexOlmo and DUME train this way)
lora    low-rank changes of every linear layer of the decoder; OUT is an adapter, an ordinary PEFT folder
full    everything moves, as in most models one finds; what moved outside the FFN cannot be carried by FFN experts
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from transformers import PreTrainedModel

from modekit.errors import ModekitError, UnsupportedError
from modekit.evaluation.domains import Domain
from modekit.evaluation.loss import score_domain
from modekit.files.output import refuse_existing, replaced_by
from modekit.files.staging import staging
from modekit.files.write import disk_errors, remove, write_file, write_json
from modekit.loaded.load import load_model, load_tokenizer, without_bars
from modekit.loaded.next_token import Training, train_language_model, training_sequences
from modekit.run import QUIET, Run
from modekit.sources.families import family_of
from modekit.sources.model import DTYPE_NAMES, SPECIALIST_FILE, ModelSource, open_source
from modekit.sources.names import in_layer
from modekit.text.held_out import read_text
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import TRAINED_FILE, mark_of, text_record

RANK = 16
"""Of an adapter, when nothing is said."""
What = Literal["mlp", "lora", "full"]


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
    fit, sequences, held_out = _read_text(texts, root, tokenizer, training)
    model = load_model(base, run=run)
    parameters, save = _adapter(model, base, rank) if train == "lora" else _weights(model, train, source)
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
            "text": text_record(fit, sum(len(sequence.ids) for sequence in sequences)),
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


def _read_text(
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


Trainable = tuple[list[torch.nn.Parameter], Callable[[Path], object]]
"""The parameters that move, and how to save what came of it."""


def _weights(model: PreTrainedModel, train: What, source: ModelSource) -> Trainable:
    parameters = trainable_parameters(model, train)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)

    def save(folder: Path) -> None:
        for name, parameter in model.named_parameters():
            if name in source.tensors:  # back to the dtype each tensor has in the base; exact for what did not move
                parameter.data = parameter.data.to(getattr(torch, DTYPE_NAMES[source.tensors[name].dtype]))
        model.config.dtype = next(model.parameters()).dtype
        with without_bars():
            model.save_pretrained(folder)

    return parameters, save


def _adapter(model: PreTrainedModel, base: Path, rank: int) -> Trainable:
    """LoRA on every linear layer of the decoder. PEFT puts its layers into the model itself, which trains as it is."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what PEFT asks it
        adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base.name
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def save(folder: Path) -> None:
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
        remove(folder / "README.md")  # PEFT's empty model card, with the base's path on this machine

    return moving, save


def trainable_parameters(model: PreTrainedModel, train: What) -> list[torch.nn.Parameter]:
    """The parameters that move. For mlp they are found by the family's FFN names, exactly those that a build copies.

    Raises UnsupportedError when mlp is asked of a family that is not in the table.
    """
    named = dict(model.named_parameters())
    if train == "full":
        return list(named.values())
    try:
        family = family_of({"model_type": model.config.model_type}, where="--train mlp")
    except UnsupportedError as error:
        raise UnsupportedError(error.what, where=error.where, expected=error.expected, remedy="use --train full") from None
    layers = int(model.config.num_hidden_layers)
    return [named[name] for layer in range(layers) for name in _ffn_names(family.mlp, layer)]


def _ffn_names(mlp: dict[str, str], layer: int) -> list[str]:
    return [in_layer(layer, path) for path in dict.fromkeys(mlp.values())]
