"""Which files of a folder hold a model's weights: one, or those that an index names."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from modekit.errors import SourceError
from modekit.files.read import LARGE, UNREADABLE, read_json
from modekit.sources.config import damaged_model

_PICKLES = {
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pt",
    "model.pth",
    "consolidated.00.pth",
    "adapter_model.bin",
}
_SHARD = re.compile(r"[^/\\\x00]{1,200}\.safetensors")
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
FROM_GGUF = (
    "give the model in safetensors; transformers unpacks a GGUF: AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME, "
    "quantization_config=GgufConfig(dequantize=True)), then save_pretrained, and the tokenizer by gguf_file, too"
)


def named_weights(folder: Path, *, where: str) -> list[Path]:
    """The files that hold a model's weights, by its index or name, whether they are there or not. Raises SourceError."""
    index = folder / INDEX_FILE
    single = folder / SINGLE_FILE
    if single.exists() or not index.exists():  # first, as in transformers: the index may be of a model that was saved before
        return [single]
    return [folder / name for name in _shard_names(index, where=f"{where}: {index.name}")]


def weight_files(folder: Path, *, where: str) -> list[Path]:
    """The files that hold a model's weights. Raises SourceError where there are none that can be read."""
    files = named_weights(folder, where=where)
    missing = [file.name for file in files if not file.exists()]
    if len(missing) == len(files):
        names = [path.name for path in folder.iterdir()]
        refuse_other_kinds(names, where=where)
        raise no_weights(names, where=where)
    if missing:
        raise SourceError(
            "shards named by the index are missing",
            where=where,
            found=", ".join(missing),
            remedy="download the model again",
        )
    return files


def refuse_other_kinds(names: Collection[str], *, where: str) -> None:
    """Raise SourceError where the files of a folder that lacks a model, by name, are those of an adapter, or GGUF files."""
    if "adapter_config.json" in names:
        its_base = "give a full model, like the one that it was trained on (base_model_name_or_path in its adapter_config.json)"
        in_recipe = "name it as adapter: in place of model: in the recipe, or by --adapter"
        raise SourceError(
            "this is an adapter, not a full model",
            where=where,
            remedy=in_recipe if where.startswith("experts[") else its_base,
        ) from None
    files = sorted(name for name in names if name.endswith(".gguf"))
    if files:
        raise SourceError("GGUF files are not read", where=where, found=", ".join(files[:3]), remedy=FROM_GGUF) from None


def no_weights(names: Collection[str], *, where: str) -> SourceError:
    """The error of a model or adapter among whose files, by name, are no weights that can be read."""
    pickles = sorted(name for name in names if name in _PICKLES)
    if not pickles:
        return SourceError(
            "no safetensors weights",
            where=where,
            remedy="the folder needs model.safetensors or shards with an index, that of an adapter adapter_model.safetensors",
        )
    return SourceError(
        "the weights are pickled, which can run code when opened; modekit reads safetensors only",
        where=where,
        found=", ".join(pickles),
        remedy="convert once where you trust the file: load it with transformers or PEFT and save_pretrained to a new folder",
    )


def _shard_names(index: Path, *, where: str) -> list[str]:
    """The files that a safetensors index names. Raises SourceError when it cannot be read, or names what lies elsewhere."""
    try:
        names = sorted(set(read_json(index, LARGE)["weight_map"].values()))
        elsewhere = [name for name in names if not _SHARD.fullmatch(name)]
    except (*UNREADABLE, KeyError, TypeError, AttributeError):
        raise damaged_model("the safetensors index cannot be read", where) from None
    if elsewhere:
        expected = "model-00001-of-00002.safetensors"
        raise damaged_model(
            "the safetensors index names what is no weight file of this folder",
            where,
            elsewhere[0],
            f"names like {expected}",
        )
    return names
