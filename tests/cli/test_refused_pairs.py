"""What a mixture of models with an encoder cannot have is refused first, with what can be done instead."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pair_models import make_pair_workshop
from refusal import refuse, tree


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    router = {"fit": "random", "seed": 1}
    return make_pair_workshop(tmp_path_factory.mktemp("pairs"), "bart").build(mixture={"top_k": 1, "router": router})


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [
        *((["serve", "--engine", name], "in Python") for name in ("llama", "vllm", "transformers")),
        (["serve"], "in Python"),
        (["export", "--gguf"], "in Python"),
        (["inspect", "--text", "fever"], "leave it out"),
        (["eval-tasks", "hellaswag"], "modekit eval-translation OUT"),
        (["eval-tasks", "questions"], "modekit eval-translation OUT"),
    ],
)
def test_what_needs_a_decoder_alone(out: Path, asked: list[str], remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command, *options = asked
    folder = [out.parent / "X"] if command == "export" else []
    before = tree(out.parent)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: pytest.fail("the network was asked"))
    message = refuse(command, out, *folder, *options)
    assert "has an encoder" in message and remedy in message
    assert f"where:    {out}" in message
    assert "native" not in message and "leave --engine out" not in message and tree(out.parent) == before
