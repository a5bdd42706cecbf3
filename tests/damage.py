"""Damage as strangers and accidents do it: to JSON by its structure, to other files by their bytes, to folders by files."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from transformers import PreTrainedModel

from modekit.loaded.load import load_model
from mutations import hostile_json

RAW = (
    b"",
    b"\xff\xfe\x00",
    b"null",
    b"[]",
    b"{",
    b"[" * 3_000,
    b'{"a": NaN}',
    b'{"a": 1e999}',
    b'{"a": "\\ud800"}',
    b"\xef\xbb\xbf{}",
    b'{"a": ' + b"9" * 5_000 + b"}",
)
NUMBERS = st.integers(0, 2**30)


def other_bytes(path: Path) -> None:
    """Other bytes in the same file, of the same length."""
    before = path.stat().st_mtime_ns
    with path.open("r+b") as stream:
        stream.seek(-4, io.SEEK_END)
        stream.write(b"\0\0\0\0")
    os.utime(path, ns=(before, before + 1))


def load_with_nan(*arguments: Any, **options: Any) -> PreTrainedModel:
    """A model of which one number is none, in the place of `load_model`."""
    model = load_model(*arguments, **options)
    model.get_output_embeddings().weight.data[0, 0] = float("nan")
    return model


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Other bytes here and there, a piece cut out, an end cut off, or more of it."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("flip", "set", "cut", "end", "more")))
        place = draw(NUMBERS) % max(1, len(changed))
        if kind == "flip" and changed:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and changed:
            changed[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del changed[place : place + draw(st.integers(1, 50))]
        elif kind == "end":
            del changed[place:]
        else:
            changed[place:place] = draw(st.binary(min_size=1, max_size=40))
    return bytes(changed)


@st.composite
def damaged_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """Another header over the same data, said to be as long as it is."""
    size = int.from_bytes(content[:8], "little")
    text = draw(damaged_json(content[8 : 8 + size]))
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def damaged_json(content: bytes) -> st.SearchStrategy[bytes]:
    """JSON with one to three things wrong with it."""
    return hostile_json(json.loads(content)).map(lambda text: text.encode("utf-8", "surrogatepass"))


@st.composite
def damaged_file(draw: st.DrawFn, name: str, content: bytes) -> bytes:
    """A file with something wrong with it, by its kind."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(RAW))
    if name.endswith(".json") and draw(st.integers(0, 9)):
        return draw(damaged_json(content))
    if name.endswith(".safetensors") and draw(st.booleans()):
        return draw(damaged_safetensors(content))
    return draw(damaged_bytes(content))


def no_file(path: Path, kind: str) -> None:
    """Something else in a file's place."""
    path.unlink()
    make: dict[str, Callable[[], object]] = {
        "gone": lambda: None,
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "round": lambda: path.symlink_to(path.name),
        "device": lambda: path.symlink_to("/dev/zero"),
        "away": lambda: path.symlink_to("/etc/passwd"),
        "nowhere": lambda: path.symlink_to("nowhere"),
    }
    make[kind]()


@contextmanager
def in_time(seconds: int = 30, memory: int = 3 * 2**30) -> Iterator[None]:
    """What takes too long inside, or too many bytes of memory (of this process in all), has failed."""

    def too_long(*_: object) -> None:
        raise AssertionError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < memory


NO_FILES = ("gone", "folder", "pipe", "round", "device", "away", "nowhere")


def change_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another header of a file of tensors, whose numbers stay."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def change_config(folder: Path, **changes: Any) -> None:
    """Other settings in config.json; those that are "absent" go."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
