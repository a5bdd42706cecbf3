"""How many channels of a gated FFN a token needs, one by one and in groups: taxonomy.md, "Grouping the channels of one FFN".

    python benchmarks/moefication.py MODEL TEXT [TEXT ...]      a model's folder, files of text as `modekit` reads them

MoEfication (arXiv:2110.01786) splits a trained FFN's channels into experts and runs a few of them. A router that knows what
each channel gives is hard to beat, so that rows are about what a split can reach: of every token the channels, or groups of
them, kept are those whose part of the output is longest,

    |down[:, c] h_c|      of a channel;      (sum_c in g |down[:, c] h_c|^2)^0.5      of a group.

Groups have equal sizes, by balanced k-means of the gate's rows (as the paper has it), or drawn at random.

Shape legend: B batch, S sequence, C channels, G groups, H hidden size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from modekit.loaded.passes import removed
from peers.score import texts_of

GROUPS, ROUNDS = 8, 10
SHARES = (0.75, 0.5, 0.25)
Keep = Callable[[torch.Tensor], torch.Tensor]
"""Squared lengths (B, S, C) -> which channels stay, bool."""


def channels(share: float) -> Keep:
    """The longest ones by themselves."""

    def keep(lengths: torch.Tensor) -> torch.Tensor:
        best = lengths.topk(round(share * lengths.shape[-1]), dim=-1).indices
        return torch.zeros_like(lengths, dtype=torch.bool).scatter(-1, best, True)

    return keep


def groups(share: float, group_of_C: torch.Tensor) -> Keep:
    """The longest groups."""

    def keep(lengths: torch.Tensor) -> torch.Tensor:
        sums_BSG = lengths @ nn.functional.one_hot(group_of_C, GROUPS).to(lengths)
        return channels(share)(sums_BSG)[..., group_of_C]

    return keep


def balanced(rows_CH: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Group of each row, (C,): k-means in which the surest rows choose first and a full group takes no more."""
    rows_CH = nn.functional.normalize(rows_CH.float(), dim=-1)
    centres_GH, room = rows_CH[torch.randperm(len(rows_CH), generator=generator)[:GROUPS]], -(-len(rows_CH) // GROUPS)
    group_of_C = torch.zeros(len(rows_CH), dtype=torch.long)
    for _ in range(ROUNDS):
        near_CG = rows_CH @ centres_GH.T
        free = [room] * GROUPS
        for row in near_CG.amax(-1).argsort(descending=True).tolist():
            group = next(g for g in near_CG[row].argsort(descending=True).tolist() if free[g])
            group_of_C[row], free[group] = group, free[group] - 1
        centres_GH = torch.stack([rows_CH[group_of_C == g].mean(0) for g in range(GROUPS)])
    return group_of_C


@contextmanager
def kept(model: PreTrainedModel, keeps: list[Keep]) -> Iterator[None]:
    """The model with the other channels of each FFN at zero."""

    def mask(keep: Keep) -> Callable[[nn.Module, tuple[torch.Tensor]], tuple[torch.Tensor]]:
        def hook(down: nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            (hidden_BSC,) = given
            return (hidden_BSC * keep(hidden_BSC.square() * down.weight.square().sum(0)),)

        return hook

    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(mask(keep)) for layer, keep in zip(layers(model), keeps, strict=True)
    ]
    with removed(hooks):
        yield


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """Of the decoder."""
    found: nn.ModuleList = model.model.layers
    return found


@torch.no_grad()
def loss_of(model: PreTrainedModel, texts: list[torch.Tensor]) -> float:
    """Mean over tokens, nats."""
    total = sum(float(model(ids[None], labels=ids[None]).loss) * (len(ids) - 1) for ids in texts)
    return total / sum(len(ids) - 1 for ids in texts)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=2_048, help="of each text")
    said = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(said.model, dtype=torch.float32).eval()
    found = texts_of(said.model, {path.stem: path for path in said.text}, said.tokens)
    texts = [torch.tensor(each.ids) for sequences in found.values() for each in sequences]
    gates = [layer.mlp.gate_proj.weight.detach() for layer in layers(model)]
    generator = torch.Generator().manual_seed(0)
    by_gate = [balanced(gate, generator) for gate in gates]
    drawn = [each[torch.randperm(len(each), generator=generator)] for each in by_gate]
    dense = loss_of(model, texts)
    print(f"{sum(map(len, texts)):,} tokens, dense loss {dense:.3f}; nats more with the best share of channels of each token\n")
    print(f"| kept | channels | {GROUPS} groups by the gate | {GROUPS} groups drawn |\n|---|---|---|---|")
    for share in SHARES:
        ways = (
            [channels(share)] * len(gates),
            [groups(share, each) for each in by_gate],
            [groups(share, each) for each in drawn],
        )
        cells = []
        for keeps in ways:
            with kept(model, keeps):
                cells.append(f"{loss_of(model, texts) - dense:+.3f}")
        print(f"| {share:.0%} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
