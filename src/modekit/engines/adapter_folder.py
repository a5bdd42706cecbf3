"""Adapters that workers load and let go while they run: those of a folder, as `modekit export OUT FOLDER` writes it.

FOLDER/<expert>/adapter_model.safetensors    the worker is to serve it under the expert's name

Workers must see the folder under the same path and take adapters at run time, as vLLM does with
VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. One that does not is left as it is.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from modekit.sources.adapter import WEIGHTS_FILE

_LOAD, _UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_LOAD_S = 120.0  # in which a worker must have read an adapter
_LOG = logging.getLogger("modekit.front")


@dataclass(frozen=True)
class Version:
    """An adapter as it lies there: its folder, and when its file was written, in nanoseconds."""

    folder: Path
    written: int

    @property
    def spelling(self) -> str:
        """The folder's path, spelled otherwise for every version: vLLM keeps what it computed by an adapter under this path.

        The bits of `written`, as steps that lead nowhere: `/.` for a one, `/` for a zero.
        """
        steps = f"{self.written % 2**64:b}".replace("0", "/").replace("1", "/.")
        return f"{self.folder}{steps}/."


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
    _told: dict[tuple[str, str], Version] = field(default_factory=dict)  # by the worker's URL and the model's name
    _failed: dict[tuple[str, str], Version] = field(default_factory=dict)
    _unable: set[str] = field(default_factory=set)

    async def bring_to(self, url: str, models: frozenset[str], client: aiohttp.ClientSession) -> bool:
        """Have a worker, which serves `models`, load what is new or written again, and let go what is gone.

        One that it serves under such a name without having been told so here is loaded again: nobody knows which version it is.
        Returns whether anything was changed.
        """
        there, changed = self._there(), False
        for model in {*there, *(model for known, model in self._told if known == url)}:
            version, at = there.get(model), (url, model)
            if url in self._unable or (version is not None and self._failed.get(at) == version):
                continue
            served = model in models
            if served and version == self._told.get(at):
                continue
            if served and not await self._tell(url, _UNLOAD, {"lora_name": model}, client):
                continue
            self._told.pop(at, None)
            changed = True
            if version is not None:
                request = {"lora_name": model, "lora_path": version.spelling}
                known = self._told if await self._tell(url, _LOAD, request, client) else self._failed
                known[at] = version
        return changed

    def forget(self, url: str) -> None:
        """A worker does not answer: it may be another one when it comes back, and able to do what it was not."""
        self._unable.discard(url)
        for at in [at for at in self._failed if at[0] == url]:
            del self._failed[at]

    def _there(self) -> dict[str, Version]:
        """By the model's name."""
        found = {}
        for expert in self.experts:
            try:
                written = (self.folder / expert / WEIGHTS_FILE).stat().st_mtime_ns
            except OSError:
                continue
            found[self.names.get(expert, expert)] = Version(self.folder / expert, written)
        return found

    async def _tell(self, url: str, path: str, request: Mapping[str, str], client: aiohttp.ClientSession) -> bool:
        limit = aiohttp.ClientTimeout(_LOAD_S)
        try:
            async with client.post(url + path, json=dict(request), timeout=limit, allow_redirects=False) as answer:
                status, said = answer.status, await answer.read()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            self._log(url, request["lora_name"], path, type(error).__name__)
            return False
        if status == 405 or (status == 404 and b'"error"' not in said):  # no such command
            self._unable.add(url)
        if status >= 400:
            self._log(url, request["lora_name"], path, f"status {status}")
        return status < 400

    @staticmethod
    def _log(url: str, adapter: str, path: str, found: str) -> None:
        _LOG.warning("%s", json.dumps({"worker": url, "adapter": adapter, "asked": path, "found": found}))
