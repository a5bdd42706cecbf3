"""Adapters of a mixture back as PEFT folders: as they came, or cut out of the mixture; the same numbers, the same model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adapter_folders import export_adapter, train_adapter
from conftest import Workshop, logits_of, make_workshop
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.cli.shell import main
from modekit.errors import OutputError, UnsupportedError
from modekit.experts.export import plan_exports
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
    "bias of its own": {"r": 2, "lora_alpha": 3, "lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
}


def exported(checkpoint: Checkpoint) -> list[str]:
    """Experts that can be exported."""
    return [plan.name for plan in plan_exports(checkpoint) if plan.reason is None]


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
    "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "biases": peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, bias="all", target_modules=["v_proj"]),
    "head": peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=["o_proj"], modules_to_save=["lm_head"]),
}
"""Adapters that are no plain low-rank change everywhere, so that a mixture keeps whole modules of them."""
FILES = ("adapter_config.json", "adapter_model.safetensors")


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


def rescaled(folder: Path) -> None:
    """Change what an adapter does without touching its weights."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))


def test_what_goes_in_comes_out_file_by_file(bench: Workshop, ids: torch.Tensor) -> None:
    checkpoint = open_checkpoint(bench.build())
    names = [name.replace(" ", "-") for name in SETTINGS]
    assert exported(checkpoint) == names
    for name in names:
        out = bench.root / "exported" / name
        assert export_adapter(checkpoint, name, out).as_it_came
        for file in FILES:
            assert (out / file).read_bytes() == (bench.root / name / file).read_bytes()
        expected, found = (with_peft(bench.root / "base", folder, ids) for folder in (bench.root / name, out))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_adapters_that_are_kept_as_whole_modules_go_out_as_they_came(whole_bench: Workshop, ids: torch.Tensor) -> None:
    root = whole_bench.root
    for text in ("trained-on.txt", "README.md"):
        (root / "dora" / text).write_text("of this adapter\n")
    checkpoint = open_checkpoint(whole_bench.build())
    assert exported(checkpoint) == ["rslora", *WHOLE]
    for name in WHOLE:
        out = root / "exported" / name
        record = export_adapter(checkpoint, name, out)
        assert record.as_it_came and record.kind == {"dora": "DoRA", "ia3": "IA3"}.get(name, "LoRA")
        for file in FILES:
            assert (out / file).read_bytes() == (root / name / file).read_bytes()
        expected, found = (with_peft(root / "base", folder, ids) for folder in (root / name, out))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert {path.name for path in (root / "exported" / "dora").iterdir()} == {
        *FILES,
        "export.json",
        "trained-on.txt",
        ".modekit",
        "README.md",
    }


def test_without_its_folder_the_low_rank_parts_are_cut_out_of_the_mixture(bench: Workshop, ids: torch.Tensor) -> None:
    checkpoint = open_checkpoint(bench.build())
    for name in (name.replace(" ", "-") for name in SETTINGS):
        before = load_file(bench.root / name / "adapter_model.safetensors")
        expected = with_peft(bench.root / "base", bench.root / name, ids)
        shutil.move(bench.root / name, bench.root / f"{name}-moved")
        out = bench.root / "exported" / name
        record = export_adapter(checkpoint, name, out)
        assert not record.as_it_came and "is missing" in record.notes[0]
        after = load_file(out / "adapter_model.safetensors")
        assert set(before) == set(after)
        for key, tensor in before.items():
            assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
        torch.testing.assert_close(with_peft(bench.root / "base", out, ids), expected, rtol=0, atol=1e-6)


def test_what_was_folded_cannot_be_given_back_without_its_folder(whole_bench: Workshop) -> None:
    root = whole_bench.root
    out = whole_bench.build()
    shutil.rmtree(root / "dora")
    (root / "ia3" / "adapter_model.safetensors").write_bytes(b"other")
    rescaled(root / "biases")
    rescaled(root / "head")
    checkpoint = open_checkpoint(out)
    assert exported(checkpoint) == ["rslora"]
    for name, reason in (
        ("dora", "its own folder is missing"),
        ("ia3", "adapter_model.safetensors in its own folder has changed"),
        ("biases", "adapter_config.json in its own folder has changed"),
        ("head", "adapter_config.json"),
    ):
        message = refuse("export", out, root / "exported", "--expert", "rslora", "--expert", name)
        assert f"expert '{name}'" in message and reason in message
    assert not (root / "exported").exists()


def test_a_changed_config_shows_in_what_was_folded(whole_bench: Workshop) -> None:
    """lora_alpha alone tells the difference: the weights' file, and every shape, are as recorded."""
    out = whole_bench.build(output={"dtype": "bfloat16"})
    assert "dora" in exported(open_checkpoint(out))
    rescaled(whole_bench.root / "dora")
    assert "dora" not in exported(open_checkpoint(out))


def test_where_the_config_was_not_recorded_the_parts_are_cut_out(bench: Workshop) -> None:
    """As older versions wrote modekit.json: nothing tells whether adapter_config.json is what it was."""
    out = bench.build()
    record = json.loads((out / "modekit.json").read_text())
    for source in record["sources"]:
        source["config"] = ""
    (out / "modekit.json").write_text(json.dumps(record))
    written = export_adapter(open_checkpoint(out), "plain", bench.root / "exported")
    assert not written.as_it_came and "did not record" in written.notes[0]


def test_exporting_all_says_what_it_skips_and_why(whole_bench: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    whole_bench.recipe["experts"] += [{"name": "general", "model": "base"}, {"name": "law", "model": "./law"}]
    out = whole_bench.build(mixture={"method": "linear", "modules": ["mlp", "q", "k", "v", "o"]})
    shutil.rmtree(whole_bench.root / "dora")
    with (
        patch.object(sys, "argv", ["modekit", "export", str(out), str(whole_bench.root / "exported")]),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for line in (
        "dora: not exported: parts of it",
        "general: not exported: it is the base",
        "law: not exported: it is a full model",
    ):
        assert line in said
    assert "head: LoRA, rank 2, 3 modules, cut out of the mixture only a part of it is mixed" in said
    assert {path.name for path in (whole_bench.root / "exported").iterdir()} == {"rslora", "ia3", "biases", "head"}


def test_a_part_of_an_adapter_keeps_the_keys_of_its_config(bench: Workshop, ids: torch.Tensor) -> None:
    config_file = bench.root / "rslora" / "adapter_config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "lora_dropout": 0.25}))
    checkpoint = open_checkpoint(bench.build(mixture={"layers": ["0-1"], "router": {"fit": "random"}}))
    out = bench.root / "exported"
    record = export_adapter(checkpoint, "rslora", out)
    config = json.loads((out / "adapter_config.json").read_text())
    assert not record.as_it_came and record.kind == "rsLoRA"
    assert (config["use_rslora"], config["r"], config["lora_alpha"], config["lora_dropout"]) == (True, 3, 5, 0.25)
    part = bench.build("PART", experts=[{"name": "part", "adapter": "./exported"}, {"name": "general", "model": "base"}])
    model = AutoModelForCausalLM.from_pretrained(part)
    model.use_expert("part")
    torch.testing.assert_close(with_peft(bench.root / "base", out, ids), logits_of(model, ids), rtol=1e-5, atol=1e-5)


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
    assert record.modules == 4 and len(record.notes) == 2
    config = json.loads((bench.root / "exported" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bench.root / "base")
