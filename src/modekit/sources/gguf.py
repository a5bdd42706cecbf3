"""The header of a GGUF file: settings, and which tensors lie where. Nothing is allocated that the file's size does not bound.

magic, version, counts; then keys with values; then name, dimensions (the fastest first), type and offset of each tensor; then
the data (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from modekit.errors import SourceError
from modekit.files.read import FileState, open_regular
from modekit.sources.model import TensorRef
from modekit.sources.packed import Ggml

Scalar = int | float | bool | str
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST = 2**16
"""Keys, and tensors: a model of 128 layers has 2,000."""
_LONGEST_NAME, _LONGEST_TOKEN, _LONGEST_TEXT = 256, 4_096, 2**20  # bytes; a chat template is a text
_LARGEST_HEADER = 2**28
_REMEDY = "download the file again"


@dataclass(frozen=True)
class Gguf:
    """A file's settings (lists are left out) and tensors; `shape` of a tensor as numpy has it, rows first."""

    file: Path
    state: FileState
    settings: dict[str, Scalar]
    tensors: dict[str, Ggml]

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the family."""
        return str(self.settings.get("general.architecture", ""))

    def kinds(self) -> dict[str, tuple[int, float]]:
        """Name of each type of its matrices -> elements in it, and bits of one."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        found: dict[str, tuple[int, float]] = {}
        for tensor in self.tensors.values():
            if len(tensor.shape) > 1:
                kind = GGMLQuantizationType(tensor.kind)
                block, size = GGML_QUANT_SIZES[kind]
                count = found.get(kind.name, (0, 0.0))[0] + math.prod(tensor.shape)
                found[kind.name] = (count, 8 * size / block)
        return found


def read_gguf(file: Path, *, where: str) -> Gguf:
    """The header of a GGUF file. Raises SourceError: not installed, no GGUF, damaged, or sizes that the file does not have."""
    try:
        import gguf
    except ImportError:
        raise SourceError(
            "a GGUF file is read with a package that is not installed", where=where, remedy="pip install 'modekit[quantised]'"
        ) from None
    where, kinds = f"{where}: {file.name}", {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    try:
        with open_regular(file) as raw:
            state = FileState.of(raw)
            found = _GgufHeader(io.BufferedReader(raw), state.size, kinds).read(file, state)
    except OSError as error:
        raise SourceError("file cannot be read", where=where, found=error.strerror, remedy=_REMEDY) from None
    except (ValueError, struct.error) as error:
        raise SourceError("the GGUF file is damaged, or none", where=where, found=error, remedy=_REMEDY) from None
    if not found.architecture or not found.tensors:
        raise SourceError("the GGUF file holds no model", where=where, remedy="give a file with weights")
    return found


class _GgufHeader:
    """Reads a header in order; ValueError for what cannot be, struct.error where the file ends."""

    def __init__(self, stream: io.BufferedReader, size: int, kinds: dict[int, tuple[int, int]]) -> None:
        self._stream, self._size = stream, min(size, _LARGEST_HEADER)
        self._whole, self._kinds = size, kinds

    def read(self, file: Path, state: FileState) -> Gguf:
        """All of it."""
        magic, version = self._bytes(4), self._number("<I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}")
        tensors, keys = self._number("<Q"), self._number("<Q")
        if tensors > _MOST or keys > _MOST:
            raise ValueError(f"{tensors:,} tensors and {keys:,} keys")
        settings: dict[str, Scalar] = {}
        for _ in range(int(keys)):
            key = self._text(_LONGEST_NAME)
            value = self._value(int(self._number("<I")), _LONGEST_TEXT)
            if key in settings:
                raise ValueError(f"{key} is given twice")
            settings[key] = "" if value is None else value
        entries = [self._entry() for _ in range(int(tensors))]
        alignment = settings.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment {alignment}")
        start = -(-self._stream.tell() // alignment) * alignment
        return Gguf(file, state, settings, self._placed(entries, start, alignment, file, state))

    def _placed(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, file: Path, state: FileState
    ) -> dict[str, Ggml]:
        """The tensors by name, one after the other in the file."""
        found: dict[str, Ggml] = {}
        position = 0
        for name, shape, kind, offset in sorted(entries, key=lambda entry: entry[3]):
            if kind not in self._kinds:
                raise ValueError(f"{name}: type {kind} is not known")
            block, size = self._kinds[kind]
            nbytes = math.prod(shape) // block * size
            if (
                name in found
                or offset % alignment
                or offset < position
                or shape[-1] % block
                or start + offset + nbytes > self._whole
            ):
                raise ValueError(f"{name}: {list(shape)} of type {kind} at byte {offset} of {self._whole - start:,}")
            position = offset + nbytes
            ref = TensorRef(name, file, "U8", (nbytes,), start + offset, start + position, state)
            found[name] = Ggml(ref, kind, shape)
        return found

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self._text(_LONGEST_NAME), int(self._number("<I"))
        if not 1 <= axes <= 4:
            raise ValueError(f"{name}: {axes} axes")
        shape = tuple(int(self._number("<Q")) for _ in range(axes))[::-1]
        if not all(1 <= each <= 2**40 for each in shape):
            raise ValueError(f"{name}: {list(shape)}")
        return name, shape, int(self._number("<I")), int(self._number("<Q"))

    def _value(self, kind: int, longest: int) -> Scalar | None:
        """A value; of a list, which is passed over, None."""
        if kind == _STRING:
            return self._text(longest)
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a value of kind {kind}")
        inner, count = int(self._number("<I")), int(self._number("<Q"))
        if inner in _SCALARS:
            self._bytes(count * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING and count <= self._size // 8:
            for _ in range(count):
                self._bytes(self._length(_LONGEST_TOKEN))
        else:
            raise ValueError(f"a list of kind {inner}, {count:,} long")
        return None

    def _number(self, form: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(form, self._bytes(struct.calcsize(form)))[0]
        return value

    def _text(self, longest: int) -> str:
        return self._bytes(self._length(longest)).decode("utf-8")

    def _length(self, longest: int) -> int:
        length = int(self._number("<Q"))
        if length > longest:
            raise ValueError(f"a text of {length:,} bytes")
        return length

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._stream.tell():
            raise ValueError("the file ends within its header")
        return self._stream.read(count)
