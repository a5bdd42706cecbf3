"""Which router fit gets furthest without training: the table in router_fits.md.

    modekit demo --out demo --seeds 3
    python benchmarks/router_fits.py demo --seeds 3

For each seed of a demo: the gates of the `routing` checkpoint are replaced in memory by those of every variant, and the
mixture is scored on the `select` split (the numbers of demo and README come from the `report` split). Gap closed, mean
over the four domains; the oracle (own expert forced) is at 1.0. The last rows add the base model as a fifth expert,
fitted on general text; the last column is the loss on the unseen domain relative to the base's.

Shape legend: D hidden, E experts, N kept tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from modekit.building.build import build
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.demo.models import SEQUENCE_LENGTH
from modekit.demo.text import DOMAINS, GENERAL, UNSEEN
from modekit.evaluation.domains import held_out_domains
from modekit.evaluation.loss import score_domain
from modekit.loaded.load import decoder_layers, load_model, load_tokenizer
from modekit.loaded.native import DenseView, native_of
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.recipes.router import Router
from modekit.routing.capture import GateInput, capture_domain
from modekit.routing.closed_form import fit_gates
from modekit.routing.statistics import DomainStatistics
from modekit.text.documents import read_documents
from modekit.text.sequences import encode
from modekit.text.splits import documents_of_split

TOKENS = 16_384
EVAL_TOKENS = 4_096
TOKEN = Router().averages


class Bench:
    """One seed: the mixture in memory, its text, and what routers read under different conditions."""

    def __init__(self, folder: Path, texts: Path, name: str, domains: Sequence[str]) -> None:
        self.checkpoint = open_checkpoint(folder / name)
        self.folder = folder
        self.domains = domains
        self.model = load_model(self.checkpoint.folder)
        self.base = load_model(folder / "base")
        tokenizer = load_tokenizer(self.checkpoint.folder)
        self.sequences = []
        for domain in domains:
            documents = read_documents([str(texts / f"{domain}.jsonl")], root=texts, where=domain)
            fit = documents_of_split(documents, "fit")
            self.sequences.append(encode(tokenizer, fit, max_tokens=TOKENS, sequence_length=SEQUENCE_LENGTH))
        # Variants are compared on the select split; what is reported elsewhere (demo, README) is scored on another.
        self.held_out = held_out_domains(
            self.checkpoint, tokens_per_domain=EVAL_TOKENS, sequence_length=SEQUENCE_LENGTH, split="select"
        )
        scored = {domain.name: domain for domain in self.held_out}
        self.base_loss = {name: score_domain(self.base, domain, print_nothing).loss for name, domain in scored.items()}
        self.own_loss = {name: score_domain(load_model(folder / name), scored[name], print_nothing).loss for name in DOMAINS}

    def routers(self) -> list[torch.nn.Module]:
        return [layer.get_submodule(native_of(self.checkpoint).router_module) for layer in decoder_layers(self.model)]

    def set_gates(self, gates: Sequence[torch.Tensor], top_k: int) -> None:
        for router, gate_ED in zip(self.routers(), gates, strict=True):
            router.weight.data = gate_ED.clone()
            router.top_k = top_k

    def score(self, gates: Sequence[torch.Tensor], top_k: int) -> dict[str, float]:
        """Gap closed per domain, and the loss of other domains relative to the base's."""
        self.set_gates(gates, top_k)
        scores = {}
        for domain in self.held_out:
            loss = score_domain(self.model, domain, print_nothing).loss
            base = self.base_loss[domain.name]
            known = domain.name in self.own_loss
            scores[domain.name] = (base - loss) / (base - self.own_loss[domain.name]) if known else loss / base
        return scores

    def capture(self, run: Callable[[int], Any]) -> list[DomainStatistics]:
        """Statistics per domain; `run(place)` gives what to run: an object with `model` and `router_inputs()`."""
        return [
            capture_domain(
                run(place), sequences, [], reads=[GateInput(TOKEN, None, {})], keep_tokens=TOKENS, advance=print_nothing
            )[0]
            for place, sequences in enumerate(self.sequences)
        ]

    def own_forced(self) -> list[DomainStatistics]:
        view = DenseView(self.checkpoint)

        def run(place: int) -> DenseView:
            view.use_expert(place)
            return view

        return self.capture(run)

    def base_run(self) -> list[DomainStatistics]:
        modules = [layer.mlp for layer in decoder_layers(self.base)]
        return self.capture(lambda _: SimpleNamespace(model=self.base, router_inputs=lambda: modules))

    def residual_stream(self) -> list[DomainStatistics]:
        """The peers' tap: the input of the decoder layer, before attention and norm, in the base's run."""
        modules = list(decoder_layers(self.base))
        return self.capture(lambda _: SimpleNamespace(model=self.base, router_inputs=lambda: modules))

    def layer_by_layer(self, settings: Router, top_k: int, start: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each layer is fitted on what it reads under the layers below as they were just fitted."""
        gates = list(start)
        blocks = [layer.get_submodule(native_of(self.checkpoint).block_module) for layer in decoder_layers(self.model)]
        for layer in range(len(gates)):
            self.set_gates(gates, top_k)
            statistics_ = self.capture(lambda _: SimpleNamespace(model=self.model, router_inputs=lambda: blocks))
            gates[layer] = fit_gates(settings, statistics_)[layer]
        return gates

    def by_cost(self, domains: Sequence[DomainStatistics]) -> list[DomainStatistics]:
        """Tokens drawn anew with a probability proportional to what a wrong expert costs: mean |E_e(x) - E_own(x)|^2."""
        view = DenseView(self.checkpoint)
        outputs = []  # expert -> domain -> router -> (N, D)
        with torch.inference_mode():
            for expert in range(len(domains)):
                view.use_expert(expert)
                ffns = view.router_inputs()
                outputs.append([[ffn(d.slots[i].sample_ND.float()) for i, ffn in enumerate(ffns)] for d in domains])
        drawn = []
        generator = torch.Generator().manual_seed(0)
        for own, domain in enumerate(domains):
            samples = []
            for number, slot in enumerate(domain.slots):
                wrong = [(out[own][number] - outputs[own][own][number]).square().sum(1) for out in outputs]
                cost_N = torch.stack(wrong).mean(0)
                rows = torch.multinomial(cost_N, len(cost_N), replacement=True, generator=generator)
                samples.append(slot.sample_ND[rows])
            drawn.append(with_samples(domain, samples))
        return drawn


def print_nothing(_done: int) -> None:
    """No progress."""


def with_samples(domain: DomainStatistics, samples: Sequence[torch.Tensor]) -> DomainStatistics:
    slots = (replace(slot, sample_ND=sample_ND) for slot, sample_ND in zip(domain.slots, samples, strict=True))
    return replace(domain, slots=tuple(slots))


def fewer(domains: Sequence[DomainStatistics], count: int) -> list[DomainStatistics]:
    def thinned(sample_ND: torch.Tensor) -> torch.Tensor:
        return sample_ND[:: max(1, len(sample_ND) // count)][:count]

    return [with_samples(domain, [thinned(slot.sample_ND) for slot in domain.slots]) for domain in domains]


def without_early(gates: Sequence[torch.Tensor], layers: int) -> list[torch.Tensor]:
    """The first layers mix all experts evenly: zero gates (with top_k = E)."""
    return [torch.zeros_like(gate) if number < layers else gate for number, gate in enumerate(gates)]


def run_seed(folder: Path, texts: Path) -> dict[str, dict[str, float]]:
    bench = Bench(folder, texts, "logistic", DOMAINS)
    experts = len(DOMAINS)
    own, base_x, residual = bench.own_forced(), bench.base_run(), bench.residual_stream()
    taps = {"residual stream, base run": residual, "router input, base run": base_x, "router input, own expert": own}
    rows: dict[str, dict[str, float]] = {}

    def add(name: str, gates: Sequence[torch.Tensor], top_k: int) -> None:
        started = time.perf_counter()
        rows[f"{name} | {top_k}"] = bench.score(gates, top_k)
        mean = statistics.fmean(rows[f"{name} | {top_k}"][domain] for domain in DOMAINS)
        print(f"{folder.name} {name} top_k {top_k}: {mean:.3f} ({time.perf_counter() - started:.0f} s)", flush=True)

    add("uniform", [torch.zeros(experts, len(slot.sum_D)) for slot in own[0].slots], experts)
    for tap, domains in taps.items():
        for fit in ("centroid", "lda", "ridge", "logistic"):
            gates = fit_gates(Router(fit=fit), domains)  # type: ignore[arg-type]
            add(f"{fit} | {tap} | default", gates, 2)
    tap = "router input, own expert"
    logistic = fit_gates(Router(fit="logistic"), own)
    for top_k in (1, 3, 4):
        add(f"logistic | {tap} | default", logistic, top_k)
    for temperature in (0.5, 2.0):
        add(f"logistic | {tap} | temperature {temperature}", [gate / temperature for gate in logistic], 2)
    ridge = fit_gates(Router(fit="ridge"), own)
    for temperature in (0.33, 3.0):
        add(f"ridge | {tap} | temperature {temperature}", [gate / temperature for gate in ridge], 2)
    for l2 in (1e-4, 1e-1):
        add(f"logistic | {tap} | l2 {l2}", fit_gates(Router(fit="logistic", l2=l2), own), 2)
    for count in (512, 2_048, 8_192):
        add(f"logistic | {tap} | {count} tokens per domain", fit_gates(Router(fit="logistic"), fewer(own, count)), 2)
    add(f"logistic | {tap} | tokens by cost", fit_gates(Router(fit="logistic"), bench.by_cost(own)), 2)
    add(f"logistic | {tap} | first layer uniform", without_early(logistic, 1), experts)
    add("logistic | layer by layer under the mixture | default", bench.layer_by_layer(Router(fit="logistic"), 2, logistic), 2)
    rows |= {f"{name} with base": row for name, row in with_base(folder, texts).items()}
    return rows


def with_base(folder: Path, texts: Path) -> dict[str, dict[str, float]]:
    """The base model as a fifth expert with general text."""
    recipe = yaml.safe_load((folder / "logistic.yaml").read_text())
    recipe["experts"].append({"name": GENERAL, "model": "base", "text": f"../text/{GENERAL}.jsonl"})
    name = "routing-with-base"
    if not (folder / name).exists():
        build(make_plan(parse_recipe(recipe), folder), folder / name)
    bench = Bench(folder, texts, name, (*DOMAINS, GENERAL))
    gates = fit_gates(Router(fit="logistic"), bench.own_forced())
    return {f"logistic | router input, own expert | default | {top_k}": bench.score(gates, top_k) for top_k in (1, 2, 3, 5)}


def table(per_seed: list[dict[str, dict[str, float]]]) -> str:
    columns = [*DOMAINS, f"{UNSEEN} / base"]
    lines = ["| fit | x | settings | top_k | gap closed | " + " | ".join(columns) + " |", "|---" * (5 + len(columns)) + "|"]
    for name in per_seed[0]:
        rows = [seed[name] for seed in per_seed]
        means = [statistics.fmean(row[domain] for domain in DOMAINS) for row in rows]
        spread = f" ± {max(abs(m - statistics.fmean(means)) for m in means):.3f}" if len(rows) > 1 else ""
        cells = [f"{statistics.fmean(row[domain] for row in rows):.2f}" for domain in DOMAINS]
        cells.append(f"{statistics.fmean(row[UNSEEN] for row in rows):.3f}")
        parts = name.split(" | ")
        parts = [parts[0], *(parts[1:-1] or ["-", "-"]), parts[-1]]
        lines.append(f"| {' | '.join(parts)} | {statistics.fmean(means):.3f}{spread} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    per_seed = []
    for seed in range(arguments.seeds):
        per_seed.append(run_seed(arguments.demo.resolve() / f"seed{seed}", arguments.demo.resolve() / "text"))
        (arguments.demo / "results" / "router_fits.json").write_text(json.dumps(per_seed, indent=1))
    print(table(per_seed))


if __name__ == "__main__":
    main()
