"""Tokens per second of a training against a plain forward pass on the same batch: training.md.

    modekit demo --out demo
    python benchmarks/train_speed.py demo/seed0/logistic demo/seed0/context

One process, one thread. The forward pass is the mixture's own under inference mode, logits included, on the same parts; the
training step is forward, loss, backward, clipping and AdamW. Passes alternate, and the median of each is taken. With frozen
weights a step can reach half of the forward pass: forward, and of backward the half that goes through activations.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from modekit.checkpoint.open import open_checkpoint
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.shapes import mixture_of
from modekit.text.held_out import fit_documents
from modekit.text.sequences import encode
from modekit.training.batches import Batches, DomainSequences, plan_parts
from modekit.training.moving import make_trainable, moving_of, names_of
from modekit.training.objective import Objective
from modekit.training.settings import Group, TrainSettings

torch.set_num_threads(1)


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(folder: Path, tokens: int, repeats: int) -> None:
    checkpoint = open_checkpoint(folder.resolve())
    tokenizer = load_tokenizer(checkpoint.folder)
    corpora = []
    for place, expert in enumerate(checkpoint.record.recipe.experts):
        documents = fit_documents(expert, checkpoint.recipe_root, place)
        sequences = encode(tokenizer, documents, max_tokens=tokens * 4, sequence_length=512, shortest_rest=128)
        corpora.append(DomainSequences(expert.name, place, sequences))
    settings = TrainSettings(batch_tokens=tokens, what=["routers"])
    averaging = checkpoint.shape.routing.reads_averages
    parts = plan_parts(corpora, settings, steps=1, experts=len(corpora), parts=2 if averaging else 1, pack=not averaging)
    batches = Batches(corpora, parts)
    count = sum(int(batches[number]["real"].sum()) for number in range(len(parts)))
    rates: dict[str, list[float]] = {}
    for what in ("routers", "attention"):
        mixture = load_model(checkpoint.folder)
        loaded = mixture_of(mixture, checkpoint)
        loaded.prepare_training()
        groups: list[Group] = ["routers"] if what == "routers" else ["routers", "attention"]
        make_trainable(loaded, names_of(moving_of(mixture, checkpoint), groups))
        objective = Objective(mixture, checkpoint, settings, teachers=[], train_top_k=None, packed=not averaging)
        moving = [parameter for parameter in mixture.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(moving, lr=1e-4)

        def forward(mixture: torch.nn.Module = mixture) -> None:
            with torch.inference_mode():
                for number in range(len(parts)):
                    item = batches[number]
                    mask = {"position_ids": item["position_ids"]} if not averaging else {"attention_mask": item["real"].long()}
                    mixture(input_ids=item["input_ids"], use_cache=False, **mask)

        def step(
            objective: Objective = objective,
            moving: list[torch.nn.Parameter] = moving,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> None:
            for number in range(len(parts)):
                objective(**batches[number]).backward()
            torch.nn.utils.clip_grad_norm_(moving, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        forward()
        step()
        for _ in range(repeats):
            rates.setdefault("forward", []).append(count / seconds(forward))
            rates.setdefault(f"train {what}", []).append(count / seconds(step))
    line = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{folder.name}: {count} tokens per step, {repeats} repeats")
    for name, rate in line.items():
        print(f"  {name:<16} {rate:8.0f} tokens/s   {rate / line['forward']:.2f} of forward")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for each in options.folders:
        measure(each, options.tokens, options.repeats)
