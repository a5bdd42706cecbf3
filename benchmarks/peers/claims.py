"""What claims of "A Survey on Mixture of Experts" (arXiv:2407.06204) come to on small models.

Shape legend: B batch, S sequence, T tokens, D hidden, E experts.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modekit.checkpoint.open import open_checkpoint
from modekit.evaluation.inspection.likeness import similarity
from modekit.run import QUIET
from modekit.training.losses import load_balance
from peers.bounds import mean_of, models_of, save
from peers.ours import built
from peers.peer import Pool
from peers.pool import Scored
from peers.score import Texts, opened, score, texts_of

TOKENS = 2_048
"""Per text."""
EXPERTS = 4
NEARER = (0.0, 0.25, 0.5, 0.75)
"""How far experts are moved towards their mean."""

COLLAPSED = f"balance loss, every token to one of {EXPERTS} experts"
EVEN = "balance loss, tokens spread evenly"
UPCYCLED = "upcycled: loss less the dense model's, softmax over the chosen experts"
NOT_NORMALISED = "upcycled: loss less the dense model's, softmax before top-k"
ALIKE = "experts moved {0:.0%} towards their mean: cosine of two"
CLOSED = "experts moved {0:.0%} towards their mean: gap closed"
CLAIMS = (
    *(COLLAPSED, EVEN, UPCYCLED, NOT_NORMALISED),
    *(figure.format(each) for each in NEARER for figure in (ALIKE, CLOSED)),
)
"""Figures, in the order of the table."""


def claims(scored: Scored, out: Path) -> dict[str, float]:
    """Every figure of CLAIMS; `out` is written anew."""
    shutil.rmtree(out, ignore_errors=True)
    texts = texts_of(scored.pool.base, {name: scored.report[name] for name in scored.pool.text}, TOKENS)
    return {
        **balance(),
        **upcycled(scored.pool, texts, out),
        **_nearer(scored.pool, texts, out),
    }


def balance(tokens: int = 64) -> dict[str, float]:
    """The balance loss at its two ends, per token."""
    to_one_TE = torch.zeros(tokens, EXPERTS)
    to_one_TE[:, 0] = 1e3
    evenly_TE = 1e3 * torch.nn.functional.one_hot(torch.arange(tokens) % EXPERTS, EXPERTS).float()
    return {name: float(load_balance(logits, 1)) / tokens for name, logits in ((COLLAPSED, to_one_TE), (EVEN, evenly_TE))}


def upcycled(pool: Pool, texts: Texts, out: Path) -> dict[str, float]:
    """Copies of the base behind random gates; without normalisation a copy counts what the chosen ones weigh together."""
    copies = replace(pool, experts=dict.fromkeys(pool.experts, pool.base))
    mixture = {"top_k": 2, "router": {"fit": "random", "seed": pool.seed}}
    made = built(copies, out / "copies", {"mixture": mixture, "output": {"format": "plain"}}, "")
    base = opened(pool.base)
    dense = _loss(base, texts)
    with _not_normalised(base, pool.seed):
        other = _loss(base, texts)
    return {UPCYCLED: _loss(opened(_folder(made.model)), texts) - dense, NOT_NORMALISED: other - dense}


@contextmanager
def _not_normalised(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """The dense model as copies of each FFN under a random gate whose two largest probabilities do not sum to one."""
    draw, hooks = torch.Generator().manual_seed(seed), []
    for layer in model.model.layers:
        gate_ED = 0.02 * torch.randn(EXPERTS, model.config.hidden_size, generator=draw)

        def weigh(
            _module: object, inputs: tuple[torch.Tensor], output: torch.Tensor, gate_ED: torch.Tensor = gate_ED
        ) -> torch.Tensor:
            return output * (inputs[0] @ gate_ED.T).softmax(-1).topk(2).values.sum(-1, keepdim=True)

        hooks.append(layer.mlp.register_forward_hook(weigh))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _nearer(pool: Pool, texts: Texts, out: Path) -> dict[str, float]:
    """Mixtures of experts that are moved towards their mean, under a router that reads words and not the experts."""
    states = dict(zip(pool.whole, (model.state_dict() for model in models_of(pool)), strict=True))
    mean, found = mean_of(list(states.values())), dict[str, float]()
    base = {name: score(opened(pool.base), each)[0] for name, each in texts.items()}
    own = {name: score(opened(pool.whole[name]), each)[0] for name, each in texts.items()}
    for far in NEARER:
        where = out / f"nearer-{far:g}"
        moved = {
            name: {key: (1 - far) * each + far * mean[key] for key, each in state.items()} for name, state in states.items()
        }
        experts = {name: save(pool, state, where / name) for name, state in moved.items()}
        made = built(replace(pool, experts=experts), where, {"mixture": {"top_k": 1, "router": {"fit": "lexical"}}})
        model, cosines = opened(_folder(made.model)), similarity(open_checkpoint(_folder(made.model)), QUIET)[0]
        gaps = [(base[name] - score(model, each)[0]) / (base[name] - own[name]) for name, each in texts.items()]
        found[ALIKE.format(far)] = statistics.fmean(cosines[a][b] for a in range(len(cosines)) for b in range(a))
        found[CLOSED.format(far)] = statistics.fmean(gaps)
    return found


def _loss(model: object, texts: Texts) -> float:
    assert isinstance(model, PreTrainedModel)
    return statistics.fmean(score(model, each)[0] for each in texts.values())


def _folder(made: object) -> Path:
    assert isinstance(made, Path)
    return made
