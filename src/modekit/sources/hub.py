"""Models on the hub: downloaded whole for a build, or read by their headers for a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import get_safetensors_metadata, parse_safetensors_file_metadata, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from modekit.errors import SourceError
from modekit.run import QUIET, Run
from modekit.sources.adapter import WEIGHTS_FILE, AdapterSource, adapter_of, open_adapter
from modekit.sources.model import ModelSource, TensorRef, open_source, source_of
from modekit.sources.model_config import check_no_code, read_config

_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*"]


def download(spec: str, revision: str | None, *, where: str) -> Path:
    """The local folder of a hub model, downloaded when it is not in the cache. Raises SourceError."""
    with _explained(where):
        patterns = [
            *_SMALL_FILES,
            "model*.safetensors",
            "adapter_model.safetensors",
        ]  # not consolidated.safetensors, the same weights again
        return Path(snapshot_download(spec, revision=revision, allow_patterns=patterns))


def open_hub_headers(label: str, spec: str, revision: str | None, *, run: Run = QUIET) -> ModelSource:
    """A hub model by config and tensor headers alone; no weights are downloaded. Raises SourceError."""
    where = f"{label} ({spec})"
    with _explained(where):
        folder = Path(snapshot_download(spec, revision=revision, allow_patterns=_SMALL_FILES))
    if any(folder.glob("model*.safetensors")):
        return open_source(label, spec, folder, revision=revision, run=run)
    config = read_config(folder, where=where)
    check_no_code(config, where=where, run=run)
    if config.get("quantization_config"):  # some forms say only in the weights what shape they have
        return open_source(label, spec, download(spec, revision, where=where), revision=revision, run=run)
    with _explained(where):
        metadata = get_safetensors_metadata(spec, revision=revision)
    files = (_refs(folder / file, header.tensors) for file, header in metadata.files_metadata.items())
    tensors = {name: ref for refs in files for name, ref in refs.items()}
    return source_of(label, spec, folder, revision, config, tensors)


def open_hub_adapter(label: str, spec: str, base: ModelSource, revision: str | None) -> AdapterSource:
    """A hub adapter by its config and the header of its weights, which are not downloaded. Raises as `open_adapter`."""
    where = f"{label} ({spec})"
    with _explained(where):
        folder = Path(snapshot_download(spec, revision=revision, allow_patterns=_SMALL_FILES))
    if (folder / WEIGHTS_FILE).exists():
        return open_adapter(label, spec, folder, base, revision=revision)
    with _explained(where):
        header = parse_safetensors_file_metadata(spec, WEIGHTS_FILE, revision=revision)
    return adapter_of(label, spec, folder, base, _refs(folder / WEIGHTS_FILE, header.tensors), revision=revision)


def _refs(file: Path, infos: Mapping[str, Any]) -> dict[str, TensorRef]:
    """Tensors of a file by what the hub tells of its header (huggingface_hub's TensorInfo)."""
    return {name: TensorRef(name, file, info.dtype, tuple(info.shape), *info.data_offsets) for name, info in infos.items()}


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except (RepositoryNotFoundError, HFValidationError):
        raise SourceError(
            "neither a folder nor a model on the hub",
            where=where,
            remedy="correct the path or the hub id (a private model needs a login)",
        ) from None
    except NotASafetensorsRepoError:
        raise SourceError(
            "the model on the hub has no safetensors weights", where=where, remedy="choose a revision with safetensors"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise SourceError(
            "no such folder, and the hub cannot be reached for a model of that name",
            where=where,
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            remedy="correct the path; or connect to the hub, or download the model elsewhere and give its folder",
        ) from None
