"""A module of which every expert has its own: y = sum_e g_e E_e(x), with adapters kept low-rank.

What an expert has at a place is one of three things: the base's module (nothing is stored for it), a module of its own
(`experts`), or the base's module with a low-rank change. As the weights g sum to one, the base's module counts with
what the experts with modules of their own leave over, and all low-rank changes together are two matrix products:

    y = (1 - sum_own g_e) W x + sum_own g_e W_e x + B (g_r s_r (A x))      A (R, I), B (O, R): all adapters' ranks in a row

where g_r and s_r are the weight and the scale (alpha / rank) of the adapter that rank r belongs to. A and B are the
adapters' own tensors, bit for bit. Of an embedding, whose weight is (V, D) and whose x are ids, the change of row x is B[x] A.

Shape legend: B batch, S sequence, T tokens of all sequences, E experts, R ranks of all adapters together, I and O width in and
out (of an embedding O tokens), X any.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .modekit_flow import Flow
from .modekit_router import Router


class Mixed(nn.Module):
    """One place of a model with the experts' parts, and the router if the place has one.

    `place` is its entry in `modekit.places`:
        ranks, scales: per expert the rank and scale of its adapter, 0 without one.
        bits: per expert those of each number of its difference (FewBits), 0 without one.
        own: experts with a module of their own here. biased: experts whose adapter adds a bias of its own.
        base: whether the base's module is kept (some expert is made of it).
        router: the place whose router decides here. Its first place in the order of execution owns it.
        width: of what that router's gate reads.
        features: how many decisions, when there is one per output feature.
        sequence_axis: the axis of x that counts tokens (2 for norms that see heads first).
        of_source: whether it runs on an encoder's output, in a decoder.
        calls: modules that the layer calls itself and that are one here (Chain); the place has the first one's name.
    """

    def __init__(
        self, name: str, dense: nn.Module, place: Mapping[str, Any], flow: Flow, experts: int, routing: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.sequence_axis: int = place.get("sequence_axis", 1)
        self.own: list[int] = list(place["own"])
        self.ranks: list[int] = list(place["ranks"])
        self.scales: list[float] = list(place["scales"])
        self.biased: list[int] = list(place.get("biased", []))
        self.per_feature = "features" in place
        self.weights: torch.Tensor | None = None  # of the running pass, for the places that share this router
        self.base = dense if place["base"] else None
        self.experts = nn.ModuleList(copy.deepcopy(dense) for _ in self.own)
        self._reads_ids = isinstance(dense, nn.Embedding)
        bits: list[int] = list(place.get("bits", []))
        self.few_bits = [expert for expert, each in enumerate(bits) if each]
        if self.few_bits or any(self.ranks):
            sizes = ("embedding_dim", "num_embeddings") if self._reads_ids else ("in_features", "out_features")
            width_in, width_out = (int(getattr(dense, size)) for size in sizes)
            made = (FewBits(width_out, width_in, bits[expert], looked_up=self._reads_ids) for expert in self.few_bits)
            self.differences = nn.ModuleList(made)
            if any(self.ranks):
                self.lora_A = nn.Parameter(torch.zeros(sum(self.ranks), width_in))
                self.lora_B = nn.Parameter(torch.zeros(width_out, sum(self.ranks)))
            if self.biased:
                self.lora_bias = nn.Parameter(torch.zeros(len(self.biased), width_out))
        self.router: Router | None = None
        if place["router"] == name:
            self.router = Router(name, place, flow, experts, routing)
        self._leader = [self]
        self._flow = [flow]  # in a list, so that it is no attribute that saving or moving the module could touch
        self.is_head = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy takes no part in a running pass."""
        return {**self.__dict__, "weights": None}

    @property
    def weight(self) -> torch.Tensor:
        """Of the base's module, or the first expert's: those who look at a layer's weight ask for its shape or dtype."""
        weight: torch.Tensor = self._dense.weight
        return weight

    @property
    def _dense(self) -> Any:
        return self.base if self.base is not None else self.experts[0]

    def _module_of(self, expert: int) -> nn.Module:
        """Its own, or the base's."""
        module = self.experts[self.own.index(expert)] if expert in self.own else self.base
        assert module is not None
        return module

    @property
    def flow(self) -> Flow:
        """What the routers of the model share."""
        return self._flow[0]

    @property
    def leader(self) -> Mixed:
        """The place whose router decides here."""
        return self._leader[0]

    def follow(self, leader: Mixed) -> None:
        """Take the weights that another place's router decides."""
        self._leader = [leader]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mixture's output for x (B, S, I), token ids (B, S), or (B, heads, S, I) with `sequence_axis` 2."""
        weights = self._decided(x).to(x.device)
        if self.is_head and self.flow.kept is not None:
            weights = weights[:, self.flow.kept.to(weights.device)]
        elif weights.shape[1] == 1:  # one decision for all tokens, or one token
            weights = weights.expand(-1, x.shape[self.sequence_axis], *weights.shape[2:])
        elif weights.shape[1] != x.shape[self.sequence_axis]:  # the head reads only the last tokens when generating
            if self.flow.pair:
                raise RuntimeError("a router that reads one side of a pair cannot decide token by token for the other")
            weights = weights[:, -x.shape[self.sequence_axis] :]
        if self.sequence_axis == 2:
            weights = weights[:, None]
        y = self._whole_parts(x, weights)
        if any(self.ranks):
            y = self._plus_low_rank(y, x, weights)
        for number, expert in enumerate(self.few_bits):
            y = self._plus_few_bits(y, x, weights[..., expert], number)
        for row, expert in enumerate(self.biased):
            weight = weights[..., expert] if self.per_feature else weights[..., expert, None]
            y = y + weight.to(y.dtype) * (self.lora_bias[row].to(y.dtype) * self.scales[expert])
        return y

    def _decided(self, x: torch.Tensor) -> torch.Tensor:
        """Weights of the experts here, (B, S, E), or (B, 1, E) for all tokens; a router that this place has decides now.

        Raises RuntimeError when it has not run.
        """
        flow = self.flow
        leader = self.leader.router
        if self.router is not None and not self.router.has_decided:
            self.weights = self.router(self.base(x) if self.base is not None and self._reads_ids else x)
        if flow.target_weights is not None and not flow.encoding:  # routers run all the same: statistics are of what they read
            return flow.target_weights[:, :, None] if self.per_feature else flow.target_weights
        weights = self.leader.weights
        weights = flow.source_weights if weights is None else weights
        if weights is None and leader is not None and leader.decides_by_ids:  # it reads no module's input, and need not wait
            weights = self.leader.weights = leader(x if flow.source_ids_BS is None else flow.source_ids_BS)
        if weights is None:
            raise RuntimeError(
                "the router of this place has not run (with modules: all it reads input_ids, not inputs_embeds; with an "
                "encoder give the encoder's output as this model made it)"
            )
        return weights

    def _whole_parts(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the base's module and the experts' own modules give."""
        if not self.own:
            assert self.base is not None
            y: torch.Tensor = self.base(x)
            return y
        parts = self._parts(weights)
        if self.per_feature or self.sequence_axis != 1 or torch.compiler.is_compiling():
            return _dense_sum(x, parts, one_each=self.per_feature)
        return _sparse_sum(x, parts)

    def _parts(self, weights: torch.Tensor) -> list[tuple[nn.Module, torch.Tensor]]:
        """Every module here and its weight; the base's has what the experts' own leave over."""
        parts = [(module, weights[..., expert]) for module, expert in zip(self.experts, self.own, strict=True)]
        if self.base is not None:
            parts.insert(0, (self.base, 1.0 - weights[..., self.own].sum(-1)))
        return parts

    def _plus_low_rank(self, y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return y + B (g s (A x)): exact for any weights, mixed ranks, and adapters that have nothing here."""
        alone = self.flow.alone
        if alone is not None:
            return self._plus_one(y, x, alone)
        hidden, lora_B = self._hidden(x, y.dtype)
        if self.per_feature:
            weights = weights.to(hidden.dtype)
            present = [expert for expert, rank in enumerate(self.ranks) if rank]
            sizes = [self.ranks[expert] for expert in present]
            parts = zip(present, torch.split(hidden, sizes, -1), torch.split(lora_B, sizes, 1), strict=True)
            terms = [weights[..., e] * self.scales[e] * nn.functional.linear(h, b) for e, h, b in parts]
            return y + torch.stack(terms).sum(0)
        return self._plus_product(y, self._weighted(hidden, weights), lora_B)

    def _plus_few_bits(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, number: int) -> torch.Tensor:
        """Return y + g D x of one expert, on the tokens that give it weight."""
        scale = getattr(self.base, "embed_scale", 1.0) if self._reads_ids else 1.0
        difference = self.differences[number]
        if self.per_feature or torch.compiler.is_compiling():
            added: torch.Tensor = difference(x, y.dtype)
            return y + added * (weight.to(y.dtype) if self.per_feature else _broadcast(weight * scale, y))
        weight_T = weight.flatten()
        rows = weight_T.nonzero().squeeze(-1)
        if len(rows) == 0:
            return y
        x_XI = x.flatten(0, 1)[rows]
        added = difference(x_XI, y.dtype) * (weight_T[rows] * scale)[:, None].to(y.dtype)
        return y.flatten(0, 1).index_add(0, rows, added).view(y.shape)

    def _plus_one(self, y: torch.Tensor, x: torch.Tensor, expert: int) -> torch.Tensor:
        """Return y + B s A x with one adapter's A and B, whatever others there are, down to the last bit: sums over all ranks
        are rounded as their number says.
        """
        first = sum(self.ranks[:expert])
        rank = self.ranks[expert]
        if not rank:
            return y
        hidden, lora_B = self._hidden(x, y.dtype, slice(first, first + rank))
        return self._plus_product(y, hidden * self.scales[expert], lora_B)

    def _hidden(self, x: torch.Tensor, dtype: torch.dtype, ranks: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """A x (B, S, R) of some ranks, and what it is multiplied with, B (O, R). Of an embedding B[x] and A^T."""
        lora_A = self.lora_A[ranks]
        lora_B = self.lora_B[:, ranks]
        if self._reads_ids:
            rows = nn.functional.embedding(x, lora_B.to(dtype)) * getattr(self.base, "embed_scale", 1.0)
            return rows, lora_A.to(dtype).t().contiguous()
        return nn.functional.linear(x, lora_A.to(x.dtype).contiguous()), lora_B.to(x.dtype).contiguous()

    def _plus_product(self, y: torch.Tensor, weighted: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        """Return y + B h, h (B, S, R)."""
        if not (y.dtype == weighted.dtype == lora_B.dtype and y.is_contiguous() and weighted.is_contiguous()):
            return y + nn.functional.linear(weighted, lora_B)
        # The sum costs a few per cent as a pass of its own: the matrix product adds to what is there.
        y_TO = y.view(-1, y.shape[-1])
        weighted_TR = weighted.view(-1, weighted.shape[-1])
        if torch.is_grad_enabled() or not self._owns_output:
            return torch.addmm(y_TO, weighted_TR, lora_B.t()).view(y.shape)
        y_TO.addmm_(weighted_TR, lora_B.t())
        return y

    @property
    def _owns_output(self) -> bool:
        """Whether nobody else can hold the output of `_whole_parts`: it may be added to in place."""
        return bool(self.own) or (type(self.base) is nn.Linear and not self.base._forward_hooks)

    def _weighted(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Each rank of A x times the weight and the scale of its adapter."""
        weights = weights.to(hidden.dtype)
        rank = self.ranks[0]
        if all(other == rank for other in self.ranks):
            same = all(scale == self.scales[0] for scale in self.scales)
            scales = self.scales[0] if same else torch.tensor(self.scales, dtype=hidden.dtype, device=hidden.device)
            by_expert = hidden.reshape(*hidden.shape[:-1], len(self.ranks), rank)
            return (by_expert * (weights * scales)[..., None]).flatten(-2)
        present = [expert for expert, rank in enumerate(self.ranks) if rank]
        factors = [(weights[..., e, None] * self.scales[e]).expand(*hidden.shape[:-1], self.ranks[e]) for e in present]
        return hidden * torch.cat(factors, dim=-1)


def _dense_sum(x: torch.Tensor, parts: list[tuple[nn.Module, torch.Tensor]], *, one_each: bool) -> torch.Tensor:
    """Every module on every token; `one_each`: the weights have an axis of output features already."""
    total: torch.Tensor | None = None
    for module, weight in parts:
        y = module(x)
        y = y * (weight.to(y.dtype) if one_each else _broadcast(weight, y))
        total = y if total is None else total + y
    assert total is not None
    return total


def _sparse_sum(x: torch.Tensor, parts: list[tuple[nn.Module, torch.Tensor]]) -> torch.Tensor:
    """Every module on the tokens that give it weight."""
    flat = x.flatten(0, 1)
    total: torch.Tensor | None = None
    for module, weight in parts:
        weight_T = weight.flatten(0, 1)
        rows = weight_T.nonzero().squeeze(-1)
        if len(rows) == 0 and (total is not None or module is not parts[-1][0]):
            continue  # its parameters get no gradient, not one of zeros: what did not take part stays as it is in training
        everywhere = len(rows) == len(flat)
        y = module(flat if everywhere else flat[rows])
        y = y * _broadcast(weight_T[rows], y)
        if total is None:
            total = y if everywhere else y.new_zeros(len(flat), *y.shape[1:]).index_add(0, rows, y)
        else:
            total = total + y if everywhere else total.index_add(0, rows, y)
    assert total is not None
    return total.reshape(*x.shape[:2], *total.shape[1:])


def _broadcast(weight: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One weight per token, for a y with axes behind those of the tokens."""
    return weight.reshape(*weight.shape, *[1] * (y.ndim - weight.ndim)).to(y.dtype)


class FewBits(nn.Module):
    """y = D x, or of an embedding y = D[x], of a weight difference D (O, I) that is kept in P bits per number:
    D = (code - (2^P - 1) / 2) step, a step per row.

    The codes lie in planes of one bit, the lowest first, eight numbers of a row in a byte: C bytes. They are unpacked where
    they are used: of a linear map all of them in every pass, of an embedding the rows that are looked up.
    """

    codes: torch.Tensor

    def __init__(self, outputs: int, inputs: int, bits: int, *, looked_up: bool) -> None:
        super().__init__()
        self.inputs = inputs
        self.looked_up = looked_up
        self.register_buffer("codes", torch.zeros(outputs, bits, -(-inputs // 8), dtype=torch.uint8))
        self.steps = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Of x (X, I), or of ids (X,), (X, O) or (X, I) in a dtype."""
        if self.looked_up:
            return self._rows(self.codes[x], self.steps[x].to(dtype))
        return nn.functional.linear(x, self._rows(self.codes, self.steps.to(x.dtype)))

    def _rows(self, codes_XPC: torch.Tensor, steps_X: torch.Tensor) -> torch.Tensor:
        """The numbers (X, I) that codes and steps stand for."""
        bits = codes_XPC.shape[-2]
        places = torch.arange(8, dtype=torch.uint8, device=codes_XPC.device)
        level_XI = torch.zeros((), dtype=torch.uint8, device=codes_XPC.device)
        for plane in range(bits):
            level_XI = level_XI + (((codes_XPC[..., plane, :, None] >> places) & 1) << plane)
        centred_XI: torch.Tensor = level_XI.flatten(-2)[..., : self.inputs].to(steps_X.dtype) - (2**bits - 1) / 2
        return centred_XI * steps_X[..., None]


class Chain(nn.Module):
    """Modules that a layer calls one after the other, as one of which experts can have their own: in Bart and its like no
    module holds the FFN, y = fc2(activation(fc1(x))). What the layer drops before the last one is dropped here.
    """

    def __init__(self, layer: nn.Module, calls: Sequence[str]) -> None:
        super().__init__()
        self._calls = tuple(calls)
        for name in self._calls:
            setattr(self, name, getattr(layer, name))
        self._dropout = float(getattr(layer, "activation_dropout", 0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        *before, last = (getattr(self, name) for name in self._calls)
        for call in before:
            x = call(x)
        x = nn.functional.dropout(x, p=self._dropout, training=self.training)
        y: torch.Tensor = last(x)
        return y


def put_in_place(layer: Any, calls: Sequence[str], module: Any) -> None:
    """Let a layer call `module` first, and nothing after it until it has called all of `calls`."""
    first, *others = calls
    setattr(layer, first, module)
    for name in others:
        setattr(layer, name, nn.Identity())
    if hasattr(layer, "activation_dropout"):
        layer.activation_dropout = 0.0  # the chain's
