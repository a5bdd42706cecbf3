"""Adapter folders: trained by PEFT with random numbers, or written by hand."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peft import get_peft_model
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.experts.export import ExportRecord, exportable, write_export

PREFIX = "base_model.model.model.layers."
Tensors = dict[str, np.ndarray]


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns at almost every setting tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def export_adapter(checkpoint: Checkpoint, name: str, out: Path, *, overwrite: bool = False) -> ExportRecord:
    """Write one expert as a PEFT folder, as `modekit export` does."""
    return write_export(checkpoint, exportable(checkpoint, [name])[0], out, overwrite=overwrite)


def train_adapter(base: Path, config: peft.PeftConfig, folder: Path) -> Path:
    """An adapter whose trainable parameters are all random, saved by PEFT."""
    with quiet():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad or "lora_B" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        model.save_pretrained(folder)
    return folder


def lora(part: str, rows: int, columns: int, rank: int = 4, layers: int = 3, *, seed: int = 0) -> Tensors:
    """A and B on one module of every layer."""
    generator = np.random.default_rng(seed)
    return {
        f"{PREFIX}{layer}.{part}.lora_{side}.weight": generator.normal(size=shape).astype(np.float32)
        for layer in range(layers)
        for side, shape in (("A", (rank, columns)), ("B", (rows, rank)))
    }


UP = lora("mlp.up_proj", 48, 32)


def write_adapter(folder: Path, tensors: Tensors = UP, **config: Any) -> Path:
    """An adapter folder by hand: LoRA on up_proj, unless said otherwise. A setting `...` is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["up_proj"], **config}
    kept = {key: value for key, value in settings.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    return folder
