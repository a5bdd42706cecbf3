"""Adapters of a mixture back as PEFT folders: the same numbers, the same model, and the way round once more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adapter_folders import train_adapter
from conftest import Workshop, logits_of, make_workshop
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.errors import OutputError, UnsupportedError
from modekit.experts.export import adapter_experts, export_adapter
from refusal import refuse

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"]},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["v_proj", "down_proj"]},
    "patterns": {
        "r": 2, "lora_alpha": 3, "target_modules": "all-linear", "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 1},
        "alpha_pattern": {"k_proj": 11},
    },
    "some layers": {"r": 2, "lora_alpha": 2, "target_modules": ["o_proj", "gate_proj"], "layers_to_transform": [1]},
    "bias of its own": {"r": 2, "lora_alpha": 3, "lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
}  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path) -> Workshop:
    """One adapter per setting and the base, in one mixture; Qwen2, whose queries have biases."""
    workshop = make_workshop(tmp_path, "qwen2")
    experts: list[dict[str, Any]] = [{"name": "general", "model": "base"}]
    for name, settings in SETTINGS.items():
        folder = workshop.root / name.replace(" ", "-")
        train_adapter(workshop.root / "base", peft.LoraConfig(task_type="CAUSAL_LM", **settings), folder)
        experts.append({"name": folder.name, "adapter": f"./{folder.name}"})
    workshop.recipe["experts"] = experts
    return workshop


def test_what_goes_in_comes_out_bit_for_bit(bench: Workshop, ids: torch.Tensor) -> None:
    checkpoint = open_checkpoint(bench.build())
    names = [name.replace(" ", "-") for name in SETTINGS]
    assert adapter_experts(checkpoint) == names
    for name in names:
        out = bench.root / "exported" / name
        export_adapter(checkpoint, name, out)
        before, after = (load_file(folder / "adapter_model.safetensors") for folder in (bench.root / name, out))
        assert set(before) == set(after)
        for key, tensor in before.items():
            assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
        expected, found = (
            logits_of(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bench.root / "base"), folder), ids)
            for folder in (bench.root / name, out)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_mixture_of_what_was_exported_is_the_same_mixture(bench: Workshop) -> None:
    first = bench.build("FIRST")
    checkpoint = open_checkpoint(first)
    for expert in bench.recipe["experts"][1:]:
        export_adapter(checkpoint, expert["name"], bench.root / "exported" / expert["name"])
        expert["adapter"] = f"./exported/{expert['name']}"
    second = bench.build("SECOND")
    for file in first.glob("model*.safetensors"):
        assert file.read_bytes() == (second / file.name).read_bytes()


def test_a_low_rank_part_of_a_full_model_is_an_adapter_too(bench: Workshop, ids: torch.Tensor) -> None:
    bench.recipe["experts"] = [{"name": "law", "model": "./law", "as": "lora", "rank": 4}, {"name": "general", "model": "base"}]
    out = bench.build()
    export_adapter(open_checkpoint(out), "law", bench.root / "exported")
    model = AutoModelForCausalLM.from_pretrained(out)
    model.use_expert("law")
    base = AutoModelForCausalLM.from_pretrained(bench.root / "base")
    exported = peft.PeftModel.from_pretrained(base, bench.root / "exported")
    torch.testing.assert_close(logits_of(exported, ids), logits_of(model, ids), rtol=1e-5, atol=1e-5)


def test_what_is_no_adapter_is_refused_with_the_names_of_those_that_are(bench: Workshop, tmp_path: Path) -> None:
    bench.recipe["experts"].append({"name": "law", "model": "./law"})
    checkpoint = open_checkpoint(bench.build())
    for name in ("law", "general", "nobody"):
        with pytest.raises(UnsupportedError, match="no adapter") as caught:
            export_adapter(checkpoint, name, tmp_path / "exported")
        assert "rslora" in str(caught.value)
    assert not (tmp_path / "exported").exists()


def test_the_command_line(bench: Workshop) -> None:
    bench.build()
    bench.build("NATIVE", experts=[{"name": "law", "model": "./law"}, {"name": "code", "model": "./code"}])
    assert "native checkpoint" in refuse("export", bench.root / "NATIVE", bench.root / "exported")
    assert "no adapter" in refuse("export", bench.root / "OUT", bench.root / "exported", "--expert", "general")
    assert not (bench.root / "exported").exists()


def test_an_existing_folder_is_kept(bench: Workshop) -> None:
    checkpoint = open_checkpoint(bench.build())
    out = bench.root / "exported"
    export_adapter(checkpoint, "plain", out)
    with pytest.raises(OutputError):
        export_adapter(checkpoint, "rslora", out)
    export_adapter(checkpoint, "rslora", out, overwrite=True)
    with pytest.raises(OutputError):
        export_adapter(checkpoint, "rslora", bench.root / "plain", overwrite=True)  # the user's own adapter


def test_the_base_is_found_from_anywhere_and_losses_are_noted(bench: Workshop) -> None:
    out = bench.build(mixture={"layers": ["0-1"], "router": {"fit": "random"}}, output={"dtype": "bfloat16"})
    record = export_adapter(open_checkpoint(out), "plain", bench.root / "exported")
    assert record["modules"] == 4 and len(record["notes"]) == 2
    config = json.loads((bench.root / "exported" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bench.root / "base")
