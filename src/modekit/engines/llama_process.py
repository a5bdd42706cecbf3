"""Run as a process of its own: llama.cpp's HTTP server on one GGUF file. See proof.py and serve.py.

llama.cpp ends the whole process where it meets a file that it cannot use, and its threads end only with the process.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from modekit.engines.child import answer_caller, settings_of_caller


def main() -> None:
    """Say where it listens, and serve until the parent is gone."""
    settings = settings_of_caller()
    from xllamacpp import CommonParams, Server, ggml_type, llama_flash_attn_type

    file = Path(settings["model"])
    os.chdir(file.parent)  # so that no answer tells where the model lies
    params = CommonParams()
    params.model.path = file.name
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
    # Else what a window left behind is forgotten, and a text that goes on from the last one comes out otherwise.
    params.swa_full = True
    if settings["exact"]:  # keys and values as they were computed, where by default they are rounded to 16 bits
        params.cache_type_k = params.cache_type_v = ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # the machine's
        params.cache_ram_mib = min(params.cache_ram_mib, memory // 2**20 // 8)
    server = Server(params)
    answer_caller({"address": server.listening_address})
    threading.Event().wait()


if __name__ == "__main__":
    main()
