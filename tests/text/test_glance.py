"""`plan` says what is wrong with a text, in the words of the build that would refuse it, and soon."""

from __future__ import annotations

import json

import pytest

from command_line import ended
from conftest import Workshop
from refusal import without_torch

MIXTURE = {"router": {"fit": "lexical", "orders": [1, 2], "buckets": 64}}


@pytest.fixture
def bench(bench: Workshop) -> Workshop:
    bench.recipe["mixture"] = MIXTURE
    return bench


def test_a_plan_reads_text_without_torch(bench: Workshop) -> None:
    without_torch("plan", bench.write())


def test_too_little_text_and_one_model_twice_are_noted(bench: Workshop) -> None:
    (bench.root / "law.jsonl").write_text("".join(json.dumps({"text": f"hello world {n}"}) + "\n" for n in range(3)))
    bench.recipe["experts"][1]["text"] = "./law.jsonl"
    bench.recipe["experts"][2]["model"] = bench.recipe["experts"][1]["model"]
    recipe = bench.write()
    code, planned, _ = ended("plan", recipe)
    said = " ".join(planned.split())
    assert code == 0 and "law: 78 bytes of text are too little" in said, said
    assert "law and code are one model" in said
    code, built, before = ended("build", recipe, bench.root / "OUT")
    assert code == 0 and "bytes of text are too little" in before and "too little" not in built
