"""Cost of reading a domain for a router fit, against a plain forward pass over the same tokens.

    python benchmarks/fit_speed.py [--tokens 4096] [--rounds 5]

A random Llama of SmolLM2-135M's shape (30 layers, hidden 576, F 1536, vocabulary 49,152) in float32. In one process and
alternating order: a plain forward pass of the model with its head, the same without the head, and the capture of
statistics for every layer (X'X, sums and kept tokens). Then the time to solve for the gates, per fit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modekit.planning.mixture_config import averages_of
from modekit.recipes.mixture import Router
from modekit.routing.inputs import GateInput, capture_domain
from modekit.routing.linear import fit_gates
from modekit.text.sequences import TokenSequence, make_batches

TOKEN = averages_of(Router())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 49_152, (arguments.tokens // 512, 512))
    sequences = [TokenSequence(tuple(row)) for row in ids.tolist()]
    view: Any = SimpleNamespace(
        model=model,
        router_inputs=lambda: [layer.mlp for layer in model.model.layers],
        in_decoder=lambda: [False] * len(model.model.layers),
    )

    def forward(run: Callable[..., Any]) -> None:
        with torch.inference_mode():
            for batch in make_batches(sequences):
                run(input_ids=batch.input_ids, attention_mask=batch.mask.long(), use_cache=False)

    def capture() -> Any:
        return capture_domain(view, sequences, [], read=GateInput(TOKEN), keep_tokens=4096)

    jobs: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward(model),
        "decoder only": lambda: forward(model.model),
        "capture": capture,
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(arguments.rounds + 1):
        for name in sorted(jobs, reverse=bool(round_ % 2)):
            started = time.perf_counter()
            jobs[name]()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    print(f"{arguments.tokens} tokens, {torch.get_num_threads()} threads, {arguments.rounds} rounds")
    for name, values in seconds.items():
        print(f"{name:13} {statistics.median(values):6.2f} s ({min(values):.2f} to {max(values):.2f})")
    for name in ("forward", "decoder only"):
        ratios = [ours / plain for ours, plain in zip(seconds["capture"], seconds[name], strict=True)]
        print(f"capture / {name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    domains = [capture() for _ in range(4)]
    for fit in ("centroid", "logistic"):
        started = time.perf_counter()
        fit_gates(Router(fit=fit), domains)
        kept = len(domains[0].slots[0].sample_ND)
        print(f"solve {fit:9} {time.perf_counter() - started:6.2f} s for 30 layers, 4 domains, {kept} kept tokens each")


if __name__ == "__main__":
    main()
