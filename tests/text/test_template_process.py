"""Chat templates run in a child: what transformers writes, within limits, whatever the template does and whoever forks."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from chatting import TEMPLATE, word_tokenizer
from modekit.errors import TextError
from modekit.text import template_process
from modekit.text.chat import ChatTemplate
from modekit.text.template_process import TEMPLATES, RenderError
from waiting import until

SAID = [{"role": "user", "content": "what is fever"}, {"role": "assistant", "content": "fever is a thing"}]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}
    {% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.content is string %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- else %}{% for part in message.content %}
        {%- if part.type != 'text' %}{% continue %}{% endif %}{{ part.text }}{% endfor %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {{- " [INST] " + (system + "\\n\\n" if system is defined and loop.last else "") + message["content"] + " [/INST]" }}
    {%- else %}{% generation %}{{- " " + message["content"] + eos_token }}{% endgeneration %}{%- endif %}
{%- endfor %}
"""
ODD = (
    "{% macro turn(m) %}{{ '%-8s|%s' % (m.role, m.content) }}{% endmacro %}{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% set ns.n = ns.n + 2 ** 3 %}{{ turn(m) }}"
    "{% if m.thinking is defined %}({{ m.reasoning_content }}){% endif %}"
    "{% if ns.n > 16 %}{% break %}{% endif %}{% endfor %}{{ [ns.n, none, true, 1.5, 'é'] | tojson }}{{ unk_token }}{{ who }}"
)
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Löök.", "parameters": {"type": "object"}}}]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    SAID,
    [{"role": "system", "content": " Be brief. "}, *SAID, {"role": "user", "content": "naïve \U0001f600 \u2028 \x00 <|\r\n"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]}],
    [{"role": "user", "content": "x", "name": None, "reasoning": "because"}],
    [{"role": "user", "content": "\ud83d\ude00 half \udcff"}],
    [{"role": "assistant", "content": "first"}, {"role": "assistant", "content": "again"}],
]


@pytest.mark.parametrize("source", [CHATML, LLAMA, MISTRAL, ODD, TEMPLATE], ids=["chatml", "llama", "mistral", "odd", "tests"])
@pytest.mark.parametrize(
    "variables",
    [
        {"add_generation_prompt": False},
        {"add_generation_prompt": True, "tools": TOOLS},
        {"continue_final_message": True},
        {"who": "Ada", "date_string": "1 Jan", "bos_token": "<begin>"},
    ],
)
def test_it_writes_what_transformers_writes(source: str, variables: dict[str, Any]) -> None:
    tokenizer = word_tokenizer(source)
    written = 0
    for messages in CONVERSATIONS:
        try:
            expected = tokenizer.apply_chat_template(messages, tokenize=False, **variables).encode("utf-8", "replace").decode()
        except Exception as error:
            with pytest.raises(RenderError) as refused:
                ChatTemplate(tokenizer).rendered(messages, variables)
            assert str(refused.value) == str(error)[:1_000]
            continue
        assert ChatTemplate(tokenizer).rendered(messages, variables) == expected
        written += 1
    assert written


def test_of_named_templates_that_for_tools_is_taken_where_there_are_tools() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = {"default": "plain", "tool_use": "with {{ tools | length }}"}
    template = ChatTemplate(tokenizer)
    assert (template.rendered(SAID, {}), template.rendered(SAID, {"tools": TOOLS})) == ("plain", "with 1")


_NESTED = (
    "{% set a = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set a.x = [a.x, a.x] %}{% set a.y = [a.y, a.y] %}{% endfor %}"
)
HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion in a macro": "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "nested lists compared": _NESTED + "{{ a.x == a.y }}",
    "nested list looked for": _NESTED + "{{ a.x in [a.y] }}",
    "nested list as JSON": _NESTED + "{{ a.x | tojson }}",
    "nested list as text": _NESTED + "{{ a.x | string }}",
    "nested list printed": _NESTED + "{{ a.x | pprint }}",
    "nested list sorted": _NESTED + "{{ [a.x, a.y, a.x] | sort }}",
    "text wrapped": "{{ ('a ' * 1500000) | wordwrap(1) }}",
    "long text": "{{ 'a' * 10**9 }}{{ 'a' * 10**9 }}",
    "text doubled": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "join": "{% set s = 'a' * 100000 %}{{ (s | list) | join(s) }}",
    "replace": "{% set s = 'a' * 1000000 %}{{ s | replace('a', s) }}",
    "range": "{{ range(10**12) | list }}",
    "width of a format": "{{ '%2000000000d' % 1 }}",
    "width of the other format": "{{ '{:>2000000000}'.format(1) }}",
    "centre": "{{ 'a' | center(2 * 10**9) }}",
    "power": "{% set x = 9**(9**9) %}x",
    "squares": "{% set n = namespace(x=7) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x > 0 }}",
    "words": "{{ lipsum(n=99999, html=false, min=999, max=1000) }}",
    "nested source": "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "long answer": "{{ 'a' * 70000000 }}",
    "long error": "{{ raise_exception('a' * 300000000) }}",
    "inner names": "{{ messages.__class__.__mro__ }}",
    "nothing there": "{{ nothing.there }}",
    "broken": "{% broken",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_an_error_soon(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of processor time, as the machine may be busy; and this process keeps its memory and its limits."""
    monkeypatch.setattr(template_process, "SECONDS", 0.5)
    before, limits = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, _limits()
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(TextError, match="chat template does not take these messages"):
        ChatTemplate(word_tokenizer(HOSTILE[name])).text(SAID)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000 and _limits() == limits  # in kB
    assert ChatTemplate(word_tokenizer()).text(SAID)  # the next one is written


def test_what_lies_around_a_hostile_template_cannot_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 0.2)
    template = ChatTemplate(word_tokenizer(HOSTILE["nested loops"]))
    assert template.around(None) is None and template.turn() is None


def test_more_than_a_line_holds_is_refused_before_it_is_sent() -> None:
    with pytest.raises(TextError, match="more than 67,108,864 bytes"):
        ChatTemplate(word_tokenizer()).text([{"role": "user", "content": "a" * 2**26}])


def test_threads_take_turns_and_get_their_own_text() -> None:
    template = ChatTemplate(word_tokenizer("{{ messages[0].content }}"))
    with ThreadPoolExecutor(8) as pool:
        texts = [f"{number} " * 2_000 * (number % 30) for number in range(120)]
        assert list(pool.map(lambda text: template.text([{"role": "user", "content": text}]), texts)) == texts


def test_a_killed_child_is_replaced() -> None:
    template = ChatTemplate(word_tokenizer())
    expected = template.text(SAID)
    for _ in range(2):
        _child().kill()
        until(lambda: _child().status() == psutil.STATUS_ZOMBIE)
        assert template.text(SAID) == expected


def test_an_interrupted_wait_leaves_no_answer_to_the_next_text(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(word_tokenizer("{{ messages[0].content }}"))
    assert template.text(SAID) == "what is fever"
    real = template_process._exchange

    def interrupted(*arguments: Any) -> bytes:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(template_process, "_exchange", interrupted)
        template.text(SAID)
    assert template.text(SAID[1:]) == "fever is a thing"


def test_a_forked_process_has_a_child_of_its_own() -> None:
    template = ChatTemplate(word_tokenizer())
    expected, mine = template.text(SAID), _child().pid
    with TEMPLATES._lock:  # as when another thread waits for a text while this one forks
        forked = os.fork()
        if forked == 0:
            good = template.text(SAID) == expected and _child().pid != mine
            TEMPLATES.stop()
            os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
    assert template.text(SAID) == expected and _child().pid == mine


PARENT = """
import os, sys, time
from chatting import word_tokenizer
from modekit.text.chat import ChatTemplate
from modekit.text.template_process import TEMPLATES
import threading
template = ChatTemplate(word_tokenizer({source!r}))
if {source!r}:
    threading.Thread(target=template.text, args=([{{"role": "user", "content": "x"}}],), daemon=True).start()
else:
    ChatTemplate(word_tokenizer()).text([{{"role": "user", "content": "x"}}])
while TEMPLATES._process is None:
    time.sleep(0.01)
if os.fork() == 0:  # holds no end of the pipe
    os.execvp("sleep", ["sleep", "600"])
print(TEMPLATES._process.pid, flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("source", ["", HOSTILE["nested loops"]], ids=["idle", "computing"])
@pytest.mark.parametrize("how", ["ends", "killed"])
def test_the_child_ends_with_its_parent(how: str, source: str) -> None:
    command = [sys.executable, "-c", PARENT.format(source=source)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # as this process imports
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert parent.stdin is not None and parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    sleeper = next(each for each in psutil.Process(parent.pid).children() if each.pid != child.pid)
    try:
        parent.send_signal(signal.SIGKILL) if how == "killed" else parent.stdin.close()
        assert parent.wait(60) == (-signal.SIGKILL if how == "killed" else 0)
        assert not psutil.wait_procs([child], timeout=60)[1]
    finally:
        sleeper.kill()
        parent.stdout.close()


def test_it_needs_little_memory_and_no_torch() -> None:
    """Beside the limits of the process, which are its own."""
    ChatTemplate(word_tokenizer()).text(SAID)
    assert _child().memory_info().rss < 200e6
    assert not any("torch" in mapped.path for mapped in _child().memory_maps())


def test_ctrl_c_is_for_the_parent() -> None:
    template = ChatTemplate(word_tokenizer())
    expected, child = template.text(SAID), _child()
    child.send_signal(signal.SIGINT)
    assert template.text(SAID) == expected and _child() == child


def _child() -> psutil.Process:
    assert TEMPLATES._process is not None
    return psutil.Process(TEMPLATES._process.pid)


def _limits() -> list[tuple[int, int]]:
    return [resource.getrlimit(each) for each in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_DATA)]
