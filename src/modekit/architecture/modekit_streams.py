"""A common expert beside the others: the base's own decoder reads every text, too (MoE-CE, arXiv 2407.19610).

Every sequence of a pass stands in the batch twice. In the first half the routers decide; in the second no expert has any
weight, so that every place is the base's. Behind the decoder the two are averaged, and the head, which all share, reads
that:

    h = (1 - w) h_routed + w h_common                         h (B, S, D), w = always_on.weight

Shape legend: B sequences, S tokens, D width; 2B rows of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def common_weight(routing: Mapping[str, Any]) -> float:
    """Weight w of the common expert; 0.0 without one."""
    always_on = routing.get("always_on") or {}
    return float(always_on["weight"]) if always_on.get("apart") else 0.0


def sequences_of(given: Mapping[str, Any]) -> int:
    """B, of the arguments of a pass."""
    tokens = given.get("input_ids")
    tokens = given["inputs_embeds"] if tokens is None else tokens
    return int(tokens.shape[0])


def twice(value: Any, sequences: int) -> Any:
    """An argument of a pass with every sequence in it twice: B rows become 2B. Masks by kind of layer come in a dict."""
    if isinstance(value, dict):
        return {key: twice(each, sequences) for key, each in value.items()}
    if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == sequences:
        return torch.cat([value, value])
    return value


def averaged(output: Any, sequences: int, weight: float) -> Any:
    """A pass's output for B sequences: the last hidden states averaged, all else as the routed half has it."""
    routed, common = output[0][:sequences], output[0][sequences:]
    hidden = (1.0 - weight) * routed + weight * common
    if isinstance(output, tuple):
        return (hidden, *(tuple(one[:sequences] for one in each) if isinstance(each, tuple) else each for each in output[1:]))
    output["last_hidden_state"] = hidden
    for key in ("hidden_states", "attentions"):
        if output.get(key) is not None:
            output[key] = tuple(each[:sequences] for each in output[key])
    return output


def no_weight_for_common(weights: torch.Tensor) -> torch.Tensor:
    """Weights of B sequences, and for the second half none of any expert."""
    return torch.cat([weights, torch.zeros_like(weights)])
