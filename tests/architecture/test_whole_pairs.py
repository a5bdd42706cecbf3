"""Whole models with an encoder as experts: all that they hold goes by expert, and one alone is its own model bit for bit.

The reference of fixed weights is the weight average: with one input, every module is linear in its own weights.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from architecture.test_encoder_decoder import KINDS, NAMES, STILL, Bench
from conftest import Workshop, router_logits
from modekit.architecture.modekit_mixed import Mixed
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import MismatchError
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.inspection.inspect import inspect
from modekit.loaded.experts import average_of
from modekit.loaded.load import load_model
from pair_models import (
    built,
    inputs,
    logits_of,
    make_pair_workshop,
    pair_model,
    pair_tokenizer,
    planned,
    write_models,
    written,
)
from refusal import borrow

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("short_tables")]
ONCE = {"fit": "random", "seed": 3, "granularity": "sequence", "per": "model"}
WHOLE = {"modules": "all", "router": ONCE}
SEARCHES: tuple[dict[str, Any], ...] = (
    {},
    {"use_cache": False},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
)


@pytest.fixture(scope="module", params=["bart", "t5"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A base and three full models that differ from it in every tensor."""
    kind = str(request.param)
    root = tmp_path_factory.mktemp("whole")
    made = {name: pair_model(kind.split()[0], seed, **KINDS[kind]) for seed, name in enumerate(("base", *NAMES))}
    for model in made.values():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in ("shared", "embed", "relative")) and parameter.requires_grad:
                    parameter.normal_(std=0.4)
            if hasattr(model, "final_logits_bias"):
                model.final_logits_bias.normal_()
    for name, model in made.items():
        model.save_pretrained(root / name)
    pair_tokenizer().save_pretrained(root / "base")
    loaded = {name: load_model(root / name) for name in made}  # what a file does not hold is what transformers makes of it
    return Bench(kind, root, loaded)


def four(pads: str = "right") -> dict[str, torch.Tensor]:
    """Four sources, of which the experts get some each."""
    return inputs(pads, (9, 6, 3, 5))


# --- one expert alone, and several in one batch


@pytest.mark.parametrize("bench", list(KINDS), indirect=True)
def test_an_expert_alone_is_its_own_model_bit_for_bit(bench: Bench) -> None:
    model = load_model(built(bench.root, WHOLE, *NAMES, STILL))
    for name in (*NAMES, "still"):
        own = bench.made["base" if name == "still" else name]
        model.use_expert(name)
        for pads in ("right", "left"):
            assert torch.equal(logits_of(model, four(pads)), logits_of(own, four(pads))), (name, pads)
            for how in SEARCHES:
                assert torch.equal(written(model, four(pads), **how), written(own, four(pads), **how)), (
                    name,
                    pads,
                    how,
                )


def test_every_source_goes_to_the_expert_that_its_router_names_beams_and_all(bench: Bench) -> None:
    """The decision is read from the logits that the model gives; what follows it is the expert's own writing."""
    said, places = four(), [0]
    for seed in range(3, 20):  # gates are drawn, and on some processors the first send all sources to one expert
        model = load_model(bench.build({**WHOLE, "router": {**ONCE, "seed": seed}}))
        with torch.inference_mode():
            places = router_logits(model, **said)[0][:, 0].argmax(-1).tolist()
        if len(set(places)) > 1:
            break
    assert len(set(places)) > 1, "all sources go to one expert: this test would see nothing"
    logits = logits_of(model, said)
    for row, place in enumerate(places):
        own = bench.made[NAMES[place]]
        expected = logits_of(own, said)[row]
        torch.testing.assert_close(logits[row], expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
        alone = {name: value[row : row + 1] for name, value in said.items()}
        for how in SEARCHES[:3]:
            assert torch.equal(written(model, said, **how)[row], written(own, said, **how)[row]), how
            assert torch.equal(written(model, alone, **how), written(own, alone, **how)), how


def test_experts_that_are_not_used_are_not_read(bench: Bench) -> None:
    model, said = load_model(bench.build(WHOLE)), four()
    expected = logits_of(bench.made["two"], said)
    model.use_expert("two")
    read: list[nn.Module] = []
    for mixed in (module for module in model.modules() if isinstance(module, Mixed)):
        for place, module in zip(mixed.own, mixed.experts, strict=True):
            if place != NAMES.index("two"):
                module.register_forward_pre_hook(lambda module, _: read.append(module))
                for tensor in (*module.parameters(), *module.buffers()):
                    tensor.data.fill_(float("nan"))
    assert torch.equal(logits_of(model, said), expected)
    assert torch.equal(written(model, said, num_beams=3), written(bench.made["two"], said, num_beams=3))
    assert not read


@pytest.mark.parametrize("before", [None, ["one", "three", "two", "one"]])
def test_another_expert_writes_on_from_what_the_encoder_read(bench: Bench, before: Any) -> None:
    """What is said last counts in the decoder, whoever read the source; a plain encoder's output suffices then."""
    model, said = load_model(bench.build(WHOLE)), four()
    rest = {"attention_mask": said["attention_mask"], "decoder_input_ids": said["decoder_input_ids"]}
    model.use_expert(before)
    with torch.inference_mode():
        encoded = model.get_encoder()(said["input_ids"], said["attention_mask"])
        plain = BaseModelOutput(encoded.last_hidden_state)
        model.use_expert("two")
        expected = bench.made["two"](encoder_outputs=plain, **rest).logits
        for given in (encoded, plain):
            assert torch.equal(model(encoder_outputs=given, **rest).logits, expected)
        names = ["two", "three", "one", "two"]
        model.use_expert(names)
        found = model(encoder_outputs=plain, **rest).logits
        for row, name in enumerate(names):
            own = bench.made[name](encoder_outputs=plain, **rest).logits[row]
            torch.testing.assert_close(found[row], own, atol=1e-5 * float(own.abs().max()), rtol=1e-5)


# --- several experts at once


def test_fixed_weights_are_the_weight_average(bench: Bench) -> None:
    model = load_model(bench.build({"modules": "all", "method": "linear", "top_k": ..., "router": ...}))
    average = average_of([partial(copy.deepcopy, bench.made[name]) for name in NAMES])
    for pads in ("right", "left"):
        expected = logits_of(average, four(pads))
        torch.testing.assert_close(logits_of(model, four(pads)), expected, atol=2e-5 * float(expected.abs().max()), rtol=1e-4)
    assert torch.equal(written(model, four(), num_beams=3), written(average, four(), num_beams=3))


# --- routers that are fitted, and what is done with a mixture


@pytest.fixture(scope="module", params=["bart", "t5"])
def pair_workshop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_pair_workshop(tmp_path_factory.mktemp("pairs"), request.param)


SMALL: dict[str, Any] = {"tokens_per_domain": 300, "sequence_length": 64}
FITS: dict[str, dict[str, Any]] = {
    "bigrams": {"fit": "lexical", "orders": [1, 2], "buckets": 512},
    "lexical": {"fit": "lexical"},
    "logistic": {"fit": "logistic", "granularity": "sequence", "per": "model", **SMALL},
}


@pytest.mark.parametrize("fit", list(FITS))
def test_a_fitted_router_sends_each_source_to_one_model(pair_workshop: Workshop, tmp_path: Path, fit: str) -> None:
    """Those that read tokens tell these domains apart; others may err, and what is written is still one model's own."""
    shop = borrow(pair_workshop, tmp_path)
    out = shop.build(mixture={"method": "routing", "top_k": 1, "modules": "all", "router": FITS[fit]})
    checkpoint = open_checkpoint(out)
    assert is_proven(verify(checkpoint))
    model, names = load_model(out), checkpoint.names
    said = dict(pair_tokenizer()([f"{name} 3 fever artery" for name in names], return_tensors="pt", padding=True))
    said = {name: said[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        logits = router_logits(model, **said, decoder_input_ids=said["input_ids"])[0]
    chosen = [names[place] for place in logits[:, 0].argmax(-1).tolist()]
    by_tokens = checkpoint.record.recipe.mixture.router.row.reads_ids
    assert chosen == names or not by_tokens
    found = written(model, said, num_beams=3)
    for row, name in enumerate(chosen):
        assert torch.equal(found[row], written(load_model(pair_workshop.root / name), said, num_beams=3)[row]), name
    rows = {row.name: row for row in evaluate(checkpoint, **SMALL).rows}
    for domain, score in rows["oracle"].scores.items():
        assert score.loss == pytest.approx(rows[domain].scores[domain].loss, rel=1e-4)
        assert score.loss == pytest.approx(rows["mixture"].scores[domain].loss, rel=1e-4) or not by_tokens
    assert not any("no longer where" in note for note in inspect(checkpoint, **SMALL).notes)


def test_a_bias_of_the_logits_that_the_base_lacks_is_not_lost(tmp_path: Path) -> None:
    """Older files lack it, where it is zero."""
    write_models(tmp_path, "marian")
    for name in ("base", "one", "two"):
        tensors = load_file(tmp_path / name / "model.safetensors")
        del tensors["final_logits_bias"]
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        if name == "base":
            with pytest.raises(MismatchError, match="has a final_logits_bias and the base model none"):
                planned(tmp_path, WHOLE, "one", "two")
    out = built(tmp_path, WHOLE, "one", "two")
    assert is_proven(verify(open_checkpoint(out)))
    model = load_model(out)
    model.use_expert("two")
    assert torch.equal(logits_of(model, four()), logits_of(load_model(tmp_path / "two"), four()))
