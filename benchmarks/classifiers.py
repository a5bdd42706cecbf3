"""Classifiers of texts by features, classifier and words, beside the routers that decide per token: classifiers.md.

    python benchmarks/classifiers.py --text en=en.jsonl --text fr=fr.jsonl --text de=de.jsonl --text py=lib [--seeds 3]

Every text is a file or folder of documents. For each seed they are split anew, eight tenths to fit, one to choose, one to
show: no document is in two. Tokens are those of a byte-level BPE trained on the fit part, or of `--tokenizer FOLDER`. What is
shown is macro-F1 over the domains: of 500 pieces a domain of so many words, from anywhere in the documents to show, and of
whole ones. No model is run.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modekit.recipes.recipe import Expert
from modekit.recipes.router import Router
from modekit.routing.classifier import Terms, fitted_table
from modekit.routing.evidence import Averaging, TokenRows, train_table
from modekit.routing.last_token import LastToken
from modekit.routing.ngram import NgramOdds, count_domain, ngram_gate
from modekit.routing.token_text import TokenText
from modekit.text.documents import read_documents
from modekit.text.sequences import encode

WORDS = (8, 16, 32, 64)
PIECES = 500
VOCABULARY = 16_384
CLASSIFIERS = ("logistic", "sgd", "naive_bayes", "centroid")
Documents = Mapping[str, list[str]]
Pieces = list[list[list[int]]]
"""Per domain, token ids of pieces."""


def split(texts: Documents, seed: int) -> tuple[Documents, Documents, Documents]:
    """Documents to fit, to choose and to show."""
    parts: tuple[dict[str, list[str]], ...] = ({}, {}, {})
    for name, documents in texts.items():
        shuffled = random.Random(f"{seed} {name}").sample(documents, len(documents))
        tenth = max(1, len(shuffled) // 10)
        cut = shuffled[2 * tenth :], shuffled[:tenth], shuffled[tenth : 2 * tenth]
        for part, own in zip(parts, cut, strict=True):
            part[name] = own
    return parts[0], parts[1], parts[2]


def trained_tokenizer(documents: Documents) -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((each for own in documents.values() for each in own), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def pieces_of(documents: Documents, words: int | None, tokenizer: Any, seed: int) -> Pieces:
    """So many words from anywhere, or whole documents."""
    found = []
    for name, own in documents.items():
        draw = random.Random(f"{seed} {name} {words}")
        texts = own if words is None else [cut(draw.choice(own), words, draw) for _ in range(PIECES)]
        found.append([ids for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if ids])
    return found


def cut(document: str, words: int, draw: random.Random) -> str:
    """So many words in a row."""
    split_words = document.split(" ")
    start = draw.randrange(max(1, len(split_words) - words + 1))
    return " ".join(split_words[start : start + words])


def macro_f1(logits: Callable[[list[int]], np.ndarray], pieces: Pieces) -> float:
    """Of the domain with the largest logit."""
    labels = [place for place, own in enumerate(pieces) for _ in own]
    return float(f1_score(labels, [int(logits(ids).argmax()) for own in pieces for ids in own], average="macro"))


def token_texts(fit: Documents, chosen: Documents, tokenizer: Any, settings: Router) -> list[TokenText]:
    """As a fit keeps them."""
    texts = []
    for name, own in fit.items():
        most, longest = 2**20, settings.sequence_length
        found = [encode(tokenizer, part, max_tokens=most, sequence_length=longest) for part in (own, chosen[name])]
        ids = [torch.tensor([each for sequence in part for each in sequence.ids], dtype=torch.int32) for part in found]
        lengths = [torch.tensor([len(sequence.ids) for sequence in part], dtype=torch.int32) for part in found]
        texts.append(TokenText(ids[0], lengths[0], torch.zeros_like(lengths[0]), {}, ids[1], lengths[1]))
    return texts


def classifier(settings: Router, texts: Sequence[TokenText], vocabulary: int) -> tuple[LastToken, str]:
    """A classifier, and which it is."""
    gate, said = fitted_table(texts, Terms(settings, vocabulary), settings, [])
    ngram = {"ngram": {"order": settings.order, "buckets": settings.buckets}} if settings.features == "ngrams" else {}
    routing = {"score": "tfidf", "prefix": settings.prefix_tokens, "averages": settings.averages, **ngram}
    return LastToken(routing, gate), str(said["classifier"])


def lexical(texts: Sequence[TokenText], vocabulary: int) -> LastToken:
    """The table of evidence per token, at its defaults."""
    settings = Router(fit="lexical")
    examples = [[TokenRows(ids, start) for ids, start in text.sequences()] for text in texts]
    table_EJV = train_table(examples, vocabulary, Averaging(tuple(settings.decays))).table
    return LastToken({"averages": settings.averages}, table_EJV.flatten(1).numpy())


def ngram(fit: Documents, tokenizer: Any) -> LastToken:
    """Naive Bayes on pairs, at its defaults."""
    settings = Router(fit="ngram", chat=False)
    counted = [
        count_domain(tokenizer, own, Expert(name=name, model="./none"), settings, {}, where=name) for name, own in fit.items()
    ]
    routing = {"averages": settings.averages, "ngram": {"order": settings.order, "buckets": settings.buckets}}
    return LastToken(routing, ngram_gate(NgramOdds(counted, settings)).numpy())


def routers(fit: Documents, chosen: Documents, tokenizer: Any) -> dict[str, tuple[LastToken, str, float]]:
    """Row -> router, which classifier it is, and seconds of its fit."""
    vocabulary = len(tokenizer)
    texts = token_texts(fit, chosen, tokenizer, Router())
    found: dict[str, tuple[LastToken, str, float]] = {}
    variants = [(features, name, 64) for features in ("tfidf", "ngrams") for name in CLASSIFIERS]
    for features, name, prefix in [*variants, ("tfidf", "auto", 16), ("tfidf", "auto", 512)]:
        started = time.perf_counter()
        settings = Router.model_validate({"fit": "classifier", "features": features, "classifier": name, "prefix": prefix})
        router, taken = classifier(settings, texts, vocabulary)
        found[f"{features}, {name}, prefix {prefix}"] = router, taken, time.perf_counter() - started
    for label, make in (("lexical", lambda: lexical(texts, vocabulary)), ("ngram", lambda: ngram(fit, tokenizer))):
        started = time.perf_counter()
        found[f"fit: {label} (at the last token)"] = make(), "", time.perf_counter() - started
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path)
    arguments = parser.parse_args()
    named = [text.partition("=") for text in arguments.text]
    texts = {name: list(read_documents([path], root=Path.cwd(), where=name)) for name, _, path in named}
    print(", ".join(f"{name}: {len(own)} documents, {sum(map(len, own)):,} characters" for name, own in texts.items()))
    scores: dict[str, list[list[float]]] = {}
    taken: dict[str, list[str]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        fit, chosen, shown = split(texts, seed)
        given = arguments.tokenizer
        tokenizer = trained_tokenizer(fit) if given is None else AutoTokenizer.from_pretrained(given)
        pieces = [pieces_of(shown, words, tokenizer, seed) for words in (*WORDS, None)]
        for row, (router, name, took) in routers(fit, chosen, tokenizer).items():
            scores.setdefault(row, []).append([macro_f1(router.logits, part) for part in pieces])
            taken.setdefault(row, []).append(name)
            seconds.setdefault(row, []).append(took)
    print(f"| router | {' | '.join(f'{words} words' for words in WORDS)} | whole | fit, s | taken |")
    print("|---" * (len(WORDS) + 4) + "|")
    for row, found in scores.items():
        means = [f"{statistics.fmean(column):.4f} ± {deviation(column):.4f}" for column in zip(*found, strict=True)]
        names = ", ".join(dict.fromkeys(filter(None, taken[row])))
        print(f"| {row} | {' | '.join(means)} | {statistics.fmean(seconds[row]):.1f} | {names} |")


def deviation(values: Sequence[float]) -> float:
    """The largest from the mean."""
    return max(abs(value - statistics.fmean(values)) for value in values)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
