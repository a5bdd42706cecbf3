"""How experts are chosen while a mixture trains. Afterwards its own routing decides, by nothing but a token's logits.

    base             balanced assignment: every expert gets as many of a batch's tokens, at the largest sum of logits (BASE,
                     arXiv:2103.16716; the weight is 1, with the gradient of log sigmoid(logit); the paper's is the sigmoid)
    sinkhorn         the largest top_k of a plan with equal shares of all experts (S-BASE, arXiv:2202.01169); softmax over them
    random           top_k experts at random, alike; THOR (arXiv:2110.04260) with one
    domain-random    an expert of the domain's group, at random (RRE, arXiv:2303.10845); a group has the same text
    dselect          top_k selectors, each a product of smooth steps along a tree of experts (DSelect-k, arXiv:2106.03760; each
                     step reads the distance of its two sides' best logits, as a gate has one row per expert)
    dense-to-sparse  softmax of logits and Gumbel noise, whose temperature falls; small weights are cut (DTS, arXiv:2112.14397)

Weights sum to 1, and less where a capacity cuts some off. Pads are no tokens and keep what their own logits say.

Shape legend: B rows, S decisions of a row, N decisions that count, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from modekit.training.losses import GENERIC
from modekit.training.settings import Gate, TrainSettings

DROPPED = tuple(f"dropped_{quarter}" for quarter in range(1, 5))
"""Columns of the log: share of decisions that capacity dropped, by quarter of the longest sequence."""
_FAR = 1e4  # between two logits: softmax gives the lower one exactly nothing
_HOT, _COLD = 2.0, 0.5  # temperatures of the Gumbel softmax, first and last, as in its authors' scripts
_SMALL = 0.05  # of our own: a weight below it is cut
_BIDS = 400  # rounds of an auction


@dataclass(frozen=True)
class Decisions:
    """Which decisions of a router count in a pass, (B, S), the labels of their tokens, and where these stand in their text."""

    mask: torch.Tensor
    labels: torch.Tensor
    places: torch.Tensor

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Those of (B, S, E) or (B, S, O, E) that count, (N, E): with one decision per output feature each is one."""
        return self._by_token(values)[self.mask].flatten(0, 1)

    def with_rows(self, values: torch.Tensor, rows_NE: torch.Tensor) -> torch.Tensor:
        """The same values with others where they count."""
        whole = self._by_token(values)
        return whole.index_put((self.mask,), rows_NE.view(-1, *whole.shape[2:])).view_as(values)

    def each(self, of_token: torch.Tensor, decisions: int) -> torch.Tensor:
        """What is said of tokens, (B, S), per decision, (N,)."""
        counted = of_token[self.mask]
        return counted.repeat_interleave(decisions // max(1, len(counted)))

    def _by_token(self, values: torch.Tensor) -> torch.Tensor:
        return values.reshape(*self.mask.shape, -1, values.shape[-1])


@dataclass(frozen=True)
class Situation:
    """What gates know besides logits: labels (N,), experts per token, share of the run that is over, and groups (E, E)."""

    labels_N: torch.Tensor
    top_k: int
    progress: float
    groups_EE: torch.Tensor


class TrainingGate:
    """A gate and the capacity of experts, as settings say; `progress` is the share of the run that is over."""

    def __init__(self, settings: TrainSettings, top_k: int, groups_EE: torch.Tensor) -> None:
        self._settings, self._top_k, self.groups_EE = settings, top_k, groups_EE
        self.progress = 0.0
        self._drops = torch.zeros(2, 4)  # of a step: dropped, asked for

    def weights(self, at: Decisions, logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weights like `weights`, which are the mixture's own."""
        settings, logits_NE, weights_NE = self._settings, at.rows(logits).float(), at.rows(weights).float()
        if len(logits_NE) == 0:
            return weights
        if settings.gate is not None:
            labels_N, groups_EE = at.each(at.labels, len(logits_NE)), self.groups_EE.to(logits.device)
            weights_NE = CHOOSE[settings.gate](logits_NE, Situation(labels_N, self._top_k, self.progress, groups_EE))
        if settings.capacity is not None:
            places_N = at.each(at.places, len(logits_NE))
            weights_NE, *counted = within_capacity(logits_NE, weights_NE, places_N, settings)
            quarter_N = (places_N * 4 // settings.sequence_length).clamp_max(3).cpu()
            self._drops.index_add_(1, quarter_N, torch.stack(counted).to(self._drops))
        return at.with_rows(weights, weights_NE.to(weights.dtype))

    def drain(self) -> dict[str, float]:
        """What capacity dropped in a step."""
        (dropped, asked), self._drops = self._drops, torch.zeros(2, 4)
        rates = (dropped / asked.clamp_min(1)).tolist()
        return {} if self._settings.capacity is None else dict(zip(DROPPED, rates, strict=True))


def softmax_over(logits_NE: torch.Tensor, chosen_NE: torch.Tensor) -> torch.Tensor:
    """Softmax over the chosen. Of one, whose weight is 1, the gradient is that of log sigmoid(logit)."""
    weights_NE = logits_NE.masked_fill(~chosen_NE, -_FAR).softmax(-1) * chosen_NE
    single_NE = torch.nn.functional.logsigmoid(logits_NE)
    return torch.where(chosen_NE.sum(-1, keepdim=True) == 1, weights_NE * (single_NE - single_NE.detach()).exp(), weights_NE)


def balanced(scores_NE: torch.Tensor) -> torch.Tensor:
    """An expert for every token, (N, E), each for N / E rounded up at most, at the largest sum of scores but for small steps.

    An auction (Bertsekas, 1988, as in BASE): tokens without a place bid for the best expert at its price, by as much as it is
    better than the second. An expert takes the highest bids, and its price is the lowest of those.
    """
    tokens, experts = scores_NE.shape
    room = -(-tokens // experts)
    step = max(float(scores_NE.max() - scores_NE.min()) / 200, 1e-6)
    prices_E, bids_N = scores_NE.new_zeros(experts), scores_NE.new_zeros(tokens)
    holder_N = torch.full((tokens,), -1, device=scores_NE.device)
    for bids in range(_BIDS + experts):
        free = (holder_N < 0).nonzero().squeeze(-1)
        if len(free) == 0:
            break
        values = scores_NE[free] - prices_E
        if bids >= _BIDS:  # what is left goes where there is room
            values = values.masked_fill(holder_N[holder_N >= 0].bincount(minlength=experts) >= room, -_FAR)
        best, at = values.topk(min(2, experts), dim=-1)
        bids_N[free], holder_N[free] = prices_E[at[:, 0]] + best[:, 0] - best[:, -1] + step, at[:, 0]
        for expert in range(experts):
            held = (holder_N == expert).nonzero().squeeze(-1)
            if len(held) >= room:
                kept, places = bids_N[held].topk(room)
                holder_N[held] = -1
                holder_N[held[places]] = expert
                prices_E[expert] = kept[-1]
    return torch.nn.functional.one_hot(holder_N, experts).bool()


def sinkhorn(logits_NE: torch.Tensor) -> torch.Tensor:
    """Log of the plan near exp(logits) whose rows sum to 1 and whose columns to N / E."""
    plan_NE, share = logits_NE.double(), math.log(len(logits_NE) / logits_NE.shape[-1])
    for _ in range(100):
        plan_NE = plan_NE - plan_NE.logsumexp(-1, keepdim=True)
        over_E = plan_NE.logsumexp(0) - share
        if float(over_E.abs().max()) < 1e-3:
            break
        plan_NE = plan_NE - over_E
    return plan_NE


def _largest(values_NE: torch.Tensor, count: int) -> torch.Tensor:
    return torch.zeros_like(values_NE, dtype=torch.bool).scatter(-1, values_NE.topk(count, dim=-1).indices, True)


def _domain_random(logits_NE: torch.Tensor, at: Situation) -> torch.Tensor:
    """Text of no domain goes to any expert."""
    group_NE = at.groups_EE[at.labels_N.clamp_min(0)] | (at.labels_N == GENERIC)[:, None]
    return _largest(torch.rand_like(logits_NE).masked_fill(~group_NE, -1.0), 1).to(logits_NE)


def _dselect(logits_NE: torch.Tensor, at: Situation) -> torch.Tensor:
    left_NE, selected, best = logits_NE, [], []
    for _ in range(at.top_k):
        winner_N1 = left_NE.detach().argmax(-1, keepdim=True)
        selected.append(_selector(left_NE))
        best.append(logits_NE.gather(-1, winner_N1))
        left_NE = left_NE.scatter(-1, winner_N1, -_FAR)
    return (torch.stack(selected, 1) * torch.cat(best, -1).softmax(-1)[..., None]).sum(1)


def _selector(logits_NE: torch.Tensor) -> torch.Tensor:
    """Weights of the leaves of a tree: the product of smooth steps from its root, on one expert where all are at their ends."""
    if logits_NE.shape[-1] == 1:
        return torch.ones_like(logits_NE)
    left_NE, right_NE = logits_NE.tensor_split(2, dim=-1)
    step_N1 = smooth_step(left_NE.amax(-1) - right_NE.amax(-1))[:, None]
    return torch.cat([step_N1 * _selector(left_NE), (1.0 - step_N1) * _selector(right_NE)], -1)


def smooth_step(distance: torch.Tensor) -> torch.Tensor:
    """0 below -1/2, 1 above 1/2, -2 t^3 + 3/2 t + 1/2 between (arXiv:2106.03760, with gamma 1)."""
    t = distance.clamp(-0.5, 0.5)
    return -2.0 * t**3 + 1.5 * t + 0.5


def _dense_to_sparse(logits_NE: torch.Tensor, at: Situation) -> torch.Tensor:
    gumbel_NE = -torch.empty_like(logits_NE).exponential_().log()
    weights_NE = ((logits_NE + gumbel_NE) / (_HOT + at.progress * (_COLD - _HOT))).softmax(-1)
    kept_NE = weights_NE * (weights_NE >= weights_NE.amax(-1, keepdim=True).clamp_max(_SMALL))
    return kept_NE / kept_NE.sum(-1, keepdim=True)


CHOOSE: Mapping[Gate, Callable[[torch.Tensor, Situation], torch.Tensor]] = {
    "base": lambda logits_NE, _: softmax_over(logits_NE, balanced(logits_NE.detach())),
    "sinkhorn": lambda logits_NE, at: softmax_over(logits_NE, _largest(sinkhorn(logits_NE.detach()), at.top_k)),
    "random": lambda logits_NE, at: _largest(torch.rand_like(logits_NE), at.top_k) / at.top_k,
    "domain-random": _domain_random,
    "dselect": _dselect,
    "dense-to-sparse": _dense_to_sparse,
}
"""Logits (N, E) -> weights (N, E)."""


def within_capacity(
    logits_NE: torch.Tensor, weights_NE: torch.Tensor, places_N: torch.Tensor, settings: TrainSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights within the settings' capacity, and per token how many experts it lost, and had asked for.

    An expert takes at most `capacity` times its even share of the decisions, rounded up, and first choices before second ones
    (GShard, arXiv:2006.16668). By `priority` it takes the earlier in their texts first, or those whose largest probability is
    largest (batch-prioritised, arXiv:2106.05974). `overflow` drops the others: their share is zero; or gives them to the next
    best expert with room; or, random, takes a second choice with probability min(1, 2 weight) in the first place (GShard).
    """
    assert settings.capacity is not None
    own_NE = weights_NE.detach()
    chosen_NE, goes_on = own_NE > 0, settings.overflow == "next"
    room = math.ceil(settings.capacity * int(chosen_NE.sum()) / chosen_NE.shape[-1])
    if settings.overflow == "random":
        chosen_NE &= _largest(own_NE, 1) | (2.0 * own_NE > torch.rand_like(own_NE))
    probabilities_NE, asked_N = logits_NE.detach().softmax(-1), chosen_NE.sum(-1)
    order_N = (-probabilities_NE.amax(-1) if settings.priority == "score" else places_N).argsort(stable=True)
    ranked_NE = torch.where(chosen_NE, 1.0 + own_NE, probabilities_NE).argsort(dim=-1, descending=True, stable=True)
    kept_NE = torch.zeros_like(chosen_NE)
    for choice in range(chosen_NE.shape[-1] if goes_on else int(asked_N.max())):
        asks_N = (kept_NE.sum(-1) if goes_on else choice) < asked_N
        asks_NE = (torch.nn.functional.one_hot(ranked_NE[:, choice], chosen_NE.shape[-1]) * asks_N[:, None])[order_N]
        kept_NE[order_N] |= asks_NE.bool() & (asks_NE.cumsum(0) + kept_NE.sum(0) <= room)
    within_NE, sums_N1 = weights_NE * kept_NE, weights_NE.sum(-1, keepdim=True)
    if goes_on:
        moved_N1 = (kept_NE & ~chosen_NE).any(-1, keepdim=True)
        within_NE = torch.where(moved_N1, softmax_over(logits_NE, kept_NE) * sums_N1, within_NE)
    return within_NE, asked_N - kept_NE.sum(-1), asked_N
