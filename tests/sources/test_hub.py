"""Hub ids, against a stand-in server: what it is asked for, what comes to this disk, and what is said when it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from adapter_folders import write_adapter
from conftest import Workshop, save, tiny_model
from modekit.building.build import build
from modekit.building.verify import verify
from modekit.checkpoint.open import open_checkpoint
from modekit.cli import main
from modekit.errors import SourceError
from modekit.planning.make import make_plan
from modekit.recipes.read import load_recipe
from modekit.run import Run
from modekit.sources.folders import model_folder
from stand_in_hub import COMMIT, StandIn, point_at, serving


@pytest.fixture
def hub(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """`acme/law` and `acme/base` are the workshop's in shards, `acme/law-lora` is an adapter of the base."""
    remote = tmp_path / "remote"
    for seed, name in enumerate(("base", "law")):
        save(tiny_model(seed=2 * seed), remote / name, max_shard_size="30KB")
    write_adapter(remote / "law-lora")
    repos = {f"acme/{path.name}": path for path in remote.iterdir()}
    with serving(StandIn(repos=repos)) as found:
        point_at(found.url, tmp_path / "cache", monkeypatch)
        yield found


def write(workshop: Workshop, law: dict[str, Any], **changes: Any) -> Path:
    return workshop.write(experts=[{"name": "law", **law}, {"name": "code", "model": "./code"}], **changes)


def refused(workshop: Workshop, law: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(SourceError) as error:
        make_plan(load_recipe(write(workshop, law, **changes)), workshop.root)
    return str(error.value)


def test_an_adapter_comes_once_and_a_model_in_its_place_not_at_all(workshop: Workshop, hub: StandIn) -> None:
    recipe = load_recipe(write(workshop, {"adapter": "acme/law-lora"}))
    assert make_plan(recipe, workshop.root).sources[1].revision == COMMIT
    assert hub.whole() >= weights(hub, "acme/law-lora")
    assert "a full model, not an adapter" in refused(workshop, {"adapter": "acme/law"})
    assert not hub.whole() & weights(hub, "acme/law")


def test_one_file_goes_before_an_index_as_in_a_folder(workshop: Workshop, hub: StandIn, tmp_path: Path) -> None:
    save(tiny_model(seed=9), tmp_path / "one")
    shutil.copy(tmp_path / "one" / "model.safetensors", hub.repos["acme/law"])
    folder, _ = model_folder("acme/law", root=workshop.root, label="MODEL")
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert hub.whole() & weights(hub, "acme/law") == {"acme/law/model.safetensors"}


def test_a_repository_of_a_model_and_an_adapter_is_refused_for_both(workshop: Workshop, hub: StandIn) -> None:
    write_adapter(hub.repos["acme/law"])
    (hub.repos["acme/law"] / "adapter_model.safetensors").unlink()
    assert "holds both a model and an adapter" in refused(workshop, {"model": "acme/law"})


def test_nothing_comes_because_it_is_called_like_a_licence(workshop: Workshop, hub: StandIn) -> None:
    for name in ("LICENSE-weights.safetensors", "LICENSE/weights.safetensors"):
        path = hub.repos["acme/law"] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"large")
    make_plan(load_recipe(write(workshop, {"model": "acme/law"})), workshop.root)
    assert not any("LICENSE" in name or name.endswith("/weights.safetensors") for _, name, _ in hub.log)


def test_a_download_is_reported_and_draws_nothing_of_its_own(
    workshop: Workshop, hub: StandIn, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TQDM_POSITION", "-1")  # which makes the library draw where there is no terminal
    told: list[tuple[str, int, int]] = []
    run = Run(progress=lambda *report: told.append(report))
    folder, _ = model_folder("acme/law-lora", root=workshop.root, label="MODEL", run=run)
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert ("download", size, size) in told and "it/s" not in (drawn := capfd.readouterr().err) and "B/s" not in drawn


@pytest.mark.parametrize(
    "command",
    [
        "build recipe.yaml OUT",
        "mix acme/base acme/law -o OUT",
        "extract acme/law OUT --base acme/base --rank 2",
        "specialize acme/base OUT --text text/law.jsonl",
        "data balance OUT --text law=text/law.jsonl --tokenizer acme/base",
    ],
)
def test_nothing_is_asked_for_where_out_exists(
    workshop: Workshop, hub: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(workshop.root)
    write(workshop, {"model": "acme/law"})
    Path("OUT").mkdir()
    monkeypatch.setattr("sys.argv", ["modekit", *command.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "the output folder exists" in capsys.readouterr().err
    assert not hub.log


def weights(hub: StandIn, name: str) -> set[str]:
    """Its weight files, as the log names them."""
    return {f"{name}/{path.name}" for path in hub.repos[name].glob("*.safetensors")}


def test_a_build_from_the_hub_is_that_from_folders(workshop: Workshop, hub: StandIn, tmp_path: Path) -> None:
    """Base, expert and adapter; the record names the commit, at which the mixture can be built again."""
    experts = [{"name": "law", "model": "acme/law"}, {"name": "lora", "adapter": "acme/law-lora"}]
    recipe = load_recipe(workshop.write(base_model="acme/base", experts=experts))
    out = build(make_plan(recipe, workshop.root), tmp_path / "out")
    assert [source.revision for source in out.record.sources] == [COMMIT] * 3
    hub.revisions["main"] = "0" * 40  # it moves on: the checkpoint's stays
    assert {check.verdict for check in verify(open_checkpoint(out.folder), reload=False)} == {"proven"}

    folders = {name: str(folder) for name, folder in hub.repos.items()}
    local = [{"name": "law", "model": folders["acme/law"]}, {"name": "lora", "adapter": folders["acme/law-lora"]}]
    recipe = load_recipe(workshop.write(base_model=folders["acme/base"], experts=local))
    own = build(make_plan(recipe, workshop.root), tmp_path / "own")
    for path in own.folder.glob("model-*.safetensors"):
        assert path.read_bytes() == (out.folder / path.name).read_bytes(), path.name


def test_a_cut_download_goes_on_where_it_was(workshop: Workshop, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    file = "acme/law-lora/adapter_model.safetensors"
    hub.cut[file] = 1_000
    make_plan(load_recipe(write(workshop, {"adapter": "acme/law-lora"})), workshop.root)
    assert [span for method, name, span in hub.log if (method, name) == ("GET", file)] == ["", "1000-"]


def test_without_a_network_what_was_built_is_built_again(
    workshop: Workshop, hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write(workshop, {"adapter": "acme/law-lora"}))
    make_plan(recipe, workshop.root)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.log)
    make_plan(recipe, workshop.root)
    assert len(hub.log) == asked
    said = refused(workshop, {"model": "acme/law"})
    assert "no network" in said and "HF_HUB_OFFLINE is set" in said and "hf download acme/law" in said
    assert "does not send" not in said and "hf auth login" not in said


def _gated(hub: StandIn) -> None:
    hub.refuse["acme/law"] = (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted"})


def _token(hub: StandIn) -> None:
    hub.refuse["acme/law"] = (401, {"X-Error-Message": "Invalid credentials in Authorization header"})


def _broken(hub: StandIn) -> None:
    hub.refuse["acme/law"] = (418, {})


@pytest.mark.parametrize(
    ("arrange", "law", "words"),
    [
        (_gated, {"model": "acme/law"}, ["restricted", "hf auth login", "HF_TOKEN"]),
        (_token, {"model": "acme/law"}, ["Invalid credentials", "hf auth login"]),
        (_broken, {"model": "acme/law"}, ["does not send", "418"]),
        (lambda _: None, {"model": "acme/lwa"}, ["repository of that name", "hf auth login"]),
        (lambda _: None, {"model": "acme/law", "revision": "v9"}, ["revision", "hf auth login"]),
        (lambda _: None, {"model": "acme/law-lora"}, ["an adapter, not a full model", "adapter:"]),
    ],
)
def test_what_the_hub_refuses_is_one_message(
    workshop: Workshop, hub: StandIn, arrange: Callable[[StandIn], None], law: dict[str, Any], words: list[str]
) -> None:
    arrange(hub)
    said = refused(workshop, law)
    assert not [word for word in words if word not in said], said


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["pytorch_model.bin", "modeling_x.py"], ["pickled", "pytorch_model.bin"]),
        (["x-Q4_K_M.gguf", "x-Q8_0.gguf"], ["GGUF", "x-Q8_0.gguf", "gguf_file=NAME"]),
        (["notes.txt"], ["no safetensors weights"]),
    ],
)
def test_a_repository_without_safetensors_says_what_it_has(
    workshop: Workshop, hub: StandIn, tmp_path: Path, names: list[str], words: list[str]
) -> None:
    hub.repos["acme/odd"] = odd = tmp_path / "odd"
    odd.mkdir()
    for name in names:
        (odd / name).write_bytes(b"x")
    shutil.copy(hub.repos["acme/law"] / "config.json", odd)
    said = refused(workshop, {"model": "acme/odd"})
    assert not [word for word in words if word not in said], said
    assert not hub.whole() & {f"acme/odd/{name}" for name in names}
