"""Lexical routers in native checkpoints: promises 1 and 2 with the channels in place; their average against a direct sum."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import DOMAINS, VOCAB, logits_of, save, tiny_model, write_text
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.evidence import read_table
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import UnsupportedError
from modekit.loaded.native import DenseView
from modekit.loaded.shapes import mixture_of
from modekit.planning.channels import Channels
from modekit.planning.make import make_plan
from modekit.planning.recency import turns_per_token
from modekit.recipes.read import parse_recipe
from modekit.sources.names import in_layer, split_layer
from modekit.sources.natives import NATIVES
from sources.test_families import CASES

pytestmark = pytest.mark.usefixtures("short_tables")

ROWS = {(row.family.model_type, row.native_type): row for row in NATIVES}
WIDE = [case for case in CASES if not isinstance(ROWS[case[:2]].widening, str)]
WIDE += [
    ("llama", "mixtral", {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 1}),
    ("llama", "mixtral", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}),  # 112 is no multiple of 9
]
IDS = [f"{dense}-{native}-{place}" for place, (dense, native, _) in enumerate(WIDE)]


def recipe_of(models: list[str], **router: Any) -> Any:
    experts = [
        {"name": f"e{place}", "model": model, "text": f"./text/{domain}.jsonl"}
        for place, (model, domain) in enumerate(zip(models, DOMAINS, strict=False))
    ]
    mixture = {"method": "routing", "top_k": router.pop("top_k", 2), "router": {"fit": "lexical", **router}}
    output = {"format": "plain", "carry": "ffn"}
    return parse_recipe({"base_model": "./base", "experts": experts, "mixture": mixture, "output": output})


def built(root: Path, name: str, models: list[str], **router: Any) -> Path:
    build(make_plan(recipe_of(models, **router), root), root / name)
    return root / name


@pytest.fixture(scope="module", params=WIDE, ids=IDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    dense, native, overrides = request.param
    root = tmp_path_factory.mktemp("wide")
    save(tiny_model(dense, seed=0, **overrides), root / "base")
    save(tiny_model(dense, seed=1, **overrides), root / "other")
    write_text(root / "text")
    built(root, "copies", ["base"] * 3)
    built(root, "OUT", ["base", "./other"])
    return root, native


def channels_in(checkpoint: Checkpoint) -> Channels:
    channels, _ = checkpoint.carrier
    return channels


def loaded(out: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(out, dtype=dtype).eval()


def said_by(model: PreTrainedModel, checkpoint: Checkpoint, **inputs: Any) -> tuple[list[torch.Tensor], Any]:
    """The routers' logits of a pass, each (B, S, E), and the pass's result."""
    batch, length = inputs["input_ids"].shape
    with torch.inference_mode(), mixture_of(model, checkpoint).traced() as trace:
        result = model(**inputs)
        return [each.reshape(batch, length, -1) for each in trace], result


def direct(checkpoint: Checkpoint, ids: torch.Tensor, mask: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """The average of the table that the first attention should give, by a sum over pairs of tokens, (B, S, E)."""
    channels, embedding = checkpoint.carrier
    table = torch.from_numpy(read_table(channels, embedding)).double()
    turns = turns_per_token(checkpoint.record.dense_config)
    total = torch.zeros((*ids.shape, channels.experts), dtype=torch.float64)
    for part, decay in enumerate(channels.decays):
        for row in range(len(ids)):
            real = [place for place in range(ids.shape[1]) if mask[row, place]]
            for order, place in enumerate(real):
                seen = real[: order + 1] if window is None else real[max(0, order + 1 - window) : order + 1]
                distances = [order - real.index(other) for other in seen]
                scores = torch.tensor([score_of(distance, decay, turns) for distance in distances], dtype=torch.float64)
                rows = table[ids[row, seen]][:, part * channels.experts : (part + 1) * channels.experts]
                total[row, place] += scores.softmax(0) @ rows
    return total


def score_of(distance: int, decay: float, turns: list[float] | None) -> float:
    if decay == 1.0 or turns is None:
        return 0.0
    spacing, tau = math.log(turns[0] / turns[1]), -1.0 / math.log(decay)
    return sum(2 / math.pi * spacing / turn / tau * math.cos(turn * distance) for turn in turns if 1 / turn <= 3_000.0)


def window_of(checkpoint: Checkpoint) -> int | None:
    """Of the first layer."""
    kinds = checkpoint.config.get("layer_types")
    if kinds is not None and kinds[0] != "sliding_attention":
        return None
    return checkpoint.config.get("sliding_window")


def test_copies_of_one_model_are_that_model(case: tuple[Path, str], ids: torch.Tensor) -> None:
    root, native = case
    assert open_checkpoint(root / "copies").shape.native_type == native
    expected = logits_of(root / "base", ids)
    torch.testing.assert_close(logits_of(root / "copies", ids), expected, atol=1e-4, rtol=1e-5)


def test_router_fixed_on_an_expert_is_the_model_with_its_parts(case: tuple[Path, str], ids: torch.Tensor) -> None:
    root, _ = case
    checkpoint = open_checkpoint(root / "OUT")
    by_hand = loaded(root / "base")
    other = dict(loaded(root / "other").named_parameters())
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            if any(name.endswith(suffix) for suffix in checkpoint.shape.native.family.decoder.mlp.values()):
                parameter.copy_(other[name])
    expected = logits_of(by_hand, ids)
    mixture = loaded(root / "OUT")
    with mixture_of(mixture, checkpoint).forced(1):
        torch.testing.assert_close(logits_of(mixture, ids), expected, atol=1e-4, rtol=1e-5)
    view = DenseView(checkpoint)
    view.use_expert(1)
    torch.testing.assert_close(logits_of(view.model, ids), expected, atol=1e-4, rtol=1e-5)


def assert_directions(logits: list[torch.Tensor], expected: torch.Tensor) -> None:
    """The same in every layer, up to the size of the stream there, which is one number per token."""
    for said in logits:
        factor = (said.double() * expected).sum(-1) / (expected * expected).sum(-1)
        assert (factor > 0).all()
        torch.testing.assert_close(said.double(), expected * factor[..., None], atol=2e-4, rtol=2e-3)


def test_gates_read_the_average_of_the_table(case: tuple[Path, str], ids: torch.Tensor) -> None:
    root, _ = case
    checkpoint = open_checkpoint(root / "OUT")
    expected = direct(checkpoint, ids, torch.ones_like(ids), window_of(checkpoint))
    logits, _ = said_by(loaded(root / "OUT"), checkpoint, input_ids=ids)
    assert len(logits) == checkpoint.layers
    assert_directions(logits, expected)


def test_pads_caches_and_batches_change_nothing(case: tuple[Path, str], ids: torch.Tensor) -> None:
    root, _ = case
    checkpoint, model = open_checkpoint(root / "OUT"), loaded(root / "OUT")
    if checkpoint.config["rope_parameters"].get("rope_type") == "dynamic":
        pytest.skip("what came before is rotated anew when a text outgrows its limit, but not in a cache")
    whole, _ = said_by(model, checkpoint, input_ids=ids)
    pads = torch.zeros((2, 5), dtype=torch.int64)
    mask = torch.cat([pads, torch.ones_like(ids)], dim=1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    padded, _ = said_by(
        model, checkpoint, input_ids=torch.cat([pads, ids], dim=1), attention_mask=mask, position_ids=places
    )  # as generate does
    one, _ = said_by(model, checkpoint, input_ids=ids[:1])
    first, result = said_by(model, checkpoint, input_ids=ids[:, :10], use_cache=True)
    cache, later = result.past_key_values, []
    for place in range(10, ids.shape[1]):
        step, result = said_by(model, checkpoint, input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        later.append(step)
    for layer, said in enumerate(whole):
        torch.testing.assert_close(padded[layer][:, 5:], said, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(one[layer], said[:1], atol=2e-4, rtol=1e-3)
        stepped = torch.cat([first[layer], *(step[layer] for step in later)], dim=1)
        torch.testing.assert_close(stepped, said, atol=2e-4, rtol=1e-3)


def test_verify_proves_every_widened_tensor(case: tuple[Path, str]) -> None:
    root, _ = case
    checkpoint = open_checkpoint(root / "OUT")
    checks = verify(checkpoint)
    assert is_proven(checks), [check for check in checks if check.verdict != "proven"]
    assert any("table in the embedding as recorded" in check.detail for check in checks)


def test_the_old_part_is_the_source_and_the_rest_is_zero(case: tuple[Path, str]) -> None:
    """Read by the safetensors library, for every tensor of the backbone that is no norm."""
    from safetensors import safe_open

    root, _ = case
    checkpoint = open_checkpoint(root / "OUT")
    with safe_open(root / "base" / "model.safetensors", framework="pt") as source:
        for name in list(source.keys()):
            layer, path = split_layer(name)
            there = in_layer(layer + 1, path) if isinstance(layer, int) else name
            if there not in checkpoint.tensors or "norm" in name:
                continue
            with safe_open(checkpoint.tensors[there].file, framework="pt") as file:
                wide = file.get_tensor(there)
            old = source.get_tensor(name)
            inside = tuple(slice(0, size) for size in old.shape)
            assert torch.equal(wide[inside], old), name
            wide[inside] = 0
            if "layers.0.self_attn" not in there and "embed" not in name:
                assert not wide.any(), name


def test_bfloat16_says_the_same(case: tuple[Path, str], ids: torch.Tensor) -> None:
    root, _ = case
    checkpoint = open_checkpoint(root / "OUT")
    exact, _ = said_by(loaded(root / "OUT"), checkpoint, input_ids=ids)
    rounded, _ = said_by(loaded(root / "OUT", torch.bfloat16), checkpoint, input_ids=ids)
    for wide, said in zip(exact, rounded, strict=True):
        assert (wide.argmax(-1) == said.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("decay", [0.98, 0.99])
def test_recency_is_an_exponential_average(size: int, decay: float) -> None:
    """At the head sizes that models have, within a share of a few per cent of all weight."""
    turns = turns_per_token({"head_dim": size, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}})
    weights = np.exp([score_of(distance, decay, turns) - score_of(0, decay, turns) for distance in range(2_000)])
    formula = decay ** np.arange(2_000)
    assert np.abs(weights / weights.sum() - formula / formula.sum()).sum() / 2 < {32: 0.03, 64: 0.02, 128: 0.015}[size]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10_000.0},
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
        {
            "rope_type": "llama3",
            "rope_theta": 50_000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
)
def test_turns_are_those_of_transformers(rope: dict[str, Any]) -> None:
    model = tiny_model(head_dim=16, rope_parameters=rope)
    said = turns_per_token({"head_dim": 16, "rope_parameters": rope})
    torch.testing.assert_close(torch.tensor(said), model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0},
        {"rope_type": "default", "rope_theta": 0},
        {"rope_type": "default", "rope_theta": -5.0},
        {"rope_type": "default", "rope_theta": float("inf")},
        {"rope_type": "default", "rope_theta": "much"},
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 0},
        {"rope_type": "llama3", "rope_theta": 10_000.0},
        {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    ],
)
def test_turns_that_are_not_known_are_none(rope: dict[str, Any]) -> None:
    assert turns_per_token({"head_dim": 16, "rope_parameters": rope}) is None
    for size in (0, 2, -4, 10**12):
        assert turns_per_token({"head_dim": size, "rope_parameters": {"rope_theta": 10_000.0}}) is None


@pytest.mark.parametrize(
    ("native", "changes", "message"),
    [
        ("cohere2_moe", {}, "cannot carry a lexical router"),
        ("qwen3_5_moe_text", {}, "cannot carry a lexical router"),
        ("mixtral", {"decay": [0.5]}, "cannot fade so"),
        ("mixtral", {"decay": [0.98, 0.99, 1.0]}, "cannot carry the evidence of so many"),
    ],
)
def test_what_architectures_and_heads_cannot_say_is_refused(
    tmp_path: Path, native: str, changes: dict[str, Any], message: str
) -> None:
    dense, _, overrides = next(case for case in CASES if case[1] == native)
    save(tiny_model(dense, **overrides), tmp_path / "base")
    write_text(tmp_path / "text")
    with pytest.raises(UnsupportedError, match=message):
        make_plan(recipe_of(["base"] * 2, **changes), tmp_path)


def test_several_averages_side_by_side(tmp_path: Path, ids: torch.Tensor) -> None:
    save(tiny_model(), tmp_path / "base")
    write_text(tmp_path / "text")
    out = built(tmp_path, "OUT", ["base"] * 3, decay=[0.95, 1.0])
    checkpoint = open_checkpoint(out)
    assert channels_in(checkpoint).decays == (0.95, 1.0)
    expected = direct(checkpoint, ids, torch.ones_like(ids))
    assert_directions(said_by(loaded(out), checkpoint, input_ids=ids)[0], expected)
    torch.testing.assert_close(logits_of(out, ids), logits_of(tmp_path / "base", ids), atol=1e-4, rtol=1e-5)
    assert checkpoint.carrier[1].shape[0] == VOCAB
