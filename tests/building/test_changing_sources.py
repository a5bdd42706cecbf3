"""Sources that others change while a build or a proof reads them: an error, never a checkpoint with a hash of other bytes."""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from conftest import Workshop
from damage import other_bytes
from modekit.building.build import Inspector, build
from modekit.building.verify import verify
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import ModekitError, SourceError
from modekit.files.read import open_regular
from modekit.planning.plan import Plan
from modekit.run import Run
from refusal import copy_expert, tree

HALF = {"output": {"dtype": "float16"}}


@pytest.fixture
def bench(bench: Workshop) -> Workshop:
    """A recipe of which one expert, law, may be damaged."""
    copy_expert(bench)
    return bench


def law_of(bench: Workshop) -> Path:
    return bench.root / "law" / "model.safetensors"


def refused(plan: Plan, kind: type[ModekitError], match: str, run: Run | None = None) -> ModekitError:
    """Build to OUT: the error; nothing may be left behind."""
    out = plan.root / "OUT"
    with pytest.raises(kind, match=match) as error:
        build(plan, out, run=run or Run())
    assert not out.exists() and not out.with_name("OUT.partial").exists()
    return error.value


def test_a_source_that_shrinks_while_it_is_hashed(bench: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended the process by SIGBUS, without a message."""
    law = law_of(bench)
    monkeypatch.setattr("modekit.building.build.check_finite", lambda *_: os.truncate(law, 5000))
    assert refused(bench.plan(), SourceError, "became shorter|has changed").where == str(law)


@pytest.mark.parametrize("changes", [HALF, {"mixture": {"router": {"fit": "random"}, "backbone": "ties"}}])
def test_a_source_that_shrinks_while_tensors_are_computed_of_it(
    bench: Workshop, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    law = law_of(bench)
    plan = bench.plan(**changes)
    monkeypatch.setattr("modekit.building.build.Inspector", Idle)
    monkeypatch.setattr("modekit.planning.tensors.is_finite", lambda *_: os.truncate(law, 5000) is None)
    assert refused(plan, SourceError, "became shorter|has changed").where == str(law)


class Idle(Inspector):
    """One that looks at nothing, so that what the copying finds is seen."""

    def _inspect(self, *_: object) -> str:
        return ""


@pytest.mark.parametrize("watched", ["copying", "hashing"])
def test_a_source_replaced_between_plan_and_build(bench: Workshop, monkeypatch: pytest.MonkeyPatch, watched: str) -> None:
    plan, law = bench.plan(), law_of(bench)
    shutil.copy2(law, law.with_suffix(".new"))  # the same bytes, size and time: who knows that they are the same?
    law.with_suffix(".new").replace(law)
    if watched == "copying":
        monkeypatch.setattr("modekit.building.build.Inspector", Idle)
    else:
        monkeypatch.setattr("modekit.building.build.write_shards", lambda *_: None)
    assert refused(plan, SourceError, "has changed since").where == str(law)


def test_a_source_changed_after_it_was_copied_and_before_it_is_hashed(bench: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, law, copied = bench.plan(), law_of(bench), threading.Event()
    inspect, finish = Inspector._inspect, Inspector.finish

    def late(inspector: Inspector, file: Path, refs: list[Any]) -> str:
        assert copied.wait(60)
        if file == law:
            other_bytes(law)
        return inspect(inspector, file, refs)

    def finished(inspector: Inspector) -> dict[str, str]:
        copied.set()
        return finish(inspector)

    monkeypatch.setattr(Inspector, "_inspect", late)
    monkeypatch.setattr(Inspector, "finish", finished)
    assert refused(plan, SourceError, "has changed since").where == str(law)


def test_a_source_changed_after_it_was_hashed_and_before_all_is_copied(
    bench: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, law = bench.plan(), law_of(bench)
    monkeypatch.setattr("modekit.building.build.Inspector", Idle)  # as if it had been done long ago

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "build" and 0 < total == done:
            other_bytes(law)

    assert refused(plan, SourceError, "has changed since", Run(progress=progress)).where == str(law)


def broken_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Files of that name in a folder `law` can be opened and not be read."""

    class Broken(io.FileIO):
        def readinto(self, _: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def opened(path: Path) -> io.FileIO:
        return Broken(path) if path.parent.name == "law" and path.name == name else open_regular(path)

    monkeypatch.setattr("modekit.sources.contents.open_regular", opened)


@pytest.mark.parametrize("watched", ["copying", "computing", "hashing"])
def test_a_source_that_the_disk_does_not_give(bench: Workshop, monkeypatch: pytest.MonkeyPatch, watched: str) -> None:
    plan = bench.plan(**HALF) if watched == "computing" else bench.plan()
    broken_disk(monkeypatch, "model.safetensors")
    if watched == "hashing":
        monkeypatch.setattr("modekit.building.build.write_shards", lambda *_: None)
    else:
        monkeypatch.setattr("modekit.building.build.Inspector", Idle)

    def failing(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("modekit.weights.reading.os.sendfile", failing)
    error = refused(plan, SourceError, "cannot be read")
    assert error.where == str(law_of(bench)) and error.found == os.strerror(errno.EIO)


def test_a_tokenizer_file_that_cannot_be_read_is_no_error_of_the_output(bench: Workshop) -> None:
    shutil.copytree(bench.recipe["base_model"], bench.root / "base")
    plan = bench.plan(base_model="./base")
    (bench.root / "base" / "tokenizer.json").unlink()
    assert str(refused(plan, SourceError, "cannot be read").where).endswith("tokenizer.json")


@pytest.mark.parametrize("changes", [{}, HALF])
def test_a_proof_ends_where_a_source_cannot_be_read(
    bench: Workshop, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    checkpoint = open_checkpoint(bench.build(**changes))
    broken_disk(monkeypatch, "model.safetensors")
    before = tree(checkpoint.folder)
    with pytest.raises(SourceError, match="cannot be read"):
        verify(checkpoint, reload=False)
    assert tree(checkpoint.folder) == before
