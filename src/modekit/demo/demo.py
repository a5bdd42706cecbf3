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
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from modekit.building.build import build
from modekit.checkpoint.open import open_checkpoint
from modekit.demo.kinds import Kind, What
from modekit.demo.models import make_base
from modekit.demo.text import unpack_pairs, unpack_text
from modekit.demo.translation import make_pair_base, translate_once, translated_table
from modekit.errors import CheckpointError, OutputError, check_packages
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.results import Results, with_gaps
from modekit.evaluation.translation.results import TranslationResults
from modekit.experts.specialize import specialize
from modekit.files.change import is_there
from modekit.files.read import UNREADABLE, read_json
from modekit.files.write import make_folder, write_file, write_json
from modekit.planning.make import make_plan
from modekit.recipes.fits import FITS
from modekit.recipes.read import parse_recipe
from modekit.run import Run

_SMOKE_RUN = "a smoke run (--quick): models of a few steps show that every part runs, and their figures say nothing of quality"


@dataclass(frozen=True)
class DemoResults:
    """Results per seed, and the names of the mixtures in order; what they write, where that was scored.

    `quick`: the models were trained for a few steps, so that the figures say nothing.
    """

    per_seed: Mapping[int, Mapping[str, Results]]
    seconds: float
    translated: Mapping[int, TranslationResults]
    quick: bool

    def merged(self, seed: int) -> Results:
        """One table of a seed: the dense rows and the oracle once, then every mixture under its name."""
        by_mixture = self.per_seed[seed]
        first = next(iter(by_mixture.values()))
        carrying: dict[str, Results] = {}  # the first of the mixtures that carry the same of their experts
        for name, results in by_mixture.items():
            carrying.setdefault(name.partition(" ")[2], results)
        rows = [row for row in first.rows if row.kind not in {"mixture", "oracle"}]
        rows += [
            dataclasses.replace(results.row("oracle"), name=f"oracle {carried}".strip())
            for carried, results in carrying.items()
        ]
        rows += [
            dataclasses.replace(row, name=name if row.name == "mixture" else f"{name} {row.name}")
            for name, results in by_mixture.items()
            for row in results.rows
            if row.kind == "mixture"
        ]
        notes = [*([_SMOKE_RUN] if self.quick else []), *first.notes]
        rows = with_gaps(rows, first.domains)  # anew, since mixtures may come of other models than the first one's
        return Results(rows, first.domains, first.unseen, notes=notes)

    def as_data(self) -> dict[str, object]:
        """Plain data for JSON."""
        translated = {str(seed): table.as_data() for seed, table in self.translated.items()}
        return {
            "seeds": {str(seed): self.merged(seed).as_data() for seed in self.per_seed},
            **({"translated": translated} if translated else {}),
        }


def folder_of(what: What, *, quick: bool) -> Path:
    """Where a kind of demo lies when nothing else is said: demo, demo-full, ..."""
    return Path("-".join(["demo", *([what] if what != "mlp" else []), *(["quick"] if quick else [])]))


def run_demo(out: Path, *, seeds: Sequence[int] = (0,), what: What = "mlp", quick: bool = False, run: Run) -> DemoResults:
    """Make, mix and evaluate; returns the tables and writes DEMO/results."""
    started = time.monotonic()
    if what == "translation":
        check_packages(("sacrebleu.metrics",), "pip install 'modekit[translation]'")
    kind = Kind(what, quick)
    _refuse_other_demo(out, {"experts": what, "size": dataclasses.asdict(kind.size)})
    texts = unpack_pairs(out / "text") if what == "translation" else unpack_text(out / "text")
    per_seed: dict[int, dict[str, Results]] = {}
    translated: dict[int, TranslationResults] = {}
    for seed in seeds:
        folder = out / f"seed{seed}"
        per_seed[seed] = run_seed(folder, texts, seed, kind, run)
        if what == "translation":
            translated[seed] = translated_table({name: folder_of_mixture(folder, name) for name in per_seed[seed]})
    results = DemoResults(per_seed, time.monotonic() - started, translated, quick)
    _write(out / "results", results)
    return results


def _write(folder: Path, results: DemoResults) -> None:
    make_folder(folder)
    write_json(folder / "demo.json", results.as_data())
    parts = []
    for seed in results.per_seed:
        parts.append(f"## Seed {seed}\n\n{results.merged(seed).markdown()}")
        if seed in results.translated:
            parts.append(results.translated[seed].markdown())
    write_file(folder / "demo.md", "\n".join(parts).encode())


def _refuse_other_demo(out: Path, settings: dict[str, Any]) -> None:
    """Models of one kind of demo must not be taken for another's: a folder remembers what it was made for."""
    stamp = out / "demo.json"
    try:
        known = read_json(stamp)
    except FileNotFoundError:
        make_folder(out)
        write_json(stamp, settings)
        return
    except UNREADABLE:
        known = None
    if known != json.loads(json.dumps(settings)):
        raise OutputError(
            "the folder holds another kind of demo", where=str(out), remedy="choose another --out, or remove the folder"
        )


def run_seed(folder: Path, texts: Mapping[str, Path], seed: int, kind: Kind, run: Run) -> dict[str, Results]:
    """Make what is not there yet, and return the table of every mixture by its name.

    The first mixture is scored before the others, which take its rows of base and experts over.
    """
    base, steps = folder / "base", kind.size.base_steps
    stage = run.about("stage 1 of 4")
    if not is_there(base):
        (make_pair_base if kind.translates else make_base)(base, texts, steps=steps, seed=seed, run=stage)
    stage = run.about("stage 2 of 4")
    for place, name in enumerate(kind.domains):
        if not is_there(folder / name):
            training = kind.size.training.with_(seed=1000 * seed + place)
            text, about = [str(texts[name])], stage.about(name)
            specialize(base, folder / name, text, root=folder, train=kind.trains, training=training, run=about)
    stage = run.about("stage 3 of 4")
    for name, says in kind.mixtures.items():
        _build(stage.about(name), folder, name, recipe_of(kind, says, texts))
    stage, found = run.about("stage 4 of 4"), dict[str, Results]()
    for name in kind.mixtures:
        found[name] = _score(stage.about(name), folder, name, kind, next(iter(found.values()), None))
    return found


def _build(run: Run, folder: Path, name: str, recipe: dict[str, Any]) -> None:
    """The mixture's checkpoint, unless the one of this recipe is there."""
    out = folder_of_mixture(folder, name)
    write_file(out.with_suffix(".yaml"), yaml.safe_dump(recipe, sort_keys=False).encode())
    plan = make_plan(parse_recipe(recipe, where=name), folder)
    try:
        is_built = open_checkpoint(out).record.recipe_digest == plan.recipe.digest()
    except CheckpointError:
        is_built = False
    if not is_built:
        build(plan, out, overwrite=True, run=run)


def _score(run: Run, folder: Path, name: str, kind: Kind, known: Results | None) -> Results:
    checkpoint = open_checkpoint(folder_of_mixture(folder, name))
    length = kind.size.training.sequence_length
    results = evaluate(checkpoint, tokens_per_domain=kind.size.eval_tokens, sequence_length=length, known=known, run=run)
    if kind.translates:
        translate_once(checkpoint, kind.size.translated, run)
    return results


def recipe_of(kind: Kind, says: dict[str, Any], texts: Mapping[str, Path]) -> dict[str, Any]:
    """The recipe of a mixture, as it lies in the folder of a seed."""
    mixture, tokens = dict(says["mixture"]), kind.size.fit_tokens
    if mixture["method"] != "linear":
        router = dict(mixture.get("router", {}))
        if "fit" in router and "tokens_per_domain" in FITS[router["fit"]].settings:
            length = kind.size.training.sequence_length
            router.update(tokens_per_domain=tokens, keep_tokens=min(tokens, 16_384), sequence_length=length)
        mixture["router"] = router
    model = "adapter" if kind.trains == "lora" else "model"
    files = {name: f"../text/{texts[name].name}" for name in (*kind.domains, *kind.unseen)}
    # Nothing of a demo is chosen by the select split. Few pairs are held out: both splits of them are shown.
    shown = files if kind.translates else {name: files[name] for name in kind.unseen}
    return {
        "base_model": "./base",
        "experts": [{"name": domain, model: f"./{domain}", "text": files[domain]} for domain in kind.domains],
        "mixture": mixture,
        "output": says.get("output", {}),
        "eval": shown,
    }


def folder_of_mixture(folder: Path, name: str) -> Path:
    """Where a mixture of a seed lies."""
    return folder / name.replace(" ", "-")
