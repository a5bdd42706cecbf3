"""Questions on the demo's models, mean over seeds: base, every expert and two mixtures. Writes the table of tasks.md.

    modekit demo --out DEMO --seeds 3
    OMP_NUM_THREADS=1 python benchmarks/tasks.py DEMO --seeds 3 --out benchmarks/tasks.md

The questions are the same for every seed. What a model answered is kept in DEMO/seed*/tasks/, so that a run that is cut short
goes on where it was. Terms of the text that the base saw are no questions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.evaluation.tasks import scoring
from modekit.evaluation.tasks.files import FORMS, GROUPS, task_config, task_files, tasks_of
from modekit.evaluation.tasks.harness import build_requests, harness_task, quiet, run_tasks
from modekit.evaluation.tasks.intervals import (
    Bootstrap,
    Estimate,
    ItemSums,
    average,
    bleu_sample,
    differences,
    draw,
    mean_sample,
    rows,
)
from modekit.evaluation.tasks.questions import Questions, make_questions
from modekit.evaluation.tasks.results import cell_of
from modekit.evaluation.tasks.scores import process_results
from modekit.evaluation.tasks.scoring import Continuation, answers_of
from modekit.loaded.experts import load_expert_source
from modekit.loaded.load import load_model, load_tokenizer

MIXTURES = ("ngram", "logistic")
FEWER = ("glosses_plain", "continuations_plain")  # forms near chance: base and one mixture of the first seed show that

Found = dict[str, list[dict[str, Any]]]
"""Model -> per seed what `answers` gave."""


def answers(seed: Path, model: str, forms: list[str], made: list[Questions], limit: int) -> dict[str, Any]:
    """Task -> metric -> what every item scored, from what is kept or by running the model."""
    folder = seed / "tasks"
    kept = folder / f"{model}.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    chosen = {name: each for name, each in tasks_of(forms, made).items() if name not in found and not each[1].unseen}
    if not chosen:
        return found
    (folder / "files").mkdir(parents=True, exist_ok=True)
    for name, content in task_files(made).items():
        (folder / "files" / name).write_bytes(content)
    checkpoint = open_checkpoint(seed / MIXTURES[0])
    tasks = {}
    for name, (form, questions) in chosen.items():
        own = {"process_results": process_results} if form == "generation" else {}
        tasks[name] = harness_task({**task_config(form, questions, (folder / "files").resolve()), **own})
        build_requests(name, tasks[name], limit)
    if model in MIXTURES or model == "base":
        loaded = load_model(seed / model)
    else:
        loaded = load_expert_source(checkpoint, checkpoint.names.index(model))
        assert loaded is not None
    scored = run_tasks(loaded, load_tokenizer(seed / "base"), tasks, limit=limit, trusted=False, advance=lambda _: None)
    for name, (form, _) in chosen.items():
        metrics = [each["metric"] for each in FORMS[form]["metric_list"]]
        items = scored[name].items
        found[name] = {metric: [item[metric] for item in items] for metric in metrics}
        found[name]["document"] = [item["doc"]["document"] for item in items]
    kept.write_text(json.dumps(found))
    print(seed.name, model, flush=True)
    return found


def speed(mixture: Path, model: Path, limit: int) -> None:
    """Processor seconds of scoring the questions of a mixture: one at a time, in batches, and with beginnings shared."""
    tokenizer, loaded = load_tokenizer(model), load_model(model)
    made, _ = make_questions(open_checkpoint(mixture))
    glosses = [item for each in made if each.kind == "glosses" for item in each.items[:limit]]
    continuations = [item for each in made if each.kind == "continuations" for item in each.items[:limit]]
    told = "\n\n".join(f"{item['asked']} {item['terms'][item['answer']]}" for item in glosses[:5])
    asked = {
        "glosses": [(head, " " + item["gloss"]) for item in glosses for head in item["heads"]],
        "continuations": [
            (start, c) for item in continuations for start in (item["beginning"], "") for c in item["continuations"]
        ],
        "5 examples, 4 answers": [(f"{told}\n\n{item['asked']}", f" {t}") for item in glosses for t in item["terms"]],
        "5 examples, 4 letters": [(f"{told}\n\n{item['asked']}", f" {t}") for item in glosses for t in "ABCD"],
    }
    print(f"{model.name}, {torch.get_num_threads()} thread, load {os.getloadavg()[0]:.1f}", flush=True)
    for name, pairs in asked.items():
        texts = []
        for context, continuation in pairs:
            before = tokenizer(context)["input_ids"] if context else [tokenizer.bos_token_id]
            after = tokenizer(continuation, add_special_tokens=False)["input_ids"]
            texts.append(Continuation((*before, *after), len(before)))
        seconds, found = [], []
        for parts, worth in (([[text] for text in texts], 2**40), ([texts], 2**40), ([texts], scoring.WORTH["cpu"])):
            with torch.inference_mode(), patch.dict(scoring.WORTH, {"cpu": worth}):
                begin, answers = time.process_time(), {}
                for part in parts:
                    for answered, _ in answers_of(loaded, list(dict.fromkeys(part))):
                        answers.update(answered)
                seconds.append(time.process_time() - begin)
            found.append(answers)
        apart = max(abs(found[0][text][0] - answers[text][0]) for answers in found[1:] for text in texts)
        same = all(found[0][text][1] == answers[text][1] for answers in found[1:] for text in texts)
        print(f"| {name} | {len(texts)} | {' | '.join(f'{each:.1f}' for each in seconds)} | {apart:.0e} | {same} |", flush=True)


def over_seeds(per_seed: list[dict[str, Any]], name: str, metric: str) -> ItemSums:
    """One model on one task, the items' scores averaged over seeds (corpus BLEU: the counts summed)."""
    make = bleu_sample if metric == "bleu" else mean_sample
    answered = [each[name][metric] for each in per_seed if name in each]
    samples = [make([tuple(value) if metric == "bleu" else value for value in values]) for values in answered]
    return ItemSums(np.sum([sample.parts_NK for sample in samples], axis=0), samples[0].worth)


def drawn_of(found: Found, form: str, metric: str, made: list[Questions]) -> dict[str, Bootstrap]:
    """Domain (items) -> models under the same draws, of those models that were asked."""
    drawn = {}
    for name, (_, questions) in tasks_of([form], made).items():
        models = [model for model, seeds in found.items() if not questions.unseen and name in seeds[0]]
        if models:
            documents = found[models[0]][0][name]["document"]
            samples = {model: over_seeds(found[model], name, metric) for model in models}
            drawn[f"{questions.domain} ({len(documents)})"] = draw(samples, documents, name)
    return drawn


def table(drawn: dict[str, Bootstrap], metric: str) -> str:
    """Rows: models; columns: domains and their mean, then the mixtures' differences."""
    mean = average(list(drawn.values()))
    mixtures = [model for model in MIXTURES if model in mean.values]
    lines = [["model", *drawn, "mean", *(f"{mixture} minus it" for mixture in mixtures)]]
    lines.append(["---"] * len(lines[0]))
    for model in mean.values:
        cells = [model, *(cell_of(Estimate(each.values[model]), metric) for each in drawn.values())]
        cells.append(cell_of(rows(mean)[model], metric))
        cells += [cell_of(differences(mean, mixture).get(model), metric, signed=True) for mixture in mixtures]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def per_seed_line(found: Found, forms: dict[str, str], made: list[Questions]) -> str:
    """Mean over the tasks by seed, of every model; `forms` are forms and their metrics."""
    parts = []
    for model, seeds in found.items():
        values = []
        for each in seeds:
            tasks = [(name, forms[form]) for name, (form, q) in tasks_of(list(forms), made).items() if not q.unseen]
            if all(name in each for name, _ in tasks):
                values.append(np.mean([over_seeds([each], name, metric).value for name, metric in tasks]))
        if values:
            parts.append(f"{model} " + ", ".join(cell_of(Estimate(float(v)), next(iter(forms.values()))) for v in values))
    return "By seed: " + "; ".join(parts) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="only these models, with commas between them, and no table")
    parser.add_argument("--limit", type=int, default=100, help="items of a domain and kind at most")
    parser.add_argument("--forms", default="glosses,continuations,generation")
    parser.add_argument("--speed", type=Path, help="measure the speed of this model on the questions of a mixture, DEMO")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.speed:
        speed(args.demo.resolve(), args.speed.resolve(), args.limit)
        return
    seeds = [args.demo / f"seed{seed}" for seed in range(args.seeds)]
    with quiet(trusted=False):
        first = open_checkpoint((seeds[0] / MIXTURES[0]).resolve())
        made, _ = make_questions(first, seen=[str((args.demo / "text" / "general.jsonl").resolve())])
        models = ["base", *first.names, *MIXTURES]
        run = partial(answers, made=made, limit=args.limit)
        wanted = args.forms.split(",")
        found: Found = {}
        for model in args.only.split(",") if args.only else models:
            more = FEWER if model in {"base", "logistic"} else ()
            found[model] = [run(seed, model, [*wanted, *(more if seed == seeds[0] else ())]) for seed in seeds]
    if args.only:
        return
    sections: list[str] = []
    whole: dict[str, Bootstrap] = {}
    for form in dict.fromkeys([*wanted, *FEWER]):
        for metric in [each["metric"] for each in FORMS[form]["metric_list"]]:
            drawn = drawn_of(found, form, metric, made)
            sections += [f"## {form}: {metric}", "", table(drawn, metric), "", per_seed_line(found, {form: metric}, made), ""]
            if form in GROUPS["questions"]:
                whole |= {f"{domain} {form}": each for domain, each in drawn.items()}
    forms = {"glosses": "acc", "continuations": "acc_mutual_info"}
    mean = {"both kinds": average(list(whole.values()))}
    sections = ["## questions", "", table(mean, "acc"), "", per_seed_line(found, forms, made), "", *sections]
    text = "\n".join([f"{args.seeds} seeds, {platform.machine()}, float32.", "", *sections])
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
