"""Promise 4: a streamed build equals the same mixture put together in memory with torch, tensor by tensor and bit by bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoint_states import DTYPES, RANDOM, State, result_of, states_of, store
from conftest import DOMAINS, Workshop, make_workshop
from refusal import tree

MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def in_memory(base: State, experts: list[State], dtype: torch.dtype, factors: list[float] | None = None) -> State:
    """The Mixtral mixture, the simple way."""
    mixture = {name: tensor.to(dtype) for name, tensor in base.items() if ".mlp." not in name}
    for place, expert in enumerate(experts):
        for name, tensor in expert.items():
            if ".mlp." in name:
                layer, _, part = name.partition(".mlp.")
                part = part.removesuffix("_proj.weight")
                if factors is not None and part == "down":
                    tensor = tensor.float() * torch.tensor(factors[place], dtype=torch.float32)
                mixture[f"{layer}.block_sparse_moe.experts.{place}.{MIXTRAL[part]}.weight"] = tensor.to(dtype)
    return mixture


def assert_same_bits(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("source", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("result", ["source", *DTYPES])
def test_streamed_equals_in_memory(bench: Workshop, source: torch.dtype, result: str) -> None:
    store(bench, source)
    found = result_of(bench.build(output={"dtype": result}))
    assert_same_bits(found, in_memory(*states_of(bench), DTYPES.get(result, source)))


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_given_weights_are_folded_into_the_last_projection(bench: Workshop, source: str) -> None:
    store(bench, DTYPES[source])
    mixture = {"method": "linear", "weights": {"code": 3, "medicine": 1, "law": 4}}
    wanted = in_memory(*states_of(bench), DTYPES[source], factors=[3 / 8, 12 / 8, 9 / 8])
    assert_same_bits(result_of(bench.build(mixture=mixture)), wanted)


def test_fused_experts(tmp_path: Path) -> None:
    workshop = make_workshop(tmp_path, attention_bias=True)
    base, experts = states_of(workshop)
    wanted = {name: tensor for name, tensor in base.items() if ".mlp." not in name}
    for layer in range(3):
        prefix, block = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.block_sparse_moe."
        wanted[block + "input_linear.weight"] = torch.stack(
            [torch.cat([expert[prefix + "gate_proj.weight"], expert[prefix + "up_proj.weight"]]) for expert in experts]
        )
        wanted[block + "output_linear.weight"] = torch.stack([expert[prefix + "down_proj.weight"] for expert in experts])
    assert_same_bits(result_of(workshop.build()), wanted)
    assert_same_bits(
        result_of(workshop.build(output={"dtype": "bfloat16"})), {name: tensor.bfloat16() for name, tensor in wanted.items()}
    )


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    workshop = make_workshop(tmp_path, tie_word_embeddings=True)
    base, experts = states_of(workshop)
    assert "lm_head.weight" not in base
    assert_same_bits(result_of(workshop.build()), in_memory(base, experts, torch.float32))


def test_a_system_without_sendfile_or_with_a_moody_one(bench: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tree(bench.build("WHOLE"))
    calls = 0

    def moody(target: int, source: int, offset: int, count: int) -> int:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise OSError(errno.EINVAL, "not now")
        return os.write(target, os.pread(source, min(count, 1000), offset))

    monkeypatch.setattr("modekit.weights.reading.os", SimpleNamespace(sendfile=moody))
    assert tree(bench.build("MOODY")) == whole
    assert calls > 10
    monkeypatch.setattr("modekit.weights.reading.os", SimpleNamespace())
    assert tree(bench.build("WITHOUT")) == whole


def test_sharded_sources_give_the_same_bytes(bench: Workshop) -> None:
    single = tree(bench.build("SINGLE"))
    for name in ("base", *DOMAINS):
        source = Path(bench.recipe["base_model"]).parent / name
        shutil.copytree(source, bench.root / name)
        (bench.root / name / "model.safetensors").unlink()
        AutoModelForCausalLM.from_pretrained(source).save_pretrained(bench.root / name, max_shard_size="30KB")
        assert len(list((bench.root / name).glob("model-*.safetensors"))) > 3
    experts = [{**expert, "model": f"./{expert['name']}"} for expert in bench.recipe["experts"]]
    sharded = tree(bench.build("SHARDED", base_model="./base", experts=experts))
    assert single.pop("modekit.json") != sharded.pop("modekit.json")
    assert single.pop(".modekit") != sharded.pop(".modekit")  # which has its digest
    assert sharded == single


def test_several_output_shards(bench: Workshop) -> None:
    wanted = in_memory(*states_of(bench), torch.float32)
    folder = bench.build(output={"shard_size": "20 KB"})
    assert_same_bits(result_of(folder), wanted)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("model-*-0*.safetensors"))
    assert len(shards) > 10
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
        assert all(index["weight_map"][name] == shard.name for name in tensors)
    gates = load_file(folder / "model-router.safetensors")
    assert index["weight_map"].keys() == wanted.keys() | gates.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in [*wanted.values(), *gates.values()])
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert torch.equal(loaded["model.norm.weight"], wanted["model.norm.weight"])


def test_an_unforeseen_error_of_the_second_thread_is_what_the_build_ends_with(
    bench: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended as a KeyError of the file whose hash was then missing."""

    def broken(*_: object) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("modekit.building.build.check_finite", broken)
    before = tree(bench.root)
    with pytest.raises(RuntimeError, match="unforeseen"):
        bench.build(mixture=RANDOM)
    assert {name for name in tree(bench.root) if name not in before} <= {"recipe.yaml"}
