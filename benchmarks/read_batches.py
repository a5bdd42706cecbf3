"""How fast a fit reads text through the models: tokens per second by the size of a batch, in one process, in turns.

    python benchmarks/read_batches.py OUT text.jsonl --tokens 4096 --rounds 3

OUT is a mixture, whose first expert is run. Processor time and wall time; on a busy machine only the former says something.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

import modekit.routing.capture as capture
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.loaded.load import load_tokenizer
from modekit.loaded.shapes import expert_view
from modekit.text.held_out import read_text
from modekit.text.sequences import encode

SIZES = (8_192, 2_048, 1_024)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    checkpoint = open_checkpoint(asked.out.resolve())
    documents = read_text([asked.text], root=Path.cwd(), where="text").fit()
    sequences = encode(load_tokenizer(checkpoint.folder), documents, max_tokens=asked.tokens, sequence_length=512)
    view = expert_view(checkpoint)
    view.use_expert(0)
    reads = [capture.GateInput([{"decay": None}], None, {})]
    tokens = sum(sequence.size for sequence in sequences)
    found: dict[int, list[tuple[float, float]]] = {size: [] for size in SIZES}
    for _ in range(asked.rounds):
        for size in SIZES:
            started, worked = time.perf_counter(), time.process_time()
            with patch.object(capture, "tokens_per_batch", lambda _model, size=size: size):
                capture.capture_domain(view, sequences, [], reads=reads, keep_tokens=asked.tokens, advance=lambda _: None)
            found[size].append((tokens / (time.process_time() - worked), tokens / (time.perf_counter() - started)))
    print("| tokens of a batch | tokens per processor second | tokens per second of wall time |\n|---|---|---|")
    for size, rates in found.items():
        cells = [f"{median(each):.0f} ({min(each):.0f} to {max(each):.0f})" for each in zip(*rates, strict=True)]
        print(f"| {size:,} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
