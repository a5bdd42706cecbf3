"""Quantised models are read as the tensors that they stand for: numbers, mixtures, adapters, records, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adapter_folders import write_adapter
from conftest import logits_of, save, tiny_model
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.report.card import make_card
from modekit.sources.contents import OpenFiles
from modekit.sources.model import open_source
from modekit.sources.open import model_folder
from modekit.weights.stored import Stored
from quantised import FORMS, quantise, write_gguf
from rounding import assert_close

RANDOM = {"method": "routing", "top_k": 1, "router": {"fit": "random"}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of each test's own."""
    monkeypatch.setenv("MODEKIT_CACHE", str(tmp_path / "cache"))


def numbers_of(folder: Path) -> dict[str, torch.Tensor]:
    source = open_source("m", str(folder), folder)
    with OpenFiles() as opened:
        return {
            name: torch.from_numpy(Stored(opened, ref)[:].astype("float32")).view(ref.shape)
            for name, ref in source.tensors.items()
        }


@pytest.mark.parametrize("form", FORMS)
def test_numbers(form: str, tmp_path: Path) -> None:
    save(tiny_model(num_hidden_layers=1, intermediate_size=64), tmp_path / "plain")
    stands = quantise(tmp_path / "plain", tmp_path / "packed", form)
    found = numbers_of(tmp_path / "packed")
    assert found.keys() == stands.keys()
    for name, tensor in stands.items():
        torch.testing.assert_close(found[name], tensor.float(), rtol=1e-6, atol=1e-7)
    source = open_source("m", "m", tmp_path / "packed")
    ref = source.tensor("model.layers.0.mlp.down_proj.weight")
    with OpenFiles() as opened:  # any part is that of the whole
        whole, stored = Stored(opened, ref)[:], Stored(opened, ref)
        for start, stop in ((0, 1), (37, 205), (700, len(stored)), (95, 97)):
            assert (stored[start:stop] == whole[start:stop]).all()
        assert b"".join(bytes(chunk) for chunk in opened.chunks(ref)) == whole.tobytes()


def recipe_of(experts: dict[str, str], base: str = "./base", **output: str) -> Any:
    named = [{"name": name, **({"adapter": spec} if name == "code" else {"model": spec})} for name, spec in experts.items()]
    return parse_recipe({"base_model": base, "experts": named, "mixture": RANDOM, "output": output})


def forced_is_own(root: Path, recipe: Any, own: dict[str, torch.nn.Module], ids: torch.Tensor) -> Path:
    """Build, verify, and compare every expert, forced, with its own model."""
    out = build(make_plan(recipe, root), root / "OUT", overwrite=True).folder
    checkpoint = open_checkpoint(out)
    assert is_proven(checks := verify(checkpoint)), checks
    mixture = load_model(out)
    for place, name in enumerate(recipe.names):
        with mixture_of(mixture, checkpoint).forced(place):
            assert_close(logits_of(mixture, ids), logits_of(own[name], ids))
    return out


def with_numbers(folder: Path, numbers: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The plain model of a folder with other numbers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.load_state_dict(numbers, strict=False)
    return model


@pytest.mark.parametrize("form", ["gptq in order", "awq", "compressed", "fp8 uneven", "8 bits", "nf4 nested"])
def test_a_mixture(form: str, tmp_path: Path, ids: torch.Tensor) -> None:
    """Base and expert quantised: what is written is what their own numbers give, and plan, record and card say so."""
    own = {}
    for seed, name in enumerate(("base", "law")):
        save(tiny_model(seed=seed, num_hidden_layers=2), tmp_path / f"plain-{name}")
        own[name] = quantise(tmp_path / f"plain-{name}", tmp_path / name, form)
    backbone = own["base"]
    mixed = {name: own["law"][name] if ".mlp." in name else tensor for name, tensor in backbone.items()}
    recipe = recipe_of({"still": "base", "law": "./law"}, dtype="float32")
    models = {
        "still": with_numbers(tmp_path / "plain-base", backbone),
        "law": with_numbers(tmp_path / "plain-base", mixed),
    }
    out = forced_is_own(tmp_path, recipe, models, ids)
    checkpoint = open_checkpoint(out)
    said = checkpoint.record.sources[0].packed
    bits = "8 bits" if form in ("fp8 uneven", "8 bits") else "4 bits"
    assert said.startswith(bits)
    assert any(said in note and note.startswith("base_model") for note in make_plan(recipe, tmp_path).notes)
    assert f"base_model (from {said})" in make_card(checkpoint, ask_hub=False).contents["README.md"].decode().replace("\\", "")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    # A whole model that is loaded for evaluation is the one that its numbers give.
    assert_close(logits_of(load_model(tmp_path / "base"), ids), logits_of(models["still"], ids))


def test_the_same_bytes_twice_in_the_models_dtype(tmp_path: Path) -> None:
    save(tiny_model(num_hidden_layers=1, intermediate_size=64), tmp_path / "plain")
    stands = quantise(tmp_path / "plain", tmp_path / "base", "gptq")
    recipe = recipe_of({"a": "base", "b": "./plain"})
    outs = [build(make_plan(recipe, tmp_path), tmp_path / name).folder for name in ("one", "two")]
    for file in outs[0].glob("*.safetensors"):
        assert file.read_bytes() == (outs[1] / file.name).read_bytes()
    written = {name: each for file in outs[0].glob("*.safetensors") for name, each in load_file(file).items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(written[name], stands[name].bfloat16())


def test_an_adapter_over_a_quantised_base(tmp_path: Path, ids: torch.Tensor) -> None:
    """QLoRA's: the adapter's change on the numbers of the base in 4 bits."""
    save(tiny_model(), tmp_path / "plain")
    stands = quantise(tmp_path / "plain", tmp_path / "base", "nf4")
    write_adapter(tmp_path / "code", base_model_name_or_path="someone/base-bnb-4bit")
    base = with_numbers(tmp_path / "plain", stands)
    own = {"still": base, "code": PeftModel.from_pretrained(with_numbers(tmp_path / "plain", stands), tmp_path / "code")}
    forced_is_own(tmp_path, recipe_of({"still": "base", "code": "./code"}, dtype="float32"), own, ids)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "F16", "F32"])
def test_gguf(kind: str, tmp_path: Path, ids: torch.Tensor) -> None:
    """A file's mixture, forced on the file's own expert, is the model that transformers dequantises."""
    pytest.importorskip("gguf")
    for seed, name in enumerate(("base", "law")):
        save(tiny_model(seed=seed, intermediate_size=64, num_hidden_layers=2), tmp_path / name)
        write_gguf(tmp_path / name, tmp_path / f"{name}.gguf", kind)
    base, law = (
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=f"{name}.gguf", dtype=torch.float32).eval()
        for name in ("base", "law")
    )
    assert_close(logits_of(load_model(model_folder("base.gguf", None, root=tmp_path, label="m")), ids), logits_of(base, ids))
    law.load_state_dict({name: each for name, each in base.state_dict().items() if ".mlp." not in name}, strict=False)
    recipe = recipe_of({"still": "base", "law": "./law.gguf"}, "./base.gguf", dtype="float32")
    out = forced_is_own(tmp_path, recipe, {"still": base, "law": law}, ids)
    said = open_checkpoint(out).record.sources[1].packed
    assert said == ("" if kind.startswith("F") else said) and (kind.startswith("F") or kind in said)
    assert (out / "tokenizer.json").exists()
