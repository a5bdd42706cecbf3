"""What the routers decided, in public: `output_router_logits` as transformers' own mixtures have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from conftest import Workshop, make_workshop
from modekit.architecture.modekit_router import Router, select

pytestmark = pytest.mark.filterwarnings("ignore")
FULL = {"fit": "random", "seed": 3, "temperature": 0.04}
ROUTERS: dict[str, tuple[dict[str, Any], int]] = {
    "token": ({**FULL}, 3),
    "context": ({**FULL, "granularity": "context", "decay": [0.9]}, 3),
    "one for all": ({**FULL, "granularity": "sequence", "per": "model"}, 1),
    "projection": ({**FULL, "per": "projection"}, 9),
    "feature": ({**FULL, "per": "feature"}, 9),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A Llama workshop that these tests build in."""
    return make_workshop(tmp_path_factory.mktemp("log"))


def opened(bench: Workshop, router: dict[str, Any], **mixture: Any) -> PreTrainedModel:
    out = bench.build(mixture={"method": "routing", "top_k": 2, "router": router, **mixture}, output={"format": "modekit"})
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ROUTERS)
def test_a_pass_returns_what_every_router_decided_by(bench: Workshop, ids: torch.Tensor, name: str) -> None:
    router, count = ROUTERS[name]
    model = opened(bench, router)
    weights: list[torch.Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [each.register_forward_hook(lambda _module, _args, found: weights.append(found)) for each in routers]
    with torch.inference_mode():
        plain = model(input_ids=ids)
        weights.clear()
        output = model(input_ids=ids, output_router_logits=True)
    for hook in hooks:
        hook.remove()
    assert "router_logits" not in plain
    assert len(output.router_logits) == len(routers) == count
    for logits, decided in zip(output.router_logits, weights, strict=True):
        assert logits.dtype == torch.float32 and logits.shape == decided.shape
        assert logits.shape[:2] == ids.shape and logits.shape[-1] == 3
        torch.testing.assert_close(select(logits, routers[0].routing), decided, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.logits, plain.logits, rtol=1e-6, atol=1e-6)


def test_the_base_model_the_config_and_a_tuple_say_it_too(bench: Workshop, ids: torch.Tensor) -> None:
    model = opened(bench, FULL)
    with torch.inference_mode():
        expected = model(input_ids=ids, output_router_logits=True)
        from_base = model.model(input_ids=ids, output_router_logits=True)
        as_tuple = model(input_ids=ids, output_router_logits=True, return_dict=False)
        model.config.output_router_logits = True
        by_config = model(input_ids=ids)
        refused = model(input_ids=ids, output_router_logits=False)
    assert "router_logits" not in refused
    for found in (from_base.router_logits, as_tuple[-1], by_config.router_logits):
        torch.testing.assert_close(found, expected.router_logits, rtol=1e-6, atol=1e-6)


def test_an_expert_that_is_forced_was_decided_by_no_router(bench: Workshop, ids: torch.Tensor) -> None:
    model = opened(bench, FULL)
    model.use_expert("law")
    with torch.inference_mode():
        assert model(input_ids=ids, output_router_logits=True).router_logits == ()
        model.use_expert(None)
        assert len(model(input_ids=ids, output_router_logits=True).router_logits) == 3


@pytest.mark.parametrize(
    "router",
    [FULL, ROUTERS["context"][0], {"fit": "lexical", "orders": [1, 2], "buckets": 512}],
    ids=["token", "context", "bigrams"],
)
def test_generate_takes_it_and_a_pass_over_its_text_logs_the_whole(
    bench: Workshop, ids: torch.Tensor, router: dict[str, Any]
) -> None:
    model = opened(bench, router)
    steps: list[tuple[torch.Tensor, ...]] = []
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    hook = model.register_forward_hook(lambda _module, _args, output: steps.append(output.router_logits))
    found = model.generate(ids, output_router_logits=True, **settings)
    hook.remove()
    assert torch.equal(found, expected) and len(steps) == 5
    with torch.inference_mode():
        whole = model(input_ids=found[:, :-1], output_router_logits=True).router_logits
    for place, logits in enumerate(whole):
        torch.testing.assert_close(torch.cat([step[place] for step in steps], dim=1), logits, rtol=1e-4, atol=1e-4)


def test_a_pass_that_fails_leaves_no_log_behind(bench: Workshop, ids: torch.Tensor) -> None:
    model = opened(bench, FULL)
    with pytest.raises(IndexError), torch.inference_mode():
        model(input_ids=ids + 10_000, output_router_logits=True)
    with torch.inference_mode():
        assert "router_logits" not in model(input_ids=ids)


def test_a_native_mixture_has_it_by_transformers(bench: Workshop, ids: torch.Tensor) -> None:
    out: Path = bench.build("NATIVE", output={"format": "native"})
    assert json.loads((out / "config.json").read_text())["model_type"] == "mixtral"
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.inference_mode():
        output = model(input_ids=ids, output_router_logits=True)
        base = AutoModel.from_pretrained(out, dtype=torch.float32).eval()(input_ids=ids, output_router_logits=True)
    for found in (output.router_logits, base.router_logits):
        assert [logits.shape for logits in found] == [(ids.numel(), 3)] * 3
