"""Quantised weights of model folders: fp8 with scales per block, and bitsandbytes' 4 bits (nf4, fp4).

Which packed tensors make which weight follows from config.json and the files' headers; the numbers are computed where they are
read, block by block in float32 (contents.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from modekit.errors import SourceError
from modekit.files.json import parse_json
from modekit.files.read import UNREADABLE, open_regular
from modekit.files.typed import as_kind
from modekit.sources.config import Config, no_usable
from modekit.sources.header import DTYPE_NAMES, TensorRef

Read = Callable[[TensorRef, int, int], memoryview]
"""Bytes [start, stop) of a tensor in a file."""
Array32 = npt.NDArray[np.float32]

_REMEDY = "download or save the model again, or give the unquantised model"
_LARGEST_STATE = 2**16  # bytes of the JSON that bitsandbytes writes for each weight
_NUMBERS: dict[str, np.dtype[np.generic]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U8": np.dtype(np.uint8),
}
_FLOATS = ("F32", "F16", "BF16")
_STATE = ".weight.quant_state.bitsandbytes__"
_UNUSED = (".input_scale", ".output_scale", ".activation_scale", ".input_scale_ub", ".k_scale", ".v_scale")
"""What quantised layers do to their inputs, which is of no weight."""


@dataclass(frozen=True, kw_only=True)
class PackedRef(TensorRef):
    """A tensor that is computed where it is read. `start` and `end` count bytes of its numbers in float32.

    `written`: the safetensors dtype that it gets where a recipe says `dtype: source`.
    """

    form: Form
    written: str

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """The tensors in files that it is computed from."""
        return tuple(each for part in self.form.parts for each in part.parts)

    @property
    def source_dtype(self) -> str:
        """That of the model."""
        return self.written

    def unpacked(self, read: Read, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of its own in float32."""
        start = self.start + start
        stop = self.start + stop
        size = 4 * self.form.unit
        first = start // size
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found and named by who reads it
            values = self.form.values(read, first, -(-stop // size))
        found: memoryview = (
            np.ascontiguousarray(values, np.float32).view(np.uint8).data[start - first * size : stop - first * size]
        )
        return found


def packed(name: str, form: Form, written: str) -> PackedRef:
    """A tensor of a form."""
    first = form.parts[0]
    size = 4 * math.prod(form.shape)
    return PackedRef(name, first.file, "F32", form.shape, 0, size, first.state, form=form, written=written)


def _numbers(read: Read, ref: TensorRef, first: int = 0, last: int | None = None) -> Array32:
    """Rows of a tensor in a file."""
    last = (ref.shape[0] if ref.shape else 1) if last is None else last
    row = ref.nbytes // max(1, ref.shape[0] if ref.shape else 1)
    found = np.frombuffer(read(ref, first * row, last * row), _NUMBERS[ref.dtype])
    return found.reshape(-1, *ref.shape[1:]).astype(np.float32)


@dataclass(frozen=True)
class Form:
    """How numbers are kept. `parts`: what they are computed from; `unit`: how many are computed together."""

    parts: tuple[TensorRef, ...]
    shape: tuple[int, ...]
    unit: int

    def values(self, read: Read, first: int, last: int) -> Array32:
        """Units first to last, flat; of the last unit as many numbers as there are."""
        raise NotImplementedError


@dataclass(frozen=True)
class Scaled(Form):
    """fp8 numbers with a scale per block of rows and columns, per row or for the tensor: W = Q * scale. A unit is a row."""

    block: tuple[int, int]

    def values(self, read: Read, first: int, last: int) -> Array32:
        """Rows first to last, flat."""
        weight, scale = self.parts
        rows, columns = np.arange(first, last) // self.block[0], np.arange(self.unit) // self.block[1]
        grid = _numbers(read, scale).reshape(-(-weight.shape[0] // self.block[0]), -1)
        scales = grid[rows][:, columns] if grid.shape[1] > 1 else grid[rows]
        return np.asarray(_numbers(read, weight, first, last) * scales).ravel()


@dataclass(frozen=True)
class Coded(Form):
    """bitsandbytes' 4 bits: an index into 16 numbers per element, and the largest number of each block, which is a unit. These
    may be kept so themselves, by 8 bits, an index into 256 numbers.

    W = code[index] * absmax + offset, by bitsandbytes' dequantize_4bit; of two in a byte the first lies in the upper half.
    """

    offset: float | None = None

    def values(self, read: Read, first: int, last: int) -> Array32:
        """Blocks first to last, flat; of the last block as many numbers as there are."""
        weight, absmax, code = self.parts
        start, stop = first * self.unit, min(last * self.unit, math.prod(self.shape))
        in_byte = 2 if code.numel == 16 else 1
        index = np.frombuffer(read(weight, start // in_byte, -(-stop // in_byte)), np.uint8)
        if in_byte == 2:
            index = np.stack([index >> 4, index & 15], axis=1).ravel()[: stop - start]
        largest = np.repeat(_numbers(read, absmax, first, last), self.unit)[: stop - start]
        found = _numbers(read, code)[index] * largest
        return np.asarray(found if self.offset is None else found + np.float32(self.offset))


_Block = Annotated[int, Field(ge=1, le=2**40)]  # numpy divides by it


class _Bits4(BaseModel):
    """What bitsandbytes says of one weight."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: Annotated[int, Field(ge=2, le=2**16, multiple_of=2)]
    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    nested_blocksize: Annotated[int, Field(ge=1, le=2**16)] | None = None
    nested_offset: Annotated[float, Field(allow_inf_nan=False)] = 0.0


def unpack(
    settings: object, config: Config, tensors: Mapping[str, TensorRef], *, where: str
) -> tuple[dict[str, TensorRef], str]:
    """A quantised model's tensors, as any model has them, and what they are in, for a sentence: 4 bits (bitsandbytes).

    `settings` is config.json's quantization_config. Raises SourceError: a form that is not read, or parts that do not fit.
    """
    said = settings if isinstance(settings, Mapping) else {}
    method = str(said.get("quant_method"))
    parts = _Parts(tensors, where)
    if not (method == "fp8" or (method == "bitsandbytes" and not said.get("load_in_8bit"))):
        raise SourceError(
            "the model is quantised in a form that modekit does not read",
            where=f"{where}: config.json",
            found=f"quant_method {method}",
            expected="fp8, or bitsandbytes with 4 bits",
            remedy="give the unquantised model, or unpack it with the library that quantised it and save it again",
        )
    try:
        named: Iterator[tuple[str, Form]] = parts.of_bitsandbytes()
        if method == "fp8":
            block = said.get("weight_block_size")
            named = parts.of_fp8(None if block is None else as_kind(block, tuple[_Block, _Block]))
        forms = dict(named)
    except (ValueError, TypeError) as error:  # of the settings
        raise no_usable(f"settings of {method}", error, None, f"{where}: config.json", _REMEDY) from None
    if not forms:
        raise SourceError(
            f"config.json says that the weights are quantised ({method}), and none is",
            where=where,
            remedy="remove quantization_config from config.json if they are plain; else give the unquantised model",
        )
    dtype = str(config.get("dtype") or config.get("torch_dtype"))
    written = next((code for code, name in DTYPE_NAMES.items() if name == dtype), "BF16")
    made = {name: packed(name, form, written) for name, form in forms.items()}
    read = {part.name for ref in made.values() for part in ref.parts}
    found = {
        name: ref for name, ref in tensors.items() if name not in read and not name.endswith(_UNUSED) and _STATE not in name
    }
    return found | made, f"{8 if method == 'fp8' else 4} bits ({method})"


@dataclass(frozen=True)
class _Parts:
    """The packed tensors of a model, taken by name and checked. Everything here raises SourceError."""

    tensors: Mapping[str, TensorRef]
    where: str

    def part(self, name: str, dtypes: Sequence[str], shape: tuple[int, ...] | None = None) -> TensorRef:
        """A tensor that must have one of these dtypes, and this shape."""
        ref = self.tensors.get(name)
        if ref is None:
            raise SourceError(
                "a part of a quantised weight is missing",
                where=f"{self.where}: {name}",
                remedy=_REMEDY,
            )
        if ref.dtype not in dtypes or shape not in (None, ref.shape):
            raise self.other(name, f"{ref.dtype} {list(ref.shape)}", f"{' or '.join(dtypes)} {list(shape or ())}")
        return ref

    def other(self, name: str, found: object, expected: object) -> SourceError:
        """The error of a tensor that contradicts the others or config.json."""
        return SourceError(
            "a quantised weight is not what config.json and its other parts say",
            where=f"{self.where}: {name}",
            found=found,
            expected=expected,
            remedy=_REMEDY,
        )

    def of_bitsandbytes(self) -> Iterator[tuple[str, Form]]:
        """An index, absmax and the 16 numbers per weight, and JSON that says how they lie."""
        for state in [ref for name, ref in self.tensors.items() if _STATE in name]:
            name = f"{state.name.partition(_STATE)[0]}.weight"
            try:
                if state.nbytes > _LARGEST_STATE:
                    raise ValueError(f"{state.nbytes:,} bytes")
                with open_regular(state.file) as stream:
                    stream.seek(state.start)
                    said = as_kind(parse_json(stream.read(state.nbytes).decode("utf-8")), _Bits4)
            except UNREADABLE as error:
                raise SourceError(
                    "bitsandbytes' description of a weight cannot be read",
                    where=f"{self.where}: {state.name}",
                    found=error,
                    remedy=_REMEDY,
                ) from None
            count = math.prod(said.shape)
            blocks = -(-count // said.blocksize)
            weight = self.part(name, ("U8", *_FLOATS))
            if weight.nbytes != -(-count // 2):
                raise self.other(name, f"{weight.nbytes} bytes", f"4 bits for each of {list(said.shape)}")
            nested = said.nested_blocksize
            absmax = self.part(f"{name}.absmax", ("F32",) if nested is None else ("U8",), (blocks,))
            if nested is not None:
                scale = self.part(f"{name}.nested_absmax", ("F32",), (-(-blocks // nested),))
                codes = self.part(f"{name}.nested_quant_map", ("F32",), (256,))
                above = Coded((absmax, scale, codes), (blocks,), nested, said.nested_offset)
                absmax = packed(absmax.name, above, "F32")
            code = self.part(f"{name}.quant_map", ("F32",), (16,))
            yield name, Coded((weight, absmax, code), said.shape, said.blocksize)

    def of_fp8(self, block: tuple[int, int] | None) -> Iterator[tuple[str, Form]]:
        """A scale per block, row or tensor; `block` is what config.json says."""
        for suffix in (".weight_scale_inv", ".weight_scale"):
            for name in [f"{each.removesuffix(suffix)}.weight" for each in self.tensors if each.endswith(suffix)]:
                weight = self.part(name, ("F8_E4M3", "F8_E5M2"))
                scale = self.part(f"{name.removesuffix('.weight')}{suffix}", (*_FLOATS, "F8_E8M0"))
                above, beside = (*scale.shape, 1, 1)[:2]
                rows, columns = weight.shape if len(weight.shape) == 2 and weight.numel else (0, 0)
                fits = block is not None and (above, beside) == (-(-rows // block[0]), -(-columns // block[1]))
                if not rows or len(scale.shape) > 2 or not scale.numel or not (fits or rows % above == 0 == columns % beside):
                    raise self.other(
                        scale.name,
                        list(scale.shape),
                        f"a scale for each block of {list(block or weight.shape)} in {list(weight.shape)}",
                    )
                each = block if block is not None and fits else (rows // above, columns // beside)
                yield name, Scaled((weight, scale), weight.shape, columns, each)
