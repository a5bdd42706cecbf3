"""`modekit chat OUT`: what it answers, who led to each token; on a terminal and with lines of a file."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from byte_level import save_byte_model
from chatting import TEMPLATE
from command_line import ended
from conftest import _WORDS
from domain_mixtures import adapter_experts, built, model_experts
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.cli.printing import console_for
from modekit.engines.chat import AnswerToken, Chat, ChatAnswer
from modekit.engines.registry import ChatSettings
from modekit.errors import ModekitError, TextError
from modekit.evaluation.inspection.passes import traced_losses
from modekit.loaded.load import load_model, load_tokenizer
from modekit.text.chat import needed_template
from modekit.text.document import message_of
from modekit.text.sequences import TokenSequence

pytestmark = pytest.mark.usefixtures("short_tables")

ROUTERS = {
    "lexical": {"mixture": {"router": {"fit": "lexical"}}, "output": {"format": "plain"}},
    "modekit": {"mixture": {"router": {"fit": "lexical"}}, "output": {"format": "modekit"}},
    "bigrams": {"mixture": {"router": {"fit": "lexical", "orders": [1, 2], "buckets": 512}}},
    "hidden": {"mixture": {"router": {"fit": "logistic", "tokens_per_domain": 200, "keep_tokens": 32, "sequence_length": 32}}},
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


def answered(checkpoint: Checkpoint, *said: str, **settings: Any) -> list[ChatAnswer]:
    talk = Chat(checkpoint, ChatSettings(**{"max_tokens": 8, **settings}))
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
    assert answer.prompt == prompt and len(answer.tokens) == 8 and not answer.ended
    assert answer.text == said.rstrip("\ufffd") or answer.text == said
    found: list[Any] = []
    whole = TokenSequence((*prompt, *ids))
    traced_losses(load_model(checkpoint.folder), checkpoint, [whole], lambda _, decided: found.append(decided), lambda _: None)
    expected_SE = found[0].weights_RSE.mean(0)[len(prompt) - 1 : -1]
    assert torch.allclose(torch.tensor([each.weights for each in answer.tokens]), torch.tensor(expected_SE), atol=1e-4)
    assert sum(answer.led_by().values()) == pytest.approx(1)


def test_a_long_conversation_loses_its_beginning(mixtures: dict[str, Checkpoint]) -> None:
    answers = answered(mixtures["bigrams"], *[QUESTION] * 4, context=224)
    assert [answer.left_out > 0 for answer in answers] == [False, False, False, True] or answers[-1].left_out > 0
    assert all(len(answer.prompt) + len(answer.tokens) <= 224 and answer.left_out % 2 == 0 for answer in answers)
    alone = answered(mixtures["bigrams"], QUESTION, context=224)[0]
    assert answers[-1].prompt[-len(alone.prompt) :] == alone.prompt


def test_what_does_not_fit_is_said_and_the_chat_goes_on(mixtures: dict[str, Checkpoint]) -> None:
    talk = Chat(mixtures["bigrams"], ChatSettings(context=96, max_tokens=200))
    with pytest.raises(TextError, match="no room for an answer"):
        talk.ask("word " * 100, lambda _: None)
    answer = talk.ask("heart", lambda _: None)
    assert len(answer.prompt) + len(answer.tokens) <= 96
    with pytest.raises(ModekitError, match="longer than the model's"):
        Chat(mixtures["bigrams"], ChatSettings(context=512))


def test_ctrl_c_stops_an_answer_and_what_was_said_stays(mixtures: dict[str, Checkpoint]) -> None:
    heard: list[AnswerToken] = []

    def interrupt(token: AnswerToken) -> None:
        heard.append(token)
        if len(heard) == 3:
            raise KeyboardInterrupt

    talk = Chat(mixtures["bigrams"], ChatSettings(max_tokens=50))
    answer = talk.ask(QUESTION, interrupt)
    assert (answer.ended, len(answer.tokens)) == (False, 3)
    later = talk.ask("heart", lambda _: None)
    assert len(later.prompt) > len(answer.prompt) + 3


def test_a_seed_draws_the_same_twice(mixtures: dict[str, Checkpoint]) -> None:
    said = [answered(mixtures["bigrams"], QUESTION, temperature=1.5, seed=seed)[0].text for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    drawn = set()
    for _ in range(2):  # two processes begin with the same state of torch's
        torch.manual_seed(0)
        drawn.add(answered(mixtures["lexical"], QUESTION, temperature=1.5)[0].text)
    assert len(drawn) == 2


def ended_with(said: str | bytes, *args: object) -> tuple[object, str, str]:
    """`modekit ARGS` with a text on its standard input."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said.encode() if isinstance(said, str) else said), "utf-8"))
        return ended(*args)


def test_lines_of_a_pipe_are_questions(mixtures: dict[str, Checkpoint]) -> None:
    code, _, stderr = ended_with(f"{QUESTION}\n\ndeed\nheart\n", "chat", mixtures["lexical"].folder, "--max-tokens", "4")
    assert code == 0 and stderr.count("of 4 tokens]") == 3 and "law 100%" in stderr
    code, _, stderr = ended_with("word " * 400, "chat", mixtures["lexical"].folder)
    assert code == 2 and "no room for an answer" in stderr and "--context" in stderr


@pytest.mark.parametrize("command", [["chat"], ["route", "-"], ["inspect", "--text", "-"]])
def test_an_input_in_another_encoding_is_refused(mixtures: dict[str, Checkpoint], command: list[str]) -> None:
    code, _, stderr = ended_with(b"caf\xe9\n", command[0], mixtures["lexical"].folder, *command[1:])
    assert code == 2 and "standard input" in stderr and "UTF-8" in stderr


def test_without_a_template_a_text_is_continued(tmp_path: Path) -> None:
    save_byte_model(tmp_path / "base", "llama", 9)
    checkpoint = built(
        tmp_path, {"base_model": "./base", "experts": adapter_experts(tmp_path), "mixture": {"router": {"fit": "random"}}}
    )
    code, _, stderr = ended_with("the heart\n", "chat", checkpoint.folder, "--max-tokens", "3")
    assert code == 0 and "no chat template: what you write is continued, not answered" in stderr
    code, _, stderr = ended_with("", "serve", checkpoint.folder, "--port", "0", "--context", "100000")
    assert code == 2 and "no chat template" in stderr and "longer than the model's" in stderr
    one, two = answered(checkpoint, "the heart", "the court")
    tokenizer = load_tokenizer(checkpoint.folder)
    assert [list(one.prompt), list(two.prompt)] == [tokenizer(text)["input_ids"] for text in ("the heart", "the court")]


def test_what_a_model_writes_is_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    import modekit.cli.serving as command

    stream = io.StringIO()
    monkeypatch.setattr(command, "out", console_for(file=stream, force_terminal=True, width=80, color_system="truecolor"))
    for text in ("\x1b]0;title\x07", "\x1b[2J", "a\tb\n", "\x9b31m", "\u202e[bold]", "\r"):
        command._show(AnswerToken(text, (0.1, 0.9)))
    shown = stream.getvalue()
    left = re.sub(r"\x1b\[[0-9;]*m", "", shown)  # colours of our own
    assert "48;2;" in shown and all(sign.isprintable() or sign == "\n" for sign in left)
    assert left.startswith("\\x1b]0;title\\x1b[2J") and "a   b\n" in left and "[bold]" in left


@pytest.mark.slow
def test_on_a_terminal_it_streams_in_colour(mixtures: dict[str, Checkpoint]) -> None:
    """A real one: what is typed, Ctrl-C on an empty line, Ctrl-D."""
    import pty
    import select
    import time

    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", "OMP_NUM_THREADS": "1"}
        signal.signal(signal.SIGINT, signal.default_int_handler)
        folder = str(mixtures["lexical"].folder)
        os.execv(sys.executable, [sys.executable, "-m", "modekit", "chat", folder, "--max-tokens", "6"])
    shown = b""

    def until_shown(expected: bytes, again: bytes = b"") -> None:
        """`again` is typed once more after ten seconds: readline loses what comes between its prompt and its first wait."""
        nonlocal shown
        end = time.monotonic() + 60
        while expected not in shown and time.monotonic() < end:
            if select.select([terminal], [], [], 10)[0]:
                shown += os.read(terminal, 4_096)
            elif again:
                os.write(terminal, again)
        assert expected in shown, shown

    try:
        until_shown(b"ends.\x1b[0m\r\n> ")
        os.write(terminal, b"\x03")
        until_shown(b"> \r\n> ", b"\x03")
        os.write(terminal, f"{QUESTION}\n".encode())
        until_shown(b"of 6 tokens]")
        assert b"48;2;" in shown and b"Ctrl-D ends" in shown
        until_shown(b"cut after 6 tokens]\x1b[0m\r\n> ")
        os.write(terminal, b"\x04")
        until_ended = time.monotonic() + 60
        while not (found := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < until_ended:
            time.sleep(0.1)
        assert found[0] == pid
        pid = 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(terminal)
    assert os.waitstatus_to_exitcode(found[1]) == 0
