"""The one writer of PEFT LoRA folders: adapter_config.json and adapter_model.safetensors.

`peft_name` is how PEFT names the tensors of a module, `lora_config` what the config says of all modules together.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from modekit.files.staging import Staging
from modekit.files.write import Entry, write_all, write_json
from modekit.sources.adapter import CONFIG_FILE, WEIGHTS_FILE


@dataclass(frozen=True)
class PeftTensor:
    """A tensor to write: its safetensors dtype, shape, and its bytes when asked for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], memoryview]


@dataclass(frozen=True)
class ModuleChange:
    """Rank of a module's LoRA and the factor of B A (`scale`: alpha / rank, or alpha / sqrt(rank) with rsLoRA)."""

    rank: int
    scale: float

    @property
    def alpha(self) -> float:
        """What lora_alpha has to be; a whole number where it can."""
        alpha = self.scale * self.rank
        near = round(alpha)
        return near if math.isclose(alpha, near, rel_tol=1e-12) else alpha


def peft_name(module: str, part: str) -> str:
    """PEFT's name of a tensor: `part` is lora_A.weight or lora_B.weight."""
    return f"base_model.model.{module}.{part}"


def lora_config(
    base_name: str,
    changes: Mapping[str, ModuleChange],
    parameters: Mapping[str, ModuleChange],
    *,
    has_encoder: bool,
) -> dict[str, object]:
    """adapter_config.json of these modules and parameters, which are its targets by their full names.

    `r` is the largest rank, for engines that reserve room by it and do not know the patterns. `has_encoder`: the base is an
    encoder-decoder.
    """
    both = {**changes, **parameters}
    ranks = {module: change.rank for module, change in sorted(both.items())}
    alphas = {module: both[module].alpha for module in ranks}
    largest = max(ranks, key=ranks.__getitem__)
    rank, alpha = ranks[largest], alphas[largest]
    return {
        "task_type": "SEQ_2_SEQ_LM" if has_encoder else "CAUSAL_LM",
        "revision": None,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "base_model_name_or_path": base_name,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "lora_bias": False,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: each for module, each in ranks.items() if each != rank},
        "alpha_pattern": {module: each for module, each in alphas.items() if each != alpha},
        "target_modules": sorted(changes),
        **({"target_parameters": sorted(parameters)} if parameters else {}),
    }


def write_lora(stage: Staging, config: Mapping[str, object], tensors: Sequence[PeftTensor]) -> None:
    """Write both files into a staging folder, tensor by tensor."""
    entries: list[Entry] = [(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in tensors]

    def write(place: int, stream: io.FileIO) -> None:
        write_all(stream, tensors[place].read())

    stage.write_shard(WEIGHTS_FILE, entries, write)
    write_json(stage.folder / CONFIG_FILE, dict(config), sync=False)
