"""An engine that dies while `modekit serve` answers: what becomes of requests, when it is back, and when serve gives up."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from domain_mixtures import built, model_experts
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.engines import supervisor as module
from modekit.engines.child import Child
from modekit.engines.registry import GgufSettings, ServeSettings
from modekit.engines.serve import ServedMixture, serving
from modekit.engines.supervisor import Supervisor
from modekit.errors import EngineError
from waiting import until

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "
LONG = 2**14
"""Tokens that no answer comes to the end of while a test looks at it."""
SETTINGS = ServeSettings("llama", port=0, gguf=GgufSettings("f32"))
UNENDING = {"prompt": "the heart", "max_tokens": LONG, "ignore_eos": True, "temperature": 0}
BRACKETS = "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000  # more than llama.cpp's stack holds


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tmp_path_factory.mktemp("keeper")
    experts = model_experts(root, max_position_embeddings=2 * LONG)
    (root / "medicine" / "chat_template.jinja").write_text(TEMPLATE)
    return built(root, {"base_model": "./medicine", "experts": experts, "mixture": {"router": {"fit": "lexical"}}}, "OUT")


@pytest.fixture
def served(mixture: Checkpoint) -> Iterator[ServedMixture]:
    with serving(mixture, SETTINGS) as running:
        yield running


def engine_of(served: ServedMixture) -> psutil.Process:
    child = served.supervisor._child
    assert child is not None
    return psutil.Process(child._process.pid)


def asked(address: str, body: object, path: str = "/v1/completions", **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and answer."""
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, dict(answer.headers), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read().decode()


def healthy(served: ServedMixture) -> bool:
    with urllib.request.urlopen(f"{served.address}/health", timeout=60) as answer:
        return bool(answer.status == 200)


def test_every_request_is_answered_where_the_engine_is_killed(served: ServedMixture) -> None:
    """Those that it was at by an error that clients understand, those that come after by the engine that is started again."""
    before = engine_of(served)
    lines: list[bytes] = []
    request = urllib.request.Request(f"{served.address}/v1/completions", json.dumps({**UNENDING, "stream": True}).encode())
    answers: list[tuple[int, dict[str, str], str]] = []
    waiting = threading.Thread(target=lambda: answers.append(asked(served.address, UNENDING)))
    with urllib.request.urlopen(request, timeout=120) as stream:
        lines.append(stream.readline())
        waiting.start()
        until(lambda: busy(served) == 2)
        killed = time.monotonic()
        before.kill()
        before.wait(60)
        status, _, answer = asked(served.address, {**UNENDING, "max_tokens": 2})
        back = time.monotonic() - killed
        lines += stream.readlines()
    waiting.join()
    assert status == 200 and json.loads(answer)["usage"]["completion_tokens"] == 2
    assert back < 60, "on an idle machine it takes one second"
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: ")]
    assert len(events) > 1 and all("choices" in each for each in events[:-1])
    assert events[-1]["error"]["code"] == 503 and "send the request once more" in events[-1]["error"]["message"]
    status, headers, answer = answers[0]
    assert status == 503 and headers["retry-after"] == "2" and "send the request once more" in answer
    assert engine_of(served).pid != before.pid and healthy(served)


def busy(served: ServedMixture) -> int:
    """Connections to the engine."""
    port = int(str(served.supervisor.address).rpartition(":")[2])
    return sum(
        each.status == psutil.CONN_ESTABLISHED and each.raddr.port == port for each in psutil.Process().net_connections("tcp")
    )


def test_serve_ends_when_the_engine_fails_three_times_in_a_minute(mixture: Checkpoint) -> None:
    command = [sys.executable, "-m", "modekit", "serve", str(mixture.folder), "--port", "0", "--outtype", "f32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    address = process.stdout.readline().split("/v1")[0]
    gone: set[int] = set()
    for _ in range(3):
        until(lambda: asked(address, {"prompt": "the", "max_tokens": 1})[0] == 200)
        (engine,) = (each for each in psutil.Process(process.pid).children() if each.pid not in gone)
        gone.add(engine.pid)
        engine.kill()
    assert process.wait(60) == 2
    said = " ".join(process.stderr.read().split())
    assert "the engine failed 3 times in 60 seconds" in said and "ended by SIGKILL" in said


def test_an_interrupt_from_the_terminal_ends_it_well(mixture: Checkpoint) -> None:
    """Which goes to the engine, too: that is no failure."""
    command = [sys.executable, "-m", "modekit", "serve", str(mixture.folder), "--port", "0", "--outtype", "f32"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in the background ignores
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 0
    said = process.stderr.read()
    assert "started again" not in said and "Traceback" not in said


def test_failures_of_long_ago_are_forgotten(served: ServedMixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WITHIN_S", 0.0)
    for _ in range(4):
        engine_of(served).kill()
        engine_of(served).wait(60)
        assert asked(served.address, {"prompt": "the", "max_tokens": 1})[0] == 200


def test_an_engine_that_does_not_come_back_ends_it(tmp_path: Path) -> None:
    """Which writes its address the first time, and never after."""
    (tmp_path / "once.py").write_text(
        "import json, pathlib, sys\n"
        "mark = pathlib.Path(json.loads(sys.stdin.readline())['mark'])\n"
        "if mark.exists():\n    sys.exit('error: no room for the model')\n"
        "mark.touch()\n"
        "print(json.dumps({'address': 'http://127.0.0.1:1'}), flush=True)\n"
    )
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with Supervisor("once", lambda: Child("once", {"mark": str(tmp_path / "mark")}, path)) as keeper:
        with pytest.raises(EngineError, match="the engine failed 3 times in 60 seconds") as error:
            keeper.wait()
        assert "no room for the model" in str(error.value) and keeper.address is None


def test_requests_that_end_an_engine_do_not_reach_it(served: ServedMixture) -> None:
    before = engine_of(served)
    assert asked(served.address, {"prompt": "the", "grammar": BRACKETS})[0] == 400
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    bomb = {"type": "array", "minItems": 1_000_000_000}
    for more in ({"json_schema": bomb}, {"response_format": {"type": "json_schema", "json_schema": {"schema": bomb}}}):
        status, _, said = asked(served.address, {**chat, **more}, "/v1/chat/completions")
        assert status == 400 and "minItems: 1,000,000,000 repeats found; allowed: 0 to 2,000" in said
    good = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2}
    status, _, said = asked(served.address, {**chat, "max_tokens": 40, "json_schema": good}, "/v1/chat/completions")
    assert status == 200 and set(json.loads(json.loads(said)["choices"][0]["message"]["content"])) <= {"a", "b"}
    assert engine_of(served).pid == before.pid
    key = {"Authorization": f"Bearer {inner_key(served)}"}
    with suppress(OSError):  # asked itself, without bounds, the engine ends
        asked(str(served.supervisor.address), {"prompt": "the", "grammar": BRACKETS}, **key)
    before.wait(60)
    assert asked(served.address, {"prompt": "the", "max_tokens": 1})[0] == 200


def inner_key(served: ServedMixture) -> str:
    return str(engine_of(served).environ()["MODEKIT_API_KEY"])


def test_the_engine_itself_needs_a_key(served: ServedMixture) -> None:
    assert asked(str(served.supervisor.address), {"prompt": "the", "max_tokens": 1})[0] == 401


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such limit")
def test_a_request_that_takes_memory_ends_with_an_error(served: ServedMixture) -> None:
    """What no bound foresaw: the engine grows no further than its cache and two gigabytes."""
    limit, _ = resource.prlimit(engine_of(served).pid, resource.RLIMIT_DATA)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**31 < limit < 2**32 + min(2**33, memory // 8)
    key = {"Authorization": f"Bearer {inner_key(served)}"}
    greedy = {"prompt": "the", "max_tokens": 1, "dry_multiplier": 1, "dry_penalty_last_n": 2**31 - 1}  # 8 GiB
    status, _, said = asked(str(served.supervisor.address), greedy, **key)
    assert status == 400 and "bad_alloc" in said
    assert asked(served.address, {"prompt": "the", "max_tokens": 1})[0] == 200


@contextmanager
def client(served: ServedMixture) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=f"{served.address}/v1", max_retries=0, timeout=120) as found:
        yield found


def test_openais_client(served: ServedMixture, mixture: Checkpoint) -> None:
    name, chat = mixture.folder.name, [{"role": "user", "content": "hi"}]
    with client(served) as ai:
        assert [each.id for each in ai.models.list()] == [name] == [ai.models.retrieve(name).id]
        said = ai.chat.completions.create(model=name, messages=chat, max_tokens=4, logprobs=True, top_logprobs=2)
        scores = said.choices[0].logprobs
        assert said.model == name and scores is not None and scores.content
        streamed = ai.chat.completions.create(model=name, messages=chat, max_tokens=4, stream=True)
        ends = [each.choices[0].finish_reason for each in streamed if each.choices]
        # How many pieces come before the end is the model's: bytes of a character that is not whole yet are kept back.
        assert len(ends) > 1 and ends[-1] is not None and not any(ends[:-1])
        with pytest.raises(openai.NotFoundError, match=f"there is no model 'gpt-4'; there is '{name}'"):
            ai.completions.create(model="gpt-4", prompt="the")
        refusals: list[tuple[str, dict[str, Any]]] = [
            ("messages: the list is empty", {"messages": []}),
            ("echo: llama does not do this", {"prompt": "the", "echo": True}),
            ("logprobs: llama does not do this; ask /v1/chat/completions", {"prompt": "the", "logprobs": 2}),
            ("best_of: llama does not do this", {"prompt": "the", "best_of": 2}),
        ]
        for why, body in refusals:
            with pytest.raises(openai.BadRequestError, match=why):
                (ai.chat if "messages" in body else ai).completions.create(model=name, **body)
        engine = engine_of(served)
        with pytest.raises(openai.APIError, match="send the request once more"):
            for number, _ in enumerate(
                ai.completions.create(model=name, prompt="the", max_tokens=LONG, stream=True, extra_body={"ignore_eos": True})
            ):
                if number == 1:
                    engine.kill()
        engine.wait(60)  # a request to one that is about to end gets an error, too
        assert ai.completions.create(model=name, prompt="the", max_tokens=2).usage.completion_tokens == 2


def test_hints_name_no_flags_of_other_programs(served: ServedMixture) -> None:
    status, _, said = asked(served.address, {"prompt": "the " * 3 * LONG, "max_tokens": 1})
    assert status == 400 and "exceeds the available context size" in said and "try" not in said


def test_a_mixture_without_a_chat_template_says_so(tmp_path: Path) -> None:
    experts = model_experts(tmp_path)
    recipe = {"base_model": "./medicine", "experts": experts, "mixture": {"router": {"fit": "lexical"}}}
    with serving(built(tmp_path, recipe), SETTINGS) as served:
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        status, _, said = asked(served.address, chat, "/v1/chat/completions")
        assert status == 400 and "the model has no chat template" in said
        assert asked(served.address, {"prompt": "hi", "max_tokens": 1})[0] == 200
