"""`modekit plan config.json`: parameters of published mixtures, by their configs alone, as their papers and cards give them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import modekit
from modekit.errors import SourceError
from modekit.sources.counting import count_parameters

_MIXTRAL = {
    "model_type": "mixtral",
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2},
}
_QWEN3 = {
    "model_type": "qwen3_moe",
    **{"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48},
    **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936},
    **{"num_experts": 128, "num_experts_per_tok": 8},
}
_OLMOE = {
    "model_type": "olmoe",
    **{"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16},
    **{"num_key_value_heads": 16, "vocab_size": 50304, "num_experts": 64, "num_experts_per_tok": 8},
}
_QWEN15 = {
    "model_type": "qwen2_moe",
    **{"hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 1408, "num_hidden_layers": 24},
    **{"shared_expert_intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936},
    **{"num_experts": 60, "num_experts_per_tok": 4},
}
_LLAMA = {
    "model_type": "llama",
    **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"vocab_size": 32000},
}


def _count(folder: Path, config: dict[str, Any]) -> Any:
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return count_parameters(file)


@pytest.mark.parametrize(
    ("config", "total", "active", "layers"),
    [
        pytest.param(_MIXTRAL, 46.7, 12.9, 32, id="Mixtral 8x7B"),
        pytest.param(_QWEN3, 30.5, 3.3, 48, id="Qwen3 30B-A3B"),
        pytest.param(_OLMOE, 6.9, 1.3, 16, id="OLMoE 1B-7B"),
        pytest.param(_QWEN15, 14.3, 2.7, 24, id="Qwen1.5-MoE-A2.7B"),
        pytest.param(_LLAMA, 6.74, 6.74, 0, id="Llama 2 7B, dense"),
    ],
)
def test_counts_are_those_published(tmp_path: Path, config: dict[str, Any], total: float, active: float, layers: int) -> None:
    """Totals within 1 %; active ones within what their one decimal says."""
    found = _count(tmp_path, config)

    assert found.total / 1e9 == pytest.approx(total, rel=0.01)
    assert found.active / 1e9 == pytest.approx(active, abs=0.06)
    assert found.layers == layers


def test_experts_are_told_from_shared_ones_by_where_they_stand(tmp_path: Path) -> None:
    """GraniteMoeShared's experts have a class of that name, and its layers one besides them."""
    small = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}
    found = _count(
        tmp_path, {"model_type": "granitemoeshared", **small, "num_local_experts": 4, "shared_intermediate_size": 16}
    )
    assert (found.layers, found.experts, found.top_k) == (3, [4], [2])
    assert found.expert_parameters == 3 * 4 * 3 * 64 * 32
    assert found.total - found.active == found.expert_parameters // 2


def test_counts_are_those_of_a_model_that_exists(tmp_path: Path) -> None:
    """Experts counted by their tensors, one by one; nothing is allocated while counting."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
    config = {**_MIXTRAL, **small, "num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**config))
    total = sum(each.numel() for each in model.parameters())

    found = _count(tmp_path, config)

    assert (found.total, found.expert_parameters) == (total, 3 * 6 * 3 * 32 * 48)
    assert found.active == total - 3 * 4 * 3 * 32 * 48
    assert torch.get_default_device().type == "cpu"


def test_the_command_prints_a_table_and_json(tmp_path: Path) -> None:
    """`modekit plan config.json`."""
    (tmp_path / "config.json").write_text(json.dumps(_OLMOE))

    shown = modekit("plan", tmp_path / "config.json")
    data = json.loads(modekit("plan", tmp_path / "config.json", "--json"))

    assert "6.92B total, 1.28B active per token" in shown
    assert "64 in each of 16 layers, top_k 8" in shown
    assert (data["experts"], data["top_k"]) == ([64], [8])


def test_a_config_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    """By its type."""
    with pytest.raises(SourceError, match="no language model of the type 'vit'"):
        _count(tmp_path, {"model_type": "vit"})


def test_a_config_that_brings_code_is_refused(tmp_path: Path) -> None:
    """As everywhere."""
    with pytest.raises(SourceError, match="code of its own"):
        _count(tmp_path, {**_OLMOE, "auto_map": {"AutoModelForCausalLM": "modeling.Other"}})
