"""What of a model moves when an expert is made of it, and how what came of it is saved.

Rows of embedding and head for tokens that a base did not have begin as the mean of the others, in the head as in the
embedding. What a model says then has the mean of the other logits for the new token, so that it takes at most one part in
(vocabulary + 1) of the probability, by Jensen's inequality; a row of zeros could take nearly all of it, where the other
logits are below 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from modekit.errors import UnsupportedError
from modekit.files.typed import said_by
from modekit.files.write import remove
from modekit.loaded.load import without_bars
from modekit.loaded.passes import has_encoder
from modekit.sources.families import family_of
from modekit.sources.header import DTYPE_NAMES
from modekit.sources.source import ModelSource

What = Literal["mlp", "lora", "full"]
"""See specialize.py."""
_OTHER = "use --train full"
Save = Callable[[Path], object]
"""Writes what came of a training into a folder."""


def make_trainable(
    model: PreTrainedModel,
    source: ModelSource,
    train: What,
    rank: int,
    new: Sequence[int] = (),
    hub: tuple[str, str] | None = None,
) -> Save:
    """Freeze what does not move, give an adapter its rank, and `new` token ids their rows. `hub`: as in specialize.py."""
    if train == "lora":
        return _adapter(model, hub or (source.folder.name, None), rank)
    if new:
        add_rows(model, new)
    save = _weights(model, train, source)
    if new:
        _free_rows(model, new)
    return save


def _weights(model: PreTrainedModel, train: What, source: ModelSource) -> Save:
    """The model's own weights; they are saved in the dtypes that they have in `source`."""
    moving = {id(parameter) for parameter in trainable_parameters(model, train)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in moving)

    def save(folder: Path) -> None:
        for name, parameter in model.named_parameters():
            if name in source.tensors:  # back to the dtype each tensor has in the base; exact for what did not move
                parameter.data = parameter.data.to(getattr(torch, DTYPE_NAMES[source.tensors[name].dtype]))
        model.config.dtype = next(model.parameters()).dtype
        with without_bars():
            model.save_pretrained(folder)

    return save


def _adapter(model: PreTrainedModel, base: tuple[str, str | None], rank: int) -> Save:
    """LoRA on every linear layer of the decoder, and on experts that a class keeps in one tensor. PEFT puts its layers into the
    model itself, which trains as it is.
    """
    from peft import LoraConfig, get_peft_model

    fused = {
        f"{name.rpartition('.')[2]}.{leaf}"
        for name, module in model.named_modules()
        for leaf, each in module.named_parameters(recurse=False)
        if hasattr(module, "_apply_gate") and each.ndim == 3
    }
    task = "SEQ_2_SEQ_LM" if has_encoder(model) else "CAUSAL_LM"
    routers = [  # which give several tensors
        name for name, each in model.named_modules() if isinstance(each, torch.nn.Linear) and "Router" in type(each).__name__
    ]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules="all-linear",
        exclude_modules=routers or None,
        target_parameters=sorted(fused) or None,
        task_type=task,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what PEFT asks it
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern")  # of PEFT: parameters do follow them
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise UnsupportedError(
                "PEFT has no adapter on all linear modules of this model",
                where="--train lora",
                found=said_by(error),
                remedy=_OTHER,
            ) from None
    written = adapted.peft_config["default"]
    written.base_model_name_or_path, written.revision = base

    def save(folder: Path) -> None:
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
        remove(folder / "README.md")  # PEFT's empty model card, with the base's path on this machine

    return save


def trainable_parameters(model: PreTrainedModel, train: What) -> list[torch.nn.Parameter]:
    """The parameters that move. For mlp they are all that the family's FFN holds, biases included: what a build copies.

    Raises UnsupportedError when mlp is asked of a family that cannot be mixed, or whose FFNs are not known.
    """
    named = dict(model.named_parameters())
    if train == "full":
        return list(named.values())
    config = model.config.to_dict()
    try:
        family = family_of(config, where="--train mlp")
    except UnsupportedError as error:
        raise UnsupportedError(error.what, where=error.where, expected=error.expected, remedy=_OTHER) from None
    stacks = ((layer, family.stack_of(layer)) for layer in family.layers(family.with_sizes(config)))
    modules = tuple(f"{family.in_layer(layer, path)}." for layer, stack in stacks for path in stack.ffn_modules)
    moving = [parameter for name, parameter in named.items() if name.startswith(modules)]
    if not moving:
        raise UnsupportedError("no FFN was found in its layers", where="--train mlp", found=family.model_type, remedy=_OTHER)
    return moving


def add_rows(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Give the model rows for new token ids; it grows where it has too few. Rows that come to lie between those that it had and
    the new tokens' are the mean as well; nothing else changes.
    """
    old = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= old:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    head = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)]
    biases = getattr(model, "final_logits_bias", None)  # of Bart's kin, (1, V)
    found.append(biases[0] if biases is not None else None)
    first, new = min(*ids, old), list(ids)
    with torch.no_grad():
        for rows in {id(rows): rows for rows in found if rows is not None}.values():
            mean = rows[:first].mean(0)
            rows[new] = mean
            rows[old:] = mean


def _free_rows(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Let the embedding's rows of some tokens move besides. The gradient of its other rows is zero, of which AdamW makes
    nothing while weights do not decay.
    """
    embedding: torch.nn.Parameter = model.get_input_embeddings().weight
    if not embedding.requires_grad:
        moves = torch.zeros(len(embedding), 1)
        moves[list(ids)] = 1.0
        embedding.requires_grad_(True)
        embedding.register_hook(lambda gradient: gradient * moves.to(gradient))  # type: ignore[no-untyped-call]
