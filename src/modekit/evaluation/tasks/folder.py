"""A stranger's folder of tasks, read as data: the harness gets what its files say, checked, and never opens one itself.

Files, what they include and the data they name lie in the folder; links out of it count as what they lead to.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from modekit.errors import ModekitError
from modekit.evaluation.tasks.trust import check_config, refusal
from modekit.files.read import UNREADABLE, parse_json, read_text
from modekit.files.typed import shortened
from modekit.recipes.strict_yaml import StrictLoader, read_yaml

if TYPE_CHECKING:
    from lm_eval.tasks._index import Entry

_SKIPPED = {"__pycache__", ".ipynb_checkpoints"}
_MOST_FILES = 10_000
_MOST_INCLUDES = 50  # of one file
_MOST_TASKS = 1_000  # of one name
_DEEPEST = 20  # groups within each other
_LARGEST = 2**25  # bytes of a data file
_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt")
_MOST_LINES = 200_000
_MOST_VALUES = 2**21  # lists and objects of a file
_MOST_COLUMNS = 1_000  # keys within keys count as columns, too


@dataclass(frozen=True)
class _Tagged:
    """A value with a tag of its own, such as `!function`, which the harness would run."""

    tag: str
    value: object

    def __repr__(self) -> str:
        return f"{self.tag} {self.value}"


class _TaskLoader(StrictLoader):
    """Reads any tag as what it says, so that the error can name its key."""


_TaskLoader.add_multi_constructor(
    "", lambda _, suffix, node: _Tagged(suffix, node.value if isinstance(node, yaml.ScalarNode) else "...")
)


def check_exists(folder: Path) -> None:
    """Raise ModekitError when a folder of tasks is not there."""
    if not folder.is_dir():
        raise ModekitError(
            "the folder of tasks does not exist", where="--include-path", found=str(folder), remedy="correct the path"
        )


def read_folders(folders: Sequence[Path]) -> dict[str, Entry]:
    """Name -> task, group or tag of the folders, the later before the earlier. Raises ModekitError for what is refused."""
    from lm_eval.tasks._index import TaskIndex

    entries: dict[str, Entry] = {}
    for folder in folders:
        reader = _TaskFolder(folder.resolve())
        found: dict[str, Entry] = {}
        for file in _task_files(folder.resolve()):
            config = reader.merged(file)
            if isinstance(config, dict) and {"task", "group", "class"} & set(config):
                check_config(config, file)
                if "dataset_path" in config:
                    config = {**config, "dataset_kwargs": reader.with_data(config, file)}
                TaskIndex.process_cfg(config, file, found)
        for entry in found.values():
            entry.yaml_path = None  # the harness takes what was checked, and reads no file again
        entries.update(found)
    return entries


def leaves(names: Iterable[str], entries: Mapping[str, Entry]) -> set[str]:
    """The tasks that names stand for, groups and tags resolved. Raises ModekitError where they are endless, or too many."""
    counts: dict[str, int] = {}
    reached: set[str] = set()

    def count(name: str, above: tuple[str, ...]) -> int:
        if name in above or len(above) > _DEEPEST:
            raise _group_error(name, "a group that holds itself" if name in above else f"groups nested over {_DEEPEST} deep")
        if name not in counts:
            members = _members(name, entries)
            if members is None:
                reached.add(name)
            counts[name] = 1 if members is None else sum(count(member, (*above, name)) for member in members)
            if counts[name] > _MOST_TASKS:
                raise _group_error(name, f"{counts[name]:,} tasks")
        return counts[name]

    for name in names:
        count(name, ())
    return reached


def _members(name: str, entries: Mapping[str, Entry]) -> list[str] | None:
    """What a group or a tag holds; None of a task, and of what is none of the folders'."""
    entry = entries.get(name)
    if entry is None:
        return None
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    said: Any = (entry.cfg or {})["task"]
    return [member if isinstance(member, str) else member["task"] for member in said] if isinstance(said, list) else None


def _group_error(name: str, found: str) -> ModekitError:
    return ModekitError(
        "a group of tasks cannot be resolved",
        where=f"--include-path: {name}",
        found=found,
        expected=f"groups of at most {_MOST_TASKS:,} tasks, nested at most {_DEEPEST} deep",
        remedy="correct the group",
    )


def _task_files(root: Path) -> list[Path]:
    files: list[Path] = []
    for folder, names, found in os.walk(root):
        names[:] = [name for name in names if name not in _SKIPPED]
        files += [Path(folder, name) for name in found if name.endswith(".yaml")]
        if len(files) > _MOST_FILES:
            raise refusal(root, f"more than {_MOST_FILES:,} files", "a folder that holds the tasks alone")
    return sorted(files, key=lambda file: file.as_posix())


@dataclass
class _TaskFolder:
    """Reads the files of one folder, each once."""

    root: Path
    _read: dict[Path, Any] = field(default_factory=dict)

    def merged(self, file: Path, seen: set[Path] | None = None) -> Any:
        """What a file says with all that it includes, as the harness would merge it. Raises ModekitError."""
        seen = set() if seen is None else seen
        place = self._inside(file, file)
        if place in seen:
            raise refusal(file, "include: a file that is included twice, or includes itself", "files that include others once")
        seen.add(place)
        said = self._read[place] if place in self._read else self._read.setdefault(place, _parsed(place))
        if not isinstance(said, dict) or "include" not in said:
            return said
        included = said["include"] if isinstance(said["include"], list) else [said["include"]]
        if len(included) > _MOST_INCLUDES or not all(isinstance(name, str) for name in included):
            expected = f"at most {_MOST_INCLUDES} files in {self.root}"
            raise refusal(file, f"include: {shortened(repr(said['include']))}", expected)
        merged: dict[Any, Any] = {}
        for name in included:
            other = self.merged(self._inside(place.parent / name, file, f"include: {shortened(name)}"), seen)
            if not isinstance(other, dict):
                raise refusal(file, f"include: {shortened(name)}", "a file with keys and values")
            merged.update({key: value for key, value in other.items() if key != "task_list"})
        return {**merged, **{key: value for key, value in said.items() if key != "include"}}

    def with_data(self, config: Mapping[str, Any], file: Path) -> dict[str, object]:
        """`dataset_kwargs` with whole paths of data files, each checked. Raises ModekitError for any that may not be read."""
        settings = config["dataset_kwargs"]
        files = settings["data_files"]
        by_split = files if isinstance(files, dict) else {None: files}
        whole: dict[str | None, list[str]] = {}
        for split, named in by_split.items():
            whole[split] = []
            for name in named if isinstance(named, list) else [named]:
                try:
                    place = self._data(name, file)
                    _check_data(place, config["dataset_path"], settings.get("delimiter") or ",")
                except UNREADABLE as error:
                    found = f"dataset_kwargs.data_files: {shortened(name)} ({shortened(error)})"
                    expected = f"a {', '.join(_SUFFIXES)} file of text in {self.root}, of at most {_LARGEST:,} bytes"
                    raise refusal(file, found, expected) from None
                whole[split].append(str(place))
        rest = {key: value for key, value in settings.items() if key != "trust_remote_code"}
        return {**rest, "data_files": whole if isinstance(files, dict) else whole[None]}

    def _data(self, name: str, file: Path) -> Path:
        """A data file, looked for as the harness does, then beside the task file. Raises ValueError where it is not there."""
        places = [place for place in (Path(name), file.parent / name) if self._is_inside(place)]
        place = next((place.resolve() for place in places if place.is_file()), None)
        if place is None:
            raise ValueError("it is not there, or not in the folder")
        if place.suffix not in _SUFFIXES or any(sign in str(place) for sign in ("*", "?", "[", "::", "://")):
            raise ValueError("its name is none of a data file")
        return place

    def _is_inside(self, place: Path) -> bool:
        try:
            return place.resolve().is_relative_to(self.root)
        except (OSError, ValueError, RuntimeError):  # a NUL, a name too long, a circle of links
            return False

    def _inside(self, place: Path, file: Path, said: str = "a link") -> Path:
        if not self._is_inside(place):
            raise refusal(file, f"{said}, which leads out of the folder", f"files in {self.root}")
        return place.resolve()


def _parsed(file: Path) -> Any:
    try:
        return read_yaml(file, _TaskLoader)
    except UNREADABLE as error:
        raise refusal(file, f"what cannot be read: {shortened(error)}", "YAML that is whole and not too large") from None


def _check_data(place: Path, loader: str, delimiter: str) -> None:
    """Raise OSError, or ValueError that says why a file is not read by a loader (json, csv, text): nothing packed, no bombs."""
    from datasets.utils.extract import Extractor

    text = read_text(place, _LARGEST)
    packed = Extractor.infer_extractor_format(str(place))
    if packed:
        raise ValueError(f"it is packed ({packed})")
    lines = text.splitlines()
    if len(lines) > _MOST_LINES:
        raise ValueError(f"it has more than {_MOST_LINES:,} lines")
    if loader == "csv" and lines and lines[0].count(delimiter) >= _MOST_COLUMNS:
        raise ValueError(f"it has more than {_MOST_COLUMNS:,} columns")
    if loader == "json":
        if text.count("{") + text.count("[") > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES:,} lists and objects")
        _check_columns(text, lines)


def _check_columns(text: str, lines: list[str]) -> None:
    try:
        rows = [parse_json(line) for line in lines if line.strip()]
    except ValueError:  # not one item a line
        rows = [parse_json(text)]
    columns: set[tuple[str, ...]] = set()
    left: list[tuple[tuple[str, ...], Any]] = [((), row) for row in rows]
    while left:
        path, value = left.pop()
        if isinstance(value, dict):
            left += [((*path, key), each) for key, each in value.items()]
        elif isinstance(value, list):
            left += [(path, each) for each in value if isinstance(each, (dict, list))]
        columns.add(path)
        if len(columns) > _MOST_COLUMNS:
            raise ValueError(f"it has more than {_MOST_COLUMNS:,} columns")
