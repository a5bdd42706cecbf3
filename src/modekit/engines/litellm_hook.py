"""One address over many servers: LiteLLM's proxy, with a mixture's router as its hook.

    litellm_settings:
      callbacks: modekit.engines.litellm_hook.by_text

A request for the model `auto` goes to the model that is called as the expert whose text it is; which servers have that model,
how often one is asked again, keys and metrics are the proxy's. MODEKIT_MIXTURE in its environment is the mixture's folder, of
which the router and the tokenizer are read. Imported by LiteLLM's proxy alone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import HTTPException
from litellm.integrations.custom_logger import CustomLogger

from modekit.checkpoint.open import open_checkpoint
from modekit.errors import EngineError, ModekitError
from modekit.routing.text_router import TextRouter
from modekit.text.records import conversation_of

AUTO = "auto"
MIXTURE = "MODEKIT_MIXTURE"
_CHOSEN = "modekit_expert"
"""The key of a request's metadata under which the expert is kept for the answer's header."""


class ByText(CustomLogger):  # type: ignore[misc]
    """Names the model of requests for `auto`."""

    def __init__(self, router: TextRouter) -> None:
        super().__init__()
        self._router = router
        self._one = asyncio.Lock()

    async def async_pre_call_hook(
        self, user_api_key_dict: object, cache: object, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """The request with the expert's model in place of `auto`. Raises HTTPException for one without a text."""
        if data.get("model") == AUTO:
            async with self._one:  # a router reads one text at a time, and a long one must not hold up the others' answers
                data["model"] = await asyncio.to_thread(self._expert_of, data)
            data["metadata"] = {**(data.get("metadata") or {}), _CHOSEN: data["model"]}
        return data

    async def async_post_call_response_headers_hook(self, data: Mapping[str, Any], *_: object, **__: object) -> dict[str, str]:
        """The header that says who was chosen."""
        chosen = (data.get("metadata") or {}).get(_CHOSEN)
        return {"x-modekit-expert": quote(chosen)} if chosen else {}

    def _expert_of(self, data: Mapping[str, Any]) -> str:
        said = data.get("prompt")
        if not isinstance(said, str):
            conversation = conversation_of(data.get("messages"))
            if conversation is None:
                raise HTTPException(400, "to choose an expert, send messages of role and text, or one text as prompt")
            said = conversation.messages
        try:
            return self._router.decide(said).expert
        except ModekitError as error:
            raise HTTPException(400, error.what) from None


def _router() -> TextRouter:
    folder = os.environ.get(MIXTURE)
    if not folder:
        raise EngineError("no mixture is named", where=f"{MIXTURE} in the environment", remedy="give it the mixture's folder")
    return TextRouter(open_checkpoint(Path(folder).absolute()))


by_text = ByText(_router())
