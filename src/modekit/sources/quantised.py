"""Model folders with quantised weights: which packed tensors make which weight, by config.json and the files' headers.

What config.json says of its packing is checked against the shapes of the parts, so that nothing is larger than its files.

Shape legend: O, I rows and columns of a weight; G groups of columns with a scale of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from modekit.errors import SourceError
from modekit.files.read import UNREADABLE, parse_json
from modekit.files.typed import as_kind
from modekit.sources.family import Config, no_usable
from modekit.sources.model import DTYPE_NAMES, TensorRef, WeightFiles
from modekit.sources.model_config import Number, Size
from modekit.sources.packed import Coded, DoubleQuantised, PackedRef, Scaled, Words

_REMEDY = "download or save the model again, or give the unquantised model"
_LARGEST_STATE = 2**16  # bytes of the JSON that bitsandbytes writes for each weight
_FLOATS = ("F32", "F16", "BF16")
_SMALL = ("F8_E4M3", "F8_E5M2", "I8")
_STATE = ".weight.quant_state.bitsandbytes__"
_COMPRESSED = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_UNUSED = (".input_scale", ".output_scale", ".activation_scale", ".input_scale_ub", ".k_scale", ".v_scale", ".weight_format")
"""What quantised layers do to their inputs, which is of no weight."""
_AS_WRITTEN = {name: code for code, name in DTYPE_NAMES.items()}

Bits = Annotated[int, Field(ge=2, le=8, strict=True)]
Group = Annotated[int, Field(ge=-1, le=2**40, strict=True)]


class _Words(BaseModel):
    """GPTQ's and AWQ's settings."""

    bits: Bits
    group_size: Group = 128
    checkpoint_format: str | None = None
    version: str | None = None


class _Blocks(BaseModel):
    weight_block_size: tuple[Size, Size] | None = None


class _Weights(BaseModel):
    num_bits: Bits
    block_structure: tuple[Size, Size] | None = None


class _Scheme(BaseModel):
    weights: _Weights | None = None


class _Groups(BaseModel):
    config_groups: dict[str, _Scheme]
    format: str


class _State(BaseModel):
    """What bitsandbytes says of one weight."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: Annotated[int, Field(ge=2, le=2**16)]
    shape: tuple[Size, Size]
    nested_blocksize: Size | None = None
    nested_offset: Number = 0.0


@dataclass(frozen=True)
class Unpacked:
    """A quantised model's tensors, as any model has them, and what they were in, for a sentence: 4 bits (GPTQ)."""

    tensors: dict[str, TensorRef]
    said: str


def unpack(said: object, config: Config, weights: WeightFiles) -> Unpacked:
    """The tensors of files with quantised weights; `said` is config.json's quantization_config.

    Raises SourceError: a form that is not read, or parts that do not fit each other.
    """
    where, method = weights.where, said.get("quant_method") if isinstance(said, Mapping) else None
    written = _AS_WRITTEN.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    if method == "gguf":
        from modekit.sources.gguf_model import tensors_of  # which imports torch

        return tensors_of(weights.files[0], config, written, where=where)
    reader = _READERS.get(str(method))
    if reader is None or not isinstance(said, Mapping):
        raise SourceError(
            "the model is quantised in a form that modekit does not read",
            where=f"{where}: config.json",
            found=f"quant_method {method}",
            expected=", ".join([*_READERS, "a GGUF file"]),
            remedy="give the unquantised model, or dequantise it with its own library and save it again",
        )
    tensors = weights.tensors()
    parts = _Parts(weights, said, tensors)
    try:
        forms = dict(reader(parts))
    except (ValueError, TypeError) as error:  # of the settings
        raise no_usable(f"settings of {method}", error, None, f"{where}: config.json", _REMEDY) from None
    if not forms:
        raise SourceError(
            f"config.json says that the weights are quantised ({method}), and none is",
            where=where,
            remedy="remove quantization_config from config.json if they are plain; else give the unquantised model",
        )
    used = {ref.name for form in forms.values() for ref in form.parts} | parts.used
    plain = {name: ref for name, ref in tensors.items() if name not in used and not name.endswith(_UNUSED)}
    shapes = {name: form.weight.shape if isinstance(form, Scaled) else form.shape for name, form in forms.items()}
    packed = {name: PackedRef.of(name, shapes[name], form, written) for name, form in forms.items()}
    return Unpacked({**plain, **packed}, f"{' and '.join(sorted(parts.bits))} bits ({method})")


def _damaged(what: str, where: object, found: object = None, expected: object = None) -> SourceError:
    return SourceError(what, where=str(where), found=found, expected=expected, remedy=_REMEDY)


class _Parts:
    """The packed tensors of a model, taken by name and checked. Everything here raises SourceError."""

    def __init__(self, weights: WeightFiles, settings: Mapping[str, object], tensors: Mapping[str, TensorRef]) -> None:
        self.weights, self.where, self.settings, self.tensors = weights, weights.where, dict(settings), tensors
        self.used: set[str] = set()
        self.bits: set[str] = set()

    def modules(self, suffix: str) -> Iterator[str]:
        """Of the tensors whose names end so, what stands before."""
        yield from (name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix))

    def there(self, name: str, dtypes: Sequence[str], *shapes: tuple[int, ...]) -> TensorRef | None:
        """A tensor that must have one of these dtypes and shapes, if there is one."""
        ref = self.tensors.get(name)
        if ref is not None and (ref.dtype not in dtypes or (shapes and ref.shape not in shapes)):
            expected = f"{' or '.join(dtypes)} {' or '.join(str(list(shape)) for shape in shapes)}"
            self.refuse(name, f"{ref.dtype} {list(ref.shape)}", expected)
        return ref

    def part(self, name: str, dtypes: Sequence[str], *shapes: tuple[int, ...]) -> TensorRef:
        """The same of one that must be there."""
        ref = self.there(name, dtypes, *shapes)
        if ref is None:
            raise _damaged("a part of a quantised weight is missing", f"{self.where}: {name}")
        return ref

    def matrix(self, name: str, dtypes: Sequence[str]) -> TensorRef:
        """The same of one with two axes and something in it."""
        ref = self.part(name, dtypes)
        if len(ref.shape) != 2 or not ref.numel:
            self.refuse(name, f"{ref.dtype} {list(ref.shape)}", "two axes")
        return ref

    def content(self, ref: TensorRef) -> bytes:
        """A small tensor's bytes. Raises OSError and ValueError."""
        if ref.nbytes > _LARGEST_STATE:
            raise ValueError(f"{ref.nbytes:,} bytes")
        return self.weights.content(ref)

    def refuse(self, name: str, found: object, expected: object) -> None:
        """Raise the error of a tensor that contradicts the others or config.json."""
        what = "a quantised weight is not what config.json and its other parts say"
        raise _damaged(what, f"{self.where}: {name}", found, expected)


Found = Iterator[tuple[str, Scaled | Coded | Words]]


def _bitsandbytes(parts: _Parts) -> Found:
    """4 bits: an index, absmax and the 16 numbers per weight, and JSON. 8 bits: integers and 127 times a scale per row."""
    for name in [name for name in parts.tensors if _STATE in name]:
        module = name.partition(_STATE)[0]
        yield f"{module}.weight", _coded(parts, f"{module}.weight", parts.tensors[name])
    for module in parts.modules(".SCB"):
        weight = parts.matrix(f"{module}.weight", ("I8",))
        scale = parts.part(f"{module}.SCB", _FLOATS, (weight.shape[0],), (weight.shape[0], 1))
        parts.bits.add("8")
        yield weight.name, Scaled(weight, scale, (1, weight.shape[1]), 1 / 127)


def _coded(parts: _Parts, name: str, state: TensorRef) -> Coded:
    try:
        said = as_kind(parse_json(parts.content(state).decode("utf-8")), _State)
    except UNREADABLE as error:
        what = "bitsandbytes' description of a weight cannot be read"
        raise _damaged(what, f"{parts.where}: {state.name}", error) from None
    count = math.prod(said.shape)
    blocks = -(-count // said.blocksize)
    weight = parts.part(name, ("U8", "BF16", "F16", "F32"))
    if weight.nbytes != -(-count // 2) or said.blocksize % 2:
        parts.refuse(
            name, f"{weight.nbytes} bytes, blocks of {said.blocksize}", f"4 bits for each of {list(said.shape)}, even blocks"
        )
    nested = None
    if said.nested_blocksize is not None:
        above = -(-blocks // said.nested_blocksize)
        scale = parts.part(f"{name}.nested_absmax", ("F32",), (above,))
        code = parts.part(f"{name}.nested_quant_map", ("F32",), (256,))
        nested = DoubleQuantised(scale, code, said.nested_blocksize, said.nested_offset)
    absmax = parts.part(f"{name}.absmax", ("F32",) if nested is None else ("U8",), (blocks,))
    parts.used.add(state.name)
    parts.bits.add("4")
    return Coded(weight, absmax, parts.part(f"{name}.quant_map", ("F32",), (16,)), said.blocksize, said.shape, nested)


def _gptq(parts: _Parts) -> Found:
    """`qweight` (I bits/32, O), scales (G, O), qzeros (G, O bits/32), g_idx (I,)."""
    said = as_kind(parts.settings, _Words)
    for module in parts.modules(".qweight"):
        weight = parts.matrix(f"{module}.qweight", ("I32",))
        scales = parts.matrix(f"{module}.scales", _FLOATS)
        shape = (weight.shape[0] * 32 // said.bits, weight.shape[1])
        words = -(-shape[1] * said.bits // 32)
        zeros = parts.part(f"{module}.qzeros", ("I32",), (scales.shape[0], words))
        order = parts.there(f"{module}.g_idx", ("I32",), (shape[0],))
        group = _group(parts, scales, shape, said.group_size)
        if weight.shape[0] * 32 % said.bits:
            parts.refuse(weight.name, list(weight.shape), f"whole numbers of {said.bits} bits")
        parts.bits.add(str(said.bits))
        shift = 0 if said.checkpoint_format == "gptq_v2" else 1
        yield f"{module}.weight", Words("gptq", shape[::-1], said.bits, group, weight, scales, zeros, order, shift)


def _awq(parts: _Parts) -> Found:
    """`qweight` (I, O/8), scales (G, O), qzeros (G, O/8)."""
    said = as_kind(parts.settings, _Words)
    if said.bits != 4 or (said.version or "gemm").lower() != "gemm":
        parts.refuse("config.json", f"{said.bits} bits, version {said.version}", "4 bits, version gemm")
    for module in parts.modules(".qweight"):
        weight = parts.matrix(f"{module}.qweight", ("I32",))
        scales = parts.matrix(f"{module}.scales", _FLOATS)
        inputs, outputs = weight.shape[0], weight.shape[1] * 8
        zeros = parts.part(f"{module}.qzeros", ("I32",), (scales.shape[0], weight.shape[1]))
        group = _group(parts, scales, (inputs, outputs), said.group_size)
        parts.bits.add("4")
        yield f"{module}.weight", Words("awq", (outputs, inputs), 4, group, weight, scales, zeros)


def _group(parts: _Parts, scales: TensorRef, shape: tuple[int, int], said: int) -> int:
    """Columns of a group, by the settings (-1: all) and as many scales (G, O); `shape` is (I, O)."""
    size = said if said > 0 else shape[0]
    expected = (-(-shape[0] // size), shape[1])
    if scales.shape != expected:
        parts.refuse(scales.name, list(scales.shape), f"{list(expected)}, by group_size {said}")
    return size


def _fp8(parts: _Parts) -> Found:
    """A scale per block, row or tensor."""
    said = as_kind(parts.settings, _Blocks)
    for suffix in (".weight_scale_inv", ".weight_scale"):
        for module in parts.modules(suffix):
            parts.bits.add("8")
            yield f"{module}.weight", _scaled(parts, module, suffix, said.weight_block_size)


def _scaled(parts: _Parts, module: str, suffix: str, said: tuple[int, int] | None) -> Scaled:
    weight = parts.matrix(f"{module}.weight", _SMALL)
    scale = parts.part(f"{module}{suffix}", (*_FLOATS, "F8_E8M0"))
    rows, columns = weight.shape
    above, beside = (*scale.shape, 1, 1)[:2]
    fits = said is not None and (above, beside) == (-(-rows // said[0]), -(-columns // said[1]))
    if len(scale.shape) > 2 or not scale.numel or not (fits or rows % above == 0 == columns % beside):
        parts.refuse(
            scale.name, list(scale.shape), f"a scale for each block of {list(said or weight.shape)} in {list(weight.shape)}"
        )
    zero = parts.there(f"{module}.weight_zero_point", ("I8",), scale.shape)
    return Scaled(weight, scale, said if said is not None and fits else (rows // above, columns // beside), zero=zero)


def _compressed(parts: _Parts) -> Found:
    """compressed-tensors: weight_packed (O, I bits/32) and weight_scale (O, G); or small numbers with a scale, as fp8."""
    said = as_kind(parts.settings, _Groups)
    weights = {scheme.weights.model_dump_json(): scheme.weights for scheme in said.config_groups.values() if scheme.weights}
    if said.format not in _COMPRESSED or len(weights) != 1:
        parts.refuse(
            "config.json", f"format {said.format}, {len(weights)} kinds of weights", f"one of {', '.join(_COMPRESSED)}"
        )
    (one,) = weights.values()
    parts.bits.add(str(one.num_bits))
    for module in parts.modules(".weight_packed"):
        yield f"{module}.weight", _pack_quantised(parts, module, one.num_bits)
    for module in parts.modules(".weight_scale"):
        if f"{module}.weight" in parts.tensors:
            yield f"{module}.weight", _scaled(parts, module, ".weight_scale", one.block_structure)


def _pack_quantised(parts: _Parts, module: str, bits: int) -> Words:
    weight = parts.matrix(f"{module}.weight_packed", ("I32",))
    stated = parts.part(f"{module}.weight_shape", ("I64",), (2,))
    parts.used.add(stated.name)
    try:
        content = parts.content(stated)
    except OSError as error:
        raise _damaged("a weight file cannot be read", stated.file, error.strerror) from None
    rows, columns = (int.from_bytes(content[start : start + 8], "little", signed=True) for start in (0, 8))
    if rows != weight.shape[0] or columns < 1 or -(-columns * bits // 32) != weight.shape[1]:
        parts.refuse(weight.name, list(weight.shape), f"{bits} bits for each of {[rows, columns]}")
    scales = parts.matrix(f"{module}.weight_scale", _FLOATS)
    groups = scales.shape[1]
    if scales.shape[0] != rows or columns % groups:
        parts.refuse(scales.name, list(scales.shape), f"{rows} rows, groups of the {columns} columns")
    zeros = parts.there(f"{module}.weight_zero_point", ("I32",), (-(-rows * bits // 32), groups))
    order = parts.there(f"{module}.weight_g_idx", ("I32",), (columns,))
    return Words("compressed", (rows, columns), bits, columns // groups, weight, scales, zeros, order)


_READERS: dict[str, Callable[[_Parts], Found]] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed,
}
