"""Joint training (JEET, MoE-CE): one domain a step, whose own expert, and what all share, learn; no other expert moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import Workshop, save, tiny_model
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import ModekitError
from modekit.loaded.load import load_model
from modekit.loaded.shapes import flow_of, mixture_of
from modekit.run import QUIET
from modekit.training.batches import Batches, plan_parts
from modekit.training.end_to_end import packs
from modekit.training.moving import moving_of, names_of
from modekit.training.objective import Objective
from modekit.training.settings import TrainSettings
from modekit.training.texts import read_texts
from modekit.training.train import train
from trained import moved, short_settings, tensors_of

NGRAM = {"fit": "lexical", "orders": [1, 2], "buckets": 512}
COMMON = {"always_on": {"expert": "base", "weight": 0.5, "apart": True}}


def mixture(workshop: Workshop, **said: object) -> Checkpoint:
    """Three whole decoders over one embedding and head, routed by the tokens so far."""
    return open_checkpoint(workshop.build(mixture={"modules": "decoder", "top_k": 1, "router": NGRAM, **said}))


def settings(**said: object) -> TrainSettings:
    rates = {"backbone_learning_rate": 1e-2, "weight_decay": 0.1}
    return short_settings(
        **{"regime": "joint", "batch_tokens": 64, "sequence_length": 32, "select_tokens": 64, **rates, **said}
    )


def owner(name: str) -> str:
    """Whose a tensor is: an expert's by its number, the common expert's, or everybody's."""
    _, sign, rest = name.partition(".experts.")
    return f"expert {rest.partition('.')[0]}" if sign else "common" if ".base." in name else "shared"


@pytest.mark.parametrize("common", [False, True], ids=["jeet", "moe-ce"])
def test_a_step_moves_the_routed_expert_what_is_shared_and_nothing_else(workshop: Workshop, common: bool) -> None:
    """Weight decay and the optimiser's state included: text of one domain alone, over three steps."""
    checkpoint = mixture(workshop, **(COMMON if common else {}))
    before = tensors_of(checkpoint.folder)
    text = {"law": [str(workshop.root / "text" / "law.jsonl")]}
    everywhere = train_only(checkpoint, text)
    changed = moved(before, everywhere)
    assert {owner(name) for name in changed} == {"expert 1", "shared", *(["common"] if common else [])}
    own = {name for name in before if owner(name) == "expert 1"}
    assert own <= changed
    assert {"model.embed_tokens.weight", "lm_head.weight"} & before.keys() <= changed
    assert not any(".router." in name for name in changed)


def train_only(checkpoint: Checkpoint, text: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    """The tensors after a training on text of some domains alone, whether that made anything better or not."""
    wanted = settings()
    model = load_model(checkpoint.folder)
    names = names_of(moving_of(model, checkpoint), wanted.what, but=("routers",))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    texts = read_texts(checkpoint, wanted, text, checkpoint.folder, run=QUIET)
    corpora = [each.corpus for each in texts if each.corpus.name in text]
    packed = packs(checkpoint)
    parts = plan_parts(corpora, wanted, steps=3, experts=3, parts=2, pack=packed)
    objective = Objective(model, checkpoint, wanted, teachers=[], train_top_k=None, packed=packed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    batches = Batches(corpora, parts)
    for number in range(0, len(batches), 2):
        for part in (number, number + 1):
            objective(**batches[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.state_dict().items() if name in tensors_of(checkpoint.folder)}


def test_a_joint_training_of_all_domains_makes_the_mixture_better(workshop: Workshop) -> None:
    checkpoint = mixture(workshop, **COMMON)
    before = tensors_of(checkpoint.folder)
    done = train(checkpoint, settings(steps=12), out=workshop.root / "BETTER", evaluate_tokens=None)
    assert done.improved
    changed = moved(before, tensors_of(workshop.root / "BETTER"))
    assert {owner(name) for name in changed} == {"expert 0", "expert 1", "expert 2", "common", "shared"}
    assert not any(".router." in name for name in changed)
    assert done.checkpoint.record.router == checkpoint.record.router  # which was not trained, and says so


def test_a_teacher_of_all_domains_is_who_distillation_goes_towards(workshop: Workshop) -> None:
    """With distillation alone and enough steps, the mixture's divergence from the teacher falls."""
    teacher = save(tiny_model("llama", seed=9, hidden_size=48, num_hidden_layers=2), workshop.root / "teacher")
    checkpoint = mixture(workshop)
    said = settings(steps=15, losses={"lm": 0.1, "forward_kl": 1.0}, teacher=str(teacher), batch_tokens=128)
    done = train(checkpoint, said, out=workshop.root / "BETTER", evaluate_tokens=None)
    assert done.improved
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))

    def divergence(folder: Path) -> float:
        with torch.inference_mode():
            theirs = load_model(teacher)(input_ids=ids).logits.log_softmax(-1)
            ours = load_model(folder)(input_ids=ids).logits.log_softmax(-1)
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    assert divergence(workshop.root / "BETTER") < divergence(checkpoint.folder)


def test_forcing_an_expert_leaves_the_common_one_out_and_teaching_does_not(workshop: Workshop) -> None:
    checkpoint = mixture(workshop, **COMMON)
    model = load_model(checkpoint.folder)
    loaded = mixture_of(model, checkpoint)
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))

    def hidden() -> torch.Tensor:
        with torch.inference_mode():
            return model.model(input_ids=ids)[0]

    with loaded.forced(1):
        own = hidden()
    with loaded.on_own_text(-1):
        common = hidden()
    with loaded.on_own_text(1):
        torch.testing.assert_close(hidden(), (own + common) / 2)
    base = load_model(workshop.root / "base")
    with torch.inference_mode():
        torch.testing.assert_close(common, base.model(input_ids=ids)[0])
    with flow_of(model).changed(common=0.0), loaded.on_own_text(1):
        torch.testing.assert_close(hidden(), own)


@pytest.mark.parametrize(
    ("said", "of_mixture", "wanted"),
    [
        ({"what": ["routers", "experts"]}, {}, "trains no router"),
        ({"losses": {"lm": 1.0, "balance": 0.1}}, {}, "trains no router"),
        ({"randomise": 0.1}, {}, "without a label has no expert of its own"),
        ({"generic": ["text/law.jsonl"]}, {}, "no expert of its own"),
        ({}, {"modules": "auto", "router": {"fit": "random"}}, "lie in one tensor"),
    ],
)
def test_what_a_joint_training_cannot_do_is_said(
    workshop: Workshop, said: dict[str, object], of_mixture: dict[str, object], wanted: str
) -> None:
    with pytest.raises(ModekitError, match=wanted):
        train(mixture(workshop, **of_mixture), settings(**said), root=workshop.root)
