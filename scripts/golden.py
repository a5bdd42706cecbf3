"""Golden checkpoints: what a recipe's bytes are, written down once and compared ever after.

    python scripts/golden.py build FOLDER        tiny sources and a checkpoint of every kind, with the command line only
    python scripts/golden.py record FOLDER TO    what they hold, as tests/golden/ has it

Only `modekit build` is used, so that any commit can be asked: PYTHONPATH=OTHER_TREE/src python scripts/golden.py ...
`git log tests/golden` names the commits that made what it holds.

Copied and computed tensors, the index, tokenizer files and the record are compared by digest, the config as data. Fitted
gates and what a decomposition makes of full models are compared as numbers, because their last bits are the processor's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns of bfloat16)
import numpy as np
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from golden_recipes import RECIPES
from golden_sources import write_sources, write_yaml

Run = Callable[..., object]
"""Runs `modekit ARGS`; raises when that fails."""
Tensors = dict[str, np.ndarray[Any, Any]]

ROUTER_FILE = "model-router.safetensors"
_COMPUTED: dict[str, tuple[str, ...]] = {
    "native-lexical": ("model-embedding",),
    "native-lexical-whole": ("model-", "carried"),
    "native-lexical-adapters": ("model-", "carried"),
}
"""Checkpoint -> how files begin that hold what was fitted to text or decomposed."""
_ROUNDED = ("read.", "attended.", "last")
"""How numbers in 16 bits begin: a last bit of what was computed is half a percent."""
_DECOMPOSED = "low-rank"
_DECOMPOSED_ENDS = ("lora_A", "lora_B")


def command_line(*args: object) -> None:
    """Run `modekit ARGS` in a process of its own."""
    subprocess.run([sys.executable, "-m", "modekit", *map(str, args)], check=True, stdout=subprocess.DEVNULL)


def build_all(folder: Path, run: Run = command_line) -> Path:
    """Write FOLDER/sources and a checkpoint FOLDER/checkpoints/NAME per recipe; returns the latter's folder."""
    write_sources(folder / "sources")
    for name, recipe in RECIPES.items():
        path = write_yaml(folder / "recipes" / f"{name}.yaml", {"base_model": "../sources/base", **recipe})
        run("build", path, folder / "checkpoints" / name)
    return folder / "checkpoints"


def digests_of(checkpoint: Path) -> dict[str, str]:
    """File -> digest of what must be the same on any machine; of a router file and a decomposition only names and shapes."""
    return {
        str(path.relative_to(checkpoint)): hashlib.sha256(_content(path)).hexdigest()
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.suffix != ".py" and path.name not in {"config.json", ".modekit"}  # code is this version's
    }


def config_of(checkpoint: Path) -> dict[str, Any]:
    """config.json; with a newer transformers it may say more."""
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return config


def numbers_of(checkpoint: Path) -> Tensors:
    """Tensors of the checkpoint that are compared with a tolerance, as float32."""
    tensors: Tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        named = load_file(path).items()
        tensors |= {
            name: value.astype(np.float32) for name, value in named if not (_is_exact(path, name) or name.startswith(_ROUNDED))
        }
    return tensors


def _is_exact(path: Path, name: str) -> bool:
    """Whether a tensor has the same bytes on any machine."""
    if path.parent.name == "router":
        return False
    if path.name == ROUTER_FILE or path.name.startswith(_COMPUTED.get(path.parent.name, ())):
        return False
    return path.parent.name != _DECOMPOSED or not name.endswith(_DECOMPOSED_ENDS)


def _content(path: Path) -> bytes:
    """The bytes of a file that count."""
    if path.name == "modekit.json":
        return _canonical(_record(json.loads(path.read_text(encoding="utf-8"))))
    if path.suffix == ".safetensors":
        header, tensors = _header(path), load_file(path)
        if path.parent.name == "router":  # a digest of numbers that are this machine's
            about = json.loads(header["metadata"]["about"])
            header["metadata"] = {key: value for key, value in about.items() if key != "sha256"}
        if path.parent.name != "router" and all(_is_exact(path, name) for name in tensors):
            return path.read_bytes()
        digests = {
            name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in tensors.items() if _is_exact(path, name)
        }
        return _canonical([header, digests])
    return path.read_bytes()


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True).encode()


def _record(record: dict[str, Any]) -> dict[str, Any]:
    """modekit.json without versions, paths, the digest of fitted bytes and transformers' defaults."""
    kept = {key: value for key, value in record.items() if key not in {"modekit_version", "recipe_folder", "dense_config"}}
    machine = {"folder", "config"}  # the digest of a source's config.json, which has transformers' defaults in it
    kept["sources"] = [{key: value for key, value in source.items() if key not in machine} for source in record["sources"]]
    kept["router"] = {key: value for key, value in record["router"].items() if key not in {"sha256", "report"}}
    if "carry" in kept:
        kept["carry"] = {key: value for key, value in record["carry"].items() if key != "sha256"}
    return kept


def _header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        return {"metadata": file.metadata(), "tensors": {name: [s.get_dtype(), s.get_shape()] for name, s in slices.items()}}


def record(checkpoints: Path, to: Path) -> None:
    """Write TO/golden.json and TO/numbers.safetensors."""
    entries = {name: {"config": config_of(checkpoints / name), "files": digests_of(checkpoints / name)} for name in RECIPES}
    golden = {"transformers": transformers.__version__, "checkpoints": entries}
    lines = json.dumps(golden, indent=1, sort_keys=True)
    (to / "golden.json").write_text(lines + "\n", encoding="utf-8")
    numbers = {f"{name}/{key}": value for name in RECIPES for key, value in numbers_of(checkpoints / name).items()}
    save_file(numbers, to / "numbers.safetensors")


def main() -> None:
    """Run a command of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("build", "record"))
    parser.add_argument("first", type=Path, metavar="FOLDER")
    parser.add_argument("second", type=Path, nargs="?", metavar="TO")
    args = parser.parse_args()
    if args.command == "build":
        build_all(args.first)
        return
    if args.second is None:
        parser.error("record takes two folders")
    record(args.first / "checkpoints", args.second)


if __name__ == "__main__":
    main()
