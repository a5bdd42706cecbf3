"""Students of one teacher for English, French, German and Python, put together in several ways; modular.md.

    python benchmarks/modular.py students FOLDER --seeds 0 1 2     (with a teacher or without)
    python benchmarks/modular.py ways FOLDER --seeds 0 1 2         (PLE, JEET, MoE-CE, FFN specialists; routers)
    python benchmarks/modular.py forgetting FOLDER --seeds 0 1 2   (one language after the other, or together)
    python benchmarks/modular.py tables FOLDER --seeds 0 1 2       (of what the others have left in FOLDER)

What is in FOLDER is gone on from. All ways read the same number of tokens in training (modular_models.py). Perplexities are
of the report split, which nothing was trained or set by.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modekit.checkpoint.open import open_checkpoint
from modekit.demo.text import unpack_text
from modekit.evaluation.domains import Domain, held_out_domains
from modekit.experts.settings import DistillSettings
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.run import Progress, Run
from modular_models import COMMON, LEXICAL, TEXTS, WHOLE, WITHOUT_TEACHER, Languages, ffn_specialists, whole_models
from study import mean_losses, spread

WAYS_OF_TEACHING: dict[str, DistillSettings] = {
    "text alone": WITHOUT_TEACHER,
}
TOGETHER, TURNS, UNEVEN = "all in every step", "one language a step, in turn", "shuffled, sizes 1:2:4:8"
Losses = dict[str, float]
"""Language -> loss in nats per token."""


class Study:
    """One seed: models of the demo's folder and those besides, each made and scored once; `scores.json` has what is known."""

    def __init__(self, root: Path, seed: int) -> None:
        self.made = Languages(root / f"seed{seed}", unpack_text(root / "text", TEXTS), seed, WHOLE, Run(progress=_say(seed)))
        self._file = root / f"seed{seed}" / "scores.json"
        self.scores: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._has_begun = False

    def _begin(self) -> None:
        """Make what all parts need."""
        if self._has_begun:
            return
        self._has_begun = True
        self.made.teacher()
        self.made.session("base", "equal", self.made.texts)
        for language in TEXTS:
            self.made.student(language, language, WHOLE.steps // 4)
        self.made.mixture("ple", "base", {each: each for each in TEXTS}, whole_models())

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """What is known under a name, or what is made now."""
        if name not in self.scores:
            self._begin()
            self.scores[name] = make()
            self._file.write_text(json.dumps(self.scores, indent=1))
        return self.scores[name]

    def domains(self) -> list[Domain]:
        """Held-out text of every language."""
        checkpoint = open_checkpoint(self.made.folder / "ple")
        return held_out_domains(checkpoint, tokens_per_domain=WHOLE.eval_tokens, sequence_length=512, seen=(), run=Run())

    def losses(self, folder: Path) -> Losses:
        """Of a plain model, or of a mixture as it is."""
        return mean_losses(load_model(folder), self.domains())


def students(study: Study) -> None:
    """One student for all languages and one per language, of the same steps, taught in other ways than `base` and each
    language's own: by forward KL with an even weight.
    """
    study.keep("late loss: forward KL", partial(late_spread, study.made.folder / "base" / "distill.csv"))
    for way, settings in WAYS_OF_TEACHING.items():
        slug = way.replace(" ", "-").replace(",", "")
        study.keep(f"one student: {way}", partial(taught_one, study, slug, settings))
        study.keep(f"four students: {way}", partial(taught_four, study, slug, settings))
        study.keep(f"late loss: {way}", partial(late_spread, study.made.folder / f"one-{slug}" / "distill.csv"))


def taught_one(study: Study, slug: str, settings: DistillSettings) -> Losses:
    """One student for all languages."""
    return study.losses(study.made.session(f"one-{slug}", "equal", study.made.texts, settings))


def taught_four(study: Study, slug: str, settings: DistillSettings) -> Losses:
    """One student per language."""
    steps = WHOLE.steps // 4
    out = {each: study.made.student(f"{each}-{slug}", each, steps, settings=settings) for each in TEXTS}
    return {language: study.losses(folder)[language] for language, folder in out.items()}


def late_spread(file: Path) -> float:
    """Standard deviation of the cross-entropy over the last third of the steps."""
    rows = [line.split(",") for line in file.read_text().splitlines()]
    column = rows[0].index("loss_lm")
    values = [float(row[column]) for row in rows[1:] if row[column]]
    return statistics.stdev(values[-len(values) // 3 :])


def ways(study: Study) -> None:
    """Ways of putting experts together."""
    made = study.made
    study.keep("teacher", lambda: study.losses(made.folder / "teacher"))
    study.keep("base", lambda: study.losses(made.folder / "base"))
    study.keep("each language's own student", lambda: {each: study.losses(made.folder / each)[each] for each in TEXTS})
    study.keep("PLE, lexical", partial(routed, study, "ple", LEXICAL))
    study.keep("JEET", lambda: study.losses(made.joint("jeet", {}, LEXICAL).folder))
    study.keep("MoE-CE", lambda: study.losses(made.joint("moe-ce", COMMON, LEXICAL).folder))
    study.keep("MoE-CE without the common expert", lambda: without_common(study, made.folder / "moe-ce"))
    for top_k in (1, 2):
        study.keep(f"FFN specialists, lexical top-{top_k}", partial(specialists, study, top_k))


def routed(study: Study, name: str, router: dict[str, Any]) -> Losses:
    """Whole students under a router."""
    return study.losses(study.made.mixture(name, "base", {each: each for each in TEXTS}, whole_models(router)).folder)


def specialists(study: Study, top_k: int) -> Losses:
    """FFN specialists in a plain Mixtral."""
    return study.losses(ffn_specialists(study.made, top_k).folder)


def without_common(study: Study, folder: Path) -> Losses:
    """Of a mixture whose common expert takes no part."""
    model, checkpoint = load_model(folder), open_checkpoint(folder)
    with mixture_of(model, checkpoint).without_common():
        return mean_losses(model, study.domains())


def forgetting(study: Study) -> None:
    """Losses of every language after every phase, at equal numbers of tokens."""
    made, quarter = study.made, WHOLE.steps // 4

    def one_after_the_other() -> list[Losses]:
        before, found = "student", []
        for place, language in enumerate(TEXTS):
            out = made.student(f"phase{place}", language, quarter, of=before)
            found.append(study.losses(out))
            before = out.name
        return found

    study.keep("one after the other", one_after_the_other)
    texts = made.texts
    study.keep(TOGETHER, lambda: [study.losses(made.session("base", "equal", texts))])
    study.keep(TURNS, lambda: [study.losses(made.session("session-turns", "turns", texts))])
    study.keep(UNEVEN, lambda: [study.losses(made.session("session-uneven", None, uneven(study)))])


def uneven(study: Study) -> dict[str, Path]:
    """The texts cut so that their sizes are as 1 to 2 to 4 to 8: the first language has the least."""
    made: dict[str, Path] = {}
    smallest = min(len(path.read_bytes()) for path in study.made.texts.values())
    for place, (language, path) in enumerate(study.made.texts.items()):
        lines, size = [], smallest * 2**place // 8
        for line in path.read_bytes().splitlines(keepends=True):
            lines.append(line)
            size -= len(line)
            if size <= 0:
                break
        made[language] = study.made.folder / f"uneven-{language}.jsonl"
        made[language].write_bytes(b"".join(lines))
    return made


def tables(studies: Sequence[Study]) -> None:
    """Perplexity per language and their geometric mean, mean and largest deviation over the seeds."""
    names = dict.fromkeys(name for study in studies for name, found in study.scores.items() if isinstance(found, dict))
    print(f"| | {' | '.join(TEXTS)} | mean |\n|---|{'---|' * (len(TEXTS) + 1)}")
    for name in names:
        found = [study.scores[name] for study in studies if name in study.scores]
        cells = [spread([math.exp(each[language]) for each in found]) for language in TEXTS]
        print(f"| {name} | {' | '.join(cells)} | {spread([overall(each) for each in found])} |")
    print()
    for way in ("forward KL", *WAYS_OF_TEACHING):
        spreads = [study.scores[f"late loss: {way}"] for study in studies if f"late loss: {way}" in study.scores]
        if spreads:
            print(f"late deviation of the loss, {way}: {spread(spreads)}")
    print_forgetting(studies)


def print_forgetting(studies: Sequence[Study]) -> None:
    """Perplexities after every phase, and what became of the first language."""
    studies = [study for study in studies if "one after the other" in study.scores]
    if not studies:
        return
    phases = [study.scores["one after the other"] for study in studies]
    print(f"\n| after | {' | '.join(TEXTS)} |\n|---|{'---|' * len(TEXTS)}")
    for place, language in enumerate(TEXTS):
        cells = [spread([math.exp(each[place][other]) for each in phases]) for other in TEXTS]
        print(f"| {language} | {' | '.join(cells)} |")
    first = TEXTS[0]
    own = [math.exp(each[0][first]) for each in phases]
    ratios = [math.exp(each[-1][first]) / alone for each, alone in zip(phases, own, strict=True)]
    print(f"\none after the other: {first} at the end over {first} when it was learned: {spread(ratios)}")
    back = [
        statistics.fmean(each[place][language] - each[-1][language] for place, language in enumerate(TEXTS[:-1]))
        for each in phases
    ]
    print(f"backward transfer (mean of loss when learned less loss at the end, nats): {spread(back)}")
    for way in (TOGETHER, TURNS, UNEVEN):
        found = [(study.scores[way][0], alone) for study, alone in zip(studies, own, strict=True) if way in study.scores]
        if found:
            ratios = [math.exp(end[first]) / alone for end, alone in found]
            shown = " | ".join(spread([math.exp(end[language]) for end, _ in found]) for language in TEXTS)
            print(f"{way}: {shown}; {first} over its own student: {spread(ratios)}")


def overall(losses: Mapping[str, float]) -> float:
    """Perplexity of the mean loss."""
    return math.exp(statistics.fmean(losses[language] for language in TEXTS))


def _say(seed: int) -> Progress:
    last = [""]

    def progress(stage: str, done: int, total: int) -> None:
        if stage != last[0]:
            last[0] = stage
            print(f"seed {seed}: {stage} ({total})", flush=True)

    return progress


def main() -> None:
    """Run parts of the study, or print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=["students", "ways", "forgetting", "tables"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    said = parser.parse_args()
    torch.set_num_threads(said.threads)
    studies = [Study(said.folder.resolve(), seed) for seed in said.seeds]
    if said.part == "tables":
        tables(studies)
        return
    for study in studies:
        {"students": students, "ways": ways, "forgetting": forgetting}[said.part](study)


if __name__ == "__main__":
    main()
