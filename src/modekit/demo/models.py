"""The demo's models: a tokenizer and a small Llama trained on the spot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modekit.demo.text import DOMAINS, GENERAL
from modekit.experts.corpus.tokenizer import byte_level_bpe
from modekit.files.copies import library_writes
from modekit.files.staging import Staging, staging
from modekit.loaded.load import without_bars
from modekit.loaded.text_training import Training, train_on_text, training_sequences
from modekit.run import Run
from modekit.text.document import Document, text_of
from modekit.text.documents import read_documents
from modekit.text.splits import documents_of_split

VOCABULARY = 3_072
SEQUENCE_LENGTH = 512  # a whole document of the demo's text
BATCH_TOKENS = 1_536
_DOMAIN_SHARE = 0.33  # of the base's text; the base must know the language of every domain, not the domain
TRAINING = Training(
    batch_tokens=BATCH_TOKENS,
    sequence_length=SEQUENCE_LENGTH,
    learning_rate=2e-3,
    weight_decay=0.05,
    by_length=True,
    autocast=True,
)
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def make_base(out: Path, texts: Mapping[str, Path], *, steps: int, seed: int, run: Run) -> None:
    """Train tokenizer and base on the fit split of general text and a share of every domain, and write the folder."""
    fit = to_learn(texts, (*DOMAINS, GENERAL))
    tokenizer = byte_level_bpe((text_of(document) for documents in fit.values() for document in documents), VOCABULARY)
    sequences = {name: training_sequences(tokenizer, documents, TRAINING) for name, documents in fit.items()}
    per_domain = int(len(sequences[GENERAL]) * _DOMAIN_SHARE / (1 - _DOMAIN_SHARE) / len(DOMAINS))
    mixed = [*sequences[GENERAL], *(sequence for name in DOMAINS for sequence in sequences[name][:per_domain])]
    model = new_model(ARCHITECTURE, seed)
    with staging(out, f"demo base {seed} {steps}", "model") as stage:
        train_on_text(model, mixed, TRAINING.with_(steps=steps, seed=seed), run=run.about("base"))
        save_model(model, tokenizer, stage)


def to_learn(texts: Mapping[str, Path], names: Sequence[str]) -> dict[str, list[Document]]:
    """Name -> the fit split of its text."""
    found = {name: read_documents([str(texts[name])], root=texts[name].parent, where=name) for name in names}
    return {name: documents_of_split(documents, "fit") for name, documents in found.items()}


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stage: Staging) -> None:
    """Into a folder that is being made."""
    with without_bars(), library_writes(stage.folder) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def new_model(architecture: dict[str, Any], seed: int) -> PreTrainedModel:
    """A Llama of random weights whose blocks start as the identity."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**architecture))
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    return model
