"""`plan` says what is wrong with a text, in the words of the build that would refuse it, and soon."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import ended
from conftest import Workshop
from refusal import borrow, run_python

MIXTURE = {"router": {"fit": "lexical", "orders": [1, 2], "buckets": 64}}


@pytest.fixture
def bench(tmp_path: Path, shared_workshop: Workshop) -> Workshop:
    workshop = borrow(shared_workshop, tmp_path)
    workshop.recipe["mixture"] = MIXTURE
    return workshop


def test_a_plan_reads_text_without_torch(bench: Workshop) -> None:
    done = run_python(PLANS, "plan", bench.write())
    assert done.returncode == 0, done.stdout + done.stderr


PLANS = """
import sys
from modekit.cli import app
try:
    app()
finally:
    assert not {'torch', 'transformers'} & set(sys.modules)
"""


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
