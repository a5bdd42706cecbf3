"""What can be asked of engines. Imports nothing heavy: the command line reads its choices here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

EngineName = Literal["auto", "llama", "vllm", "transformers"]
Outtype = Literal["f32", "f16", "bf16", "q8_0"]


@dataclass(frozen=True)
class GgufSettings:
    """How a GGUF file is made.

    Attributes:
        outtype: how weights are stored; None: as the checkpoint has them.
        pre_tokenizer: llama.cpp's name for how the tokenizer cuts words; None: as the converter knows it.
        accept: keep a file of fewer bits although it lost more than its proof allows.
    """

    outtype: Outtype | None = None
    pre_tokenizer: str | None = None
    accept: bool = False


@dataclass(frozen=True)
class ServeSettings:
    """How a mixture is served.

    Attributes:
        engine: which engine; auto: the first that fits.
        host, port: where it listens; port 0: any that is free.
        context: tokens of the longest conversation; None: the model's own.
        parallel: conversations at once; None: four.
        threads: threads that compute on processors; None: as many as cores are idle.
        no_key: whether an address that other machines reach may be served without a key.
        gguf: how llama's file is made.
    """

    engine: EngineName = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    context: int | None = None
    parallel: int | None = None
    threads: int | None = None
    no_key: bool = False
    gguf: GgufSettings = field(default_factory=GgufSettings)
