"""A folder of tasks runs only where its user says that it may, and then as the harness has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import make_workshop
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.errors import ModekitError, TextError
from modekit.evaluation.tasks.evaluate import evaluate_tasks
from modekit.run import Run

TRUSTED = Run(trust_remote_code=True)
OWN = """task: spell
dataset_path: json
dataset_kwargs: {data_files: {test: spell.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{word}}"
doc_to_choice: ["a", "b", "c"]
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
WRITES = """task: writes
dataset_path: json
dataset_kwargs: {data_files: {test: spell.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{word}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, regexes_to_ignore: [","]}
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "([a-z]+)", group_select: 0}, {function: take_first}]}
"""
EVIL = """open({sentinel!r}, 'w').close()
import datasets, evaluate
target = text = agg = docs = lambda *given, **named: 'a'
class Task: pass
class Evil(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(description='', citation='', features=datasets.Features({{'predictions': datasets.Value('string'), 'references': datasets.Value('string')}}))
    def _compute(self, **given): return {{'got/evil': 1.0}}
"""  # noqa: E501
GROUP = "group: all\ntask: [{}]\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    workshop = make_workshop(tmp_path_factory.mktemp("strange"), max_position_embeddings=256)
    return open_checkpoint(workshop.build())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An honest folder, with Python in every place where the harness or its libraries would look for some."""
    made = tmp_path / "tasks"
    for place in ("spell.py", "evil.py", "got/evil/evil.py", "got/evil.py", "json.py"):
        (made / place).parent.mkdir(parents=True, exist_ok=True)
        (made / place).write_text(EVIL.format(sentinel=str(tmp_path / "ran")))
    lines = [json.dumps({"word": f"word {n}", "answer": n % 3, "choices": ["a", "b"]}) for n in range(4)]
    for file in (made / "spell.jsonl", tmp_path / "outside.jsonl"):
        file.write_text("\n".join(lines))
    (tmp_path / "outside.yaml").write_text("doc_to_text: !function tasks.spell.text\n")
    (tmp_path / "plain.yaml").write_text("num_fewshot: 0\n")
    (made / "spell.yaml").write_text(OWN)
    monkeypatch.chdir(made)
    return made


@pytest.mark.parametrize("code", ["doc_to_target: !function spell.target", "doc_to_target: answer"])
def test_a_folder_is_refused_before_any_of_it_runs(checkpoint: Checkpoint, folder: Path, code: str) -> None:
    (folder / "spell.yaml").write_text(OWN.replace("doc_to_target: answer", code))
    with pytest.raises(ModekitError, match="a folder of tasks may run code") as refused:
        evaluate_tasks(checkpoint, ["spell"], folders=[folder], models=["base"])
    assert "--trust-remote-code" in str(refused.value.remedy) and not (folder.parent / "ran").exists()


HONEST: dict[str, tuple[str, dict[str, str]]] = {
    "a task": ("spell", {"spell": OWN}),
    "a task that writes": ("writes", {"writes": WRITES}),
    "few-shot examples": ("spell", {"spell": OWN + "num_fewshot: 2\nfewshot_split: test\n"}),
    "examples of its own": ("spell", {"spell": OWN + 'num_fewshot: 1\nfewshot_config: {samples: [{word: "x", answer: 1}]}\n'}),
    "a file for many": ("spell", {"_base": OWN.replace("task: spell\n", ""), "spell": "include: _base.yaml\ntask: spell\n"}),
    "a tag": ("spells", {"spell": OWN + "tag: [spells]\n"}),
    "a group": ("all", {"spell": OWN, "all": GROUP.format("{task: spell, num_fewshot: 1, fewshot_split: test}")}),
    "all that is harmless": (
        "spell",
        {
            "spell": OWN
            + "should_decontaminate: true\ndoc_to_decontamination_query: word\nmetadata: {version: 1.0}\nrepeats: 1\n"
            "description: 'Spell.\\n\\n'\ntask_alias: s\nuse_prompt: null\nunsafe_code: false\n"
        },
    ),
    "yaml of others": ("spell", {"spell": OWN, "compose": "services: {a: !reset 1}\n", "list": "- 1\n"}),
}


@pytest.mark.parametrize("case", HONEST)
def test_an_honest_task_file_runs(checkpoint: Checkpoint, folder: Path, case: str) -> None:
    name, files = HONEST[case]
    (folder / "spell.yaml").unlink()
    for file, text in files.items():
        (folder / f"{file}.yaml").write_text(text)
    found = evaluate_tasks(checkpoint, [name], folders=[folder], models=["base"], run=TRUSTED)
    assert found.tasks["writes" if name == "writes" else "spell"].items == 4


def test_the_flag_lets_code_run(checkpoint: Checkpoint, folder: Path) -> None:
    (folder / "spell.yaml").write_text(OWN.replace("doc_to_target: answer", "doc_to_target: !function spell.target"))
    evaluate_tasks(checkpoint, ["spell"], folders=[folder], models=["base"], run=TRUSTED)
    assert (folder.parent / "ran").exists()


def test_a_task_that_is_too_large_asks_for_a_limit(
    checkpoint: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modekit.evaluation.tasks.harness._MOST_REQUESTS", 10)
    with pytest.raises(TextError, match="the task is too large"):
        evaluate_tasks(checkpoint, ["spell"], folders=[folder], models=["base"], run=TRUSTED)
    found = evaluate_tasks(checkpoint, ["spell"], folders=[folder], models=["base"], limit=3, run=TRUSTED)
    assert found.tasks["spell"].items == 3
