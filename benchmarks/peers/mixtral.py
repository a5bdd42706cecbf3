"""FFNs of Llama models as experts of a Mixtral, with any gates and backbone.

Shape legend: D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM

States = Sequence[Mapping[str, torch.Tensor]]
_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "tie_word_embeddings", "hidden_act"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def mixtral(
    config: LlamaConfig,
    backbone: Mapping[str, torch.Tensor],
    experts: States,
    gates_ED: Sequence[torch.Tensor],
    top_k: int,
) -> MixtralForCausalLM:
    """In memory."""
    said = MixtralConfig(
        **{key: getattr(config, key) for key in _SAME},
        num_local_experts=len(experts),
        num_experts_per_tok=top_k,
        router_aux_loss_coef=0.0,
    )
    model = MixtralForCausalLM(said).eval()
    weights = {name: each for name, each in backbone.items() if ".mlp." not in name}
    for layer, gate_ED in enumerate(gates_ED):
        of = f"model.layers.{layer}.mlp"
        parts = {part: [each[f"{of}.{part}_proj.weight"] for each in experts] for part in ("gate", "up", "down")}
        both = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        weights |= {f"{of}.experts.gate_up_proj": torch.stack(both), f"{of}.experts.down_proj": torch.stack(parts["down"])}
        weights[f"{of}.gate.weight"] = gate_ED
    model.load_state_dict(weights)
    return model


def save(model: MixtralForCausalLM, out: Path) -> Path:
    """Write it."""
    model.save_pretrained(out)
    return out
