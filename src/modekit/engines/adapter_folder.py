"""Adapters that workers load and let go while they run: those of a folder, as `modekit export OUT FOLDER` writes it.

FOLDER/<expert>/adapter_model.safetensors    the worker is to serve it under the expert's name

Workers must see the folder under the same path and take adapters at run time, as vLLM does with
VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. One that does not is left as it is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from modekit.sources.adapter import WEIGHTS_FILE

_LOAD, _UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_LOAD_S = 120.0  # in which a worker must have read an adapter
_LOG = logging.getLogger("modekit.front")


@dataclass
class AdapterFolder:
    """Which adapters are there, and which worker was told of which.

    Attributes:
        folder: where they lie.
        experts: whose they may be; other folders in it mean nothing.
        names: expert -> its name at the workers, where that is another.
    """

    folder: Path
    experts: Sequence[str]
    names: Mapping[str, str] = field(default_factory=dict)
    _told: dict[str, dict[str, int]] = field(default_factory=dict)  # worker's URL -> model -> when its file was written
    _unable: set[str] = field(default_factory=set)

    async def bring_to(self, url: str, models: frozenset[str], client: httpx2.AsyncClient) -> bool:
        """Have a worker, which serves `models`, load what is new or written again, and let go what is gone.

        Returns whether anything was changed.
        """
        if url in self._unable:
            return False
        told, there = self._told.setdefault(url, {}), self._there()
        gone = [model for model in told if model in models and there.get(model, (None, 0))[1] != told[model]]
        new = [model for model in there if model not in models or model in gone]
        for model in gone:
            await self._tell(url, _UNLOAD, {"lora_name": model}, client)
            del told[model]
        for model in new:
            path, written = there[model]
            if await self._tell(url, _LOAD, {"lora_name": model, "lora_path": str(path)}, client):
                told[model] = written
        return bool(gone or new)

    def forget(self, url: str) -> None:
        """A worker does not answer: it may be another one when it comes back."""
        self._told.pop(url, None)
        self._unable.discard(url)

    def _there(self) -> dict[str, tuple[Path, int]]:
        """Model -> its folder, and when its file was written."""
        found = {}
        for expert in self.experts:
            file = self.folder / expert / WEIGHTS_FILE
            if file.is_file():
                found[self.names.get(expert, expert)] = file.parent, file.stat().st_mtime_ns
        return found

    async def _tell(self, url: str, path: str, request: Mapping[str, str], client: httpx2.AsyncClient) -> bool:
        try:
            answer = await client.post(url + path, json=dict(request), timeout=_LOAD_S)
        except httpx2.HTTPError as error:
            self._log(url, request["lora_name"], type(error).__name__)
            return False
        if answer.status_code in (404, 405):
            self._unable.add(url)
        if answer.is_error:
            self._log(url, request["lora_name"], f"status {answer.status_code}")
        return not answer.is_error

    @staticmethod
    def _log(url: str, adapter: str, found: str) -> None:
        _LOG.warning("%s", json.dumps({"worker": url, "adapter": adapter, "not loaded": found}))
