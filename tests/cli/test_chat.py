"""`modekit chat OUT`: what it answers, who led to each token, which words decided; on a terminal and with lines of a file."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from byte_level import save_byte_model
from chatting import TEMPLATE
from command_line import ended, modekit
from conftest import _WORDS
from domain_mixtures import TWO, adapter_experts, built, model_experts
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.cli.printing.console import console_for
from modekit.engines.chat import Answer, ChatSettings, chatting, words_at
from modekit.engines.gguf import export_gguf
from modekit.engines.registry import GgufSettings
from modekit.engines.voices import AnswerToken
from modekit.errors import ModekitError, TextError
from modekit.evaluation.inspection.passes import traced_losses
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.shapes import mixture_of
from modekit.routing.text_router import last_token_of
from modekit.text.chat import needed_template
from modekit.text.document import message_of
from modekit.text.sequences import TokenSequence

ROUTERS = {
    "lexical": {"mixture": {"router": {"fit": "lexical"}}},
    "modekit": {"mixture": {"router": {"fit": "lexical"}}, "output": {"format": "modekit"}},
    "ngram": {"mixture": {"router": {"fit": "ngram"}}},
    "classifier": {"mixture": {"router": {"fit": "classifier"}}},
    "hidden": {"mixture": {"router": {"fit": "ridge", "tokens_per_domain": 200, "keep_tokens": 32, "sequence_length": 32}}},
    "adapters": {"mixture": {"router": {"fit": "random"}}},
    "fixed": {"mixture": {"method": "linear"}},
}
QUESTION = _WORDS["law"]


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("chat")
    models = model_experts(root, max_position_embeddings=256)
    save_byte_model(root / "base", "llama", 9, max_position_embeddings=256)
    (root / "base" / "chat_template.jinja").write_text(TEMPLATE)
    adapters = adapter_experts(root)
    return {
        name: built(root, {"base_model": "./base", "experts": adapters if name == "adapters" else models, **recipe}, name)
        for name, recipe in ROUTERS.items()
    }


def answered(checkpoint: Checkpoint, *said: str, **settings: Any) -> list[Answer]:
    with chatting(checkpoint, ChatSettings(**{"answer_tokens": 8, **settings})) as talk:
        return [talk.ask(each, lambda _: None) for each in said]


@torch.inference_mode()
def written(checkpoint: Checkpoint, said: str, count: int) -> tuple[list[int], list[int]]:
    """Tokens of a question in the chat template, and what transformers writes behind it."""
    tokenizer, model = load_tokenizer(checkpoint.folder), load_model(checkpoint.folder)
    template = needed_template(tokenizer, "test")
    prompt = template.ids(template.text([message_of("user", said)], answer=True))
    made = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return prompt, made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ROUTERS)
def test_it_answers_as_transformers_does_and_says_who_led(mixtures: dict[str, Checkpoint], name: str) -> None:
    """The weights of each token are those that a pass over the whole text has where the token before it stands."""
    checkpoint = mixtures[name]
    (answer,) = answered(checkpoint, QUESTION)
    prompt, ids = written(checkpoint, QUESTION, 8)
    tokenizer = load_tokenizer(checkpoint.folder)
    said = tokenizer.decode(ids)
    assert answer.prompt == prompt and len(answer.tokens) == 8 and answer.ended == "length"
    assert answer.text == said.rstrip("\ufffd") or answer.text == said
    found: list[Any] = []
    whole = TokenSequence((*prompt, *ids), 0)
    traced_losses(load_model(checkpoint.folder), checkpoint, [whole], lambda _, decided: found.append(decided), lambda _: None)
    expected_SE = found[0].weights_RSE.mean(0)[len(prompt) - 1 : -1]
    assert torch.allclose(torch.tensor([each.weights for each in answer.tokens]), torch.tensor(expected_SE), atol=1e-4)
    assert sum(answer.led_by().values()) == pytest.approx(1)
