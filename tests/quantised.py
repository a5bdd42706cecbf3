"""Quantised twins of a plain model folder, packed by each form's own documentation, and the numbers that they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words_of(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """(X, N) numbers, one bit behind the other, as (X, N bits/32) words."""
    stream = torch.stack([(numbers >> bit) & 1 for bit in range(bits)], dim=-1).reshape(len(numbers), -1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 32)).reshape(len(numbers), -1, 32)
    return (stream.long() << torch.arange(32)).sum(-1).to(torch.int64).to(torch.int32)


def _grouped(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers (O, I), scales and zeros (O, G)."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % group)).reshape(rows, -1, group)
    low, high = padded.amin(-1), padded.amax(-1)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-4).half().float()
    zero = (-low / scale).round().clamp(1, 2**bits - 1).long()
    spread = lambda each: each.repeat_interleave(group, 1)[:, :columns]  # noqa: E731
    return (weight / spread(scale) + spread(zero)).round().clamp(0, 2**bits - 1).long(), scale, zero


def gptq(bits: int = 4, group: int = 16, order: bool = False, form: str = "gptq") -> Callable[[torch.Tensor], Packed]:
    def pack(weight: torch.Tensor) -> Packed:
        index = torch.arange(weight.shape[1]) // group
        numbers, scale, zero = _grouped(weight, bits, group)
        if order:  # columns of a group do not lie together
            mixed = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
            numbers, index = numbers[:, mixed], index[mixed]
        stands = (numbers - zero[:, index]) * scale[:, index]
        parts = {
            "qweight": words_of(numbers, bits).T,
            "qzeros": words_of((zero - int(form == "gptq")).T, bits),
            "scales": scale.T.half(),
            "g_idx": index.to(torch.int32),
        }
        return parts, stands

    return pack


def awq(weight: torch.Tensor) -> Packed:
    numbers, scale, zero = _grouped(weight, 4, 16)
    stands = (numbers - zero.repeat_interleave(16, 1)) * scale.repeat_interleave(16, 1)
    mixed = lambda each: words_of(each.reshape(len(each), -1, 8)[:, :, AWQ_ORDER].reshape(len(each), -1), 4)  # noqa: E731
    return {"qweight": mixed(numbers.T), "qzeros": mixed(zero.T), "scales": scale.T.half()}, stands


def compressed(bits: int = 4, symmetric: bool = True) -> Callable[[torch.Tensor], Packed]:
    def pack(weight: torch.Tensor) -> Packed:
        numbers, scale, zero = _grouped(weight, bits, 16)
        middle = 2 ** (bits - 1)
        if symmetric:
            zero = torch.full_like(zero, middle)
        stands = (numbers - zero.repeat_interleave(16, 1)) * scale.repeat_interleave(16, 1)
        parts = {
            "weight_packed": words_of(numbers, bits),
            "weight_scale": scale.to(torch.float32),
            "weight_shape": torch.tensor(weight.shape),
        }
        return parts if symmetric else {**parts, "weight_zero_point": words_of(zero.T, bits).T}, stands

    return pack


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


def int8(weight: torch.Tensor) -> Packed:
    scale = weight.abs().amax(1)
    small = (weight * 127 / scale[:, None]).round().to(torch.int8)
    return {"weight": small, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}, small * scale[:, None] / 127


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


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}


def _groups(form: str, **weights: Any) -> dict[str, Any]:
    scheme = {"targets": ["Linear"], "weights": {**_INT4, **weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": scheme}}


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}
_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FORMS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Packed]]] = {
    "gptq": (_GPTQ, gptq()),
    "gptq in order": ({**_GPTQ, "desc_act": True}, gptq(order=True)),
    "gptq 3 bits": ({**_GPTQ, "bits": 3, "group_size": 32}, gptq(3, 32)),
    "gptq 8 bits, v2": ({**_GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"}, gptq(8, form="gptq_v2")),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, awq),
    "compressed": (_groups("pack-quantized"), compressed()),
    "compressed 3 bits with zeros": (_groups("pack-quantized", num_bits=3, symmetric=False), compressed(3, symmetric=False)),
    "compressed fp8": (_groups("float-quantized", num_bits=8, type="float"), fp8((1, 999), "weight_scale")),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 32]}, fp8()),
    "fp8 uneven": ({"quant_method": "fp8", "weight_block_size": [20, 20]}, fp8((20, 20))),
    "fp8 per tensor": ({"quant_method": "fp8", "weight_block_size": None}, fp8(None)),
    "8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, int8),
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


K_SCALES = {
    "Q2_K": {80: 4e-3, 82: 6e-3},
    "Q3_K": {108: 1.5e-3},
    "Q4_K": {0: 2e-4, 2: 1.6e-3},
    "Q5_K": {0: 1e-4, 2: 1.6e-3},
    "Q6_K": {208: 5e-5},
}
"""Of types that the gguf package reads and does not write: the floats in a block, by their place. All else may be anything."""


def blocks_of(array: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """An array in a GGUF type; of those that nobody writes here, blocks of other numbers."""
    import gguf

    quant = gguf.GGMLQuantizationType[kind]
    if kind not in K_SCALES:
        return np.asarray(gguf.quantize(array, quant))
    size, nbytes = gguf.GGML_QUANT_SIZES[quant]
    blocks = np.random.default_rng(array.size).integers(0, 256, (array.size // size, nbytes), dtype=np.uint8)
    for place, scale in K_SCALES[kind].items():
        blocks[:, place : place + 2] = np.full(1, scale, np.float16).view(np.uint8)
    return blocks.reshape(len(array), -1)


def write_gguf(folder: Path, file: Path, kind: str = "Q8_0") -> Path:
    """A Llama folder as GGUF, as llama.cpp's converter writes it: the rows of queries and keys in pairs."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config["vocab_size"])
    tokens = [f"{number}" if number > 2 else ("<pad>", "<s>", "</s>")[number] for number in range(config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges(["3 4"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    quant = gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[quant][0]
    for name, tensor in load_file(folder / "model.safetensors").items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        array = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            count = heads if "q_proj" in name else groups
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        small = array.ndim == 1 or array.shape[-1] % block
        of = gguf.GGMLQuantizationType.F32 if small else quant
        data = np.ascontiguousarray(array) if small else blocks_of(np.ascontiguousarray(array), kind)
        writer.add_tensor(found, data, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
