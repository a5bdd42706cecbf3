"""What a stranger's folder of tasks may do: nothing but say what the harness has built in, and bring text."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import lm_eval.utils
import pytest

from conftest import make_workshop
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.errors import ModekitError, TextError
from modekit.evaluation.tasks.bounded import BoundedPatterns, render
from modekit.evaluation.tasks.evaluate import evaluate_tasks

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


def said(**changes: str) -> Callable[[Path], None]:
    """The honest file with pieces of it replaced."""

    def write(folder: Path) -> None:
        text = OWN
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        (folder / "spell.yaml").write_text(text)

    return write


def added(line: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "spell.yaml").write_text(OWN + line + "\n")

    return write


def data(name: str) -> Callable[[Path], None]:
    return said(**{"test: spell.jsonl": f"test: {name}"})


def grouped(*members: str, **files: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "all.yaml").write_text(GROUP.format(", ".join(members)))
        for name, text in files.items():
            (folder / f"{name}.yaml").write_text(text)

    return write


def linked(name: str, target: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder.parent / target)
        if name.endswith(".yaml"):
            (folder.parent / target).write_text(OWN)

    return write


def packed(folder: Path) -> None:
    (folder / "spell.jsonl").write_bytes(gzip.compress(b'{"word": "a"}\n' * 100))


def wide(folder: Path) -> None:
    (folder / "spell.jsonl").write_text("\n".join(json.dumps({f"key {n}": 1}) for n in range(5_000)))


def deep(folder: Path) -> None:
    (folder / "spell.jsonl").write_text("[" * 100_000)


def bomb(folder: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (folder / "spell.yaml").write_text(OWN + "\n".join(lines))


def huge(folder: Path) -> None:
    (folder / "spell.yaml").write_text(OWN + "# " + "x" * 2**21)


def broken(folder: Path) -> None:
    (folder / "spell.yaml").write_text("task: [")


def utf16(folder: Path) -> None:
    (folder / "spell.yaml").write_bytes(
        OWN.replace("doc_to_target: answer", "doc_to_target: !function spell.target").encode("utf-16")
    )


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a metric of the hub, or of the working folder": (said(**{"metric: acc,": "metric: got/evil,"}), "metric: 'got/evil'"),
    "a metric that the hub has": (said(**{"metric: acc,": "metric: acc, hf_evaluate: true,"}), "hf_evaluate: True"),
    "a metric's function": (said(**{"metric: acc,": "metric: !function spell.agg,"}), "!function spell.agg"),
    "an aggregation's function": (said(**{"aggregation: mean": "aggregation: !function spell.agg"}), "!function spell.agg"),
    "an aggregation that is none": (said(**{"aggregation: mean": "aggregation: spell.agg"}), "aggregation: 'spell.agg'"),
    "a filter's function": (
        added("filter_list: [{name: x, filter: [{function: custom, filter_fn: !function spell.text}]}]"),
        "filter_fn",
    ),
    "a filter that is a function": (added("filter_list: [{name: x, filter: [{function: !function spell.text}]}]"), "!function"),
    "a filter that is none": (added("filter_list: [{name: x, filter: [{function: spell}]}]"), "function: 'spell'"),
    "a setting that a filter lacks": (added("filter_list: [{name: x, filter: [{function: lowercase, x: 1}]}]"), "'x': 1"),
    "a pattern that is none": (
        added("filter_list: [{name: x, filter: [{function: regex, regex_pattern: '('}]}]"),
        "regex_pattern",
    ),
    "a prompt file": (added("use_prompt: prompts.yaml:x"), "use_prompt: 'prompts.yaml:x'"),
    "a prompt of another package": (added("use_prompt: promptsource:x"), "use_prompt: 'promptsource:x'"),
    "an answer's function": (said(**{"to_target: answer": "to_target: !function spell.target"}), "doc_to_target: !function"),
    "a text's function": (said(**{'"{{word}}"': "!function spell.text"}), "doc_to_text: !function"),
    "a function behind another tag": (
        said(**{"task: spell": "%TAG !f! !func\n---\ntask: spell", "to_target: answer": "to_target: !f!tion spell.target"}),
        "!function spell.target",
    ),
    "a function in another encoding": (utf16, "cannot be read"),
    "a tag of Python": (added("description: !!python/object/apply:os.system ['touch ../ran']"), "python/object/apply"),
    "a function for items": (added("process_docs: !function spell.docs"), "process_docs: !function"),
    "a name of a function for items": (added("process_docs: spell.docs"), "process_docs: 'spell.docs'"),
    "a function for results": (added("process_results: !function spell.target"), "process_results"),
    "a data set that is a function": (added("custom_dataset: !function spell.docs"), "custom_dataset"),
    "a class": (added("class: !function spell.Task"), "class: !function spell.Task"),
    "code of answers": (added("unsafe_code: true"), "unsafe_code: True"),
    "images": (added("doc_to_image: [word]"), "doc_to_image"),
    "a key that nobody knows": (added("model_args: pretrained=got/evil"), "model_args"),
    "a sampler that is none": (added("fewshot_config: {sampler: spell}"), "fewshot_config.sampler: 'spell'"),
    "a function of examples": (added("fewshot_config: {samples: !function spell.docs}"), "fewshot_config.samples"),
    "generation by code of a hub": (
        added("generation_kwargs: {custom_generate: ./got, trust_remote_code: true}"),
        "generation_kwargs.",
    ),
    "endless generation": (added("generation_kwargs: {max_gen_toks: 1000000000}"), "max_gen_toks"),
    "endless repeats": (added("repeats: 1000000000"), "repeats"),
    "endless examples": (added("num_fewshot: 1000000000"), "num_fewshot"),
    "pickles": (said(**{"path: json": "path: pandas"}), "dataset_path: 'pandas'"),
    "packed pickles": (said(**{"path: json": "path: webdataset"}), "dataset_path: 'webdataset'"),
    "a data base": (said(**{"path: json": "path: sql"}), "dataset_path: 'sql'"),
    "a data set of the hub": (said(**{"path: json": "path: got/evil"}), "dataset_path: 'got/evil'"),
    "code of a data set": (said(**{"{data_files": "{trust_remote_code: true, data_files"}), "trust_remote_code"),
    "a folder of data": (said(**{"{data_files": "{data_dir: .., data_files"}), "data_dir"),
    "a setting of pandas": (said(**{"{data_files": "{converters: {word: eval}, data_files"}), "converters"),
    "data of an address": (data("https://127.0.0.1:9/x.jsonl"), "data_files: https"),
    "data in an archive": (data("zip://x.jsonl::spell.zip"), "data_files: zip"),
    "data above the folder": (data("../outside.jsonl"), "../outside.jsonl"),
    "data elsewhere": (data("/etc/hostname"), "/etc/hostname"),
    "data by a pattern": (data("'*.jsonl'"), "*.jsonl"),
    "data that is a link": (linked("spell.jsonl", "outside.jsonl"), "spell.jsonl"),
    "data that is packed": (packed, "spell.jsonl"),
    "data of countless columns": (wide, "columns"),
    "data nested too deeply": (deep, "nested too deeply"),
    "no data": (said(**{"dataset_kwargs: {data_files: {test: spell.jsonl}}\n": ""}), "dataset_kwargs"),
    "code that is included": (added("include: ../outside.yaml"), "leads out of the folder"),
    "a file elsewhere": (added("include: /etc/hostname"), "leads out of the folder"),
    "a plain file above the folder": (added("include: ../plain.yaml"), "leads out of the folder"),
    "a file that includes itself": (added("include: spell.yaml"), "includes itself"),
    "a task that is a link": (linked("other.yaml", "strange.yaml"), "leads out of the folder"),
    "a bomb of aliases": (bomb, "aliases"),
    "a huge file": (huge, "bytes"),
    "what is no YAML": (broken, "cannot be read"),
    "a group that defines a task": (grouped("{task: inner, dataset_path: got/evil}"), "dataset_path"),
    "a group that feeds the harness's own code": (grouped("{task: spell, metadata: {tokenizer: got/evil}}"), "metadata"),
    "a group in a group": (grouped("{group: inner, task: [spell]}"), "task.0"),
    "a group's metric": (
        grouped("spell", other="group: other\ntask: [spell]\naggregate_metric_list: [{metric: got/evil}]\n"),
        "got/evil",
    ),
}
GROUPS = {
    "a group that holds itself": grouped("all"),
    "groups that hold each other": grouped("other", other="group: other\ntask: [all]\n"),
    "groups that grow": grouped("g1, g1", **{f"g{n}": f"group: g{n}\ntask: [g{n + 1}, g{n + 1}]\n" for n in range(1, 19)}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_task_file_is_refused_before_any_of_it_runs(checkpoint: Checkpoint, folder: Path, case: str) -> None:
    write, shown = HOSTILE[case]
    write(folder)
    with pytest.raises(ModekitError) as refused:
        evaluate_tasks(checkpoint, ["spell"], folders=[folder], models=["base"])
    assert "a task file asks for more than data" in refused.value.what and shown in str(refused.value.found)
    assert "--trust-remote-code" in str(refused.value.remedy) and refused.value.expected
    assert not (folder.parent / "ran").exists()


@pytest.mark.parametrize("case", GROUPS)
def test_groups_end(checkpoint: Checkpoint, folder: Path, case: str) -> None:
    GROUPS[case](folder)
    with pytest.raises(ModekitError, match="a group of tasks cannot be resolved"):
        evaluate_tasks(checkpoint, ["all"], folders=[folder], models=["base"])


def test_templates_say_what_the_harness_makes_of_them() -> None:
    doc = {"word": "a\n", "choices": ["x", "ß"], "more": {"n": [1, 2]}}
    for template in (
        "{{word}}\n",
        "{% for c in choices %}{{loop.index}}. {{c|upper}}\n{% endfor %}",
        "{{more.n}}",
        "{{choices|join('|')}}",
        "{{ word | regex_replace('a', 'b') }}",
        "{{ ['x', word.strip()] }}",
    ):
        assert render(template, doc) == lm_eval.utils.apply_template(template, doc)
    with pytest.raises(TextError, match="UndefinedError"):
        render("{{ nothing }}", doc)


def test_patterns_say_what_the_harness_makes_of_them_and_end() -> None:
    text = "The answer is (B), 12,000. #### 7"
    patterns = BoundedPatterns()
    for pattern in (r"#### (\-?[0-9\.\,]+)", r"\(([A-D])\)", r"(?i)ANSWER", r"(\w)(\d)?", r"[0-9,]+"):
        assert patterns.findall(pattern, text) == re.findall(pattern, text) == patterns.compile(pattern).findall(text)
        assert patterns.sub(pattern, "-", text) == re.sub(pattern, "-", text)
    with pytest.raises(TextError, match="takes too long"):
        BoundedPatterns(seconds=0.2).findall("(a|aa)+$", "a" * 60 + "b")


def test_a_filter_s_pattern_ends(checkpoint: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the harness itself, on what a model wrote."""
    monkeypatch.setattr("modekit.evaluation.tasks.harness.BoundedPatterns", lambda: BoundedPatterns(seconds=0.3))
    monkeypatch.setattr(
        "modekit.evaluation.tasks.scoring.LoadedModel.generate_until", lambda self, requests: ["a" * 60 + "b"] * len(requests)
    )
    (folder / "writes.yaml").write_text(WRITES.replace("([a-z]+)", "((?:a|aa)+)$"))
    begin = time.monotonic()
    with pytest.raises(TextError, match="regular expression takes too long"):
        evaluate_tasks(checkpoint, ["writes"], folders=[folder], models=["base"])
    assert time.monotonic() - begin < 300


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
def test_an_honest_task_file_runs(checkpoint: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    name, files = HONEST[case]
    (folder / "spell.yaml").unlink()
    for file, text in files.items():
        (folder / f"{file}.yaml").write_text(text)
    monkeypatch.chdir(folder.parent)  # data are found beside the task file, too
    found = evaluate_tasks(checkpoint, [name], folders=[folder], models=["base"])
    assert found.tasks["writes" if name == "writes" else "spell"].items == 4
    assert not (folder.parent / "ran").exists()


def test_the_flag_lets_code_run(checkpoint: Checkpoint, folder: Path) -> None:
    from modekit.run import Run

    said(**{"to_target: answer": "to_target: !function spell.target"})(folder)
    evaluate_tasks(checkpoint, ["spell"], folders=[folder], models=["base"], run=Run(trust_remote_code=True))
    assert (folder.parent / "ran").exists()


def test_a_task_that_is_too_large_asks_for_a_limit(
    checkpoint: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modekit.evaluation.tasks.harness._MOST_REQUESTS", 10)
    with pytest.raises(TextError, match="the task is too large"):
        evaluate_tasks(checkpoint, ["spell"], folders=[folder], models=["base"])
    assert evaluate_tasks(checkpoint, ["spell"], folders=[folder], models=["base"], limit=3).tasks["spell"].items == 3
    said(**{'"{{word}}"': "word"})(folder)
    (folder / "spell.jsonl").write_text(json.dumps({"word": "x" * 2**21, "answer": 0}))
    with pytest.raises(TextError, match="an item of more than"):
        evaluate_tasks(checkpoint, ["spell"], folders=[folder], models=["base"], limit=1)


@pytest.mark.slow
def test_no_file_takes_the_name_of_the_harness_s_own(checkpoint: Checkpoint, folder: Path) -> None:
    """Its thousands of files are looked through: half a minute."""
    (folder / "arc.yaml").write_text(OWN.replace("task: spell", "task: arc_easy"))
    (folder / "all.yaml").write_text(GROUP.format("arc_easy, hellaswag"))
    with pytest.raises(ModekitError, match="takes the name of one of the harness's own tasks"):
        evaluate_tasks(checkpoint, ["all"], folders=[folder], models=["base"])
