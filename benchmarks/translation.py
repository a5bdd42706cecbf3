"""Many domains in one translation model: tags, gates, adapters, wrong labels, generic text, width and experts; translation.md.

    pip install 'modekit[translation]'
    python benchmarks/translation.py synthetic FOLDER --seeds 0 1 2    (a language whose words depend on the domain)
    python benchmarks/translation.py real FOLDER --seeds 0 1 2         (English to French messages by catalogue, of a Debian)
    python benchmarks/translation.py tables FOLDER --seeds 0 1 2       (of what the others have left in FOLDER)

Every model and every score is kept in FOLDER, and gone on from. Labels at test time: a text's own domain (right), another one
(wrong) or none; of unseen domains none, or that of some domain.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modekit.text.document import Pair
from translation_models import labelled, match_width, tagged
from translation_sparse import BALANCE, trained, untrained
from translation_study import BEAMS, P, Study, Way, losses, of_adapters, of_dense, of_loaded, of_mixture
from translation_tables import tables

CAPACITY = 1.25
"""Of the one row that drops tokens in training."""
STRONGER = 0.1
"""Of the one row whose loads are to be more even."""
LEXICAL: dict[str, Any] = {"top_k": 1, "router": {"fit": "lexical"}}
ROUTERS: dict[str, dict[str, Any]] = {
    "lexical, top-1": LEXICAL,
    "lexical, top-2": {**LEXICAL, "top_k": 2},
    "lexical of tokens and pairs, top-1": {"top_k": 1, "router": {"fit": "lexical", "orders": [1, 2]}},
    "lexical of tokens and pairs, top-2": {"top_k": 2, "router": {"fit": "lexical", "orders": [1, 2]}},
}


def row_of(model: str, domain: str, randomised: str, generic: bool) -> str:
    """What a row is called in scores.json."""
    return " | ".join([model, domain, randomised, "yes" if generic else "no"])


def keep_row(study: Study, row: str, open_way: Callable[[], tuple[Way, tuple[int, int]]], *, labels: bool) -> None:
    """Scores of a row: greedy, and by beams where it is a main row; losses."""

    def scored(beams: int) -> dict[str, Any]:
        way, sizes = open_way()
        return study.matrix(way, labels=labels, sizes=sizes, beams=beams)

    study.keep(row, partial(scored, 1))
    if row in MAIN:
        study.keep(f"{row} | beams", partial(scored, BEAMS))
    study.keep(f"{row} | by column", lambda: study.losses(open_way()[0], labels=labels))


NO_DOMAIN, TAG, GATE, ADAPTER = "no domain", "tag", "gate", "adapter"
MAIN = {
    row_of(model, domain, randomised, True)
    for model, domain, randomised in (
        ("base", NO_DOMAIN, "no"),
        ("base", TAG, "no"),
        ("base", TAG, "uniform"),
        ("wide, total", NO_DOMAIN, "no"),
        ("mixture, lexical, top-1", NO_DOMAIN, "no"),
        ("mixture, lexical, top-1", GATE, "no"),
    )
}


def synthetic(study: Study) -> None:
    """Everything trained from nothing, but for specialists and adapters, which are of the base without domains."""
    for generic in (True, False):
        dense(study, "base", NO_DOMAIN, "no", generic)
        dense(study, "base", TAG, "no", generic)
        dense(study, "base", TAG, "uniform", generic)
        built(study, generic, ROUTERS if generic else {"lexical, top-1": LEXICAL})
        built(study, generic, {"lexical, top-1": LEXICAL}, randomised=True)
        adapters(study, generic, randomised=False)
        adapters(study, generic, randomised=True)
    for randomised in ("others", "generic"):
        dense(study, "base", TAG, randomised, True)
    for randomised in ("no", "uniform"):
        of_tags(study, randomised)
        dense(study, "wide, total", TAG, randomised, True)
    dense(study, "wide, total", NO_DOMAIN, "no", True)
    dense(study, "wide, active in top-2", NO_DOMAIN, "no", True)
    dense(study, "wide, active in top-2", TAG, "no", True)
    for domain, randomised in ((NO_DOMAIN, "no"), (TAG, "no"), (TAG, "uniform")):
        sparse(study, domain, randomised)
    sparse(study, NO_DOMAIN, "no", interval=2)
    sparse(study, NO_DOMAIN, "no", capacity=CAPACITY)


def real(study: Study) -> None:
    """A base of generic text and a third of the domains', trained on for equal numbers of steps in several ways."""
    made = study.made
    share = int(len(study.generic) * 0.33 / 0.67 / len(study.fit))
    mixed = [*study.generic, *(pair for pairs in study.fit.values() for pair in pairs[:share])]
    start = made.dense("base-no", mixed, study.size.training)
    keep_row(study, row_of("base", NO_DOMAIN, "no", True), lambda: of_dense(start, False), labels=False)
    built(study, True, ROUTERS)
    adapters(study, True, randomised=False)
    after = study.size.training.with_(steps=1_500)  # reads as much as all specialists together
    for domain, randomised in ((NO_DOMAIN, "no"), (TAG, "no"), (TAG, "uniform")):
        dense(study, "base, trained on", domain, randomised, True, of="base-no", training=after)
    built(study, True, {"lexical, top-1": LEXICAL}, randomised=True)
    dense(study, "base, trained on", NO_DOMAIN, "no", False, of="base-no", training=after)
    made.dense("wide-start", mixed, study.size.training, ffn=width(study, "wide, total"))
    dense(study, "wide, total, trained on", NO_DOMAIN, "no", True, of="wide-start", training=after)
    for balance in (BALANCE, STRONGER):
        sparse(study, NO_DOMAIN, "no", balance=balance, before=(mixed, study.size.training), training=after)


def dense(
    study: Study, model: str, domain: str, randomised: str, generic: bool, *, of: str | None = None, training: Any = None
) -> None:
    """A row of a model that has all of it in every pass."""
    tag = domain == TAG
    name = "-".join([model, domain, randomised, "generic" if generic else "alone"]).replace(", ", "-").replace(" ", "-")

    def way() -> tuple[Way, tuple[int, int]]:
        p, mode = (0.0, "uniform") if randomised == "no" else (P, randomised)
        pairs = study.pairs(tag=tag, p=p, mode=mode, generic=generic)  # type: ignore[arg-type]
        ffn = width(study, model) if of is None and model.startswith("wide") else None
        return of_dense(study.made.dense(name, pairs, training or study.size.training, ffn=ffn, of=of), tag)

    keep_row(study, row_of(model, domain, randomised, generic), way, labels=tag)


def sparse(
    study: Study,
    domain: str,
    randomised: str,
    *,
    interval: int = 1,
    capacity: float | None = None,
    balance: float = BALANCE,
    before: Any = None,
    training: Any = None,
) -> None:
    """A row of a mixture that is trained from nothing, as the dense models are."""
    tag = domain == TAG
    model = f"sparse from nothing, {'' if interval == 1 else f'every {interval}nd layer, '}top-2"
    says = ("" if capacity is None else f", capacity {capacity}") + ("" if balance == BALANCE else f", balance {balance}")

    def way() -> tuple[Way, tuple[int, int]]:
        checkpoint = untrained(study.made, f"sparse-{interval}", dict(study.corpus.seen), interval)
        pairs = study.pairs(tag=tag, p=0.0 if randomised == "no" else P)
        stages = [*([before] if before else []), (pairs, training or study.size.training)]
        name = f"sparse-{interval}-{domain}-{randomised}{says}".replace(", ", "-").replace(" ", "-")
        made = trained(study.made, name, checkpoint, stages, capacity=capacity, balance=balance)
        return of_loaded(made, checkpoint, tag)

    keep_row(study, row_of(model + says, domain, randomised, True), way, labels=tag)


def width(study: Study, model: str) -> int:
    """The FFN of a dense model with as many parameters as the mixture, or as a token meets in it with two experts."""
    found = study.keep("parameters of the mixture", lambda: None)
    parameters = found["total"] if "total" in model else found["active in top-2"]
    return match_width(study.made.tokenizer, study.size, parameters)


def base_of(study: Study, generic: bool) -> str:
    """What specialists are fine-tunes of."""
    return "base-no" if study.part == "real" else f"base-no-domain-no-{'generic' if generic else 'alone'}"


def texts_of(study: Study, randomised: bool, name: str) -> Mapping[str, Path]:
    """What each specialist reads: its domain's text, or what has its label when labels are drawn anew."""
    if not randomised:
        return study.corpus.seen
    drawn: dict[str, list[Pair]] = {each: [] for each in study.fit}
    for pair, label in labelled(study.fit, P, "uniform", study.seed)[::4]:
        drawn[label or ""].append(pair)
    return study.made.texts(name, drawn)


def built(study: Study, generic: bool, routers: Mapping[str, dict[str, Any]], *, randomised: bool = False) -> None:
    """Rows of mixtures of FFN specialists: routed by the source, and by the label."""
    group = f"experts-{'generic' if generic else 'alone'}{'-randomised' if randomised else ''}"
    base, says = base_of(study, generic), "uniform" if randomised else "no"
    experts = study.made.specialists(group, base, texts_of(study, randomised, f"text-{group}"))
    for name, mixture in routers.items():
        slug = name.replace(", ", "-").replace(": ", "-").replace(" ", "-")
        checkpoint = study.made.mixture(f"{group}-{slug}", base, experts, study.corpus.seen, study.corpus.unseen, mixture)
        if name == "lexical, top-2":
            known = study.scores.setdefault("parameters of the mixture", {})
            known |= {"total": checkpoint.parameters.total, "active in top-2": checkpoint.parameters.active}
        row = row_of(f"mixture, {name}", NO_DOMAIN, says, generic)
        keep_row(study, row, partial(of_mixture, checkpoint, gate=False), labels=False)
        if generic and not randomised:
            study.keep(f"{row} | losses", partial(losses, checkpoint, study.made.folder / base))
        if name == "lexical, top-1":
            row = row_of(f"mixture, {name}", GATE, says, generic)
            keep_row(study, row, partial(of_mixture, checkpoint, gate=True), labels=True)


def adapters(study: Study, generic: bool, *, randomised: bool) -> None:
    """A row of a LoRA adapter per domain, chosen by the label; without one the base."""
    group = f"adapters-{'generic' if generic else 'alone'}{'-randomised' if randomised else ''}"
    base = base_of(study, generic)
    experts = study.made.specialists(group, base, texts_of(study, randomised, f"text-{group}"), "lora")
    checkpoint = study.made.mixture(group, base, experts, study.corpus.seen, study.corpus.unseen, LEXICAL)
    row = row_of("base", ADAPTER, "uniform" if randomised else "no", generic)
    keep_row(study, row, partial(of_adapters, checkpoint, study.made.folder / base), labels=True)


def of_tags(study: Study, randomised: str) -> None:
    """A row of a mixture whose experts, and whose router, read the domain's token before the source."""
    group, base = f"tagged-experts-{randomised}", f"base-tag-{randomised}-generic"
    every = labelled(study.fit, 0.0 if randomised == "no" else P, "uniform", study.seed)[:: 1 if randomised == "no" else 4]
    named: dict[str, list[Pair]] = {}
    places = iter(every)
    for domain, pairs in study.fit.items():
        named[domain] = [tagged(*next(places)) for _ in pairs]
    texts = study.made.texts(f"text-{group}", named)
    experts = study.made.specialists(group, base, texts)
    checkpoint = study.made.mixture(group, base, experts, texts, {}, LEXICAL)
    row = row_of("mixture, lexical, top-1", TAG, randomised, True)
    keep_row(study, row, partial(of_mixture, checkpoint, gate=False, tag=True), labels=True)


def main() -> None:
    """Run a part of the study, or print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=["synthetic", "real", "tables"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    said = parser.parse_args()
    torch.set_num_threads(said.threads)
    root = said.folder.resolve()
    if said.part == "tables":
        for part in ("synthetic", "real"):
            tables(part, [found for found in (Study(root, part, seed).scores for seed in said.seeds) if found])
        return
    for seed in said.seeds:
        study = Study(root, said.part, seed)
        study.prepare()
        {"synthetic": synthetic, "real": real}[said.part](study)


if __name__ == "__main__":
    main()
