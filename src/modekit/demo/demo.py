"""`modekit demo`: from text to evaluated mixtures, in a folder that can be looked at and run again.

    DEMO/demo.json                 what kind of demo this is
    DEMO/text/<domain>.jsonl       the text
    DEMO/seed0/base, <domain>      models: the base, and one specialist per domain
    DEMO/seed0/<mixture>.yaml      the recipes
    DEMO/seed0/<mixture>           the checkpoints
    DEMO/results/demo.json, .md    one table over all seeds

Every folder that is there is kept, so that an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.checkpoint.staging import write_atomically, write_json
from modekit.demo.models import BATCH_TOKENS, SEQUENCE_LENGTH, make_base, make_real_base
from modekit.demo.text import DOMAINS, UNSEEN, unpack_text
from modekit.errors import CheckpointError, OutputError
from modekit.evaluation.evaluate import Results, Row, evaluate
from modekit.experts.specialize import specialize
from modekit.loaded.next_token import Training
from modekit.planning.make import make_plan
from modekit.progress import Progress
from modekit.recipes.recipe import parse_recipe

What = Literal["mlp", "full", "lora"]

_ROUTING = {"method": "routing", "top_k": 2}
_FOLDED = {"output": {"format": "native"}}
MIXTURES: dict[What, dict[str, dict[str, Any]]] = {
    "mlp": {
        "linear": {"mixture": {"method": "linear"}},
        "noisy": {"mixture": {**_ROUTING, "router": {"fit": "random"}}},
        "ridge": {"mixture": {**_ROUTING, "router": {"fit": "ridge"}}},
        "routing": {"mixture": _ROUTING},
        "context": {"mixture": {**_ROUTING, "router": {"granularity": "context"}}},
        "ngram": {"mixture": {**_ROUTING, "router": {"fit": "ngram"}}},
    },
    "full": {
        "linear": {"mixture": {"method": "linear"}},
        "routing": {"mixture": _ROUTING},
        **{f"routing {backbone}": {"mixture": {**_ROUTING, "backbone": backbone}}
           for backbone in ("average", "task_arithmetic", "ties")},
        "sequence whole": {
            "mixture": {**_ROUTING, "modules": "all", "router": {"granularity": "sequence", "per": "model"}}
        },
        "ngram whole": {"mixture": {**_ROUTING, "modules": "all", "router": {"fit": "ngram"}}},
    },
    "lora": {
        "linear": {"mixture": {"method": "linear"}},
        "routing": {"mixture": _ROUTING},
        "context": {"mixture": {**_ROUTING, "router": {"granularity": "context"}}},
        "ngram": {"mixture": {**_ROUTING, "router": {"fit": "ngram"}}},
        "routing folded": {"mixture": _ROUTING, **_FOLDED},
        "routing folded average": {"mixture": {**_ROUTING, "backbone": "average"}, **_FOLDED},
    },
}  # fmt: skip
"""What the experts are -> name -> what the recipe says. `routing` is what a recipe gets that says nothing about the router;
what stands behind a space changes what the experts can carry, and gets an oracle row of its own."""


@dataclass(frozen=True)
class Size:
    """How much work a demo does."""

    base_steps: int
    expert_training: Training
    lora_training: Training
    fit_tokens: int
    eval_tokens: int


_TRAINING = Training(
    steps=80, batch_tokens=BATCH_TOKENS, sequence_length=SEQUENCE_LENGTH, learning_rate=3e-3, weight_decay=0.05, by_length=True, autocast=True,
)
SMALL = Size(
    480,
    _TRAINING.with_(muon_learning_rate=0.01),
    _TRAINING,
    131_072,
    16_384,
)  # fmt: skip
QUICK = Size(12, SMALL.expert_training.with_(steps=3), SMALL.lora_training.with_(steps=3), 2_048, 2_048)
_REAL_TRAINING = Training(
    steps=24, batch_tokens=2_048, sequence_length=512, learning_rate=3e-4, held_out_tokens=1_024, autocast=True
)
REAL = Size(
    0,
    _REAL_TRAINING,
    _REAL_TRAINING.with_(learning_rate=1e-3),
    2_048,
    1_024,
)


@dataclass(frozen=True)
class DemoResults:
    """Results per seed, and the names of the mixtures in order."""

    per_seed: Mapping[int, Mapping[str, Results]]
    seconds: float

    def merged(self, seed: int) -> Results:
        """One table of a seed: the dense rows and the oracle once, then every mixture under its name."""
        by_mixture = self.per_seed[seed]
        first = next(iter(by_mixture.values()))
        rows = [row for row in first.rows if row.kind not in {"mixture", "oracle"}]
        rows += [Row(f"oracle {carried}".strip(), *_rest(results.row("oracle")))
                 for carried, results in _by_what_is_carried(by_mixture).items()]  # fmt: skip
        rows += [Row(name, *_rest(results.row("mixture"))) for name, results in by_mixture.items()]
        return Results(rows, first.domains, first.unseen, first.text, first.notes)

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "seeds": {str(seed): self.merged(seed).as_data() for seed in self.per_seed},
            "summary": self.summary(),
        }

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Per row: mean over the seeds and largest deviation from it, of mean loss, gap closed and unseen loss."""
        tables = [self.merged(seed) for seed in self.per_seed]
        summary: dict[str, dict[str, float | None]] = {}
        for row in tables[0].rows:
            rows = [table.row(row.name) for table in tables]
            domains, unseen = tables[0].domains, tables[0].unseen
            figures = {
                "mean_loss": [each.mean_loss(domains) for each in rows],
                "gap_closed": [each.mean_gap(domains) for each in rows],
                "unseen_against_base": [
                    each.scores[unseen[0]].loss / table.row("base").scores[unseen[0]].loss
                    if unseen and unseen[0] in each.scores else None
                    for each, table in zip(rows, tables, strict=True)
                ],
            }  # fmt: skip
            summary[row.name] = {}
            for name, values in figures.items():
                known = [value for value in values if value is not None]
                mean = statistics.fmean(known) if known else None
                summary[row.name][name] = mean
                summary[row.name][name + "_spread"] = max(abs(v - mean) for v in known) if mean is not None else None
        return summary


def run_demo(
    out: Path, *, seeds: Sequence[int] = (0,), what: What = "mlp", real: bool = False, quick: bool = False, progress: Progress
) -> DemoResults:
    """Make, mix and evaluate; returns the tables and writes DEMO/results."""
    started = time.monotonic()
    size = QUICK if quick else REAL if real else SMALL
    _refuse_other_demo(out, {"experts": what, "real": real, "size": dataclasses.asdict(size)})
    texts = unpack_text(out / "text")
    per_seed = {seed: _run_seed(out / f"seed{seed}", texts, seed, what, real, size, progress) for seed in seeds}
    results = DemoResults(per_seed, time.monotonic() - started)
    folder = out / "results"
    folder.mkdir(exist_ok=True)
    write_json(folder / "demo.json", results.as_data())
    parts = [f"## Seed {seed}\n\n{results.merged(seed).markdown()}" for seed in per_seed]
    write_atomically(folder / "demo.md", "\n".join(parts).encode())
    return results


def _refuse_other_demo(out: Path, settings: dict[str, Any]) -> None:
    """Models of one kind of demo must not be taken for another's: a folder remembers what it was made for."""
    stamp = out / "demo.json"
    if not stamp.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_json(stamp, settings)
    elif json.loads(stamp.read_text(encoding="utf-8")) != settings:
        raise OutputError(
            "the folder holds another kind of demo", where=str(out), remedy="choose another --out, or remove the folder"
        )


def _run_seed(
    folder: Path, texts: dict[str, Path], seed: int, what: What, real: bool, size: Size, progress: Progress
) -> dict[str, Results]:
    base = folder / "base"
    if not base.exists() and real:
        make_real_base(base, progress)
    elif not base.exists():
        make_base(base, texts, steps=size.base_steps, seed=seed, progress=progress)
    for place, name in enumerate(DOMAINS):
        if not (folder / name).exists():
            specialize(
                base, folder / name, [str(texts[name])], root=folder, train=what,
                training=(size.lora_training if what == "lora" else size.expert_training).with_(seed=1000 * seed + place),
                progress=lambda _stage, done, total, name=name: progress(f"train {name}", done, total),
            )  # fmt: skip
    results: dict[str, Results] = {}
    known: Results | None = None
    for name, says in MIXTURES[what].items():
        checkpoint = _build(folder, name, _recipe(what, says, texts, size), progress)
        known = evaluate(
            checkpoint, tokens_per_domain=size.eval_tokens, sequence_length=SEQUENCE_LENGTH, known=known, progress=progress
        )
        results[name] = known
    return results


def _recipe(what: What, says: dict[str, Any], texts: dict[str, Path], size: Size) -> dict[str, Any]:
    mixture = dict(says["mixture"])
    if mixture["method"] != "linear":
        router = dict(mixture.get("router", {}))
        if router.get("fit") not in {"random", "ngram"}:
            router.update(
                tokens_per_domain=size.fit_tokens, keep_tokens=min(size.fit_tokens, 16_384), sequence_length=SEQUENCE_LENGTH
            )
        mixture["router"] = router
    kind = "adapter" if what == "lora" else "model"
    return {
        "base_model": "./base",
        "experts": [{"name": domain, kind: f"./{domain}", "text": f"../text/{texts[domain].name}"} for domain in DOMAINS],
        "mixture": mixture,
        "output": says.get("output", {}),
        "eval": {UNSEEN: f"../text/{texts[UNSEEN].name}"},
    }


def _build(folder: Path, name: str, recipe: dict[str, Any], progress: Progress) -> Checkpoint:
    place = name.replace(" ", "-")
    write_atomically(folder / f"{place}.yaml", yaml.safe_dump(recipe, sort_keys=False).encode())
    parsed = parse_recipe(recipe, where=name)
    try:
        checkpoint = open_checkpoint(folder / place)
        if checkpoint.record.recipe_digest == parsed.digest():
            return checkpoint
    except CheckpointError:
        pass
    return build(
        make_plan(parsed, folder), folder / place, overwrite=True,
        progress=lambda stage, done, total: progress(f"{name}: {stage}", done, total),
    )  # fmt: skip


def _by_what_is_carried(results: Mapping[str, Results]) -> dict[str, Results]:
    return {name.partition(" ")[2]: table for name, table in results.items()}


def _rest(row: Row) -> tuple[Any, ...]:
    return row.kind, row.total_parameters, row.active_parameters, row.scores, row.identity
