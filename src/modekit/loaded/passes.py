"""How a loaded model is run over a batch, whether it has an encoder or not: the one place that knows.

A causal model reads text and predicts each next token of it. A model with an encoder reads the source of a pair, and predicts
each token of its target from the source and the tokens before.

Shape legend: B batch, S sequence (of a pair the source), T target of a pair, P predicted tokens, N those of a
batch without padding, V vocabulary.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from modekit.errors import SourceError, TextError
from modekit.sources.family import Reads
from modekit.sources.names import in_decoder
from modekit.text.document import other_kind
from modekit.text.sequences import NO_LABEL, Batch, TokenSequence


@contextmanager
def removed(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """While open, the hooks stay; then they are removed."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


_READS_ENCODER = re.compile(r"\.(encoder_attn\.[kv]_proj|EncDecAttention\.[kv])(\.|$)")
"""Modules of a decoder that read what the encoder gives: keys and values of its attention to the source."""


_CACHED_TOKENS = 1_024  # of a batch on a processor: a third faster than 8,192, whose activations are in no cache


def tokens_per_batch(model: PreTrainedModel) -> int:
    """Padded tokens of a batch by which a model reads fastest."""
    return _CACHED_TOKENS if model.device.type == "cpu" else 8_192


def has_encoder(model: PreTrainedModel) -> bool:
    """Whether a model reads pairs: source and target."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _reads(model: PreTrainedModel) -> Reads:
    return "pairs" if has_encoder(model) else "text"


def reads_target(name: str) -> bool:
    """Whether a module of this name reads something of every token of a target, (B, T, D), as most of a decoder; else it
    reads text, or the source of a pair, (B, S, D).
    """
    return in_decoder(name) and _READS_ENCODER.search(name) is None


def check_text(model: PreTrainedModel, texts: Iterable[TokenSequence], *, where: str | None = None) -> None:
    """Raise TextError where a model with an encoder is to read plain text, or another one pairs."""
    needs = has_encoder(model)
    if any(bool(text.target) != needs for text in texts):
        raise other_kind(_reads(model), where=where)


def inputs_of(model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """What the model is given, on its device: input_ids and attention_mask (B, S) int64; for pairs also decoder_input_ids, what
    stands before each token of the target, and decoder_attention_mask (B, T) int64.

    Raises TextError as `check_text`.
    """
    if (batch.target is not None) != has_encoder(model):
        raise other_kind(_reads(model))
    _check_length(model, batch)
    given = batch.to(model.device)
    inputs = {"input_ids": given.input_ids, "attention_mask": given.mask.long()}
    if given.target is None:
        return inputs
    before = _before(model, given.target)
    return {**inputs, "decoder_input_ids": before, "decoder_attention_mask": given.target_mask.long()}


def run_backbone(model: PreTrainedModel, batch: Batch) -> Any:
    """A pass for those who want what modules read on the way: of a causal model without its head, which costs a third of a
    small model's pass.
    """
    runs = model if has_encoder(model) else model.base_model
    return runs(**inputs_of(model, batch), use_cache=False)


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model within a causal language model that gives the last hidden states: the innermost that holds the embedding."""
    embedding = model.get_input_embeddings()
    models = (each for each in model.modules() if isinstance(each, PreTrainedModel))
    *_, found = (each for each in models if any(module is embedding for module in each.modules()))
    return found


def losses_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Loss of every predicted token, (B, P) float32 in nats, on the model's device; 0 where nothing is predicted."""
    return losses_by_label(model, inputs_of(model, batch), batch.labels)


def losses_by_label(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """The same of what a model is given, and of labels (B, P) as `Batch` has them."""
    labels = labels.to(model.device)
    places, logits = _kept_logits(model, inputs, labels != NO_LABEL)
    wanted = labels[:, places]
    kept = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="none")
    losses = torch.zeros(labels.shape, device=labels.device)
    losses[:, places] = kept.view_as(wanted)
    return losses


def predicted_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """What a model says of every predicted token, (N, V) float32 on the CPU, in the order of `batch.labels`."""
    return logits_at(model, inputs_of(model, batch), batch.labels != NO_LABEL).float().cpu()


def logits_at(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], predicted: torch.Tensor) -> torch.Tensor:
    """Logits (N, V), as the model's own class computes them, at the places (B, P) where a token is predicted."""
    predicted = predicted.to(model.device)
    places, logits = _kept_logits(model, inputs, predicted)
    kept = predicted[:, places]
    return logits.flatten(0, 1) if bool(kept.all()) else logits[kept]  # without a copy where that can be


def _kept_logits(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], predicted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The places (K,) at which any row predicts a token, and the logits there, (B, K, V). Of others there are none in memory,
    unless the class computes all of them at once, as those with an encoder do.
    """
    places = predicted.any(0).nonzero().squeeze(-1)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return places, model(**inputs, use_cache=False, logits_to_keep=places).logits
    return places, model(**inputs, use_cache=False).logits[:, places]


def _check_length(model: PreTrainedModel, batch: Batch) -> None:
    """Raise TextError where a text, or a side of a pair, has more tokens than the model has positions. Rotary ones go on."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most is None or (batch.target is None and getattr(model.config, "rope_parameters", None)):
        return
    longest = max(each.shape[1] for each in (batch.input_ids, batch.target) if each is not None)
    if longest > most:
        one, so = ("a text", "cuts longer ones") if batch.target is None else ("a side of a pair", "leaves longer ones out")
        raise TextError(
            f"{one} has more tokens than the model has positions",
            found=longest,
            expected=f"at most {most}",
            remedy=f"ask for a sequence_length of {most} (in a recipe under mixture.router), which {so}",
        )


def _before(model: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, T) moved by one place, behind what the model's decoder starts with.

    Families say it themselves: mBART starts with the language that stands at a label's end. M2M100 does as Bart, and has no
    method for it.
    """
    for key in ("decoder_start_token_id", "pad_token_id"):
        if model.config.model_type != "mbart" and getattr(model.config, key, None) is None:
            raise SourceError(
                f"the model's config.json says no {key}, with which its decoder begins",
                where=str(model.config.name_or_path),
                remedy="write it into config.json, as generation_config.json or the model's page has it",
            )
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        moved: torch.Tensor = shift(labels=labels)
        return moved
    config = model.config
    moved = labels.masked_fill(labels < 0, config.pad_token_id).roll(1, dims=1)
    moved[:, 0] = config.decoder_start_token_id
    return moved
