"""Model folders as transformers 4 reads them: today's configs name the rotary base and the tokenizer's class in another way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def legacy(folder: Path, out: Path) -> Path:
    """Links to everything in `folder` but its two configs, which are written anew."""
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.name not in {"config.json", "tokenizer_config.json"}:
            (out / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters", {})
    config |= {"rope_theta": rope.get("rope_theta", 10_000.0), "torch_dtype": config.pop("dtype", "float32")}
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    (out / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return out


def legacy_all(folders: Mapping[str, Path], out: Path) -> list[str]:
    """Of several models, in their order."""
    return [str(legacy(folder, out / name)) for name, folder in folders.items()]
