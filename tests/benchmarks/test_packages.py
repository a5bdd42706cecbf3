"""The pipe to packages of others, their reasons, and folders as their old transformers read them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pools import tiny_pool
from transformers import LlamaForCausalLM

from peers.environment import DRIVERS, Package, Remote
from peers.legacy import legacy
from peers.peer import Pool, Unsuitable
from peers.score import opened


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return tiny_pool(tmp_path / "pool", steps=2)


def logits(model: Any) -> torch.Tensor:
    ids_BS = torch.tensor([[3, 9, 250, 31, 5, 77]])
    with torch.inference_mode():
        return model.logits(ids_BS) if hasattr(model, "command") else model(input_ids=ids_BS).logits


@pytest.mark.slow
def test_scores_come_through_the_pipe(pool: Pool, tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys; sys.path.insert(0, {str(DRIVERS)!r})\n"
        "from speak import serve\nfrom transformers import LlamaForCausalLM\n"
        "print('loaded')\nserve(lambda: LlamaForCausalLM.from_pretrained(sys.argv[1]))\n"
    )
    remote = Remote((sys.executable, str(driver), str(pool.base)))
    assert torch.allclose(logits(remote), logits(opened(pool.base)), atol=1e-5)
    broken = Remote((sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(Unsuitable, match="3"):
        logits(broken)


def test_a_failing_package_gives_its_own_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package("none", "1", "driver.py")
    python = package.python(tmp_path)
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (tmp_path / "driver.py").write_text("raise ValueError('gates of another shape')")
    monkeypatch.setattr("peers.environment.DRIVERS", tmp_path)
    with pytest.raises(Unsuitable, match="ValueError: gates of another shape"):
        package.run(tmp_path, {}, tmp_path / "out")


def test_a_legacy_folder_keeps_weights_and_rotary_base(pool: Pool, tmp_path: Path) -> None:
    config = json.loads((pool.base / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    (pool.base / "config.json").write_text(json.dumps(config))
    old = legacy(pool.base, tmp_path / "old")
    said = json.loads((old / "config.json").read_text())
    assert said["rope_theta"] == 5e5 and "rope_parameters" not in said
    assert LlamaForCausalLM.from_pretrained(old).config.rope_parameters["rope_theta"] == 5e5
