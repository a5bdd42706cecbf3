"""The real LiteLLM proxy with deploy/litellm.yaml before two servers: whose text a request is, what a dead server costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from asking import asked, opened
from byte_level import save_byte_model
from chatting import TEMPLATE
from conftest import _WORDS
from domain_mixtures import TWO, lexical_mixture
from modekit.engines.child import Child
from modekit.engines.converter import convert
from modekit.engines.serve import free_port
from waiting import until

pytestmark = pytest.mark.litellm
CONFIG = Path(__file__).parents[2] / "deploy" / "litellm.yaml"
KEY = "sk-clients"
TEXTS = {name: _WORDS[name] for name in TWO}


class Proxy:
    """The proxy before two servers of each model; llama.cpp has a process for each."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        save_byte_model(root / "base", "llama", 9, max_position_embeddings=4096)
        (root / "base" / "chat_template.jinja").write_text(TEMPLATE)
        mixture = lexical_mixture(root, "base", max_position_embeddings=4096)
        for name in ("base", *TWO):
            convert(root / name, root / f"{name}.gguf", "f32")
        self._root, self._stack = root, stack
        self.workers: dict[tuple[str, str], tuple[Child, str]] = {}
        config = yaml.safe_load(CONFIG.read_text())
        for row in config["model_list"]:
            said = row["litellm_params"]
            said["api_base"] = f"{self._worker(said['model'].removeprefix('openai/'), said['api_base'])}/v1"
        (root / "config.yaml").write_text(yaml.safe_dump(config))
        port = free_port("127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{port}"
        said = {"MODEKIT_MIXTURE": str(mixture.folder), "LITELLM_MASTER_KEY": KEY, "WORKERS_KEY": "secret"}
        said |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
        command = [Path(sys.executable).with_name("litellm"), "--config", root / "config.yaml", "--telemetry", "False"]
        log = stack.enter_context((root / "proxy.log").open("w"))
        words = [*map(str, command), "--host", "127.0.0.1", "--port", str(port)]
        self.process = subprocess.Popen(words, env={**os.environ, **said}, stdout=log, stderr=log, cwd=root)
        stack.callback(self.process.wait)
        stack.callback(self.process.terminate)
        until(lambda: self.process.poll() is not None or self.asked("/health/liveliness")[0] == 200)
        assert self.process.poll() is None, (root / "proxy.log").read_text()[-4_000:]

    def _worker(self, model: str, server: str) -> str:
        """The address of a server's process for a model."""
        if (model, server) not in self.workers:
            settings = {"model": str(self._root / f"{model}.gguf"), "name": model, "host": "127.0.0.1", "port": 0}
            settings |= {"key": "secret", "context": 4096, "parallel": 4, "threads": 1, "exact": False}
            child = self._stack.enter_context(Child("modekit.engines.llama_process", settings))
            answer = child.answer()
            assert answer is not None, child.complaint()
            self.workers[model, server] = child, answer["address"]
        return self.workers[model, server][1]

    def asked(self, path: str, body: object = None, *, key: str = KEY) -> tuple[int, dict[str, str], str]:
        """Status, headers and answer."""
        return asked(self.address + path, body, key=key)

    def complete(self, prompt: str, **more: Any) -> tuple[int, dict[str, str], str]:
        return self.asked("/v1/completions", {"model": "auto", "prompt": prompt, "max_tokens": 6, "temperature": 0, **more})


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with ExitStack() as stack:
        yield Proxy(tmp_path_factory.mktemp("litellm"), stack)


def test_a_text_goes_to_its_expert(proxy: Proxy) -> None:
    for expert, text in TEXTS.items():
        status, headers, answer = proxy.complete(text)
        assert status == 200 and headers["x-modekit-expert"] == expert
        _, outright, same = proxy.complete(text, model=expert)
        assert "x-modekit-expert" not in outright
        assert json.loads(same)["choices"][0]["text"] == json.loads(answer)["choices"][0]["text"]
        chat = {"model": "auto", "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}], "max_tokens": 4}
        status, headers, answer = proxy.asked("/v1/chat/completions", {**chat, "stream": True})
        assert status == 200 and headers["x-modekit-expert"] == expert and answer.rstrip().endswith("data: [DONE]")


def test_what_has_no_text_and_who_has_no_key_is_refused(proxy: Proxy) -> None:
    status, _, said = proxy.complete([1, 2])  # type: ignore[arg-type]
    assert status == 400 and "to choose an expert" in said
    assert proxy.asked("/v1/models", key="sk-wrong")[0] in {400, 401}
    assert {each["id"] for each in json.loads(proxy.asked("/v1/models")[2])["data"]} == {"auto", "base", *TWO}


def test_no_request_is_lost_where_a_server_is_killed(proxy: Proxy) -> None:
    (child, _), *_ = (worker for (model, _), worker in proxy.workers.items() if model == "law")

    def ask(number: int) -> tuple[int, str]:
        if number == 20:
            os.kill(child._process.pid, signal.SIGKILL)
        status, headers, said = proxy.complete(TEXTS["law"], max_tokens=60)
        return status, headers.get("x-modekit-expert", said)

    with ThreadPoolExecutor(8) as pool:
        answers = Counter(pool.map(ask, range(50)))
    assert answers == {(200, "law"): 50} and not child.is_running()


def test_a_stream_of_a_server_that_is_killed_ends_with_an_error(proxy: Proxy) -> None:
    body = {"model": "auto", "prompt": TEXTS["medicine"], "max_tokens": 4_000, "ignore_eos": True, "stream": True}
    with opened(f"{proxy.address}/v1/completions", body, key=KEY) as stream:
        lines = [stream.readline()]
        for (model, _), (child, _) in proxy.workers.items():
            if model == "medicine":
                os.kill(child._process.pid, signal.SIGKILL)
        lines += stream.readlines()
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: {")]
    assert "choices" in events[0] and "error" in events[-1], lines[-3:]
