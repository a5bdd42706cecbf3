"""Routers: what is read -> logits -> weights of the experts, per token and causal.

A router scores its input with a gate, may average the scores over the tokens so far, and turns them into weights that
sum to one. Averages are causal and exact under left padding and token-by-token generation: their state, a few numbers
per sequence, is kept beside the key-value cache.

Shape legend: B batch, S sequence, D width of what is read, E experts, J averages, G rows of the gate, O output features.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

_TINY = 1e-30  # under a root, whose slope at zero is no number
_CHUNK = 128  # tokens whose average is taken in one matrix product


class Flow:
    """What the routers of one model share during a forward pass.

    Attributes:
        averages: whether any router averages over tokens.
        ids_BS: token ids of this pass; None when embeddings were given in their place.
        mask_BS: real tokens of this pass; None when all are.
        kept: places of the tokens whose logits are asked for, when they were named one by one.
        states: router place -> state before this pass (from the cache).
        fresh: router place -> state after it.
        forced: an expert's place, or one per sequence (B,), that gets all weight whatever the routers say.
        left_out: place of an expert that gets no weight; the routers choose among the others.
        listener: called with a router's place and its logits (B, S, E) or (B, S, O, E), when somebody wants to know them.
        solo: with `forced`: the expert's weight is the sigmoid of its own logit, as PHATGOOSE trains its gates.
        mixed: place -> its module.
    """

    def __init__(self) -> None:
        self.mixed: dict[str, Any] = {}
        self.averages = False
        self.ids_BS: torch.Tensor | None = None
        self.mask_BS: torch.Tensor | None = None
        self.kept: torch.Tensor | None = None
        self.states: dict[str, torch.Tensor] = {}
        self.fresh: dict[str, torch.Tensor] = {}
        self.forced: int | torch.Tensor | None = None
        self.left_out: int | None = None
        self.solo = False
        self.listener: Callable[[str, torch.Tensor], None] | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"} | {"listener": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def one_pass(self) -> AbstractContextManager[object]:
        """Held during a forward pass: two threads take turns, since a pass leaves its decisions in the modules."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock


class Router(nn.Module):
    """One decision: x (B, S, D) -> weights (B, S, E), or (B, S, O, E) with one decision per output feature.

    `routing` is the config's `modekit.routing`:
        method: linear (given `weights`), gating (all experts) or routing (`top_k`, or `top_p`: the fewest experts whose
            probabilities reach it).
        averages: what the gate's J parts read: {"decay": None} the token itself, 1.0 the mean of all tokens so far,
            d < 1 an exponential average; with "sum" what was seen adds up instead.
        prefix: averages take no token after the first `prefix` ones, so that the decision stays.
        score: linear (w x), norm (|G_e x|: Arrow with one row per expert, SpectR with all of B A), standardised
            (PHATGOOSE: x and gate rows standardised), ngram (the gate is a table over hashed n-grams of token ids, whose
            `order` and `buckets` stand under "ngram"; x is not read).
        always_on: {"expert": place or None for the base, "weight": its share or None: what its logit says}.
        jitter, noise: in training only.
    """

    def __init__(
        self, place: str, flow: Flow, width: int, experts: int, routing: Mapping[str, Any], rows: Sequence[int], features: int
    ) -> None:
        super().__init__()
        self.place = place
        self.experts = experts
        self.routing = dict(routing)
        self.rows = list(rows)  # of the gate, per expert; more than one only for score "norm"
        self.features = features  # O, or 0 when one decision serves all
        self._flow = [flow]  # in a list, so that it is no attribute that saving or moving the module could touch
        parts = len(self.routing["averages"])
        if self.routing["method"] != "linear":
            self.gate = nn.Parameter(torch.zeros(max(features, 1) * sum(self.rows), parts * width))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Weights in float32; they sum to one over the experts (less what an always-on base takes)."""
        flow = self._flow[0]
        shape = (*x_BSD.shape[:2], *([self.features] if self.features else []), self.experts)
        if flow.forced is not None and not flow.solo:
            return one_hot(flow.forced, shape, x_BSD.device)
        if self.routing["method"] == "linear":
            weights_E = torch.tensor(self.routing["weights"], dtype=torch.float32, device=x_BSD.device)
            if flow.left_out is not None:
                weights_E = weights_E.index_fill(-1, _index(flow.left_out, weights_E), 0.0)
                weights_E = weights_E / weights_E.sum().clamp_min(_TINY)
            return weights_E.expand(shape)
        logits = self.logits(x_BSD).reshape(shape)
        if flow.listener is not None:
            flow.listener(self.place, logits)
        if flow.forced is not None:
            return one_hot(flow.forced, shape, x_BSD.device) * logits.sigmoid()
        if self.training and self.routing.get("noise"):
            logits = logits + torch.randn_like(logits) * self.routing["noise"]
        return select(logits, self.routing, flow.left_out)

    def logits(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Scores after averaging, (B, S, E) or (B, S, O E), float32."""
        if self.routing.get("score") == "ngram":
            return self._averaged(self._ngram_scores(x_BSD), self.routing["averages"][0], 0)
        x_BSD = x_BSD.float()
        jitter = self.routing.get("jitter", 0.0)
        if self.training and jitter:
            x_BSD = x_BSD * torch.empty_like(x_BSD).uniform_(1 - jitter, 1 + jitter)
        gates = self.gate.float().chunk(len(self.routing["averages"]), dim=1)
        total: torch.Tensor | None = None
        for number, (gate_GD, average) in enumerate(zip(gates, self.routing["averages"], strict=True)):
            scores = self._scores(x_BSD, gate_GD)
            if average["decay"] is not None:
                scores = self._averaged(scores, average, number)
            total = scores if total is None else total + scores
        assert total is not None
        return total

    def _scores(self, x_BSD: torch.Tensor, gate_GD: torch.Tensor) -> torch.Tensor:
        score = self.routing.get("score", "linear")
        if score == "linear" or self._flow[0].solo:
            return torch.nn.functional.linear(x_BSD, gate_GD)
        if score == "standardised":  # Section 3, arXiv:2402.05859: z = LN(x), n_e = LN(v_e), z n_e / sqrt(D)
            width = (x_BSD.shape[-1],)
            gate_GD = torch.nn.functional.layer_norm(gate_GD, width)
            x_BSD = torch.nn.functional.layer_norm(x_BSD, width)
            scores: torch.Tensor = torch.nn.functional.linear(x_BSD, gate_GD) / width[0] ** 0.5
            return scores
        products = torch.nn.functional.linear(x_BSD, gate_GD)
        return torch.stack(
            [part.square().sum(-1).clamp_min(_TINY).sqrt() for part in torch.split(products, self.rows, dim=-1)], dim=-1
        )

    def _ngram_scores(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """The table's row of the n-gram that ends in each token, (B, S, E)."""
        flow, key = self._flow[0], f"{self.place}.ids"
        if flow.ids_BS is None:
            raise ValueError("this mixture's router reads token ids: give input_ids, not inputs_embeds")
        ids_BS = flow.ids_BS.to(x_BSD.device)
        mask_BS = torch.ones_like(ids_BS) if flow.mask_BS is None else flow.mask_BS.to(ids_BS)
        ngram = self.routing["ngram"]
        rows_BS, flow.fresh[key] = ngram_rows(ids_BS, mask_BS, flow.states.get(key), ngram["order"], ngram["buckets"])
        return torch.nn.functional.embedding(rows_BS, self.gate.float().t())

    def _averaged(self, scores_BSG: torch.Tensor, average: Mapping[str, Any], number: int) -> torch.Tensor:
        flow, key = self._flow[0], f"{self.place}.{number}"
        mask_BS = flow.mask_BS
        mask_BS = torch.ones(scores_BSG.shape[:2], device=scores_BSG.device) if mask_BS is None else mask_BS.to(scores_BSG)
        averaged, state = causal_average(
            scores_BSG, mask_BS, average["decay"], flow.states.get(key), prefix=self.routing.get("prefix"),
            add_up=average.get("sum", False),
        )
        flow.fresh[key] = state
        return averaged


def causal_average(
    values_BSG: torch.Tensor,
    mask_BS: torch.Tensor,
    decay: float,
    state: torch.Tensor | None,
    *,
    prefix: int | None = None,
    add_up: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average of the values of all real tokens up to each one, the newest with weight 1, those before with decay, decay^2...
    With `add_up` their weighted sum.

    `mask_BS` is 1 for real tokens and 0 for pads, which neither count nor let others fade. `state` (B, G + 2) holds the
    weighted sum, the sum of the weights and the number of tokens so far. Returns the averages (B, S, G) and the state after
    the last token.
    """
    batch, length, size = values_BSG.shape
    state = values_BSG.new_zeros((batch, size + 2)) if state is None else state.to(values_BSG)
    results = []
    for start in range(0, length, _CHUNK):
        mask = mask_BS[:, start : start + _CHUNK]
        seen = state[:, -1:] + mask.cumsum(1)
        taken = mask if prefix is None else mask * (seen <= prefix)
        age = taken.cumsum(1)  # tokens taken in this chunk, up to and with each
        # Weight of token i at token t: decay^(tokens taken after i), for i <= t.
        powers_BTS = (age[:, :, None] - age[:, None, :]).clamp_min(0)
        weights_BTS = torch.pow(decay, powers_BTS).tril() * taken[:, None, :]
        extended = torch.cat([values_BSG[:, start : start + _CHUNK], torch.ones_like(mask)[..., None]], dim=-1)
        carried = torch.pow(decay, age)[..., None] * state[:, None, :-1]
        sums = weights_BTS @ extended + carried
        results.append(sums[..., :-1] if add_up else sums[..., :-1] / sums[..., -1:].clamp_min(1e-12))
        state = torch.cat([sums[:, -1], seen[:, -1:]], dim=-1)
    return torch.cat(results, dim=1), state


_PRIME = 2**31 - 1


def ngram_rows(
    ids_BS: torch.Tensor, mask_BS: torch.Tensor, state: torch.Tensor | None, order: int, buckets: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of a table for the n-gram that ends in each token: its `order` newest real tokens, fewer at the beginning, hashed.

    `mask_BS` is 1 for real tokens; pads may stand on either side and are in no n-gram. `state` (B, order - 1) holds the last
    tokens before this pass (ids plus one, 0 for none). Returns rows (B, S) int64 and the state after the last token.
    """
    batch = len(ids_BS)
    state = ids_BS.new_zeros((batch, order - 1)) if state is None else state.to(ids_BS)
    tokens = torch.cat([state, (ids_BS + 1) * mask_BS], dim=1)
    places = (tokens > 0).long().argsort(dim=1, stable=True)  # what is no token first, then the tokens in their order
    ordered = tokens.gather(1, places)
    hashed = torch.zeros_like(ordered)
    for back in range(order):
        earlier = torch.nn.functional.pad(ordered, (back, 0))[:, : ordered.shape[1]]
        hashed = (hashed * 1_000_003 + earlier * 7_919 + 13) % _PRIME
    rows = torch.zeros_like(tokens).scatter(1, places, hashed % buckets)
    return rows[:, order - 1 :], ordered[:, ordered.shape[1] - order + 1 :]


def select(logits: torch.Tensor, routing: Mapping[str, Any], left_out: int | None = None) -> torch.Tensor:
    """Softmax over the chosen experts (last axis), zero elsewhere; sums to one, or to 1 - weight of an always-on base.

    `left_out`: the place of an expert that is not there to choose, always on or not.
    """
    always_on = routing.get("always_on") or {}
    if left_out is not None:
        logits = logits.index_fill(-1, _index(left_out, logits), float("-inf"))
        always_on = always_on if always_on.get("expert") != left_out else {}
    own, share = always_on.get("expert"), always_on.get("weight")
    chosen = torch.ones_like(logits, dtype=torch.bool)
    ranked = logits
    if own is not None and share is None:  # among the chosen whatever its logit; its weight is what the logit says
        place = torch.arange(logits.shape[-1], device=logits.device) == own
        ranked = logits.masked_fill(place, float("inf"))
    if routing["method"] == "routing" and routing.get("top_k") is not None and routing["top_k"] < logits.shape[-1]:
        chosen = torch.zeros_like(chosen).scatter(-1, ranked.topk(routing["top_k"], dim=-1).indices, True)
    elif routing["method"] == "routing" and routing.get("top_p") is not None:
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        sorted_p = logits.softmax(-1).gather(-1, order)
        enough = sorted_p.cumsum(-1) - sorted_p < routing["top_p"]  # what stands before it does not suffice
        chosen = torch.zeros_like(chosen).scatter(-1, order, enough)
    weights = logits.masked_fill(~chosen, float("-inf")).softmax(-1)
    if share is not None:
        weights = weights * (1.0 - share)
        if own is not None:
            weights = weights + share * (torch.arange(logits.shape[-1], device=logits.device) == own)
    return weights


def _index(place: int, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([place], device=like.device)


def one_hot(forced: int | torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """All weight on one expert: the same for all, or one per sequence. Beams stand side by side and share a sequence's.

    Raises ValueError when the experts given are not one per sequence.
    """
    places = torch.as_tensor(forced, device=device).reshape(-1)
    if len(places) > 1 and len(places) != shape[0]:
        if shape[0] % len(places):
            raise ValueError(f"use_expert was given {len(places)} experts, for {shape[0]} sequences")
        places = places.repeat_interleave(shape[0] // len(places))
    places = places.reshape(-1, *[1] * (len(shape) - 1))
    return (torch.arange(shape[-1], device=device) == places).float().expand(shape)


def places_of(expert: str | int | Sequence[str | int] | torch.Tensor | None, names: Sequence[str]) -> int | torch.Tensor | None:
    """Places of experts that are given by name or place, one for all or one per sequence. Raises ValueError."""
    if expert is None:
        return None
    if isinstance(expert, str):
        places: int | torch.Tensor = names.index(expert) if expert in names else -1
    elif isinstance(expert, (list, tuple)):
        places = torch.tensor([int(places_of(each, names)) for each in expert])  # type: ignore[arg-type]
    else:
        places = expert  # type: ignore[assignment]
    flat = torch.as_tensor(places).flatten()
    whole = not (flat.is_floating_point() or flat.is_complex() or flat.dtype == torch.bool)
    if not whole or not all(0 <= place < len(names) for place in flat.tolist()):
        raise ValueError(f"there is no expert {expert!r}; there are {', '.join(names)} (or places from 0)")
    return places
