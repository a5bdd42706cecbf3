"""WEMoE (arXiv:2402.00433): an FFN's weights are the base's plus task vectors, weighted by a router that reads the text.

Everything outside of FFNs is merged by task arithmetic with a factor of 0.3, and each layer's router (two layers; the second
starts at weight zero and bias 0.3) gives a factor per task vector. Two things differ, since text is read from left to right:
the paper averages factors over all tokens of an input, here over the tokens so far; and it minimises the entropy of classes on
test inputs, here the loss of the next token on fit text, which needs no labels either.

Shape legend: B batch, S sequence, D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from peers.bounds import models_of, moved
from peers.peer import Formula, Made, Peer, Pool
from peers.peft_rows import Adapted
from peers.training import STEPS, train

FACTOR = 0.3


class Router(nn.Module):
    """Factors (B, S, E) of the task vectors from x (B, S, D), averaged over the tokens so far."""

    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(hidden, hidden), nn.Linear(hidden, experts)
        nn.init.zeros_(self.second.weight)
        nn.init.constant_(self.second.bias, FACTOR)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """The running mean."""
        each_BSE = self.second(self.first(x_BSD).relu())
        return each_BSE.cumsum(1) / torch.arange(1, each_BSE.shape[1] + 1)[None, :, None]


class Merged(nn.Module):
    """A Llama FFN whose weights differ from token to token: y = W x + sum of f_e (W_e - W) x for gate, up and down."""

    def __init__(self, base: nn.Module, experts: Sequence[nn.Module], router: Router) -> None:
        super().__init__()
        self.router = router
        for part in ("gate_proj", "up_proj", "down_proj"):
            origin, *others = (getattr(each, part).weight.detach() for each in (base, *experts))
            self.register_buffer(part, origin)
            self.register_buffer(f"{part}_vectors", torch.stack([each - origin for each in others]))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """What the merged FFN makes of x."""
        factors_BSE = self.router(x_BSD)
        hidden = nn.functional.silu(self._linear("gate_proj", x_BSD, factors_BSE)) * self._linear("up_proj", x_BSD, factors_BSE)
        return self._linear("down_proj", hidden, factors_BSE)

    def _linear(self, part: str, x: torch.Tensor, factors_BSE: torch.Tensor) -> torch.Tensor:
        vectors = getattr(self, f"{part}_vectors")
        y = x @ getattr(self, part).T
        for place, vector in enumerate(vectors):
            y = y + factors_BSE[..., place, None] * (x @ vector.T)
        return y


def wemoe(pool: Pool) -> nn.Module:
    """The model before it is trained, which is that of task arithmetic."""
    model = AutoModelForCausalLM.from_pretrained(pool.base, dtype=torch.float32)
    experts = models_of(pool)
    base: Mapping[str, torch.Tensor] = {name: each.clone() for name, each in model.state_dict().items()}
    merged = moved(base, [each.state_dict() for each in experts], [FACTOR] * len(experts))
    model.load_state_dict({name: base[name] if ".mlp." in name else merged[name] for name in base})
    for each in model.parameters():
        each.requires_grad_(False)
    for place, layer in enumerate(model.model.layers):
        router = Router(model.config.hidden_size, len(experts))
        layer.mlp = Merged(layer.mlp, [each.model.layers[place].mlp for each in experts], router)
    return model


def _wemoe(pool: Pool, _out: Path) -> Made:
    torch.manual_seed(pool.seed)
    model = wemoe(pool)
    found = train(pool, lambda ids: model(input_ids=ids, use_cache=False).logits, [*_routers(model)], STEPS)
    total = sum(each.numel() for each in (*model.parameters(), *model.buffers()))
    note = f"routers alone trained, {STEPS.said}; loss {found[0]:.2f} to {found[-1]:.2f}; factors averaged over the text so far"
    return Made(Adapted(model.eval()), note, total=total, active=total)


def _routers(model: nn.Module) -> list[nn.Parameter]:
    return [each for each in model.parameters() if each.requires_grad]


WEMOE: list[Peer] = [Formula("WEMoE", _wemoe, "2402.00433, formula")]
