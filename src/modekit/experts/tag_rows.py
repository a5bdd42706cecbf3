"""Rows of embedding and head for tokens that a base did not have: how they begin, and how they alone move.

A new row begins as the mean of the others, in the head as in the embedding. What a model says then has the mean of the other
logits for the new token, so that it takes at most one part in (vocabulary + 1) of the probability, by Jensen's inequality;
a row of zeros could take nearly all of it, where the other logits are below 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modekit.experts.moving import Trainable


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


def with_rows(model: PreTrainedModel, moving: Trainable, ids: Sequence[int]) -> Trainable:
    """The same, and the embedding's rows of some tokens besides; its other rows are saved as they are now, bit for bit.

    The gradient of the others is zero, which AdamW makes nothing of unless weights decay.
    """
    parameters, save = moving
    embedding: torch.nn.Parameter = model.get_input_embeddings().weight
    if any(each is embedding for each in parameters):
        return moving
    before = embedding.detach().cpu().clone()
    moves = torch.zeros(len(embedding), 1)
    moves[list(ids)] = 1.0
    embedding.requires_grad_(True)
    embedding.register_hook(lambda gradient: gradient * moves.to(gradient))  # type: ignore[no-untyped-call]
    kept = (moves[:, 0] == 0).nonzero().flatten()

    def with_old_rows(folder: Path) -> object:
        with torch.no_grad():
            embedding[kept.to(embedding.device)] = before[kept].to(embedding)
        return save(folder)

    return [*parameters, embedding], with_old_rows
