"""Questions as tasks of lm-evaluation-harness: a YAML and a JSONL per task, in a folder that `lm_eval` itself can run.

cd OUT/results/tasks
lm_eval --model hf --model_args pretrained=MODEL --include_path . --tasks modekit_glosses
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import yaml

from modekit.evaluation.tasks import scores
from modekit.evaluation.tasks.questions import Questions

FUNCTION = "!function"
FORMS: dict[str, dict[str, object]] = yaml.safe_load(files("modekit.evaluation.tasks").joinpath("forms.yaml").read_bytes())
"""Form -> what its task file says; the kind of question is the form's first word."""

GROUPS = {**{form: (form,) for form in FORMS}, "questions": ("glosses", "continuations")}
"""Names that TASKS takes for the questions -> forms."""


def task_name(form: str, domain: str) -> str:
    """The task of a form and domain."""
    return f"modekit_{domain}_{form}"


def task_files(made: Sequence[Questions]) -> dict[str, bytes]:
    """Every task of the questions: file name -> content."""
    written = {"scores.py": Path(scores.__file__).read_bytes()}
    for questions in made:
        lines = [json.dumps(item, ensure_ascii=False, sort_keys=True) for item in questions.items]
        written[_data_file(questions)] = ("\n".join(lines) + "\n").encode()
        for form in _forms_of(questions):
            config = task_config(form, questions, folder=None)
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            if form == "generation":
                text += f"process_results: {FUNCTION} scores.process_results\n"
            written[f"{task_name(form, questions.domain)}.yaml"] = text.encode()
    return written


def task_config(form: str, questions: Questions, folder: Path | None) -> dict[str, object]:
    """What the task file says; with a folder, the text is found from anywhere."""
    file = _data_file(questions)
    return {
        "task": task_name(form, questions.domain),
        "tag": f"modekit_{form}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": file if folder is None else str(folder / file)}},
        "test_split": "test",
        **FORMS[form],
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }


def tasks_of(forms: Sequence[str], made: Sequence[Questions]) -> dict[str, tuple[str, Questions]]:
    """Task name -> form and questions, of those forms."""
    return {
        task_name(form, questions.domain): (form, questions)
        for form in forms
        for questions in made
        if form in _forms_of(questions)
    }


def _forms_of(questions: Questions) -> list[str]:
    return [form for form in FORMS if form.split("_")[0] == questions.kind]


def _data_file(questions: Questions) -> str:
    return f"{questions.domain}_{questions.kind}.jsonl"
