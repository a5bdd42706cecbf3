"""What a pass is told is for its own sources; whatever it was, and however it ended, the next is as if it had not been."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import VOCAB, Workshop
from modekit.loaded.load import load_model
from pair_models import built, inputs, logits_of, write_models, written

pytestmark = pytest.mark.filterwarnings("ignore")
ONCE = {"modules": "all", "router": {"fit": "random", "seed": 3, "granularity": "sequence", "per": "model"}}
MIXTURES: dict[str, dict[str, Any]] = {"whole models": ONCE, "FFNs": {"top_k": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two full models."""
    return write_models(tmp_path_factory.mktemp("after"), "t5")


def loss_of(model: Any, said: dict[str, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = model(**said, use_cache=False).logits.square().mean()
    return loss


# --- experts that are named one per source: as many as there are sources, each of which may have several beams


@pytest.mark.parametrize("mixed", list(MIXTURES))
def test_fewer_experts_than_sources_are_refused(folder: Path, mixed: str) -> None:
    """Two for four sources might be meant for two beams of two sources, which an encoder never sees."""
    model, four = load_model(built(folder, MIXTURES[mixed], "one", "two")), inputs("right", (9, 6, 3, 5))
    model.use_expert(["one", "two"])
    for how in ({}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}):
        with pytest.raises(ValueError, match="use_expert was given 2 experts, for 4 sequences"):
            written(model, four, **how)
    with pytest.raises(ValueError, match="use_expert was given 2 experts, for 4 sequences"):
        logits_of(model, four)
    found = logits_of(model, inputs("right", (9, 6)))  # what was refused left nothing behind
    for row, name in enumerate(("one", "two")):
        model.use_expert(name)
        alone = logits_of(model, inputs("right", (9, 6)))[row]
        torch.testing.assert_close(found[row], alone, atol=1e-5 * float(alone.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("mixed", list(MIXTURES))
def test_beams_of_a_source_share_its_expert(folder: Path, mixed: str) -> None:
    model, said = load_model(built(folder, MIXTURES[mixed], "one", "two")), inputs("right", (9, 6))
    for how in ({}, {"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 2}):
        alone = []
        for name in ("one", "two"):
            model.use_expert(name)
            alone.append(written(model, said, **how))
        model.use_expert(["one", "two"])
        found, rows = written(model, said, **how), how.get("num_return_sequences", 1)
        assert torch.equal(found, torch.cat([alone[0][:rows], alone[1][rows:]])), how


# --- gradient checkpointing, which runs layers a second time


def test_an_expert_that_a_layer_is_run_again_with_does_not_stay(folder: Path) -> None:
    """An expert that was named in the pass is the recomputed layers' too, and nobody's afterwards."""
    model, said = load_model(built(folder, ONCE, "one", "two")), inputs()
    routed, found = logits_of(model, said), []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.use_expert("one")
        loss = loss_of(model, said)
        model.use_expert(None)
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
        model.eval()
        assert torch.equal(logits_of(model, said), routed)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-12, rtol=1e-4)


def test_an_encoder_that_was_run_again_does_not_run_on(folder: Path) -> None:
    """The decoder alone reads what it made before, after a backward that ran its layers again."""
    model, said = load_model(built(folder, ONCE, "one", "two")), inputs()
    rest = {"attention_mask": said["attention_mask"], "decoder_input_ids": said["decoder_input_ids"]}
    with torch.inference_mode():
        encoded = model.get_encoder()(said["input_ids"], said["attention_mask"])
        expected = model(encoder_outputs=encoded, **rest).logits
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of(model, said).backward()
    model.eval()
    with torch.inference_mode():
        assert torch.equal(model(encoder_outputs=encoded, **rest).logits, expected)


# --- generate


def test_pads_of_the_target_that_generate_was_told_do_not_stay(folder: Path) -> None:
    mixture = {"top_k": 2, "router": {"fit": "random", "seed": 3, "granularity": "context"}}
    model, said = load_model(built(folder, mixture, "one", "two")), inputs()
    source = {name: said[name] for name in ("input_ids", "attention_mask")}
    before = torch.tensor([[2, 5, 6, 7, 8], [2, 7, 8, 9, 9], [2, 0, 0, 0, 3]])
    with torch.inference_mode():
        read = model.get_encoder()(**source).last_hidden_state
        target = {"input_ids": said["decoder_input_ids"], "encoder_hidden_states": read}
        expected = model.get_decoder()(**target, encoder_attention_mask=said["attention_mask"]).last_hidden_state
        begun = {"decoder_input_ids": before, "decoder_attention_mask": (before > 0).long()}
        model.generate(**source, **begun, max_new_tokens=1, eos_token_id=None, forced_eos_token_id=None)
        found = model.get_decoder()(**target, encoder_attention_mask=said["attention_mask"]).last_hidden_state
        assert torch.equal(found, expected)


def test_nor_do_pads_stay_in_a_decoder_only_model(shared_workshop: Workshop) -> None:
    """The model without its head reads other texts than those that were generated from, as those who want vectors do."""
    mixture = {"router": {"fit": "random", "seed": 3, "granularity": "context"}}
    model = load_model(shared_workshop.build("PADS", mixture=mixture, output={"format": "modekit"}))
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(9) >= torch.tensor([[5], [0]])).long()
    with torch.inference_mode():
        expected = model.model(ids).last_hidden_state
        model.generate(ids * mask, attention_mask=mask, max_new_tokens=1)
        assert torch.equal(model.model(ids).last_hidden_state, expected)


# --- interrupts, of which torch tells no hook


def stop(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["a pass", "generate", "beams"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_an_interrupted_pass_is_over(folder: Path, stack: str, how: str) -> None:
    """Another thread, which waits while a pass has the turn, gets it after an interrupt in a layer."""
    model, said = load_model(built(folder, ONCE, "one", "two")), inputs()
    part = model.get_encoder() if stack == "encoder" else model.get_decoder()
    layer = (part.layers if hasattr(part, "layers") else part.block)[1]
    calls = {
        "a pass": lambda: logits_of(model, said),
        "generate": lambda: written(model, said),
        "beams": lambda: written(model, said, num_beams=2),
    }
    expected, found = logits_of(model, said), []
    handle = layer.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        calls[how]()
    handle.remove()
    assert not model.base_model.flow.encoding
    thread = threading.Thread(target=lambda: found.append(logits_of(model, said)), daemon=True)
    thread.start()
    thread.join(20)
    assert len(found) == 1, "it waits for a pass that is over"
    assert torch.equal(found[0], expected)
