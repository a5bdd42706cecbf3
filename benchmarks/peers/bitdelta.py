"""BitDelta (arXiv:2402.10193): an expert is the base plus the sign of each weight's difference times one scale per matrix.

The scale is the mean of the absolute difference, which is nearest in squares; the paper's short training of the scales is left
out. Linear layers of the decoder alone; embeddings, norms and head are kept as they are. Which expert reads a text is known
(oracle): the row shows bytes against the gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from peers.bounds import BESIDE, models_of
from peers.peer import Formula, Made, Peer, Pool
from peers.score import counts, side_by_side


def one_bit(origin: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The base's weight plus one bit per number of the difference."""
    difference = weight - origin
    return origin + difference.abs().mean() * difference.sign().where(difference != 0, 1.0)


def is_compressed(name: str) -> bool:
    """Whether a tensor is a linear layer of the decoder."""
    return name.endswith("_proj.weight")


def compressed(base: Mapping[str, torch.Tensor], expert: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An expert as it is read back."""
    return {name: one_bit(base[name], each) if is_compressed(name) else each for name, each in expert.items()}


def bytes_of(base: Mapping[str, torch.Tensor], expert: Mapping[str, torch.Tensor]) -> int:
    """Bits of signs and two bytes per scale; two bytes per number of what else differs from the base."""
    bits = sum(each.numel() // 8 + 2 for name, each in expert.items() if is_compressed(name))
    rest = [each for name, each in expert.items() if not is_compressed(name) and not torch.equal(each, base[name])]
    return bits + 2 * sum(each.numel() for each in rest)


def _bitdelta(pool: Pool, out: Path) -> Made:
    model = AutoModelForCausalLM.from_pretrained(pool.base, dtype=torch.float32)
    base = {name: each.clone() for name, each in model.state_dict().items()}
    nbytes, folders = 2 * sum(each.numel() for each in base.values()), {}
    for name, expert in zip(pool.whole, models_of(pool), strict=True):
        nbytes += bytes_of(base, expert.state_dict())
        model.load_state_dict(compressed(base, expert.state_dict()))
        folders[name] = out / name
        model.save_pretrained(folders[name])
    one = counts(pool.base)[0]
    note = "own expert known; scales not trained"
    return Made(folders, note, total=one * (1 + len(folders)), active=one, nbytes=nbytes, engines=BESIDE)


def _oracle(pool: Pool, _out: Path) -> Made:
    return Made(dict(pool.whole), total=side_by_side(pool), active=counts(pool.base)[0], engines=BESIDE)


BITDELTA: list[Peer] = [
    Formula("own expert (oracle)", _oracle, "bound"),
    Formula("BitDelta, own expert (oracle)", _bitdelta, "2402.10193, formula"),
]
