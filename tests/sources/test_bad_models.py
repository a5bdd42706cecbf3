"""A model that is missing, damaged, foreign or unsafe is refused by name, and nothing is left behind."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import Workshop, save, tiny_model
from damage import change_config, change_header
from modekit.building.build import build
from modekit.building.verify import verify
from modekit.checkpoint.open import open_checkpoint
from modekit.cli.shell import main
from modekit.experts.specialize import specialize
from modekit.loaded.text_training import Training
from modekit.members.change import before_change
from modekit.members.edits import NewExpert, add_expert
from modekit.sources.source import open_source
from modekit.sources.tokenizer import copied_content
from refusal import copy_base, copy_expert, refuse_build

LAW = "experts[1] 'law' (./law)"
FFN = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# Folders and files


def test_missing_folders(bench: Workshop) -> None:
    for spec in ("./nowhere", "../nowhere/at/all", "nowhere", "~nobody-of-that-name/model", "x" * 300):
        assert f"base_model ({spec})" in refuse_build(bench, base_model=spec)
        experts = [{"name": "law", "model": spec}]
        message = refuse_build(bench, experts=experts, mixture={"router": {"fit": "random"}})
        assert f"experts[0] 'law' ({spec})" in message
        assert "model folder does not exist" in message


def test_a_file_is_not_a_model_folder(bench: Workshop) -> None:
    """Also one whose name is like that of a repository on the hub, which is not asked for it."""
    copy_base(bench)
    for spec in (str(bench.root / "base" / "model.safetensors"), "base/model.safetensors"):
        message = refuse_build(bench, base_model=spec)
        assert "a file is named in place of a folder" in message and "that the file is part of" in message


def test_a_gguf_names_what_unpacks_it(bench: Workshop) -> None:
    """A file, and a folder of them."""
    file = copy_expert(bench) / "model-q8_0.gguf"
    file.write_bytes(b"GGUF")
    assert "gguf_file=NAME" in refuse_build(bench, base_model=str(file))
    (file.parent / "model.safetensors").unlink()
    message = refuse_build(bench)
    assert "GGUF files are not read" in message and "model-q8_0.gguf" in message and "gguf_file=NAME" in message


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"architectures": []}', "\udcff"])
def test_damaged_config(bench: Workshop, content: str) -> None:
    (copy_expert(bench) / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    message = refuse_build(bench)
    assert LAW in message
    assert "config.json" in message


@pytest.mark.parametrize("value", ["absent", -1])
def test_config_without_a_size(bench: Workshop, value: object) -> None:
    change_config(copy_base(bench), num_hidden_layers=value)
    message = refuse_build(bench)
    assert "base_model (./base): config.json" in message
    assert "num_hidden_layers" in message


def test_weights_of_other_sizes_than_the_config_says(bench: Workshop) -> None:
    folder = copy_base(bench)
    for key, value, name in (
        ("intermediate_size", 64, "model.layers.0.mlp.gate_proj.weight"),
        ("vocab_size", 100, "model.embed_tokens.weight"),
        ("num_hidden_layers", 2, "more or fewer layers than config.json says"),
        ("num_hidden_layers", 4, "more or fewer layers than config.json says"),
    ):
        kept = (folder / "config.json").read_text()
        change_config(folder, **{key: value})
        assert name in refuse_build(bench)
        (folder / "config.json").write_text(kept)


@pytest.mark.parametrize("name", [FFN, "lm_head.weight"])
def test_missing_tensor(bench: Workshop, name: str) -> None:
    change_tensors(copy_base(bench), lambda tensors: tensors.pop(name))
    assert f"base_model: {name}" in refuse_build(bench)
    change_tensors(copy_expert(bench), lambda tensors: tensors.pop(name))
    bench.recipe["base_model"] = bench.recipe["experts"][0]["model"]
    assert f"experts[1] 'law': {name}" in refuse_build(bench)


def test_missing_shard(bench: Workshop) -> None:
    folder = copy_expert(bench)
    (folder / "model.safetensors").unlink()
    tiny_model(seed=2).save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    message = refuse_build(bench)
    assert LAW in message
    assert shards[1].name in message


@pytest.mark.parametrize("shards_stay", [False, True])
def test_a_model_saved_over_one_in_shards_is_the_one_that_transformers_loads(tmp_path: Path, shards_stay: bool) -> None:
    folder, now = tmp_path / "model", tiny_model(seed=2, num_hidden_layers=1)
    tiny_model(seed=1, num_hidden_layers=1).save_pretrained(folder, max_shard_size="20KB")
    assert list(folder.glob("model-*.safetensors"))
    now.save_pretrained(tmp_path / "now" if shards_stay else folder)  # transformers removes the shards, but not their index
    if shards_stay:
        shutil.copy(tmp_path / "now" / "model.safetensors", folder)
    assert (folder / "model.safetensors.index.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, now.lm_head.weight)
    assert open_source("law", "./law", folder).files == (folder / "model.safetensors",)


@pytest.mark.parametrize("content", ["", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_damaged_index(bench: Workshop, content: str) -> None:
    folder = copy_expert(bench)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    message = refuse_build(bench)
    assert LAW in message
    assert "model.safetensors.index.json" in message


def test_truncated_weights(bench: Workshop) -> None:
    path = copy_expert(bench) / "model.safetensors"
    content = path.read_bytes()
    for size in (0, 4, 8, 100, 3000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        message = refuse_build(bench)
        assert f"{LAW}: model.safetensors" in message
        assert "damaged, or none" in message


@pytest.mark.parametrize(
    "content",
    [
        b"garbage" * 100,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 8) + b"not json",
        struct.pack("<Q", 4) + b"[1 ]",
        struct.pack("<Q", 4) + b"\xff\xfe{}",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 12) + b'{"a": {}}   ',
        struct.pack("<Q", 8) + b'{"a": 1}',
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    ids=["text", "huge header", "no json", "list", "no utf-8", "deep", "no entry", "number", "git lfs pointer"],
)
def test_garbage_weights(bench: Workshop, content: bytes) -> None:
    (copy_expert(bench) / "model.safetensors").write_bytes(content)
    message = refuse_build(bench)
    assert f"{LAW}: model.safetensors" in message
    assert "download or save the file again" in message


LIES: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("offsets beyond the file", lambda header: header[FFN].update(data_offsets=[0, 10**9])),
    ("all offsets far out", lambda header: header[FFN].update(data_offsets=[10**9, 10**9 + 48 * 32 * 4])),
    ("negative offset", lambda header: header[FFN].update(data_offsets=[-6144, 0])),
    ("reversed offsets", lambda header: header[FFN].update(data_offsets=header[FFN]["data_offsets"][::-1])),
    ("larger shape", lambda header: header[FFN].update(shape=[48, 64])),
    ("smaller dtype", lambda header: header[FFN].update(dtype="BF16")),
    ("negative shape", lambda header: header[FFN].update(shape=[-48, -32])),
    ("fractional shape", lambda header: header[FFN].update(shape=[48.0, 32.0])),
    ("dtype that is no word", lambda header: header[FFN].update(dtype=["F32"])),
    ("overlap", lambda header: header[FFN].update(data_offsets=header["model.layers.1.mlp.gate_proj.weight"]["data_offsets"])),
    ("hole", lambda header: header.pop("model.layers.1.mlp.gate_proj.weight")),
]


@pytest.mark.parametrize("lie", [lie for _, lie in LIES], ids=[name for name, _ in LIES])
def test_header_that_lies(bench: Workshop, lie: Callable[[dict[str, Any]], object]) -> None:
    change_header(copy_expert(bench) / "model.safetensors", lie)
    message = refuse_build(bench)
    assert f"{LAW}: model.safetensors" in message
    assert "download or save the file again" in message


# Values


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (FFN, {}),
        (FFN, {"output": {"dtype": "float16"}}),
        (
            "model.layers.1.mlp.down_proj.weight",
            {"mixture": {"method": "linear", "weights": {"medicine": 1, "law": 2, "code": 3}}},
        ),
        (NORM, {"mixture": {"router": {"fit": "random"}, "backbone": {"expert": "law"}}}),
        (NORM, {"mixture": {"router": {"fit": "random"}, "backbone": "average"}}),
    ],
    ids=["copied", "to float16", "scaled", "copied backbone", "average"],
)
def test_nan_and_inf(bench: Workshop, value: float, dtype: torch.dtype, name: str, changes: dict[str, Any]) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})
        tensors[name].view(-1)[-1] = value

    change_tensors(copy_expert(bench), spoil)
    message = refuse_build(bench, **changes)
    assert f"{LAW}: {name}" in message
    assert "NaN or Inf" in message


def test_nan_in_the_base(bench: Workshop) -> None:
    folder = copy_base(bench)
    change_tensors(folder, lambda tensors: tensors[NORM].fill_(math.nan))
    assert f"base_model (./base): {NORM}" in refuse_build(bench)


def test_values_that_overflow_the_result(bench: Workshop) -> None:
    change_tensors(copy_expert(bench), lambda tensors: tensors[FFN][0, 0].fill_(70_000.0))
    message = refuse_build(bench, output={"dtype": "float16"})
    assert f"{LAW}: {FFN}" in message
    assert "do not fit float16" in message
    change_tensors(bench.root / "law", lambda tensors: tensors[NORM].fill_(60_000.0))
    mixture = {"router": {"fit": "random"}, "backbone": {"method": "task_arithmetic", "scale": 2.0}}
    change_tensors(bench.root / "law", lambda tensors: tensors[FFN][0, 0].fill_(1.0))
    message = refuse_build(bench, output={"dtype": "float16"}, mixture=mixture)
    assert f"mixture.backbone: {NORM}" in message
    assert "overflows float16" in message


# Models that do not belong together


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"intermediate_size": 64}, "intermediate_size"),
        ({"num_hidden_layers": 2}, "num_hidden_layers"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope_parameters"),
    ],
)
def test_expert_of_another_architecture(bench: Workshop, overrides: dict[str, Any], key: str) -> None:
    save(tiny_model(seed=5, **overrides), bench.root / "law")
    bench.recipe["experts"][1]["model"] = "./law"
    message = refuse_build(bench)
    assert LAW in message
    assert f"the expert's {key} differs" in message
    assert "expected:" in message


def test_expert_of_another_family(bench: Workshop) -> None:
    save(tiny_model("qwen3", seed=5, head_dim=8), bench.root / "law")
    bench.recipe["experts"][1]["model"] = "./law"
    message = refuse_build(bench)
    assert LAW in message
    assert "another family" in message
    assert "qwen3" in message


def test_expert_with_one_tensor_of_another_shape(bench: Workshop) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(64, 32)

    change_tensors(copy_expert(bench), widen)
    message = refuse_build(bench, mixture={"router": {"fit": "random"}, "backbone": "average"})
    assert f"{LAW}: model.layers.1.self_attn.q_proj.weight" in message
    assert "[64, 32]" in message
    assert "[32, 32]" in message


# Weights that modekit does not read


def test_pickled_weights(bench: Workshop) -> None:
    folder = copy_expert(bench)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refuse_build(bench)
    assert LAW in message
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_no_weights_at_all(bench: Workshop) -> None:
    (copy_expert(bench) / "model.safetensors").unlink()
    message = refuse_build(bench)
    assert LAW in message
    assert "no safetensors weights" in message


def test_a_quantised_model(bench: Workshop) -> None:
    folder = copy_expert(bench)
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    message = refuse_build(bench)
    assert LAW in message
    assert "unquantised" in message
    change_config(folder, quantization_config="absent")
    for dtype in (torch.int8, torch.float8_e4m3fn):
        change_tensors(folder, lambda tensors, dtype=dtype: tensors.update({FFN: torch.zeros(48, 32).to(dtype)}))
        assert f"{LAW}: {FFN}" in refuse_build(bench)
    change_header(folder / "model.safetensors", lambda header: header[FFN].update(dtype="F4", shape=[48, 64]))
    assert f"{LAW}: {FFN}" in refuse_build(bench)


def test_remote_code_needs_consent(bench: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_expert(bench)
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    (folder / "modeling_own.py").write_text("raise SystemExit('this code must not run')\n")
    message = refuse_build(bench)
    assert LAW in message
    assert "--trust-remote-code" in message
    out = bench.root / "OUT"
    monkeypatch.setattr("sys.argv", ["modekit", "build", str(bench.root / "recipe.yaml"), str(out), "--trust-remote-code"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in {0, None}
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert not list(out.glob("*.py"))


@pytest.mark.parametrize("named", ["auto_map", "\\u0061uto_map"])
def test_a_tokenizer_that_names_code_of_the_hub_does_not_hand_it_on(workshop: Workshop, named: str) -> None:
    """Into a mixture, before and after an expert came, and into a model that was fine-tuned."""
    file = workshop.root / "base" / "tokenizer_config.json"
    code = '{"AutoTokenizer": [null, "someone/repository--own.OwnTokenizer"]}'
    file.write_text(file.read_text().replace("{", f'{{"{named}": {code}, ', 1))
    out, name = workshop.build(), "tokenizer_config.json"
    assert {check.verdict for check in verify(open_checkpoint(out))} == {"proven"}
    new = NewExpert({"model": "./law", "text": "./text/law.jsonl"}, workshop.root)
    planned = before_change(open_checkpoint(out), add_expert(open_checkpoint(out), "second", new))
    more = build(planned.plan, workshop.root / "MORE", update=planned).folder
    training, texts = Training(steps=1, batch_tokens=64, sequence_length=32), ["text/law.jsonl"]
    specialize(workshop.root / "base", workshop.root / "SPECIALIST", texts, root=workshop.root, training=training)
    for folder in (out, more, workshop.root / "SPECIALIST"):
        assert json.loads((folder / name).read_text())["eos_token"] and "OwnTokenizer" not in (folder / name).read_text()
    assert (out / "tokenizer.json").read_bytes() == (file.with_name("tokenizer.json")).read_bytes()
    (processor := file.with_name("processor_config.json")).write_text(
        f'{{"image_processor": [{{"{named}": {code}, "size": 2}}]}}'
    )
    assert json.loads(copied_content(processor)) == {"image_processor": [{"size": 2}]}
