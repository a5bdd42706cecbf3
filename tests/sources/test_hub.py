"""Hub ids, against a hub that lives in a folder: the functions of huggingface_hub are replaced, their contracts kept."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

import modekit.sources.hub as hub
from adapter_folders import write_adapter
from conftest import Workshop
from modekit.planning.make import make_plan
from modekit.planning.summary import summary as summarise
from modekit.recipes.read import load_recipe
from modekit.sources.model import read_header


@pytest.fixture
def folder_hub(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`acme/law` is workshop/law; its snapshots go to tmp_path/cache."""
    remote = workshop.root / "law"

    def snapshot_download(spec: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (spec, revision) == ("acme/law", "v1")
        cache = tmp_path / "cache"
        cache.mkdir(exist_ok=True)
        for file in remote.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
        return str(cache)

    def get_safetensors_metadata(spec: str, *, revision: str | None) -> Any:
        refs = read_header(remote / "model.safetensors", where="hub")
        infos = {
            name: TensorInfo(dtype=ref.dtype, shape=list(ref.shape), data_offsets=(ref.start, ref.end))  # type: ignore[arg-type]
            for name, ref in refs.items()
        }
        header = SafetensorsFileMetadata(metadata={}, tensors=infos)
        return SafetensorsRepoMetadata(
            metadata=None, sharded=False, weight_map={}, files_metadata={"model.safetensors": header}
        )

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "get_safetensors_metadata", get_safetensors_metadata)
    return tmp_path / "cache"


@pytest.fixture
def adapter_hub(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`acme/law-lora` is an adapter of workshop/base."""
    remote, cache = write_adapter(tmp_path / "remote"), tmp_path / "cache"
    cache.mkdir()

    def snapshot_download(spec: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        for file in remote.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
        return str(cache)

    def parse_safetensors_file_metadata(spec: str, file: str, *, revision: str | None) -> SafetensorsFileMetadata:
        refs = read_header(remote / file, where="hub")
        infos = {
            name: TensorInfo(dtype=ref.dtype, shape=list(ref.shape), data_offsets=(ref.start, ref.end))  # type: ignore[arg-type]
            for name, ref in refs.items()
        }
        return SafetensorsFileMetadata(metadata={}, tensors=infos)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "parse_safetensors_file_metadata", parse_safetensors_file_metadata)
    return cache


def test_a_plan_downloads_no_adapter(workshop: Workshop, adapter_hub: Path) -> None:
    experts = [{"name": "law", "adapter": "acme/law-lora"}, {"name": "code", "model": "./code"}]
    recipe = load_recipe(workshop.write(experts=experts))
    remote = summarise(make_plan(recipe, workshop.root, headers_only=True))
    assert not list(adapter_hub.glob("*.safetensors"))
    local = summarise(make_plan(recipe, workshop.root))
    assert list(adapter_hub.glob("*.safetensors"))
    assert remote.model_copy(update={"disk": local.disk}) == local  # free space moves


def recipe_with_hub_expert(workshop: Workshop) -> Path:
    experts = [{"name": "law", "model": "acme/law", "revision": "v1"}, {"name": "code", "model": "./code"}]
    return workshop.write(experts=experts)


def test_a_plan_downloads_no_weights_and_says_what_the_build_will_do(workshop: Workshop, folder_hub: Path) -> None:
    recipe = load_recipe(recipe_with_hub_expert(workshop))
    remote = summarise(make_plan(recipe, workshop.root, headers_only=True))
    assert not list(folder_hub.glob("*.safetensors"))
    local = summarise(make_plan(recipe, workshop.root))
    assert list(folder_hub.glob("*.safetensors"))
    assert remote.model_copy(update={"disk": local.disk}) == local  # free space moves
