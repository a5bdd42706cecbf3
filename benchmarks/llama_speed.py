"""Tokens per second in llama.cpp: a native top-1 mixture against its dense base, stored alike.

    modekit demo --real          (or any mixture, with its base beside it)
    python benchmarks/llama_speed.py demo-real/seed0/lexical-top-1 demo-real/seed0/base [--outtype q8_0] [--rounds 5]

Both are converted (the mixture by `modekit export --gguf`, with its proof) and write 128 tokens after the same beginning, in
turn; a round's ratio is that of its two runs. Reading is timed on 512 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.engines.converter import Conversion, convert
from modekit.engines.gguf import export_gguf
from modekit.engines.llama import Llama
from modekit.engines.registry import GgufSettings

WRITTEN, READ = 128, 512
TEXT = "The heart moves blood through the body, and the court hears the parties. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--outtype", default="q8_0")
    parser.add_argument("--pre-tokenizer")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = GgufSettings(arguments.outtype, arguments.pre_tokenizer)
        (written,) = export_gguf(open_checkpoint(arguments.mixture.resolve()), Path(folder) / "mixture", settings)
        print(f"mixture {written.file.stat().st_size / 1e6:.0f} MB, {written.proof}")
        base = Path(folder) / "base.gguf"
        convert(arguments.base, base, Conversion(arguments.outtype, arguments.pre_tokenizer, "gpt-2"))
        threads = torch.get_num_threads()
        found: dict[str, list[dict[str, float]]] = {"base": [], "mixture": []}
        with Llama(base, context=1024, threads=threads) as dense, Llama(written.file, context=1024, threads=threads) as mixed:
            ids = (dense.tokenize(TEXT) * 100)[:READ]
            for round_ in range(arguments.rounds + 1):
                for name, llama in (
                    (("base", dense), ("mixture", mixed)) if round_ % 2 else (("mixture", mixed), ("base", dense))
                ):
                    answer = llama._complete(ids[round_:], n_predict=WRITTEN, ignore_eos=True)
                    if round_:
                        found[name].append(answer["timings"])
        for key, what in (("predicted_per_second", "written"), ("prompt_per_second", "read")):
            speeds = {name: [each[key] for each in rows] for name, rows in found.items()}
            ratios = [a / b for a, b in zip(speeds["mixture"], speeds["base"], strict=True)]
            for name, values in speeds.items():
                print(f"{what} {name}: {statistics.median(values):.1f} tokens/s ({min(values):.1f} to {max(values):.1f})")
            print(f"{what}, mixture / base: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
