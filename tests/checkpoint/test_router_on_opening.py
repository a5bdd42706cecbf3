"""A router's gates, and its table in the embedding, are looked at before they decide: none but the recorded numbers ever do."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modekit
from command_line import ended
from conftest import Workshop
from modekit.building.verify import verify
from modekit.checkpoint.open import open_checkpoint, open_with_any_router
from modekit.errors import CheckpointError
from modekit.files.write import json_bytes
from modekit.planning.plan import ROUTER_FILE
from modekit.planning.tensors import EMBEDDING_FILE
from modekit.training.settings import TrainSettings, checked_settings
from modekit.training.train import train
from refusal import refuse

pytestmark = pytest.mark.usefixtures("short_tables")

FITS: dict[str, dict[str, Any]] = {
    "lexical": {"fit": "lexical"},
    "bigrams": {"fit": "lexical", "orders": [1, 2], "buckets": 256},
}
TEXT = "fever artery lesion dose nerve"


@pytest.fixture(scope="module")
def built(small_workshop: Workshop) -> dict[str, Path]:
    """A native mixture whose table lies in the embedding, and three whose router is a file of its own."""
    lexical = {"top_k": 1, "router": {"fit": "lexical"}}
    found = {"native": small_workshop.build("IN-EMBEDDING", mixture=lexical, output={"format": "plain"})}
    for name, router in FITS.items():
        mixture = {"top_k": 1, "router": router}
        found[name] = small_workshop.build(f"ROUTER-{name}", mixture=mixture, output={"format": "modekit"})
    return found


@pytest.fixture
def folder(built: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy beside no model; what opens it asks for none."""
    return shutil.copytree(built[getattr(request, "param", "native")], tmp_path / "OUT")


def with_table(folder: Path, change: Any) -> None:
    """The columns of the embedding that carry the table, changed."""
    channels, embedding = open_with_any_router(folder).carrier
    tensors = load_file(folder / EMBEDDING_FILE)
    tensors[embedding.name][:, channels.evidence] = change(tensors[embedding.name][:, channels.evidence])
    save_file(tensors, folder / EMBEDDING_FILE, metadata={"format": "pt"})


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "modekit.json").read_text())
    return found


def as_if_recorded(folder: Path) -> None:
    """Every digest in the record is that of what lies there, as a stranger can write it."""
    record = record_of(folder)
    record["router"]["sha256"] = hashlib.sha256((folder / ROUTER_FILE).read_bytes()).hexdigest()
    checkpoint = open_with_any_router(folder)
    if checkpoint.shape.channels is not None:
        channels, embedding = checkpoint.carrier
        columns = load_file(folder / EMBEDDING_FILE)[embedding.name][:, channels.evidence].contiguous()
        record["router"]["report"]["evidence_sha256"] = hashlib.sha256(columns.view(torch.uint8).numpy().tobytes()).hexdigest()
    (folder / "modekit.json").write_bytes(json_bytes(record))


@pytest.mark.parametrize("change", [torch.neg, lambda table: table * float("nan")], ids=["negated", "NaN"])
def test_another_table_in_the_embedding_never_answers(folder: Path, change: Any) -> None:
    with_table(folder, change)
    for command in (("route", folder, TEXT), ("eval", folder), ("inspect", folder), ("serve", folder)):
        message = refuse(*command)
        assert EMBEDDING_FILE in message and "`modekit fit`" in message
    with pytest.raises(CheckpointError, match="table in the embedding"):
        modekit.router(folder)
    code, stdout, _ = ended("verify", folder, "--no-reload")
    assert code == 1 and "table in the embedding, is not the one" in " ".join(stdout.split())


def test_no_number_answers_whatever_the_record_says(folder: Path) -> None:
    with_table(folder, lambda table: table * float("nan"))
    as_if_recorded(folder)
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        open_checkpoint(folder)


@pytest.mark.parametrize("folder", [*FITS], indirect=True)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gates_that_are_no_numbers_are_refused(folder: Path, value: float) -> None:
    gates = load_file(folder / ROUTER_FILE)
    next(iter(gates.values())).view(-1)[-1] = value
    save_file(gates, folder / ROUTER_FILE, metadata={"format": "pt"})
    as_if_recorded(folder)
    with pytest.raises(CheckpointError, match="NaN or Inf") as error:
        open_checkpoint(folder)
    assert ROUTER_FILE in str(error.value) and "modekit fit" in str(error.value)


def test_a_row_of_the_base_that_is_no_number_is_said_where_the_table_is_read(folder: Path) -> None:
    """The table is read by the size of every row, which the digest of its columns does not know."""
    checkpoint = open_checkpoint(folder)
    tensors = load_file(folder / EMBEDDING_FILE)
    tensors[checkpoint.carrier[1].name][50, 0] = float("nan")
    save_file(tensors, folder / EMBEDDING_FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite") as error:
        modekit.router(folder)
    assert EMBEDDING_FILE in str(error.value)


def test_a_training_that_moves_the_embedding_leaves_a_mixture_that_opens(small_workshop: Workshop) -> None:
    """The table moves with it; and a fit afterwards sets the table in the embedding that was trained."""
    out = small_workshop.build("EMBEDDINGS", mixture={"top_k": 1, "router": {"fit": "lexical"}}, output={"format": "plain"})
    moved = small_workshop.root / "TRAINED"
    asked = {
        "what": ["embeddings"],
        "losses": {"lm": 1.0},
        "steps": 2,
        "batch_tokens": 128,
        "sequence_length": 32,
        "select_tokens": 128,
        "backbone_learning_rate": 0.01,
    }
    done = train(open_checkpoint(out), checked_settings(asked, TrainSettings, where="test"), out=moved, evaluate_tokens=None)
    assert done.improved
    trained = open_checkpoint(moved)
    name = trained.carrier[1].name
    assert name in trained.record.trained
    before = trained.record.trained[name]
    with pytest.raises(CheckpointError, match="table in the embedding"):
        with_table(moved, torch.neg)
        open_checkpoint(moved)
    with_table(moved, torch.neg)
    fitted = modekit.fit(moved, temperature=2.0)
    assert fitted.record.trained[name] != before
    checks = verify(open_checkpoint(moved), reload=False)
    assert {check.verdict for check in checks if check.name in {"router", "trained tensors"}} == {"proven"}, checks
