"""Losses of a model on text, and how large and how fast it is.

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import modekit  # noqa: F401  its architecture opens in transformers
from modekit.checkpoint.open import open_checkpoint
from modekit.demo.models import SEQUENCE_LENGTH
from modekit.text.sequences import TokenSequence, encode, make_batches
from peers.peer import Made, Pool, Speaker
from peers.pool import is_adapter, read_text

TIMED_TOKENS = 512
PASSES = 3
Texts = Mapping[str, Sequence[TokenSequence]]
ENGINES = {
    "LlamaForCausalLM": "vLLM, llama.cpp",
    "MixtralForCausalLM": "vLLM, llama.cpp",
    "ModekitForCausalLM": "vLLM (plug-in)",
}
"""By architecture."""


@dataclass(frozen=True)
class Size:
    """Parameters that are kept and that a token passes, and bytes."""

    total: int
    active: int
    nbytes: int


def texts_of(tokenizer: Path, paths: Mapping[str, Path], tokens: int) -> Texts:
    """The first `tokens` of each text, whole documents of at most SEQUENCE_LENGTH."""
    reads = AutoTokenizer.from_pretrained(tokenizer)
    return {
        name: encode(reads, read_text(path), max_tokens=tokens, sequence_length=SEQUENCE_LENGTH) for name, path in paths.items()
    }


def opened(model: Path | Speaker) -> PreTrainedModel | Speaker:
    """What a peer has made, in memory."""
    if isinstance(model, Path):
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return model


@torch.inference_mode()
def score(model: PreTrainedModel | Speaker, sequences: Sequence[TokenSequence]) -> tuple[float, float]:
    """Nats and share of right guesses, mean over all tokens but the first of each document."""
    tokens, nats, right = sum(each.scored for each in sequences), 0.0, 0
    whole = isinstance(model, PreTrainedModel)
    for batch in make_batches(sequences, tokens=4_096 if whole else 1):
        ids_BS, labels_N = batch.input_ids, batch.labels.flatten()
        if whole:
            logits_BSV = model(input_ids=ids_BS, attention_mask=batch.mask.long(), use_cache=False).logits
        else:
            logits_BSV = model.logits(ids_BS)
        logits_NV = logits_BSV[:, :-1].flatten(0, 1).float()
        nats += float(torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum"))
        right += int((logits_NV.argmax(-1) == labels_N).sum())
    return nats / tokens, right / tokens


Scores = Mapping[str, tuple[float, float]]
"""Text -> nats, and share of right guesses."""


def scores(model: Path | Speaker | Mapping[str, Path], texts: Texts, base: Path) -> Scores:
    """Of each text."""
    if isinstance(model, Mapping):
        return {name: score(opened(model.get(name, base)), sequences) for name, sequences in texts.items()}
    read = opened(model)
    return {name: score(read, sequences) for name, sequences in texts.items()}


@torch.inference_mode()
def milliseconds_per_token(made: Path | Speaker | Mapping[str, Path], texts: Texts) -> float:
    """Processor time of a forward pass over one document after the other, the fastest of PASSES."""
    model = opened(next(iter(made.values())) if isinstance(made, Mapping) else made)
    documents, taken = [torch.tensor([each.ids]) for each in _some(texts)], list[float]()
    for _ in range(PASSES):
        start = time.process_time()
        for ids_BS in documents:
            if isinstance(model, PreTrainedModel):
                model(input_ids=ids_BS, use_cache=False)
            else:
                model.logits(ids_BS)
        taken.append(time.process_time() - start)
    return 1e3 * min(taken) / sum(each.numel() for each in documents)


def _some(texts: Texts) -> list[TokenSequence]:
    found: list[TokenSequence] = []
    for sequences in zip(*texts.values(), strict=False):
        found += sequences
        if sum(each.size for each in found) > TIMED_TOKENS:
            break
    return found


def size(made: Made) -> Size:
    """As the peer says, or counted."""
    total, active = made.total, made.active
    if isinstance(made.model, Path):
        counted = counts(made.model)
        total, active = total or counted[0], active or counted[1]
    return Size(total, active or total, made.nbytes or 2 * total)


def counts(folder: Path) -> tuple[int, int]:
    """Total and active parameters of a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    if config.get("architectures") == ["ModekitForCausalLM"] or (folder / "modekit.json").exists():
        found = open_checkpoint(folder).parameters
        return found.total, found.active
    numbers = numbers_of(folder)
    every, experts = sum(numbers.values()), sum(each for name, each in numbers.items() if ".experts." in name)
    of = config.get("num_local_experts") or config.get("num_experts") or 1
    return every, every - experts + round(experts * config.get("num_experts_per_tok", of) / of)


def numbers_of(folder: Path) -> dict[str, int]:
    """Name of a tensor -> its parameters, of a checkpoint or an adapter."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as read:
            found |= {name: prod(read.get_slice(name).get_shape()) for name in read.keys()}  # noqa: SIM118  no dictionary
    return found


def side_by_side(pool: Pool) -> int:
    """Parameters of all experts, adapters with their base."""
    below = [pool.base] if any(map(is_adapter, pool.experts.values())) else []
    return sum(sum(numbers_of(folder).values()) for folder in (*below, *pool.experts.values()))


def engines(made: Made) -> str:
    """Where a checkpoint runs besides transformers."""
    if made.engines or not isinstance(made.model, Path):
        return made.engines or "none"
    (architecture,) = json.loads((made.model / "config.json").read_text())["architectures"]
    return ENGINES.get(architecture, "none")
