"""A dense model as a mixture: the same logits, by copies under routers whose weights sum to 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import save, tiny_model, write_text
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.conversion.upcycle import Upcycling, upcycle
from modekit.errors import RecipeError
from modekit.evaluation.domains import scored_on
from modekit.evaluation.inspection.inspect import inspect
from modekit.training.settings import TrainSettings, checked_settings
from modekit.training.train import train

FAMILIES = ("llama", "qwen3", "granite")


def made(root: Path, model_type: str = "llama", **said: int) -> Checkpoint:
    save(tiny_model(model_type), root / "base")
    return upcycle("./base", Upcycling(**said), root / "OUT", root=root)


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(4, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_mixture_has_the_logits_of_the_dense_model(tmp_path: Path, model_type: str, top_k: int) -> None:
    checkpoint = made(tmp_path, model_type, copies=3, top_k=top_k)
    assert len(checkpoint.names) == 3
    assert torch.allclose(logits(tmp_path / "OUT"), logits(tmp_path / "base"), atol=1e-5, rtol=1e-5)
    assert is_proven(verify(open_checkpoint(tmp_path / "OUT"), reload=False))


def test_with_softmax_before_top_k_the_logits_are_others(tmp_path: Path) -> None:
    made(tmp_path, "qwen3", copies=4, top_k=1)
    dense = logits(tmp_path / "base")
    assert torch.allclose(logits(tmp_path / "OUT"), dense, atol=1e-5, rtol=1e-5)
    file = tmp_path / "OUT" / "config.json"
    config = json.loads(file.read_text())
    assert config["norm_topk_prob"] is True
    file.write_text(json.dumps({**config, "norm_topk_prob": False}))
    assert (logits(tmp_path / "OUT") - dense).abs().max() > 0.1


def test_it_is_trained_and_inspected(tmp_path: Path) -> None:
    made(tmp_path, copies=2, top_k=1)
    text = write_text(tmp_path / "text")
    opened = open_checkpoint(tmp_path / "OUT")
    texts = {"copy-1": [str(text["law"])], "copy-2": [str(text["code"])]}
    asked = {"what": ["experts"], "steps": 2, "batch_tokens": 256, "sequence_length": 64, "select_tokens": 200}
    done = train(opened, checked_settings(asked, TrainSettings, where="test"), texts=texts, evaluate_tokens=None)
    assert done.record.steps == 2
    found = inspect(scored_on(open_checkpoint(tmp_path / "OUT"), texts, tmp_path))
    assert found.similarity is not None and found.experts == ["copy-1", "copy-2"]


def test_more_copies_per_token_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="top_k"):
        made(tmp_path, copies=2, top_k=3)
