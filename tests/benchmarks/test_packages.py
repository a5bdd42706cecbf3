"""Packages of others do what their papers say, on cases whose result is known by hand; and the pipe to them.

SCOREBOARD_ENVIRONMENTS=FOLDER/scoreboard/environments python -m pytest tests/benchmarks/test_packages.py -m slow
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pools import tiny_pool
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from peers.btx_peers import MERGOO, MIXTUREKIT, Btx
from peers.environment import DRIVERS, Package, Remote
from peers.fusion_peers import FUSION, SMILE, Fusion
from peers.legacy import legacy
from peers.mergekit_peers import MERGEKIT, Merge, Mixture, halfway
from peers.peer import Peer, Pool, Unsuitable
from peers.score import opened

HOME = os.environ.get("SCOREBOARD_ENVIRONMENTS", "")
needs_packages = pytest.mark.skipif(not HOME, reason="SCOREBOARD_ENVIRONMENTS names no folder")
NORM = "model.norm.weight"
THREE = ([4.0, -3.0, 1.0, 0.5], [2.0, 5.0, -1.0, 0.1], [-1.0, 0.2, 3.0, -6.0])
Weights = Mapping[str, torch.Tensor]


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return replace(tiny_pool(tmp_path / "pool", steps=2), environments=Path(HOME))


def weights_of(folder: Path) -> Weights:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def moved(pool: Pool, name: str, changes: Mapping[str, torch.Tensor]) -> Path:
    """The base with some tensors moved."""
    model = AutoModelForCausalLM.from_pretrained(pool.base, dtype=torch.float32)
    state = model.state_dict()
    model.load_state_dict({key: value + changes.get(key, 0.0) for key, value in state.items()})
    out = pool.base.parent / name
    model.save_pretrained(out)
    for file in pool.base.glob("token*"):
        (out / file.name).write_bytes(file.read_bytes())
    return out


def logits(model: Any) -> torch.Tensor:
    ids_BS = torch.tensor([[3, 9, 250, 31, 5, 77]])
    with torch.inference_mode():
        return model.logits(ids_BS) if hasattr(model, "command") else model(input_ids=ids_BS).logits


def one_expert(pool: Pool, times: int = 1) -> Pool:
    expert = next(iter(pool.whole.values()))
    names = [f"copy{place}" for place in range(times)]
    text = next(iter(pool.text.values()))
    of = dict.fromkeys(names, text)
    return replace(pool, experts=dict.fromkeys(names, expert), whole=dict.fromkeys(names, expert), text=of, select=of)


@needs_packages
@pytest.mark.slow
def test_mergekits_merges_of_three_vectors(pool: Pool, tmp_path: Path) -> None:
    deltas = [torch.tensor(each).repeat(8) for each in THREE]
    models = [moved(pool, f"moved{place}", {NORM: delta}) for place, delta in enumerate(deltas)]
    axes = [moved(pool, f"axis{place}", {NORM: torch.eye(32)[place] - 1}) for place in range(2)]
    asked = {
        "linear": Merge("", "linear", "", based=False).configuration(pool.base, models),
        "sum": Merge("", "task_arithmetic", "").configuration(pool.base, models, 0.5),
        "ties": Merge("", "ties", "", {"density": 0.5}).configuration(pool.base, models, 1.0),
        "slerp": halfway(*axes),
    }
    MERGEKIT.run(
        pool.environments, {"seed": 0, "merges": [[said, str(tmp_path / name)] for name, said in asked.items()]}, tmp_path
    )
    found = {name: weights_of(tmp_path / name) for name in asked}
    base = weights_of(pool.base)[NORM]
    assert torch.allclose(found["linear"][NORM], base + sum(deltas) / 3, atol=1e-5)
    assert torch.allclose(found["sum"][NORM], base + 0.5 * sum(deltas), atol=1e-5)
    # of each vector the two largest numbers stay, the heavier sign is elected, and the mean is of those that have it
    assert torch.allclose(found["ties"][NORM], base + torch.tensor([3.0, 5.0, 3.0, -6.0]).repeat(8), atol=1e-5)
    assert torch.allclose(found["slerp"][NORM][:3], torch.tensor([0.5**0.5, 0.5**0.5, 0.0]), atol=1e-4)


BTX_CASES = [
    Btx("", MERGOO, {"train": None}, old=True),
    Btx("", MIXTUREKIT, {"method": "btx", "train": None}),
    Btx("", MIXTUREKIT, {"method": "traditional", "train": {"steps": 1, "rows": 1, "rate": 1e-2}}),
]


@needs_packages
@pytest.mark.slow
@pytest.mark.parametrize(
    "peer",
    [Mixture("", ("random",), reads=False), *BTX_CASES],
    ids=["mergekit", "mergoo", "mixturekit-btx", "mixturekit-traditional"],
)
def test_a_mixture_of_copies_is_the_copy(peer: Peer, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peers.btx_peers.LENGTH", 16)
    copies = replace(one_expert(pool, 4), kind="ffn", base=next(iter(pool.whole.values())))
    made = peer.make(copies, tmp_path)
    assert torch.allclose(logits(opened(made.model)), logits(opened(copies.base)), atol=1e-4)


@needs_packages
@pytest.mark.slow
@pytest.mark.parametrize(
    "peer",
    [
        Fusion("", "tsv", "", {"alpha": 1.0}),
        Fusion("", "wudi", "", {"iter_num": 20}),
        Fusion("", "smile", "", {**SMILE, "rank_of_expert": 32, "rank_of_router": 4}, speaks=True),
    ],
    ids=lambda peer: peer.method,
)
def test_fusion_bench_gives_back_a_single_expert(peer: Fusion, pool: Pool, tmp_path: Path) -> None:
    alone = one_expert(pool)
    made = peer.make(alone, tmp_path)
    expected = next(iter(alone.whole.values()))
    if peer.method == "smile":  # it leaves norms, embeddings and head to the base
        ours, base = AutoModelForCausalLM.from_pretrained(pool.base, dtype=torch.float32), weights_of(expected)
        ours.load_state_dict({key: base[key] if "proj" in key else value for key, value in ours.state_dict().items()})
        assert torch.allclose(logits(opened(made.model)), logits(ours.eval()), atol=1e-4)
    else:
        assert torch.allclose(logits(opened(made.model)), logits(opened(expected)), atol=2e-3)


@needs_packages
@pytest.mark.slow
def test_iso_c_makes_singular_values_equal(pool: Pool, tmp_path: Path) -> None:
    made = Fusion("", "iso-c", "", {"scaling_factor": 1.0}).make(pool, tmp_path)
    assert isinstance(made.model, Path)
    key = "model.layers.0.mlp.up_proj.weight"
    base, found = weights_of(pool.base)[key], weights_of(made.model)[key]
    values = torch.linalg.svdvals(found - base)
    summed = sum(weights_of(path)[key] - base for path in pool.whole.values())
    assert torch.allclose(values, torch.linalg.svdvals(summed).mean().expand_as(values), rtol=1e-2)


@needs_packages
@pytest.mark.slow
def test_fusion_benchs_mixtral_has_no_attention(pool: Pool, tmp_path: Path) -> None:
    peer = next(each for each in FUSION if "Mixtral" in each.name)
    with pytest.raises(Unsuitable, match="nothing was written to"):
        peer.make(pool, tmp_path)


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
