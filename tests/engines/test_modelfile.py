"""The Modelfile beside a GGUF: its template is evaluated here as Go does, and writes what the tokenizer's own writes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from byte_level import byte_tokenizer, save_byte_model
from chatting import TEMPLATE, word_tokenizer
from modekit.engines.modelfile import Seams, ends_of, modelfile
from modekit.engines.sampling import Sampling
from modekit.errors import SourceError
from modekit.text.chat import needed_template
from modekit.text.document import Message, message_of

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if messages[0]['role'] == 'system' and loop.index0 == 1 %}{{ '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' }}"
    "{% endif %}{{ m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
THINKS = TEMPLATE.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
BRACES = TEMPLATE.replace("<|im_end|>\\n", '\u200b{{ \'{{\' }} """ \\\\<|im_end|>\\n').replace(
    "<|im_end|>\n", '\u200b{{ \'{{\' }} """ \\<|im_end|>\n'
)
COUNTS = "{{ messages | length }}" + TEMPLATE
CHATS: Sequence[Sequence[tuple[str, str]]] = (
    [("user", "Who are you?")],
    [("user", "Hi {{ there }}"), ("assistant", "Hello."), ("user", "And now?")],
    [("system", "Be kind."), ("user", "Hi")],
    [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "More"), ("assistant", "Yes"), ("user", "Why?")],
)
_ACTION = re.compile(r'\{\{((?:[^"}]|"(?:\\.|[^"\\])*"|\}(?!\}))*)\}\}', re.DOTALL)


def go(template: str, messages: Sequence[Message]) -> str:
    """What Go's text/template makes of the actions that a Modelfile of ours has: range, if eq, else, variables, strings."""
    parts = _ACTION.split(template)
    variables: dict[str, str] = {}

    def value(word: str, message: Message | None) -> str:
        if word.startswith('"'):
            signs = {"n": "\n", "t": "\t", "r": "\r"}
            escape = re.compile(r"\\(U[0-9a-f]{8}|.)", re.DOTALL)
            return escape.sub(lambda m: chr(int(m[1][1:], 16)) if m[1][0] == "U" else signs.get(m[1], m[1]), word[1:-1])
        if word.startswith("$"):
            return variables[word]
        assert message is not None
        return {".Role": message["role"], ".Content": message["content"]}[word]

    def block(at: int, message: Message | None, shown: bool) -> tuple[str, int, str]:
        """What stands up to the `else` or `end` that closes a block, where that is, and what it says."""
        written = parts[at] if shown else ""
        while at + 1 < len(parts):
            action, at = parts[at + 1].strip(), at + 2
            if action.startswith(("else", "end")):
                return written, at, action
            if action.startswith("range"):
                after = at
                for each in messages:
                    text, after, _ = block(at, each, shown)
                    written += text
                at = after
            elif action.startswith("if eq "):
                done = False
                while not action.startswith("end"):
                    condition = re.fullmatch(r'(?:else )?if eq (\S+) ("[^"]*")', action)
                    true = condition is None or (shown and value(condition[1], message) == value(condition[2], message))
                    text, at, action = block(at, message, shown and not done and true)
                    written, done = written + text, done or true
            elif "=" in action.partition('"')[0] and action.startswith("$"):
                name, word = re.split(r"\s*:?=\s*", action)
                if shown:
                    variables[name] = value(word, message)
            elif shown:
                written += value(action, message)
            written += parts[at] if shown else ""
        return written, at, "end"

    return block(0, None, True)[0]


def commands(text: str) -> dict[str, list[str]]:
    """The commands of a Modelfile, as Ollama's parser cuts them: a value may span lines within three quotes."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r'^(FROM|ADAPTER|TEMPLATE|SYSTEM|PARAMETER \w+) ("""(?s:.*?)"""|.*)$', text, re.MULTILINE):
        found.setdefault(name, []).append(value.removeprefix('"""').removesuffix('"""') if value.startswith('"""') else value)
    return found


def saved(folder: Path, template: str | None, **generation: object) -> dict[str, list[str]]:
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return commands(modelfile(folder, word_tokenizer(template), "x-q8_0.gguf", 100_000))


@pytest.mark.parametrize(
    "template", [TEMPLATE, LLAMA2, GEMMA, THINKS, BRACES], ids=["chatml", "llama2", "gemma", "thinks", "braces"]
)
def test_ollamas_template_writes_what_the_tokenizers_does(tmp_path: Path, template: str) -> None:
    said = saved(tmp_path, template)
    own = needed_template(word_tokenizer(template), "test")
    tried = 0
    for chat in CHATS:
        messages = [message_of(*each) for each in chat]
        if template == GEMMA and messages[0]["role"] == "system":
            continue
        assert go(said["TEMPLATE"][0], messages) == own.text(messages, answer=True)
        tried += 1
    assert tried >= 2 and '"""' not in said["TEMPLATE"][0]
    assert said["FROM"] == ["./x-q8_0.gguf"] and said["PARAMETER num_ctx"] == ["8192"]


def test_a_system_prompt_of_the_template_is_said_and_a_beginning_token_is_ollamas(tmp_path: Path) -> None:
    said = saved(tmp_path, TEMPLATE)
    assert said["SYSTEM"] == ["You help with court and fever"]
    assert said["PARAMETER stop"] == ["</s>", "<|im_end|>"]
    own = needed_template(word_tokenizer(TEMPLATE), "test")
    asked = message_of("user", "Hi")
    assert go(said["TEMPLATE"][0], [message_of("system", said["SYSTEM"][0]), asked]) == own.text([asked], answer=True)
    found = Seams.of(needed_template(word_tokenizer(GEMMA), "test"))
    assert found is not None and "<s>" not in found.go("<s>") and found.go("").count("<s>") == 2
    assert "SYSTEM" not in saved(tmp_path, GEMMA)


def test_what_cannot_be_said_is_not_said(tmp_path: Path) -> None:
    for template in (COUNTS, None):
        text = modelfile(tmp_path, word_tokenizer(template), "x.gguf", 64)
        assert "TEMPLATE" not in commands(text) and commands(text)["PARAMETER num_ctx"] == ["64"]
        assert ("cannot be said in Ollama's language" in text) is (template is not None)


def test_parameters_are_the_models(tmp_path: Path) -> None:
    said = saved(
        tmp_path, None, do_sample=True, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1, eos_token_id=[2, 5]
    )
    assert {name.removeprefix("PARAMETER "): value for name, (value, *_) in said.items() if name.startswith("PARAMETER")} == {
        "stop": "</s>",
        "num_ctx": "8192",
        "temperature": "0.6",
        "top_p": "0.9",
        "top_k": "20",
        "repeat_penalty": "1.1",
        "repeat_last_n": "-1",
    }
    assert "PARAMETER temperature" not in saved(tmp_path, None, temperature=0.6)
    sampling = Sampling.of(tmp_path)
    assert sampling.temperature == 0 and ends_of(word_tokenizer(), sampling, None) == {2}
    for broken in ({"temperature": "hot"}, {"top_k": -1}, [], {"eos_token_id": [1] * 1_000}):
        (tmp_path / "generation_config.json").write_text(json.dumps(broken))
        with pytest.raises(SourceError, match="cannot be read"):
            Sampling.of(tmp_path)


def test_an_adapter_stands_on_its_base(tmp_path: Path) -> None:
    save_byte_model(tmp_path, "llama", 0)
    said = commands(modelfile(tmp_path, byte_tokenizer(), "base-f32.gguf", 64, "law.lora.gguf"))
    assert (said["FROM"], said["ADAPTER"]) == (["./base-f32.gguf"], ["./law.lora.gguf"])
