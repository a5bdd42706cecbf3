"""`plan` says what is wrong with a text, in the words of the build that would refuse it, and soon."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from command_line import ended
from conftest import Workshop
from refusal import borrow, refuse, run_python

MIXTURE = {"router": {"fit": "lexical", "orders": [1, 2], "buckets": 64}}
BAD: dict[str, tuple[str, bytes]] = {
    "a table without text": ("law.csv", b"a,b\n1,2\n"),
    "packed": ("law.jsonl.gz", b"\x1f\x8b"),
    "latin-1": ("law.txt", b"caf\xe9 au lait"),
    "empty": ("law.txt", b" \n"),
    "no record": ("law.jsonl", b'{"body": "x"}\n'),
    "no parquet": ("law.parquet", b"PAR1"),
    "binary": ("law.md", b"a\x00b"),
    "not there": ("other.txt", b"x"),
    "pairs": ("law.jsonl", b'{"source": "a", "target": "b"}\n' * 3),
    "late": ("law.jsonl", b'{"text": "a document of some words"}\n' * 20_000 + b"{\n"),
}


@pytest.fixture
def bench(tmp_path: Path, shared_workshop: Workshop) -> Workshop:
    workshop = borrow(shared_workshop, tmp_path)
    workshop.recipe["mixture"] = MIXTURE
    return workshop


@pytest.mark.parametrize("kind", BAD)
def test_plan_and_build_say_the_same(bench: Workshop, kind: str) -> None:
    name, content = BAD[kind]
    (bench.root / name).write_bytes(content)
    bench.recipe["experts"][1]["text"] = f"./{name.replace('other', 'law')}"
    recipe = bench.write()
    planned = refuse("plan", recipe)
    assert planned == refuse("build", recipe, bench.root / "OUT") and "experts[1] 'law': text" in planned
    assert not (bench.root / "OUT").exists()


def test_text_that_only_an_evaluation_reads_is_looked_at_too(bench: Workshop) -> None:
    (bench.root / "music.txt").write_bytes(b"caf\xe9")
    recipe = bench.write(eval={"music": "./music.txt"})
    assert "eval.music: music.txt" in refuse("plan", recipe) == refuse("build", recipe, bench.root / "OUT")


def test_a_text_of_gigabytes_is_not_read_to_its_end(bench: Workshop) -> None:
    with (bench.root / "law.jsonl").open("w") as stream:
        stream.write('{"text": "a document of some words"}\n' * 200_000)
        stream.truncate(40 * 2**30)  # NULs: whoever reads on is refused
    bench.recipe["experts"][1]["text"] = "./law.jsonl"
    started = time.process_time()
    code, out, err = ended("plan", bench.write())
    assert code == 0, out + err
    assert time.process_time() - started < 20


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
    assert code == 0 and "law: its text is 3 documents with 39 characters, too little" in said, said
    assert "law and code are one model" in said
    code, built, _ = ended("build", recipe, bench.root / "OUT")
    said = " ".join(built.split())
    assert code == 0 and "law: its text is 3 documents" in said, said


def test_an_ordinary_mixture_has_no_such_note(bench: Workshop) -> None:
    code, planned, _ = ended("plan", bench.write())
    assert code == 0 and "too little" not in planned and "one model" not in planned
