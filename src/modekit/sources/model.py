"""Model folders read by header: which tensors, where their bytes lie, and the bytes themselves, memory-mapped.

Nothing here imports torch. A safetensors file is 8 bytes of header length (little endian), a JSON header with dtype,
shape and data_offsets per tensor, then the data; every claim of the header is checked against the file's size before
a tensor is used.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from modekit.errors import SourceError
from modekit.files.read import open_regular
from modekit.run import QUIET, Run

ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""safetensors name -> name used in recipes and config.json; the dtypes a mixture can be built from."""

SPECIALIST_FILE = "specialist.json"
"""Beside a model that `modekit specialize` made: what it trained."""

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "consolidated.00.pth")
_LARGEST_HEADER = 100 * 2**20
_REMEDY = "download or save the file again"


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a file: safetensors dtype, shape, and the absolute byte range [start, end)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(file: Path, *, where: str) -> dict[str, TensorRef]:
    """Tensors of one safetensors file.

    Raises SourceError when the file is truncated, garbage, or its header lies about sizes.
    """
    where = f"{where}: {file.name}"
    header, data_start, size = _parsed_header(file, where)
    try:
        tensors = {
            name: _ref_of(name, entry, file, (data_start, size), where)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise SourceError("safetensors header is malformed", where=where, remedy=_REMEDY) from None
    _check_gapless(tensors.values(), data_start, where)
    return tensors


def _parsed_header(file: Path, where: str) -> tuple[dict[str, Any], int, int]:
    """The header as data, where the tensors' bytes start, and the file's size. Raises SourceError."""
    try:
        size = file.stat().st_size
        with open_regular(file) as opened, io.BufferedReader(opened) as stream:
            raw_length = stream.read(8)
            if len(raw_length) < 8:
                raise SourceError("safetensors file is truncated", where=where, found=f"{size} bytes", remedy=_REMEDY)
            (length,) = struct.unpack("<Q", raw_length)
            if length > min(size - 8, _LARGEST_HEADER):
                raise SourceError(
                    "not a safetensors file, or its header is truncated", where=where,
                    found=f"a header of {length} bytes in a file of {size}", remedy=_REMEDY,
                )  # fmt: skip
            return json.loads(stream.read(length)), 8 + length, size
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise SourceError("safetensors header is not JSON", where=where, remedy=_REMEDY) from None
    except OSError as error:
        raise SourceError("file cannot be read", where=where, found=error.strerror, remedy=_REMEDY) from None


def _ref_of(name: str, entry: Mapping[str, Any], file: Path, extent: tuple[int, int], where: str) -> TensorRef:
    """A header's entry, checked against where data starts and ends.

    Raises SourceError, and ValueError and its like for what is no entry. Of dtypes that cannot be mixed (and are refused by
    the plan), only the range is checked.
    """
    data_start, size = extent
    begin, end = entry["data_offsets"]
    ref = TensorRef(name, file, entry["dtype"], tuple(entry["shape"]), data_start + begin, data_start + end)
    if not all(isinstance(number, int) and number >= 0 for number in (begin, end, *ref.shape)):
        raise ValueError("sizes must be whole numbers")
    itemsize = ITEMSIZE.get(ref.dtype)
    if begin > end or ref.end > size or (itemsize is not None and ref.nbytes != ref.numel * itemsize):
        raise SourceError(
            "safetensors header and data disagree (truncated or damaged file)", where=f"{where}: {name}",
            found=f"{ref.dtype} {list(ref.shape)} at bytes {begin}..{end}, file has {size - data_start} bytes of data",
            remedy=_REMEDY,
        )  # fmt: skip
    return ref


def _check_gapless(refs: Iterable[TensorRef], position: int, where: str) -> None:
    """Raise SourceError unless the tensors lie one after the other from `position` on."""
    for ref in sorted(refs, key=lambda ref: (ref.start, ref.end)):
        if ref.start != position:
            raise SourceError(
                "safetensors header and data disagree (tensors overlap or leave a hole)", where=f"{where}: {ref.name}",
                found=f"it starts at byte {ref.start}", expected=f"byte {position}, where the tensor before it ends",
                remedy=_REMEDY,
            )  # fmt: skip
        position = ref.end


@dataclass(frozen=True)
class ModelSource:
    """A dense model on disk.

    `label` is what messages call it (base_model, experts[2] 'law'); `spec` is what the recipe says.
    """

    label: str
    spec: str
    folder: Path
    revision: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)
    tensors: Mapping[str, TensorRef] = field(default_factory=dict, compare=False)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Weight files in name order."""
        return tuple(sorted({ref.file for ref in self.tensors.values()}))

    def tensor(self, name: str) -> TensorRef:
        """A tensor by name. Raises SourceError when it is missing."""
        try:
            return self.tensors[name]
        except KeyError:
            raise SourceError(
                "tensor is missing", where=f"{self.label}: {name}", found=f"{len(self.tensors)} other tensors in {self.spec}",
                remedy="check that the download is complete and the model is of the base model's family",
            ) from None  # fmt: skip


class Mappings:
    """Memory maps of source files, opened on first use and closed together."""

    def __init__(self) -> None:
        self._maps: dict[Path, tuple[mmap.mmap, memoryview]] = {}
        self._files: dict[Path, io.FileIO] = {}

    def view(self, ref: TensorRef) -> memoryview:
        """The tensor's bytes, without a copy. Raises SourceError when the file has become shorter."""
        view = self.file(ref.file)[ref.start : ref.end]
        if len(view) != ref.nbytes:
            raise SourceError(
                "a source file became shorter during the build", where=f"{ref.file}: {ref.name}",
                remedy="leave the models alone while they are read, and build again",
            )  # fmt: skip
        return view

    def file(self, path: Path) -> memoryview:
        """A whole file's bytes, without a copy."""
        if path not in self._maps:
            mapped = mmap.mmap(self.descriptor(path), 0, access=mmap.ACCESS_READ)
            self._maps[path] = (mapped, memoryview(mapped))
        return self._maps[path][1]

    def descriptor(self, path: Path) -> int:
        """An open file descriptor of a file."""
        if path not in self._files:
            try:
                self._files[path] = path.open("rb", buffering=0)
            except OSError as error:
                raise SourceError(
                    "a source file cannot be read", where=str(path), found=error.strerror, remedy="put it back and build again"
                ) from None
        return self._files[path].fileno()

    def forget(self, ref: TensorRef) -> None:
        """Tell the kernel that a tensor's pages are no longer needed, so that resident memory stays flat."""
        if ref.file not in self._maps:
            return
        page = mmap.PAGESIZE
        start, end = -(-ref.start // page) * page, ref.end // page * page
        if end > start and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[ref.file][0].madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Release all maps and files; a map that a view still holds (while an error is on its way) goes with the view."""
        for mapped, view in self._maps.values():
            with suppress(BufferError):
                view.release()
                mapped.close()
        for file in self._files.values():
            file.close()
        self._maps.clear()
        self._files.clear()


def open_source(label: str, spec: str, folder: Path, *, revision: str | None = None, run: Run = QUIET) -> ModelSource:
    """Read config and headers of a model folder.

    Raises SourceError: missing folder or weights, pickle checkpoints, an adapter, custom code without the flag, damage.
    """
    where = f"{label} ({spec})"
    if not folder.is_dir():
        raise SourceError("model folder does not exist", where=where, found=str(folder), remedy="correct the path")
    config = read_config(folder, where=where)
    check_no_code(config, where=where, run=run)
    tensors: dict[str, TensorRef] = {}
    for file in _weight_files(folder, where=where):
        tensors.update(read_header(file, where=where))
    return ModelSource(label, spec, folder, revision, config, tensors)


def check_no_code(config: Mapping[str, Any], *, where: str, run: Run) -> None:
    """Raise SourceError when a model brings Python of its own and the user did not accept it."""
    if config.get("auto_map") and not run.trust_remote_code:
        raise SourceError(
            "the model brings code of its own (auto_map in config.json)", where=where, found=config["auto_map"],
            remedy="check that the weights follow the named family, then pass --trust-remote-code",
        )  # fmt: skip


def read_config(folder: Path, *, where: str) -> dict[str, Any]:
    """A model's config.json as data. Raises SourceError when it is missing or not JSON."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        _refuse_adapter(folder, where=where)
        raise SourceError("config.json is missing", where=where, remedy="give a transformers model folder") from None
    except (OSError, ValueError) as error:
        raise SourceError(
            "config.json cannot be read", where=where, found=error, remedy="download or save the model again"
        ) from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise SourceError("config.json names no model_type", where=where, remedy="give a transformers model folder")
    return config


def _refuse_adapter(folder: Path, *, where: str) -> None:
    if (folder / "adapter_config.json").exists():
        raise SourceError(
            "this is an adapter, not a full model", where=where,
            remedy="name it as adapter: in place of model: in the recipe",
        ) from None  # fmt: skip


def _weight_files(folder: Path, *, where: str) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [folder / Path(name).name for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise SourceError(
                "the safetensors index cannot be read",
                where=f"{where}: {index.name}",
                remedy="download or save the model again",
            ) from None
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise SourceError(
                "shards named by the index are missing", where=where, found=", ".join(missing),
                remedy="download the model again",
            )  # fmt: skip
        return files
    if single.exists():
        return [single]
    _refuse_adapter(folder, where=where)
    pickles = [name for name in _PICKLES if (folder / name).exists()]
    if pickles:
        raise SourceError(
            "the weights are pickled, which can run code when opened; modekit reads safetensors only",
            where=where,
            found=", ".join(pickles),
            remedy="convert once where you trust the file: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",
        )
    raise SourceError(
        "no safetensors weights", where=where, remedy="the folder needs model.safetensors or shards with an index"
    )
