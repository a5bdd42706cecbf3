"""What the files of translation models say must agree where it changes what they compute, in whatever way they say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from modekit.errors import MismatchError, SourceError
from modekit.loaded.load import load_model
from pair_models import inputs, logits_of, pair_model, planned, say

pytestmark = pytest.mark.filterwarnings("ignore")
GATED = {"feed_forward_proj": "gated-gelu", "dense_act_fn": ...}
NO_PADS = {"pad_token_id": ...}


def write_models(root: Path, model_type: str, **sizes: Any) -> None:
    """A base and two others."""
    for seed, name in enumerate(("base", "one", "two")):
        pair_model(model_type, seed, **sizes).save_pretrained(root / name)


OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "scaled in the expert": ("t5", {}, {"scale_decoder_outputs": False}, {"scale_decoder_outputs": True}),
    "scaled, by default": ("t5", {}, {"scale_decoder_outputs": ...}, {"scale_decoder_outputs": False}),
    "an activation by its key": ("t5", {"feed_forward_proj": "gated-gelu"}, GATED, {**GATED, "dense_act_fn": "gelu"}),
    "an activation of no gate": ("t5", {}, {"dense_act_fn": "silu"}, {"dense_act_fn": ...}),
    "pads, by default": ("m2m_100", {}, NO_PADS, {"pad_token_id": 0}),
}
KEYS = {"scaled": "scale_decoder_outputs", "an": "dense_act_fn", "pads": "pad_token_id"}


@pytest.mark.parametrize("kind", list(OTHERS))
def test_settings_that_change_what_is_computed_are_the_base_s(tmp_path: Path, kind: str) -> None:
    model_type, sizes, base, expert = OTHERS[kind]
    write_models(tmp_path, model_type, **sizes)
    found = []
    for settings in (base, expert):
        say(tmp_path / "one", **settings)
        found.append(logits_of(load_model(tmp_path / "one"), inputs()))
    assert not torch.allclose(found[0], found[1], atol=1e-4), "this says the same: the test would see nothing"
    say(tmp_path / "base", **base)
    say(tmp_path / "two", **base)
    key = KEYS[kind.replace(",", "").split()[0]]
    with pytest.raises(MismatchError, match=f"the expert's {key} differs") as caught:
        planned(tmp_path, {}, "one", "two")
    assert "'one'" in str(caught.value.where)


SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "a gated activation": ("t5", {"feed_forward_proj": "gated-gelu"}, GATED, {**GATED, "dense_act_fn": "gelu_new"}),
    "an activation": ("t5", {}, {"dense_act_fn": ...}, {"dense_act_fn": "relu"}),
    "scaled": ("t5", {}, {"scale_decoder_outputs": ..., "tie_word_embeddings": ...}, {"scale_decoder_outputs": True}),
    "pads": ("m2m_100", {"pad_token_id": 1, "bos_token_id": 0}, NO_PADS, {"pad_token_id": 1}),
}


@pytest.mark.parametrize("kind", list(SAME))
@pytest.mark.parametrize("which", ["the base", "the expert"])
def test_what_means_the_same_is_no_difference(tmp_path: Path, kind: str, which: str) -> None:
    """Older files leave unsaid what newer ones say."""
    model_type, sizes, silent, says = SAME[kind]
    write_models(tmp_path, model_type, **sizes)
    base, expert = (silent, says) if which == "the base" else (says, silent)
    say(tmp_path / "base", **base)
    for name in ("one", "two"):
        say(tmp_path / name, **expert)
    assert planned(tmp_path, {}, "one", "two").shape.slots


def test_a_size_that_is_missing_is_named_though_another_family_s_are_there(tmp_path: Path) -> None:
    write_models(tmp_path, "t5")
    sizes = {f"{stack}_{size}": 2 for stack in ("encoder", "decoder") for size in ("layers", "ffn_dim", "attention_heads")}
    say(tmp_path / "base", num_layers=..., num_decoder_layers=..., **sizes)
    with pytest.raises(SourceError, match="no usable num_layers"):
        planned(tmp_path, {}, "one", "two")


def test_a_tokenizer_that_cuts_text_otherwise_is_refused(tmp_path: Path) -> None:
    """Though every token has the same id: the scores of sentencepiece's pieces decide."""
    write_models(tmp_path, "t5")
    scores = {"base": (-1.0, -9.0), "one": (-1.0, -9.0), "two": (-9.0, -1.0)}
    for name, (long, short) in scores.items():
        pieces = [["<unk>", 0.0], ["court", long], *([each, short] for each in "court")]
        save_pieces(tmp_path / name, pieces)
    with pytest.raises(MismatchError, match="cuts text otherwise") as caught:
        planned(tmp_path, {}, "one", "two")
    assert "'two'" in str(caught.value.where)


def save_pieces(folder: Path, pieces: list[list[Any]]) -> None:
    model = models.Unigram([(piece, score) for piece, score in pieces], unk_id=0)
    Tokenizer(model).save(str(folder / "tokenizer.json"))


def test_a_head_of_its_own_beside_a_base_without_one(tmp_path: Path) -> None:
    write_models(tmp_path, "t5")
    path = tmp_path / "one" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["shared.weight"].clone()}, path, {"format": "pt"})
    with pytest.raises(MismatchError, match="the expert has tensors that the base model lacks") as caught:
        planned(tmp_path, {}, "one", "two")
    assert "lm_head.weight" in str(caught.value.found) and "'one'" in str(caught.value.where) and caught.value.remedy
