"""Time of one layer of a 7B model's shape: a plain Mixtral that carries whole adapters against the dense base, whole.md.

    python benchmarks/whole_cost.py [--rounds 7] [--tokens 1 128]

Random weights of the shapes that `modekit build` gives: hidden 4,096, 32 heads in 8 groups, FFN 14,336, four experts whose
adapters have rank 16 on all linear parts, top-1; a text goes to one expert. A ratio is of a round's two runs, times 33 / 32
for the layer in front.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from modekit.planning.carry import BLOCK, EXACT_TERMS, TERMS, CarrySize

LAYERS = 32
SHAPE = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 1, "vocab_size": 512}
HIDDEN, FFN, EXPERTS = 4_096, 14_336, 4
SIZES = {
    "router alone (FFNs)": CarrySize(outputs=0, inputs=0, terms=TERMS),
    "whole, rank 64": CarrySize(outputs=64, inputs=64, terms=TERMS),
    "whole, exact": CarrySize(outputs=64, inputs=192, terms=EXACT_TERMS),
}


def mixtral(size: CarrySize) -> PreTrainedModel:
    """One layer with the channels and units of a size."""
    config = MixtralConfig(
        hidden_size=HIDDEN + BLOCK + size.channels,
        intermediate_size=FFN + size.units,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        **SHAPE,
    )
    model = MixtralForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.zeros_(parameter)
    return model


def seconds(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Of one pass through the layer."""
    start = time.process_time()
    model.model(input_ids=ids, use_cache=False)
    return time.process_time() - start


@torch.inference_mode()
def main() -> None:
    """Print a row per size and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128])
    said = parser.parse_args()
    dense = LlamaForCausalLM(LlamaConfig(hidden_size=HIDDEN, intermediate_size=FFN, **SHAPE)).eval()
    print("| | tokens | over the dense base |\n|---|---|---|")
    for name, size in SIZES.items():
        mixed = mixtral(size)
        for tokens in said.tokens:
            ids = torch.randint(0, SHAPE["vocab_size"], (1, tokens))
            rounds = [(seconds(mixed, ids), seconds(dense, ids)) for _ in range(said.rounds + 2)][2:]
            ratios = [(LAYERS + 1) / LAYERS * one / other for one, other in rounds]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"| {name} | {tokens} | {statistics.median(ratios):.2f} ({spread}) |", flush=True)
        del mixed


if __name__ == "__main__":
    main()
