"""The clients that people have, as they come, against `modekit serve` and `modekit front`: litellm and llm.

OpenAI's own client is in test_keeper.py, which has what it is refused, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

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
