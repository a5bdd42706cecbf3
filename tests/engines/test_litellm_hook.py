"""The hook alone, with LiteLLM's class taken for granted: what it makes of requests. test_litellm.py runs the proxy."""

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
