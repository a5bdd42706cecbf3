"""Models on the hub come into the hub's own cache, from where they are opened as any folder is.

huggingface_hub does the work: it takes up a download that was cut, and knows tokens, mirrors and proxies. Only files of the
kinds below are asked for: no code, nothing pickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils.tqdm import tqdm

from modekit.errors import SourceError
from modekit.files.typed import shortened
from modekit.run import Run
from modekit.sources.adapter import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config
from modekit.sources.source import SPECIALIST_FILE
from modekit.sources.tokenizer import COPIED_FILES
from modekit.sources.weight_files import INDEX_FILE, SINGLE_FILE, named_weights, no_weights, refuse_other_kinds

_SMALL_FILES = ("config.json", CONFIG_FILE, INDEX_FILE, SPECIALIST_FILE, *COPIED_FILES, "README.md")
"""Without a wildcard, which would stand for whatever a repository's owner calls so, in subfolders and of any size, too."""


def download(spec: str, revision: str | None, *, where: str, run: Run, as_adapter: bool) -> Path:
    """The folder in the hub's cache of a model or adapter with every weight, called by its commit. Raises SourceError.

    `as_adapter`: what is none is refused before its weights come.
    """
    folder = _snapshot(spec, revision, _SMALL_FILES, where, run)
    if as_adapter:
        read_adapter_config(folder, where=where)
    is_adapter = as_adapter or not (folder / "config.json").exists()
    if not is_adapter and (folder / INDEX_FILE).exists():
        _snapshot(spec, folder.name, [SINGLE_FILE], where, run)  # where there is one, the index is of no use
    files = [folder / WEIGHTS_FILE] if is_adapter else named_weights(folder, where=where)
    if not all(file.exists() for file in files):
        _snapshot(spec, folder.name, [escape(file.name) for file in files], where, run)
    if not any(file.exists() for file in files):
        with _explained(spec, where):
            names = HfApi().list_repo_files(spec, revision=folder.name)
        if not is_adapter:
            refuse_other_kinds(names, where=where)
        raise no_weights(names, where=where)
    return folder


def _snapshot(spec: str, revision: str | None, names: Iterable[str], where: str, run: Run) -> Path:
    """The folder of a repository at one commit, with those of these files that it has."""
    with _explained(spec, where):
        return Path(snapshot_download(spec, revision=revision, allow_patterns=[*names], tqdm_class=_drawn_by(run)))


def _drawn_by(run: Run) -> type[tqdm]:
    """The library's bars: none is drawn, and the one that counts the bytes on this disk reports them."""

    class Bar(tqdm):
        def __init__(self, *args: object, **settings: object) -> None:
            self._reports = settings.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**settings, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self._reports:
                run.progress("download", int(self.n), max(1, int(self.total or 0)))

    return Bar


def of_the_hub(error: Exception) -> bool:
    """Whether this is the hub's or the network's error: those of httpx have no base class under one name."""
    return isinstance(error, OSError | EntryNotFoundError | ValueError) or type(error).__module__.startswith("httpx")


@contextmanager
def _explained(spec: str, where: str) -> Iterator[None]:
    """Turns whatever goes wrong between here and the hub into SourceError, with the library's own sentence."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        if not of_the_hub(error):
            raise
        first = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        found = shortened(getattr(first, "server_message", None) or str(first).strip() or type(first).__name__)
        what = "no such folder, and the hub does not send a repository of that name"
        remedy = "correct the path, hub id or revision; for a private or gated repository accept its terms there and log in "
        remedy += "(`hf auth login`, or set HF_TOKEN); else run the command again, which continues"
        if isinstance(first, LocalEntryNotFoundError):
            what = "no such folder, and no network to ask the hub for it"
            found = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else found
            remedy = f"correct the path; or unset HF_HUB_OFFLINE, or `hf download {spec}` where there is a network"
        raise SourceError(what, where=where, found=found, remedy=remedy) from None
