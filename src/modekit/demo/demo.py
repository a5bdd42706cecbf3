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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modekit.demo.kinds import Kind, What
from modekit.demo.seed import folder_of_mixture, run_seed
from modekit.demo.text import unpack_pairs, unpack_text
from modekit.demo.translation import translated_table
from modekit.errors import OutputError, check_packages
from modekit.evaluation.results import Results, with_gaps
from modekit.evaluation.translation.results import TranslationResults, TranslationScore
from modekit.files.read import UNREADABLE, read_json
from modekit.files.write import make_folder, write_file, write_json
from modekit.run import Run


@dataclass(frozen=True)
class DemoResults:
    """Results per seed, and the names of the mixtures in order; what they write, where that was scored.

    `quick`: the models were trained for a few steps, so that the figures say nothing.
    """

    per_seed: Mapping[int, Mapping[str, Results]]
    seconds: float
    translated: Mapping[int, TranslationResults] = field(default_factory=dict)
    quick: bool = False

    def merged(self, seed: int) -> Results:
        """One table of a seed: the dense rows and the oracle once, then every mixture under its name."""
        by_mixture = self.per_seed[seed]
        first = next(iter(by_mixture.values()))
        carrying: dict[str, Results] = {}  # the first of the mixtures that carry the same of their experts
        for name, results in by_mixture.items():
            carrying.setdefault(name.partition(" ")[2], results)
        rows = [row for row in first.rows if row.kind not in {"mixture", "oracle"}]
        rows += [results.row("oracle").renamed(f"oracle {carried}".strip()) for carried, results in carrying.items()]
        rows += [
            row.renamed(name if row.name == "mixture" else f"{name} {row.name}")
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
            "summary": self.summary(),
        }

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Per row: mean over the seeds and largest deviation from it, of mean loss, gap closed and unseen loss, and of BLEU
        where translations were scored.
        """
        tables = [self.merged(seed) for seed in self.per_seed]
        domains, unseen = tables[0].domains, tables[0].unseen
        summary: dict[str, dict[str, float | None]] = {}
        for name in (row.name for row in tables[0].rows):
            rows = [(table.row(name), table.row("base")) for table in tables]
            figures = {
                "mean_loss": [row.mean_loss(domains) for row, _ in rows],
                "gap_closed": [row.mean_gap(domains) for row, _ in rows],
                "unseen_against_base": [_share(row.mean_loss(unseen), base.mean_loss(unseen)) for row, base in rows],
            }
            if self.translated:
                written = [each for table in self.translated.values() for each in table.rows if each.name == name]
                figures["bleu"] = [_bleu(each.mean(domains)) for each in written]
                figures["unseen_bleu"] = [_bleu(each.mean(unseen)) for each in written]
            summary[name] = {}
            for figure, values in figures.items():
                known = [value for value in values if value is not None]
                mean = statistics.fmean(known) if known else None
                summary[name][figure] = mean
                summary[name][f"{figure}_spread"] = max(abs(v - mean) for v in known) if mean is not None else None
        return summary


_SMOKE_RUN = "a smoke run (--quick): models of a few steps show that every part runs, and their figures say nothing of quality"


def _share(value: float | None, of: float | None) -> float | None:
    return None if value is None or of is None else value / of


def _bleu(score: TranslationScore | None) -> float | None:
    return None if score is None else score.bleu


def folder_of(what: What, *, real: bool, quick: bool) -> Path:
    """Where a kind of demo lies when nothing else is said: demo, demo-full, ..."""
    return Path(
        "-".join(["demo", *([what] if what != "mlp" else []), *(["real"] if real else []), *(["quick"] if quick else [])])
    )


def run_demo(
    out: Path, *, seeds: Sequence[int] = (0,), what: What = "mlp", real: bool = False, quick: bool = False, run: Run
) -> DemoResults:
    """Make, mix and evaluate; returns the tables and writes DEMO/results."""
    started = time.monotonic()
    if what == "translation":
        check_packages(("sacrebleu.metrics",), "pip install 'modekit[translation]'")
    kind = Kind(what, real, quick)
    _refuse_other_demo(out, {"experts": what, "real": real, "size": dataclasses.asdict(kind.size)})
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
