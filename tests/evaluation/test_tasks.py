"""Tasks: questions from held-out text, and lm-evaluation-harness on every model."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.model import LM
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import modekit.evaluation.rows as rows_module
from command_line import ended
from conftest import Workshop, make_workshop, save, tiny_model
from damage import load_with_nan
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import CheckpointError, SourceError
from modekit.evaluation.tasks.evaluate import TaskSettings, evaluate_tasks
from modekit.evaluation.tasks.questions import (
    CHOICES,
    Entry,
    continuation_items,
    entries_of,
    gloss_items,
    head_words,
    key_of,
    make_questions,
)
from modekit.evaluation.tasks.results import TaskResults
from modekit.loaded.load import load_model, load_tokenizer
from modekit.text.documents import read_documents
from modekit.text.splits import documents_of_split
from refusal import refuse

TREE = "any of several trees [bold]not bold[/] {{ 7 * 7 }} of the genus"


def invented(chance: random.Random) -> str:
    return "".join(chance.choice("bdfgklmnprst") + chance.choice("aeiou") for _ in range(3))


def dictionary(name: str, documents: int, entries: int = 5, again: str = "") -> list[str]:
    """Documents of entries with invented terms, two synonyms each; `again` is a head word that some documents repeat."""
    chance = random.Random(name)
    texts = []
    for number in range(documents):
        heads = [f"{invented(chance).capitalize()}, {invented(chance)}" for _ in range(entries)]
        if again and number % 2:
            heads[-1] = f"{invented(chance).capitalize()}, {again}"
        texts.append(" ".join(f"{head}: {TREE} {invented(chance)} {invented(chance)}." for head in heads))
    return texts


def prose(name: str, documents: int, words: int = 70) -> list[str]:
    chance = random.Random(name)
    return ["\n".join(" ".join(invented(chance) for _ in range(7)) for _ in range(words // 7)) for _ in range(documents)]


def write(path: Path, documents: list[str]) -> None:
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents) + "\n")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A workshop whose medicine and law are dictionaries, in part of the same terms, and whose code is none."""
    workshop = make_workshop(tmp_path_factory.mktemp("asked"), max_position_embeddings=1024)
    write(workshop.root / "text" / "medicine.jsonl", dictionary("medicine", 130, again="dosis"))
    write(workshop.root / "text" / "law.jsonl", dictionary("law", 130, again="Dosis"))
    write(workshop.root / "text" / "code.jsonl", prose("code", 60))
    workshop.build()
    return workshop


@pytest.fixture(scope="module")
def checkpoint(asked: Workshop) -> Checkpoint:
    return open_checkpoint(asked.root / "OUT")


def held_out(workshop: Workshop, domain: str, split: str = "report") -> list[str]:
    documents = read_documents([f"text/{domain}.jsonl"], root=workshop.root, where=domain)
    return documents_of_split(documents, split)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------- entries


def test_entries_are_read_as_they_stand() -> None:
    text = (
        'Croup, spasmodic laryngitis: a disease: of "children"; harsh coughing. Tuberculosis, TB, T.B.: infection by bacilli. '
        "Down, John L. H. Down: English physician who described vitamin A. 4-wheeler: [red]a car[/]"
    )
    assert entries_of(text) == [
        Entry("Croup, spasmodic laryngitis", ("Croup", "spasmodic laryngitis"), 'a disease: of "children"; harsh coughing'),
        Entry("Tuberculosis, TB, T.B.", ("Tuberculosis", "TB", "T.B."), "infection by bacilli"),
        Entry("Down, John L. H. Down", ("Down", "John L. H. Down"), "English physician who described vitamin A"),
        Entry("4-wheeler", ("4-wheeler",), "[red]a car[/]"),
    ]


# -------------------------------------------------------------------------------------------------------------- questions


def test_the_right_answer_is_in_the_text_and_the_wrong_ones_are_not(asked: Workshop) -> None:
    documents = held_out(asked, "law")
    items = gloss_items(documents, set(), random.Random(0))
    assert len(items) > 30
    for item in items:
        right, wrong = item["heads"][item["answer"]], [h for i, h in enumerate(item["heads"]) if i != item["answer"]]
        assert len(set(map(key_of, item["heads"]))) == CHOICES
        assert any(f"{right} {item['gloss']}" in document for document in documents)
        assert not any(f"{head} {item['gloss']}" in document for document in documents for head in wrong)
        assert item["gloss"].startswith(TREE)  # markup and templates in text are text
    answers = [item["answer"] for item in items]
    assert {answers.count(place) > 0 for place in range(CHOICES)} == {True}


def test_no_question_has_two_right_answers() -> None:
    documents = [
        "Ague, fever: a shaking chill. Febris, Fever: another gloss. Chill, ague: a third gloss. Shiver: a shaking chill.",
        "Alpha: first. Beta: second. Gamma: third. Delta: fourth.",
    ]
    for seed in range(20):
        for item in gloss_items(documents, set(), random.Random(seed)):
            firsts = [head for head in item["heads"] if head.startswith(("Ague", "Febris", "Chill", "Shiver"))]
            assert firsts in ([], ["Ague, fever:"])


def test_questions_depend_on_text_alone(checkpoint: Checkpoint) -> None:
    assert make_questions(checkpoint) == make_questions(checkpoint)


def test_no_term_that_was_seen_is_asked_for(asked: Workshop, checkpoint: Checkpoint) -> None:
    """Looked for in the text itself, not by the parser: also in another domain, another case, and as a second synonym."""
    made, _ = make_questions(checkpoint)
    fit = [text.casefold() for domain in ("medicine", "law", "code") for text in held_out(asked, domain, "fit")]
    assert "dosis" in head_words(held_out(asked, "law"))  # or the test would prove nothing
    heads = [head for q in made if q.form == "glosses" for item in q.items for head in item["heads"]]
    assert heads
    for term in {term for head in heads for term in head.removesuffix(":").casefold().split(", ")}:
        head_word = re.compile(rf"(^|\. |, ){re.escape(term)}(, [^:.]*)?: ")
        assert not any(head_word.search(document) for document in fit), term


def test_continuations_are_cut_at_words_and_stay_as_they_are(asked: Workshop) -> None:
    documents = held_out(asked, "code")
    items = continuation_items(documents, random.Random(0))
    assert len(items) > 8
    for item in items:
        whole = item["beginning"] + item["continuations"][item["answer"]]
        (home,) = [document for document in documents if whole in document]
        assert len({" ".join(c.split()) for c in item["continuations"]}) == CHOICES
        assert {len(c.split()) for c in item["continuations"]} == {16} and len(item["beginning"].split()) == 16
        assert all(c[0].isspace() for c in item["continuations"]) and not item["beginning"][-1].isspace()
        assert not any(c in home for i, c in enumerate(item["continuations"]) if i != item["answer"])


def test_too_little_text_says_so(workshop: Workshop) -> None:
    workshop.build()
    message = refuse("eval-tasks", workshop.root / "OUT", "questions")
    assert "no domain has enough held-out text for questions" in message and "passages of 32 words from 4 documents" in message
    workshop.recipe["experts"] = [{**expert, "text": None} for expert in workshop.recipe["experts"]]
    workshop.build()
    assert "there is no text to evaluate on" in refuse("eval-tasks", workshop.root / "OUT", "questions")


def direct(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> float:
    """Log p(continuation | context), one text at a time, token by token."""
    before = tokenizer(context)["input_ids"] if context.strip() else [tokenizer.bos_token_id]
    ids = (tokenizer(context)["input_ids"] if context else [tokenizer.bos_token_id]) + tokenizer(continuation)["input_ids"]
    before = tokenizer(context.rstrip())["input_ids"] if context else before
    with torch.inference_mode():
        log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[place - 1, ids[place]]) for place in range(len(before), len(ids)))


# --------------------------------------------------------------------------------------------------------------- whole runs


class Oracle(LM):  # type: ignore[misc]
    """Knows every right answer, or none: then it guesses by the hash of what it is asked."""

    knows = True

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        if not self.knows:
            return [(-1 - random.Random(str(r.args)).random() * len(r.args[1]), False) for r in requests]
        return [(0.0 if self._is_right(r) else -100.0, False) for r in requests]

    def _is_right(self, request: Any) -> bool:
        doc, (context, text) = request.doc, request.args
        if "gloss" in doc:
            return bool(doc["heads"].index(context) == doc["answer"])
        return context != "" and doc["continuations"].index(text) == doc["answer"]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which models are loaded."""
    loaded: list[str] = []

    def counted(folder: Path, **options: Any) -> PreTrainedModel:
        loaded.append(folder.name)
        return load_model(folder, **options)

    monkeypatch.setattr(rows_module, "load_model", counted)
    monkeypatch.setattr("modekit.loaded.experts.load_model", counted)
    yield loaded


def test_who_knows_gets_everything_and_who_guesses_a_quarter(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, loads: list[str]
) -> None:
    monkeypatch.setattr(huggingface, "HFLM", Oracle)
    found = evaluate_tasks(checkpoint, ["questions"], TaskSettings(models=["mixture"]))
    assert loads == ["OUT"]
    values = {group: scores.rows["mixture"].value for group, scores in found.means().items()}
    assert values == dict.fromkeys(["questions", "glosses", "continuations"], 1.0)
    assert found.means()["glosses"].rows["mixture"].error == 0.0
    assert found.means()["questions"].metric == "accuracy" and found.means()["questions"].items > 16
    monkeypatch.setattr(Oracle, "knows", False)
    guessed = evaluate_tasks(checkpoint, ["questions"], TaskSettings(models=["mixture"]))
    for form in ("glosses", "continuations"):
        assert guessed.means()[form].rows["mixture"].value == pytest.approx(0.25, abs=0.13)


def test_every_model_is_loaded_once_and_its_answers_are_its_own(checkpoint: Checkpoint, loads: list[str]) -> None:
    found = evaluate_tasks(checkpoint, ["glosses"], TaskSettings(limit=12))
    assert loads == ["base", "medicine", "law", "code", "OUT"]
    assert found.models == ["base", "medicine", "law", "code", "mixture"]
    name = "modekit_law_glosses"
    scores = found.tasks[name]
    assert (scores.metric, scores.higher_is_better, scores.items) == ("acc", True, 12)
    lines = (checkpoint.folder / "results" / "tasks" / "law_glosses.jsonl").read_text().splitlines()
    tokenizer = load_tokenizer(checkpoint.folder)
    for row, folder in (("base", checkpoint.folder.parent / "base"), ("mixture", checkpoint.folder)):
        model, right = load_model(folder), 0
        for item in map(json.loads, lines[:12]):
            likely = [direct(model, tokenizer, head, " " + item["gloss"]) for head in item["heads"]]
            right += likely.index(max(likely)) == item["answer"]
        share = right / 12
        assert scores.rows[row].value == pytest.approx(share)
        assert scores.rows[row].error == pytest.approx((share * (1 - share) / 11) ** 0.5)


def test_the_harness_itself_runs_what_was_written(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder, with stock HFLM: the same score."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    ours = evaluate_tasks(checkpoint, ["continuations"], TaskSettings(models=["mixture"], limit=8))
    monkeypatch.chdir(checkpoint.folder / "results" / "tasks")
    lm = HFLM(pretrained=str(checkpoint.folder), device="cpu", dtype="float32", batch_size=1)
    manager = TaskManager(include_path=".", include_defaults=False)
    theirs = simple_evaluate(lm, tasks=["modekit_continuations"], task_manager=manager, limit=8, bootstrap_iters=0)
    assert theirs is not None
    compared = 0
    for name, scores in ours.tasks.items():
        if name in theirs["results"]:
            value = theirs["results"][name][f"{scores.metric},none"]
            assert scores.rows["mixture"].value == pytest.approx(value, rel=1e-5)
            compared += 1
    assert compared >= 2


OWN = """task: spell
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{word}}}}"
doc_to_choice: ["a", "b", "c"]
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def own_task(folder: Path, **changes: str) -> Path:
    """A task of one's own, with pieces of its file replaced."""
    folder.mkdir()
    (folder / "spell.jsonl").write_text("\n".join(json.dumps({"word": f"word {n}", "answer": n % 3}) for n in range(9)))
    text = OWN.format(file=folder / "spell.jsonl")
    for old, new in changes.items():
        text = text.replace(old, new)
    (folder / "spell.yaml").write_text(text)
    return folder


def unmeasured(folder: Path) -> Path:
    """A task that names no metric."""
    file = own_task(folder) / "spell.yaml"
    file.write_text(file.read_text().partition("metric_list:")[0] + "metric_list: []\n")
    return folder


def own(folder: Path, *models: str) -> TaskSettings:
    """Tasks of a folder that the user has read."""
    return TaskSettings(models=models, folders=[folder], trusted=True)


def share_right(checkpoint: Checkpoint, answers: Sequence[str]) -> float:
    """Of the task of one's own, each answer of each question read alone."""
    model, tokenizer, right = load_model(checkpoint.folder), load_tokenizer(checkpoint.folder), 0
    for number in range(9):
        likely = [direct(model, tokenizer, f"word {number}", answer) for answer in answers]
        right += likely.index(max(likely)) == number % 3
    return right / 9


def test_a_task_of_one_s_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """And what is written of it."""
    found = evaluate_tasks(checkpoint, ["spell"], own(own_task(tmp_path / "tasks"), "base", "mixture"))
    scores = found.tasks["spell"]
    assert (scores.metric, scores.items) == ("acc_norm", 9)
    assert scores.rows["mixture"].value == pytest.approx(share_right(checkpoint, "abc"))
    data = json.loads((checkpoint.folder / "results" / "tasks.json").read_text())
    assert data["checkpoint"] == checkpoint.identity and list(data["tasks"]) == ["spell"]
    assert TaskResults.from_data(data) == TaskResults.find(checkpoint)
    assert str(scores.rows["base"]) in (checkpoint.folder / "results" / "tasks.md").read_text()


def test_rows_of_models_that_are_not_asked_for_again_stay(checkpoint: Checkpoint, loads: list[str]) -> None:
    """Where they were asked the same, and the file is this user's own."""
    first = evaluate_tasks(checkpoint, ["glosses"], TaskSettings(models=["law", "mixture"], limit=4))
    loads.clear()
    again = evaluate_tasks(checkpoint, ["glosses"], TaskSettings(models=["base", "mixture"], limit=4))
    assert loads == ["base", "OUT"] and again.models == ["base", "law", "mixture"]
    for name, scores in again.tasks.items():
        assert all(str(scores.rows[model]) == str(row) for model, row in first.tasks[name].rows.items())
    assert evaluate_tasks(checkpoint, ["glosses"], TaskSettings(models=["code"], limit=5)).models == ["code"]
    path = checkpoint.folder / "results" / "tasks.json"
    path.write_text(path.read_text() + " ")
    assert evaluate_tasks(checkpoint, ["glosses"], TaskSettings(models=["base"], limit=5)).models == ["base"]


def test_a_model_of_nan_has_no_score(
    asked: Workshop, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "load_model", load_with_nan)
    for names, settings in ((["spell"], own(own_task(tmp_path / "tasks"), "mixture")), (["glosses"], TaskSettings(limit=2))):
        with pytest.raises(CheckpointError, match="not finite"):
            evaluate_tasks(checkpoint, names, settings)


def test_no_router_reads_pads(workshop: Workshop, tmp_path: Path) -> None:
    """Answers of several lengths, each against the model on it alone."""
    router = {"fit": "random", "granularity": "context"}
    checkpoint = open_checkpoint(workshop.build(mixture={"method": "routing", "top_k": 2, "router": router}))
    letters = {'["a", "b", "c"]': '["a", "bbbbbbbb", "ccc"]', "acc_norm, aggregation": "acc, aggregation"}
    found = evaluate_tasks(checkpoint, ["spell"], own(own_task(tmp_path / "tasks", **letters), "mixture"))
    assert found.tasks["spell"].rows["mixture"].value == pytest.approx(share_right(checkpoint, ("a", "bbbbbbbb", "ccc")))


def test_a_model_that_changed_is_left_out(asked: Workshop, tmp_path: Path) -> None:
    """What it scores is not what the expert in the mixture would have scored."""
    workshop = Workshop(tmp_path, {**asked.recipe})
    for name in ("base", "medicine", "law", "code"):
        save(tiny_model(seed=1), tmp_path / name)
    (tmp_path / "text").symlink_to(asked.root / "text")
    checkpoint = open_checkpoint(workshop.build())
    save(tiny_model(seed=2), tmp_path / "law")
    tasks = own_task(tmp_path / "tasks")
    found = evaluate_tasks(checkpoint, ["spell"], own(tasks))
    assert found.models == ["base", "medicine", "code", "mixture"]
    assert any("law left out" in note and "model.safetensors" in note and "has changed" in note for note in found.notes)
    with pytest.raises(SourceError, match="none of the models that were asked for"):
        evaluate_tasks(checkpoint, ["spell"], own(tasks, "law"))


# ---------------------------------------------------------------------------------------------------------------- bad input


def test_what_is_wrong_is_said(asked: Workshop, tmp_path: Path) -> None:
    out = asked.root / "OUT"
    assert "expected: base, medicine, law, code, mixture" in refuse("eval-tasks", out, "glosses", "--models", "all")
    code, _, error = ended("eval-tasks", out, "x", "--include-path", tmp_path / "none")
    assert code == 2 and "does not exist" in error
    assert "no task is left to run" in refuse("eval-tasks", out, " , ")
    tasks = own_task(tmp_path / "own")
    message = refuse("eval-tasks", out, "spell", "--include-path", tasks)
    assert "task files can run code" in message and "--trust-tasks" in message
    wrong = own_task(tmp_path / "a", **{"word": "nothing"})
    message = refuse("eval-tasks", out, "spell", "--include-path", wrong, "--trust-tasks")
    assert "task spell" in message and "'nothing' is undefined" in message
    assert "task spell" in refuse("eval-tasks", out, "spell", "--include-path", unmeasured(tmp_path / "b"), "--trust-tasks")


def test_without_the_extra(asked: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    assert "pip install 'modekit[eval]'" in refuse("eval-tasks", asked.root / "OUT", "glosses")


def only_stages(stderr: str) -> bool:
    return all(re.match(r"\d+:\d\d  (starting|prepare tasks|score |load )", line) for line in stderr.splitlines())


def test_at_the_command_line(asked: Workshop) -> None:
    """Nothing of the harness's noise, and JSON that is JSON."""
    folder = asked.build("shown")
    options = ["questions", "--limit", "6", "--models", "base,mixture"]
    done = subprocess.run(
        [sys.executable, "-m", "modekit", "eval-tasks", str(folder), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and only_stages(done.stderr), done.stderr
    assert "acc_mutual_info" in done.stdout and "guessing scores" in done.stdout and "tasks.json, tasks.md" in done.stdout
    code, printed, stages = ended("eval-tasks", folder, "continuations", *options[1:], "--json")
    assert code == 0 and only_stages(stages), stages
    assert json.loads(printed)["tasks"]["modekit_code_continuations"]["items"] == 6
