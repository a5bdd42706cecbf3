"""What a native lexical mixture costs per pass against the dense base of the same shape: lexical.md.

    python benchmarks/lexical_cost.py [--hidden 2048] [--layers 2] [--tokens 512] [--rounds 15]

Random weights, four experts, a small vocabulary. Dense model and mixtures take turns in one process, one thread; shown is the
processor time of a forward pass over the dense model's, median and quartiles of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modekit.building.build import build
from modekit.loaded.load import load_model
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe

WORDS = 1_000
EXPERTS = 4


def make_models(root: Path, hidden: int, layers: int, ffn: int | None = None) -> None:
    """A base, experts, and a text for each in words of its own."""
    heads = hidden // 128
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=hidden,
        intermediate_size=ffn or hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=2_048,
        head_dim=128,
    )
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for number in range(EXPERTS + 1):
        torch.manual_seed(number)
        folder = root / ("base" if number == EXPERTS else f"e{number}")
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
        own = [f"w{1 + (number * 97 + place * 7) % (WORDS - 1)}" for place in range(90)]
        lines = [json.dumps({"text": " ".join(own[start % 90 :] + own) + f" w{start + 1}"}) for start in range(60)]
        (root / f"e{number}.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2_048)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_models(root, arguments.hidden, arguments.layers)
        experts = [{"name": f"e{number}", "model": f"./e{number}", "text": f"./e{number}.jsonl"} for number in range(EXPERTS)]
        loaded = {"dense base": load_model(root / "base")}
        for top_k in (1, 2):
            mixture = {"method": "routing", "top_k": top_k, "router": {"fit": "lexical"}}
            recipe = {"base_model": "./base", "experts": experts, "mixture": mixture, "output": {"format": "native"}}
            checkpoint = build(make_plan(parse_recipe(recipe, where="cost"), root), root / f"OUT{top_k}")
            loaded[f"lexical, top-{top_k}"] = load_model(checkpoint.folder)
            active = checkpoint.parameters
            print(
                f"top-{top_k}: {active.active / active.dense:.3f} of the base's parameters per token, embeddings aside",
                flush=True,
            )
        ids = torch.randint(1, WORDS, (1, arguments.tokens), generator=torch.Generator().manual_seed(0))
        seconds: dict[str, list[float]] = {name: [] for name in loaded}
        for number in range(arguments.rounds + 2):
            for name, model in loaded.items():
                started = time.process_time()
                with torch.inference_mode():
                    model(input_ids=ids, use_cache=False)
                if number > 1:
                    seconds[name].append(time.process_time() - started)
    for name, times in seconds.items():
        ratios = [mine / dense for mine, dense in zip(times, seconds["dense base"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name}: {1_000 * statistics.median(times):.0f} ms, {middle:.2f} ({low:.2f} to {high:.2f}) of the dense base")


if __name__ == "__main__":
    main()
