"""The tokenizer of a modekit checkpoint in plain transformers: no modekit, no question, no warning, no code that runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

from conftest import Workshop

OPENS = """
import builtins, importlib.abc, json, sys, warnings

class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modekit":
            raise ModuleNotFoundError("modekit is not installed here")

def ask(question=""):
    raise AssertionError(f"asked: {question}")

sys.meta_path.insert(0, Refused())
builtins.input = ask
warnings.simplefilter("error")
from transformers import AutoTokenizer, PreTrainedConfig

kwargs = {"config": PreTrainedConfig()} if sys.argv[2] == "config" else {"trust_remote_code": True}
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **kwargs)
ran = [name for name in sys.modules if name.startswith("transformers_modules.")]
chat = tokenizer.apply_chat_template([{"role": "user", "content": "law"}], tokenize=False)
print(json.dumps([type(tokenizer).__name__, tokenizer("the law of 1 code").input_ids, chat, len(ran)]))
"""


def opened(out: Path, way: str, modules: Path) -> tuple[str, list[int], str, int]:
    """Class, ids, a chat and how many modules of the checkpoint were run, in a process without modekit."""
    done = subprocess.run(
        [sys.executable, "-c", OPENS, str(out), way],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=modules,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_MODULES_CACHE": str(modules), "TRANSFORMERS_VERBOSITY": "warning"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    kind, ids, chat, ran = json.loads(done.stdout)
    return kind, ids, chat, ran


def test_it_opens_without_a_question_or_a_warning(workshop: Workshop, tmp_path: Path) -> None:
    (workshop.root / "base" / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    out = workshop.build(output={"format": "modekit"})
    expected = AutoTokenizer.from_pretrained(workshop.root / "base")
    ids = expected("the law of 1 code").input_ids
    for way, runs_code in (("config", False), ("trust", True)):
        kind, found, chat, ran = opened(out, way, tmp_path)
        assert (kind, found, chat, ran > 0) == (type(expected).__name__, ids, "<user>law", runs_code)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / file).read_bytes() == (workshop.root / "base" / file).read_bytes()
