"""A model that a stranger made to break or to spy: refused by name, soon, in few words, and without waiting for anything.

tests/fuzz makes such models at random; here are the ones that somebody would think of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapter_folders import write_adapter
from conftest import Workshop
from damage import change_config, change_header
from modekit.errors import ModekitError, SourceError
from modekit.loaded.load import load_tokenizer
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.run import Run
from modekit.sources.contents import WeightFile
from modekit.sources.names import natural_key, split_layer
from modekit.sources.source import open_source
from mutations import limited
from refusal import copy_base, copy_expert, refuse_build

TRUSTING = Run(trust_remote_code=True)
NAME = "model.layers.1.mlp.up_proj.weight"


def planned(bench: Workshop, run: Run | None = None) -> Any:
    return make_plan(parse_recipe(bench.recipe), bench.root, run=run or Run())


def refused(bench: Workshop, *words: str) -> str:
    """The plan is refused within limits of time, memory and words."""
    with limited(), pytest.raises(ModekitError) as caught:
        planned(bench)
    message = str(caught.value)
    assert len(message) < 9_000
    for word in (*words, "where:", "to do:"):
        assert word in message, message
    return message


def write_raw(folder: Path, key: str, raw: str) -> None:
    """A setting with a value that json.dumps does not write."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), key: "@"}
    path.write_text(json.dumps(config).replace('"@"', raw))


# config.json


@pytest.mark.parametrize("layers", [10**10, 4, 2**40 + 1, 10**400])
def test_more_layers_than_there_are_tensors(bench: Workshop, layers: int) -> None:
    change_config(copy_base(bench), num_hidden_layers=layers)
    refused(bench, "base_model", "num_hidden_layers")


def test_layers_that_are_only_numbered_high(bench: Workshop) -> None:
    folder = copy_base(bench)
    change_header(folder / "model.safetensors", lambda header: header.update({"model.layers.999999999.x": header.pop(NAME)}))
    change_config(folder, num_hidden_layers=10**9)
    refused(bench, "base_model")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 0),
        ("num_attention_heads", "4"),
        ("hidden_size", True),
        ("hidden_size", 10**400),
        ("head_dim", 8.0),
        ("num_key_value_heads", [2]),
        ("vocab_size", None),
        ("hidden_act", ["silu"]),
        ("rope_theta", "x"),
        ("rope_parameters", {"rope_type": ["yarn"]}),
        ("rope_parameters", {"rope_type": {}}),
        ("rope_scaling", {"type": {}}),
        ("rope_scaling", {"factor": 10**400}),
        ("rope_parameters", [1]),
        ("layer_types", "full_attention"),
        ("layer_types", [[]]),
        ("sliding_window", "x"),
        ("tie_word_embeddings", "no"),
        ("rms_norm_eps", {}),
        ("use_sliding_window", 1),
    ],
)
def test_settings_of_another_kind(bench: Workshop, key: str, value: object) -> None:
    change_config(copy_base(bench), **{key: value})
    refused(bench, "base_model (./base): config.json", "config.json gives no usable")


@pytest.mark.parametrize("raw", ["NaN", "-Infinity", "1e999", "9" * 5_000, "[" * 100_000, '"\\ud800"'])
def test_config_that_no_json_can_say(bench: Workshop, raw: str) -> None:
    write_raw(copy_base(bench), "rope_theta", raw)
    refused(bench, "config.json cannot be read")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["evil/kernel", "paged|evil/kernel@main:x", {"": "evil/kernel"}, ["evil/kernel"], 3])
def test_a_kernel_of_strangers_needs_consent(bench: Workshop, key: str, value: object) -> None:
    change_config(copy_expert(bench), **{key: value})
    refused(bench, "experts[1] 'law' (./law)", key, "--trust-remote-code")
    assert planned(bench, TRUSTING)


@pytest.mark.parametrize(
    "changes",
    [
        {"configuration_files": ["config.4.0.0.json"]},
        {"transformers_weights": "other.safetensors"},
        {"fusion_config": {"x": 1}},
        {"use_kernels": True},
        {"kernel_config": {}},
        {"text_config": {"auto_map": {"AutoModel": "x.Y"}}},
        {"vision": [{"_attn_implementation": "evil/kernel"}]},
    ],
)
def test_other_files_and_code_need_consent(bench: Workshop, changes: dict[str, Any]) -> None:
    change_config(copy_base(bench), **changes)
    refused(bench, "base_model (./base)", "--trust-remote-code")


@pytest.mark.parametrize("value", [None, "sdpa", "eager", "flash_attention_2", {"": "sdpa"}])
def test_an_implementation_of_transformers_own_needs_none(bench: Workshop, value: object) -> None:
    change_config(copy_base(bench), attn_implementation=value)
    assert planned(bench)


def test_a_model_with_an_adapter_in_its_folder(bench: Workshop) -> None:
    (copy_base(bench) / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model"}')
    refused(bench, "both a model and an adapter")


@pytest.mark.parametrize(
    "name", ["../base/model.safetensors", "sub/model.safetensors", "/etc/passwd", "model.bin", "x" * 300, "a\0b"]
)
def test_an_index_that_leads_elsewhere(bench: Workshop, name: str) -> None:
    index = copy_expert(bench) / "model.safetensors.index.json"
    (index.parent / "model.safetensors").rename(index.parent / "model-00001-of-00001.safetensors")
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    refused(bench, "experts[1] 'law'", "model.safetensors.index.json")


def test_names_of_any_digits_are_ordered_and_taken_apart() -> None:
    assert split_layer(f"model.layers.{'9' * 5000}.x") == (None, f"model.layers.{'9' * 5000}.x")
    names = [
        "model.layers.5²5.x",
        "model.layers.²",
        f"model.layers.{'9' * 5000}.x",
        "model.layers.10.x",
        "model.layers.2.x",
        "",
    ]
    assert sorted(names, key=natural_key).index("model.layers.2.x") < sorted(names, key=natural_key).index("model.layers.10.x")


# What is waited for, and what is spied on


def test_pipes_are_not_waited_for(bench: Workshop) -> None:
    folder = copy_base(bench)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        refused(bench, "base_model", name)
        path.unlink()
        path.symlink_to("/dev/zero")
        refused(bench, "base_model", name)
        path.unlink()
        path.write_bytes(content)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors.index.json")
    refused(bench, "base_model", "model.safetensors.index.json")


def test_pipes_of_adapters_and_specialists(bench: Workshop) -> None:
    folder = write_adapter(bench.root / "law")
    bench.recipe["experts"][1] = {"name": "law", "adapter": "./law"}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(bench, "experts[1] 'law'")
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    os.mkfifo(copy_expert(bench, 0) / "specialist.json")
    with limited():
        assert any("medicine" in note for note in planned(bench).notes)


def test_a_file_that_becomes_a_pipe_after_the_plan(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with limited(), pytest.raises(SourceError, match="a weight file cannot be read"):
        WeightFile(tmp_path / "model.safetensors")


def test_a_link_to_a_private_file_is_not_copied(bench: Workshop) -> None:
    folder = copy_base(bench)
    private = bench.root / "id_rsa"
    private.write_text("{}")
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
        for target in (private, Path("../id_rsa"), Path("nowhere"), Path(name)):
            (folder / name).symlink_to(target)
            assert str(private) not in "".join(path.read_text() for path in bench.root.rglob("*.json") if "OUT" in path.parts)
            refused(bench, f"base_model (./base): {name}", "put the file itself there")
            (folder / name).unlink()


def test_links_within_the_folder_and_to_blobs_of_the_hub_are_copied(bench: Workshop) -> None:
    folder = copy_base(bench)
    (folder / "tokenizer_config.json").rename(folder / "own.json")
    (folder / "tokenizer_config.json").symlink_to("own.json")
    assert folder / "tokenizer_config.json" in planned(bench).copied_files
    cache = bench.root / "models--x--y"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    snapshot = folder.rename(cache / "snapshots" / "main")
    for number, path in enumerate(sorted(snapshot.iterdir())):
        blob = cache / "blobs" / f"{number:040x}"
        path.rename(blob)
        path.symlink_to(Path("../../blobs") / blob.name)
    (snapshot / "tokenizer_config.json").unlink()
    (cache / "blobs" / f"{99:064x}").write_text("{}")
    (snapshot / "tokenizer_config.json").symlink_to(f"../../blobs/{99:064x}")
    bench.recipe["base_model"] = str(snapshot)
    assert snapshot / "tokenizer_config.json" in planned(bench).copied_files
    (snapshot / "merges.txt").symlink_to("../../blobs/id_rsa")
    (cache / "blobs" / "id_rsa").symlink_to(bench.root / "recipe.yaml")
    refused(bench, "merges.txt")


# Tokenizers


TOKENIZERS: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("merges that are no text", lambda data: data["model"].update(merges=[[1, 2]])),
    ("merges of one number", lambda data: data["model"].update(merges=3)),
    ("an id that is text", lambda data: data["model"]["vocab"].update(a="3")),
    ("an id that is true", lambda data: data["model"]["vocab"].update(a=True)),
    ("a negative id", lambda data: data["model"]["vocab"].update(a=-1)),
    ("no model", lambda data: data.pop("model")),
    ("added tokens that are none", lambda data: data.update(added_tokens=[3])),
    ("an added token of another kind", lambda data: data.update(added_tokens=[{"content": ["x"], "id": 1}])),
]


@pytest.mark.parametrize("change", [change for _, change in TOKENIZERS], ids=[name for name, _ in TOKENIZERS])
def test_tokenizers_that_say_nothing(bench: Workshop, change: Callable[[dict[str, Any]], object]) -> None:
    path = copy_base(bench) / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    refused(bench, "base_model", "tokenizer.json", "the tokenizer cannot be read")


@pytest.mark.parametrize("raw", ["Infinity", "1e999", "9" * 5_000])
def test_an_id_that_no_json_can_say(bench: Workshop, raw: str) -> None:
    path = copy_base(bench) / "tokenizer.json"
    path.write_text(path.read_text().replace('"a": ', f'"a": {raw}, "b": '))
    refused(bench, "tokenizer.json", "the tokenizer cannot be read")


def test_the_tokenizer_that_is_loaded_is_the_one_that_was_checked(bench: Workshop) -> None:
    folder = copy_base(bench)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "fast_tokenizer_files": ["tokenizer.4.0.0.json"]}))
    with pytest.raises(SourceError, match="names other files"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder)
    for broken in ("{}", '{"model": {"type": "BPE", "vocab": {"a": 1}, "merges": [["x", "y"]]}}', "[]"):
        (folder / "tokenizer.json").write_text(broken)
        with pytest.raises(SourceError, match="no usable tokenizer"):
            load_tokenizer(folder)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    os.mkfifo(folder / "special_tokens_map.json")
    with limited(), pytest.raises(SourceError, match="no file that could be read"):
        load_tokenizer(folder)


def test_tokens_and_names_of_any_length_make_short_messages(bench: Workshop) -> None:
    folder = copy_base(bench)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] |= {f"{number}" + "x" * 10_000: 96 + number for number in range(50)}
    path.write_text(json.dumps(data))
    refused(bench, "50 tokens")
    path.write_text(json.dumps({}))
    change_header(
        folder / "model.safetensors", lambda header: header.update({"\x1b]0;x\x07" + "y" * 100_000: header.pop(NAME)})
    )
    assert "\x1b" not in refused(bench, "base_model")


def test_a_refused_build_of_a_hostile_model_leaves_nothing(bench: Workshop) -> None:
    change_config(copy_expert(bench), attn_implementation="evil/kernel")
    assert "evil/kernel" in refuse_build(bench)


def test_a_source_is_opened_without_its_code(bench: Workshop) -> None:
    folder = copy_expert(bench)
    change_config(folder, attn_implementation="evil/kernel")
    with pytest.raises(SourceError, match="--trust-remote-code"):
        open_source("law", "./law", folder)
    assert open_source("law", "./law", folder, run=TRUSTING).config["attn_implementation"] == "evil/kernel"
