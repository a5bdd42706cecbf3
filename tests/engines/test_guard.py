"""What stands before the servers of transformers and vLLM: key, paths, and sizes."""

from __future__ import annotations

import asyncio
import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException

from conftest import _WORDS
from domain_mixtures import lexical_mixture
from modekit.engines.guard import LARGEST_BODY, Guard


def asked(app: Any, content: bytes, path: str = "/v1/completions", method: str = "POST", key: str = "k") -> tuple[int, str]:
    """Status and answer; the request comes in two pieces."""
    sent: list[dict[str, Any]] = []
    pieces = [(content[:3], True), (content[3:], False)]

    async def receive() -> dict[str, Any]:
        body, more = pieces.pop(0)
        return {"type": "http.request", "body": body, "more_body": more}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    head = [(b"Content-Length", str(len(content)).encode()), (b"Authorization", f"Bearer {key}".encode())]
    asyncio.run(app({"type": "http", "path": path, "method": method, "headers": head}, receive, send))
    return sent[0]["status"], sent[1]["body"].decode()


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers what it was sent."""
    body = (await receive())["body"] if scope["method"] == "POST" else b"read"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize(
    ("content", "path", "method", "key", "status", "said"),
    [
        (b"no JSON at all", "/v1/completions", "POST", "k", 200, "no JSON at all"),
        (b"", "/health", "GET", "", 200, "read"),
        (b"", "/v1/models", "GET", "k", 200, "read"),
        (b"", "/v1/models", "GET", "x", 401, "key"),
        (b"{}", "/v1/completions", "POST", "", 401, "key"),
        (b"{}", "/load_model", "POST", "k", 404, "nothing"),
        (b"{}", "/v1/audio/transcriptions", "POST", "k", 404, "nothing"),
        (bytes(LARGEST_BODY + 1), "/v1/completions", "POST", "k", 413, "8,388,608 bytes"),
    ],
)
def test_who_comes_through(content: bytes, path: str, method: str, key: str, status: int, said: str) -> None:
    found, answer = asked(Guard(echo, "k"), content, path, method, key)
    assert found == status and said in answer


def test_without_a_key_all_comes_as_it_is() -> None:
    assert asked(Guard(echo, None), b"no JSON at all", key="") == (200, "no JSON at all")


@pytest.fixture(scope="module")
def hook(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("hook")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEKIT_MIXTURE", str(lexical_mixture(root).folder))
        for name in ("litellm", "litellm.integrations", "litellm.integrations.custom_logger"):
            patch.setitem(sys.modules, name, SimpleNamespace(CustomLogger=object) if "custom" in name else ModuleType(name))
        return importlib.import_module("modekit.engines.litellm_hook").by_text


def named(hook: Any, **data: Any) -> dict[str, Any]:
    found: dict[str, Any] = asyncio.run(hook.async_pre_call_hook(None, None, data, "completion"))
    return found


def test_the_model_is_the_expert_of_the_text(hook: Any) -> None:
    for expert in ("medicine", "law"):
        tool = [{"role": "assistant", "content": None, "tool_calls": [{}]}, {"role": "tool", "content": "7"}]
        turns = [{"role": "user", "content": [{"type": "text", "text": _WORDS[expert]}]}, *tool]
        for data in ({"prompt": _WORDS[expert]}, {"messages": turns}, {"messages": None, "prompt": _WORDS[expert]}):
            found = named(hook, model="auto", **data)
            assert found["model"] == expert
            assert asyncio.run(hook.async_post_call_response_headers_hook(found)) == {"x-modekit-expert": expert}
    assert named(hook, model="law", prompt=[1]) == {"model": "law", "prompt": [1]}


@pytest.mark.parametrize(
    "data",
    [
        *({"prompt": value} for value in ([1, 2], ["a", "b"], [{"x": 1}], [], 7)),
        *({"messages": value} for value in (7, None, [], ["x"], [{"role": 5, "content": "x"}])),
        {"input": "the heart"},
    ],
    ids=str,
)
def test_what_has_no_text_is_the_clients_error(hook: Any, data: dict[str, Any]) -> None:
    with pytest.raises(HTTPException, match="to choose an expert") as error:
        named(hook, model="auto", **data)
    assert error.value.status_code == 400
