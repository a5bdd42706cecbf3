"""A stranger's checkpoint: its sizes are held against its weights, its names stay in it, its router is the recorded one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import ended, modekit
from conftest import Workshop
from damage import NO_FILES, in_time, no_file
from modekit.building.verify import verify
from modekit.checkpoint.open import open_checkpoint, open_with_any_router
from modekit.errors import CheckpointError, SourceError
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.shapes import expert_view
from modekit.planning.plan import ROUTER_FILE
from modekit.sources.weight_files import INDEX_FILE
from refusal import borrow, refuse

RANDOM = {"fit": "random"}
PLACE = "model.layers.0.mlp.down_proj"
OWN = {"modules": ["q", "down"], "router": {**RANDOM, "granularity": "context"}}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, shared_workshop: Workshop) -> Workshop:
    """A checkpoint of either shape; copy it before damaging it."""
    workshop = borrow(shared_workshop, tmp_path_factory.mktemp("strangers"))
    workshop.build("native")
    law = {**workshop.recipe["experts"][1], "as": "lora", "rank": 2}
    workshop.build("modekit", mixture=OWN, experts=[workshop.recipe["experts"][0], law, workshop.recipe["experts"][2]])
    return workshop


@pytest.fixture
def copied(built: Workshop, tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    def copy(shape: str) -> Path:
        # Beside the first one, so that its sources are where it says.
        return shutil.copytree(built.root / shape, built.root / f"{tmp_path.name}-{shape}")

    yield copy
    for folder in built.root.glob(f"{tmp_path.name}-*"):
        shutil.rmtree(folder)


def say(folder: Path, file: str, *path: Any, value: Any) -> None:
    """Put a value into a JSON file."""
    data = json.loads((folder / file).read_text())
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    (folder / file).write_text(json.dumps(data))


# Sizes


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("places", PLACE, "ranks"), [-5, 14, 0], "greater than or equal to 0"),
        (("places", PLACE, "ranks"), [1] * 10**6, "at most"),
        (("places", PLACE, "ranks"), [0, 10**9, 0], PLACE),
        (("places", PLACE, "own"), [0] * 10**6, "at most"),
        (("places", PLACE, "own"), [0, 0, 2], "each once"),
        (("places", PLACE, "own"), [0, 1, 2], PLACE),
        (("places", PLACE, "base"), "yes", "boolean"),
        (("places", PLACE, "router"), "nowhere", "no router"),
        (("places", "model.layers.0.self_attn.q_proj", "width"), 10**12, "gates of other names or shapes"),
        (("routing", "averages"), [{"decay": 0.9}] * 10**6, "at most"),
        (("routing", "averages"), [{"decay": 0.9}] * 200, "gates of other names or shapes"),
        (("routing", "averages"), [{"decay": 7.0}], "less than or equal to 1"),
        (("routing", "top_k"), 4, "only 3 experts"),
        (("routing", "always_on"), {"expert": 9, "weight": None}, "only 3 experts"),
        (("experts",), ["a", "b", "c"], "other names"),
        (("experts",), ["medicine", "law"] * 100_000, "at most"),
        (("places",), {f"model.layers.{n}.mlp": {} for n in range(100_000)}, "problems"),
    ],
)
def test_places_that_the_weights_do_not_have(copied: Callable[[str], Path], path: Any, value: Any, said: str) -> None:
    folder = copied("modekit")
    say(folder, "config.json", "modekit", *path, value=value)
    with in_time(), pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    assert said in str(error.value) and len(str(error.value)) < 2_000


@pytest.mark.parametrize("shape", ["native", "modekit"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**10),
        ("num_hidden_layers", "3"),
        ("num_hidden_layers", -1),
        ("hidden_size", 10**12),
        ("hidden_size", None),
        ("dtype", "int8"),
        ("architectures", []),
        ("architectures", "MixtralForCausalLM"),
    ],
)
def test_a_config_of_another_size(copied: Callable[[str], Path], shape: str, key: str, value: Any) -> None:
    folder = copied(shape)
    say(folder, "config.json", key, value=value)
    with in_time():
        assert "config.json" in refuse("verify", folder)


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts_per_tok"])
@pytest.mark.parametrize("value", [0, 4, 10**9, "2", True, None])
def test_more_experts_than_there_are(copied: Callable[[str], Path], key: str, value: Any) -> None:
    folder = copied("native")
    say(folder, "config.json", key, value=value)
    assert key in refuse("eval", folder)


def test_layers_whose_experts_are_not_there(copied: Callable[[str], Path]) -> None:
    folder = copied("native")
    record = json.loads((folder / "modekit.json").read_text())
    record["recipe"]["experts"].append({"name": "more", "model": "./law"})
    record["expert_sources"].append(record["expert_sources"][1])
    (folder / "modekit.json").write_text(json.dumps(record))
    assert "experts.3.w1.weight" in refuse("report", folder)


# Names


@pytest.mark.parametrize("name", ["../../x", "..", "", "/etc/passwd", "a/b", "a\\b", "x\0"])
@pytest.mark.parametrize("shape", ["native", "modekit"])
def test_shards_and_source_files_are_names(copied: Callable[[str], Path], shape: str, name: str) -> None:
    folder = copied(shape)
    say(folder, INDEX_FILE, "weight_map", "model.norm.weight", value=name)
    assert f"{INDEX_FILE} is missing or damaged" in refuse("verify", folder)
    shutil.copy((folder.parent / shape) / INDEX_FILE, folder)
    files = json.loads((folder / "modekit.json").read_text())["sources"][0]["files"]
    say(folder, "modekit.json", "sources", 0, "files", value={name: next(iter(files.values()))})
    assert "should match pattern" in refuse("verify", folder)


@pytest.mark.parametrize("value", ["/etc", "x\0y", "../" * 2_000])
@pytest.mark.parametrize("path", [("recipe_folder",), ("sources", 0, "folder")])
def test_folders_are_relative(copied: Callable[[str], Path], path: Any, value: str) -> None:
    folder = copied("native")
    say(folder, "modekit.json", *path, value=value)
    assert "folder: String should" in refuse("verify", folder)


# What is no file


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize(
    "name", ["modekit.json", "config.json", INDEX_FILE, ROUTER_FILE, "model-backbone-00001.safetensors", "tokenizer.json"]
)
def test_what_is_no_file_is_not_waited_for(copied: Callable[[str], Path], name: str, kind: str) -> None:
    folder = copied("native")
    no_file(folder / name, kind)
    with in_time():
        code, stdout, stderr = ended("verify", folder, "--no-reload")
    assert code in (1, 2) and "bug" not in stderr
    assert code == 2 or "tokenizer.json cannot be compared" in stdout or "tokenizer.json differs" in stdout


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_transformers_is_given_no_pipes(copied: Callable[[str], Path], kind: str) -> None:
    folder = copied("native")
    no_file(folder / "tokenizer.json", kind)
    for load in (load_model, load_tokenizer):
        with in_time(), pytest.raises(SourceError, match="a pipe or device"):
            load(folder)


# Code


@pytest.mark.parametrize("shape", ["native", "modekit"])
def test_code_that_a_mixture_brings_is_refused(
    copied: Callable[[str], Path], shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(shape)
    asked: list[dict[str, Any]] = []

    def refuse_code(config: dict[str, Any], **_: Any) -> None:
        asked.append(config)
        if "evil" in str(config):
            raise SourceError("code", where="x")

    monkeypatch.setattr("modekit.loaded.load.check_no_code", refuse_code)
    monkeypatch.setattr("modekit.loaded.native.check_no_code", refuse_code)
    load_model(folder)
    assert asked and not any("auto_map" in config for config in asked)  # what is installed runs, not what lies there
    say(folder, "config.json", "attn_implementation", value="evil/kernel")
    checkpoint = open_checkpoint(folder)
    for load in (load_model, load_tokenizer):
        with pytest.raises(SourceError):
            load(folder)
    assert verify(checkpoint)[-1].verdict == "failed"


def test_code_in_the_record_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("native")
    say(folder, "modekit.json", "dense_config", "auto_map", value={"AutoConfig": "evil.Config"})
    with pytest.raises(SourceError, match="code of its own"):
        expert_view(open_checkpoint(folder))
    shutil.copy(folder.parent / "native" / "modekit.json", folder)
    say(folder, "config.json", "auto_map", value={"AutoConfig": "evil.Config"})
    with pytest.raises(SourceError, match="code of its own"):
        load_model(folder)


@pytest.mark.parametrize("shape", ["native", "modekit"])
def test_an_adapter_in_the_folder_is_not_taken_in(copied: Callable[[str], Path], shape: str) -> None:
    folder = copied(shape)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "somebody/else"}')
    with pytest.raises(SourceError, match="a model and an adapter"):
        load_model(folder)


@pytest.mark.parametrize(("key", "value"), [("rope_parameters", 7), ("hidden_act", "nothing"), ("head_dim", [])])
def test_a_base_that_cannot_be_made_is_an_error(copied: Callable[[str], Path], key: str, value: Any) -> None:
    folder = copied("native")
    say(folder, "modekit.json", "dense_config", key, value=value)
    with pytest.raises(CheckpointError, match="no model of the base's kind"):
        expert_view(open_checkpoint(folder))


# The router


@pytest.mark.parametrize("shape", ["native", "modekit"])
def test_another_router_is_refused_where_it_would_decide(copied: Callable[[str], Path], shape: str) -> None:
    folder = copied(shape)
    content = bytearray((folder / ROUTER_FILE).read_bytes())
    content[-1] ^= 1
    (folder / ROUTER_FILE).write_bytes(content)
    for command in ("eval", "inspect", "report", "train"):
        assert "`modekit fit`" in refuse(command, folder)
    code, stdout, _ = ended("verify", folder, "--no-reload")
    assert code == 1 and "is not the one that modekit.json records" in stdout
    modekit("fit", folder, "fit=random", "seed=1")
    assert open_checkpoint(folder).gates()


def test_gates_of_another_shape_are_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("native")
    content = (folder / ROUTER_FILE).read_bytes().replace(b"[3,32]", b"[32,3]")
    (folder / ROUTER_FILE).write_bytes(content)
    say(folder, "modekit.json", "router", "sha256", value=hashlib.sha256(content).hexdigest())
    with pytest.raises(CheckpointError, match="other names or shapes"):
        open_checkpoint(folder)
    assert {check.name: check.verdict for check in verify(open_with_any_router(folder), reload=False)}["router"] == "failed"


# Anything else that a record says


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("recipe_digest",), "`<script>`"),
        (("router", "sha256"), "x"),
        (("dense_parameters",), 0),
        (("dense_parameters",), 10**400),
        (("sources",), []),
        (("sources", 0, "files", "model.safetensors", "size"), -1),
        (("expert_sources",), [10**9] * 3),
        (("training",), [{"settings": {"what": 7}}]),
        (("router", "settings", "decay"), [0.5] * 300),
    ],
)
def test_a_record_that_cannot_be_shown(copied: Callable[[str], Path], path: Any, value: Any) -> None:
    folder = copied("native")
    say(folder, "modekit.json", *path, value=value)
    assert "modekit.json is damaged" in refuse("verify", folder)


def test_a_large_record_is_not_read(copied: Callable[[str], Path]) -> None:
    folder = copied("native")
    say(folder, "modekit.json", "dense_config", "x", value="x" * 2**24)
    with in_time():
        assert "more than 16,777,216 bytes" in refuse("verify", folder)
    (folder / "modekit.json").write_text("{" + ",".join(f'"k{n}":1' for n in range(1_000_000)) + "}")
    with in_time():
        assert "problems" in refuse("verify", folder)


def test_a_folder_that_is_not_there_is_not_said_to_miss_a_file_alone(tmp_path: Path) -> None:
    assert "there is no such folder" in refuse("eval", tmp_path / "nope")
    assert "there is no such folder" not in refuse("eval", tmp_path)
