"""Results, cards and parcels of a stranger's checkpoint: nothing in them runs, crashes, or takes files from elsewhere along."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from conftest import Workshop
from damage import in_time
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import OutputError
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.inspection.inspect import inspect
from modekit.evaluation.results import Results
from modekit.evaluation.tasks.results import TaskResults
from modekit.members.licences import front_matter
from modekit.report.card import make_card
from modekit.report.page import make_page
from modekit.report.push import pack
from modekit.report.sections import make_content
from refusal import borrow, refuse

HOSTILE = "a\n---\n# <script>x()</script> | `b` ``` [c](javascript:d) ![](http://e) <!-- \x1b[2J\u202e"
FITTED = {"router": {"fit": "logistic", "tokens_per_domain": 300, "sequence_length": 32}}


@pytest.fixture
def checkpoint(shared_workshop: Workshop, tmp_path: Path) -> Checkpoint:
    return open_checkpoint(borrow(shared_workshop, tmp_path).build(mixture=FITTED))


def say(checkpoint: Checkpoint, change: Callable[[dict[str, Any]], None]) -> Checkpoint:
    """The checkpoint with a record that somebody changed."""
    record = json.loads((checkpoint.folder / "modekit.json").read_text())
    change(record)
    (checkpoint.folder / "modekit.json").write_text(json.dumps(record))
    return open_checkpoint(checkpoint.folder)


def hostile_record(record: dict[str, Any]) -> None:
    record["modekit_version"] = HOSTILE
    for source in record["sources"]:
        source.update(label=HOSTILE, spec=HOSTILE, revision=HOSTILE)
    record["router"]["text"] = {HOSTILE: {"documents": HOSTILE, "tokens": [], "sha256": HOSTILE}}
    record["router"]["report"] = {HOSTILE: HOSTILE}
    record["training"] = [
        {
            "settings": {"what": [HOSTILE], "losses": {HOSTILE: 1.0}, "speed": HOSTILE},
            "text": {HOSTILE: {}},
            "parameters": 1,
            "steps": 1,
            "tokens": 1,
            "select_loss": {HOSTILE: {"before": 1.0}},
            "notes": [HOSTILE],
        }
    ]


def test_a_card_and_a_page_of_hostile_names(checkpoint: Checkpoint) -> None:
    said = say(checkpoint, hostile_record)
    card = make_card(said)
    (said.folder / "README.md").write_bytes(card.contents["README.md"])
    read = ModelCard.load(said.folder / "README.md")
    assert read.data.library_name == "transformers" and read.text.startswith("\n# OUT\n")
    for text in (part.decode() for part in card.contents.values()):
        outside = "".join(text.split("```")[::2])
        assert "<script" not in outside and "\x1b" not in text and "\u202e" not in text and "](javascript" not in outside
    page = make_page(said, make_content(said))
    assert "<script" not in page and "&lt;script&gt;" in page


@pytest.mark.parametrize("content", ["---" + "\n" * 900_000, "---\n" + "\n--- x" * 150_000, "---\n" + "[" * 60_000 + "\n---\n"])
def test_a_front_matter_that_never_ends(tmp_path: Path, content: str) -> None:
    (tmp_path / "README.md").write_text(content)
    with in_time():
        assert front_matter(tmp_path / "README.md") == {}


def test_damaged_results_are_run_anew(checkpoint: Checkpoint) -> None:
    before = evaluate(checkpoint, tokens_per_domain=200, sequence_length=32)
    file = checkpoint.folder / "results" / "eval.json"
    data = json.loads(file.read_text())
    data["rows"][0]["domains"]["law"]["loss"] = "low"
    file.write_text(json.dumps(data))
    assert "eval.json is damaged or of another version (rows.0.domains.law.loss" in make_content(checkpoint).missing[0]
    assert evaluate(checkpoint, tokens_per_domain=200, sequence_length=32) == before == Results.read(checkpoint)


def test_sample_texts_that_lack_a_router_are_damaged(checkpoint: Checkpoint) -> None:
    inspect(checkpoint, tokens_per_domain=200, sequence_length=32)
    file = checkpoint.folder / "results" / "inspect.json"
    data = json.loads(file.read_text())
    data["texts"][0]["weights"].pop()
    file.write_text(json.dumps(data))
    assert any("inspect.json is damaged" in line for line in make_content(checkpoint).missing)


def test_tasks_of_a_stranger_keep_their_place_in_a_table(checkpoint: Checkpoint) -> None:
    scores = {
        "metric": "accuracy",
        "higher_is_better": True,
        "items": 3,
        "rows": {"base": {"value": 0.5}},
    }
    for name in ("a\n# b", "<b>|c"):
        data = {"checkpoint": checkpoint.identity, "tasks": {name: scores}, "notes": []}
        (checkpoint.folder / "results").mkdir(exist_ok=True)
        (checkpoint.folder / "results" / TaskResults.file).write_text(json.dumps(data))
        found = TaskResults.find(checkpoint)
        assert (found is None) == ("\n" in name)


def test_a_link_out_of_the_folder_is_not_pushed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    link = checkpoint.folder / "tokenizer.model"
    link.symlink_to("config.json")
    assert "tokenizer.model" in pack(checkpoint).files
    link.unlink()
    link.symlink_to(secret)
    with pytest.raises(OutputError, match="a link leads out of the folder"):
        pack(checkpoint)
    assert str(link) in refuse("push", checkpoint.folder, "me/mine", "--dry-run")


def test_a_snapshot_of_the_hubs_cache_is_pushed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in checkpoint.folder.iterdir():
        if file.is_file():
            blob = hashlib.sha256(file.name.encode()).hexdigest()
            shutil.copy(file, blobs / blob)
            (snapshot / file.name).symlink_to(f"../../blobs/{blob}")
    assert "config.json" in pack(open_checkpoint(snapshot)).files
