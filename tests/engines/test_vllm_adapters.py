"""Adapters that `modekit export` wrote, over one base in the real vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from asking import asked, opened
from byte_level import byte_tokenizer, save_byte_model
from command_line import modekit
from conftest import _WORDS as TEXTS
from domain_mixtures import adapter_experts, built
from modekit.engines.registry import ENGINES
from modekit.engines.serve import free_port
from modekit.engines.vllm_process import SERVER
from waiting import until

pytestmark = pytest.mark.vllm

COUNT = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, adapters over it, and their mixture."""
    root = tmp_path_factory.mktemp("adapters")
    save_byte_model(root / "base", "llama", 9, head_dim=32)
    experts = adapter_experts(root, tuple(TEXTS))
    mixture = {"router": {"fit": "lexical"}}
    built(root, {"base_model": "./base", "experts": experts, "mixture": mixture, "output": {"format": "modekit"}})
    modekit("export", root / "OUT", root / "ADAPTERS")
    return root


@pytest.fixture(scope="module")
def vllm(root: Path) -> Iterator[str]:
    """The base and its adapters in vLLM."""
    port = free_port("127.0.0.1", 0)
    words = [
        "--model",
        "./base",
        "--served-model-name",
        "base",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--max-num-seqs",
        "8",
        "--enable-lora",
        "--max-loras",
        "4",
        "--max-lora-rank",
        "8",
        "--lora-modules",
        *(f"{name}=ADAPTERS/{name}" for name in TEXTS),
    ]
    environment = {**os.environ, **ENGINES["vllm"].environment()}
    process = subprocess.Popen([sys.executable, "-m", SERVER, *words], cwd=root, env=environment, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: asked(f"{address}/health")[0] == 200)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def tokens_of(address: str, model: str, prompt: str) -> list[int]:
    """Those that are written."""
    said = {"max_tokens": COUNT, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with opened(f"{address}/v1/completions", {"model": model, "prompt": prompt, **said}) as answer:
        found: list[int] = json.load(answer)["choices"][0]["token_ids"]
    return found


@torch.no_grad()
def in_peft(root: Path, expert: str, prompt: str) -> list[int]:
    """What PEFT writes."""
    model = AutoModelForCausalLM.from_pretrained(root / "base")
    if expert != "base":
        model = peft.PeftModel.from_pretrained(model, root / f"{expert}-adapter")
    ids = byte_tokenizer()(prompt, return_tensors="pt")["input_ids"]
    made = model.generate(input_ids=ids, max_new_tokens=COUNT, do_sample=False, eos_token_id=None, pad_token_id=0)
    return [int(token) for token in made[0, ids.shape[1] :]]


def prompts() -> list[str]:
    """The last is longer than a block of vLLM's cache, whose keys and values it keeps by adapter."""
    return [*TEXTS.values(), " ".join([*TEXTS.values(), TEXTS["law"]])]


def test_each_adapter_writes_what_peft_writes(root: Path, vllm: str) -> None:
    for expert in ("base", *TEXTS):
        for prompt in prompts():
            assert tokens_of(vllm, expert, prompt) == in_peft(root, expert, prompt), expert
    assert len({str(in_peft(root, expert, prompts()[0])) for expert in ("base", *TEXTS)}) > 2
