"""Sparse mixtures that are trained from nothing, for translation.py: every expert begins with FFNs of its own, each token runs
through the two likeliest, and a loss keeps the experts' loads even (alpha of arXiv 2101.03961, Eq. 4). With a capacity no
expert takes more than its share of a batch's tokens times that factor (arXiv 2006.16668, Section 2.2).

Shape legend: B batch, S sequence or target, E experts, N real tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.loaded.load import load_model, without_bars
from modekit.loaded.mixture import RouterTrace
from modekit.loaded.shapes import mixture_of
from modekit.loaded.text_training import Training, train_on_text
from modekit.sources.names import in_decoder
from modekit.text.document import Pair
from modekit.text.sequences import encode
from modekit.training.losses import load_balance
from translation_models import LAYERS, Maker, new_model

TOP_K, BALANCE = 2, 0.01


class Beside(torch.autograd.Function):
    """Logits as they are; in the pass back a second loss gets the gradient 1 beside that of the logits."""

    @staticmethod
    def forward(ctx: Any, logits_BSV: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """The logits; `loss` is a number."""
        return logits_BSV.clone()

    @staticmethod
    def backward(ctx: Any, gradient_BSV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of both."""
        return gradient_BSV, torch.ones((), device=gradient_BSV.device)


def untrained(made: Maker, name: str, texts: dict[str, Path], interval: int) -> Checkpoint:
    """As many experts as domains, which have their FFNs from other seeds than the base; in every `interval`-th layer."""
    base = new_model(made.tokenizer, made.size, ffn=made.size.ffn, seed=made.seed)
    _save(made, base, f"{name}-start")
    experts = {}
    for place, domain in enumerate(texts):
        other = new_model(made.tokenizer, made.size, ffn=made.size.ffn, seed=1000 * (made.seed + 1) + place)
        ffn = {key: value for key, value in other.state_dict().items() if ".fc1." in key or ".fc2." in key}
        expert = new_model(made.tokenizer, made.size, ffn=made.size.ffn, seed=made.seed)
        expert.load_state_dict({**expert.state_dict(), **ffn})
        experts[domain] = _save(made, expert, f"{name}-start-{domain}")
    layers = [f"{side}.{layer}" for side in ("encoder", "decoder") for layer in range(interval - 1, LAYERS, interval)]
    mixture = {"top_k": TOP_K, "router": {"fit": "random", "seed": made.seed}, "layers": layers}
    return made.mixture(f"{name}-untrained", f"{name}-start", experts, texts, {}, mixture)


def trained(
    made: Maker,
    name: str,
    checkpoint: Checkpoint,
    stages: Sequence[tuple[Iterable[Pair], Training]],
    *,
    capacity: float | None = None,
    balance: float = BALANCE,
) -> PreTrainedModel:
    """The mixture after one training behind the other, of everything in it; made once. It translates without a capacity."""
    model, kept = load_model(checkpoint.folder), made.folder / f"{name}.safetensors"
    if kept.exists():
        model.load_state_dict(load_file(kept), strict=False)  # tied ones stand there once
        return model
    mixture = mixture_of(model, checkpoint)
    mixture.prepare_training()
    constants = {id(parameter) for parameter in mixture.constants()}
    moving = [parameter for parameter in model.parameters() if id(parameter) not in constants]
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in constants)
    with ExitStack() as meanwhile:
        if capacity is not None:
            meanwhile.enter_context(limited(model, capacity))
        meanwhile.enter_context(balanced(model, checkpoint, moving, balance))
        for pairs, training in stages:
            longest = training.sequence_length
            sequences = encode(made.tokenizer, pairs, max_tokens=training.max_tokens, sequence_length=longest)
            train_on_text(model, sequences, training.with_(seed=made.seed))
    save_file({key: value.clone() for key, value in model.named_parameters()}, kept)
    return model


@contextmanager
def balanced(model: PreTrainedModel, checkpoint: Checkpoint, moving: Sequence[torch.Tensor], weight: float) -> Iterator[None]:
    """While open, `weight` times the mean load balance of the routers is a loss beside that of the text; what no token of a
    batch runs through has a gradient, too, of zeros.
    """
    with mixture_of(model, checkpoint).traced() as trace:

        def add(_module: Any, _args: Any, given: dict[str, Any], output: Any) -> Any:
            nothing = torch.stack([each.sum() for each in moving]).sum() * 0.0
            output.logits = Beside.apply(  # type: ignore[no-untyped-call]
                output.logits, weight * balance_of(trace, checkpoint, given) + nothing
            )
            return output

        hook = model.register_forward_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


@contextmanager
def limited(model: PreTrainedModel, factor: float) -> Iterator[None]:
    """While open, what an expert is given beyond its capacity counts nothing: factor times TOP_K N / E tokens of a batch."""
    given: dict[str, torch.Tensor] = {}
    routers = {name: module for name, module in model.named_modules() if type(module).__name__ == "Router"}

    def remember(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        given.update({key: inputs[key] for key in ("attention_mask", "decoder_attention_mask")})

    def dropped(name: str) -> Any:
        side = "decoder_attention_mask" if in_decoder(name) else "attention_mask"
        return lambda _module, _args, weights_BSE: within(weights_BSE, given[side].bool(), factor)

    hooks = [model.register_forward_pre_hook(remember, with_kwargs=True)]
    hooks += [module.register_forward_hook(dropped(name)) for name, module in routers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def within(weights_BSE: torch.Tensor, real_BS: torch.Tensor, factor: float) -> torch.Tensor:
    """Weights without those beyond an expert's capacity; the others stay as they are. All first choices come before all second
    ones, and tokens in the order of the batch; pads take no place.
    """
    weights_NE = weights_BSE[real_BS]
    most = math.ceil(factor * TOP_K * len(weights_NE) / weights_NE.shape[1])
    places_NK = weights_NE.topk(TOP_K, dim=-1).indices
    taken, kept_NE = weights_NE.new_zeros(weights_NE.shape[1]), torch.zeros_like(weights_NE, dtype=torch.bool)
    for place_N in places_NK.unbind(1):
        chosen_NE = torch.nn.functional.one_hot(place_N, weights_NE.shape[1]).to(taken)
        behind_NE = chosen_NE.cumsum(0) + taken  # how many the expert has, with this token
        kept_NE |= (chosen_NE > 0) & (behind_NE <= most)
        taken = taken + chosen_NE.sum(0)
    kept_BSE = torch.ones_like(weights_BSE, dtype=torch.bool)
    kept_BSE[real_BS] = kept_NE
    return weights_BSE * kept_BSE


def balance_of(trace: RouterTrace, checkpoint: Checkpoint, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Load balance over real tokens, mean over routers: 1 where loads are even."""
    found = []
    for slot, logits_BSE in trace.by_slot():
        side = "decoder_attention_mask" if in_decoder(checkpoint.slots[slot].name) else "attention_mask"
        logits_NE = logits_BSE[given[side].bool()]
        found.append(load_balance(logits_NE, TOP_K) / len(logits_NE))
    return torch.stack(found).mean()


def _save(made: Maker, model: PreTrainedModel, name: str) -> Path:
    out = made.folder / name
    with without_bars():
        model.save_pretrained(out)
    made.tokenizer.save_pretrained(out)
    return out
