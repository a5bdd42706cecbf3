"""Mixtures in the real vLLM, compared with transformers: `make test-vllm`, which installs vLLM beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from architecture.test_mixtures import OVERRIDES
from building.test_carry import adapter_shop
from building.test_routed import byte_shop
from command_line import ended
from domain_mixtures import adapter_experts, built, model_experts
from engines.test_gguf import REFUSED as NOT_IN_LLAMA
from engines.test_gguf import RUNS as IN_LLAMA
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.engines.registry import ENGINES
from modekit.loaded.load import load_model, load_tokenizer
from modekit.sources.families import FAMILIES
from modekit.sources.family import Family
from modekit.sources.natives import NATIVES

pytestmark = pytest.mark.vllm

Answer = list[tuple[list[int], list[float]]]
PROMPTS = [f"the heart moves the {thing}" for thing in ("blood", "body", "court", "width", "parties", "thing", "return", "27")]
COUNT = 24
CLOSE = 2e-5  # nats
HEAD: dict[str, Any] = {"head_dim": 32, "max_position_embeddings": 512}  # vLLM's attention on processors knows no narrower one
WHOLE_HEADS: dict[str, Any] = {
    "hidden_size": 128,
    "max_position_embeddings": 512,
}  # of families whose heads are hidden size / heads
FLEXIBLE = {
    "llama",
    "mistral",
    "qwen3",
    "ernie4_5",
    "hunyuan_v1_dense",
    "qwen3_5_text",
    "gemma",
    "gemma2",
    "glm4",
    "gemma3_text",
}
NOT_RUN = {"qwen3_5_text"}  # vLLM's linear attention on processors takes no model as small as these
ROWS = [(dense, overrides) for dense, _, overrides in IN_LLAMA if dense not in NOT_RUN]
ROWS += [row for row in NOT_IN_LLAMA if row[0] not in NOT_RUN] + [("cohere2", {"tie_word_embeddings": False})]
DIFFERS = [row for row in ROWS if row[1].get("attention_bias") or (row[0] == "cohere2" and "sliding_window" in row[1])]
LINEAR = {"fit": "logistic"}
MEMORY = {
    "context": {**LINEAR, "granularity": "context"},
    "sequence": {**LINEAR, "granularity": "sequence"},
    "bigrams": {"fit": "lexical", "orders": [1, 2], "buckets": 512},
    "lexical": {"fit": "lexical"},
    "orders": {"fit": "lexical", "orders": [1, 2]},
    "fading": {"fit": "lexical", "decay": [0.9, 0.5]},
}


def wide(dense: str, overrides: dict[str, Any]) -> dict[str, Any]:
    if dense in FLEXIBLE and not overrides.get("attention_bias"):
        return {**overrides, **HEAD}
    return {**{key: value for key, value in overrides.items() if key != "head_dim"}, **WHOLE_HEADS}


def mixture(
    root: Path, dense: str, overrides: dict[str, Any], mixed: dict[str, Any], kind: str = "model", **output: Any
) -> Checkpoint:
    """Two random models, or adapters over the first. In the modekit architecture their FFNs alone, unless `mixed` says what."""
    experts = model_experts(root, family=dense, **overrides)
    if output.get("format") == "modekit":
        mixed = {"modules": "auto", **mixed}
    if kind == "adapter":
        experts = adapter_experts(root, width=overrides.get("hidden_size", 32))
    form = {"format": "modekit" if kind == "adapter" else "auto", **output}
    return built(root, {"base_model": "./medicine", "experts": experts, "mixture": mixed, "output": form})


def prompts_of(checkpoint: Checkpoint, texts: list[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(checkpoint.folder)
    return [tokenizer(text)["input_ids"] for text in texts]


def in_vllm(checkpoint: Checkpoint, prompts: list[list[int]], **settings: Any) -> Answer:
    """What vLLM writes."""
    return turns_in_vllm(checkpoint, prompts, COUNT, 1, **settings)[0][1]


def turns_in_vllm(
    checkpoint: Checkpoint, prompts: list[list[int]], count: int, turns: int, **settings: Any
) -> list[tuple[list[int], Answer]]:
    """Turn by turn how many tokens of each prompt were there already, and what vLLM writes."""
    given = {"model": str(checkpoint.folder), "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8, **settings}
    given.setdefault("num_gpu_blocks_override", 64)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **ENGINES["vllm"].environment()}
    wanted = {"settings": given, "prompts": prompts, "count": count, "turns": turns}
    command, said = [sys.executable, Path(__file__).with_name("vllm_run.py")], json.dumps(wanted)
    done = subprocess.run(command, input=said, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, said_of(done)
    answered = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    return [(turn["shared"], [tuple(each) for each in turn["answers"]]) for turn in answered]


def said_of(done: subprocess.CompletedProcess[str]) -> str:
    """Its errors, without what libraries say when they end."""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line or "cannot" in line]
    return "\n".join(lines[-20:])


@torch.no_grad()
def in_transformers(checkpoint: Checkpoint, prompts: list[list[int]], count: int = COUNT, expert: int | None = None) -> Answer:
    """What transformers writes."""
    model = load_model(checkpoint.folder)
    if expert is not None:
        model.use_expert(expert)
    answers = []
    for ids in prompts:
        made = model.generate(
            torch.tensor([ids]),
            max_new_tokens=count,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append((made.sequences[0, len(ids) :].tolist(), [float(step.log_softmax(-1).max()) for step in made.scores]))
    return answers


def check_same(made: Answer, expected: Answer) -> None:
    """The same tokens and log-probabilities; a row of benchmarks/vllm.md where VLLM_TABLE names a file."""
    wrong, most = apart(made, expected)
    table, tokens = os.environ.get("VLLM_TABLE"), sum(len(ids) for ids, _ in made)
    if table:
        test = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].partition(" ")[0].removeprefix("test_")
        with Path(table).open("a") as file:
            file.write(f"| {test} | {tokens - wrong} of {tokens} | {most:.1e} |\n")
    assert wrong == 0 and most < CLOSE


def apart(one: Answer, other: Answer) -> tuple[int, float]:
    """Tokens that are not the same, and the most that log-probabilities of the others are apart."""
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(*a, *b, strict=True)]
    return (
        sum(here != there for here, _, there, _ in pairs),
        max((abs(p - q) for here, p, there, q in pairs if here == there), default=0.0),
    )


def test_every_native_row_is_run_here() -> None:
    assert {row.family.model_type for row in NATIVES} == {dense for dense, _ in ROWS} | NOT_RUN


@pytest.mark.parametrize(("dense", "overrides"), ROWS, ids=[f"{dense}-{n}" for n, (dense, _) in enumerate(ROWS)])
def test_native(tmp_path: Path, dense: str, overrides: dict[str, Any]) -> None:
    checkpoint = mixture(tmp_path, dense, wide(dense, overrides), {"top_k": 2, "router": {"fit": "random"}})
    prompts = prompts_of(checkpoint, PROMPTS)
    more = {"model_impl": "transformers"} if checkpoint.shape.vllm_differs else {}
    check_same(in_vllm(checkpoint, prompts, **more), in_transformers(checkpoint, prompts))


@pytest.mark.parametrize(("dense", "overrides"), DIFFERS, ids=[dense for dense, _ in DIFFERS])
def test_where_its_own_class_computes_something_else(tmp_path: Path, dense: str, overrides: dict[str, Any]) -> None:
    """What `plan` says of --model-impl transformers is still so."""
    checkpoint = mixture(tmp_path, dense, wide(dense, overrides), {"top_k": 2, "router": {"fit": "random"}})
    assert "--model-impl transformers" in checkpoint.shape.also_runs_in
    prompts = prompts_of(checkpoint, PROMPTS)
    wrong, most = apart(in_vllm(checkpoint, prompts), in_transformers(checkpoint, prompts))
    assert wrong > 0 or most > 100 * CLOSE


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_lexical_router_in_a_plain_checkpoint(tmp_path: Path, compiled: bool) -> None:
    checkpoint = mixture(tmp_path, "llama", HEAD, {"top_k": 1, "router": {"fit": "lexical", "decay": [0.9]}}, format="plain")
    prompts = prompts_of(checkpoint, PROMPTS)
    check_same(in_vllm(checkpoint, prompts, enforce_eager=not compiled), in_transformers(checkpoint, prompts))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_whole_adapters_in_a_plain_checkpoint(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(adapter_shop(tmp_path, family, reads_bytes=True, **HEAD).build("OUT"))
    assert checkpoint.record.carry is not None
    prompts = prompts_of(checkpoint, PROMPTS)
    check_same(in_vllm(checkpoint, prompts), in_transformers(checkpoint, prompts))


@pytest.mark.parametrize("family", ["qwen3", "qwen3-softmax", "mixtral", "granite", "qwen2"])
def test_fine_tunes_of_a_mixture(tmp_path: Path, family: str) -> None:
    heads = HEAD if family.startswith(("qwen3", "mixtral")) else WHOLE_HEADS
    checkpoint = byte_shop(tmp_path, family, **heads)
    prompts = prompts_of(checkpoint, PROMPTS)
    check_same(in_vllm(checkpoint, prompts), in_transformers(checkpoint, prompts))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["adapter", "model"])
@pytest.mark.parametrize("router", [LINEAR, MEMORY["context"], MEMORY["bigrams"]], ids=["token", "context", "bigrams"])
def test_the_modekit_architecture(tmp_path: Path, kind: str, router: dict[str, Any], compiled: bool) -> None:
    checkpoint = mixture(tmp_path, "llama", HEAD, {"router": router}, kind, format="modekit")
    prompts = prompts_of(checkpoint, PROMPTS)
    expected = in_transformers(checkpoint, prompts)
    check_same(in_vllm(checkpoint, prompts, enforce_eager=not compiled), expected)
    for expert in range(2):  # else a router that decides wrongly would not show
        others, far = apart(in_transformers(checkpoint, prompts, expert=expert), expected)
        assert others or far > 10 * CLOSE


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if not family.without_vllm], ids=lambda family: family.model_type
)
def test_every_family_in_the_modekit_architecture(tmp_path: Path, family: Family) -> None:
    dense = family.model_type
    overrides = wide(dense, OVERRIDES.get(dense, {}))
    checkpoint = mixture(
        tmp_path, dense, overrides, {"router": {"fit": "lexical", "orders": [1, 2], "buckets": 512}}, format="modekit"
    )
    prompts = prompts_of(checkpoint, PROMPTS)
    check_same(in_vllm(checkpoint, prompts), in_transformers(checkpoint, prompts))


GATES: dict[str, dict[str, Any]] = {
    "cosine": {"top_k": 2, "router": {"fit": "cosine"}},
    "cosine-in-context": {"router": {"fit": "cosine", "granularity": "context"}},
    "groups": {"groups": 2, "router": {"fit": "logistic"}},
    "threshold": {"threshold": 0.3, "router": {"fit": "logistic"}},
}


@pytest.mark.parametrize("mixed", GATES.values(), ids=GATES)
def test_gates_of_the_survey(tmp_path: Path, mixed: dict[str, Any]) -> None:
    experts = model_experts(tmp_path, ("medicine", "law", "code"), "llama", **HEAD)
    recipe = {"base_model": "./medicine", "experts": experts, "mixture": mixed, "output": {"format": "modekit"}}
    checkpoint = built(tmp_path, recipe)
    prompts = prompts_of(checkpoint, PROMPTS)
    expected = in_transformers(checkpoint, prompts)
    check_same(in_vllm(checkpoint, prompts), expected)
    for expert in range(3):
        others, far = apart(in_transformers(checkpoint, prompts, expert=expert), expected)
        assert others or far > 10 * CLOSE


CROWDED = {"max_num_batched_tokens": 48, "num_gpu_blocks_override": 9}
"""Long prompts come in chunks, and there are so few blocks that requests are put off and begun again."""


@pytest.mark.parametrize("settings", [CROWDED, {}], ids=["crowded", "at-once"])
@pytest.mark.parametrize("router", MEMORY.values(), ids=MEMORY)
def test_what_routers_remember_goes_where_keys_and_values_go(
    tmp_path: Path, router: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Four requests share a beginning with one that is read in the very same pass, then all with the turn before."""
    checkpoint = mixture(tmp_path, "llama", HEAD, {"router": router}, "adapter")
    beginnings = ["the heart moves the blood through the body, " * 20, "the court hears the parties and return the width " * 20]
    prompts = prompts_of(checkpoint, [beginnings[number % 2] + prompt for number, prompt in enumerate(PROMPTS)])
    assert 130 < min(map(len, prompts)) < 400  # a block and more
    expected = in_transformers(checkpoint, prompts, 100)
    turns = turns_in_vllm(checkpoint, prompts, 100, 2, enable_prefix_caching=True, **settings)
    for shared, answers in turns:
        check_same(answers, expected)
        assert sum(tokens >= 128 for tokens in shared) >= 4
    for expert in range(2):  # else a router that decides wrongly would not show
        others, far = apart(in_transformers(checkpoint, prompts, 100, expert), expected)
        assert others or far > 10 * CLOSE


@pytest.mark.parametrize(
    ("dense", "mixed", "words"),
    [
        ("llama", {"modules": "all", "router": {"fit": "lexical", "orders": [1, 2], "buckets": 512}}, "heads of their own"),
        ("llama", {"router": {**MEMORY["context"], "per": "feature"}, "modules": ["up"]}, "decide per feature"),
        ("qwen3_5_text", {"router": {"fit": "lexical", "orders": [1, 2], "buckets": 512}}, "linear attention"),
    ],
    ids=["head", "feature", "linear"],
)
def test_what_it_cannot_serve_is_refused_at_the_start(tmp_path: Path, dense: str, mixed: dict[str, Any], words: str) -> None:
    checkpoint = mixture(tmp_path, dense, wide(dense, OVERRIDES.get(dense, {})), mixed, format="modekit")
    with pytest.raises(AssertionError, match=words):
        in_vllm(checkpoint, prompts_of(checkpoint, PROMPTS[:1]))
    code, _, stderr = ended("serve", checkpoint.folder, "--engine", "vllm")
    assert code == 2 and words in " ".join(stderr.split())
