"""Run as a process of its own: vLLM's API server with one mixture. See serve.py.

vLLM is started by the command line of its server, in this process, with modekit's guard before it. Its engine and workers are
processes of their own, which would stay when the server is gone; they are in one group with it (child.py), and end with it and
with whoever started it.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from modekit.engines.child import KEY, ProcessSettings, answer_caller, settings_of_caller, url_of
from modekit.engines.guard import Guard

if TYPE_CHECKING:
    from starlette.types import ASGIApp

SERVER = "vllm.entrypoints.openai.api_server"
_LOOK_S = 0.5
_ANSWER_S = 5.0


class VllmGuard(Guard):
    """The guard, as vLLM makes it from its name."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app, os.environ.get(KEY))


def arguments_of(settings: ProcessSettings) -> list[str]:
    """The words of vLLM's command line."""
    options = {
        "model": f"./{Path(settings['model']).name}",
        "served-model-name": settings["name"],
        "host": settings["host"],
        "port": settings["port"],
        "dtype": settings["dtype"],
        "max-model-len": settings["context"],
        "max-num-seqs": settings["parallel"],
        "middleware": f"modekit.engines.vllm_process.{VllmGuard.__name__}",
        **({"model-impl": "transformers"} if settings["through_transformers"] else {}),
    }
    flags = ["--disable-uvicorn-access-log", *(["--trust-remote-code"] if settings["trust_remote_code"] else [])]
    return [*(word for name, value in options.items() for word in (f"--{name}", str(value))), *flags]


def main() -> None:
    """Say where it listens, and serve until the parent is gone."""
    settings = settings_of_caller(at_end=lambda: os.killpg(0, signal.SIGKILL))
    os.chdir(Path(settings["model"]).parent)  # so that no answer tells where the model lies
    address = url_of(settings["host"], settings["port"])
    threading.Thread(target=_answer_when_ready, args=(address,), daemon=True).start()
    sys.argv = [SERVER, *arguments_of(settings)]
    runpy.run_module(SERVER, run_name="__main__", alter_sys=True)


def _answer_when_ready(address: str) -> None:
    """Tell the parent once the server answers; an engine that does not start ends the process, which tells it, too."""
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    while True:
        try:
            with ask(f"{address}/health", timeout=_ANSWER_S):
                break
        except OSError:
            time.sleep(_LOOK_S)
    answer_caller({"address": address})


if __name__ == "__main__":
    main()
