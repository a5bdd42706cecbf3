"""What loading a modekit checkpoint promises: with and without modekit, with a cache and without, alone and in a batch."""

from __future__ import annotations

import ast
import copy
import functools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    modeling_utils,
)

from conftest import VOCAB, character_tokenizer, logits_of, save, tiny_model
from modekit.architecture import CODE_FILES
from modekit.architecture.modekit_mixed import Mixed
from modekit.architecture.modekit_router import Router
from modekit.building.build import build
from modekit.checkpoint.open import open_checkpoint
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from rounding import assert_close

pytestmark = pytest.mark.filterwarnings("ignore")

WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with a tied head": {"tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 8, **WINDOWS},
    "phi3": {},
    "llama of width 64": {"hidden_size": 64, "intermediate_size": 128},
}
FAMILIES = [name for name in FAMILY_SETTINGS if " " not in name]
WHOLE = [{"name": "itself", "model": "base"}, {"name": "one", "model": "./one"}, {"name": "two", "model": "./two"}]
MIXED = [{"name": "itself", "model": "base"}, {"name": "one", "model": "./one"}, {"name": "low", "adapter": "./adapter"}]
LOW = [{"name": "low", "adapter": "./adapter"}, {"name": "part", "model": "./two", "as": "lora", "rank": 3}]

TOKEN: dict[str, Any] = {"granularity": "token"}
PREFIX: dict[str, Any] = {"granularity": "sequence", "prefix": 5}
ROUTERS: dict[str, dict[str, Any]] = {
    "token": TOKEN,
    "context": {"granularity": "context", "decay": [0.9]},
    "two contexts": {"granularity": "context", "decay": [0.8, 1.0]},
    "context per model": {"granularity": "context", "decay": [0.7], "per": "model"},
    "context per feature": {"granularity": "context", "decay": [0.7], "per": "feature"},
    "sequence": PREFIX,
}
EVERYTHING: dict[str, Any] = {"modules": "all", "method": "gating", "router": {**PREFIX, "per": "model"}}
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds mixtures of tiny models; each base, expert and mixture is made once."""
    root = tmp_path_factory.mktemp("architecture")

    @functools.cache
    def bench(family: str) -> Path:
        folder = root / family.replace(" ", "_")
        settings = FAMILY_SETTINGS[family]
        for seed, name in enumerate(("base", "one", "two")):
            save(tiny_model(family.split()[0], seed=seed, **settings), folder / name)
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder / "base"), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
        )
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        adapted.save_pretrained(folder / "adapter")
        return folder

    def build_one(family: str = "llama", experts: list[dict[str, Any]] = MIXED, **mixture: Any) -> Path:
        folder = bench(family)
        if not mixture:
            return folder
        if mixture.get("method") != "linear":
            mixture["router"] = {"fit": "random", "seed": 3, "temperature": 0.04, **mixture.get("router", {})}
        recipe = parse_recipe({"base_model": "./base", "experts": experts, "mixture": mixture, "output": {"format": "modekit"}})
        out = folder / recipe.digest()[:16]
        if not out.exists():
            build(make_plan(recipe, folder), out)
        return out

    return build_one


def opened(folder: Path, **kwargs: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **kwargs}).eval()


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def greedy(model: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **kwargs}
    return model.generate(ids, **settings)


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of prompts of unequal length."""
    length = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, length - len(row) :] = row
        mask[place, length - len(row) :] = 1
    return ids, mask


def in_pieces(model: PreTrainedModel, ids: torch.Tensor, sizes: list[int], **kwargs: Any) -> torch.Tensor:
    """Logits of a pass that goes through a cache in pieces of these sizes, the last repeated."""
    cache: Any = DynamicCache(config=model.config)
    logits, start = [], 0
    mask = kwargs.pop("attention_mask", None)
    with torch.inference_mode():
        while start < ids.shape[1]:
            size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
            piece = ids[:, start : start + size]
            seen = {} if mask is None else {"attention_mask": mask[:, : start + size]}
            output = model(input_ids=piece, past_key_values=cache, use_cache=True, **seen)
            cache = output.past_key_values
            logits.append(output.logits)
            start += size
    return torch.cat(logits, dim=1)


@pytest.fixture(params=[name for name in ROUTERS if name != "context"])
def routed(request: pytest.FixtureRequest, built: Build) -> PreTrainedModel:
    """A Llama mixture of the base, a full model and an adapter, with each kind of router."""
    return opened(built(method="gating", router=ROUTERS[request.param]))


# --- opening and saving


def test_the_router_of_these_tests_decides_differently_from_token_to_token(routed: PreTrainedModel, ids: torch.Tensor) -> None:
    """Else the tests below would hold for any router."""
    seen: list[torch.Tensor] = []
    router = next(module for module in routed.modules() if isinstance(module, Router))
    router.register_forward_hook(lambda _m, _a, weights: seen.append(weights))
    free = logits_of(routed, ids)
    weights = seen[0].reshape(*seen[0].shape[:2], -1)
    assert weights.std(dim=1).max() > 0.02
    assert (weights[:, -1] - weights[0, -1]).abs().max() > 0.01
    for expert in range(3):
        routed.use_expert(expert)
        assert (logits_of(routed, ids) - free).abs().max() > 0.05


@pytest.mark.parametrize("file", CODE_FILES, ids=lambda file: file.name)
def test_the_code_in_a_checkpoint_needs_nothing_else(file: Path) -> None:
    beside = {other.stem for other in CODE_FILES}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in beside
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert all(name.split(".")[0] in {*sys.stdlib_module_names, "torch", "transformers"} for name in names if name)


WITHOUT_MODEKIT = """
import importlib.abc, json, sys
from pathlib import Path

class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modekit":
            raise ModuleNotFoundError("modekit is not installed here")

sys.meta_path.insert(0, Refused())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
ids = torch.load(sys.argv[1])
for place, folder in enumerate(map(Path, sys.argv[2:])):
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise AssertionError("a stranger's code was run unasked")
    assert len(AutoTokenizer.from_pretrained(folder)("law").input_ids) > 0
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).modekit["experts"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    base = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    again = folder.parent / (folder.name + "_again")
    model.save_pretrained(again)
    copies = [model, AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True, dtype=torch.float32).eval()]
    with torch.inference_mode():
        logits = [copy(input_ids=ids).logits for copy in copies]
        texts = [copy.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0) for copy in copies]
        hidden = base(input_ids=ids).last_hidden_state
    torch.save({"logits": logits, "texts": texts, "hidden": hidden}, folder.parent / (folder.name + ".pt"))
assert not any(name.partition(".")[0] == "modekit" for name in sys.modules)
"""


def test_opens_without_modekit_and_says_the_same(built: Build, ids: torch.Tensor, tmp_path: Path) -> None:
    cases = [
        built(method="gating", router=ROUTERS["two contexts"]),
        built("gemma3_text", method="routing", top_k=2, router=TOKEN),
        built("phi3", **EVERYTHING, experts=WHOLE),
    ]
    folders = []
    for place, out in enumerate(cases):
        folders.append(tmp_path / f"case{place}")
        opened(out).save_pretrained(folders[-1])
        character_tokenizer().save_pretrained(folders[-1])
        folders.append(tmp_path / f"built{place}")
        folders[-1].symlink_to(out)
    torch.save(ids, tmp_path / "ids.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MODEKIT, str(tmp_path / "ids.pt"), *map(str, folders)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for folder in folders:
        there = torch.load(folder.parent / f"{folder.name}.pt")
        model = opened(folder)
        for logits, text in zip(there["logits"], there["texts"], strict=True):
            assert_close(logits, logits_of(model, ids))
            assert torch.equal(text, greedy(model, ids, max_new_tokens=6))
        with torch.inference_mode():
            assert_close(there["hidden"], model.model(input_ids=ids).last_hidden_state)
        # What was saved without modekit is again a checkpoint that both open.
        assert_close(logits_of(folder.parent / f"{folder.name}_again", ids), logits_of(model, ids))


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("family", "experts", "mixture"),
    [
        ("llama", MIXED, {"method": "gating", "router": ROUTERS["two contexts"]}),
        ("llama with a tied head", WHOLE, EVERYTHING),
        ("phi3", LOW, {"method": "linear", "weights": {"low": 1, "part": 3}}),
    ],
)
def test_saving_and_reloading_changes_no_bit(
    built: Build, ids: torch.Tensor, tmp_path: Path, family: str, experts: Any, mixture: dict[str, Any]
) -> None:
    out = built(family, experts, **mixture)
    model = opened(out)
    model.save_pretrained(tmp_path / "saved")
    before, after = weights_in(out), weights_in(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {file.name for file in CODE_FILES} <= {file.name for file in (tmp_path / "saved").iterdir()}
    for file in CODE_FILES:
        assert file.read_bytes() == (out / file.name).read_bytes() == (tmp_path / "saved" / file.name).read_bytes()
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (out, tmp_path / "saved"))
    for key in ("model_type", "modekit", "auto_map", "architectures"):
        assert first[key] == second[key], key
    for kwargs in ({}, {"trust_remote_code": True}):
        assert_close(logits_of(opened(tmp_path / "saved", **kwargs), ids), logits_of(model, ids))


def test_loading_reports_nothing_missing_and_nothing_left_over(built: Build) -> None:
    for family in FAMILY_SETTINGS:
        for out in (built(family, method="gating", router=TOKEN), built(family, WHOLE, **EVERYTHING)):
            _, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
            assert not any(report.values()), report


def test_the_config_and_the_model_can_be_copied_and_pickled(built: Build, ids: torch.Tensor) -> None:
    model = opened(built(method="gating", router=ROUTERS["context"]))
    expected = logits_of(model, ids)
    for config in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert type(config) is type(model.config) and config.to_dict() == model.config.to_dict()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(logits_of(again, ids), expected)
        again.use_expert(1)
        assert not torch.allclose(logits_of(again, ids), expected, atol=1e-2)
        assert_close(logits_of(model, ids), expected)


def test_a_config_that_does_not_say_what_is_mixed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "modekit"}))
    with pytest.raises(ValueError, match="does not say what is mixed"):
        AutoConfig.from_pretrained(tmp_path)


def test_two_families_and_two_mixtures_live_side_by_side(built: Build, ids: torch.Tensor) -> None:
    folders = [built("llama", method="gating", router=TOKEN), built("phi3", method="gating", router=TOKEN)]
    folders.append(built("llama", WHOLE, **EVERYTHING))
    alone = [logits_of(opened(folder), ids) for folder in folders]
    together = [opened(folder) for folder in folders]
    for model, expected in zip(together[::-1], alone[::-1], strict=True):
        assert_close(logits_of(model, ids), expected)


# --- with a cache as without


def test_token_by_token_is_the_whole_pass(routed: PreTrainedModel, ids: torch.Tensor) -> None:
    close(in_pieces(routed, ids, [1]), logits_of(routed, ids))
    close(in_pieces(routed, ids, [7, 1, 2, 5]), logits_of(routed, ids))


def test_everything_mixed_is_the_whole_pass_too(built: Build, ids: torch.Tensor) -> None:
    for family in ("llama with a tied head", "gemma3_text", "phi3"):
        model = opened(built(family, WHOLE, **EVERYTHING))
        close(in_pieces(model, ids, [6, 1]), logits_of(model, ids))
        assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))


PROMPT_LENGTHS = (12, 3, 7, 1)


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in PROMPT_LENGTHS]


def test_left_padding_changes_nothing(routed: PreTrainedModel) -> None:
    ids, mask = left_padded(prompts())
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.inference_mode():
        logits = routed(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for row, prompt in enumerate(prompts()):
        close(logits[row, -len(prompt) :], logits_of(routed, prompt[None])[0])
    texts = greedy(routed, ids, attention_mask=mask)
    for row, prompt in enumerate(prompts()):
        assert torch.equal(texts[row, ids.shape[1] :], greedy(routed, prompt[None])[0, len(prompt) :])


def test_right_padding_changes_nothing_before_it(routed: PreTrainedModel) -> None:
    ids, mask = left_padded(prompts())
    with torch.inference_mode():
        logits = routed(input_ids=ids.flip(1), attention_mask=mask.flip(1)).logits
    for row, prompt in enumerate(prompts()):
        close(logits[row, : len(prompt)], logits_of(routed, prompt.flip(0)[None])[0])


def test_beams_and_samples_are_those_of_whole_passes(routed: PreTrainedModel) -> None:
    ids, mask = left_padded(prompts())
    for settings in (
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 1.5},
        {"do_sample": True, "num_beams": 2},
    ):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(4)
            texts.append(greedy(routed, ids, attention_mask=mask, use_cache=use_cache, **settings))
        assert torch.equal(*texts), settings


def test_a_static_cache_and_prefill_in_chunks_say_the_same(routed: PreTrainedModel) -> None:
    ids, mask = left_padded(prompts())
    expected = greedy(routed, ids, attention_mask=mask)
    assert torch.equal(greedy(routed, ids, attention_mask=mask, cache_implementation="static"), expected)
    assert torch.equal(greedy(routed, ids, attention_mask=mask, prefill_chunk_size=5), expected)


def test_a_cached_prompt_goes_on_as_if_it_had_been_read(routed: PreTrainedModel, ids: torch.Tensor) -> None:
    """A prompt's cache is copied for each question, and what generate returns is taken up again."""
    with torch.inference_mode():
        cache = routed(input_ids=ids[:1, :10], use_cache=True).past_key_values
    for place in (0, 1):
        question = torch.cat([ids[:1, :10], ids[place : place + 1, 10:15]], dim=1)
        assert torch.equal(greedy(routed, question, past_key_values=copy.deepcopy(cache)), greedy(routed, question))
    first = greedy(routed, ids, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, ids[:, :3]], dim=1)
    mask = torch.ones_like(longer)  # else generate takes a pad that it generated for padding
    expected = greedy(routed, longer, attention_mask=mask)
    assert torch.equal(greedy(routed, longer, attention_mask=mask, past_key_values=first.past_key_values), expected)


@pytest.mark.parametrize("router", [ROUTERS["context"], ROUTERS["two contexts"], PREFIX], ids=["context", "two", "prefix"])
def test_assistants_are_refused_where_tokens_cannot_be_taken_back(built: Build, ids: torch.Tensor, router: Any) -> None:
    model, assistant = opened(built(method="gating", router=router)), opened(built() / "base")
    for kwargs in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="cannot take tokens back"):
            greedy(model, ids[:1], **kwargs)
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        cache.crop(0)
        assert model(input_ids=ids[:, :1], past_key_values=cache).logits.shape[1] == 1
        cache.crop(-5)
        with pytest.raises(ValueError, match="must have read what the cache holds"):
            model(input_ids=ids[:, :1], past_key_values=cache)


def test_assistants_serve_a_token_router(built: Build, ids: torch.Tensor) -> None:
    model, assistant = opened(built(method="gating", router=TOKEN)), opened(built() / "base")
    for kwargs in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(greedy(model, ids[:1], **kwargs), greedy(model, ids[:1]))


def test_embedded_inputs_are_read_like_tokens(routed: PreTrainedModel, ids: torch.Tensor) -> None:
    embedded = routed.get_input_embeddings()(ids)
    with torch.inference_mode():
        close(routed(inputs_embeds=embedded).logits, logits_of(routed, ids))
    assert torch.equal(greedy(routed, None, inputs_embeds=embedded), greedy(routed, ids)[:, ids.shape[1] :])


def test_embedded_inputs_are_refused_where_the_router_reads_the_embedding(built: Build, ids: torch.Tensor) -> None:
    model = opened(built(experts=WHOLE, **EVERYTHING))
    logits_of(model, ids)  # whose decisions must not be taken for those of the next pass
    with pytest.raises(RuntimeError, match="has not run"):
        model(inputs_embeds=torch.randn(2, 5, 32))


def test_packed_sequences_are_refused_by_routers_that_average(built: Build, ids: torch.Tensor) -> None:
    """Several texts in one row, told apart by their positions: an average would go from one to the next."""
    packed = ids[:1]
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    free = opened(built(method="gating", router=TOKEN))
    with torch.inference_mode():
        logits = free(input_ids=packed, position_ids=positions, use_cache=False).logits
    close(logits[:, 10:], logits_of(free, packed[:, 10:]))
    model = opened(built(method="gating", router=ROUTERS["context"]))
    with pytest.raises(ValueError, match="one sequence per row"):
        model(input_ids=packed, position_ids=positions, use_cache=False)
    with pytest.raises(ValueError, match="one sequence per row"):
        model(input_ids=packed[:, :1], position_ids=torch.tensor([[7]]), use_cache=False)
    with torch.inference_mode():
        whole = model(input_ids=packed, position_ids=torch.arange(24)[None], use_cache=False).logits
    assert_close(whole, logits_of(model, packed))


def test_continuous_batching_serves_token_routers_and_is_refused_by_the_others(built: Build) -> None:
    settings = {
        "generation_config": GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0),
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64),
    }

    def batched(router: dict[str, Any]) -> tuple[PreTrainedModel, list[Any]]:
        model = opened(built(method="gating", router=router), attn_implementation="sdpa")
        inputs = [prompt.tolist() for prompt in prompts()]
        answers = model.generate_batch(inputs, **settings)
        return model, [answers[key] for key in sorted(answers)]

    model, answers = batched(TOKEN)
    for prompt, answer in zip(prompts(), answers, strict=True):
        assert answer.generated_tokens == greedy(model, prompt[None], max_new_tokens=5)[0, len(prompt) :].tolist()
    _, answers = batched(ROUTERS["context"])
    assert all("one sequence per row" in answer.error and not answer.generated_tokens for answer in answers)


@pytest.mark.parametrize("router", [ROUTERS["context"], PREFIX], ids=["context", "prefix"])
def test_what_the_routers_have_not_read_is_refused(built: Build, ids: torch.Tensor, router: Any) -> None:
    model = opened(built(method="gating", router=router))
    base = opened(built() / "base")
    with torch.inference_mode():
        foreign = base(input_ids=ids[:, :8], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="must have read what the cache holds"):
            model(input_ids=ids[:, 8:], past_key_values=foreign)
        model.use_expert(0)
        forced = model(input_ids=ids[:, :8], use_cache=True).past_key_values
        model.use_expert(None)
        with pytest.raises(ValueError, match="must have read what the cache holds"):
            model(input_ids=ids[:, 8:], past_key_values=forced)
        mixed = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        model.use_expert(0)
        mixed = model(input_ids=ids[:, 4:8], past_key_values=mixed).past_key_values
        model.use_expert(None)
        with pytest.raises(ValueError, match="must have read what the cache holds"):
            model(input_ids=ids[:, 8:], past_key_values=mixed)
        square = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None].expand(len(ids), 1, -1, -1)
        with pytest.raises(ValueError, match="which tokens are pads"):
            model(input_ids=ids, attention_mask=square)


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["ffn", "everything"])
def test_logits_of_chosen_tokens(built: Build, ids: torch.Tensor, settings: dict[str, Any]) -> None:
    model = opened(built("llama", WHOLE, **(settings or {"method": "gating", "router": ROUTERS["context"]})))
    whole = logits_of(model, ids)
    for kept in (torch.tensor([0, 1, 5]), torch.arange(ids.shape[1]).flip(0)):
        with torch.inference_mode():
            close(model(input_ids=ids, logits_to_keep=kept).logits, whole[:, kept])
    with torch.inference_mode():
        close(model(input_ids=ids, logits_to_keep=3).logits, whole[:, -3:])


@pytest.mark.parametrize("router", [TOKEN, ROUTERS["context"]], ids=["token", "context"])
def test_threads_take_turns(built: Build, router: dict[str, Any]) -> None:
    model = opened(built(method="gating", router=router))
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 90, (1, length), generator=generator) for length in range(5, 35)]
    expected = [logits_of(model, text) for text in texts]

    def run(text: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=text).logits

    with ThreadPoolExecutor(3) as pool:
        for ours, theirs in zip(pool.map(run, texts), expected, strict=True):
            close(ours, theirs)


# --- one expert


@pytest.mark.parametrize("family", FAMILY_SETTINGS)
def test_everything_mixed_is_each_expert_s_own_model(built: Build, ids: torch.Tensor, family: str) -> None:
    folder, out = built(family), built(family, WHOLE, **EVERYTHING)
    model, checkpoint = opened(out), open_checkpoint(out)
    free = logits_of(model, ids)
    singles = [logits_of(opened(folder / name), ids) for name in ("base", "one", "two")]
    for place, expected in enumerate(singles):
        model.use_expert(place)
        assert_close(logits_of(model, ids), expected)
        model.use_expert(checkpoint.names[place])
        assert_close(logits_of(model, ids), expected)
        assert torch.equal(greedy(model, ids), greedy(opened(folder / ("base", "one", "two")[place]), ids))
    model.use_expert(torch.tensor([2, 1]))
    close(logits_of(model, ids), torch.stack([singles[2][0], singles[1][1]]))
    model.use_expert(None)
    assert_close(logits_of(model, ids), free)


# --- training


def trained_step(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the mean over batches, all of them forward before one backward."""
    model.train()
    model.zero_grad()
    loss = torch.stack([model(**batch, labels=batch["input_ids"]).loss for batch in batches]).mean()
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing_changes_no_gradient(routed: PreTrainedModel, reentrant: bool) -> None:
    ids, mask = left_padded(prompts())
    given = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:2].flip(1), "attention_mask": mask[:2].flip(1)}]
    loss, gradients = trained_step(routed, given)
    assert any(name.endswith("router.gate") for name in gradients)
    assert {name for name, parameter in routed.named_parameters() if parameter.requires_grad} == set(gradients)
    shared = len([module for module in routed.modules() if isinstance(module, Router)]) == 1
    if reentrant and shared:
        with pytest.raises(ValueError, match="use_reentrant"):
            routed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        return
    routed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again, others = trained_step(routed, given)
    assert again == pytest.approx(loss, abs=1e-6)
    assert gradients.keys() == others.keys()
    for name in gradients:
        close(others[name], gradients[name])


@pytest.mark.parametrize("common", [{}, {"always_on": {"expert": "base", "weight": 0.5, "apart": True}}], ids=["", "common"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "tuple"])
def test_hidden_states_and_attentions_are_given(built: Build, ids: torch.Tensor, common: dict[str, Any], named: bool) -> None:
    folder = built(method="gating", router=TOKEN, **common)
    said = {"output_hidden_states": True, "output_attentions": True, "return_dict": named}
    modeling_utils._CAN_RECORD_REGISTRY.clear()  # of other models of this process
    for opens in (AutoModelForCausalLM, AutoModel):
        opened_model = opens.from_pretrained(folder, attn_implementation="eager").eval()
        for model in (opened_model, opened_model.base_model):
            with torch.inference_mode():
                output = model(input_ids=ids, **said)
            found = [output.hidden_states, output.attentions] if named else [each for each in output if isinstance(each, tuple)]
            assert [len(each or ()) for each in found] == [model.config.num_hidden_layers + 1, model.config.num_hidden_layers]
            assert {len(one) for each in found for one in each} == {len(ids)}


def test_training_adds_only_jitter_and_noise(built: Build, ids: torch.Tensor) -> None:
    plain = opened(built(method="gating", router=TOKEN))
    expected = logits_of(plain, ids)
    assert_close(logits_of(plain.train(), ids), expected)
    for settings in ({"jitter": 0.3}, {"noise": 1.0}):
        model = opened(built(method="gating", router={**TOKEN, **settings}))
        assert_close(logits_of(model, ids), expected)
        model.train()
        torch.manual_seed(1)
        first, second = logits_of(model, ids), logits_of(model, ids)
        assert not torch.allclose(first, second, atol=1e-3)
        model.use_expert(1)
        assert_close(logits_of(model, ids), logits_of(model.eval(), ids))


# --- places, precisions, other loaders


def parts_of(model: PreTrainedModel, offloaded: str) -> dict[str, str]:
    names = [f"model.{name}" for name, _ in model.model.named_children() if name != "layers"]
    names += [f"model.layers.{layer}" for layer in range(len(model.model.layers))] + ["lm_head"]
    return {name: offloaded if name in ("model.layers.1", "model.layers.2", "model.norm") else "cpu" for name in names}


def test_device_maps_change_nothing(built: Build, ids: torch.Tensor, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    for out in (built(method="gating", router=ROUTERS["two contexts"]), built(experts=WHOLE, **EVERYTHING)):
        model = opened(out)
        expected, text = logits_of(model, ids), greedy(model, ids)
        for device_map in ("cpu", "auto", parts_of(model, "cpu"), parts_of(model, "disk")):
            placed = opened(out, device_map=device_map, offload_folder=tmp_path)
            if isinstance(device_map, dict) and "disk" in device_map.values():
                assert any(parameter.device.type == "meta" for parameter in placed.parameters())
            assert_close(logits_of(placed, ids), expected)
            assert torch.equal(greedy(placed, ids), text)


def test_half_precision(routed: PreTrainedModel, ids: torch.Tensor, tmp_path: Path) -> None:
    dtype = torch.bfloat16
    exact = logits_of(routed, ids).log_softmax(-1)
    routed.save_pretrained(tmp_path / "whole")
    model = opened(tmp_path / "whole", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    logits = logits_of(model, ids)
    assert logits.dtype == dtype
    assert (logits.float().log_softmax(-1) - exact).abs().mean() < 0.05 * exact.std()
    assert greedy(model, ids).shape == (2, 32)
    model.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half").eval()
    assert again.dtype == dtype
    assert_close(logits_of(again, ids), logits)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["two contexts", "context per feature"])
def test_blocks_compile_without_a_break(built: Build, ids: torch.Tensor, router: str) -> None:
    model = opened(built(method="routing", top_k=2, router=ROUTERS[router]))
    expected = logits_of(model, ids)
    layer = model.model.layers[1]
    block = layer.self_attn.q_proj if isinstance(layer.self_attn.q_proj, Mixed) else layer.mlp
    x = torch.randn(2, 6, 32)
    with torch.inference_mode():
        eager = block(x)
        close(torch.compile(block, backend="eager", fullgraph=True)(x), eager)
    model.model.layers[1] = torch.compile(layer, backend="eager", fullgraph=True)
    close(logits_of(model, ids), expected)
    close(in_pieces(model, ids, [9, 1]), expected)
    torch._dynamo.reset()


class Replaced(nn.Module):
    """A linear layer as another engine puts it into a model: no nn.Linear, its weight in another form under another name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.packed + (0 if self.bias is None else self.bias)


def test_four_bits(built: Build, ids: torch.Tensor) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    out = built("llama of width 64", method="gating", router=ROUTERS["context"])  # it counts in blocks of 64
    model = opened(out, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu")
    mixed = [module for module in model.modules() if isinstance(module, Mixed)]
    assert all(isinstance(module.base, bitsandbytes.nn.Linear4bit) for module in mixed if module.base is not None)
    assert all(isinstance(expert, bitsandbytes.nn.Linear4bit) for module in mixed for expert in module.experts)
    exact = dict(opened(out).named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.endswith("router.gate"):
            assert torch.equal(parameter, exact[name]), name
    logits, expected = logits_of(model, ids), logits_of(opened(out), ids)
    assert torch.corrcoef(torch.stack([logits.flatten(), expected.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_config_on_no_device_with_weights_by_name(built: Build, ids: torch.Tensor, family: str) -> None:
    """As serving engines do: the base model from the config alone, its linear layers replaced, weights put in by name."""
    out = built(family, method="gating", router=TOKEN)
    config = AutoConfig.from_pretrained(out)
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    reference = AutoModel.from_pretrained(out, dtype=torch.float32).eval()
    for name, buffer in reference.named_buffers():
        model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer, persistent=False)
    weights = {name.removeprefix("model."): tensor for name, tensor in weights_in(out).items() if name.startswith("model.")}
    model.load_state_dict(weights, assign=True)
    for name in [name for name, module in model.named_modules() if type(module) is nn.Linear]:
        model.set_submodule(name, Replaced(model.get_submodule(name)))
    with torch.inference_mode():
        hidden = model.eval()(
            input_ids=ids[:1], position_ids=torch.arange(ids.shape[1])[None], use_cache=False, return_dict=False
        )[0]
        close(hidden, reference(input_ids=ids[:1]).last_hidden_state)
    assert not config.base_model_tp_plan and not model.tp_plan


def test_experts_are_named_or_refused(built: Build, ids: torch.Tensor) -> None:
    model = opened(built(method="gating", router=ROUTERS["context"]))
    for wrong in (1.7, torch.tensor([0.5, 1.0]), True, "nobody", ["one", "nobody"], 9, -1):
        with pytest.raises(ValueError, match="there is no expert"):
            model.use_expert(wrong)
    rows = []
    for name in ("one", "low"):
        model.use_expert(name)
        rows.append(greedy(model, ids[:1] if name == "one" else ids[1:], num_beams=2))
    model.use_expert(["one", "low"])
    together = greedy(model, ids, num_beams=2)
    assert torch.equal(together, torch.cat(rows))
    model.use_expert(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="2 experts, for 1 sequences"):
        model(input_ids=ids[:1])


def test_embeddings_of_experts_are_not_resized(built: Build) -> None:
    model = opened(built("llama", WHOLE, **EVERYTHING))
    assert model.get_input_embeddings().weight.shape[0] == VOCAB
    with pytest.raises(NotImplementedError, match="embeddings of their own"):
        model.resize_token_embeddings(VOCAB + 4)
