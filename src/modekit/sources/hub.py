"""Models on the hub: weights are planned by their headers, and those that a build needs come into the hub's own cache.

huggingface_hub does the work: it takes up a download that was cut, and knows tokens, mirrors and proxies. Only files of the
kinds below are asked for: no code, nothing pickled.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_session,
    get_token,
    hf_hub_url,
    hf_raise_for_status,
    is_offline_mode,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from modekit.errors import SourceError
from modekit.files.typed import shortened
from modekit.files.user_cache import keep_header, known_header
from modekit.run import QUIET, Run
from modekit.sources.adapter import WEIGHTS_FILE, AdapterSource, open_adapter
from modekit.sources.adapter_config import CONFIG_FILE
from modekit.sources.config import FROM_GGUF
from modekit.sources.header import LARGEST_HEADER, TensorRef, tensors_in
from modekit.sources.source import INDEX_FILE, SPECIALIST_FILE, ModelSource, open_source, weight_files
from modekit.sources.tokenizer import COPIED_FILES
from modekit.sources.towers import PROCESSOR_FILES

_SMALL_FILES = ("config.json", CONFIG_FILE, INDEX_FILE, SPECIALIST_FILE, *COPIED_FILES, *PROCESSOR_FILES, "README.md")
"""Without a wildcard, which would stand for whatever a repository's owner calls so, in subfolders and of any size, too."""
_FIRST = 2**17  # bytes: nearly every header is shorter
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".onnx", ".h5", ".msgpack")
_SIZE = re.compile(r"[0-9]{1,18}")
_LOG_IN = "`hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit, and its folder in the hub's cache. Everything here raises SourceError."""

    name: str
    folder: Path
    where: str

    @classmethod
    def of(cls, spec: str, revision: str | None, *, where: str, files: Sequence[str] = (), run: Run = QUIET) -> Snapshot:
        """With these files of it on this disk; without `files` the small ones."""
        with _explained(spec, where):
            names, bar = list(files or _SMALL_FILES), _drawn_by(run)
            return cls(spec, Path(snapshot_download(spec, revision=revision, allow_patterns=names, tqdm_class=bar)), where)

    @property
    def commit(self) -> str:
        """Its hash."""
        return self.folder.name

    def header(self, file: Path, *, where: str) -> dict[str, TensorRef]:
        """Tensors of a weight file that stays on the hub."""
        what = f"{self.name} {self.commit} {file.name}"
        kept = known_header(what)
        if kept is None:
            with _explained(self.name, self.where):
                try:
                    begin, size = self._bytes(file.name, 0, _FIRST)
                    length = 8 + int.from_bytes(begin[:8], "little")
                    if len(begin) < length <= size:
                        begin, size = self._bytes(file.name, 0, min(length, LARGEST_HEADER + 8))
                except EntryNotFoundError:
                    raise self.no_weights(file.name) from None
            kept = size.to_bytes(8, "little") + begin[:length]
        size = int.from_bytes(kept[:8], "little")
        found = tensors_in(io.BytesIO(kept[8:]), size, file, where=f"{where}: {file.name}")
        keep_header(what, kept)
        return found

    def content(self, ref: TensorRef) -> bytes:
        """The bytes of a small tensor of such a file."""
        with _explained(self.name, self.where):
            return self._bytes(ref.file.name, ref.start, ref.end)[0]

    def _bytes(self, name: str, start: int, stop: int) -> tuple[bytes, int]:
        """Bytes [start, stop) of a file, fewer where it ends, and its size; no more is held, whatever is sent."""
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        url, found = hf_hub_url(self.name, name, revision=self.commit), bytearray()
        with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            hf_raise_for_status(response)
            is_part = response.status_code == 206
            said = response.headers.get("Content-Range", "").rpartition("/")[2]
            size = said if is_part else response.headers.get("Content-Length", "")
            if not _SIZE.fullmatch(size) or (start and not is_part):
                raise OSError(f"it sends no part of {name}")
            for chunk in response.iter_raw():
                found += chunk[: stop - start - len(found)]
                if len(found) == stop - start:
                    break
        return bytes(found), int(size)

    def fetch(self, names: Iterable[str], *, run: Run = QUIET) -> None:
        """Bring weight files to this disk."""
        wanted = sorted(names)
        if not all((self.folder / name).exists() for name in wanted):
            Snapshot.of(self.name, self.commit, where=self.where, files=[*map(escape, wanted)], run=run)

    def no_weights(self, name: str) -> SourceError:
        """The error of a repository without a file; it says what there is in its place."""
        names = HfApi().list_repo_files(self.name, revision=self.commit)
        there = [each for each in names if each.endswith(_WEIGHTS)]
        what, remedy = "the repository has no weights that modekit reads", "choose another repository or revision"
        if name != WEIGHTS_FILE and CONFIG_FILE in names:
            what, remedy = "this is an adapter, not a full model", "name it as adapter: in place of model: in the recipe"
        elif any(each.endswith(".gguf") for each in there):
            what, remedy = "GGUF files are not read", FROM_GGUF
        elif any(each.endswith((".bin", ".pt", ".pth")) for each in there):
            what = "the weights are pickled, which can run code when opened; modekit reads safetensors only"
            remedy = "choose a revision with safetensors, or convert it once where you trust it and give the folder"
        return SourceError(what, where=self.where, found=shortened(", ".join(there)) or None, expected=name, remedy=remedy)


def download(spec: str, revision: str | None, *, where: str, run: Run = QUIET) -> tuple[Path, str]:
    """The folder of a model or adapter of which every weight is on this disk, and its commit. Raises SourceError."""
    found = Snapshot.of(spec, revision, where=where, run=run)
    is_adapter = (found.folder / CONFIG_FILE).exists()
    files = [found.folder / WEIGHTS_FILE] if is_adapter else weight_files(found.folder, where=where, elsewhere=True)
    if not all(file.exists() for file in files[:1]):
        found.header(files[0], where=where)  # which says what there is where it is not
    found.fetch([file.name for file in files], run=run)
    return found.folder, found.commit


def open_hub_model(label: str, spec: str, revision: str | None, *, whole: bool, run: Run = QUIET) -> ModelSource:
    """A hub model by config and tensor headers; `whole`: with all weights on this disk. Raises as `open_source`."""
    where, elsewhere = f"{label} ({spec})", None
    if whole:
        folder, commit = download(spec, revision, where=where, run=run)
    else:
        elsewhere = Snapshot.of(spec, revision, where=where, run=run)
        folder, commit = elsewhere.folder, elsewhere.commit
        if not (folder / "config.json").exists() and not (folder / CONFIG_FILE).exists():
            with _explained(spec, where):
                raise elsewhere.no_weights("model.safetensors")
    return open_source(label, spec, folder, revision=commit, run=run, elsewhere=elsewhere)


def open_hub_adapter(
    label: str, spec: str, base: ModelSource, revision: str | None, *, whole: bool, run: Run = QUIET
) -> AdapterSource:
    """The same of an adapter. Raises as `open_adapter`."""
    where = f"{label} ({spec})"
    elsewhere = Snapshot.of(spec, revision, where=where, run=run)
    if whole and (elsewhere.folder / CONFIG_FILE).exists():
        download(spec, elsewhere.commit, where=where, run=run)
    return open_adapter(label, spec, elsewhere.folder, base, revision=elsewhere.commit, elsewhere=elsewhere)


def fetch(source: ModelSource, files: Iterable[Path], *, run: Run = QUIET) -> None:
    """Bring weight files of a model on the hub to this disk. Raises SourceError."""
    Snapshot(source.spec, source.folder, source.where).fetch([file.name for file in files], run=run)


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


_REFUSALS: tuple[tuple[type[Exception], str, str], ...] = (
    (
        GatedRepoError,
        "the repository is gated: its owner lets those read it who accept the terms",
        f"accept them on its page on the hub, then log in ({_LOG_IN})",
    ),
    (
        RepositoryNotFoundError,
        "no such folder, and the hub knows no repository of that name, or it is private",
        f"correct the name; for a private repository log in as somebody who may read it ({_LOG_IN})",
    ),
    (RevisionNotFoundError, "the repository has no such revision", "give a branch, tag or commit of it, or remove revision"),
    (HFValidationError, "neither a folder nor a name on the hub", "correct the path or the hub id (OWNER/NAME)"),
    (HfHubHTTPError, "the hub does not send the repository", f"read what it says; log in if it asks you to ({_LOG_IN})"),
    (
        LocalEntryNotFoundError,
        "no such folder, and the hub cannot be reached for a model of that name",
        "correct the path; or connect to the hub and run the command again, which continues; or give the folder of a copy",
    ),
    (
        OSError,
        "the hub does not send what it has, or its cache cannot be written",
        "run the command again, which continues; or set HF_HOME to a folder of yours with space",
    ),
)
"""What may go wrong between here and the hub, what it means, and what to do; the library's own sentence is what was found."""


@contextmanager
def _explained(spec: str, where: str) -> Iterator[None]:
    """Turns whatever goes wrong between here and the hub into SourceError."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:  # httpx's errors have no base class under one name
        known = isinstance(error, OSError | EntryNotFoundError | ValueError) or type(error).__module__.startswith("httpx")
        if not known:
            raise
        first = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        what, remedy = next((says for kind, *says in _REFUSALS if isinstance(first, kind)), _REFUSALS[-1][1:])
        if is_offline_mode() and not isinstance(first, HFValidationError):
            what = "no such folder, and not all of that name is in the hub's cache (HF_HUB_OFFLINE)"
            remedy = f"correct the path; or unset HF_HUB_OFFLINE; or `hf download {spec}` where there is a network"
        found = shortened(getattr(first, "server_message", None) or str(first).strip() or type(first).__name__)
        raise SourceError(what, where=where, found=found, remedy=remedy) from None
