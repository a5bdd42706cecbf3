"""Prefix and prompt adapters as experts: each is PEFT's own model, tokens mix them, and nothing looks ahead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapter_folders import quiet
from conftest import logits_of, save, tiny_model
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.errors import MismatchError, SourceError, UnsupportedError
from modekit.loaded.experts import load_expert
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe

pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
}
KINDS: dict[str, Any] = {
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "projected": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16
    ),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "encoded": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=16),
    "low": LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"]),
}
EXPERTS = [{"name": "itself", "model": "base"}, *({"name": name, "adapter": f"./{name}"} for name in KINDS)]
GATED = {"method": "gating", "router": {"fit": "random", "seed": 3, "temperature": 0.1}}

ONCE = {"fit": "random", "granularity": "sequence", "per": "model"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a base and an adapter of every kind, trained as far as random numbers go."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = root = tmp_path_factory.mktemp(family)
            save(tiny_model(family, **FAMILIES[family]), root / "base")
            for seed, (name, config) in enumerate(KINDS.items()):
                with quiet():
                    model = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), config)
                    torch.manual_seed(seed)
                    for parameter in (each for each in model.parameters() if each.requires_grad):
                        parameter.data += torch.randn_like(parameter)
                    model.save_pretrained(root / name)
        return made[family]

    return folder


def mixture(root: Path, experts: list[dict[str, Any]] = EXPERTS, **said: Any) -> Path:
    """The folder of a mixture, which is built once."""
    recipe = parse_recipe({"base_model": "./base", "experts": experts, "mixture": {**GATED, **said}})
    out = root / recipe.digest()[:16]
    if not out.exists():
        build(make_plan(recipe, root), out)
    return out


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request: pytest.FixtureRequest, bench: Callable[[str], Path]) -> tuple[PreTrainedModel, Path]:
    """A mixture of every kind, and its bench."""
    root = bench(request.param)
    return AutoModelForCausalLM.from_pretrained(mixture(root), dtype=torch.float32).eval(), root


@pytest.fixture
def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Two texts, one behind pads."""
    ids = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask


def in_peft(root: Path, name: str) -> Any:
    with quiet():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "base"), root / name).eval()


def run(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, **kwargs).logits[:, -ids.shape[1] :]
    return logits


@pytest.mark.parametrize("name", KINDS)
def test_an_expert_alone_is_its_own_model(opened: Any, padded: Any, name: str) -> None:
    (model, root), (ids, mask) = opened, padded
    model.use_expert(name)
    own = in_peft(root, name)
    base = run(AutoModelForCausalLM.from_pretrained(root / "base"), ids)
    theirs, ours = run(own, ids, mask), run(model, ids, mask)
    model.use_expert(None)

    assert (run(own, ids) - base).abs().max() > 0.1
    torch.testing.assert_close(ours[mask > 0], theirs[mask > 0], atol=1e-4, rtol=0)
    loaded = run(load_expert(root / "base", root / name), ids, mask)
    torch.testing.assert_close(loaded[mask > 0], theirs[mask > 0], atol=1e-4, rtol=0)


def test_the_base_among_them_is_the_base(opened: Any, padded: Any) -> None:
    (model, root), (ids, mask) = opened, padded
    model.use_expert("itself")
    ours = run(model, ids, mask)
    model.use_expert(None)

    assert torch.equal(ours, run(AutoModelForCausalLM.from_pretrained(root / "base"), ids, mask))


def test_nothing_looks_ahead(opened: Any, padded: Any) -> None:
    (model, _), (ids, _) = opened, padded
    changed = torch.cat([ids[:, :6], ids[:, 6:].flip(1)], dim=1)

    assert torch.equal(run(model, ids)[:, :6], run(model, changed)[:, :6])


def test_tokens_mix_by_their_own_weights(opened: Any, padded: Any) -> None:
    """One layer's attention, by hand: a sum of softmaxes over a prefix and the text, weighted by the token's router."""
    (model, _), (ids, _) = opened, padded
    seen: list[tuple[Any, Any]] = []
    place = model.model.layers[0].self_attn.prefix
    attend = place.attend

    def listening(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, attend(*args, **kwargs)))
        return seen[-1][1]

    place.attend = listening
    try:
        run(model, ids)
    finally:
        del place.attend
    (attention, query, keys, values, _, *_), (ours, _) = seen[-1]
    weights = place._of_pass
    repeat = attention.num_key_value_groups
    total = torch.zeros_like(ours)
    causal = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
    for expert in range(len(EXPERTS)):
        before = place.pairs.get(expert, (keys[0, :, :0], values[0, :, :0]))
        k, v = (torch.cat([a.expand(2, -1, -1, -1), b], 2) for a, b in zip(before, (keys, values), strict=True))
        k, v = (each.repeat_interleave(repeat, 1) for each in (k, v))
        scores = query @ k.transpose(2, 3) * attention.scaling
        cap = getattr(attention, "attn_logit_softcapping", None)
        scores = torch.tanh(scores / cap) * cap if cap and model.config._attn_implementation == "eager" else scores
        scores = scores + torch.cat([torch.zeros(len(causal), k.shape[2] - len(causal)), causal], 1)
        total += weights[..., expert, None, None] * (scores.softmax(-1) @ v).transpose(1, 2)

    assert 0.001 < weights.min() < 0.1 < weights.max() < 0.99
    torch.testing.assert_close(ours, total, atol=1e-5, rtol=0)


def test_a_cache_and_left_padding_change_nothing(opened: Any, padded: Any) -> None:
    (model, _), (ids, mask) = opened, padded
    whole = run(model, ids)
    first = model(input_ids=ids[:, :4], use_cache=True)
    cache = first.past_key_values
    pieces = [run(model, ids[:, 4:9], past_key_values=cache), run(model, ids[:, 9:10], past_key_values=cache)]
    alone = run(model, ids[:1, 4:])

    torch.testing.assert_close(torch.cat(pieces, 1), whole[:, 4:10], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        run(model, ids, mask, position_ids=(mask.cumsum(1) - 1).clamp(0))[:1, 4:], alone, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("expert", ["prefix", "prompt", None])
def test_generating_is_the_whole_pass_again_and_again(opened: Any, padded: Any, expert: str | None) -> None:
    (model, _), (ids, mask) = opened, padded
    model.use_expert(expert)
    written = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    text, seen = ids[:1, 4:], []
    for _ in range(6):
        seen.append(run(model, text)[:, -1:].argmax(-1))
        text = torch.cat([text, seen[-1]], dim=1)
    model.use_expert(None)

    assert torch.equal(written[:1, 11:], torch.cat(seen, 1))


def test_a_mixture_is_proven_saved_and_opened_again(bench: Callable[[str], Path], padded: Any, tmp_path: Path) -> None:
    folder = mixture(bench("llama"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = run(model, padded[0])
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(folder)

    assert is_proven(verify(checkpoint))
    assert torch.equal(logits_of(tmp_path, padded[0]), before)
    assert "prefixes" in (checkpoint.shape.without_vllm or "")


def test_gradients_reach_prefixes_and_gates_alone_where_the_rest_is_frozen(bench: Callable[[str], Path], padded: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixture(bench("llama")), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".prefix.expert_" in name or name.endswith("router.gate"))
    run(model, padded[0])  # whose keys are not kept for the pass with gradients
    model(input_ids=padded[0], labels=padded[0]).loss.backward()

    assert all(each.grad is not None and bool(each.grad.any()) for each in model.parameters() if each.requires_grad)


@pytest.mark.parametrize("apart", [{}, {"apart": True}], ids=["", "apart"])
def test_a_base_that_is_always_on_attends_without_a_prefix(
    bench: Callable[[str], Path], padded: Any, apart: dict[str, bool]
) -> None:
    """Where every expert has one: what the first attention gives, or, apart, the logits, are in part the base's."""
    common = {"expert": "base", "weight": 0.25, **apart}
    folder, (ids, _) = mixture(bench("llama"), [{"name": "prefix", "adapter": "./prefix"}], always_on=common), padded
    model, found = AutoModelForCausalLM.from_pretrained(folder).eval(), list[torch.Tensor]()
    base = AutoModelForCausalLM.from_pretrained(bench("llama") / "base").eval()
    for each in (model, base):
        each.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    own = [run(model, ids), run(base, ids)]
    model.use_expert("prefix")
    forced = run(model, ids)
    mixed, plain, alone = [*own, forced] if apart else [each for each in found if each.shape[:2] == ids.shape]
    torch.testing.assert_close(mixed, 0.75 * alone + 0.25 * plain, atol=1e-5, rtol=0)


def test_lora_alone_says_nothing_of_prefixes(bench: Callable[[str], Path]) -> None:
    folder = mixture(bench("llama"), [EXPERTS[0], EXPERTS[-1]])

    assert "prefixes" not in (folder / "config.json").read_text()


@pytest.mark.parametrize(
    ("said", "output", "what"),
    [
        (
            {"modules": "all", "router": {"fit": "random", "granularity": "sequence", "per": "model"}},
            {},
            "modules cannot be all",
        ),
        ({"router": {"fit": "random", "per": "feature"}}, {}, "per cannot be feature"),
        ({"router": {"fit": "arrow"}}, {}, "scores low-rank changes"),
        ({}, {"format": "native"}, "no place for a prefix"),
    ],
)
def test_what_makes_no_sense_is_refused(bench: Callable[[str], Path], said: Any, output: Any, what: str) -> None:
    recipe = {"base_model": "./base", "experts": EXPERTS[:2], "mixture": {**GATED, **said}, "output": output}

    with pytest.raises(UnsupportedError, match=what):
        make_plan(parse_recipe(recipe), bench("llama"))


@pytest.mark.parametrize(
    ("change", "shape", "error"),
    [
        ({"num_virtual_tokens": 6}, (5, 96), MismatchError),
        ({"num_virtual_tokens": 0}, (5, 96), SourceError),
        ({"num_layers": 4}, (5, 96), MismatchError),
        ({"num_transformer_submodules": 2}, (5, 96), SourceError),
        ({"frozen_prefix": True}, (5, 96), UnsupportedError),
        ({}, (5, 95), MismatchError),
    ],
)
def test_files_that_do_not_fit_are_refused(
    bench: Callable[[str], Path], tmp_path: Path, change: dict[str, Any], shape: tuple[int, int], error: type[Exception]
) -> None:
    root, config = bench("llama"), {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, "num_layers": 3, **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"prompt_embeddings": torch.zeros(shape)}, tmp_path / "adapter_model.safetensors")
    experts = [EXPERTS[0], {"name": "law", "adapter": str(tmp_path)}]

    with pytest.raises(error):
        make_plan(parse_recipe({"base_model": "./base", "experts": experts, "mixture": GATED}), root)
