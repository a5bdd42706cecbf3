"""Models as transformers loads them: a folder, or a base model with an adapter folded in."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from modekit.errors import ModekitError, SourceError
from modekit.files.read import LARGE, UNREADABLE, read_json
from modekit.files.typed import said_by
from modekit.processes import DEVICE_VARIABLE
from modekit.run import QUIET, Run
from modekit.sources.adapter import AdapterSource
from modekit.sources.config import damaged_model
from modekit.sources.contents import OpenFiles
from modekit.sources.header import DTYPE_NAMES, TensorRef
from modekit.sources.names import is_looked_up, module_of
from modekit.sources.natives import leaves_out
from modekit.sources.pairs import PAIR_CLASS, PAIRS
from modekit.sources.remote_code import check_no_code
from modekit.sources.source import ModelSource, open_source, read_config
from modekit.sources.tokenizer import PAIR_FILES
from modekit.sources.towers import may_wrap
from modekit.weights.flat import stored
from modekit.weights.folding import folded, reader
from modekit.weights.numeric import to_float32

LOADING = "load a model"
"""Phase of whatever reads a model into memory."""


@contextmanager
def without_bars() -> Iterator[None]:
    """While open, transformers draws no progress bars of its own; afterwards it does as before."""
    drawn = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            transformers_logging.enable_progress_bar()


@contextmanager
def without_report(folder: Path) -> Iterator[None]:
    """While open, nothing is said of tensors that have no number and are left out: that they are missing, or made anew."""
    before = transformers_logging.get_verbosity()
    try:
        with warnings.catch_warnings():
            if leaves_out(read_config(folder, where=str(folder))):
                transformers_logging.set_verbosity_error()
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            yield
    finally:
        transformers_logging.set_verbosity(before)


def default_device() -> torch.device:
    """The device that `modekit --device` names, else an accelerator (under a launcher this process's own), else the CPU.

    Raises ModekitError where the device is not there.
    """
    asked = os.environ.get(DEVICE_VARIABLE, "auto")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [name for name, is_there in available.items() if is_there]
    if asked not in ("auto", *there):
        raise ModekitError(
            "torch finds no such device here",
            where="--device",
            found=asked,
            expected=f"auto, {', '.join(there)}",
            remedy="leave the option out, or install a build of torch for this device",
        )
    name = there[0] if asked == "auto" else asked
    return torch.device(name, int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device(name)


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, which Apple's GPUs do not have: of one there on the CPU."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def check_loadable(folder: Path, *, run: Run = QUIET) -> None:
    """Raise SourceError before transformers opens a folder that would run code of its own, or make it wait for ever.

    A mixture in the modekit architecture brings the code that is installed here, and that is what runs.
    """
    _check_no_pipes(folder)
    if (folder / "adapter_config.json").exists():  # transformers would take it into the model
        raise SourceError("a model and an adapter are in one folder", where=str(folder), remedy="remove adapter_config.json")
    config = read_config(folder, where=str(folder))
    if config["model_type"] == "modekit":
        config.pop("auto_map", None)
    check_no_code(config, where=str(folder), run=run)


def _check_no_pipes(folder: Path) -> None:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise SourceError(
                "no file that could be read, but a pipe or device, is in the model folder", where=str(path), remedy="remove it"
            )


def _check_tokenizer_config(folder: Path) -> None:
    """Raise SourceError for a tokenizer's config that names other files in place of those that modekit compares."""
    where = f"{folder}: tokenizer_config.json"
    try:
        config = read_json(folder / "tokenizer_config.json", LARGE)
    except FileNotFoundError:
        return
    except UNREADABLE as error:
        raise damaged_model("the tokenizer cannot be read", where, error) from None
    if not isinstance(config, dict) or config.get("fast_tokenizer_files"):
        raise SourceError(
            "the tokenizer's config names other files than tokenizer.json",
            where=where,
            expected="a mapping without fast_tokenizer_files",
            remedy="save it again with transformers 5",
        )


def load_tokenizer(folder: Path, *, run: Run = QUIET) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, or of one that holds nothing else. Raises SourceError where none can be used."""
    if (folder / "tokenizer.json").is_file() and not (folder / "config.json").exists():
        _check_no_pipes(folder)
    else:
        check_loadable(folder, run=run)
    _check_tokenizer_config(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=run.trust_remote_code)
    except BaseException as error:  # tokenizers raises what it likes, and where it panics, what is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        found, remedy = said_by(error), "save the base model's tokenizer into the base model's folder"
        pieces = [name for name in PAIR_FILES if name.endswith(".model") and (folder / name).exists()]
        if pieces and "tiktoken" in found:  # what transformers tries last with a file that it cannot read
            found = f"{' or '.join(pieces)} cannot be read as a sentencepiece model"
            remedy = "download or save the tokenizer again; sentencepiece must be installed"
        raise SourceError("the model folder has no usable tokenizer", where=str(folder), found=found, remedy=remedy) from None
    tokenizer.init_kwargs.pop("auto_map", None)  # where it is saved, nobody is to be asked for its code
    return tokenizer


def load_model(folder: Path, *, dtype: torch.dtype | str = torch.float32, run: Run = QUIET) -> PreTrainedModel:
    """A language model from a folder, on the default device, for evaluation: one that writes a text on, or one with an encoder,
    that writes what a text becomes. Raises SourceError.
    """
    check_loadable(folder, run=run)
    run.begin(LOADING)
    read = _read_by_us(folder, run)
    try:
        with without_bars(), without_report(folder):
            model: PreTrainedModel = (
                auto_class(folder).from_pretrained(
                    folder, dtype=dtype, trust_remote_code=run.trust_remote_code, use_safetensors=True
                )
                if read is None
                else _language_model(read, dtype)
            )
    except Exception as error:  # by what a config says, anything may go wrong in a model's own code
        raise not_loaded(str(folder), error) from None
    return model.to(default_device()).eval()


def not_loaded(where: str, error: Exception) -> SourceError:
    """What is said where transformers, or a model's own code, raises something."""
    return SourceError(
        "transformers cannot load the model",
        where=where,
        found=said_by(error),
        remedy="save or build it again; memory must suffice for it",
    )


def _read_by_us(folder: Path, run: Run) -> ModelSource | None:
    """A quantised model, or the language model within a wrapper; None of a folder that transformers reads as we do."""
    config = read_config(folder, where=str(folder))
    quantised = bool(config.get("quantization_config"))
    if not quantised and not may_wrap(config):
        return None
    source = open_source("model", str(folder), folder, run=run)
    return source if quantised or source.wrapper is not None else None


def _language_model(source: ModelSource, dtype: torch.dtype | str) -> PreTrainedModel:
    """As its own class has it, so that it is saved by that class's names; what is packed in float32. Raises SourceError."""
    with OpenFiles() as opened:
        state = {name: read_tensor(opened, ref) for name, ref in source.tensors.items()}
    config = AutoConfig.for_model(**source.config)
    kinds = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    return kinds[type(config)].from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def read_tensor(opened: OpenFiles, ref: TensorRef) -> torch.Tensor:
    """A stored tensor in its own dtype, or, where it is packed, in float32."""
    numbers = stored(opened, ref)[:].view(np.uint8)
    return torch.from_numpy(numbers).view(getattr(torch, DTYPE_NAMES[ref.dtype])).view(ref.shape)


def auto_class(folder: Path) -> Any:
    """The class of transformers that opens a model folder. Raises SourceError when its config.json cannot be read."""
    config = read_config(folder, where=str(folder))
    pair = config["model_type"] in {family.model_type for family in PAIRS}
    mixture = config["model_type"] == "modekit" and config.get("architectures") == [PAIR_CLASS]
    return AutoModelForSeq2SeqLM if pair or mixture else AutoModelForCausalLM


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a loaded model that has no encoder."""
    layers = model.model.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def load_adapted(base: Path, adapter: AdapterSource, *, run: Run = QUIET) -> PreTrainedModel:
    """The base model with an adapter folded into its weights, in float32, for evaluation."""
    model = load_model(base, run=run)
    rows = next((ref.shape[0] for name, ref in adapter.replaced.items() if is_looked_up(module_of(name))), None)
    if rows not in (None, model.get_input_embeddings().weight.shape[0]):
        model.resize_token_embeddings(rows, mean_resizing=False)
    parameters = dict(model.named_parameters())
    with OpenFiles() as opened:
        read = reader(opened)
        for name in {*adapter.changes, *adapter.replaced}:
            parameter = parameters[name]
            values = parameter.detach().cpu().float().numpy().ravel()
            if name in adapter.replaced:
                values = to_float32(read(adapter.replaced[name]))
            if name in adapter.changes:
                values = folded(adapter.changes[name], values, tuple(parameter.shape), read)[:]
            parameter.data = torch.from_numpy(values.copy()).view(parameter.shape).to(parameter)
    return model
