"""`modekit push`: what goes to the hub opens there, says nothing of this machine, and leaves the statistics at home."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from transformers import AutoModelForCausalLM

from command_line import modekit
from conftest import Workshop, logits_of
from modekit.building.verify import verify
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import OutputError
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.inspection.inspect import inspect
from modekit.members.change import write_change
from modekit.members.edits import NewExpert, add_expert, remove_expert
from modekit.report.page import write_report
from modekit.report.push import pack, push
from refusal import borrow, refuse

FITTED = {"method": "routing", "top_k": 2, "router": {"fit": "logistic", "tokens_per_domain": 600, "sequence_length": 32}}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub in a folder: a commit writes the files that it adds."""
    folder = tmp_path / "hub"

    def create_repo(_: HfApi, repo_id: str, **options: Any) -> Any:
        name = repo_id if "/" in repo_id else f"me/{repo_id}"
        (folder / name).mkdir(parents=True, exist_ok=options["exist_ok"])
        (folder / name / ".private").write_text(str(options["private"]))

        class Url(str):
            repo_id = name

        return Url(f"https://hub.example/{name}")

    def create_commit(_: HfApi, repo_id: str, operations: list[CommitOperationAdd], **options: Any) -> Any:
        assert options["commit_message"]
        for operation in operations:
            target = folder / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as stream:
                target.write_bytes(stream.read())
        return SimpleNamespace()

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return folder


def made(shared: Workshop, root: Path) -> Path:
    return borrow(shared, root).build(mixture=FITTED)


def test_a_history_names_no_path(shared_workshop: Workshop, tmp_path: Path, hub: Path) -> None:
    bench = borrow(shared_workshop, tmp_path)
    out = bench.build(experts=bench.recipe["experts"][:2])
    new = NewExpert({"model": str(shared_workshop.root / "code")}, tmp_path)
    write_change(open_checkpoint(out), add_expert(open_checkpoint(out), "code", new), out)
    write_change(open_checkpoint(out), remove_expert(open_checkpoint(out), "law"), out)
    push(pack(open_checkpoint(out)), "me/mine")
    pushed = json.loads((hub / "me" / "mine" / "modekit.json").read_text())
    assert [(each["source"], each["was"]) for each in pushed["history"]] == [("./code", None), (None, "./law")]
    assert str(tmp_path) not in json.dumps(pushed) and str(shared_workshop.root) not in json.dumps(pushed)


def test_a_training_names_no_path(shared_workshop: Workshop, tmp_path: Path) -> None:
    out = made(shared_workshop, tmp_path)
    record = json.loads((out / "modekit.json").read_text())
    settings = {
        "what": ["routers"],
        "losses": {"forward_kl": 1.0},
        "teacher": f"{tmp_path}/big",
        "generic": [f"{tmp_path}/a.txt"],
    }
    trained = {"settings": settings, "text": {}, "parameters": 1, "steps": 1, "tokens": 1, "select_loss": {}, "notes": []}
    (out / "modekit.json").write_text(json.dumps({**record, "training": [trained]}))
    content = pack(open_checkpoint(out)).files["modekit.json"]
    assert isinstance(content, bytes) and str(tmp_path) not in content.decode()
    said = json.loads(content)["training"][0]["settings"]
    assert (said["teacher"], said["generic"]) == ("./big", ["./a.txt"])


def test_what_was_pushed_opens_and_names_no_path(shared_workshop: Workshop, tmp_path: Path, hub: Path) -> None:
    out = made(shared_workshop, tmp_path)
    checkpoint = open_checkpoint(out)
    evaluate(checkpoint, tokens_per_domain=300, sequence_length=32)
    inspect(checkpoint, tokens_per_domain=300, sequence_length=32)
    write_report(checkpoint)
    parcel = pack(checkpoint)
    assert push(parcel, "mine", private=True) == "https://hub.example/me/mine"
    there = hub / "me" / "mine"
    assert (there / ".private").read_text() == "True"

    files = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()} - {".private"}
    assert files == set(parcel.files) and not any(name.startswith("router/") for name in files)
    assert parcel.left["router/"] == sum(file.stat().st_size for file in (out / "router").iterdir())
    words = [str(tmp_path), str(shared_workshop.root), "text/law.jsonl", str(Path.home())]
    for name in files:
        content = (there / name).read_bytes()
        assert not [word for word in words if word.encode() in content], name
    assert (there / "README.md").read_text().count("./law") >= 1
    assert "results/" in parcel.left

    opened = open_checkpoint(there)
    assert opened.names == checkpoint.names and opened.record.router == checkpoint.record.router
    assert opened.record.sources[0].spec == "./base"
    ids = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits_of(there, ids), logits_of(out, ids))
    assert AutoModelForCausalLM.from_pretrained(there) is not None
    verdicts = {check.name: check.verdict for check in verify(opened)}
    assert verdicts["recipe digest"] == "proven" and "failed" not in verdicts.values()


def test_a_dry_run_says_what_goes_and_writes_nothing(shared_workshop: Workshop, tmp_path: Path, hub: Path) -> None:
    out = made(shared_workshop, tmp_path)
    before = sorted(path.name for path in out.rglob("*"))
    said = modekit("push", out, "me/mine", "--dry-run")
    assert "stays here: router/" in said and "modekit.json" in said and " stay\n" in said
    assert not hub.exists() and sorted(path.name for path in out.rglob("*")) == before


def test_a_card_that_somebody_wrote_goes_as_it_is(shared_workshop: Workshop, tmp_path: Path) -> None:
    out = made(shared_workshop, tmp_path)
    (out / "README.md").write_text(f"# Mine\n\nfrom {shared_workshop.root}/text")
    parcel = pack(open_checkpoint(out))
    assert parcel.files["README.md"] == out / "README.md"
    (out / "README.md").rename(out / "LICENSE.md")  # terms alone: the card is made beside them
    parcel = pack(open_checkpoint(out))
    assert parcel.files["LICENSE.md"] == out / "LICENSE.md" and isinstance(parcel.files["README.md"], bytes)


def test_what_the_hub_refuses_is_one_error(shared_workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = made(shared_workshop, tmp_path)

    class ConnectError(Exception):
        """As httpx says that there is no network, under whatever name it is installed."""

        __module__ = "httpx2"

    errors = ((LocalTokenNotFoundError("Token is required"), "log in"), (HFValidationError("x"), "OWNER/NAME"))
    for error, words in (*errors, (ConnectError("Name or service not known"), "with a network")):

        def fail(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(HfApi, "create_repo", fail)
        with pytest.raises(OutputError, match=words):
            push(pack(open_checkpoint(out)), "a/b")


@pytest.mark.parametrize("repo", ["a/b/c", "me/a b", "./out", "x" * 97])
def test_a_name_that_no_repository_has_is_refused_before_anything_is_read(tmp_path: Path, repo: str) -> None:
    for more in ((), ("--dry-run",)):
        said = refuse("push", tmp_path, repo, *more)
        assert "the hub did not take it" in said and repo in said and "OWNER/NAME" in said


def test_only_what_modekit_wrote_goes(shared_workshop: Workshop, tmp_path: Path) -> None:
    """Files of the user's own stay, wherever they lie in the folder."""
    out = made(shared_workshop, tmp_path)
    write_report(open_checkpoint(out))
    own = [
        "id_rsa",
        "notes.txt",
        "data.json",
        ".env",
        ".cache/x",
        "model/secret.safetensors",
        "results/mine.json",
        "tasks/x.yaml",
    ]
    for name in own:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    parcel = pack(open_checkpoint(out))
    assert not set(own) & set(parcel.files)
    assert {"config.json", "modekit.json", "model.safetensors.index.json", "tokenizer.json"} <= set(parcel.files)
    assert {"id_rsa", "notes.txt", ".cache/", "results/"} <= set(parcel.left)
