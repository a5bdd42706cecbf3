"""Promises 1, 2 and 8 of the design for every row of the families table, in float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import SMALL, logits_of, save, tiny_model
from modekit.building.build import build
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import UnsupportedError
from modekit.evaluation.inspection.passes import decisions
from modekit.loaded.native import DenseView
from modekit.loaded.shapes import mixture_of
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.sources.compatible import MUST_MATCH, _plain
from modekit.sources.families import DECODERS, FAMILIES, family_of
from modekit.sources.family import Family
from modekit.sources.native import Native
from modekit.sources.natives import NATIVES, choose_native
from modekit.sources.pairs import PAIRS
from modekit.text.sequences import Batch, TokenSequence
from pair_models import PAIR_FAMILIES
from rounding import assert_close

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
QWEN3_5 = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 2.0, "attention_multiplier": 0.2}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "mixtral", {}),
    ("llama", "mixtral", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    ("llama", "mixtral", {"head_dim": 16, "num_key_value_heads": 1}),
    ("llama", "mixtral", {"rope_parameters": LLAMA3_ROPE}),
    ("llama", "mixtral", {"rope_parameters": YARN_ROPE}),
    ("llama", "mixtral", {"rope_parameters": DYNAMIC_ROPE, "max_position_embeddings": 16}),
    ("llama", "granitemoe", {"attention_bias": True}),
    ("mistral", "mixtral", {"sliding_window": 4}),
    ("mistral", "mixtral", {"sliding_window": None, "head_dim": 16}),
    ("qwen2", "qwen2_moe", {}),
    ("qwen2", "qwen2_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("qwen3", "qwen3_moe", {"head_dim": 16}),
    ("qwen3", "qwen3_moe", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    (
        "granite",
        "granitemoe",
        GRANITE,
    ),
    ("olmo2", "flex_olmo", {"rms_norm_eps": 1e-3}),
    ("cohere2", "cohere2_moe", {"sliding_window": 4, "layer_types": WINDOWED, "logit_scale": 0.3}),
    ("ernie4_5", "ernie4_5_moe", {"head_dim": 16}),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", {"head_dim": 8}),
    (
        "qwen3_5_text",
        "qwen3_5_moe_text",
        QWEN3_5,
    ),
]
IDS = [f"{dense}-{native}-{place}" for place, (dense, native, _) in enumerate(CASES)]


def recipe_of(models: list[str], mixture: dict[str, Any]) -> Any:
    experts = [{"name": f"e{place}", "model": model} for place, model in enumerate(models)]
    return parse_recipe({"base_model": "./base", "experts": experts, "mixture": mixture})


def built(root: Path, name: str, models: list[str], mixture: dict[str, Any]) -> Path:
    build(make_plan(recipe_of(models, mixture), root), root / name)
    return root / name


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def family_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    dense, native, overrides = request.param
    root = tmp_path_factory.mktemp("family")
    save(tiny_model(dense, seed=0, **overrides), root / "base")
    save(tiny_model(dense, seed=1, **overrides), root / "other")
    return root, native


FIRST_OF_NATIVE = {case[1]: (name, case) for name, case in reversed([*zip(IDS, CASES, strict=True)])}
EACH_NATIVE = pytest.mark.parametrize(
    "family_case", [pytest.param(case, id=name) for name, case in FIRST_OF_NATIVE.values()], indirect=True
)


def test_every_row_has_a_case() -> None:
    assert {(row.family.model_type, row.native_type) for row in NATIVES} == {(dense, native) for dense, native, _ in CASES}


@EACH_NATIVE
def test_a_plan_says_which_engines_run_it_and_what_to_do_for_others(family_case: tuple[Path, str]) -> None:
    root, _ = family_case
    plan = make_plan(recipe_of(["base"] * 2, {"method": "routing", "top_k": 1, "router": {"fit": "random"}}), root)
    alone = [note for note in plan.notes if "llama.cpp does not run" in note]
    assert bool(alone) == (plan.shape.also_runs_in == "transformers alone")


@pytest.mark.parametrize("top_k", [1, 2])
def test_copies_of_one_model_are_that_model(family_case: tuple[Path, str], ids: torch.Tensor, top_k: int) -> None:
    root, native = family_case
    mixture = {"method": "routing", "top_k": top_k, "router": {"fit": "random", "temperature": 0.01}}
    out = built(root, f"copies{top_k}", ["base"] * 3, mixture)
    assert open_checkpoint(out).shape.native_type == native
    torch.testing.assert_close(logits_of(out, ids), logits_of(root / "base", ids), atol=1e-4, rtol=0)


@EACH_NATIVE
def test_copies_under_a_linear_mixture_are_that_model(family_case: tuple[Path, str], ids: torch.Tensor) -> None:
    root, _ = family_case
    out = built(root, "linear", ["base"] * 3, {"method": "linear"})
    torch.testing.assert_close(logits_of(out, ids), logits_of(root / "base", ids), atol=1e-4, rtol=0)


def test_router_fixed_on_an_expert_is_the_model_with_its_parts(family_case: tuple[Path, str], ids: torch.Tensor) -> None:
    """The oracle hook and the dense view both equal a dense model put together by hand."""
    root, _ = family_case
    routing = {"method": "routing", "top_k": 2, "router": {"fit": "random"}}
    out = built(root, "forced", ["base", "./other"], routing)
    checkpoint = open_checkpoint(out)
    by_hand = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32).eval()
    other = dict(AutoModelForCausalLM.from_pretrained(root / "other", dtype=torch.float32).named_parameters())
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            if any(name.endswith(suffix) for suffix in checkpoint.shape.native.family.decoder.mlp.values()):
                parameter.copy_(other[name])
    expected = logits_of(by_hand, ids)
    assert not torch.allclose(expected, logits_of(root / "base", ids), atol=1e-2)
    mixture = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    free = logits_of(mixture, ids)
    with mixture_of(mixture, checkpoint).forced(1):
        torch.testing.assert_close(logits_of(mixture, ids), expected, atol=1e-4, rtol=0)
    assert_close(logits_of(mixture, ids), free)
    view = DenseView(checkpoint)
    view.use_expert(1)
    torch.testing.assert_close(logits_of(view.model, ids), expected, atol=1e-5, rtol=0)
    view.use_expert(0)
    torch.testing.assert_close(logits_of(view.model, ids), logits_of(root / "base", ids), atol=1e-5, rtol=0)


@EACH_NATIVE
def test_an_expert_left_out_is_a_mixture_without_it(family_case: tuple[Path, str], ids: torch.Tensor) -> None:
    """All of the others weigh in, or the best of them."""
    root, _ = family_case
    if not (root / "third").exists():
        save(tiny_model(seed=2, **_dense_config(root)), root / "third")
    routing = {"method": "routing", "router": {"fit": "random", "seed": 3}}
    whole = built(root, "of three", ["base", "./other", "./third"], {**routing, "top_k": 2})
    rest = built(root, "of two", ["base", "./third"], {**routing, "top_k": 2})
    checkpoint, without = open_checkpoint(whole), open_checkpoint(rest)
    mixture = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    smaller = AutoModelForCausalLM.from_pretrained(rest, dtype=torch.float32).eval()
    for gate, kept in zip(mixture_of(mixture, checkpoint).gates(), mixture_of(smaller, without).gates(), strict=True):
        kept.data = gate.data[[0, 2]].clone()
    free = logits_of(mixture, ids)
    with mixture_of(mixture, checkpoint).left_out(1):
        left = logits_of(mixture, ids)
    torch.testing.assert_close(left, logits_of(smaller, ids), atol=1e-4, rtol=0)
    assert not torch.allclose(left, free, atol=1e-2)
    assert_close(logits_of(mixture, ids), free)
    mixture_of(mixture, checkpoint).set_top_k(1)
    mixture_of(smaller, without).set_top_k(1)
    with mixture_of(mixture, checkpoint).left_out(1):
        torch.testing.assert_close(logits_of(mixture, ids), logits_of(smaller, ids), atol=1e-4, rtol=0)


def _dense_config(root: Path) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(root / "base").to_dict()
    return {key: value for key, value in config.items() if key not in {"architectures", "transformers_version", "dtype"}}


@EACH_NATIVE
def test_weights_are_those_that_the_layers_use(family_case: tuple[Path, str], ids: torch.Tensor) -> None:
    """The experts' outputs, summed with them, are what the native block gives."""
    root, _ = family_case
    routing = {"method": "routing", "top_k": 2, "router": {"fit": "random", "seed": 3}}
    out = built(root, "weighed", ["base", "./other", "base"], routing)
    checkpoint = open_checkpoint(out)
    mixture = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in mixture.model.layers:
        block = layer.get_submodule(checkpoint.shape.native.block_module)
        block.register_forward_hook(lambda _m, args, y: seen.append((args[0], y)))
    with torch.inference_mode(), mixture_of(mixture, checkpoint).traced() as trace:
        mixture(input_ids=ids)
        batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), (0, 1))
        sequences = [TokenSequence(tuple(row)) for row in ids.tolist()]
        made = [torch.from_numpy(each.weights_RSE) for _, each in decisions(checkpoint, trace, batch, sequences)]
        weights_LBSE = torch.stack(made, 1)
    view = DenseView(checkpoint)
    expected = [torch.zeros_like(y) for _, y in seen]
    said: list[torch.Tensor] = []
    for ffn, (x, _) in zip(view.router_inputs(), seen, strict=True):
        ffn.register_forward_pre_hook(lambda _m, _args, x=x: (x,))
        ffn.register_forward_hook(lambda _m, _args, y: said.append(y))
    for expert in range(3):
        view.use_expert(expert)
        said.clear()
        logits_of(view.model, ids)
        for number, y in enumerate(said):
            expected[number] += weights_LBSE[number, ..., expert, None] * y
    for (_, y), by_hand in zip(seen, expected, strict=True):
        torch.testing.assert_close(y, by_hand, atol=1e-4, rtol=1e-4)


@EACH_NATIVE
def test_router_module_reads_the_input_of_the_dense_ffn(family_case: tuple[Path, str], ids: torch.Tensor) -> None:
    """What is captured for a fit is what the native router sees."""
    root, _ = family_case
    out = built(root, "tap", ["base", "base"], {"method": "routing", "top_k": 1, "router": {"fit": "random"}})
    checkpoint = open_checkpoint(out)
    mixture = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    seen: dict[str, list[torch.Tensor]] = {"native": [], "dense": []}
    for layer in mixture.model.layers:
        layer.get_submodule(checkpoint.shape.native.router_module).register_forward_pre_hook(
            lambda _m, args: seen["native"].append(args[0].reshape(-1, SMALL["hidden_size"]))
        )
    view = DenseView(checkpoint)
    for module in view.router_inputs():
        module.register_forward_pre_hook(lambda _m, args: seen["dense"].append(args[0].reshape(-1, SMALL["hidden_size"])))
    logits_of(mixture, ids)
    logits_of(view.model, ids)
    for native, dense in zip(seen["native"], seen["dense"], strict=True):
        torch.testing.assert_close(native, dense, atol=1e-4, rtol=0)


@EACH_NATIVE
def test_no_tensor_is_without_a_number(family_case: tuple[Path, str]) -> None:
    """An engine may refuse to load one: vLLM does."""
    root, _ = family_case
    folder = built(root, "full", ["base", "./other"], {"top_k": 2, "router": {"fit": "random"}})
    assert all(ref.numel for ref in open_checkpoint(folder).tensors.values())


def test_engines_are_named_for_attention_with_biases(tmp_path: Path) -> None:
    """The class of GraniteMoE in vLLM computes something else without a word."""
    for model_type in ("llama", "granite"):
        for name, seed in (("base", 0), ("expert0", 1)):
            save(tiny_model(model_type, seed=seed, attention_bias=True), tmp_path / model_type / name)
        folder = built(tmp_path / model_type, "OUT", ["./expert0", "base"], {"method": "gating", "router": {"fit": "random"}})
        said = open_checkpoint(folder).shape
        assert said.native_type == "granitemoe" and "--model-impl transformers" in said.also_runs_in


@pytest.mark.parametrize("family", [*DECODERS, *PAIRS], ids=lambda family: family.model_type + family.variant)
def test_written_out_defaults_are_those_of_transformers(family: Family) -> None:
    """A config.json that is silent means the dense class's default; the table must know the same one."""
    silent = AutoConfig.for_model(family.model_type).to_dict()
    for key, value in family.defaults.items():
        assert silent[key] == value, key
    if family.pair:
        assert silent["is_encoder_decoder"]
        return
    if family.head_dim is not None:
        assert silent["head_dim"] == family.head_dim
    else:
        assert silent.get("head_dim") in {None, silent["hidden_size"] // silent["num_attention_heads"]}
    rope = silent["rope_parameters"]
    assert rope.get("full_attention", rope)["rope_theta"] == family.rope_theta


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({**SMALL, "model_type": "gemma2"}, "no native architecture"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({**SMALL, "model_type": "llama", "mlp_bias": True}, "mlp_bias"),
        ({**SMALL, "model_type": "llama", "attention_bias": True, "head_dim": 16}, "head_dim"),
        ({**SMALL, "model_type": "llama", "hidden_act": "gelu"}, "SiLU"),
        ({**SMALL, "model_type": "mistral", "head_dim": 8, "layer_types": WINDOWED}, "attention window"),
    ],
)
def test_what_cannot_be_said_is_refused_with_the_reason(config: dict[str, Any], reason: str) -> None:
    try:
        native, tried = choose_native(family_of(config, where="base_model"), config)
    except UnsupportedError as error:
        assert reason in str(error)
    else:
        assert native is None and any(reason in each for each in tried)


@pytest.mark.parametrize(("dense", "native", "overrides"), CASES, ids=IDS)
def test_an_old_and_silent_config_means_the_same(dense: str, native: str, overrides: dict[str, Any]) -> None:
    """config.json as older tools wrote it: no layer_types, rope in two keys, nothing that equals the default."""
    full = AutoConfig.for_model(dense, **{**SMALL, **overrides}).to_dict()
    old = {key: value for key, value in full.items() if value != getattr(AutoConfig.for_model(dense), key, ...)}
    old |= {key: full[key] for key in ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size")}
    old.pop("layer_types", None)
    old |= {"sliding_window_pattern": 2} if dense == "cohere2" else {}
    old |= {"full_attention_interval": 2} if dense == "qwen3_5_text" else {}
    rope = {key: value for key, value in full["rope_parameters"].items() if key != "partial_rotary_factor"}
    if rope["rope_type"] == "default":
        old |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
        old.pop("rope_parameters", None)
    row, other = (choose_native(family_of(config, where="base_model"), config)[0] for config in (full, old))
    assert row is other and row is not None and row.native_type == native
    sizes: dict[str, Any] = {"experts": 2, "top_k": 1, "expert_hidden": 48, "dtype": "float32"}
    ours, theirs = row.config(full, **sizes), row.config(old, **sizes)
    mentioned = AutoConfig.for_model(native).to_dict().keys() & theirs.keys()
    for key in mentioned - {"rope_parameters"}:
        assert ours[key] == theirs[key], key
    assert {**ours["rope_parameters"], "partial_rotary_factor": 0} == {**theirs["rope_parameters"], "partial_rotary_factor": 0}


LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 2.1, 2.2]}
OLD: dict[str, dict[str, Any]] = {
    **{f"silent {family.model_type}": {"model_type": family.model_type} for family in FAMILIES},
    "silent t5, gated": {"model_type": "t5", "feed_forward_proj": "gated-gelu"},
    "yarn": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "dynamic": {"model_type": "qwen2", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "longrope": {
        **{"model_type": "phi3", "rope_scaling": LONG, "partial_rotary_factor": 0.75},
        **{"original_max_position_embeddings": 64, "max_position_embeddings": 256},
    },
    "olmo3 with yarn": {
        **{"model_type": "olmo3", "rope_theta": 5e5},
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    },
    "half of each head": {"model_type": "glm4", "partial_rotary_factor": 0.5, "rope_theta": 10_000.0},
    "a quarter": {"model_type": "phi3", "partial_rotary_factor": 0.25},
}


@pytest.mark.parametrize("case", OLD)
def test_a_config_of_transformers_4_is_no_other_architecture_than_one_of_5(case: str) -> None:
    """A fine-tune that the current version saved, of a base that an older one did."""
    old = {**PAIR_FAMILIES.get(OLD[case]["model_type"], SMALL), **OLD[case]}
    new, family = AutoConfig.for_model(**copy.deepcopy(old)).to_dict(), family_of(old, where="base_model")
    said, meant = (family.settings(each, MUST_MATCH, where="model") for each in (old, new))
    assert {key: _plain(value) for key, value in said.items()} == {key: _plain(value) for key, value in meant.items()}


def test_a_head_of_which_another_share_turns_is_another_architecture() -> None:
    family = family_of({"model_type": "phi3"}, where="base_model")
    shares = ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.25}})
    one, other = (family.settings({**SMALL, **each}, MUST_MATCH, where="model") for each in shares)
    assert one["rope_parameters"] != other["rope_parameters"]


@pytest.mark.parametrize("row", NATIVES, ids=lambda row: f"{row.family.model_type}->{row.native_type}")
def test_every_default_in_which_the_two_classes_differ_is_written_out(row: Native) -> None:
    dense, native = (AutoConfig.for_model(name).to_dict() for name in (row.family.model_type, row.native_type))
    silent = {key: dense[key] for key in ("model_type", "hidden_size", "intermediate_size", "vocab_size")}
    silent |= {key: dense[key] for key in ("num_hidden_layers", "num_attention_heads")}
    written = row.config(silent, experts=2, top_k=1, expert_hidden=dense["intermediate_size"], dtype="float32")
    meaningless = {
        "architectures",
        "model_type",
        "dtype",
        "transformers_version",
        "_name_or_path",
        "use_cache",
        "initializer_range",
    }
    for key in dense.keys() & native.keys() - meaningless - row.dropped - row.computed.keys() - {
        "layer_types",
        "rope_parameters",
    }:
        if dense[key] != native[key] and key not in row.fixed and not (key == "head_dim" and not row.writes_head_dim):
            assert key in written and written[key] == dense[key], key
