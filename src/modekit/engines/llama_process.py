"""Run as a process of its own: llama.cpp's HTTP server on one GGUF file. See llama.py.

llama.cpp ends the whole process where it meets a file that it cannot use, and its threads end only with the process.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from modekit.engines.child import answer_caller, settings_of_caller

_FOR_REQUESTS = 2**31  # bytes


def main() -> None:
    """Say where it listens, and serve until the parent is gone."""
    settings = settings_of_caller()
    from xllamacpp import CommonAdapterLoraInfo, CommonParams, Server, ggml_type, llama_flash_attn_type

    file = Path(settings["model"])
    os.chdir(file.parent)  # so that no answer tells where the model lies
    params = CommonParams()
    params.model.path = file.name
    adapters = settings.get("adapters", [])
    params.lora_adapters = [CommonAdapterLoraInfo(os.path.relpath(path), 0.0) for path in adapters]  # applied where asked for
    if adapters:  # texts kept in memory are found again by their tokens, whichever adapter read them
        params.cache_ram_mib = 0
    params.ui = params.endpoint_slots = False
    params.model_alias = {settings["name"]}
    params.hostnames = [settings["host"]]
    params.port = settings["port"]
    params.api_keys = [settings["key"]] if settings["key"] else []
    params.n_parallel = settings["parallel"]
    params.n_ctx = settings["context"] * settings["parallel"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.warmup = False
    params.use_jinja = True
    params.swa_full = (
        True  # else what a window left behind is forgotten, and a text that goes on from the last comes out otherwise
    )
    if settings["exact"]:  # keys and values as they were computed, where by default they are rounded to 16 bits
        params.cache_type_k = params.cache_type_v = ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # the machine's
        params.cache_ram_mib = min(params.cache_ram_mib, memory // 2**20 // 8)
    server = Server(params)
    if not settings["exact"]:
        _bound_memory(params.cache_ram_mib)
    answer_caller({"address": server.listening_address})
    threading.Event().wait()


def _bound_memory(cache_mib: int) -> None:
    """Let this process grow no further than its cache of texts and what requests take; beyond that an allocation fails.

    So a request that is out of all bounds ends with an error, or with this process, and not with the machine's memory.
    """
    with suppress(OSError, ValueError, ImportError, StopIteration):  # where a system has no such limit
        import resource

        lines = Path("/proc/self/status").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("VmData:"))
        limit = kib * 2**10 + max(cache_mib, 0) * 2**20 + _FOR_REQUESTS
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


if __name__ == "__main__":
    main()
