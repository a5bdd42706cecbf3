"""Ways to store the difference of a full fine-tune, own expert forced: gap closed at equal bytes. See expert_budget.md.

    python benchmarks/expert_budget_ways.py FOLDER --seed 0 [--centres base mean] [--only bits]

FOLDER is that of `expert_budget.py train`. A difference is taken from the base or from the mean of the four experts; norms
are whole. Low rank: the singular values of G^1/2 D M^1/2, M and G second moments of a module's inputs and of the loss's
gradients by its outputs (none; one number each; diagonals; whole matrices), the same rank everywhere or chosen by singular
value per parameter. Few bits: as `modekit build` keeps them, the same number everywhere.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from modekit.demo.text import DOMAINS
from modekit.loaded.load import load_tokenizer
from modekit.loaded.passes import losses_of
from modekit.text.documents import read_documents
from modekit.text.sequences import TokenSequence, encode, make_batches
from modekit.text.splits import Split, documents_of_split
from modekit.weights.few_bits import codes_of, decoded, steps_of

State = dict[str, torch.Tensor]
Factored = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Singular values, and the two sides of the product."""
MODES = [("none", "none"), ("scalar", "scalar"), ("diagonal", "diagonal"), ("whole", "scalar"), ("whole", "whole")]
SHARES = (0.0625, 0.125, 0.25)
SHRINKAGE = 0.01


class Study:
    """Base, experts, their text and what their modules read and give back."""

    def __init__(self, folder: Path, seed: int) -> None:
        home = folder / f"seed{seed}"
        self.model = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32).eval()
        self.base: State = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.experts = {name: self._state(home / name) for name in DOMAINS}
        self.mean: State = {key: sum(each[key] for each in self.experts.values()) / 4 for key in self.base}  # type: ignore[misc]
        self._tokenizer, self._folder = load_tokenizer(home / "base"), folder
        self.report = {name: self._text(name, "report", 5_000) for name in DOMAINS}
        self.fit = {name: self._text(name, "fit", 8_000) for name in DOMAINS}
        self.matrices = [key.removesuffix(".weight") for key, tensor in self.base.items() if tensor.ndim == 2]
        self.ends = {name: (self.loss(self.base, name), self.loss(self.experts[name], name)) for name in DOMAINS}

    def _state(self, folder: Path) -> State:
        return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())

    def _text(self, name: str, split: Split, tokens: int) -> list[TokenSequence]:
        path = self._folder / "text" / f"{name}.jsonl"
        documents = documents_of_split(read_documents([str(path)], root=path.parent, where=name), split)
        return encode(self._tokenizer, documents, max_tokens=tokens, sequence_length=512)

    def loss(self, state: State, name: str) -> float:
        """Of a domain's report split."""
        self.model.load_state_dict(state)
        total, count = 0.0, 0
        with torch.inference_mode():
            for batch in make_batches(self.report[name], tokens=2_048):
                total += float(losses_of(self.model, batch).double().sum())
                count += batch.scored
        return total / count

    def gap(self, states: dict[str, State]) -> float:
        """Closed, mean over the domains."""
        return statistics.fmean((low - self.loss(states[name], name)) / (low - high) for name, (low, high) in self.ends.items())

    def moments(self, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module -> second moments of inputs and gradients; of the head's gradients and an embedding's ids diagonals."""
        self.model.load_state_dict(self.experts[name])
        read: State = {}
        given: State = {}
        count = 0

        def listen(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor, key: str) -> None:
            x = args[0].detach().flatten(0, 1)
            looked_up = isinstance(module, nn.Embedding)
            seen = torch.bincount(x, minlength=module.num_embeddings).float() if looked_up else x.T @ x
            read[key] = read.get(key, 0) + seen
            y.register_hook(lambda g: add(g.flatten(0, 1), key))

        def add(g: torch.Tensor, key: str) -> None:
            given[key] = given.get(key, 0) + (g.square().sum(0) if key == "lm_head" else g.T @ g)

        handles = [
            self.model.get_submodule(key).register_forward_hook(lambda *given, key=key: listen(*given, key))
            for key in self.matrices
        ]
        for batch in make_batches(self.fit[name], tokens=1):
            count += batch.tokens
            losses_of(self.model, batch).sum().backward()  # type: ignore[no-untyped-call]
            self.model.zero_grad()
        for handle in handles:
            handle.remove()
        return {key: (read[key] / count, given[key] / count) for key in self.matrices}


def weighted(moment: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The root of a moment and its inverse; vectors stand for diagonals."""
    if kind == "none":
        return None
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    if kind == "scalar":
        diagonal = diagonal.mean().expand(len(diagonal))
    if kind != "whole" or moment.ndim == 1:
        root = (diagonal * (1 - SHRINKAGE) + diagonal.mean() * SHRINKAGE).double().sqrt()
        return root, 1 / root
    shrunk = moment.double() * (1 - SHRINKAGE) + torch.eye(len(moment)) * diagonal.mean().double() * SHRINKAGE
    values, vectors = torch.linalg.eigh(shrunk)
    values = values.clamp_min(float(values.max()) * 1e-10)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def times(matrix: torch.Tensor, side: torch.Tensor | None, *, left: bool) -> torch.Tensor:
    """A product with a matrix, a diagonal or nothing."""
    if side is None:
        return matrix
    if side.ndim == 1:
        return side[:, None] * matrix if left else matrix * side
    return side @ matrix if left else matrix @ side


def factored(delta: torch.Tensor, moments: tuple[torch.Tensor, torch.Tensor], mode: tuple[str, str]) -> Factored:
    """The weighted singular value decomposition of a difference (O, I), its weights divided out again."""
    inputs, outputs = weighted(moments[0], mode[0]), weighted(moments[1], mode[1])
    scaled = times(delta.double(), outputs and outputs[0], left=True)
    left, values, right = torch.linalg.svd(times(scaled, inputs and inputs[0], left=False), full_matrices=False)
    return values, times(left * values, outputs and outputs[1], left=True), times(right, inputs and inputs[1], left=False)


def ranks(found: dict[str, Factored], base: State, room: float, *, same: bool) -> dict[str, int]:
    """Rank per module for so many parameters."""
    prices = {key: sum(base[f"{key}.weight"].shape) for key in found}
    if same:
        return dict.fromkeys(found, int(room // sum(prices.values())))
    made = dict.fromkeys(found, 0)
    steps = [
        (-(float(value) ** 2) / prices[key], rank, key) for key, each in found.items() for rank, value in enumerate(each[0])
    ]
    for _, rank, key in sorted(steps):
        if prices[key] <= room and made[key] == rank:
            made[key], room = rank + 1, room - prices[key]
    return made


def low_rank(study: Study, centre: State, label: str) -> None:
    """Every weighting, the same rank and chosen ones."""
    size = sum(tensor.numel() for tensor in study.base.values())
    whole = sum(tensor.numel() for tensor in study.base.values() if tensor.ndim == 1)
    moments = {name: study.moments(name) for name in DOMAINS}
    for mode in MODES:
        made = {}
        for name in DOMAINS:
            for key in study.matrices:
                delta = study.experts[name][f"{key}.weight"] - centre[f"{key}.weight"]
                turned = delta.T if key.endswith("embed_tokens") else delta
                made[name, key] = factored(turned, moments[name][key], mode)
        for share in SHARES:
            for same in (False, True):
                states = {}
                for name in DOMAINS:
                    of_expert = {key: made[name, key] for key in study.matrices}
                    found = ranks(of_expert, study.base, share * size - whole, same=same)
                    states[name] = dict(study.experts[name])
                    for key, (_, left, right) in of_expert.items():
                        part = (left[:, : found[key]] @ right[: found[key]]).float()
                        turned = part.T if key.endswith("embed_tokens") else part
                        states[name][f"{key}.weight"] = centre[f"{key}.weight"] + turned
                print(f"{label}, {mode}, {share}x, {'same' if same else 'chosen'}: {study.gap(states):.3f}", flush=True)


def few_bits(study: Study, centre: State, label: str) -> None:
    """The same number of bits everywhere."""
    for bits in (1, 2, 3, 4):
        states = {}
        for name in DOMAINS:
            states[name] = dict(study.experts[name])
            for key in study.matrices:
                delta = (study.experts[name][f"{key}.weight"] - centre[f"{key}.weight"]).numpy()
                steps = steps_of(delta, bits)
                part = decoded(codes_of(delta, steps, bits), steps, delta.shape[1])
                states[name][f"{key}.weight"] = centre[f"{key}.weight"] + torch.from_numpy(part)
        print(f"{label}, {bits} bits: {study.gap(states):.3f}", flush=True)


def main() -> None:
    """Print a line per way."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--centres", nargs="+", default=["base", "mean"])
    parser.add_argument("--only", choices=["rank", "bits"])
    said = parser.parse_args()
    study = Study(said.folder.resolve(), said.seed)
    for label in said.centres:
        centre = study.base if label == "base" else study.mean
        if said.only != "rank":
            few_bits(study, centre, label)
        if said.only != "bits":
            low_rank(study, centre, label)


if __name__ == "__main__":
    main()
