"""Whatever is wrong with a stranger's checkpoint, or with what lies beside it, is said by an error that we know.

Small real checkpoints of both shapes, with results of every kind; one file at a time is damaged (damage.py), and everything
that reads is asked. The same inputs every time: with the slow tests 2,600 and more.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import Workshop, make_workshop
from damage import NO_FILES, damaged_file, in_time, no_file
from modekit.building.verify import verify
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint, open_with_any_router
from modekit.engines.serve import choose_engine, context_of
from modekit.errors import ModekitError
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.inspection.inspect import inspect
from modekit.evaluation.results import Results
from modekit.evaluation.tasks.results import Estimate, TaskResults, TaskScores
from modekit.files.read import UNREADABLE
from modekit.report.card import make_card
from modekit.report.page import make_page
from modekit.report.push import pack
from modekit.report.sections import make_content
from modekit.routing.fit import refit
from modekit.routing.inputs import load_statistics
from modekit.routing.text_router import TextRouter
from modekit.routing.token_text import TokenText, load_token_text
from modekit.training.folder import TrainingFolder, TrainingOutcome
from modekit.training.train import train
from trained import short_settings

pytestmark = pytest.mark.usefixtures("short_tables")

SMALL: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
ROUTER = {"fit": "logistic", "tokens_per_domain": 300, "sequence_length": 32, "keep_tokens": 50}
ROWS = {"base": Estimate(0.3, 0.1), "mixture": Estimate(0.5)}
TASK = TaskScores(metric="accuracy", higher_is_better=True, items=40, rows=ROWS, form="glosses", domain="law")


@dataclass
class Stranger:
    """A checkpoint that is damaged and mended again, and how often."""

    folder: Path
    inputs: int = 0

    @property
    def files(self) -> list[str]:
        """Everything that modekit reads of it."""
        names = sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        return [name for name in names if not name.endswith((".py", ".md.partial"))]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("fuzz"), **SMALL)


@pytest.fixture(scope="module")
def native(workshop: Workshop) -> Stranger:
    """Fitted, trained, and with everything that a report can show."""
    checkpoint = open_checkpoint(workshop.build("NATIVE", mixture={"method": "routing", "top_k": 2, "router": ROUTER}))
    asked = short_settings(steps=2, batch_tokens=200, sequence_length=32, select_tokens=200, learning_rate=0.02)
    return with_results(train(checkpoint, asked, evaluate_tokens=200).checkpoint)


@pytest.fixture(scope="module")
def own(workshop: Workshop) -> Stranger:
    """In the modekit architecture: an adapter, whole modules and the base, routers over an average."""
    law = {**workshop.recipe["experts"][1], "as": "lora", "rank": 2}
    experts = [workshop.recipe["experts"][0], law, {**workshop.recipe["experts"][2], "model": "base"}]
    mixture = {"modules": ["q", "down"], "router": {**ROUTER, "granularity": "context"}}
    return with_results(open_checkpoint(workshop.build("OWN", experts=experts, mixture=mixture)))


def with_results(checkpoint: Checkpoint) -> Stranger:
    evaluate(checkpoint, tokens_per_domain=200, sequence_length=32)
    inspect(checkpoint, tokens_per_domain=200, sequence_length=32)
    TaskResults({"modekit_law_questions": TASK, "qa": TASK}, notes=["a note"], checkpoint=checkpoint.identity).write(checkpoint)
    for name, content in make_card(checkpoint).contents.items():
        (checkpoint.folder / name).write_bytes(content)
    return Stranger(checkpoint.folder)


@contextmanager
def damaged(stranger: Stranger, name: str, data: st.DataObject) -> Iterator[None]:
    """While open, a file of the checkpoint has something wrong with it."""
    path = stranger.folder / name
    before = path.read_bytes()
    try:
        if data.draw(st.integers(0, 19)) == 0:
            no_file(path, data.draw(st.sampled_from(NO_FILES)))
        else:
            path.write_bytes(data.draw(damaged_file(name, before)))
        yield
    finally:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.write_bytes(before)


@contextmanager
def told() -> Iterator[None]:
    """What goes wrong inside is an error that says it in a few lines."""
    try:
        yield
    except ModekitError as error:
        message = str(error)
        assert error.what and len(message) < 10_000 and message.count("\n") < 50, message[:2_000]


class Scripts(HTMLParser):
    """The scripts of a page, and whatever else would run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"script", "iframe", "object", "embed", "img", "base", "form"}:
            self.found.append(tag)
        self.found += [name for name, value in attrs if name.startswith("on") or "javascript:" in (value or "")]


def check_page(page: str) -> None:
    scripts = Scripts()
    scripts.feed(page)
    assert not scripts.found


def check_card(card: str) -> None:
    _, matter, body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    assert yaml.safe_load(matter)["library_name"] == "transformers"
    without_code = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", body, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"<(?!!-- modekit card [0-9a-f]{64} -->)", without_code) and "\x1b" not in without_code


def read_everything(folder: Path) -> None:
    """All that reads a checkpoint, but for what takes long."""
    with told():
        verify(open_with_any_router(folder), reload=False)
    try:
        checkpoint = open_checkpoint(folder)
    except ModekitError:
        with told():
            raise
        return
    try:
        Results.read(checkpoint)
    except UNREADABLE as error:
        assert len(str(error)) < 1_000
    with told():
        check_page(make_page(checkpoint, make_content(checkpoint)))
    with told():
        check_card(make_card(checkpoint).contents["README.md"].decode())
    with told():
        pack(checkpoint).sizes()
    with told():
        choose_engine(checkpoint, "auto")
        context_of(checkpoint, None)
    for file in (folder / "router").iterdir():
        with told():
            load_statistics(file)


def damage_and_read(stranger: Stranger, data: st.DataObject, files: list[str], read: Callable[[Path], None]) -> None:
    stranger.inputs += 1
    with damaged(stranger, data.draw(st.sampled_from(files)), data), in_time():
        read(stranger.folder)


def many(examples: int) -> Callable[[Any], Any]:
    """So many inputs, the same every time."""
    checks = [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
        HealthCheck.large_base_example,
    ]
    return lambda test: settings(max_examples=examples, suppress_health_check=checks)(given(data=st.data())(test))


def refit_from_statistics(folder: Path) -> None:
    with told():
        opened = open_with_any_router(folder)
        refit(opened, {"router": {"temperature": 2.0}})
        refit(opened, {"router": {"temperature": 1.0}})


@many(30)
def test_a_damaged_native_checkpoint(native: Stranger, data: st.DataObject) -> None:
    damage_and_read(native, data, native.files, read_everything)


@pytest.fixture(scope="module")
def lexical(workshop: Workshop) -> Stranger:
    """Whose router's table lies in the embedding."""
    mixture = {"top_k": 1, "router": {"fit": "lexical"}}
    return Stranger(workshop.build("LEXICAL", mixture=mixture, output={"format": "plain"}))


@many(60)
def test_a_damaged_table_in_an_embedding(lexical: Stranger, data: st.DataObject) -> None:
    heads = ["model-embedding.safetensors", "model-router.safetensors", "modekit.json", "config.json"]
    damage_and_read(lexical, data, heads, read_router)


def read_router(folder: Path) -> None:
    """The router alone: what it says is numbers, or it says nothing."""
    with told():
        verify(open_with_any_router(folder), reload=False)
    with told():
        decided = TextRouter(open_checkpoint(folder)).decide("fever artery lesion")
        assert all(0 <= each <= 1 for each in decided.probabilities.values())


@many(30)
def test_a_damaged_modekit_checkpoint(own: Stranger, data: st.DataObject) -> None:
    damage_and_read(own, data, own.files, read_everything)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["native", "own"])
def test_all_of_it(shape: str, request: pytest.FixtureRequest) -> None:
    stranger: Stranger = request.getfixturevalue(shape)
    first, before = stranger.inputs, {name: (stranger.folder / name).read_bytes() for name in stranger.files}
    heads = [name for name in stranger.files if name in {"config.json", "modekit.json", "model.safetensors.index.json"}]

    @many(325)
    def anything(data: st.DataObject) -> None:
        damage_and_read(stranger, data, stranger.files, read_everything)

    @many(250)
    def what_it_says_it_is(data: st.DataObject) -> None:
        damage_and_read(stranger, data, heads, read_everything)

    @many(150)
    def what_was_found(data: st.DataObject) -> None:
        damage_and_read(stranger, data, [name for name in stranger.files if name.startswith("results/")], read_everything)

    anything()
    what_it_says_it_is()
    what_was_found()
    assert stranger.inputs - first >= 650
    assert {name: (stranger.folder / name).read_bytes() for name in stranger.files} == before


@pytest.mark.slow
def test_a_fit_from_damaged_statistics(own: Stranger, tmp_path: Path) -> None:
    copy = Stranger(shutil.copytree(own.folder, own.folder.with_name("REFITTED")))
    files = [name for name in copy.files if name.startswith("router/")]

    @many(200)
    def anything(data: st.DataObject) -> None:
        damage_and_read(copy, data, files, refit_from_statistics)

    anything()


@many(40)
def test_damaged_tokens_to_choose_by(tokens: Path, data: st.DataObject) -> None:
    with damaged(Stranger(tokens), "law.safetensors", data), in_time(), told():
        load_token_text(tokens / "law.safetensors", 96)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    ids, ones = torch.arange(5, 25, dtype=torch.int32), torch.full((4,), 5, dtype=torch.int32)
    said = {"text": {}, "how": {}}
    TokenText(ids, ones, ones * 0, said, torch.ones(96)).save(folder / "law.safetensors")
    return folder


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, native: Stranger) -> Stranger:
    """What a kill leaves of a training that has ended."""
    folder = TrainingFolder(tmp_path_factory.mktemp("left") / "OUT")
    (folder.path / "checkpoint-2").mkdir(parents=True)
    best = folder.path / "checkpoint-2" / "model.safetensors"
    best.write_bytes((native.folder / "model-router.safetensors").read_bytes())
    outcome = TrainingOutcome(steps=4, best_step=2, losses={"law": (3.0, 2.5)}, notes=["a note"], tokens=1_000)
    folder.keep("trained", outcome.model_dump(mode="json"))
    folder.keep("before", Results.read(open_checkpoint(native.folder)).as_data())
    folder.keep("settings", {"request": "0" * 64, "state": "1" * 64})
    folder.keep("writing", "2" * 64)
    return Stranger(folder.path)


@many(120)
def test_what_is_left_of_a_training(left: Stranger, data: st.DataObject) -> None:
    damage_and_read(left, data, ["trained.json", "before.json", "settings.json", "writing.json"], read_training)


def read_training(path: Path) -> None:
    folder = TrainingFolder(path.with_name("OUT"))
    with told():
        folder.outcome()
    with told():
        before = folder.recall("before", Results.from_data)
        assert before is None or before.markdown()
    with told():
        folder._claim("0" * 64, "1" * 64)
    with told():
        assert folder.is_written is False
