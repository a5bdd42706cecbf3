"""Classifiers of a text: scikit-learn's own answers, one decision per text that stays, and whole models behind it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.naive_bayes import MultinomialNB
from transformers import AutoTokenizer

from conftest import DOMAINS, Workshop, logits_of, make_workshop
from generated import check_generation
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.checkpoint.record import STATISTICS_FOLDER
from modekit.errors import RecipeError
from modekit.loaded.load import load_model
from modekit.planning.make import make_plan
from modekit.planning.plan import ROUTER_FILE
from modekit.recipes.read import load_recipe
from modekit.routing.classifier import _pieces
from modekit.routing.refit import refit
from modekit.routing.text_router import RunningLogits, TextRouter
from modekit.routing.token_text import load_token_text

LETTERS = {"medicine": "abcdefgh", "law": "ijklmnop", "code": "qrstuvwx"}
PREFIX = 12


def text_of(domain: str, seed: int, letters: int = 30) -> str:
    """Letters that no other domain has, so that the first of them decides."""
    return "".join(random.Random(f"{domain} {seed}").choices(LETTERS[domain], k=letters))


def write_documents(root: Path, count: int = 120) -> None:
    for domain in DOMAINS:
        texts = (json.dumps({"text": text_of(domain, seed)}) for seed in range(count))
        (root / "text" / f"{domain}.jsonl").write_text("\n".join(texts) + "\n")


def build(workshop: Workshop, name: str, mixture: dict[str, Any] | None = None, **router: Any) -> Checkpoint:
    said = {"fit": "classifier", "prefix": PREFIX, **router}
    whole = {"method": "routing", "top_k": 1, "modules": "all", **(mixture or {}), "router": said}
    return open_checkpoint(workshop.build(name, mixture=whole))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    workshop = make_workshop(tmp_path_factory.mktemp("classifier"))
    write_documents(workshop.root)
    return workshop


@pytest.fixture(scope="module")
def tfidf(shop: Workshop) -> Checkpoint:
    return build(shop, "TFIDF")


def ids_of(checkpoint: Checkpoint, text: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(checkpoint.folder)(text)["input_ids"]
    return ids


@pytest.mark.parametrize("name", ["logistic", "sgd", "naive_bayes"])
def test_it_says_what_scikit_learn_says_after_every_token(shop: Workshop, name: str) -> None:
    """Of the same pieces of text, with all words of the vocabulary; scikit-learn's own pipeline, from ids as words."""
    checkpoint = build(shop, f"LIKE-{name}", classifier=name)
    pieces, labels = learned_from(checkpoint)
    vocabulary = {str(token): token for token in range(int(checkpoint.config["vocab_size"]))}
    vectorizer = TfidfVectorizer(analyzer=lambda ids: [str(token) for token in ids], vocabulary=vocabulary)
    model = {
        "logistic": LogisticRegression(C=30.0, class_weight="balanced", max_iter=100),
        "sgd": SGDClassifier(loss="modified_huber", alpha=1e-5, class_weight="balanced", random_state=0),
        "naive_bayes": MultinomialNB(alpha=0.1, fit_prior=False),
    }[name].fit(vectorizer.fit_transform(pieces), labels)
    score = model.predict_joint_log_proba if name == "naive_bayes" else model.decision_function
    text = ids_of(checkpoint, text_of("medicine", 991, 5) + text_of("code", 992, 3) + text_of("law", 993, 40))
    found = RunningLogits(checkpoint)(text).numpy() * checkpoint.record.router.report["calibrated"]
    wanted = score(vectorizer.transform([text[: min(end, PREFIX)] for end in range(1, len(text) + 1)]))
    if name == "naive_bayes":  # what all domains have in common is left out
        found, wanted = (each - each.mean(1, keepdims=True) for each in (found, wanted))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def learned_from(checkpoint: Checkpoint) -> tuple[list[np.ndarray], list[int]]:
    pieces, labels = [], []
    for label, name in enumerate(DOMAINS):
        kept = load_token_text(
            checkpoint.folder / STATISTICS_FOLDER / f"{name}.safetensors", int(checkpoint.config["vocab_size"])
        )
        assert kept is not None
        found = _pieces(kept.sequences(), PREFIX)
        assert max(map(len, found)) == PREFIX
        pieces += found
        labels += [label] * len(found)
    return pieces, labels


def test_the_centroid_is_the_cosine_to_the_mean_of_a_domain(shop: Workshop) -> None:
    checkpoint = build(shop, "COSINE", classifier="centroid")
    pieces, labels = learned_from(checkpoint)
    vocabulary = {str(token): token for token in range(int(checkpoint.config["vocab_size"]))}
    vectorizer = TfidfVectorizer(analyzer=lambda ids: [str(token) for token in ids], vocabulary=vocabulary)
    x = vectorizer.fit_transform(pieces).toarray()
    means = np.stack([x[np.array(labels) == label].mean(0) for label in range(3)])
    text = ids_of(checkpoint, text_of("law", 5) + text_of("code", 6))[:PREFIX]
    wanted = vectorizer.transform([text]).toarray() @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    found = RunningLogits(checkpoint)(text)[-1].numpy() * checkpoint.record.router.report["calibrated"]
    np.testing.assert_allclose(found, wanted[0], atol=1e-5)


def test_it_is_proven_and_the_same_bytes_again(shop: Workshop, tfidf: Checkpoint) -> None:
    checks = verify(tfidf)
    assert is_proven(checks), checks
    router = tfidf.record.recipe.mixture.router.model_dump(exclude_unset=True)
    again = build(shop, "AGAIN", **router)
    for name in (ROUTER_FILE, "modekit.json"):
        assert (again.folder / name).read_bytes() == (tfidf.folder / name).read_bytes(), name


def test_held_out_text_goes_to_its_own_expert_and_the_record_says_who_was_best(tfidf: Checkpoint) -> None:
    report = tfidf.record.router.report
    assert set(report["macro_f1"]) == {"logistic", "sgd", "naive_bayes", "centroid"}
    assert report["macro_f1"][report["classifier"]] == max(report["macro_f1"].values()) and min(report["chosen_on"]) > 0
    decide = TextRouter(tfidf).decide
    for domain in DOMAINS:
        decision = decide(text_of(domain, 555))
        assert decision.expert == domain and decision.probabilities[domain] > 0.8


def test_whole_models_answer_as_the_experts_own_do_bit_for_bit(shop: Workshop, tfidf: Checkpoint) -> None:
    mixture = load_model(tfidf.folder)
    for domain in DOMAINS:
        own = load_model(shop.root / domain)
        ids = torch.tensor([ids_of(tfidf, text_of(domain, 77))])
        assert torch.equal(logits_of(mixture, ids), logits_of(own, ids))
        for split in range(1, ids.shape[1]):
            parts = []
            for model in (mixture, own):
                with torch.inference_mode():
                    before = model(input_ids=ids[:, :split], use_cache=True)
                    parts.append(model(input_ids=ids[:, split:], past_key_values=before.past_key_values).logits)
            assert torch.equal(*parts), (domain, split)


def test_every_text_of_a_batch_has_its_own_expert(shop: Workshop, tfidf: Checkpoint) -> None:
    mixture, tokenizer = load_model(tfidf.folder), AutoTokenizer.from_pretrained(tfidf.folder, padding_side="left")
    texts = [text_of(domain, 88, 10 + 9 * place) for place, domain in enumerate(DOMAINS)]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        together = mixture(**batch).logits
        for row, domain in enumerate(DOMAINS):
            own = load_model(shop.root / domain)(input_ids=torch.tensor([ids_of(tfidf, texts[row])])).logits[0]
            torch.testing.assert_close(together[row][batch.attention_mask[row].bool()], own, atol=1e-6, rtol=1e-5)


def test_generation_padding_and_beams_equal_the_full_pass(tfidf: Checkpoint) -> None:
    check_generation(tfidf.folder)


def test_the_decision_stays_after_the_prefix_and_is_causal(tfidf: Checkpoint) -> None:
    said = RunningLogits(tfidf)
    first, then = text_of("law", 1, PREFIX), text_of("code", 2, 40)
    mixed = said(ids_of(tfidf, first + then))
    assert torch.equal(mixed[PREFIX - 1 :], mixed[PREFIX - 1].expand(len(mixed) - PREFIX + 1, -1))
    alone = said(ids_of(tfidf, first))
    assert torch.equal(mixed[:PREFIX], alone)


def test_alone_it_decides_on_the_first_tokens_too(tfidf: Checkpoint) -> None:
    """Of a text that is longer than what is read of any: the mixture decides on its first tokens, and so does the router."""
    text = text_of("law", 1, PREFIX) + text_of("code", 2, 40_000)
    router = TextRouter(tfidf)
    assert len(text) > 2 * 16_384 and router.decide(text).expert == "law"
    assert router.decide([{"role": "user", "content": text}, {"role": "user", "content": text_of("code", 3)}]).expert == "law"


def test_kept_tokens_stand_in_for_text_that_is_gone(tmp_path: Path) -> None:
    workshop = make_workshop(tmp_path, num_hidden_layers=1)
    write_documents(tmp_path)
    checkpoint = build(workshop, "OUT")
    before = {name: (checkpoint.folder / name).read_bytes() for name in (ROUTER_FILE, "modekit.json")}
    for name in DOMAINS:
        (tmp_path / "text" / f"{name}.jsonl").unlink()
    again = refit(checkpoint, {"router": {"classifier": "sgd"}})
    assert (again.folder / ROUTER_FILE).read_bytes() != before[ROUTER_FILE]
    again = refit(open_checkpoint(again.folder), {"router": {"classifier": "auto"}})
    assert (again.folder / ROUTER_FILE).read_bytes() == before[ROUTER_FILE]
    lexical = refit(open_checkpoint(again.folder), {"router": {"fit": "lexical"}})
    assert lexical.record.router.report["tokens"] == checkpoint.record.router.report["tokens"]


def test_without_held_out_text_the_first_classifier_is_taken(tmp_path: Path) -> None:
    workshop = make_workshop(tmp_path, num_hidden_layers=1)
    workshop.recipe["experts"] = [
        {"name": name, "model": f"./{name}", "prompts": [text_of(name, seed) for seed in range(9)]} for name in DOMAINS
    ]
    report = build(workshop, "OUT").record.router.report
    assert report["classifier"] == "logistic" and report["macro_f1"] == {} and report["chosen_on"] == [0, 0, 0]


def test_experts_of_another_kind_and_several_at_once_follow_it(shop: Workshop) -> None:
    checkpoint = build(shop, "FFN", mixture={"modules": "auto", "top_k": 2})
    assert is_proven(verify(checkpoint)) and not checkpoint.shape.plain
    assert checkpoint.shape.without_vllm is not None and "counts the tokens" in checkpoint.shape.without_vllm


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"granularity": "sequence"}, "'granularity' has no effect"),
        ({"prefix": 5000}, "1,024 at most"),
        ({"per": "projection"}, "one decision for the whole model"),
    ],
)
def test_what_it_does_not_read_is_refused(shop: Workshop, router: dict[str, Any], message: str) -> None:
    path = shop.write(mixture={"method": "routing", "router": {"fit": "classifier", **router}})
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_without_scikit_learn_the_plan_says_so(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modekit.recipes.fits.find_spec", lambda name: None)
    path = shop.write(mixture={"method": "routing", "router": {"fit": "classifier"}})
    with pytest.raises(RecipeError, match="not installed"):
        make_plan(load_recipe(path), shop.root)
