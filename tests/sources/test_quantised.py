"""Quantised models are read as the tensors that they stand for: numbers, mixtures, adapters, records, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from adapter_folders import write_adapter
from conftest import logits_of, save, tiny_model
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import ModekitError, SourceError
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.report.card import make_card
from modekit.sources.contents import OpenFiles
from modekit.sources.source import open_source
from modekit.weights.flat import stored
from quantised import FORMS, quantise
from rounding import assert_close

RANDOM = {"method": "routing", "top_k": 1, "router": {"fit": "random"}}


def numbers_of(folder: Path) -> dict[str, torch.Tensor]:
    source = open_source("m", str(folder), folder)
    with OpenFiles() as opened:
        return {
            name: torch.from_numpy(stored(opened, ref)[:].astype("float32")).view(ref.shape)
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
        whole, found = stored(opened, ref)[:], stored(opened, ref)
        for start, stop in ((0, 1), (37, 205), (700, len(found)), (95, 97)):
            assert (found[start:stop] == whole[start:stop]).all()
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


@pytest.mark.parametrize("form", ["fp8 uneven", "nf4 nested"])
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
    bits = "8 bits" if form == "fp8 uneven" else "4 bits"
    assert said.startswith(bits)
    assert any(said in note and note.startswith("base_model") for note in make_plan(recipe, tmp_path).notes)
    assert f"base_model (from {said})" in make_card(checkpoint).contents["README.md"].decode().replace("\\", "")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    # A whole model that is loaded for evaluation is the one that its numbers give.
    assert_close(logits_of(load_model(tmp_path / "base"), ids), logits_of(models["still"], ids))


def test_the_same_bytes_twice_in_the_models_dtype(tmp_path: Path) -> None:
    save(tiny_model(num_hidden_layers=1, intermediate_size=64), tmp_path / "plain")
    stands = quantise(tmp_path / "plain", tmp_path / "base", "fp8")
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


@pytest.mark.parametrize(
    "how",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    ],
    ids=["nf4 nested", "fp4", "nf4 in bfloat16"],
)
def test_bitsandbytes_itself(how: dict[str, Any], tmp_path: Path) -> None:
    """What bitsandbytes writes and dequantises on the CPU (0.50.2 is wrong there where a block crosses a row's end)."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain = save(tiny_model(hidden_size=64, intermediate_size=128, num_hidden_layers=1), tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**how), device_map="cpu"
    )
    save(model, tmp_path / "packed")
    found, count = numbers_of(tmp_path / "packed"), 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            stands = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        else:
            continue
        count += 1
        torch.testing.assert_close(found[f"{name}.weight"], stands.float(), rtol=1e-6, atol=1e-7)
    assert count == 7
    assert open_source("m", "m", tmp_path / "packed").packed == "4 bits (bitsandbytes)"


@pytest.mark.parametrize("form", ["fp8", "fp8 per tensor"])
def test_fp8_of_transformers(form: str) -> None:
    parts, stands = FORMS[form][1](torch.randn(32, 64, generator=torch.Generator().manual_seed(1)))
    scale = parts["weight_scale_inv"]
    found = Fp8Dequantize(None)._dequantize_one(parts["weight"], scale if scale.ndim else scale.reshape(1, 1), torch.float32)
    torch.testing.assert_close(found, stands, rtol=1e-6, atol=1e-7)


GATE = "model.layers.0.mlp.gate_proj"
STATE = f"{GATE}.weight.quant_state.bitsandbytes__nf4"


def as_bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def state(**changes: Any) -> torch.Tensor:
    return as_bytes(json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": [64, 32], **changes}))


LIES: list[tuple[str, dict[str, Any], dict[str, torch.Tensor | None], str]] = [
    ("fp8", {"quant_method": "exl2"}, {}, "unpack it with the library"),
    ("fp8", {"quant_method": "gptq"}, {}, "quant_method gptq"),
    ("fp8", {"quant_method": "awq"}, {}, "quant_method awq"),
    ("fp8", {"quant_method": "compressed-tensors"}, {}, "quant_method compressed-tensors"),
    ("nf4", {}, {STATE: state(shape=[2**30, 2**30])}, f"{GATE}.weight"),
    ("nf4", {}, {STATE: state(shape=[64])}, STATE),
    ("nf4", {}, {STATE: state(blocksize=2**40)}, STATE),
    ("nf4", {}, {STATE: state(blocksize=128)}, ".absmax"),
    ("nf4", {}, {STATE: as_bytes("{" * 9_000)}, STATE),
    ("nf4", {}, {STATE: torch.zeros(2**17, dtype=torch.uint8)}, STATE),
    ("nf4", {}, {f"{GATE}.weight.quant_map": torch.zeros(15)}, ".quant_map"),
    ("fp8", {}, {f"{GATE}.weight_scale_inv": torch.zeros(7, 5)}, f"{GATE}.weight_scale_inv"),
    ("fp8", {}, {f"{GATE}.weight_scale_inv": torch.zeros(0, 1)}, f"{GATE}.weight_scale_inv"),
    ("fp8", {}, {f"{GATE}.weight_scale_inv": None}, f"{GATE}.weight"),
    ("fp8", {"weight_block_size": [0, 1]}, {}, "no usable settings of fp8"),
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: f"{lie[0]} {lie[3]}"[:60])
def test_what_lies_is_refused_by_the_headers(lie: tuple[str, dict[str, Any], dict[str, Any], str], tmp_path: Path) -> None:
    form, settings, parts, said = lie
    save(tiny_model(num_hidden_layers=1, intermediate_size=64), tmp_path / "plain")
    folder = tmp_path / "packed"
    quantise(tmp_path / "plain", folder, form)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors") | parts
    save_file({name: each for name, each in tensors.items() if each is not None}, folder / "model.safetensors")
    with pytest.raises(ModekitError) as caught:
        make_plan(parse_recipe({**TWO, "base_model": str(folder)}), tmp_path)
    assert said in str(caught.value).replace(f"base_model ({folder})", "m (m)")
    assert "to do:" in str(caught.value)


TWO = {"experts": [{"name": "one", "model": "base"}, {"name": "two", "model": "./plain"}], "mixture": RANDOM}


def test_plain_weights_that_are_said_to_be_quantised(tmp_path: Path) -> None:
    folder = save(tiny_model(num_hidden_layers=1), tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": FORMS["fp8"][0]}))
    with pytest.raises(SourceError, match="remove quantization_config"):
        open_source("m", "m", folder)
