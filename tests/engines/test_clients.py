"""The clients that people have, as they come, against `modekit serve` and `modekit front`: litellm, llm, and Open
WebUI where it is installed.

OpenAI's own client is in test_keeper.py, which has what it is refused, too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

from byte_level import save_byte_model
from chatting import TEMPLATE
from domain_mixtures import TWO, built, model_experts
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.engines.front import Front
from modekit.engines.listening import answering, bound_socket, url_of
from modekit.engines.registry import GgufSettings, ServeSettings
from modekit.engines.run_front import FrontSettings, front_of
from modekit.engines.serve import serving
from waiting import until

pytestmark = pytest.mark.slow
CHAT = [{"role": "user", "content": "licence clause court tort deed"}]


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Where a mixture is served, and where a front stands before that server, whose model it takes for law's."""
    root = tmp_path_factory.mktemp("clients")
    experts = model_experts(root, TWO)
    save_byte_model(root / "base", "llama", 9)
    (root / "base" / "chat_template.jinja").write_text(TEMPLATE)
    recipe = {"base_model": "./base", "experts": experts, "mixture": {"router": {"fit": "lexical"}}}
    checkpoint: Checkpoint = built(root, recipe, "mixture")
    with ExitStack() as stack:
        settings = ServeSettings("llama", port=0, context=128, gguf=GgufSettings("f32"))
        served = stack.enter_context(serving(checkpoint, settings))
        names = [f"{name}=mixture" for name in (*TWO, "base")]
        front: Front = front_of(checkpoint, FrontSettings(workers=[served.address], names=names), "127.0.0.1")
        listener = stack.enter_context(bound_socket("127.0.0.1", 0))
        stack.enter_context(answering(front.app(), listener))
        until(lambda: bool(front.workers.models))
        yield {"mixture": f"{served.address}/v1", "auto": f"{url_of(*listener.getsockname()[:2])}/v1"}


@pytest.mark.parametrize("model", ["mixture", "auto"])
def test_openais_client(addresses: dict[str, str], model: str) -> None:
    with openai.OpenAI(api_key="none", base_url=addresses[model], max_retries=0, timeout=120) as ai:
        assert model in [each.id for each in ai.models.list()] and ai.models.retrieve(model).owned_by == "modekit"
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
            ai.models.retrieve("gpt-4")
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
            ai.chat.completions.create(model="gpt-4", messages=CHAT)
        whole = ai.chat.completions.create(model=model, messages=CHAT, max_tokens=6, temperature=0)
        pieces = ai.chat.completions.create(model=model, messages=CHAT, max_tokens=6, temperature=0, stream=True)
        streamed = "".join(each.choices[0].delta.content or "" for each in pieces if each.choices)
        assert streamed and str(whole.choices[0].message.content).startswith(streamed)  # half a character is not streamed
        assert ai.completions.create(model=model, prompt="the court", max_tokens=3).usage.completion_tokens > 0
        for refused in ({"echo": True}, {"logprobs": 1}):
            with pytest.raises(openai.BadRequestError, match=next(iter(refused))):
                ai.completions.create(model=model, prompt="the", max_tokens=1, **refused)


@pytest.mark.parametrize("model", ["mixture", "auto"])
def test_litellm(addresses: dict[str, str], model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network
    litellm = pytest.importorskip("litellm")
    asked = {"model": f"openai/{model}", "api_base": addresses[model], "api_key": "none", "messages": CHAT, "max_tokens": 6}
    whole = litellm.completion(**asked, temperature=0)
    pieces = litellm.completion(**asked, temperature=0, stream=True)
    streamed = "".join(each.choices[0].delta.content or "" for each in pieces)
    assert streamed and str(whole.choices[0].message.content).startswith(streamed)
    assert whole.usage.completion_tokens > 0
    with pytest.raises(litellm.NotFoundError, match="there is no model 'gpt-4'"):
        litellm.completion(**{**asked, "model": "openai/gpt-4"})


@pytest.mark.parametrize("model", ["mixture", "auto"])
def test_llm(addresses: dict[str, str], model: str, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    models = [{"model_id": "mine", "model_name": model, "api_base": addresses[model]}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # which is YAML, too
    command = [sys.executable, "-m", "llm", "-m", "mine", "-o", "max_tokens", "6", "--key", "none", CHAT[0]["content"]]
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    for more in ([], ["--no-stream"]):
        done = subprocess.run([*command, *more], capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr


OPEN_WEBUI = os.environ.get("OPEN_WEBUI") or shutil.which("open-webui")


@pytest.mark.skipif(OPEN_WEBUI is None, reason="open-webui is not installed; OPEN_WEBUI names one of another environment")
@pytest.mark.parametrize("model", ["mixture", "auto"])
def test_open_webui(addresses: dict[str, str], model: str, tmp_path: Path) -> None:
    with bound_socket("127.0.0.1", 0) as free:
        port = str(free.getsockname()[1])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OPENAI_API_BASE_URL": addresses[model], "OPENAI_API_KEY": "none", "DATA_DIR": str(tmp_path)}
    environment |= {"WEBUI_AUTH": "False", "ENABLE_OLLAMA_API": "False", "OFFLINE_MODE": "True", "HF_HUB_OFFLINE": "1"}
    command = [str(OPEN_WEBUI), "serve", "--host", "127.0.0.1", "--port", port]
    address = f"http://127.0.0.1:{port}"
    with (tmp_path / "said.log").open("w") as said:
        running = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=said)
    try:
        until(lambda: running.poll() is not None or _asked(f"{address}/health", "")["status"])
        token = _asked(f"{address}/api/v1/auths/signin", "", {"email": "", "password": ""})["token"]
        assert model in [each["id"] for each in _asked(f"{address}/api/models", token)["data"]]
        wanted = {"model": model, "messages": CHAT, "max_tokens": 6, "stream": False}
        answer = _asked(f"{address}/api/chat/completions", token, wanted)
        assert answer["choices"][0]["message"]["content"] and answer["usage"]["completion_tokens"] > 0
    finally:
        running.terminate()
        running.wait(timeout=60)


def _asked(address: str, token: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
    return found
