"""`modekit serve` starts the real engines: what they answer, to whom, to how many at once, and how they end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import openai
import psutil
import pytest
import torch
from transformers import PreTrainedTokenizerBase

import asking
from command_line import ended
from domain_mixtures import adapter_experts, built, model_experts
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.engines import child, converter
from modekit.engines import registry as module
from modekit.engines.child import KEY
from modekit.engines.registry import ENGINES, EngineName, ServeSettings
from modekit.engines.serve import LONGEST, ServedMixture, choose_engine, context_of, key_of_clients, serving
from modekit.engines.transformers_process import _refuse_what_is_not_done
from modekit.errors import EngineError, UnsupportedError
from modekit.loaded.load import load_model, load_tokenizer
from refusal import refuse

pytestmark = pytest.mark.usefixtures("short_tables")

PROMPTS = [f"the heart moves the {thing}" for thing in ("blood", "body", "court", "width", "parties", "thing", "return", "27")]
COUNT = 12
TEMPLATE = "{% if messages|length > 9 %}{{ raise_exception('too many turns') }}{% endif %}"
TEMPLATE += "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ name or 'assistant' }}: "
CASES = [
    ("native", "llama"),
    ("native", "transformers"),
    ("adapters", "transformers"),
    ("native", "vllm"),
    ("adapters", "vllm"),
]
IN_VLLM = pytest.mark.vllm


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Checkpoint]]:
    """A native mixture, and one of adapters under a router that keeps what it has read.

    What lies beside them is never imported.
    """
    root = tmp_path_factory.mktemp("serve")
    whole = model_experts(root, head_dim=32)  # as vLLM wants it
    (root / "medicine" / "chat_template.jinja").write_text(TEMPLATE)
    found = {}
    for shape, experts in (("native", whole), ("adapters", adapter_experts(root))):
        recipe = {
            "base_model": "./medicine",
            "experts": experts,
            "mixture": {"router": {"fit": "lexical"}},
            "output": {"format": "plain", "carry": "ffn"} if shape == "native" else {"format": "modekit"},
        }
        found[shape] = built(root, recipe, shape)
    for library in ("multiprocessing", "torch", "json", "uvloop", "vllm"):
        (root / f"{library}.py").write_text(f"open({str(root / 'imported')!r}, 'a').write({library!r})")
    yield found
    assert not (root / "imported").exists()


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, id="-".join(case), marks=[IN_VLLM] if case[1] == "vllm" else []) for case in CASES],
)
def running(request: pytest.FixtureRequest, mixtures: dict[str, Checkpoint]) -> Iterator[tuple[ServedMixture, Checkpoint]]:
    shape, engine = request.param
    settings = ServeSettings(engine, port=0, parallel=4, context=64, outtype="f32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, "secret")
        with serving(mixtures[shape], settings) as served:
            yield served, mixtures[shape]


def asked(served: ServedMixture, path: str, body: object = None, *, key: str = "secret") -> tuple[int, Any]:
    """Status and answer."""
    status, _, said = asking.asked(served.address + path, body, key=key)
    return status, json.loads(said) if said and status < 400 else said


def client(served: ServedMixture, key: str = "secret") -> openai.OpenAI:
    return openai.OpenAI(api_key=key, base_url=f"{served.address}/v1", max_retries=0, timeout=120)


def streamed(served: ServedMixture, name: str, prompt: str) -> str:
    """What the model writes, as it comes."""
    with client(served) as ai:
        pieces = ai.completions.create(model=name, prompt=prompt, max_tokens=COUNT, temperature=0, stream=True)
        return "".join(piece.choices[0].text for piece in pieces if piece.choices)


@torch.no_grad()
def written(checkpoint: Checkpoint, prompt: str) -> str:
    """What transformers writes here."""
    model, tokenizer = load_model(checkpoint.folder), load_tokenizer(checkpoint.folder)
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=COUNT, do_sample=False, pad_token_id=0)
    text: str = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def plain(text: str) -> str:
    """Without half characters, which engines show in ways of their own."""
    return "".join(character for character in text if character.isascii())


def test_it_writes_what_transformers_writes(running: tuple[ServedMixture, Checkpoint]) -> None:
    served, checkpoint = running
    assert served.address.startswith("http://127.0.0.1:")
    body = {"model": checkpoint.folder.name, "prompt": PROMPTS[0], "max_tokens": COUNT, "temperature": 0}
    status, answer = asked(served, "/v1/completions", body)
    assert status == 200
    expected = written(checkpoint, PROMPTS[0])
    assert plain(answer["choices"][0]["text"]) == plain(expected) and len(plain(expected)) > 3


def test_eight_at_once_get_what_each_gets_alone(running: tuple[ServedMixture, Checkpoint]) -> None:
    served, checkpoint = running
    alone = [streamed(served, checkpoint.folder.name, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: streamed(served, checkpoint.folder.name, prompt), PROMPTS))
    assert together == alone and len(set(alone)) > 1


def test_a_chat_is_what_the_template_writes(running: tuple[ServedMixture, Checkpoint]) -> None:
    served, checkpoint = running
    if served.engine != "transformers":
        pytest.skip("it runs the template itself")
    messages = [{"role": "system", "content": "court"}, {"role": "user", "content": PROMPTS[0]}]
    body = {"model": checkpoint.folder.name, "messages": messages, "max_tokens": COUNT, "temperature": 0}
    answers = []
    for more in ({}, {"chat_template_kwargs": {"name": "judge"}}):
        status, answer = asked(served, "/v1/chat/completions", {**body, **more})
        assert status == 200
        prompt = "system: court\n" + f"user: {PROMPTS[0]}\n" + ("judge: " if more else "assistant: ")
        assert plain(answer["choices"][0]["message"]["content"]).strip() == plain(written(checkpoint, prompt)).strip()
        answers.append(answer)
    assert answers[0]["usage"]["prompt_tokens"] != answers[1]["usage"]["prompt_tokens"]


def test_bad_requests_get_a_status_and_the_others_go_on(running: tuple[ServedMixture, Checkpoint]) -> None:
    served, checkpoint = running
    good = {"model": checkpoint.folder.name, "prompt": "the", "max_tokens": 2, "temperature": 0}
    chat = {"model": checkpoint.folder.name, "max_tokens": 2}
    for path, body, key in (
        ("/v1/completions", b'{"model":', "secret"),
        ("/v1/completions", {**good, "prompt": "the " * 4000}, "secret"),
        ("/v1/chat/completions", {**chat, "messages": [{"role": "user", "content": "the " * 4000}]}, "secret"),
        ("/v1/chat/completions", {**chat, "messages": 7}, "secret"),
        ("/props", None, "other"),
        ("/v1/completions", good, "other"),
        ("/load_model", {"model": "someone/else"}, "secret"),
    ):
        status, said = asked(served, path, body, key=key)
        assert status >= 400, (path, status)
        assert str(checkpoint.folder.parent) not in str(said) and "Traceback" not in str(said)
    assert asked(served, "/v1/completions", good)[0] == 200
    assert asked(served, "/health")[0] == 200


def test_a_chat_without_a_template_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = pytest.importorskip("transformers.cli.serving.chat_completion")
    handler = handlers.BaseHandler
    monkeypatch.setattr(handler, "_validate_request", lambda *_: None)
    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", None)
    _refuse_what_is_not_done(chats=False)
    handler(None, None)._validate_request({"prompt": "hi"})
    with pytest.raises(Exception, match="no chat template"):
        handlers.ChatCompletionHandler(None, None)._validate_request({"messages": [{"role": "user", "content": "hi"}]})


def test_what_transformers_would_pass_over_is_refused_by_name(running: tuple[ServedMixture, Checkpoint]) -> None:
    served, checkpoint = running
    if served.engine != "transformers":
        pytest.skip("the others do these, or say so themselves")
    good = {"model": checkpoint.folder.name, "max_tokens": 2, "temperature": 0}
    text, chat = {**good, "prompt": "the"}, {**good, "messages": [{"role": "user", "content": "hi"}]}
    json_wanted = {"response_format": {"type": "json_object"}}
    for path, body, more in (
        ("/v1/completions", text, {"n": 2}),
        ("/v1/completions", text, {"logprobs": 1}),
        ("/v1/completions", text, {"generation_config": '{"num_beams": 4}'}),
        ("/v1/chat/completions", chat, {"logprobs": True}),
        ("/v1/chat/completions", chat, {"tool_choice": "required"}),
        ("/v1/chat/completions", chat, json_wanted),
    ):
        status, said = asked(served, path, {**body, **more})
        assert status == 400 and next(iter(more)) in said and "leave it out" in said, (more, status, said)
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}
    status, said = asked(served, "/v1/chat/completions", {**chat, "messages": [image]})
    assert status == 400 and "image_url" in said
    harmless = {"n": 1, "logprobs": False, "presence_penalty": 0, "response_format": {"type": "text"}, "logit_bias": None}
    assert asked(served, "/v1/chat/completions", {**chat, **harmless})[0] == 200


def test_what_is_malformed_is_refused_by_name(running: tuple[ServedMixture, Checkpoint]) -> None:
    served, checkpoint = running
    if served.engine != "transformers":
        pytest.skip("the others do so by themselves")
    good = {"model": checkpoint.folder.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    wrong = [{"max_tokens": "x"}, {"max_tokens": 0}, {"temperature": "x"}, {"temperature": -1}, {"top_p": 2}, {"seed": [1]}]
    wrong += [{"stop": 5}, {"stop": [5]}, {"stop": ""}, {"stop": []}, {"frequency_penalty": "x"}, {"frequency_penalty": -1}]
    wrong += [{"frequency_penalty": [1]}, {"stream": "x"}, {"tools": 5}, {"chat_template_kwargs": None}, {"messages": []}]
    wrong += [{"messages": each} for each in (None, 7, [7], {"role": "user"}, [{"content": "hi"}], [{"role": 5}])]
    contents = (5, {"text": "hi"}, [5], [{"type": "text"}], [{"text": "hi"}])
    wrong += [{"messages": [{"role": "user", "content": content}]} for content in contents]
    calls = (5, [5], [{"function": {"arguments": "{"}}], [{"function": {"name": "x"}}], [{"name": "x", "arguments": "{}"}])
    wrong += [{"messages": [{"role": "assistant", "tool_calls": each}]} for each in calls]
    for more in wrong:
        status, said = asked(served, "/v1/chat/completions", {**good, **more})
        error = json.loads(said)["error"]
        assert status == 400 and next(iter(more)) in error["message"], (more, status, said)
        assert error["type"] == "invalid_request_error"
    text = {"model": checkpoint.folder.name, "max_tokens": 2}
    for path, body in (
        ("/v1/chat/completions", {key: good[key] for key in ("model", "max_tokens")}),
        ("/v1/chat/completions", {**good, "messages": [good["messages"][0]] * 10}),  # which the template refuses
        ("/v1/chat/completions", {**good, "chat_template_kwargs": {"name": "\ud800"}}),
        ("/v1/chat/completions", {**good, "messages": [{"role": "user", "content": "\ud800"}]}),
        ("/v1/chat/completions", b"[1]"),
        ("/v1/completions", {**text, "prompt": "\ud800"}),
        ("/v1/completions", {**text, "prompt": ["a"]}),
        ("/v1/completions", {**text, "prompt": "a", "frequency_penalty": "x"}),
        ("/v1/completions", {**text, "prompt": "a", "unknown": 1}),
    ):
        status, said = asked(served, path, body)
        assert status in (400, 422) and json.loads(said)["error"]["message"], (path, body, status, said)
    assert asked(served, "/v1/completions", {**text, "prompt": "a", "temperature": 1e-300})[0] == 200
    fine = {"max_tokens": 2.0, "temperature": 0.5, "top_p": 1, "seed": 3, "stop": ["x", "y"]}
    assert asked(served, "/v1/chat/completions", {**good, **fine})[0] == 200
    assert asked(served, "/v1/chat/completions", {**good, "stop": "x"})[0] == 200


def test_an_answer_ends_where_the_context_does(running: tuple[ServedMixture, Checkpoint]) -> None:
    """Transformers by itself would write on."""
    served, checkpoint = running
    good = {"model": checkpoint.folder.name, "prompt": "the heart moves", "temperature": 0}
    for more in ({}, {"max_tokens": 10_000}):
        status, answer = asked(served, "/v1/completions", {**good, **more})
        assert 400 <= status < 500 or answer["usage"]["total_tokens"] <= (
            256 if served.engine == "llama" else 64
        )  # which rounds up


def test_a_model_is_found_by_its_name_and_no_answer_tells_where_it_lies(running: tuple[ServedMixture, Checkpoint]) -> None:
    served, checkpoint = running
    status, models = asked(served, "/v1/models")
    assert status == 200 and [each["id"] for each in models["data"]] == [checkpoint.folder.name]
    for path in ("/props", "/v1/models", "/slots", "/health"):
        assert str(checkpoint.folder.parent) not in str(asked(served, path)[1])


def test_openais_client(running: tuple[ServedMixture, Checkpoint]) -> None:
    served, checkpoint = running
    name, chat = checkpoint.folder.name, [{"role": "user", "content": "hi"}]
    with client(served) as ai:
        assert ai.chat.completions.create(model=name, messages=chat, max_tokens=4).model
        streamed = ai.chat.completions.create(model=name, messages=chat, max_tokens=4, stream=True)
        ends = [each.choices[0].finish_reason for each in streamed if each.choices]
        assert len(ends) > 1 and ends[-1] is not None and not any(ends[:-1])
    with client(served, "wrong") as wrong, pytest.raises(openai.AuthenticationError):
        wrong.completions.create(model=name, prompt="the")


def test_a_context_that_nobody_asked_for_is_no_larger_than_memory() -> None:
    """Llama-3.1's own, four times, is 69 GB of keys and values."""
    for said, asked_for, expected in ((131_072, None, LONGEST), (64, None, 64), (131_072, 131_072, 131_072)):
        checkpoint: Any = SimpleNamespace(config={"max_position_embeddings": said})
        assert context_of(checkpoint, asked_for) == expected


def test_the_engine_that_fits_is_taken(mixtures: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)  # of vLLM
    native, adapters = mixtures["native"], mixtures["adapters"]
    assert choose_engine(native, "auto") == ("llama", "it fits") == choose_engine(native, "llama")
    name, why = choose_engine(adapters, "auto")
    assert name == "transformers" and why.startswith("not llama: it keeps adapters")
    for engine in ("llama", "vllm"):
        with pytest.raises(UnsupportedError, match="cannot be served"):
            choose_engine(adapters, engine)
    monkeypatch.setattr(converter, "is_installed", lambda: False)
    name, why = choose_engine(native, "auto")
    assert name == "transformers" and why.startswith("not llama: modekit[gguf] is not installed; not vllm: vllm is not")


@pytest.mark.slow
def test_the_next_engine_serves_where_the_first_turns_out_not_to(
    mixtures: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_words(*_: object, **__: object) -> None:
        raise EngineError("llama.cpp cuts text into other tokens than the tokenizer")

    monkeypatch.setattr("modekit.engines.gguf.compare", other_words)
    monkeypatch.setattr(module, "find_spec", lambda _: None)  # of vLLM
    native = mixtures["native"]
    shutil.rmtree(native.folder.with_name("native.gguf"), ignore_errors=True)  # proven for another test
    with serving(native, ServeSettings(port=0, context=64, threads=1)) as served:
        assert served.engine == "transformers" and served.why.startswith("not llama: llama.cpp cuts text into other tokens")
        assert asked(served, "/health", key=None)[0] == 200
    for settings in (ServeSettings("llama", port=0), ServeSettings(port=0, outtype="f16")):  # which only llama reads
        with pytest.raises(EngineError, match="other tokens"), serving(native, settings):
            pass
    monkeypatch.setattr(ENGINES["transformers"], "refusal", lambda _: "it is not installed")
    with pytest.raises(UnsupportedError, match=r"other tokens.*not transformers"), serving(native, ServeSettings(port=0)):
        pass


def test_the_file_is_made_once_and_anew_when_the_router_is(mixtures: dict[str, Checkpoint]) -> None:
    settings = ServeSettings("llama", port=0, context=64, outtype="f32")
    file = mixtures["native"].folder.with_name("native.gguf") / "native-f32.gguf"
    with serving(mixtures["native"], settings):
        before = file.stat().st_mtime_ns
    with serving(mixtures["native"], settings):
        assert file.stat().st_mtime_ns == before
    ended("fit", mixtures["native"].folder, "temperature=3")
    with serving(open_checkpoint(mixtures["native"].folder), settings):
        assert file.stat().st_mtime_ns != before


def test_threads_are_those_that_a_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_QUOTA", tmp_path / "cpu.max")
    cores = len(os.sched_getaffinity(0))
    for variable, quota, expected in (
        ("3", "max 100000", 3),
        ("3,2", "max 100000", 3),
        ("none", "max 100000", cores),
        ("0", "50000 100000", 1),
        ("", "100000000 100000", cores),
    ):
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
        assert child.default_threads() == expected


@pytest.mark.parametrize(("host", "key"), [("0.0.0.0", None), ("::", None), ("0.0.0.0", " ")])
def test_nobody_is_served_without_a_key_by_accident(
    mixtures: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch, host: str, key: str | None
) -> None:
    monkeypatch.delenv(KEY, raising=False)
    if key is not None:
        monkeypatch.setenv(KEY, key)
    message = refuse("serve", mixtures["native"].folder, "--port", "0", "--host", host)
    assert "other machines could send requests without a key" in " ".join(message.split()) and KEY in message


@pytest.mark.slow
def test_a_key_or_no_key_lets_other_machines_in(monkeypatch: pytest.MonkeyPatch, mixtures: dict[str, Checkpoint]) -> None:
    monkeypatch.delenv(KEY, raising=False)
    for host in ("127.0.0.1", "localhost", "127.1.2.3"):
        assert key_of_clients(host, no_key=False) is None
    settings = ServeSettings("llama", "0.0.0.0", 0, no_key=True, context=64, outtype="f32")
    with serving(mixtures["native"], settings) as served:
        port = served.address.rpartition(":")[2]
        assert asking.asked(f"http://127.0.0.1:{port}/v1/models")[0] == 200


def test_an_option_that_the_engine_does_not_read_is_refused(mixtures: dict[str, Checkpoint]) -> None:
    for engine, words in (
        ("transformers", ("--outtype", "f16")),
        ("transformers", ("--parallel", "2")),
        ("auto", ("--outtype", "f16")),
    ):
        code, _, stderr = ended("serve", mixtures["adapters"].folder, "--port", "0", "--engine", engine, *words)
        said = " ".join(stderr.split())
        assert code == 2 and "the setting has no effect" in said and words[0] in said and "transformers" in said
    assert ENGINES["vllm"].options == {"parallel"} and ENGINES["llama"].options >= {"outtype", "parallel"}


def test_every_engine_has_a_name_and_a_process() -> None:
    assert get_args(EngineName) == ("auto", *ENGINES)
    assert all(find_spec(f"modekit.engines.{name}_process") for name in ENGINES)


def test_what_cannot_be_served_ends_at_the_start(mixtures: dict[str, Checkpoint]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for shape, words, said in (
            ("native", ("--port", str(taken.getsockname()[1])), "cannot be listened on"),
            ("native", ("--host", "no.such.host.invalid"), "cannot be listened on"),
            ("native", ("--context", "100000"), "longer than the model's"),
            ("native", ("--outtype", "q1"), "Invalid value for '--outtype'"),
            ("adapters", ("--engine", "llama"), "cannot be served"),
        ):
            code, _, stderr = ended("serve", mixtures[shape].folder, *words)
            assert code == 2 and said in " ".join(stderr.split()), stderr


@pytest.mark.parametrize("engine", ["llama", pytest.param("vllm", marks=IN_VLLM)])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_engine_ends_with_the_command(mixtures: dict[str, Checkpoint], how: signal.Signals, engine: str) -> None:
    folder = str(mixtures["native"].folder)
    own = ["--outtype", "f32"] if engine == "llama" else []  # what another engine has no use for is refused
    command = [sys.executable, "-m", "modekit", "serve", folder, "--port", "0", "--engine", engine, *own]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in the background ignores
    )
    assert process.stdout is not None
    address = process.stdout.readline().split("/v1")[0]
    assert asking.asked(f"{address}/health")[0] == 200
    engines = psutil.Process(process.pid).children(recursive=True)
    assert engines
    process.send_signal(how)
    code = process.wait(30)
    assert code == (-how if how == signal.SIGKILL else 0)
    left = psutil.wait_procs(engines, timeout=20)[1]
    assert [each for each in left if each.status() != psutil.STATUS_ZOMBIE] == [], "the engine is still there"
