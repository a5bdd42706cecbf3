"""What all experts share of full fine-tunes is nearest to each of them on what that one reads, and not their plain average."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from building.test_measured_form import full_shop
from conftest import DOMAINS, Workshop
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.carried import CARRIED_FILE, carried_digest, lost_of, read_carried
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import SourceError
from modekit.weights import nearest
from modekit.weights.bases import principal_rows

PLAIN = {"output": {"format": "plain", "rank": 32}, "mixture": {"backbone": "average"}}
ATTENTION = "model.layers.1.self_attn"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return full_shop(tmp_path_factory.mktemp("full"), None, head_dim=48)  # what o reads is wider than the stream


@pytest.fixture(scope="module")
def nearer(shop: Workshop) -> Path:
    """Built once, to be read."""
    return shop.build("NEARER", **PLAIN)


def written(folder: Path) -> dict[str, np.ndarray]:
    return {name: each for file in folder.glob("model*.safetensors") for name, each in load_file(file).items()}


@pytest.mark.parametrize(
    ("name", "norm", "reads"),
    [
        (f"{ATTENTION}.k_proj.weight", "model.layers.1.input_layernorm.weight", "read"),
        (f"{ATTENTION}.o_proj.weight", None, "attended"),
        ("lm_head.weight", "model.norm.weight", "last"),
    ],
)
def test_it_is_regmeans(shop: Workshop, nearer: Path, name: str, norm: str | None, reads: str) -> None:
    """W = (sum_e M_e G_e + r A) (sum_e G_e + r)^-1, in float64, as large as the input. Norms are part of the reading."""
    carried = read_carried(nearer).reads
    assert carried is not None
    inputs = carried.last if reads == "last" else getattr(carried, reads)[1]
    parts = np.split(inputs.astype(np.float64), 4)
    models = [load_file(shop.root / each / "model.safetensors") for each in (*DOMAINS, "base")]
    average = np.mean([model[name].astype(np.float64) for model in models[:-1]], axis=0)  # the base is none of them
    shared = 1.0 if norm is None else np.mean([model[norm] for model in models[:-1]], axis=0)
    of_shared, of_own = np.zeros((inputs.shape[1],) * 2), np.zeros(average.shape)
    for model, part in zip(models, parts, strict=True):
        own = part if norm is None else part * model[norm]
        of_shared += (part * shared).T @ (part * shared)
        of_own += model[name] @ own.T @ (part * shared)
    ridge = 1e-3 * np.trace(of_shared) / len(of_shared) * np.eye(len(of_shared))
    wanted = (of_own + average @ ridge) @ np.linalg.inv(of_shared + ridge)
    found = written(nearer)[name.replace("layers.1", "layers.2")][: average.shape[0], : average.shape[1]]
    assert np.abs(wanted - average).max() > 0.01 * np.abs(average).max()
    assert np.allclose(found, wanted, atol=2e-4 * np.abs(average).max())


@pytest.mark.slow
def test_it_keeps_more_of_the_experts_than_the_average(shop: Workshop, nearer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_proven(verify(open_checkpoint(nearer)))
    monkeypatch.setattr(nearest, "_RIDGE", 1e9)
    average = shop.build("AVERAGE", **PLAIN)
    less, more = ([each.share for each in lost_of(out)] for out in (nearer, average))
    assert len(less) == 4 and sum(less) < 0.95 * sum(more), (less, more)  # 0.89 and 0.91 by two turns of the same reads


def test_reads_that_are_no_sample_prove_nothing(shop: Workshop, nearer: Path) -> None:
    out = shutil.copytree(nearer, shop.root / "OTHER")
    arrays = {name: each.astype(np.float32) for name, each in load_file(out / CARRIED_FILE).items()}
    record = json.loads((out / "modekit.json").read_text())
    for shape in ((512, 1), (513, 192), (0, 192), (4_096, 192), (192,)):
        save_file({**arrays, "attended.1": np.ones(shape, np.float32)}, out / CARRIED_FILE)
        forged = {**record, "carry": {**record["carry"], "sha256": carried_digest(out)}}
        (out / "modekit.json").write_text(json.dumps(forged))
        checks = verify(open_checkpoint(out), reload=False)
        assert next(check for check in checks if check.name == "computed tensors").verdict == "failed", shape


def test_an_expert_whose_numbers_run_over_is_named(tmp_path: Path) -> None:
    shop = full_shop(tmp_path, 2)
    file = tmp_path / "law" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][-40:] = 1e30
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match="the model computes NaN or Inf") as found:
        shop.build("OUT", **PLAIN)
    assert found.value.where and "law" in found.value.where


@pytest.mark.parametrize(("tokens", "inputs", "count"), [(50, 20, 24), (50, 20, 8), (50, 90, 60), (50, 90, 8)])
def test_rows_have_the_nearest_moments_and_show_no_token(tokens: int, inputs: int, count: int) -> None:
    sample = np.random.default_rng(0).standard_normal((tokens, inputs)).astype(np.float32)
    rows = principal_rows(sample, count).astype(np.float64)
    assert rows.shape == (count, inputs)
    moments = sample.T.astype(np.float64) @ sample / tokens
    values, vectors = np.linalg.eigh(moments)
    values[:-count] = 0
    assert np.allclose(rows.T @ rows / count, vectors * values @ vectors.T, atol=1e-5)
    alike = (rows / np.linalg.norm(rows, axis=1)[:, None]) @ (sample / np.linalg.norm(sample, axis=1)[:, None]).T
    assert np.abs(alike).max() < 0.95
