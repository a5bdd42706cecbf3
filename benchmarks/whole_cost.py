"""Time of a plain Mixtral that carries whole adapters against the dense base and FFN experts alone, whole.md.

    python benchmarks/whole_cost.py [--shape 7b smollm2] [--top 1 2] [--tokens 1 128] [--cached 0] [--rounds 7]

Random weights of the shapes that `modekit build` gives for four adapters of rank 16 on all linear parts; a text goes to the
same experts. 7b: one layer, hidden 4,096, 32 heads in 8 groups, FFN 14,336, of two experts, as others cost memory alone; its
time is taken times 33 / 32 where there is a layer in front. smollm2: all of SmolLM2-135M, head included. `one more head` is
how commits up to 90805a5 held a router: a key-value head with its queries in every layer, 64 channels, no layer in front.
`--cached` tokens stand in the cache already. A ratio is of one round's runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from modekit.planning.carry import BLOCK, EXACT_TERMS, TERMS, CarrySize

FOLDED = "router alone (FFNs)"


@dataclass(frozen=True)
class Shape:
    """A base; `layers` are run, and stand for `stands_for`."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    layers: int
    stands_for: int
    experts: int


SHAPES = {"7b": Shape(4_096, 14_336, 32, 8, 128, 512, 1, 32, 2), "smollm2": Shape(576, 1_536, 9, 3, 64, 49_152, 30, 30, 4)}
SIZES = {
    "one more head (FFNs)": None,
    "whole, rank 64": CarrySize(outputs=64, inputs=64, terms=TERMS),
    "whole, exact": CarrySize(outputs=64, inputs=192, terms=EXACT_TERMS),
}


@dataclass(frozen=True)
class Timed:
    """A model, by how much its time counts, and the bytes that a token takes in its cache."""

    model: PreTrainedModel
    factor: float

    def seconds(self, ids: torch.Tensor, cached: int) -> float:
        """Of one pass."""
        config, cache = self.model.config, DynamicCache(config=self.model.config)
        for layer in range(config.num_hidden_layers if cached else 0):
            key, value = torch.randn(2, 1, config.num_key_value_heads, cached, config.head_dim)
            cache.update(key, value, layer)
        start = time.process_time()
        self.model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
        return (time.process_time() - start) * self.factor

    def cache_bytes(self) -> float:
        """Of a token, in float32."""
        config = self.model.config
        return float(self.factor * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 4)


def dense(shape: Shape) -> Timed:
    """The base."""
    return Timed(LlamaForCausalLM(LlamaConfig(**_common(shape, 0), **_heads(shape, 0))).eval(), 1.0)


def mixtral(shape: Shape, size: CarrySize | None, top_k: int) -> Timed:
    """With the channels and units of a size; None: with one more head."""
    in_front = size is not None
    common = _common(shape, BLOCK + size.channels if size else 2 * BLOCK, size.units if size else 0)
    whole = shape.layers == shape.stands_for
    if in_front and whole:
        common["num_hidden_layers"] += 1
    config = MixtralConfig(
        **common, **_heads(shape, 0 if in_front else 1), num_local_experts=shape.experts, num_experts_per_tok=top_k
    )
    model = MixtralForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.zeros_(parameter)
    return Timed(model, (shape.stands_for + 1) / shape.stands_for if in_front and not whole else 1.0)


def _common(shape: Shape, channels: int, units: int = 0) -> dict[str, int]:
    return {
        "hidden_size": shape.hidden + channels,
        "intermediate_size": shape.ffn + units,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "num_hidden_layers": shape.layers,
    }


def _heads(shape: Shape, more: int) -> dict[str, int]:
    group = shape.heads // shape.kv_heads
    return {"num_attention_heads": shape.heads + more * group, "num_key_value_heads": shape.kv_heads + more}


@torch.inference_mode()
def main() -> None:
    """Print a row per shape, size, experts per token and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], nargs="+", default=[*SHAPES])
    parser.add_argument("--top", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--cached", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="Part of the name of a size.")
    said = parser.parse_args()
    print("| shape | top | | tokens | over the dense base | over FFNs alone | cache over the base's |")
    print("|---|---|---|---|---|---|---|")
    for name in said.shape:
        shape = SHAPES[name]
        base = dense(shape)
        for top_k in said.top:
            folded = mixtral(shape, CarrySize(outputs=0, inputs=0, terms=TERMS), top_k)
            for label, size in SIZES.items():
                if said.only in label:
                    mixed = mixtral(shape, size, top_k)
                    for tokens in said.tokens:
                        ids = torch.randint(0, shape.vocabulary, (1, tokens))
                        models = {FOLDED: folded, label: mixed, "": base}
                        rounds = [
                            {key: model.seconds(ids, said.cached) for key, model in models.items()}
                            for _ in range(said.rounds + 2)
                        ][2:]
                        for key in (FOLDED, label):
                            over_base = _spread([each[key] / each[""] for each in rounds])
                            over_folded = "1" if key == FOLDED else _spread([each[key] / each[FOLDED] for each in rounds])
                            cache = models[key].cache_bytes() / base.cache_bytes()
                            print(
                                f"| {name} | {top_k} | {key} | {tokens} | {over_base} | {over_folded} | {cache:.3f} |",
                                flush=True,
                            )
                    del mixed


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
