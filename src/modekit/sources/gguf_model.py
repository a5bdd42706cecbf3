"""A GGUF file as a model: config and names by transformers' own tables, tokenizer by its converters.

    CACHE/gguf/<sha256 of path and state>/   config.json, the tokenizer's files, and a link to the file

modekit opens this folder in place of the file. It is made again when it is missing or the file is another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from modekit.errors import SourceError
from modekit.files.libraries import library_writes, new_folder
from modekit.files.read import FileState, open_regular
from modekit.files.typed import shortened
from modekit.files.user_cache import cached_folder
from modekit.files.write import appearing, link_to, write_json
from modekit.sources.family import Config
from modekit.sources.gguf import Gguf, read_gguf
from modekit.sources.model import CONVERTED, TensorRef
from modekit.sources.model_config import SAFETENSORS
from modekit.sources.packed import Array32, Ggml, PackedRef, Read
from modekit.sources.quantised import Unpacked

_FLOATS = ("F32", "F16", "BF16")
_ROPE = "rope_freqs.weight"
_NO_WORDS = ("_name_or_path", "quantization_config", "dtype", "torch_dtype")


def gguf_folder(file: Path, *, where: str) -> Path:
    """The folder that stands for a GGUF file. Raises SourceError where none can be made of it."""
    folder = None
    try:
        with open_regular(file) as raw:
            state = FileState.of(raw)
        key = hashlib.sha256(repr([str(file.resolve()), state.inode, state.size, state.modified_ns]).encode()).hexdigest()
        folder = cached_folder("gguf") / key
        if not (folder / CONVERTED).exists():
            with appearing(folder, sync=False) as new:
                new_folder(new)
                _convert(read_gguf(file, where=where), new, where)
    except (OSError, RuntimeError) as error:
        if folder is not None and (folder / CONVERTED).exists():  # another process was quicker
            return folder
        raise SourceError(
            "config and tokenizer of a GGUF file cannot be kept in modekit's cache",
            where=where,
            found=error,
            remedy="set MODEKIT_CACHE to a folder of yours",
        ) from None
    return folder


def _convert(gguf: Gguf, folder: Path, where: str) -> None:
    """Write the folder."""
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        said: dict[str, Any] = load_gguf_checkpoint(str(gguf.file))["config"]
        _check_sizes(gguf, said)
        config = AutoConfig.for_model(**said).to_dict()
        with library_writes(folder) as new:
            _tokenizer(gguf, int(config["vocab_size"])).save_pretrained(new)
        written = {key: value for key, value in config.items() if key not in _NO_WORDS}
        written |= _special_ids(gguf) | _rope(gguf, written)
        written |= {"dtype": _dtype(gguf), "quantization_config": {"quant_method": "gguf"}}
        written = json.loads(json.dumps(written), parse_float=_shortest)
    except SourceError:
        raise
    except Exception as error:  # of what a stranger's file says, anything may go wrong in another library
        raise _unread(where, shortened(error) or type(error).__name__) from None
    finally:
        logging.set_verbosity(verbosity)
    link_to(gguf.file.resolve(), folder / CONVERTED)
    write_json(folder / "config.json", written, sync=False)


def _shortest(said: str) -> float:
    """A number as a model's own config.json has it: GGUF keeps 1e-06 in 32 bits, which are 9.999999974752427e-07."""
    number = float(said)
    with np.errstate(over="ignore"):
        single = np.float32(number)
    return float(str(single)) if float(single) == number else number


def _unread(where: str, found: object) -> SourceError:
    return SourceError(
        "transformers does not read this GGUF file", where=where, found=found, remedy=f"{SAFETENSORS}, if there is one"
    )


def _check_sizes(gguf: Gguf, said: Config) -> None:
    """Raise ValueError before a model of absurd sizes is made up from settings."""
    layers = said.get("num_hidden_layers")
    if type(layers) is not int or not 0 < layers <= len(gguf.tensors):
        raise ValueError(f"{layers} layers and {len(gguf.tensors)} tensors")
    for key, value in said.items():
        if type(value) is int and abs(value) > 2**31:
            raise ValueError(f"{key} {value}")


def _special_ids(gguf: Gguf) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {key: gguf.settings.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}
    return {key: value for key, value in found.items() if type(value) is int}


def _tokenizer(gguf: Gguf, vocab_size: int) -> Any:
    """Transformers' converted tokenizer, without the special tokens that its class adds to those of the file.

    SmolLM makes every digit a word of its own before all else, which the converter leaves out.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    made = AutoTokenizer.from_pretrained(gguf.file.parent, gguf_file=gguf.file.name)
    said = json.loads(made.backend_tokenizer.to_str())
    said["added_tokens"] = [token for token in said["added_tokens"] if token["id"] < vocab_size]
    if gguf.settings.get("tokenizer.ggml.pre") == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        said["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    special = {key: token for key, token in made.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(said)),
        chat_template=made.chat_template,
        model_input_names=made.model_input_names,
        **{key: token for key, token in special.items() if made.convert_tokens_to_ids(token) < vocab_size},
    )


def _dtype(gguf: Gguf) -> str:
    """What the tensors become where a recipe does not say: bfloat16, but for files of floats."""
    kinds = gguf.kinds()
    most = max(kinds, key=lambda name: kinds[name][0], default="")
    return {"F32": "float32", "F16": "float16"}.get(most, "bfloat16")


def _rope(gguf: Gguf, config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's rotary settings, which a GGUF holds as factors of the frequencies. Raises ValueError for factors of others."""
    if _ROPE not in gguf.tensors:
        return {}
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from modekit.sources.contents import OpenFiles

    tensor = gguf.tensors[_ROPE]
    with OpenFiles() as opened:
        read: Read = opened.read
        factors = tensor.values(read, 0, 1)
    known = dict(config.get("rope_parameters") or {})
    rope = {
        "rope_type": "llama3",
        "rope_theta": known.get("rope_theta", 10_000.0),
        "factor": round(float(factors.max()), 3),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8_192,
    }
    scaled = LlamaConfig(
        **{key: config[key] for key in ("hidden_size", "num_attention_heads", "head_dim")}, rope_parameters=rope
    )
    inverse = ROPE_INIT_FUNCTIONS["llama3"](scaled, "cpu")[0].numpy()
    width = 2 * len(inverse)
    plain = 1.0 / rope["rope_theta"] ** (np.arange(0, width, 2, dtype=np.float32) / width)
    if factors.shape != inverse.shape or not np.allclose(plain / inverse, factors, rtol=1e-3):
        raise ValueError(f"{_ROPE} holds other factors than Llama 3's")
    return {"rope_parameters": rope}


def tensors_of(file: Path, config: Config, written: str, *, where: str) -> Unpacked:
    """The tensors of a GGUF file by transformers' names. Raises SourceError for tensors that it has no name for."""
    gguf = read_gguf(file, where=where)
    try:
        processor, names = _names(gguf, config)
        placed = dict(_placed(gguf, processor, names))
    except Exception as error:  # of what a stranger's file says, anything may go wrong in transformers' tables
        raise _unread(where, shortened(error) or type(error).__name__) from None
    tensors: dict[str, TensorRef] = {name: PackedRef.of(name, shape, form, written) for name, (shape, form) in placed.items()}
    lost = sorted(gguf.tensors.keys() - {form.data.name for _, form in placed.values()} - {_ROPE})
    if lost:
        raise _unread(where, f"no name for {shortened(', '.join(lost))}")
    kinds = {name: bits for name, (_, bits) in gguf.kinds().items() if name not in _FLOATS}
    bits = sorted({f"{bits:.3g}" for bits in kinds.values()}, key=float)
    said = f"{' and '.join(bits)} bits (GGUF {', '.join(sorted(kinds))})" if kinds else ""
    return Unpacked(tensors, said)


def _names(gguf: Gguf, config: Config) -> tuple[Any, dict[str, str]]:
    """Transformers' processor of a family's tensors, and its names by those of the GGUF."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    _check_sizes(gguf, config)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain))
    processor = TENSOR_PROCESSORS.get(gguf.architecture, TensorProcessor)(config=dict(plain))
    whole = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=tuple)
    names: dict[str, str] = get_gguf_hf_weights_map(whole, processor)
    if gguf.tensors.keys() - names.keys() - {_ROPE}:  # named as in a model's parts: a table is made for every module
        names = get_gguf_hf_weights_map(model, processor)
    return processor, names


def _placed(gguf: Gguf, processor: Any, names: Mapping[str, str]) -> Iterator[tuple[str, tuple[tuple[int, ...], Ggml]]]:
    """Name, shape and form of each tensor that has a name."""
    for name, tensor in gguf.tensors.items():
        finish = partial(_finished, processor, name)
        if name not in names:
            continue
        order = _order(finish, tensor.shape)
        if order is None:
            shape = finish(np.broadcast_to(np.float32(-1), tensor.shape)).shape
            yield names[name], (shape, Ggml(tensor.data, tensor.kind, tensor.shape, finish=finish))
        else:
            same = bool((order == np.arange(len(order))).all())
            yield names[name], (tensor.shape, Ggml(tensor.data, tensor.kind, tensor.shape, None if same else order))


def _finished(processor: Any, name: str, weights: Array32) -> Array32:
    """What transformers makes of a tensor's numbers. Raises ValueError where it makes several tensors of one."""
    made = processor.process(weights=weights, name=name, tensor_key_mapping={}, parsed_parameters={"tensors": {}})
    if made.name != name:
        raise ValueError(f"{name} is several tensors in one")
    return np.asarray(made.weights)


def _order(finish: Any, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """How a tensor's rows are to be ordered, where that is all that is to be done: found by ordering their numbers."""
    if len(shape) != 2:
        return None
    try:
        made = finish(np.arange(shape[0], dtype=np.int64)[:, None])
    except ValueError:  # it looks at the columns, too
        return None
    if made.shape != (shape[0], 1) or not np.array_equal(np.sort(made.ravel()), np.arange(shape[0])):
        return None
    return np.asarray(made.ravel(), np.int64)
