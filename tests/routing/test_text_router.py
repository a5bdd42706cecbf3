"""A mixture's router on its own: whose text a text is, as the mixture itself would decide."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from byte_level import save_byte_model
from chatting import TEMPLATE
from command_line import ended, modekit
from conftest import _WORDS
from domain_mixtures import TWO, built, model_experts
from modekit.architecture.modekit_flow import Flow
from modekit.architecture.modekit_router import Router
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.shapes import mixture_of
from modekit.routing.text_router import LastToken, TextRouter

pytestmark = pytest.mark.usefixtures("short_tables")

TEXTS = {name: _WORDS[name] for name in TWO}


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """The same two domains and the base, by every router that reads tokens."""
    root = tmp_path_factory.mktemp("front")
    experts = model_experts(root)
    save_byte_model(root / "base", "llama", 9)
    (root / "base" / "chat_template.jinja").write_text(TEMPLATE)
    recipes: dict[str, dict[str, Any]] = {
        "lexical": {"mixture": {"router": {"fit": "lexical"}}, "output": {"format": "plain"}},
        "fading": {"mixture": {"router": {"fit": "lexical", "decay": [0.9]}}, "output": {"format": "plain"}},
        "modekit": {"mixture": {"router": {"fit": "lexical"}}, "output": {"format": "modekit"}},
        "bigrams": {"mixture": {"router": {"fit": "lexical", "orders": [1, 2], "buckets": 512}}},
        "hidden": {
            "mixture": {"router": {"fit": "logistic", "tokens_per_domain": 200, "keep_tokens": 32, "sequence_length": 32}}
        },
    }
    return {
        name: built(root, {"base_model": "./base", "experts": experts, **recipe}, name.upper())
        for name, recipe in recipes.items()
    }


@pytest.mark.parametrize("name", ["fading", "modekit", "bigrams"])
def test_it_decides_as_the_mixture_does(mixtures: dict[str, Checkpoint], name: str) -> None:
    """Alone it has the logits that the router has inside the mixture; a native gate's depend on the size of the stream."""
    checkpoint = mixtures[name]
    router = TextRouter(checkpoint)
    model, tokenizer = load_model(checkpoint.folder), load_tokenizer(checkpoint.folder)
    mixture = mixture_of(model, checkpoint)
    for text in (*TEXTS.values(), "artery of the court"):
        ids = tokenizer(text, return_tensors="pt")
        with mixture.traced() as trace:
            model(**ids)
        logits_E = list(trace)[-1].reshape(1, -1, 2)[0, -1].double()
        decision = router.decide(text)
        medicine, law = decision.probabilities.values()
        if checkpoint.shape.plain:
            assert 0.5 < math.log(medicine / law) / float((logits_E[0] - logits_E[1]).detach()) < 2
        else:
            assert [medicine, law] == pytest.approx(logits_E.softmax(-1).tolist(), abs=1e-4)
        assert decision.tokens == ids["input_ids"].shape[1]
    for domain, text in TEXTS.items():
        assert router.decide(text).expert == domain


def test_conversations_keep_their_expert(mixtures: dict[str, Checkpoint]) -> None:
    router = TextRouter(mixtures["lexical"])
    medicine, law = ({"role": "user", "content": text} for text in TEXTS.values())
    answer = {"role": "assistant", "content": "fever"}
    for system in ("You are a lawyer: licence clause court tort deed waiver", ""):
        said = [{"role": "system", "content": system}, medicine]
        assert router.decide(said).expert == "medicine"
        assert router.decide([*said, answer, {"role": "user", "content": "Go on."}]).expert == "medicine"
    longer = {"role": "user", "content": " ".join([law["content"]] * 6)}
    assert router.decide([medicine, answer, longer]).expert == "law"


def test_a_chat_is_read_in_the_template_in_which_the_router_was_fitted(mixtures: dict[str, Checkpoint]) -> None:
    """It is, unless the recipe says otherwise, and the mixture reads it so, too."""
    checkpoint, said = mixtures["lexical"], [{"role": "user", "content": TEXTS["law"]}]
    written = load_tokenizer(checkpoint.folder).apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    decided, expected = (TextRouter(checkpoint).decide(each) for each in (said, written))
    assert checkpoint.record.router.settings is not None and checkpoint.record.router.settings.chat is None
    assert (decided.tokens, decided.probabilities) == (expected.tokens, expected.probabilities)


def test_nobody_knows_an_empty_text(mixtures: dict[str, Checkpoint]) -> None:
    for name in ("lexical", "bigrams"):
        found = TextRouter(mixtures[name]).decide("")
        assert (found.expert, found.tokens) == ("base", 0) and sum(found.probabilities.values()) == pytest.approx(1)


def test_route_from_the_command_line(mixtures: dict[str, Checkpoint]) -> None:
    said = modekit("route", mixtures["bigrams"].folder, TEXTS["law"])
    assert said.startswith("law: law ") and "tokens" in said
    found = json.loads(modekit("route", mixtures["bigrams"].folder, TEXTS["law"], "--json"))
    assert found["expert"] == "law" and set(found["probabilities"]) == {"medicine", "law"}
    assert ended("route", mixtures["bigrams"].folder, "")[0] == 2
    code, _, stderr = ended("route", mixtures["hidden"].folder, "x")
    assert code == 2 and "cannot tell by a text alone" in stderr
    assert mixtures["hidden"].record.native_type is not None
    assert "build again" in stderr  # gates of a plain checkpoint cannot become a table


def test_many_turns_take_no_longer(mixtures: dict[str, Checkpoint]) -> None:
    """What decides is bounded, whatever a request holds."""
    router = TextRouter(mixtures["bigrams"])
    turns = [{"role": "user", "content": "fever"}] * 100_000
    found = router.decide(turns)
    assert found.expert == "medicine" and found.tokens < 10_000
    assert router.decide("fever artery " * 500_000).tokens < 20_000
    assert router.decide("\ud800 fever").tokens > 0


EXPERTS, VOCAB, BUCKETS = 3, 40, 64
NGRAM = {"score": "lexical", "ngram": {"order": 3, "buckets": BUCKETS}}
ROUTINGS: dict[str, dict[str, Any]] = {
    "the token itself": {"score": "lexical", "averages": [{"decay": 0.0}]},
    "mean": {"score": "lexical", "averages": [{"decay": 1.0}]},
    "fading": {"score": "lexical", "averages": [{"decay": 0.9}, {"decay": 0.5}]},
    "orders": {**NGRAM, "averages": [{"decay": 1.0}, {"decay": 0.9}], "orders": [1, 3]},
}


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("length", [1, 300])
@torch.no_grad()
def test_it_is_the_last_of_all_answers(name: str, length: int) -> None:
    routing = {"method": "gating", **ROUTINGS[name]}
    columns = BUCKETS if "ngram" in routing else VOCAB
    flow, parts = Flow(), len(routing["averages"])
    drawn = np.random.default_rng(length)
    gate_EG = drawn.normal(size=(EXPERTS, parts * columns)).astype(np.float32)
    ids = drawn.integers(0, VOCAB, length).tolist()
    whole = Router("text", {"width": columns}, flow, EXPERTS, routing).eval()
    whole.gate = torch.nn.Parameter(torch.from_numpy(gate_EG))
    flow.ids_BS = torch.tensor([ids])
    expected_SE = whole.logits(torch.zeros(1, length, 1))[0].numpy()
    decays = [average["decay"] for average in routing["averages"]]
    found_E = LastToken(np.split(gate_EG.T, parts), decays, routing.get("orders", ())).by_token(ids).sum(0)
    assert found_E.dtype == np.float32 and found_E.shape == (EXPERTS,)
    np.testing.assert_allclose(found_E, expected_SE[-1], rtol=1e-4, atol=1e-5)
    assert length < 2 or not np.allclose(found_E, expected_SE[0], atol=1e-3)
