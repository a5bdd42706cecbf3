"""`modekit verify` proves what is right and finds what is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conftest import Workshop, make_workshop
from modekit.building.verify import Check, is_proven, verify
from modekit.checkpoint.open import open_checkpoint, open_with_any_router
from modekit.planning.plan import ROUTER_FILE
from pair_models import make_pair_workshop


def checks_of(folder: Path) -> dict[str, Check]:
    return {check.name: check for check in verify(open_with_any_router(folder), reload=False)}


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))


def test_a_fresh_build_is_proven(workshop: Workshop) -> None:
    checks = verify(open_checkpoint(workshop.build()))
    assert is_proven(checks) and "1 file, blake3 as recorded" in {check.detail for check in checks}


@pytest.mark.parametrize("backbone", ["average", {"expert": "law"}])
def test_merged_and_borrowed_backbones_are_proven_too(workshop: Workshop, backbone: object) -> None:
    mixture = {**workshop.recipe["mixture"], "backbone": backbone}
    assert is_proven(verify(open_checkpoint(workshop.build(mixture=mixture)), reload=False))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "copied tensors": lambda out: flip(out / "model-expert-00001-00001.safetensors", -100),
    "router": lambda out: flip(out / ROUTER_FILE, -1),
    "source experts[1] 'law'": lambda out: flip(out.parent / "law" / "model.safetensors", -10),
    "tokenizer and code": lambda out: flip(out / "tokenizer.json", 30),
    "config.json": lambda out: edit(out / "config.json", lambda config: config.update(rms_norm_eps=0.1)),
}


@pytest.mark.parametrize("check", DAMAGE)
def test_what_was_changed_is_found(workshop: Workshop, check: str) -> None:
    out = workshop.build()
    DAMAGE[check](out)
    assert checks_of(out)[check].verdict == "failed"


def test_a_missing_source_is_no_success(workshop: Workshop) -> None:
    out = workshop.build()
    (workshop.root / "law" / "model.safetensors").unlink()
    checks = verify(open_checkpoint(out), reload=False)
    assert {check.verdict for check in checks} >= {"not possible"} and not is_proven(checks)


def test_an_edited_recipe_is_found(workshop: Workshop) -> None:
    out = workshop.build()
    edit(out / "modekit.json", lambda record: record["recipe"]["mixture"].update(top_k=1))
    checks = checks_of(out)
    assert checks["recipe digest"].verdict == "failed" and checks["router"].verdict == "failed"


def test_a_checkpoint_that_transformers_cannot_read_is_found(workshop: Workshop) -> None:
    out = workshop.build()
    edit(out / "config.json", lambda config: config.update(num_local_experts=2))
    checks = {check.name: check for check in verify(open_checkpoint(out))}
    assert checks["reload in transformers"].verdict == "failed"


def test_a_config_that_routes_in_another_way_names_the_setting(workshop: Workshop) -> None:
    """In a line, wherever in the config it stands; `fit` mends it."""
    router = {"fit": "random", "granularity": "context"}
    out = workshop.build(mixture={**workshop.recipe["mixture"], "router": router}, output={"format": "modekit"})
    (average,) = json.loads((out / "config.json").read_text())["modekit"]["routing"]["averages"]
    edit(out / "config.json", lambda config: config["modekit"]["routing"]["averages"][0].update(decay=0.5))
    checks = checks_of(out)
    assert checks["config.json"].verdict == checks["router"].verdict == "failed"
    detail = checks["config.json"].detail
    assert detail.startswith("1 settings differ: modekit.routing.averages is [{") and ", planned [{" in detail
    assert "0.5" in detail and str(average["decay"]) in detail and len(detail) < 400
    assert "modekit fit" in checks["router"].detail


def test_a_tokenizer_file_that_the_base_has_no_longer_is_found(tmp_path: Path) -> None:
    workshop = make_pair_workshop(tmp_path, "t5")
    pieces = tmp_path / "base" / "spiece.model"
    pieces.write_bytes(b"pieces")
    out = workshop.build(mixture={"router": {"fit": "random"}})
    assert checks_of(out)["tokenizer and code"].verdict == "proven"
    pieces.unlink()
    check = checks_of(out)["tokenizer and code"]
    assert check.verdict == "failed" and check.detail == "spiece.model is no longer beside the base model"


def test_code_that_is_not_this_versions_is_found(workshop: Workshop) -> None:
    out = workshop.build(mixture={**workshop.recipe["mixture"], "router": {"fit": "lexical", "orders": [1, 2], "buckets": 512}})
    assert checks_of(out)["tokenizer and code"].verdict == "proven"
    code = out / "modekit_router.py"
    code.write_text(code.read_text() + "# of another version\n")
    check = checks_of(out)["tokenizer and code"]
    assert check.verdict == "failed" and "modekit_router.py differs" in check.detail and "another version" in check.detail


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("w2.weight", {"output": {"dtype": "bfloat16"}}),
        ("w2.weight", {"mixture": {"method": "linear", "weights": {"medicine": 1, "law": 2, "code": 3}}}),
        ("model.norm.weight", {"mixture": {"router": {"fit": "random"}, "backbone": "ties"}}),
        ("differences.0.codes", {"experts": [{"name": "law", "model": "./law", "bits": 2}, {"name": "rest", "model": "base"}]}),
    ],
)
def test_one_flipped_bit_in_a_computed_tensor_is_found(workshop: Workshop, name: str, changes: dict[str, Any]) -> None:
    out = workshop.build(**changes)
    assert checks_of(out)["computed tensors"].verdict == "proven"
    checkpoint = open_checkpoint(out)
    ref = next(ref for key, ref in checkpoint.tensors.items() if key.endswith(name))
    flip(ref.file, ref.start)
    found = checks_of(out)["computed tensors"]
    assert found.verdict == "failed" and name.removesuffix(".weight") in found.detail


def test_a_recipe_of_other_low_rank_parts_is_found(workshop: Workshop) -> None:
    law = {"name": "law", "model": "./law", "as": "lora", "rank": 4}
    mixture = {"modules": ["down"], "router": {"fit": "random"}}
    out = workshop.build(experts=[law, {"name": "general", "model": "base"}], mixture=mixture)
    edit(out / "modekit.json", lambda record: record["recipe"]["mixture"].update(modules=["gate"]))
    assert checks_of(out)["computed tensors"].verdict == "failed"


def test_low_rank_parts_may_be_turned_as_another_processor_turns_them(workshop: Workshop) -> None:
    law = {"name": "law", "model": "./law", "as": "lora", "rank": 4}
    out = workshop.build(experts=[law, {"name": "general", "model": "base"}], mixture={"router": {"fit": "random"}})
    checkpoint = open_checkpoint(out)
    module = next(iter(checkpoint.shape.mixture.places))

    def scale(side: str, factor: float) -> None:
        ref = checkpoint.tensors[f"{module}.lora_{side}"]
        with ref.file.open("r+b") as file:
            file.seek(ref.start)
            values = np.frombuffer(file.read(ref.nbytes), np.float32) * np.float32(factor)
            file.seek(ref.start)
            file.write(values.tobytes())

    scale("A", -1.0)
    scale("B", -1.0)  # the same product
    checks = verify(open_checkpoint(out), reload=False)
    assert is_proven(checks)
    assert any("1 modules give the same change in other bits" in check.detail for check in checks)
    scale("B", 1.01)
    failed = [check for check in verify(open_checkpoint(out), reload=False) if check.verdict == "failed"]
    assert [check.name for check in failed] == ["computed tensors"] and module in failed[0].detail


def test_tensors_without_a_number_may_be_there_or_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Mixtures of Qwen2 leave those of the shared expert out; those built before have them."""
    workshop = make_workshop(tmp_path, "qwen2")
    out = workshop.build()
    checks = verify(open_checkpoint(out))
    assert is_proven(checks) and "9 tensors without a number" in checks[-1].detail
    assert "MISSING" not in "".join(capfd.readouterr())  # transformers' report would only alarm
    empty = {name: torch.zeros((0, 32)) for name in sorted(open_checkpoint(out).shape.left_out) if "down_proj" not in name}
    save_file(empty, out / "model-empty.safetensors", metadata={"format": "pt"})
    held = dict.fromkeys(empty, "model-empty.safetensors")
    edit(out / "model.safetensors.index.json", lambda index: index["weight_map"].update(held))
    checks = verify(open_checkpoint(out))
    assert is_proven(checks) and "3 tensors without a number" in checks[-1].detail, checks
