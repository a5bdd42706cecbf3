"""What a backbone merged as RegMean does gives a plain checkpoint of full fine-tunes, whole.md.

    python benchmarks/whole.py train FOLDER --kind full --seeds 0 1 2
    python benchmarks/regmean.py FOLDER --seeds 0 1 2 --ranks 32 64 128

RegMean (arXiv 2212.09849): the W of every linear map that is nearest to all experts' on what each of them reads,
W = (sum of W_e G_e + r W_average) (sum of G_e + r)^-1, with G_e the second moments of expert e's inputs on its own text and r a
part of their mean diagonal. Embeddings are averaged by how often each text has a token, norms plainly. The merged model is one
more expert, whose attention, head and embeddings are the backbone; the row of the plain average is made the same way.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from modekit.building.build import build
from modekit.demo.text import DOMAINS, UNSEEN
from modekit.evaluation.evaluate import evaluate
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.text.sequences import TokenSequence
from peers.bounds import mean_of
from peers.score import SEQUENCE_LENGTH, Texts, opened, texts_of
from whole import EVAL_TOKENS, NATIVE, recipe

FIT_TOKENS, KIND, NAME = 8_192, "full", "merged"
RIDGES: dict[str, float | None] = {"average": None, "RegMean, r 0.1": 0.1, "RegMean, r 0.01": 0.01, "RegMean, r 0.001": 0.001}


@torch.inference_mode()
def moments_of(model: PreTrainedModel, texts: Sequence[TokenSequence]) -> dict[str, torch.Tensor]:
    """Second moments of what each linear map reads, by the name of its weight; of an embedding how often it reads a token."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, given: torch.Tensor) -> None:
        if given.is_floating_point():
            rows = given.flatten(0, -2).double()
            found[name] = found.get(name, 0.0) + rows.T @ rows
        else:
            found[name] = found.get(name, 0.0) + torch.bincount(given.flatten(), minlength=model.config.vocab_size).double()

    for name, part in model.named_modules():
        if isinstance(part, (torch.nn.Linear, torch.nn.Embedding)):
            part.register_forward_pre_hook(lambda _, given, name=f"{name}.weight": keep(name, given[0]))
    for text in texts:
        model(torch.tensor([text.ids]))
    return found


def merged(states: Sequence[Mapping[str, torch.Tensor]], moments: Sequence[Mapping[str, torch.Tensor]], ridge: float) -> Any:
    """RegMean's weights."""
    found = mean_of(states)
    for name in moments[0]:
        each, mean = [one[name] for one in moments], found[name].double()
        if each[0].dim() == 1:
            counts = torch.stack(each) + ridge * torch.stack(each).mean()
            found[name] = sum(share[:, None] * one[name] for share, one in zip(counts / counts.sum(0), states, strict=True))
            continue
        whole = sum(each)
        keep = ridge * whole.diagonal().mean() * torch.eye(len(whole), dtype=whole.dtype)
        read = sum(one[name].double() @ gram for one, gram in zip(states, each, strict=True)) + mean @ keep
        found[name] = torch.linalg.solve(whole + keep, read.T).T
    return {name: weight.float() for name, weight in found.items()}


def measure(folder: Path, seed: int, ranks: Sequence[int]) -> None:
    """A row per backbone and rank."""
    home = folder / f"seed{seed}"
    paths = {name: home / f"{KIND}-{name}" for name in DOMAINS}
    texts: Texts = texts_of(home / "base", {name: folder / "text" / f"{name}.jsonl" for name in DOMAINS}, FIT_TOKENS)
    models = {name: opened(path) for name, path in paths.items()}
    states = [model.state_dict() for model in models.values()]
    moments = [moments_of(model, texts[name]) for name, model in models.items()]
    for label, ridge in RIDGES.items():
        base = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
        base.load_state_dict(mean_of(states) if ridge is None else merged(states, moments, ridge))
        shutil.rmtree(home / f"{KIND}-{NAME}", ignore_errors=True)
        shutil.copytree(home / "base", home / f"{KIND}-{NAME}", ignore=shutil.ignore_patterns("*.safetensors"))
        base.save_pretrained(home / f"{KIND}-{NAME}")
        for rank in ranks:
            said = recipe(KIND, {"output": {**NATIVE, "carry": "all", "rank": rank}, "backbone": {"expert": NAME}})
            said["experts"].append({"name": NAME, "model": f"./{KIND}-{NAME}", "text": f"../text/{UNSEEN}.jsonl"})
            del said["eval"]
            checkpoint = build(make_plan(parse_recipe(said, where=label), home), home / f"{KIND}-regmean", overwrite=True)
            found = evaluate(checkpoint, tokens_per_domain=EVAL_TOKENS[KIND], sequence_length=SEQUENCE_LENGTH)
            forced, routed = (found.row(row).mean_gap(DOMAINS) for row in ("oracle", "mixture"))
            print(f"| seed {seed} | {rank} | {label} | {forced:.3f} | {routed:.3f} |", flush=True)


def main() -> None:
    """Rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64])
    said = parser.parse_args()
    print("| | rank | backbone | forced | routed |\n|---|---|---|---|---|")
    for seed in said.seeds:
        measure(said.folder.resolve(), seed, said.ranks)


if __name__ == "__main__":
    main()
