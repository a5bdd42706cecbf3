"""OUT.gguf is served only where it is this very mixture, and this user's modekit has proven these very bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import modekit
from byte_level import save_byte_model
from domain_mixtures import model_experts
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.engines import gguf
from modekit.engines.converter import converter_folder, is_installed
from modekit.engines.gguf import EXPORT_FILE, gguf_of, made_of
from modekit.engines.proof import Proof
from modekit.engines.registry import Outtype
from modekit.files.marker import read_marker
from modekit.members.change import write_change
from modekit.members.edits import NewExpert, replace_expert

pytestmark = pytest.mark.usefixtures("short_tables")

EXACT: Outtype = "f32"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were made, in order; what is known of files is this test's own, the converter is not."""
    if not is_installed():
        pytest.skip("modekit[gguf] is not installed")
    converter = converter_folder()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / converter.name).symlink_to(converter)
    monkeypatch.setenv("MODEKIT_CACHE", str(tmp_path / "cache"))
    found: list[Path] = []
    convert = gguf.convert
    monkeypatch.setattr(gguf, "convert", lambda model, file, *how: found.append(file) or convert(model, file, *how))
    return found


@pytest.fixture
def made_of_weights(made: list[Path], monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The same for who asks only when a file is made anew: it is a digest of the weights, and passes as proven."""

    def convert(model: Path, file: Path, *_how: object) -> None:
        made.append(file)
        file.write_bytes(hashlib.sha256(b"".join(path.read_bytes() for path in sorted(model.glob("*.safetensors")))).digest())

    passed = Proof("f32", 96, 96, 4, 300, 10.0, 0.0, 0.0)
    monkeypatch.setattr(gguf, "convert", convert)
    monkeypatch.setattr(gguf, "compare", lambda *_, **__: passed)
    return made


def mixture(root: Path, seed: int = 1) -> Checkpoint:
    """Of two models, the second by a seed."""
    experts = model_experts(root)
    save_byte_model(root / "law", "llama", seed)
    recipe = {"base_model": "./medicine", "experts": experts, "mixture": {"top_k": 2, "router": {"fit": "random"}}}
    return modekit.build(modekit.plan(recipe, root=root), root / "OUT", overwrite=True)


def test_it_is_made_once(tmp_path: Path, made: list[Path]) -> None:
    checkpoint, beside = mixture(tmp_path), tmp_path / "OUT.gguf"
    file = gguf_of(checkpoint, beside, EXACT)
    assert gguf_of(checkpoint, beside, EXACT) == file and len(made) == 1


def test_new_weights_under_the_same_path_make_it_anew(tmp_path: Path, made_of_weights: list[Path]) -> None:
    """The recipe and the gates are the same; llama.cpp would go on with the old experts."""
    checkpoint, beside = mixture(tmp_path), tmp_path / "OUT.gguf"
    before = gguf_of(checkpoint, beside, EXACT).read_bytes()
    save_byte_model(tmp_path / "law", "llama", 9)
    text = str(tmp_path / "text" / "law.jsonl")
    replaced = write_change(
        checkpoint, replace_expert(checkpoint, "law", NewExpert({"model": "./law", "text": text}, tmp_path)), tmp_path / "OUT"
    )
    assert replaced.record.recipe_digest == checkpoint.record.recipe_digest
    after = gguf_of(open_checkpoint(tmp_path / "OUT"), beside, EXACT).read_bytes()
    assert len(made_of_weights) == 2 and after != before
    again = gguf_of(mixture(tmp_path, 10), beside, EXACT).read_bytes()  # build --overwrite
    assert len(made_of_weights) == 3 and again not in (before, after)


@pytest.mark.parametrize("content", [b"GGUF junk", None], ids=["junk", "another mixture's"])
def test_a_strangers_file_is_not_believed(tmp_path: Path, made_of_weights: list[Path], content: bytes | None) -> None:
    """With a mark, an export.json and a time that say it is the mixture's."""
    checkpoint, beside = mixture(tmp_path), tmp_path / "OUT.gguf"
    file = gguf_of(checkpoint, beside, EXACT)
    own, written = file.read_bytes(), file.stat()
    if content is None:  # one that was proven here, as another mixture
        content = gguf_of(mixture(tmp_path / "other", 9), tmp_path / "other" / "OUT.gguf", EXACT).read_bytes()
    assert content != own
    file.write_bytes(content)
    os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
    said: dict[str, Any] = json.loads((beside / EXPORT_FILE).read_text())
    assert all(said[key] == value for key, value in made_of(checkpoint, EXACT).items())
    marker = read_marker(beside)
    assert marker is not None
    (beside / ".modekit").write_bytes(marker.with_files(beside, [file.name, EXPORT_FILE]).as_bytes())
    assert gguf_of(checkpoint, beside, EXACT).read_bytes() == own
    assert len([path for path in made_of_weights if path.is_relative_to(tmp_path / "OUT.gguf.partial")]) == 2


def test_without_the_record_it_is_proven_anew(tmp_path: Path, made_of_weights: list[Path]) -> None:
    """As on another machine: whoever wrote the folder, nobody here has compared it."""
    checkpoint, beside = mixture(tmp_path), tmp_path / "OUT.gguf"
    own = gguf_of(checkpoint, beside, EXACT).read_bytes()
    shutil.rmtree(tmp_path / "cache" / "known")
    assert gguf_of(checkpoint, beside, EXACT).read_bytes() == own and len(made_of_weights) == 2
    assert gguf_of(checkpoint, beside, EXACT).read_bytes() == own and len(made_of_weights) == 2
