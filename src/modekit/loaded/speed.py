"""How fast this machine is: one decoder layer of a model's shape with random weights, run for a second or two.

Nothing of the model itself is read, so that a plan can say how long a fit will take before anything is downloaded or built.

Shape legend: B batch, S sequence, N tokens of a batch, D width of what a gate takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from modekit.loaded.load import default_device

_TOKENS = 2_048  # of a batch: enough for the products' full speed
_SECONDS = 1.0
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
    layers = int(dense_config["num_hidden_layers"])
    one = {key: value[:1] if isinstance(value, list) and len(value) == layers else value for key, value in dense_config.items()}
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        one[key] = None
    config = AutoConfig.for_model(**{**one, "num_hidden_layers": 1, "vocab_size": _VOCABULARY})
    device = default_device()
    model = AutoModel.from_config(config, dtype=dtype).to(device).eval()
    ids_BS = torch.zeros((max(1, _TOKENS // sequence_length), sequence_length), dtype=torch.int64, device=device)

    def run() -> None:
        model(input_ids=ids_BS, use_cache=False)

    with torch.inference_mode():
        return _timed(run, clock) / ids_BS.numel()


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
