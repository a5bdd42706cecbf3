"""Training mixtures and specialists of models with an encoder, over pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Workshop
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.loaded.load import load_model
from modekit.loaded.passes import losses_of
from modekit.loaded.shapes import mixture_of
from modekit.run import QUIET
from modekit.text.sequences import make_batches
from modekit.training.batches import Batches, plan_parts
from modekit.training.losses import domain_label
from modekit.training.moving import moving_of
from modekit.training.objective import Objective
from modekit.training.settings import TrainSettings
from modekit.training.texts import read_texts
from modekit.training.train import train
from pair_models import make_pair_workshop
from refusal import borrow
from trained import moved, short_settings, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=["t5"])
def pair_workshop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_pair_workshop(tmp_path_factory.mktemp("pairs"), request.param)


def settings(**said: Any) -> TrainSettings:
    rates = {"learning_rate": 1e-2, "backbone_learning_rate": 1e-3}
    return short_settings(**{"what": ["all"], "steps": 4, "batch_tokens": 256, "select_tokens": 256, **rates, **said})


ROUTERS: dict[str, dict[str, Any]] = {
    "token": {"fit": "random"},
    "once": {"fit": "random", "granularity": "sequence", "per": "model"},
}


@pytest.mark.parametrize("router", list(ROUTERS))
def test_a_training_lowers_the_held_out_loss_and_is_written(pair_workshop: Workshop, tmp_path: Path, router: str) -> None:
    out = borrow(pair_workshop, tmp_path).build(mixture={"top_k": 2, "router": ROUTERS[router]})
    before = tensors_of(out)
    losses = {"lm": 1.0, "label": 0.1, "balance": 0.01, "z": 0.001}
    trained = train(open_checkpoint(out), settings(losses=losses))
    assert trained.improved and trained.failed is None
    assert moved(before, tensors_of(out))
    assert is_proven(verify(open_checkpoint(out)))
    assert torch.isfinite(
        load_model(out)(input_ids=torch.arange(4, 9)[None], decoder_input_ids=torch.arange(4)[None]).logits
    ).all()


@pytest.mark.parametrize("router", list(ROUTERS))
def test_losses_of_a_step_are_those_of_its_pairs(pair_workshop: Workshop, tmp_path: Path, router: str) -> None:
    """The language model's loss per target token, and the label's loss over the decisions of every router."""
    mixture = {"method": "gating", "router": ROUTERS[router]}
    checkpoint = open_checkpoint(borrow(pair_workshop, tmp_path).build(mixture=mixture))
    wanted = settings(losses={"lm": 1.0, "label": 0.5}, steps=1)
    corpora = [text.corpus for text in read_texts(checkpoint, wanted, {}, tmp_path, run=QUIET)]
    parts = plan_parts(corpora, wanted, steps=1, experts=3, parts=1, pack=False)
    item = Batches(corpora, parts)[0]
    model = load_model(checkpoint.folder)
    objective = Objective(model, checkpoint, wanted, teachers=[], train_top_k=None, packed=False)
    with torch.no_grad():
        found = float(objective(**item))
        draws = [draw for row in parts[0].rows for draw in row]
        lm, label = 0.0, 0.0
        for draw in draws:
            (batch,) = make_batches([corpora[draw.corpus].sequences[draw.sequence]])
            with mixture_of(model, checkpoint).traced() as trace:
                lm += float(losses_of(model, batch).sum())
            for logits in trace:
                flat = logits.flatten(0, 1)
                label += float(domain_label(flat, torch.full((len(flat),), draw.label), None))
    tokens = sum(corpora[draw.corpus].sequences[draw.sequence].scored for draw in draws)
    assert int(item["targets"]) == tokens
    total = wanted.losses["lm"] * lm + wanted.losses["label"] * label / len(checkpoint.slots)
    assert found == pytest.approx(total / tokens, rel=1e-4)


def test_every_parameter_is_in_the_group_that_its_family_says(pair_workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(borrow(pair_workshop, tmp_path).build(mixture={"top_k": 1, "router": {"fit": "random"}}))
    model = load_model(checkpoint.folder)
    groups = moving_of(model, checkpoint)
    named = dict(model.named_parameters())
    assert sorted(name for group, names in groups.items() if group != "head" for name in names) == sorted(named)
    assert all("router.gate" in name for name in groups["routers"])
    assert groups["experts"] and all(".experts." in name for name in groups["experts"])
    assert all("norm" in name or "embed_positions" in name for name in groups["norms"])
    attention = ("self_attn", "encoder_attn", "SelfAttention", "EncDecAttention")
    assert groups["attention"] and all(any(part in name for part in attention) for name in groups["attention"])
    assert groups["head"] == groups["embeddings"]
