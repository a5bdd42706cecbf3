"""A mixture for the hub: what modekit wrote of it, without where things lie on this machine.

modekit.json and recipe.yaml name models and texts by their hub ids or last names; the card, which has the tables of results, is
made unless somebody wrote one. Statistics and written text, which show text, results and all other files stay here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from modekit.architecture import CODE_FILES
from modekit.checkpoint.carried import CARRIED_FILE
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import RECORD_FILE, MixtureRecord
from modekit.errors import OutputError
from modekit.files.marker import INTERNAL
from modekit.files.write import json_bytes
from modekit.recipes.edit import RECIPE_FILE
from modekit.recipes.paths import name_of, with_specs
from modekit.recipes.recipe import Recipe
from modekit.report.card import CARD_FILE, LICENCE_FILE, make_card
from modekit.sources.tokenizer import COPIED_FILES, is_own_file
from modekit.text.splits import SELECTED_FILE, TRAINED_FILE

_WRITTEN = (
    RECORD_FILE,
    RECIPE_FILE,
    CARD_FILE,
    LICENCE_FILE,
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    *(CARRIED_FILE, TRAINED_FILE, SELECTED_FILE, *COPIED_FILES, *(file.name for file in CODE_FILES)),
)
"""What modekit writes, and others need."""


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


def pack(checkpoint: Checkpoint) -> Parcel:
    """Everything of a checkpoint that others need. Nothing is written."""
    shown = _shown(checkpoint)
    made = {RECORD_FILE: json_bytes(shown.model_dump(mode="json"))}
    if (checkpoint.folder / RECIPE_FILE).exists():
        said = shown.model_dump(mode="json")["recipe"]
        made[RECIPE_FILE] = yaml.safe_dump(said, sort_keys=False, allow_unicode=True).encode()
    notes: Sequence[str] = ()
    if not (checkpoint.folder / CARD_FILE).exists():
        card = make_card(checkpoint, shown=shown)
        made |= {name: content for name, content in card.contents.items() if not (checkpoint.folder / name).exists()}
        notes = card.notes
    files: dict[str, Path | bytes] = {}
    left: dict[str, int] = {}
    for path in sorted(path for path in checkpoint.folder.rglob("*") if path.is_file()):
        name = path.relative_to(checkpoint.folder).as_posix()
        if name in made or name.partition("/")[0] in INTERNAL:
            continue
        if "/" not in name and any(fnmatch(name, pattern) for pattern in _WRITTEN):
            if not is_own_file(path, checkpoint.folder):
                raise OutputError(
                    "a link leads out of the folder, and what it names would go to the hub",
                    where=str(path),
                    found=path.readlink() if path.is_symlink() else "no regular file",
                    remedy="put the file itself there, or remove the link",
                )
            files[name] = path
        else:
            place = f"{name.partition('/')[0]}/" if "/" in name else name
            left[place] = left.get(place, 0) + path.stat().st_size
    return Parcel(dict(sorted({**files, **made}.items())), left, notes)


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
    from modekit.sources.hub import of_the_hub

    try:
        yield
    except Exception as error:
        if not of_the_hub(error):
            raise
        raise OutputError(
            "the hub did not take it",
            where=repo,
            found=(str(error).strip().splitlines() or [type(error).__name__])[0],
            remedy="name it NAME or OWNER/NAME, log in (`hf auth login`) as who may write there, push again with a network",
        ) from None


def _shown(checkpoint: Checkpoint) -> MixtureRecord:
    """The record with names where it has paths of this machine."""
    record = checkpoint.record
    root = checkpoint.recipe_root
    named = partial(name_of, root=root)
    recipe = Recipe.model_validate(with_specs(record.model_dump(mode="json")["recipe"], named))
    sources = []
    for source in record.sources:
        spec = named(source.spec)
        sources.append(source.model_copy(update={"spec": spec, "folder": spec.removeprefix("./")}))
    training = [each.model_copy(update={"settings": _named(each.settings, root)}) for each in record.training]
    history = [
        each.model_copy(update={key: spec and named(spec) for key, spec in each if key in ("source", "was")})
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


def _named(settings: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Settings of a training with names where they have paths."""
    teacher = settings.get("teacher")
    generic = settings.get("generic") or []
    named = {"teacher": teacher and name_of(teacher, root), "generic": [name_of(text, root) for text in generic]}
    return {key: named.get(key, value) for key, value in settings.items()}
