"""Models as transformers loads them: a folder, or a base model with an adapter folded in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from modekit.errors import SourceError
from modekit.run import QUIET, Run
from modekit.sources.adapter import AdapterSource
from modekit.sources.contents import OpenFiles
from modekit.sources.tokenizer import check_tokenizer_files
from modekit.weights.folding import Folded, folded_bias, reader
from modekit.weights.numeric import as_array, to_float32


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


def default_device() -> torch.device:
    """The accelerator if there is one (this process's own under a launcher), else the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")


def load_tokenizer(folder: Path, *, run: Run = QUIET) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises SourceError when it has none that can be used."""
    check_tokenizer_files(folder, where=str(folder))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=run.trust_remote_code)
    except BaseException as error:
        # The library in Rust raises Exception itself for wrong files, and on a panic a class of its own that is none of these.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise SourceError(
            "the model folder has no usable tokenizer", where=str(folder), found=(str(error) or type(error).__name__)[:300],
            remedy="save the base model's tokenizer into the base model's folder",
        ) from None  # fmt: skip
    return tokenizer


def load_model(folder: Path, *, dtype: torch.dtype | str = torch.float32, run: Run = QUIET) -> PreTrainedModel:
    """A causal language model from a folder, on the default device, for evaluation."""
    try:
        with without_bars():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=run.trust_remote_code, use_safetensors=True
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise SourceError("transformers cannot load the model", where=str(folder), found=str(error).splitlines()[0]) from None
    return model.to(default_device()).eval()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a loaded model."""
    layers = model.model.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def load_adapted(base: Path, adapter: AdapterSource, *, run: Run = QUIET) -> PreTrainedModel:
    """The base model with an adapter folded into its weights, in float32, for evaluation."""
    model = load_model(base, run=run)
    parameters = dict(model.named_parameters())
    opened = OpenFiles()
    try:
        read = reader(opened)
        for name in {*adapter.changes, *adapter.bias_changes, *adapter.replaced}:
            parameter = parameters[name]
            values = parameter.detach().cpu().float().numpy().ravel()
            if name in adapter.replaced:
                values = to_float32(as_array(opened.read(adapter.replaced[name]), adapter.replaced[name].dtype))
            if name in adapter.changes:
                rows, columns = parameter.shape
                values = Folded(adapter.changes[name], values, (rows, columns), read)[:]
            elif name in adapter.bias_changes:
                values = folded_bias(adapter.bias_changes[name], values, read)
            parameter.data = torch.from_numpy(values.copy()).view(parameter.shape).to(parameter)
    finally:
        opened.close()
    return model
