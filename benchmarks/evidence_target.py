"""What a lexical table is fitted to, and how many experts a token takes: scoreboard.md, "Where we lose".

    python benchmarks/whole.py train FOLDER --kind full --seeds 0 1 2
    python benchmarks/evidence_target.py FOLDER --kinds adapters full --seeds 0 1 2

The posterior of branch-train-merge reads how well each expert predicted the text so far. Is it ahead because of what it reads
or because it mixes all experts? Every expert reads the fit text once; the table is then fitted on to a mixture's likelihood

    -log sum_e softmax(l_t)_e p_e(x_t+1 | x_1 ... x_t)

in place of the name of the domain. Scored with whole models as experts: what a router is worth, without the form of a result.

Shape legend: S sequence, E experts, V vocabulary.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from modekit.routing.evidence import Averaging, TokenRows, train_table
from peers.bounds import models_of
from peers.pool import Scored, open_pool
from peers.score import texts_of

AVERAGING = Averaging((0.98,))
STEPS, RATE, DRAWN, LOOK = 150, 0.05, 8, 10
TOKENS = {"fit": 20_000, "select": 8_192, "report": 4_096}
Weights = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Ids (S,) and log p (S - 1, 1 + E) -> weights (S - 1, E) that read nothing behind their token."""


@dataclass(frozen=True)
class Read:
    """A document of a domain: ids (S,), and log p of the base and of every expert for each next token, (S - 1, 1 + E)."""

    place: int
    ids_S: torch.Tensor
    said: torch.Tensor


@torch.no_grad()
def read(scored: Scored) -> dict[str, list[Read]]:
    """Of every split, all documents under all models."""
    pool = scored.pool
    models: list[PreTrainedModel] = [AutoModelForCausalLM.from_pretrained(pool.base, dtype=torch.float32), *models_of(pool)]
    paths = {"fit": pool.text, "select": pool.select, "report": {name: scored.report[name] for name in pool.text}}
    found: dict[str, list[Read]] = {split: [] for split in paths}
    for split, of_domains in paths.items():
        for place, sequences in enumerate(texts_of(pool.base, of_domains, TOKENS[split]).values()):
            for ids in (torch.tensor(each.ids) for each in sequences):
                each = [model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1) for model in models]
                said = torch.stack([one.gather(-1, ids[1:, None])[:, 0] for one in each], dim=-1)
                found[split].append(Read(place, ids, said))
    return found


def gap_closed(documents: Sequence[Read], weights: Weights) -> float:
    """Mean over domains."""
    gains: dict[int, float] = {}
    whole: dict[int, float] = {}
    for each in documents:
        mixed = (each.said[:, 1:].exp() * weights(each.ids_S, each.said)).sum(-1).log()
        gains[each.place] = gains.get(each.place, 0.0) + float((mixed - each.said[:, 0]).sum())
        whole[each.place] = whole.get(each.place, 0.0) + float((each.said[:, 1 + each.place] - each.said[:, 0]).sum())
    return sum(gains[place] / whole[place] for place in gains) / len(gains)


def logits_of(table_VE: torch.Tensor, ids_S: torch.Tensor) -> torch.Tensor:
    """(S - 1, E)."""
    return (AVERAGING.matrices(len(ids_S))[0] @ table_VE[ids_S])[:-1]


def of_table(table_VE: torch.Tensor, experts: int) -> Weights:
    """Softmax over the best so many."""

    def weights(ids_S: torch.Tensor, _said: torch.Tensor) -> torch.Tensor:
        logits = logits_of(table_VE, ids_S)
        best = logits.topk(experts, dim=-1).indices
        return torch.full_like(logits, float("-inf")).scatter(-1, best, logits.gather(-1, best)).softmax(-1)

    return weights


def posterior(experts: int) -> Weights:
    """Softmax over the best so many of what each has said of the text so far."""

    def weights(_ids_S: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
        past = torch.nn.functional.pad(said[:-1, 1:].cumsum(0), (0, 0, 1, 0))
        best = past.topk(experts, dim=-1).indices
        return torch.full_like(past, float("-inf")).scatter(-1, best, past.gather(-1, best)).softmax(-1)

    return weights


def fitted_on(table_VE: torch.Tensor, documents: Mapping[str, Sequence[Read]], seed: int) -> torch.Tensor:
    """The table of the least loss on the select split, from a table of the domains' names."""
    weights_VE = table_VE.clone().requires_grad_()
    optimizer, draw = torch.optim.Adam([weights_VE], lr=RATE, betas=(0.9, 0.99)), torch.Generator().manual_seed(seed)
    domains = [[each for each in documents["fit"] if each.place == place] for place in range(table_VE.shape[1])]

    def loss(drawn: Sequence[Read]) -> torch.Tensor:
        each = [(logits_of(weights_VE, one.ids_S).log_softmax(-1) + one.said[:, 1:]).logsumexp(-1).mean() for one in drawn]
        return -torch.stack(each).mean()

    best, least = table_VE, float("inf")
    for step in range(1, STEPS + 1):
        drawn = [own[int(torch.randint(len(own), (1,), generator=draw))] for own in domains for _ in range(DRAWN)]
        optimizer.param_groups[0]["lr"] = RATE * (1 - (step - 1) / STEPS)
        optimizer.zero_grad()
        loss(drawn).backward()
        optimizer.step()
        if step % LOOK == 0:
            with torch.no_grad():
                now = float(loss(documents["select"]))
            if now < least:
                best, least = weights_VE.detach().clone(), now
    return best


def main() -> None:
    """Print a row per pool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", default=["adapters", "full"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    said = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    ways = (
        "table, 1",
        "table, 2",
        "table, all",
        "to likelihood, 1",
        "to likelihood, 2",
        "posterior, 1",
        "posterior, 2",
        "posterior, all",
    )
    print(f"| experts | seed | {' | '.join(ways)} |\n|---|---|{'---|' * len(ways)}")
    for kind in said.kinds:
        for seed in said.seeds:
            scored = open_pool(said.folder.resolve(), kind, seed, said.folder.resolve() / "scoreboard")
            documents, experts = read(scored), len(scored.pool.text)
            named = [
                [TokenRows(each.ids_S.int()[:, None]) for each in documents["fit"] if each.place == place]
                for place in range(experts)
            ]
            vocabulary = len(AutoTokenizer.from_pretrained(scored.pool.base))
            table_VE = train_table(named, vocabulary, AVERAGING).table[:, 0].t().contiguous()
            on_VE = fitted_on(table_VE, documents, seed)
            weighed = [of_table(table_VE, 1), of_table(table_VE, 2), of_table(table_VE, experts)]
            weighed += [of_table(on_VE, 1), of_table(on_VE, 2), *(posterior(many) for many in (1, 2, experts))]
            gaps = [f"{gap_closed(documents['report'], each):.3f}" for each in weighed]
            print(f"| {kind} | {seed} | {' | '.join(gaps)} |", flush=True)


if __name__ == "__main__":
    main()
