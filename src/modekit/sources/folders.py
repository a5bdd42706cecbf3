"""Where a model or an adapter lies that a recipe or a command names: a folder, or the hub, from where it is downloaded."""

from __future__ import annotations

from pathlib import Path

from modekit.errors import SourceError
from modekit.recipes.paths import may_be_hub_id
from modekit.run import QUIET, Run
from modekit.sources.weight_files import FROM_GGUF


def model_folder(
    spec: str, revision: str | None = None, *, root: Path, label: str, run: Run = QUIET, as_adapter: bool = False
) -> tuple[Path, str | None]:
    """The folder, and its commit where it is the hub's. `spec`: a path relative to `root`, or a hub id. Raises SourceError."""
    where = f"{label} ({spec})"
    try:
        path = (root / Path(spec).expanduser()).resolve()
        is_local = path.is_dir()
        is_file = path.is_file()
    except (OSError, RuntimeError, ValueError):  # a name too long for the file system, ~ of a user that does not exist, a NUL
        path = root / spec
        is_local = False
        is_file = False
    if is_local and revision is not None:
        raise SourceError(
            "a revision has no effect with a folder",
            where=where,
            found=revision,
            remedy="remove revision, or name the model by its hub id",
        )
    if is_local:
        return path, None
    if is_file:
        raise SourceError(
            "a file is named in place of a folder",
            where=where,
            found=str(path),
            remedy=FROM_GGUF if path.suffix == ".gguf" else "name the folder of the model or adapter that the file is part of",
        )
    if not may_be_hub_id(spec):
        raise SourceError("model folder does not exist", where=where, found=str(path), remedy="correct the path")
    from modekit.sources.hub import download  # its import takes longer than a whole local plan

    folder = download(spec, revision, where=where, run=run, as_adapter=as_adapter)
    return folder, folder.name
