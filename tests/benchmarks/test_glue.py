"""The recipe of fusion_bench's pool, on small stand-ins: a tiny T5 and adapters of the same modules and rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

import glue
from modekit.building.build import build
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from pair_models import pair_model, pair_tokenizer

RECIPE = yaml.safe_load(Path(glue.__file__).with_name("glue.yaml").read_text())
ROWS: dict[str, dict[str, Any]] = {
    "sentence": {"sentence": "a fever", "question": "what", "label": 1},
    "sentence1": {"sentence1": "the pulse", "sentence2": "a pulse", "question1": "who", "question2": "how", "label": 1},
    "premise": {"premise": "a nerve", "hypothesis": "a vein", "label": 2},
}
"""What a prompt names -> a row of GLUE with it."""


def row_of(task: glue.Task, number: int) -> dict[str, Any]:
    row = {key: value for every in ROWS.values() for key, value in every.items()}
    label = number % len(task.answers) if task.answers else number / 10
    return {key: f"{value} {number}" for key, value in row.items()} | {"label": label}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("glue")
    base = pair_model("t5", feed_forward_proj="gated-gelu")
    base.save_pretrained(root / "base")
    pair_tokenizer().save_pretrained(root / "base")
    said = json.loads(json.dumps(RECIPE))
    said["base_model"] = "./base"
    for place, expert in enumerate(said["experts"]):
        torch.manual_seed(place)
        config = LoraConfig(r=16, lora_alpha=32, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
        adapted = get_peft_model(pair_model("t5", feed_forward_proj="gated-gelu"), config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(str(root / expert["name"]))
        assert expert["adapter"] == f"tanganke/flan-t5-base_glue-{expert['name']}_lora-16"
        expert["adapter"] = f"./{expert['name']}"
        task = glue.TASKS[expert["name"]]
        for part, count in (("text", 60), ("held-out", 6)):
            path = root / part / f"{expert['name']}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(task.pair(row_of(task, number))) + "\n" for number in range(count)))
    build(make_plan(parse_recipe(said, where="glue.yaml"), root), root / "mixture")
    return root / "mixture"


def test_every_task_of_the_recipe_is_mixed_and_scored(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[list[str]] = []

    def keep(_task: glue.Task, written: list[str], _targets: list[str]) -> float:
        answers.append(written)
        return 6.0

    monkeypatch.setattr(glue.Task, "score", keep)
    found = glue.score(mixture, mixture.parent / "held-out")
    assert {*found} == {*glue.TASKS} == {expert["name"] for expert in RECIPE["experts"]}
    assert answers[::2] == answers[1::2]  # prompts differ in their words, so that the router finds each task's own adapter
    assert len({str(each) for each in answers[1::2]}) == 8 and found["cola"] == glue.Scored(6.0, 6.0)
    assert glue.table(found).splitlines()[-1] == "| mean | 6.000 | 6.000 | 1.000 |"


def test_scores_are_those_of_fusion_bench() -> None:
    assert glue.TASKS["qnli"].pair({"sentence": "s", "question": "q", "label": 0})["target"] == "yes"
    assert glue.TASKS["mrpc"].pair({"sentence1": "s", "sentence2": "q", "label": 0})["target"] == "no"
    assert glue.TASKS["stsb"].pair({"sentence1": "s", "sentence2": "q", "label": 3.75})["target"] == "3.8"
    assert glue.TASKS["rte"].score(["yes", "no ", "no"], ["yes", "no", "yes"]) == pytest.approx(1 / 3)
    assert glue.TASKS["stsb"].score(["1.0", "what", "4.2"], ["2.0", "1.0", "5.0"]) == pytest.approx(1.0)
    assert glue.Scored(0.6, 0.8).normalised == pytest.approx(0.75)
