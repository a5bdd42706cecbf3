"""How fast this machine is: one layer of a model's shape with random weights, run for a second or two.

Nothing of the model itself is read, so that a plan can say how long a fit will take before anything is downloaded or built.

Shape legend: B batch, S sequence, N tokens of a batch, D width of what a gate takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from modekit.loaded.load import default_device

_TOKENS = 2_048  # of a batch: enough for the products' full speed
_SECONDS = 1.0
_COUNTS = {"num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"}
_VOCABULARY = 32  # the embedding is looked up, whatever its size

Clock = Callable[[], float]


def layer_seconds(
    dense_config: Mapping[str, Any],
    *,
    sequence_length: int,
    dtype: torch.dtype = torch.float32,
    clock: Clock = time.perf_counter,
) -> float:
    """Seconds per token of one decoder layer of a dense model, forward, measured now."""
    model, layers = _of_one_layer(dense_config, dtype)
    ids_BS = torch.zeros((max(1, _TOKENS // sequence_length), sequence_length), dtype=torch.int64, device=model.device)
    inputs = {"input_ids": ids_BS, **({"decoder_input_ids": ids_BS} if layers > 1 else {})}

    def run() -> None:
        model(**inputs, use_cache=False)

    with torch.inference_mode():
        return _timed(run, clock) / ids_BS.numel() / layers


def _of_one_layer(dense_config: Mapping[str, Any], dtype: torch.dtype) -> tuple[PreTrainedModel, int]:
    """A model of a dense config with one layer per stack, and how many that are: an encoder's and a decoder's are two."""
    count = int(dense_config.get("num_hidden_layers") or 0)
    one = {key: value[:1] if isinstance(value, list) and len(value) == count else value for key, value in dense_config.items()}
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id"):
        if key in one:
            one[key] = None
    layers = dict.fromkeys(_COUNTS & one.keys() or {"num_hidden_layers"}, 1)
    config = AutoConfig.for_model(**{**one, **layers, "vocab_size": _VOCABULARY})
    model: PreTrainedModel = AutoModel.from_config(config, dtype=dtype)
    return model.to(default_device()).eval(), 2 if config.is_encoder_decoder else 1


def moment_seconds(width: int, *, clock: Clock = time.perf_counter) -> float:
    """Seconds per token of the sum of x x^T of what a gate of that width takes, float32."""
    x_ND = torch.ones((_TOKENS, width), device=default_device())
    return _timed(lambda: x_ND.T @ x_ND, clock) / _TOKENS


def _timed(run: Callable[[], object], clock: Clock) -> float:
    """Mean seconds of a call, over as many as fit into a second; the first, which warms up, is not counted."""
    _wait(run())
    started, calls = clock(), 0
    while True:
        _wait(run())
        calls += 1
        passed = clock() - started
        if passed >= _SECONDS:
            return passed / calls


def _wait(_done: object) -> None:
    """Until the device has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
