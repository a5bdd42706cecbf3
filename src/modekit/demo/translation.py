"""What `modekit demo translation` adds: a small Bart that reads pairs as the base, and what mixtures of it write.

* DEMO/text/<domain>.jsonl: pairs, English and French (text.py)
* DEMO/seed0/<mixture>/results: BLEU and chrF in translate.json, and in report.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.demo.models import save_model, to_learn
from modekit.demo.text import GENERAL, PAIRED
from modekit.evaluation.translation.evaluate import evaluate_translation
from modekit.evaluation.translation.results import Decoding, TranslationResults
from modekit.experts.corpus.tokenizer import byte_level_bpe
from modekit.files.staging import staging
from modekit.loaded.text_training import Training, train_on_text, training_sequences
from modekit.report.page import write_report
from modekit.run import Run
from modekit.text.document import Document, Pair

VOCABULARY = 2_000
DOMAIN_SHARE = 0.25  # of each domain's pairs that the base is trained on, too: it knows the domains' words, and little more
_DECODING = Decoding(batch=64, max_new_tokens=96)
ARCHITECTURE: dict[str, Any] = {
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 128,
    "dropout": 0.0,
    "forced_eos_token_id": None,
    "init_std": 0.06,  # 0.7 / sqrt(d_model): with a Bart's own 0.02 so narrow a model stays at the frequencies of tokens
}
PAIR_TRAINING = Training(
    batch_tokens=1_500,
    sequence_length=96,
    learning_rate=2e-3,
    warmup=0.1,
    weight_decay=0.05,
    by_length=True,
    autocast=True,
)
_DROPOUT = 0.2  # of the base, whose pairs are read many times; fine-tunes have none, which would be drawn without a seed


def make_pair_base(out: Path, texts: Mapping[str, Path], *, steps: int, seed: int, run: Run) -> None:
    """Train tokenizer and base on the fit split of general pairs and a share of every domain's, and write the folder."""
    fit = to_learn(texts, (*PAIRED, GENERAL))
    tokenizer = pair_tokenizer(fit)
    mixed = [*fit[GENERAL], *(pair for name in PAIRED for pair in fit[name][: int(DOMAIN_SHARE * len(fit[name]))])]
    training = PAIR_TRAINING.with_(steps=steps, seed=seed)
    torch.manual_seed(seed)
    model = BartForConditionalGeneration(
        BartConfig(
            **{**ARCHITECTURE, "dropout": _DROPOUT},
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.eos_token_id,
        )
    )
    with staging(out, f"demo base of pairs {seed} {steps}", "model") as stage:
        sequences = training_sequences(tokenizer, mixed, training)
        train_on_text(model, sequences, training, run=run.about("base"))
        model.config.dropout = ARCHITECTURE["dropout"]
        save_model(model, tokenizer, stage)


def pair_tokenizer(documents: Mapping[str, Sequence[Document]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of both sides that ends every text with </s>."""
    pairs = [pair for each in documents.values() for pair in each if isinstance(pair, Pair)]
    tokenizer = byte_level_bpe((side for pair in pairs for side in (pair.source, pair.target)), VOCABULARY)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


def translate_once(checkpoint: Checkpoint, pairs: int, run: Run) -> None:
    """Score what a mixture writes, unless that is there, and draw the page that shows it beside what the base writes."""
    if TranslationResults.find(checkpoint) is None:
        evaluate_translation(checkpoint, pairs=pairs, decoding=_DECODING, run=run)
        write_report(checkpoint)


def translated_table(folders: Mapping[str, Path]) -> TranslationResults:
    """One table of the mixtures of a seed, by name: base, experts and oracle once, then every mixture under its name."""
    found: dict[str, TranslationResults] = {}
    for name, folder in folders.items():
        of_one = TranslationResults.find(open_checkpoint(folder))
        assert of_one is not None  # `translate_once` has written it
        found[name] = of_one
    first = next(iter(found.values()))
    rows = [row for row in first.rows if row.kind != "mixture"]
    rows += [replace(row, name=name) for name, each in found.items() for row in each.rows if row.kind == "mixture"]
    return replace(first, rows=rows)
