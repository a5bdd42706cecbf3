"""Adapters over one base in the real vLLM, behind the front: by name, by text, and loaded and let go while it runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from byte_level import byte_tokenizer, save_byte_model
from command_line import modekit
from conftest import _WORDS as TEXTS
from domain_mixtures import adapter_experts, built
from modekit.engines.listening import free_port
from modekit.engines.registry import ENGINES
from modekit.engines.vllm_process import SERVER
from waiting import until

pytestmark = pytest.mark.vllm

LATER = "code"
COUNT = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, adapters over it, and their mixture."""
    root = tmp_path_factory.mktemp("adapters")
    save_byte_model(root / "base", "llama", 9, head_dim=32)
    experts = adapter_experts(root, tuple(TEXTS))
    built(root, {"base_model": "./base", "experts": experts, "mixture": {"router": {"fit": "ngram"}}})
    modekit("export", root / "OUT", root / "ADAPTERS", "--expert", "medicine", "--expert", "law")
    return root


@pytest.fixture(scope="module")
def vllm(root: Path) -> Iterator[str]:
    """The base in vLLM, which takes adapters at run time."""
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
    ]
    environment = {**os.environ, **ENGINES["vllm"].environment(), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    process = subprocess.Popen([sys.executable, "-m", SERVER, *words], cwd=root, env=environment, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(f"{address}/health"))
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.fixture(scope="module")
def front(root: Path, vllm: str) -> Iterator[str]:
    """The address of the front before it."""
    command = [sys.executable, "-m", "modekit", "front", str(root / "OUT"), "--worker", vllm, "--port", "0"]
    process = subprocess.Popen([*command, "--adapters", str(root / "ADAPTERS")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().split("/v1")[0]
    process.terminate()
    process.wait(30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def served(front: str) -> set[str]:
    with urllib.request.urlopen(f"{front}/v1/models", timeout=30) as answer:
        return {each["id"] for each in json.load(answer)["data"]}


def asked(front: str, model: str, prompt: str) -> tuple[list[int], Any]:
    """Tokens that are written, and the head of the answer."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": COUNT,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(f"{front}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["token_ids"], answer.headers


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


def test_each_adapter_writes_what_peft_writes(root: Path, front: str) -> None:
    until(lambda: {"medicine", "law"} <= served(front))
    for expert in ("base", "medicine", "law"):
        for prompt in prompts():
            assert asked(front, expert, prompt)[0] == in_peft(root, expert, prompt), expert
    assert len({str(in_peft(root, expert, prompts()[0])) for expert in ("base", "medicine", "law", "code")}) > 2


def test_a_text_goes_to_its_adapter(root: Path, front: str) -> None:
    for expert in ("medicine", "law"):
        ids, headers = asked(front, "auto", TEXTS[expert])
        assert headers["x-modekit-expert"] == expert and ids == in_peft(root, expert, TEXTS[expert])


def test_adapters_come_and_go_while_it_runs(root: Path, front: str) -> None:
    """One that is exported later is loaded; one that is written again is another; one that is taken away is let go."""
    assert asked(front, "auto", TEXTS[LATER])[1]["x-modekit-expert"] == "base"  # nobody has it yet
    modekit("export", root / "OUT", root / "ADAPTERS", "--expert", LATER)
    until(lambda: LATER in served(front))
    for prompt in prompts():
        assert asked(front, LATER, prompt)[0] == in_peft(root, LATER, prompt)
    assert asked(front, "auto", TEXTS[LATER])[1]["x-modekit-expert"] == LATER
    shutil.copy(root / "law-adapter" / "adapter_model.safetensors", root / "ADAPTERS" / LATER / "adapter_model.safetensors")
    law = [in_peft(root, "law", prompt) for prompt in prompts()]
    assert law[-1] != in_peft(root, LATER, prompts()[-1])  # the one whose beginning vLLM keeps
    assert len(byte_tokenizer()(prompts()[-1])["input_ids"]) > 128
    until(lambda: [asked(front, LATER, prompt)[0] for prompt in prompts()] == law)
    shutil.rmtree(root / "ADAPTERS" / LATER)
    until(lambda: LATER not in served(front))
    with pytest.raises(urllib.error.HTTPError, match="404"):
        asked(front, LATER, prompts()[0])
    assert {"base", "medicine", "law"} <= served(front)
