"""Quantised twins of a plain model folder, packed by each form's own documentation, and the numbers that they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Packed = tuple[Tensors, torch.Tensor]
"""A weight's parts by the rest of their names, and the weight that they stand for."""
NF4 = [
    -1.0,
    -0.6961928,
    -0.52507305,
    -0.39491749,
    -0.28444138,
    -0.18477343,
    -0.09105004,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.33791524,
    0.44070983,
    0.562617,
    0.72295684,
    1.0,
]


def fp8(block: tuple[int, int] | None = (16, 32), suffix: str = "weight_scale_inv") -> Callable[[torch.Tensor], Packed]:
    def pack(weight: torch.Tensor) -> Packed:
        rows, columns = block or weight.shape
        grid = torch.tensor(
            [[float(part.abs().max()) / 448 for part in band.split(columns, 1)] for band in weight.split(rows, 0)]
        )
        spread = grid.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)[:, : weight.shape[1]]
        small = (weight / spread).to(torch.float8_e4m3fn)
        return {"weight": small, suffix: grid if block else grid.reshape(())}, small.float() * spread

    return pack


def nf4(block: int = 64, nested: bool = False) -> Callable[[torch.Tensor], Packed]:
    def pack(weight: torch.Tensor) -> Packed:
        code, count = torch.tensor(NF4), weight.numel()
        flat = torch.nn.functional.pad(weight.flatten(), (0, -count % block)).reshape(-1, block)
        absmax = flat.abs().amax(1)
        said: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
        parts: Tensors = {"weight.absmax": absmax, "weight.quant_map": code}
        if nested:
            small, offset = torch.linspace(-1, 1, 256), float(absmax.mean())
            above = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 4)).reshape(-1, 4).abs().amax(1).clamp(min=1e-6)
            spread = above.repeat_interleave(4)[: len(absmax)]
            byte = ((absmax - offset) / spread)[:, None].sub(small).abs().argmin(1)
            absmax = small[byte] * spread + offset
            said |= {"nested_blocksize": 4, "nested_offset": offset, "nested_dtype": "float32"}
            parts |= {"weight.absmax": byte.to(torch.uint8), "weight.nested_absmax": above, "weight.nested_quant_map": small}
        index = (flat / absmax[:, None]).reshape(-1, 1).sub(code).abs().argmin(1)
        stands = (code[index] * absmax.repeat_interleave(block))[:count].reshape(weight.shape)
        pairs = torch.nn.functional.pad(index[:count], (0, count % 2)).reshape(-1, 2)
        parts["weight"] = (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)[:, None]
        parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
        return parts, stands

    return pack


_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FORMS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Packed]]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 32]}, fp8()),
    "fp8 uneven": ({"quant_method": "fp8", "weight_block_size": [20, 20]}, fp8((20, 20))),
    "fp8 per tensor": ({"quant_method": "fp8", "weight_block_size": None}, fp8(None)),
    "nf4": (_BNB, nf4()),
    "nf4 nested": ({**_BNB, "bnb_4bit_use_double_quant": True}, nf4(nested=True)),
}
"""Name -> quantization_config and how a weight is packed."""


def quantise(folder: Path, out: Path, form: str) -> Tensors:
    """Write the twin of a plain folder; gives the tensors that it stands for, in float32."""
    settings, pack = FORMS[form]
    shutil.copytree(folder, out)
    tensors, stands = load_file(folder / "model.safetensors"), {}
    written: Tensors = {}
    for name, tensor in tensors.items():
        stands[name] = tensor
        if name.endswith("_proj.weight"):
            parts, stands[name] = pack(tensor)
            written |= {f"{name.removesuffix('weight')}{part}": each.contiguous().clone() for part, each in parts.items()}
        else:
            written[name] = tensor
    save_file(written, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "quantization_config": settings}))
    return stands
