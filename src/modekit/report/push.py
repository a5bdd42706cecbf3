"""A mixture for the hub: what modekit wrote, without the router's statistics and without where things lie on this machine.

modekit.json and recipe.yaml name models and texts by their hub ids or last names; the card is made unless somebody wrote
one; results go along unless they name a path of this machine. Other files in the folder stay.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import yaml

from modekit.architecture import CODE_FILES
from modekit.checkpoint.carried import CARRIED_FILE
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import RECORD_FILE, MixtureRecord
from modekit.errors import OutputError
from modekit.evaluation.results_folder import RESULTS_FOLDER
from modekit.files.marker import INTERNAL
from modekit.files.read import LARGE, UNREADABLE, read_bytes
from modekit.files.write import json_bytes
from modekit.recipes.edit import RECIPE_FILE
from modekit.recipes.paths import name_of, with_names
from modekit.recipes.recipe import Recipe
from modekit.report.card import CARD_FILE, LICENCE_FILE, make_card
from modekit.sources.tokenizer import COPIED_FILES
from modekit.sources.towers import PROCESSOR_FILES
from modekit.text.splits import SELECTED_FILE, TRAINED_FILE

_WRITTEN = (
    *(RECORD_FILE, RECIPE_FILE, CARD_FILE, LICENCE_FILE, "config.json", "model*.safetensors", "model.safetensors.index.json"),
    *(CARRIED_FILE, TRAINED_FILE, SELECTED_FILE, *COPIED_FILES, *PROCESSOR_FILES, *(file.name for file in CODE_FILES)),
    *(f"{RESULTS_FOLDER}/{name}.*" for name in ("eval", "inspect", "forced", "tasks", "translate", "train", "tune", "report")),
    f"{RESULTS_FOLDER}/tasks/*",
)
"""What modekit writes and others may have: not statistics and written text, which show text, nor logs of tensorboard."""
_TEXT = {".json", ".md", ".html", ".csv", ".yaml", ".txt"}


@dataclass(frozen=True)
class Parcel:
    """What would go to the hub: the file as it is, or other bytes; bytes of what stays here; what to know of it."""

    files: Mapping[str, Path | bytes]
    left: Mapping[str, int]
    notes: Sequence[str]

    def sizes(self) -> dict[str, int]:
        """Bytes of every file that goes."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size for name, content in self.files.items()
        }


def pack(checkpoint: Checkpoint, *, ask_hub: bool = True) -> Parcel:
    """Everything of a checkpoint that others need. Nothing is written; `ask_hub` may look for licences there."""
    shown = _shown(checkpoint)
    made = {RECORD_FILE: json_bytes(shown.model_dump(mode="json"))}
    if (checkpoint.folder / RECIPE_FILE).exists():
        said = shown.model_dump(mode="json")["recipe"]
        made[RECIPE_FILE] = yaml.safe_dump(said, sort_keys=False, allow_unicode=True).encode()
    notes: list[str] = []
    if not any((checkpoint.folder / name).exists() for name in (CARD_FILE, LICENCE_FILE)):
        card = make_card(checkpoint, ask_hub=ask_hub, shown=shown)
        made |= card.contents
        notes += card.notes
    private = _private(checkpoint)
    files: dict[str, Path | bytes] = {}
    left: dict[str, int] = {}
    for path in sorted(path for path in checkpoint.folder.rglob("*") if path.is_file()):
        name = path.relative_to(checkpoint.folder).as_posix()
        if name in made or name.partition("/")[0] in INTERNAL:
            continue
        if not any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in _WRITTEN):
            folder = f"{name.partition('/')[0]}/" if "/" in name else name
            left[folder] = left.get(folder, 0) + path.stat().st_size
            continue
        _check_link(path, checkpoint.folder)
        content, found = _content(path, private, checkpoint.record.recipe_digest, shown.recipe_digest)
        if found is not None and name.startswith(f"{RESULTS_FOLDER}/"):
            left[name] = path.stat().st_size
            notes.append(f"{name} stays here, since it names {found}")
            continue
        if found is not None:
            notes.append(f"{name} goes as it is, and names {found}")
        files[name] = content
    return Parcel(dict(sorted({**files, **made}.items())), left, notes)


def _check_link(path: Path, folder: Path) -> None:
    """Raise OutputError where a link leads out of the folder: what it names is not the mixture's.

    But for a snapshot of the hub's cache, whose files are links to blobs beside it.
    """
    real, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    inside = [real, *([real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [])]
    if not any(target.is_relative_to(each) for each in inside):
        raise OutputError(
            "a link leads out of the folder, and what it names would go to the hub",
            where=str(path),
            found=str(target),
            remedy="put the file itself there, or remove the link",
        )


def check_repo(repo: str) -> None:
    """Raise OutputError where a repository on the hub cannot have this name; nobody is asked."""
    from huggingface_hub import hf_hub_url

    with _explained(repo):
        hf_hub_url(repo, CARD_FILE)  # it checks the name


def push(parcel: Parcel, repo: str, *, private: bool | None = None) -> str:
    """Make the repository if need be and upload everything in one commit; returns its address. Raises OutputError when the hub
    refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in parcel.files.items()
    ]
    with _explained(repo):
        api = HfApi()
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(url.repo_id, operations, commit_message="Mixture made with modekit")
    return str(url)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError:
        raise OutputError(
            "not a name of a repository",
            where="REPO",
            found=repo,
            expected="NAME or OWNER/NAME of letters, digits and -_. (96 at most, no -- and .., none of -. first or last)",
            remedy="correct it",
        ) from None
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise OutputError(
            "the hub did not take it",
            where=repo,
            found=(str(error).strip().splitlines() or [type(error).__name__])[0],
            remedy="log in with `hf auth login`, as somebody who may write there, and push again",
        ) from None


def _shown(checkpoint: Checkpoint) -> MixtureRecord:
    """The record with names where it has paths of this machine."""
    record, root = checkpoint.record, checkpoint.recipe_root
    recipe = Recipe.model_validate(with_names(record.model_dump(mode="json")["recipe"], root))
    sources = []
    for source in record.sources:
        spec = name_of(source.spec, root)
        sources.append(source.model_copy(update={"spec": spec, "folder": spec.removeprefix("./")}))
    training = [
        each.model_copy(update={"settings": {**each.settings, "generic": [name_of(g, root) for g in each.settings["generic"]]}})
        if each.settings.get("generic")
        else each
        for each in record.training
    ]
    history = [
        each.model_copy(update={key: spec and name_of(spec, root) for key, spec in each.specs.items()})
        for each in record.history
    ]
    return record.model_copy(
        update={
            "recipe": recipe,
            "recipe_digest": recipe.digest(),
            "recipe_folder": ".",
            "sources": sources,
            "training": training,
            "history": history,
            "dense_config": {key: value for key, value in record.dense_config.items() if key != "_name_or_path"},
        }
    )


def _private(checkpoint: Checkpoint) -> list[str]:
    """Words that tell where things lie on this machine."""
    record, root = checkpoint.record, checkpoint.recipe_root
    recipe = record.recipe
    texts = [spec for each in (*(expert.texts for expert in recipe.experts), *recipe.eval.values()) for spec in each]
    generic = [spec for training in record.training for spec in training.settings.get("generic") or []]
    history = [spec for each in record.history for spec in each.specs.values() if spec]
    specs = [*(source.spec for source in record.sources), *texts, *generic, *history]
    said = [spec for spec in specs if name_of(spec, root) not in {spec, f"./{spec}"}]
    folders = [Path(os.path.realpath(checkpoint.folder)), *map(checkpoint.source_folder, record.sources)]
    places = [folder.parent for folder in folders]
    return [*dict.fromkeys([*said, *(f"{place}/" for place in (*places, root, Path.home()) if place != Path(place.anchor))])]


def _content(path: Path, private: Sequence[str], digest: str, shown_digest: str) -> tuple[Path | bytes, str | None]:
    """What goes in place of a file, with the digest of the recipe as it is shown; and what it says of this machine."""
    if path.suffix not in _TEXT or path.name in {"tokenizer.json", "vocab.json", "merges.txt"}:
        return path, None
    try:
        text = read_bytes(path, LARGE).decode("utf-8")
    except UNREADABLE:
        return path, None
    found = next((word for word in private if word in text or json.dumps(word)[1:-1] in text), None)
    return (text.replace(digest, shown_digest).encode() if digest in text else path), found
