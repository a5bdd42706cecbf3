"""Routers: what is read -> logits -> weights of the experts, per token and causal.

A router scores its input with a gate, may average the scores over the tokens so far, and turns them into weights that
sum to one. Averages are causal and exact under left padding and token-by-token generation: their state, a few numbers
per sequence, is kept beside the key-value cache.

Shape legend: B batch, S sequence, D width of what is read, E experts, J averages, G rows of the gate, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .modekit_flow import Flow

_TINY = 1e-30  # under a root, whose slope at zero is no number
_CHUNK = 128  # tokens whose average is taken in one matrix product


class Router(nn.Module):
    """One decision: x (B, S, D) -> weights (B, S, E), or (B, S, O, E) with one decision per output feature.

    `routing` is the config's `modekit.routing`:
        method: linear (given `weights`), gating (all experts) or routing (`top_k`, or `top_p`: the fewest experts whose
            probabilities reach it, or `groups` or `threshold`: `chosen`).
        averages: what the gate's J parts read: {"decay": None} the token itself, 1.0 the mean of all tokens so far,
            d < 1 an exponential average.
        prefix: averages take no token after the first `prefix` ones, so that the decision stays.
        score: linear (w x), cosine (of `dimensions`, below), norm (|w x|: Arrow), lexical (the
            gate is a table over token ids, or, with `orders`, part by part over n-grams of that order, hashed into as many
            rows as "ngram" says; x is not read).
        always_on: {"expert": place or None for the base, "weight": its share or None: what its logit says, "apart": whether
            it is the common expert of modeling_modekit.py, of which routers know nothing}.
        jitter, noise: in training only.
    """

    def __init__(self, name: str, place: Mapping[str, Any], flow: Flow, experts: int, routing: Mapping[str, Any]) -> None:
        """`place` is its entry in `modekit.places` (see `Mixed`)."""
        super().__init__()
        self.place = name
        self.experts = experts
        self.of_source = place.get("of_source", False)  # it stands in a decoder and reads an encoder's output
        self.in_decoder = name.removeprefix("model.").startswith("decoder.")
        self.reads_target = flow.pair and self.in_decoder and not self.of_source
        self.features = place.get("features", 0)  # O, or 0 when one decision serves all
        self._flow = [flow]  # in a list, so that it is no attribute that saving or moving the module could touch
        self.set(routing)
        parts = len(self.routing["averages"])
        shared = self.routing.get("dimensions") or 0
        if self.routing["method"] != "linear":
            self.gate = nn.Parameter(torch.zeros(max(self.features, 1) * experts + shared, parts * place["width"]))

    @property
    def flow(self) -> Flow:
        """What the routers of the model share."""
        return self._flow[0]

    def set(self, routing: Mapping[str, Any]) -> None:
        """Decide by this routing from now on. All routers of a model decide by one routing."""
        self.routing = dict(routing)
        self.flow.common = common_weight(self.routing)
        of_source = self.flow.pair and self.routing.get("score") == "lexical"  # nothing is kept from pass to pass
        self.flow.averages = not of_source and any(average["decay"] is not None for average in self.routing["averages"])

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Weights in float32; they sum to one over the experts (less what an always-on base takes)."""
        sequences = self.flow.sequences
        if sequences is None:
            return self._weights(x_BSD)
        weights = self._weights(x_BSD[:sequences])
        return torch.cat([weights, torch.zeros_like(weights)])

    def _weights(self, x_BSD: torch.Tensor) -> torch.Tensor:
        flow = self.flow
        length = 1 if self.decides_by_ids else x_BSD.shape[1]
        shape = (len(x_BSD), length, *([self.features] if self.features else []), self.experts)
        if flow.forced is not None:
            return one_hot(flow.forced, shape, x_BSD.device)
        if self.routing["method"] == "linear":
            weights_E = torch.tensor(self.routing["weights"], dtype=torch.float32, device=x_BSD.device)
            if flow.left_out is not None:
                weights_E = weights_E.index_fill(-1, _index(flow.left_out, weights_E), 0.0)
                weights_E = weights_E / weights_E.sum().clamp_min(_TINY)
            return weights_E.expand(shape)
        logits = self.logits(x_BSD)
        logits = logits.reshape(*logits.shape[:2], *shape[2:])
        if flow.listener is not None:
            flow.listener(self.place, logits)
        if self.training and self.routing.get("noise"):
            logits = logits + torch.randn_like(logits) * self.routing["noise"]
        return select(logits, self.routing, flow.left_out)

    @property
    def has_decided(self) -> bool:
        """Whether it decides while the encoder runs, and that is over: one embedding may serve the decoder, too."""
        return self.flow.pair and not self.flow.encoding and not self.in_decoder

    @property
    def decides_by_ids(self) -> bool:
        """Whether it decides once, by the ids of a source, whatever module it stands at."""
        return self.flow.pair and self.routing.get("score") == "lexical" and self.routing["method"] != "linear"

    def logits(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Scores after averaging, (B, S, E) or (B, S, O E), float32; (B, 1, ...) where they are of a source as a whole."""
        rows = self._rows_of_tokens(x_BSD.device)
        flow = self.flow
        by_source = flow.pair and (bool(rows) or flow.encoding or self.of_source)
        if not rows:
            x_BSD = x_BSD.float()
            jitter = self.routing.get("jitter", 0.0)
            if self.training and jitter:
                x_BSD = x_BSD * torch.empty_like(x_BSD).uniform_(1 - jitter, 1 + jitter)
        gates = self.gate.float().chunk(len(self.routing["averages"]), dim=1)
        total: torch.Tensor | None = None
        for number, (gate_GD, average) in enumerate(zip(gates, self.routing["averages"], strict=True)):
            scores = nn.functional.embedding(rows[number], gate_GD.t()) if rows else self._scores(x_BSD, gate_GD)
            if average["decay"] is not None:
                scores = self._averaged(scores, average, number, by_source=by_source)
            if by_source and (rows or average["decay"] is not None):
                scores = last_real(scores, flow.source_mask_BS)
            total = scores if total is None else total + scores
        assert total is not None
        return cosine(total, self.gate.float(), self.experts) if self.routing.get("score") == "cosine" else total

    def _scores(self, x_BSD: torch.Tensor, gate_GD: torch.Tensor) -> torch.Tensor:
        products = torch.nn.functional.linear(x_BSD, gate_GD)
        return products.abs() if self.routing.get("score") == "norm" else products

    def _rows_of_tokens(self, device: torch.device) -> list[torch.Tensor]:
        """Per part of the gate its columns that the text's tokens choose, (B, S): of the n-gram that ends in each, or of the
        token itself; none for a router that reads x.
        """
        if self.routing.get("score") != "lexical":
            return []
        flow = self.flow
        ids_BS = flow.source_ids_BS if flow.pair else flow.ids_BS
        if ids_BS is None and flow.pair:
            raise ValueError(
                "this mixture's router reads the source's ids: give input_ids, or the encoder's output as this model made it"
            )
        if ids_BS is None:
            raise ValueError("this mixture's router reads token ids: give input_ids, not inputs_embeds")
        ids_BS = ids_BS.to(device, torch.int64)  # as the hash of n-grams needs
        ngram = self.routing.get("ngram")
        if ngram is None:
            return [ids_BS] * len(self.routing["averages"])
        orders = self.routing["orders"]
        found = {order: self._ngram_rows(ids_BS, order, ngram["buckets"], len(set(orders))) for order in dict.fromkeys(orders)}
        return [found[order] for order in orders]

    def _ngram_rows(self, ids_BS: torch.Tensor, order: int, buckets: int, kinds: int) -> torch.Tensor:
        flow = self.flow
        key = f"{self.place}.ids" + (f".{order}" if kinds > 1 else "")
        if flow.keeper is not None:
            return flow.keeper.ngram_rows(key, ids_BS, order, buckets)
        mask_BS = flow.source_mask_BS if flow.pair else flow.mask_BS
        mask_BS = torch.ones_like(ids_BS) if mask_BS is None else mask_BS.to(ids_BS)
        state = None if flow.pair else flow.states.get(key)
        rows_BS, state = ngram_rows(ids_BS, mask_BS, state, order, buckets)
        if not flow.pair:
            flow.fresh[key] = state
        return rows_BS

    def _averaged(self, scores_BSG: torch.Tensor, average: Mapping[str, Any], number: int, *, by_source: bool) -> torch.Tensor:
        flow = self.flow
        key = f"{self.place}.{number}"
        prefix = self.routing.get("prefix")
        if flow.keeper is not None:
            return means_of(flow.keeper.sums(key, scores_BSG, average["decay"], prefix))
        mask_BS = flow.source_mask_BS if by_source else flow.mask_BS
        mask_BS = torch.ones(scores_BSG.shape[:2], device=scores_BSG.device) if mask_BS is None else mask_BS.to(scores_BSG)
        before = None if by_source else flow.states.get(key)
        averaged, state = causal_average(scores_BSG, mask_BS, average["decay"], before, prefix=prefix)
        if not by_source:
            flow.fresh[key] = state
        return averaged


def last_real(values_BSG: torch.Tensor, mask_BS: torch.Tensor | None) -> torch.Tensor:
    """What stands at the last real token of every sequence, (B, 1, G): of a running average, that of the whole text."""
    if mask_BS is None:
        return values_BSG[:, -1:]
    places_BS = torch.arange(mask_BS.shape[1], device=mask_BS.device) * (mask_BS > 0)
    rows = places_BS.argmax(1).to(values_BSG.device)[:, None, None]
    return values_BSG.gather(1, rows.expand(-1, 1, values_BSG.shape[-1]))


def causal_average(
    values_BSG: torch.Tensor,
    mask_BS: torch.Tensor,
    decay: float,
    state: torch.Tensor | None,
    *,
    prefix: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average of the values of all real tokens up to each one, the newest with weight 1, those before with decay, decay^2...
    The rest is as in `causal_sums`. Returns the averages (B, S, G) and the state after the last token (B, G + 2).
    """
    states_BSW = causal_sums(values_BSG, mask_BS, decay, state, prefix=prefix)
    return means_of(states_BSW), states_BSW[:, -1]


def means_of(states_BSW: torch.Tensor) -> torch.Tensor:
    """The averages (B, S, G) that the states after each token hold."""
    return states_BSW[..., :-2] / states_BSW[..., -2:-1].clamp_min(1e-12)


def causal_sums(
    values_BSG: torch.Tensor, mask_BS: torch.Tensor, decay: float, state: torch.Tensor | None, *, prefix: int | None = None
) -> torch.Tensor:
    """State after each token (B, S, G + 2): the weighted sum of values, the sum of the weights and the number of tokens so far.

    `mask_BS` is 1 for real tokens and 0 for pads, which neither count nor let others fade. `state` (B, G + 2) is that before
    the first token.
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
        states = torch.cat([weights_BTS @ extended + carried, seen[..., None]], dim=-1)
        results.append(states)
        state = states[:, -1]
    return torch.cat(results, dim=1)


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
    always_on = {} if common_weight(routing) else routing.get("always_on") or {}
    if left_out is not None:
        logits = logits.index_fill(-1, _index(left_out, logits), float("-inf"))
        always_on = always_on if always_on.get("expert") != left_out else {}
    own = always_on.get("expert")
    share = always_on.get("weight")
    taken = torch.ones_like(logits, dtype=torch.bool)
    ranked = logits
    if own is not None and share is None:  # among the chosen whatever its logit; its weight is what the logit says
        place = torch.arange(logits.shape[-1], device=logits.device) == own
        ranked = logits.masked_fill(place, float("inf"))
    if routing["method"] == "routing":
        taken = chosen(ranked, logits, routing)
    weights = logits.masked_fill(~taken, float("-inf")).softmax(-1)
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


def places_of(
    expert: str | int | Sequence[str | int] | torch.Tensor | None, said: Mapping[str, Any]
) -> int | torch.Tensor | None:
    """Places of experts that are given by name, label or place, one for all or one per sequence; `said` is the config's
    `modekit`. Raises ValueError.
    """
    if expert is None:
        return None
    names = said["experts"]
    labels = said.get("labels")
    labels = {key: at for key, at in labels.items() if type(at) is int} if isinstance(labels, dict) else {}
    known = {**labels, **{name: at for at, name in enumerate(names)}}
    listed = isinstance(expert, (list, tuple)) or getattr(expert, "ndim", 0) > 0
    given = list(expert) if listed else [expert]  # type: ignore[arg-type]
    given = [each.item() if getattr(each, "ndim", None) == 0 else each for each in given]  # type: ignore[union-attr]
    places = [known.get(each) if isinstance(each, str) else each for each in given]
    if not places or not all(type(each) is int and 0 <= each < len(names) for each in places):
        raise ValueError(f"there is no expert {expert!r}; there are {', '.join([*names, *labels])} (or places from 0)")
    return torch.tensor(places) if listed else places[0]  # type: ignore[return-value]


def common_weight(routing: Mapping[str, Any]) -> float:
    """Weight w of the common expert; 0.0 without one."""
    always_on = routing.get("always_on") or {}
    return float(always_on["weight"]) if always_on.get("apart") else 0.0


def cosine(products_BSG: torch.Tensor, gate_GD: torch.Tensor, experts: int) -> torch.Tensor:
    """X-MoE's router (Section 3.2, arXiv:2204.09179): s_e = cos(W x, v_e) / tau, W (R, D), v_e (R,).

    The gate has v_e in the first R columns of its first E rows, and W below. 1 / tau is the mean length of the v_e.
    """
    projected_BSR = products_BSG[..., experts:]
    experts_ER = gate_GD[:experts, : projected_BSR.shape[-1]]
    cosines_BSE = torch.nn.functional.linear(
        torch.nn.functional.normalize(projected_BSR, dim=-1), torch.nn.functional.normalize(experts_ER, dim=-1)
    )
    return experts_ER.square().sum(-1).clamp_min(1e-30).sqrt().mean() * cosines_BSE


def chosen(ranked: torch.Tensor, logits: torch.Tensor, routing: Mapping[str, Any]) -> torch.Tensor:
    """Which experts (last axis) take a token, by the order `ranked`: bool, of the logits' shape.

    groups: the best of each group of experts, in order, as equal as can be (k top-1 prototyping, Section 3.2,
    arXiv:2105.15082). threshold: all whose probability reaches theirs, the best where none does (top-any, Section 3.1,
    arXiv:2405.14297; of the softmax, not the sigmoid there, since fits set logits only up to what all have in common).
    """
    experts = logits.shape[-1]
    if routing.get("groups") is not None:
        groups = ranked.tensor_split(routing["groups"], dim=-1)
        return torch.cat([_best(each) for each in groups], dim=-1)
    if routing.get("top_k") is not None and routing["top_k"] < experts:
        return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ranked.topk(routing["top_k"], dim=-1).indices, True)
    if routing.get("threshold") is not None:
        enough = (logits.softmax(-1) >= torch.tensor(routing["threshold"], device=logits.device)) | ranked.isposinf()
        return enough | (_best(ranked) & ~enough.any(-1, keepdim=True))
    if routing.get("top_p") is not None:
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        sorted_p = logits.softmax(-1).gather(-1, order)
        enough = sorted_p.cumsum(-1) - sorted_p < routing["top_p"]  # what stands before it does not suffice
        return torch.zeros_like(enough).scatter(-1, order, enough)
    return torch.ones_like(logits, dtype=torch.bool)


def _best(ranked: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, ranked.argmax(-1, keepdim=True), True)
