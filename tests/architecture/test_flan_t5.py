"""T5 with a head of its own, as Flan-T5 has it: the hub's config says it in another way than transformers 5 when it saves."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import UnsupportedError
from modekit.loaded.load import load_model
from pair_models import built, inputs, logits_of, pair_model, pair_tokenizer, planned, say, written

pytestmark = pytest.mark.filterwarnings("ignore")
AS_ON_THE_HUB = {"tie_word_embeddings": False, "scale_decoder_outputs": ...}
AS_SAVED = {"tie_word_embeddings": True, "scale_decoder_outputs": False}
WHOLE = {"modules": "all", "router": {"fit": "random", "seed": 3, "granularity": "sequence", "per": "model"}}


def write_base(root: Path, settings: dict[str, Any]) -> None:
    """Gated, with a head that is not its embedding."""
    model = pair_model("t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    with torch.no_grad():
        model.shared.weight.normal_(std=0.4)
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(root / "base")
    pair_tokenizer().save_pretrained(root / "base")
    say(root / "base", **settings)


def change(model: nn.Module, *parts: str) -> None:
    """Other values in all parameters whose names have one of these parts; `""` is part of every name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.add_(torch.randn_like(parameter) * 0.2)


@pytest.mark.parametrize("modules", ["auto", "all"])
def test_fine_tunes_as_transformers_saves_them_are_experts_of_the_hub_s_model(tmp_path: Path, modules: str) -> None:
    """They say that head and embedding are one, which they are not, and that the head's input is not scaled, which is so."""
    write_base(tmp_path, AS_ON_THE_HUB)
    for seed, name in enumerate(("one", "two")):
        tuned = load_model(tmp_path / "base")
        torch.manual_seed(seed)
        change(tuned, "" if modules == "all" else "DenseReluDense")
        tuned.save_pretrained(tmp_path / name)
        said = json.loads((tmp_path / name / "config.json").read_text())
        assert AS_SAVED.items() <= said.items(), "transformers saves it in another way now: this test would see nothing"
    out = built(tmp_path, WHOLE if modules == "all" else {}, "one", "two")
    assert is_proven(verify(open_checkpoint(out)))
    model = load_model(out)
    for name in ("one", "two"):
        own = load_model(tmp_path / name)
        model.use_expert(name)
        assert torch.equal(logits_of(model, inputs()), logits_of(own, inputs())), name
        assert torch.equal(written(model, inputs(), num_beams=3), written(own, inputs(), num_beams=3)), name


def adapter_of(root: Path, **settings: Any) -> Any:
    """PEFT's model with random numbers, whose adapter is saved beside the base."""
    base = load_model(root / "base")
    torch.manual_seed(5)
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(**{"r": 2, "task_type": "SEQ_2_SEQ_LM", **settings}))
    change(adapted, "lora_", "modules_to_save")
    adapted.save_pretrained(str(root / "adapter"))
    return PeftModel.from_pretrained(base, root / "adapter").eval()


OF_THE_HEAD: dict[str, dict[str, Any]] = {
    "changed": {"target_modules": ["lm_head", "q"]},
    "saved": {"target_modules": ["q"], "modules_to_save": ["lm_head"]},
}
SAID = pytest.mark.parametrize("said", [AS_ON_THE_HUB, AS_SAVED], ids=["as on the hub", "as saved"])


@SAID
@pytest.mark.parametrize("how", list(OF_THE_HEAD))
def test_an_adapter_of_the_head_is_peft_s_model(tmp_path: Path, said: dict[str, Any], how: str) -> None:
    write_base(tmp_path, said)
    own = adapter_of(tmp_path, **OF_THE_HEAD[how])
    adapter, still = {"name": "adapter", "adapter": "./adapter"}, {"name": "still", "model": "base"}
    model = load_model(built(tmp_path, WHOLE, adapter, still))
    model.use_expert("adapter")
    expected = logits_of(own, inputs())
    assert not torch.allclose(expected, logits_of(load_model(tmp_path / "base"), inputs()), atol=1e-2)
    torch.testing.assert_close(logits_of(model, inputs()), expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


OF_THE_EMBEDDING: dict[str, dict[str, Any]] = {
    "changed": {"target_modules": ["shared"]},
    "saved": {"target_modules": ["q"], "modules_to_save": ["shared"]},
}


@pytest.mark.parametrize("how", list(OF_THE_EMBEDDING))
def test_an_adapter_of_an_embedding_that_nothing_reads_is_refused(tmp_path: Path, how: str) -> None:
    """Encoder and decoder have embeddings of their own: PEFT's model does not read what the adapter makes of `shared`."""
    write_base(tmp_path, AS_ON_THE_HUB)
    own, base = adapter_of(tmp_path, **OF_THE_EMBEDDING[how]), load_model(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if "lora_B" in name and "shared" not in name:
                parameter.zero_()
    assert torch.equal(logits_of(own, inputs()), logits_of(base, inputs()))
    adapter, still = {"name": "adapter", "adapter": "./adapter"}, {"name": "still", "model": "base"}
    with pytest.raises(UnsupportedError, match=r"an embedding or a head that this base model shares") as caught:
        planned(tmp_path, WHOLE, adapter, still)
    assert caught.value.remedy
