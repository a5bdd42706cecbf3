"""A pool of tiny models: a Llama of random weights, and two that were moved from it towards a text each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from modekit.experts.corpus.tokenizer import byte_level_bpe
from peers.peer import Pool
from peers.pool import merged, write_text

TEXT = {
    "a": [f"the fever of the patient rises in hour {number}" for number in range(30)],
    "b": [f"return self.index[{number}] if found else None" for number in range(30)],
}


def tiny_pool(folder: Path, steps: int = 12) -> Pool:
    tokenizer = byte_level_bpe([each for texts in TEXT.values() for each in texts], 320)
    config = LlamaConfig(
        **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 4, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    whole, paths = {}, {}
    for name, texts in TEXT.items():
        model = LlamaForCausalLM.from_pretrained(folder / "base")
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        ids_BS = torch.tensor([tokenizer(each)["input_ids"][:9] for each in texts])
        for _ in range(steps):
            model(input_ids=ids_BS, labels=ids_BS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        whole[name], paths[name] = folder / name, write_text(texts, folder / "text" / f"{name}.jsonl")
    return Pool("full", 0, folder / "base", whole, whole, paths, paths, folder / "environments")


def tiny_adapters(pool: Pool, folder: Path) -> Pool:
    """Two random adapters of the pool's base."""
    experts = {}
    for place, name in enumerate(pool.text):
        torch.manual_seed(place)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(pool.base), LoraConfig(r=4, target_modules="all-linear"))
        for parameter_name, each in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(each, std=0.05)
        model.save_pretrained(folder / name)
        experts[name] = folder / name
    whole = {name: merged(pool.base, path, folder / f"whole-{name}") for name, path in experts.items()}
    return replace(pool, kind="adapters", experts=experts, whole=whole)
