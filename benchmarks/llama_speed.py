"""Tokens per second in llama.cpp: native mixtures against their dense base, stored alike.

    modekit demo          (or any mixtures, with their base beside them)
    python benchmarks/llama_speed.py demo/seed0/base demo/seed0/lexical-top-1 [MORE...] [--outtype q8_0] [--rounds 5]

All are converted as `modekit export --gguf` does, without its proof, and write 128 tokens after the same beginning, in turn; a
round's ratio is that of its runs. Reading is timed on 512 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from modekit.checkpoint.open import open_checkpoint
from modekit.engines.converter import convert
from modekit.engines.gguf import finer_of
from modekit.engines.proof import Llama

WRITTEN, READ = 128, 512
TEXT = "The heart moves blood through the body, and the court hears the parties. "


def main() -> None:
    """Print what each model does, and its share of the base's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("mixtures", type=Path, nargs="+")
    parser.add_argument("--outtype", default="q8_0")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        files = {"base": Path(folder) / "base.gguf"}
        convert(arguments.base, files["base"], arguments.outtype)
        for number, mixture in enumerate(arguments.mixtures):
            files[mixture.name] = Path(folder) / f"{number}.gguf"
            finer = finer_of(open_checkpoint(mixture.resolve()), arguments.outtype)
            convert(mixture, files[mixture.name], arguments.outtype, finer)
        threads = torch.get_num_threads()
        models = {name: opened.enter_context(Llama(file, context=1024, threads=threads)) for name, file in files.items()}
        ids = (models["base"].tokenize(TEXT) * 100)[:READ]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
        for round_ in range(arguments.rounds + 1):
            for name in sorted(models, reverse=bool(round_ % 2)):
                answer = models[name].complete(ids[round_:], n_predict=WRITTEN, ignore_eos=True)
                if round_:
                    found[name].append(answer["timings"])
        for key, what in (("predicted_per_second", "written"), ("prompt_per_second", "read")):
            print(f"| {what} | tokens/s | over the base |\n|---|---|---|")
            speeds = {name: [each[key] for each in rows] for name, rows in found.items()}
            for name, values in speeds.items():
                ratios = [a / b for a, b in zip(values, speeds["base"], strict=True)]
                print(
                    f"| {name} | {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f}) "
                    f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
                )


if __name__ == "__main__":
    main()
