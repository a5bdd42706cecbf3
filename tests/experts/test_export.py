"""Adapters of a mixture back as PEFT folders, cut out of the mixture: the same numbers, the same model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adapter_folders import export_adapter, train_adapter
from command_line import modekit
from conftest import Workshop, logits_of, make_workshop
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import UnsupportedError
from modekit.experts.export import exportable
from refusal import refuse

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"]},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["v_proj", "down_proj"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 1},
        "alpha_pattern": {"k_proj": 11},
    },
    "some layers": {"r": 2, "lora_alpha": 2, "target_modules": ["o_proj", "gate_proj"], "layers_to_transform": [1]},
}


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


WHOLE: dict[str, peft.PeftConfig] = {
    "dora": peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, use_dora=True, target_modules=["q_proj", "up_proj"]),
    "biases": peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, bias="all", target_modules=["v_proj"]),
    "head": peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=["o_proj"], modules_to_save=["lm_head"]),
}
"""Adapters that are no plain low-rank change everywhere, so that a mixture keeps whole modules of them."""


@pytest.fixture
def whole_bench(tmp_path: Path) -> Workshop:
    """One adapter per kind that is kept as whole modules, and a plain one; everything is mixed."""
    workshop = make_workshop(tmp_path, "qwen2")
    plain = peft.LoraConfig(task_type="CAUSAL_LM", **SETTINGS["rslora"])
    for name, config in {"rslora": plain, **WHOLE}.items():
        train_adapter(workshop.root / "base", config, workshop.root / name)
    workshop.recipe["experts"] = [{"name": name, "adapter": f"./{name}"} for name in ("rslora", *WHOLE)]
    workshop.recipe["mixture"] = {"method": "linear", "modules": "all"}
    return workshop


def with_peft(base: Path, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of PEFT's model."""
    return logits_of(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder), ids)


def test_low_rank_parts_are_cut_out_bit_for_bit(bench: Workshop, ids: torch.Tensor) -> None:
    checkpoint = open_checkpoint(bench.build())
    names = [name.replace(" ", "-") for name in SETTINGS]
    assert [checkpoint.names[expert] for expert in exportable(checkpoint)] == names
    for text in ("trained-on.txt", "README.md"):
        (bench.root / "plain" / text).write_text("of this adapter\n")
    for name in names:
        before = load_file(bench.root / name / "adapter_model.safetensors")
        out = bench.root / "exported" / name
        export_adapter(checkpoint, name, out)
        after = load_file(out / "adapter_model.safetensors")
        assert set(before) == set(after)
        for key, tensor in before.items():
            assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
        expected, found = (with_peft(bench.root / "base", folder, ids) for folder in (bench.root / name, out))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert {path.name for path in (bench.root / "exported" / "plain").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "export.json",
        "trained-on.txt",
        ".modekit",
        "README.md",
    }
    shutil.rmtree(bench.root / "rslora")
    export_adapter(checkpoint, "rslora", bench.root / "exported" / "rslora", overwrite=True)


def test_what_was_folded_is_skipped_and_said(whole_bench: Workshop) -> None:
    whole_bench.recipe["experts"] += [{"name": "general", "model": "base"}, {"name": "law", "model": "./law"}]
    out = whole_bench.build(mixture={"method": "linear", "modules": ["mlp", "q", "k", "v", "o"]})
    said = " ".join(modekit("export", out, whole_bench.root / "exported").split())
    for line in (
        "dora: not exported: parts of it are no low-rank changes (DoRA, biases): ./dora has them",
        "general: not exported: it is the base",
        "law: not exported: it is a full model",
        "head: LoRA, rank 2, 3 modules note: only what the mixture mixes is here",
    ):
        assert line in said
    assert {path.name for path in (whole_bench.root / "exported").iterdir()} == {"rslora", "head"}
    message = refuse("export", out, whole_bench.root / "again", "--expert", "rslora", "--expert", "dora")
    assert "expert 'dora'" in message and not (whole_bench.root / "again").exists()


def test_a_low_rank_part_of_a_full_model_is_an_adapter_too(bench: Workshop, ids: torch.Tensor) -> None:
    bench.recipe["experts"] = [{"name": "law", "model": "./law", "as": "lora", "rank": 4}, {"name": "general", "model": "base"}]
    out = bench.build()
    export_adapter(open_checkpoint(out), "law", bench.root / "exported")
    model = AutoModelForCausalLM.from_pretrained(out)
    model.use_expert("law")
    exported = with_peft(bench.root / "base", bench.root / "exported", ids)
    torch.testing.assert_close(exported, logits_of(model, ids), rtol=1e-5, atol=1e-5)


def test_what_is_no_adapter_is_refused_with_the_names_of_those_that_are(bench: Workshop, tmp_path: Path) -> None:
    bench.recipe["experts"].append({"name": "law", "model": "./law"})
    checkpoint = open_checkpoint(bench.build())
    for name in ("law", "general", "nobody"):
        with pytest.raises(UnsupportedError, match="no adapter") as caught:
            export_adapter(checkpoint, name, tmp_path / "exported")
        assert "rslora" in str(caught.value)
    assert not (tmp_path / "exported").exists()


def test_the_base_is_found_from_anywhere_and_losses_are_noted(bench: Workshop) -> None:
    out = bench.build(mixture={"layers": ["0-1"], "router": {"fit": "random"}}, output={"dtype": "bfloat16"})
    record = export_adapter(open_checkpoint(out), "plain", bench.root / "exported")
    assert record.modules == 4 and len(record.notes) == 2
    config = json.loads((bench.root / "exported" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bench.root / "base")
