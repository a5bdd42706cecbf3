"""Fewer experts from more: near duplicates, in another order of channels, become one; a stranger's mixture, too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from conftest import SMALL, character_tokenizer, make_workshop, save, write_text
from modekit.conversion.near import groups_of, in_order_of, mean_expert
from modekit.conversion.plain import PlainMixture
from modekit.conversion.shrink import Shrinking, _counts, shrink
from modekit.errors import ModekitError, TextError, UnsupportedError
from modekit.run import QUIET
from modekit.text.sequences import TokenSequence
from modekit.text.splits import TRAINED_FILE, split_of
from refusal import refuse

KINDS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 48, "norm_topk_prob": True},
}


def stranger(folder: Path, model_type: str) -> PreTrainedModel:
    """Four experts a layer: the third is the first and the fourth the second, their channels in another order."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **KINDS[model_type], "num_experts_per_tok": 1})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 if "norm" in name else 3.0)
            if name.endswith("gate.weight"):
                parameter[2:] = parameter[:2]
            if name.endswith("experts.gate_up_proj"):
                order = torch.randperm(48)
                parameter[2:] = parameter[:2, torch.cat([order, order + 48])]
                dict(model.named_parameters())[name.replace("gate_up", "down")][2:] = dict(model.named_parameters())[
                    name.replace("gate_up", "down")
                ][:2, :, order]
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(4, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("model_type", list(KINDS))
def test_a_stranger_s_doubled_experts_become_one_without_loss(tmp_path: Path, model_type: str) -> None:
    model = stranger(tmp_path / "OUT", model_type)
    record = shrink(tmp_path / "OUT", Shrinking(2), tmp_path / "NEW")
    assert record.groups == [[[0, 2], [1, 3]]] * 3
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "NEW", dtype=torch.float32).eval()
    assert smaller.num_parameters() < model.num_parameters()
    assert torch.allclose(logits(smaller), logits(model), atol=1e-4, rtol=1e-4)


def test_the_loss_before_and_after_is_said(tmp_path: Path) -> None:
    stranger(tmp_path / "OUT", "mixtral")
    text = write_text(tmp_path / "text")
    record = shrink(tmp_path / "OUT", Shrinking(2, [str(text["law"])], tmp_path, 400), tmp_path / "NEW")
    assert record.loss_before == pytest.approx(record.loss_after, abs=1e-4)
    assert json.loads((tmp_path / "NEW" / "shrink.json").read_text())["loss_after"] == record.loss_after
    worse = shrink(tmp_path / "OUT", Shrinking(1, [str(text["law"])], tmp_path, 400), tmp_path / "ONE")
    assert worse.loss_after is not None and worse.loss_before == record.loss_before
    assert abs(worse.loss_after - record.loss_before) > 1e-3


def test_every_text_has_something_that_weighs(tmp_path: Path) -> None:
    stranger(tmp_path / "OUT", "mixtral")
    write_text(tmp_path)
    texts = (f"only {number} words of this text" for number in range(100))
    (tmp_path / "one.txt").write_text(next(text for text in texts if split_of(text) == "report"))
    with pytest.raises(TextError, match="no document is left to read"):
        shrink(tmp_path / "OUT", Shrinking(2, ["law.jsonl", "one.txt"], tmp_path), tmp_path / "NEW")


def test_pads_choose_no_expert(tmp_path: Path) -> None:
    stranger(tmp_path / "OUT", "mixtral")
    plain = PlainMixture.opened(tmp_path / "OUT")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "OUT").eval()
    texts = [TokenSequence(tuple(range(4, 4 + length)), 0) for length in (5, 40)]
    together = _counts(model, plain, texts, QUIET)
    assert together.sum(1).tolist() == [45.0] * 3
    assert (together == sum(_counts(model, plain, [text], QUIET) for text in texts)).all()


def test_a_mixture_of_modekit_s_has_one_grouping_for_all_layers(tmp_path: Path) -> None:
    shop = make_workshop(tmp_path)
    law = AutoModelForCausalLM.from_pretrained(tmp_path / "law", dtype=torch.float32)
    with torch.no_grad():
        for parameter in law.model.layers.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-4)
    save(law, tmp_path / "again")
    shop.build(experts=[*shop.recipe["experts"], {"name": "again", "model": "./again"}])
    record = shrink(tmp_path / "OUT", Shrinking(3), tmp_path / "NEW")
    assert record.groups == [[[0], [1, 3], [2]]] * 3
    assert record.names == ["medicine", "law", "code", "again"]
    assert not (tmp_path / "NEW" / "modekit.json").exists()
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "NEW")).isfinite().all()


def test_biases_of_a_router_are_merged_and_what_was_trained_on_goes_along(tmp_path: Path) -> None:
    shop = make_workshop(tmp_path, "ernie4_5")
    shop.build(output={"format": "native"})
    (tmp_path / "OUT" / TRAINED_FILE).write_text(f"{'0' * 16}\n")
    shrink(tmp_path / "OUT", Shrinking(2), tmp_path / "NEW")
    smaller, how = AutoModelForCausalLM.from_pretrained(tmp_path / "NEW", output_loading_info=True)
    assert smaller.config.moe_num_experts == 2 and not how["missing_keys"] and not how["mismatched_keys"]
    assert logits(smaller).isfinite().all()
    assert (tmp_path / "NEW" / TRAINED_FILE).exists()


def test_groups_are_of_the_nearest_and_of_the_rarest() -> None:
    apart = np.array([[0.0, 1.0, 9.0], [1.0, 0.0, 4.0], [9.0, 4.0, 0.0]])
    assert groups_of(apart, np.ones(3), 2) == [[0, 1], [2]]
    assert groups_of(apart, np.array([100.0, 100.0, 0.1]), 2) == [[0], [1, 2]]
    assert groups_of(apart, np.ones(3), 1) == [[0, 1, 2]]


def test_means_are_of_channels_in_one_order() -> None:
    expert = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    other = expert[::-1].copy()
    assert (in_order_of(expert, other) == expert).all()
    assert np.allclose(mean_expert([expert, other], np.array([0.75, 0.25])), expert)


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    stranger(tmp_path / "OUT", "mixtral")
    with pytest.raises(ModekitError, match="--to"):
        shrink(tmp_path / "OUT", Shrinking(4), tmp_path / "NEW")
    file = tmp_path / "OUT" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(UnsupportedError, match=r"layers\.3"):
        shrink(tmp_path / "OUT", Shrinking(2), tmp_path / "NEW")
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UnsupportedError, match="quantised"):
        shrink(tmp_path / "OUT", Shrinking(2), tmp_path / "NEW")
    make_workshop(tmp_path)
    with pytest.raises(UnsupportedError, match="llama"):
        shrink(tmp_path / "base", Shrinking(1), tmp_path / "NEW")


def test_tokens_without_a_text_to_read_are_refused(tmp_path: Path) -> None:
    assert "a text (--text)" in refuse("shrink", tmp_path / "OUT", tmp_path / "NEW", "--to", 2, "--tokens", 100)
