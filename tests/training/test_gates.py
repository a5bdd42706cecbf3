"""How experts are chosen in training alone: gates, capacity, and the losses that go with them."""

from __future__ import annotations

import csv
import itertools
import math
from typing import Any

import pytest
import torch

from conftest import DOMAINS, Workshop, logits_of
from modekit.architecture.modekit_router import select
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.errors import TrainingError
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.run import Run
from modekit.text.sequences import TokenSequence
from modekit.training.batches import Batches, DomainSequences, plan_parts
from modekit.training.finish import TrainedMixture
from modekit.training.gates import CHOOSE, Situation, balanced, sinkhorn, smooth_step, within_capacity
from modekit.training.losses import GENERIC, consistency, load, mutual
from modekit.training.objective import Objective
from modekit.training.settings import GATES, WEIGHTS, Gate, TrainSettings, train_settings
from modekit.training.train import train

pytestmark = pytest.mark.filterwarnings("ignore")
SHORT: dict[str, Any] = {"steps": 3, "batch_tokens": 400, "sequence_length": 64, "select_tokens": 400, "evaluate_every": 1}
MODEKIT = {"output": {"format": "modekit"}}


def settings_of(**changes: Any) -> TrainSettings:
    return train_settings({**SHORT, **changes}, where="test")


def run(checkpoint: Checkpoint, **changes: Any) -> TrainedMixture:
    return train(checkpoint, settings_of(**changes), evaluate_tokens=None)


def log_of(checkpoint: Checkpoint) -> list[dict[str, str]]:
    path = checkpoint.folder / "results" / "train.csv"
    return list(csv.DictReader(path.read_text().splitlines()))


def drawn(tokens: int, experts: int, *, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * spread


# Losses.


def test_the_load_is_the_smooth_share_of_tokens_that_an_expert_gets() -> None:
    logits, noisy, deviation = drawn(6, 4), drawn(6, 4, seed=1), 0.5
    loads = [0.0] * 4
    for row, expert in itertools.product(range(6), range(4)):
        others = sorted((float(noisy[row, other]) for other in range(4) if other != expert), reverse=True)
        distance = (float(logits[row, expert]) - others[1]) / deviation  # the second best of the others
        loads[expert] += 0.5 * (1 + math.erf(distance / math.sqrt(2)))
    mean = sum(loads) / 4
    variation = sum((each - mean) ** 2 for each in loads) / 4 / mean**2
    assert load(logits, noisy, 2, deviation) == pytest.approx(6 * variation, rel=1e-4)
    assert load(logits, noisy, 4, deviation) == 0.0


def test_mutual_information_is_all_where_experts_say_the_domain_and_nothing_where_they_are_alike() -> None:
    labels = torch.tensor([0, 0, 1, 1, GENERIC])
    known = torch.nn.functional.one_hot(labels.clamp_min(0), 2) * 50.0
    assert mutual(known, labels) == pytest.approx(-4 * math.log(2), rel=1e-5)
    assert mutual(torch.zeros(5, 2), labels) == pytest.approx(0.0, abs=1e-6)
    assert mutual(known, torch.full((5,), GENERIC)) == 0.0
    logits = drawn(4, 2)
    joint = torch.stack([logits.softmax(-1)[:2].sum(0), logits.softmax(-1)[2:].sum(0)]) / 4
    wanted = sum(
        float(joint[d, e] * (joint[d, e] / joint[d].sum() / joint[:, e].sum()).log()) for d in range(2) for e in range(2)
    )
    assert mutual(logits, labels[:4]) == pytest.approx(-4 * wanted, rel=1e-4)


def test_consistency_is_the_mean_of_both_divergences() -> None:
    first, second = drawn(5, 7).log_softmax(-1), drawn(5, 7, seed=1).log_softmax(-1)
    wanted = 0.5 * float(((first.exp() - second.exp()) * (first - second)).sum())
    assert consistency(first, second) == pytest.approx(wanted, rel=1e-5) and consistency(first, first) == 0.0
    assert WEIGHTS["consistency"] == 5.0 / 2  # lm is the mean of two passes here, and in the authors' script their sum


# Gates.


def situation(logits: torch.Tensor, **changes: Any) -> Situation:
    labels = torch.arange(len(logits)) % logits.shape[-1]
    return Situation(
        **{"labels_N": labels, "top_k": 2, "progress": 0.5, "groups_EE": torch.eye(logits.shape[-1]).bool(), **changes}
    )


MOST = {"base": 1, "sinkhorn": 2, "random": 2, "domain-random": 1, "dselect": 4, "dense-to-sparse": 4}


@pytest.mark.parametrize("gate", GATES)
def test_weights_sum_to_one_over_as_many_experts_as_claimed_and_teach_where_they_should(gate: Gate) -> None:
    torch.manual_seed(0)
    logits = drawn(64, 4).requires_grad_()
    weights = CHOOSE[gate](logits, situation(logits))
    assert torch.allclose(weights.sum(-1), torch.ones(64), atol=1e-6) and (weights >= 0).all()
    active = (weights > 0).sum(-1)
    assert active.max() <= MOST[gate]
    assert GATES[gate].takes_any or (active == MOST[gate]).all()
    assert weights.requires_grad == GATES[gate].teaches
    if GATES[gate].teaches:
        (weights * torch.arange(4.0)).sum().backward()
        assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad.abs().sum() > 0
    assert CHOOSE.keys() == GATES.keys()


def test_base_gives_every_expert_as_many_tokens_at_the_best_sum() -> None:
    for seed in range(5):
        scores = drawn(6, 3, seed=seed)
        taken = balanced(scores).int().argmax(-1)
        assert taken.bincount(minlength=3).tolist() == [2, 2, 2]
        every = (each for each in itertools.product(range(3), repeat=6) if all(each.count(e) == 2 for e in range(3)))
        best = max(float(scores[range(6), list(each)].sum()) for each in every)
        assert float(scores[range(6), taken].sum()) == pytest.approx(best, abs=6 * float(scores.max() - scores.min()) / 200)
    assert balanced(torch.zeros(40, 4)).sum(0).tolist() == [10, 10, 10, 10]
    lopsided = drawn(41, 4) + torch.tensor([100.0, 0, 0, 0])
    assert balanced(lopsided).sum(0).max() == 11


def test_a_sinkhorn_plan_has_equal_shares_of_all_experts() -> None:
    logits = drawn(60, 4, spread=2.0) + torch.tensor([3.0, 0, 0, 0])
    plan = sinkhorn(logits).exp()
    assert torch.allclose(plan.sum(-1), torch.ones(60).double(), atol=1e-2)
    assert torch.allclose(plan.sum(0), torch.full((4,), 15.0).double(), rtol=1e-2)
    loads = (CHOOSE["sinkhorn"](logits, situation(logits)) > 0).sum(0)
    assert loads.max() < (select(logits, {"method": "routing", "top_k": 2}) > 0).sum(0).max()


def test_dselect_is_top_k_where_its_steps_are_at_their_ends() -> None:
    step = smooth_step(torch.tensor([-1.0, -0.5, 0.0, 0.25, 0.5, 3.0]))
    assert step.tolist() == pytest.approx([0.0, 0.0, 0.5, -2 / 64 + 0.375 + 0.5, 1.0, 1.0])
    far = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(row)) for row in range(20)]).float()
    weights = CHOOSE["dselect"](far, situation(far))
    assert torch.allclose(weights, select(far, {"method": "routing", "top_k": 2}), atol=1e-6)
    near = far * 0.1
    assert ((CHOOSE["dselect"](near, situation(near)) > 0).sum(-1) > 2).any()


def test_dense_to_sparse_takes_fewer_experts_as_the_run_goes_on() -> None:
    torch.manual_seed(0)
    logits = drawn(400, 4, spread=0.1)
    active = [
        float((CHOOSE["dense-to-sparse"](logits, situation(logits, progress=p)) > 0).sum(-1).float().mean())
        for p in (0, 0.5, 1)
    ]
    assert active[0] > 3.8 > active[1] > active[2] and active[2] < 3.2


def test_random_experts_come_from_all_or_from_the_group_of_the_domain() -> None:
    torch.manual_seed(0)
    logits = torch.zeros(3000, 3)
    even = CHOOSE["random"](logits, situation(logits))
    assert torch.allclose((even > 0).float().mean(0), torch.full((3,), 2 / 3), atol=0.05)
    groups = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    labels = torch.tensor([0, 2, GENERIC]).repeat(1000)
    taken = CHOOSE["domain-random"](logits, situation(logits, labels_N=labels, groups_EE=groups))
    shares = torch.stack([taken[labels == label].mean(0) for label in (0, 2, GENERIC)])
    assert torch.allclose(shares, torch.tensor([[0.5, 0.5, 0], [0, 0, 1], [1 / 3, 1 / 3, 1 / 3]]), atol=0.05)


# Capacity.


def own(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    return select(logits, {"method": "routing", "top_k": top_k})


def limited(
    logits: torch.Tensor, weights: torch.Tensor, places: torch.Tensor, capacity: float, overflow: str, priority: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return within_capacity(logits, weights, places, settings_of(capacity=capacity, overflow=overflow, priority=priority))


def test_what_overflows_is_as_much_as_the_formula_says_and_the_first_stay() -> None:
    logits = torch.tensor([[5.0, 0, 0, 0]] * 10 + [[0, 5.0, 0, 0]] * 2)
    kept, dropped, asked = limited(logits, own(logits, 1), torch.arange(12), 1.0, "drop", "position")
    room = math.ceil(1.0 * 12 / 4)
    assert dropped.sum() == 10 - room and asked.sum() == 12
    assert kept.sum(-1).tolist() == [1.0] * 3 + [0.0] * 7 + [1.0] * 2
    back, _, _ = limited(logits, own(logits, 1), torch.arange(12).flip(0), 1.0, "drop", "position")
    assert back.sum(-1).tolist() == [0.0] * 7 + [1.0] * 5


@pytest.mark.parametrize(("factor", "overflow"), [(0.5, "drop"), (1.25, "drop"), (1.0, "next"), (2.0, "next"), (0.5, "random")])
def test_no_expert_takes_more_than_its_capacity(factor: float, overflow: Any) -> None:
    torch.manual_seed(0)
    logits = drawn(50, 5) + torch.tensor([2.0, 1, 0, 0, 0])
    weights = own(logits, 2)
    kept, dropped, asked = limited(logits, weights, torch.arange(50), factor, overflow, "position")
    taken = (kept > 0).sum(0)
    assert taken.max() <= math.ceil(factor * 100 / 5) and int(taken.sum()) == int(asked.sum() - dropped.sum())
    if overflow == "next":
        assert dropped.sum() <= 2 and torch.allclose(kept.sum(-1), torch.ones(50), atol=1e-6)
        assert ((kept > 0).sum(-1) <= 2).all()
    else:
        assert ((kept == weights) | (kept == 0)).all()


def test_batch_priority_drops_less_of_the_gates_mass_than_order_does() -> None:
    for seed in range(5):
        logits = drawn(200, 4, seed=seed) + torch.tensor([1.5, 0, 0, 0])
        mass, weights = logits.softmax(-1), own(logits, 1)
        lost = {}
        for priority in ("position", "score"):
            kept, dropped, _ = limited(logits, weights, torch.arange(200), 1.0, "drop", priority)
            lost[priority] = float(mass[(weights > 0) & (kept == 0)].sum()), int(dropped.sum())
        assert lost["score"][1] == lost["position"][1] > 0 and lost["score"][0] < lost["position"][0]


def test_a_second_expert_is_taken_as_often_as_twice_its_weight_says() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, 0.0, -9.0]]).repeat(4000, 1)
    kept, dropped, _ = limited(logits, own(logits, 2), torch.arange(4000), 9.0, "random", "position")
    second = float(logits[0, :2].softmax(-1)[1])
    assert float((kept[:, 1] > 0).float().mean()) == pytest.approx(2 * second, abs=0.03)
    assert (kept[:, 0] > 0).all() and dropped.sum() == 0


# In mixtures.


def objective_of(checkpoint: Checkpoint, settings: TrainSettings, *, packed: bool = False) -> tuple[Objective, dict[str, Any]]:
    """An objective that trains, and a batch."""
    generator = torch.Generator().manual_seed(3)
    sizes = (9, 31, 17, 24)
    corpora = [
        DomainSequences(
            name,
            place,
            [TokenSequence(tuple(torch.randint(3, 96, (size,), generator=generator).tolist()), size) for size in sizes],
        )
        for place, name in enumerate(DOMAINS)
    ]
    parts = plan_parts(corpora, settings, steps=1, experts=3, parts=1, pack=packed)
    model = load_model(checkpoint.folder)
    model.requires_grad_(True)
    with torch.no_grad():
        for seed, gate in enumerate(mixture_of(model, checkpoint).gates()):
            gate.copy_(drawn(*gate.shape, seed=seed, spread=0.05))
    objective = Objective(model, checkpoint, settings, teachers=[], train_top_k=None, packed=packed)
    return objective.train(), Batches(corpora, parts, pad_id=0)[0]


WITHOUT_DRAWS: list[dict[str, Any]] = [
    {"gate": "base"},
    {"gate": "sinkhorn"},
    {"gate": "dselect"},
    {"capacity": 0.6},
    {"capacity": 0.6, "overflow": "next", "priority": "score"},
    {"gate": "sinkhorn", "capacity": 0.5},
]


def test_both_forms_choose_alike_with_the_same_gradients(workshop: Workshop) -> None:
    mixture = {**workshop.recipe["mixture"], "top_k": 2}
    native = open_checkpoint(workshop.build("NATIVE", mixture=mixture))
    other = open_checkpoint(workshop.build("OTHER", mixture=mixture, **MODEKIT))
    assert native.shape.plain and not other.shape.plain
    for changes in WITHOUT_DRAWS:
        losses = {"lm": 1.0, "label": 0.1, "mutual": 0.1}
        found = []
        for checkpoint in (native, other):
            objective, item = objective_of(checkpoint, settings_of(losses=losses, **changes))
            loss = objective(**item)["loss"]
            loss.backward()
            gates = mixture_of(objective.model, checkpoint).gates()
            found.append((float(loss.detach()), [gate.grad for gate in gates], objective.drain()))
        (first, one, logged), (second, two, again) = found
        assert first == pytest.approx(second, rel=1e-4), changes
        assert logged == pytest.approx(again, rel=1e-3)
        for a, b in zip(one, two, strict=True):
            assert a is not None and b is not None and float(a.abs().sum()) > 0
            assert torch.allclose(a, b, atol=1e-3 * float(b.abs().max())), changes


@pytest.mark.parametrize("format_", ["native", "modekit"])
def test_a_dropped_token_passes_by_the_experts(workshop: Workshop, ids: torch.Tensor, format_: str) -> None:
    checkpoint = open_checkpoint(workshop.build("OUT", output={"format": format_}))
    model = load_model(checkpoint.folder).train()
    loaded = mixture_of(model, checkpoint)
    before = logits_of(model.eval(), ids)
    loaded.choose_by(lambda _slot, _logits, weights: torch.zeros_like(weights))
    assert torch.equal(logits_of(model.eval(), ids), before)  # in training alone
    nothing = logits_of(model.train(), ids)
    backbone = load_model(workshop.root / "base")
    state = load_model(checkpoint.folder).state_dict()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.copy_(state.get(name, parameter))
            if "down_proj" in name:
                parameter.zero_()
    assert torch.allclose(nothing, logits_of(backbone, ids), atol=1e-5)


def test_every_gate_trains_a_mixture_that_afterwards_decides_by_itself(workshop: Workshop) -> None:
    config = None
    for gate, row in GATES.items():
        checkpoint = open_checkpoint(workshop.build(f"OUT-{gate}"))
        config = config or (checkpoint.folder / "config.json").read_bytes()
        capacity = {} if row.balances else {"capacity": 1.0}
        done = run(
            checkpoint, what=["routers", "experts"], evaluate_every=3, gate=gate, backbone_learning_rate=0.01, **capacity
        )
        assert done.failed is None and done.improved, gate
        assert (checkpoint.folder / "config.json").read_bytes() == config
        model, again = load_model(checkpoint.folder), load_model(checkpoint.folder).train()
        row_ids = torch.arange(3, 23)[None]
        assert torch.allclose(logits_of(model, row_ids), logits_of(again, row_ids), atol=1e-6)
        if capacity:
            assert {f"dropped_{quarter}" for quarter in range(1, 5)} <= log_of(checkpoint)[1].keys()
            assert any("dropped, by quarter of the sequence" in note for note in done.record.notes)


def test_early_tokens_are_served_first_and_the_log_shows_it(workshop: Workshop) -> None:
    objective, item = objective_of(open_checkpoint(workshop.build()), settings_of(capacity=0.5, sequence_length=32))
    objective(**item)
    logged = objective.drain()
    rates = [logged[f"dropped_{quarter}"] for quarter in range(1, 5)]
    assert objective.notes() == [f"capacity 0.5 dropped, by quarter of the sequence: {', '.join(f'{r:.3f}' for r in rates)}"]
    assert rates[0] < rates[1] < rates[2] and rates[3] > 0.8


class _KilledError(Exception):
    pass


def test_draws_are_the_same_after_a_kill_and_when_layers_are_computed_again(workshop: Workshop) -> None:
    changes = {
        "what": ["experts"],
        "gate": "random",
        "capacity": 1.0,
        "losses": {"lm": 1.0, "consistency": 0.1},
        "steps": 6,
        "evaluate_every": 2,
        "backbone_learning_rate": 0.01,
    }
    whole, cut, again = (open_checkpoint(workshop.build(name)) for name in ("WHOLE", "CUT", "AGAIN"))

    def killed(stage: str, done: int, _total: int) -> None:
        if stage == "train" and done == 4:
            raise _KilledError

    first = run(whole, **changes)
    with pytest.raises(_KilledError):
        train(cut, settings_of(**changes), evaluate_tokens=None, run=Run(progress=killed))
    assert run(cut, **changes).record.notes == first.record.notes and log_of(cut) == log_of(whole)
    assert run(again, **changes, checkpointing=True).improved
    for one, two in zip(log_of(whole), log_of(again), strict=True):
        assert {key for key in one if one[key]} == {key for key in two if two[key]}
        assert all(float(one[key]) == pytest.approx(float(two[key]), rel=1e-3, abs=1e-5) for key in one if one[key])


def test_two_passes_become_consistent(workshop: Workshop) -> None:
    checkpoint = open_checkpoint(workshop.build())
    changes = {"what": ["experts"], "gate": "random", "train_top_k": 1, "backbone_learning_rate": 0.01}
    run(checkpoint, **changes, losses={"consistency": 1.0}, steps=10, batch_tokens=1500, patience=99)
    values = [float(row["loss_consistency"]) for row in log_of(checkpoint) if row["loss_consistency"]]
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("loss", ["load", "mutual"])
def test_each_loss_of_routers_falls(workshop: Workshop, loss: str) -> None:
    router = {"fit": "random", "temperature": 0.05}
    checkpoint = open_checkpoint(workshop.build(mixture={"method": "routing", "top_k": 2, "router": router}))
    run(checkpoint, losses={loss: 1.0}, steps=12, batch_tokens=2000, learning_rate=0.05, patience=99)
    values = [float(row[f"loss_{loss}"]) for row in log_of(checkpoint) if row.get(f"loss_{loss}")]
    assert values[-1] < values[0]


# What is refused.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"priority": "score"}, "without effect here: priority"),
        ({"gate": "base", "capacity": 1.0}, "without effect here: capacity"),
        ({"gate": "random"}, "so that none learns"),
        ({"gate": "domain-random", "losses": {"distill": 1.0}}, "so that none learns"),
        ({"gate": "sinkhorn", "losses": {"lm": 1.0, "consistency": 1.0}}, "experts that are drawn"),
        ({"capacity": 1.0, "regime": "joint", "what": ["all"]}, "without effect here: capacity"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        settings_of(**changes)


def test_a_gate_is_refused_where_nothing_is_left_to_choose(workshop: Workshop) -> None:
    linear = open_checkpoint(workshop.build("LINEAR", mixture={"method": "linear"}))
    with pytest.raises(TrainingError, match="no router to train"):
        run(linear, what=["experts"], gate="base")
    always = {"method": "routing", "top_k": 1, "always_on": {"expert": "law", "weight": 0.5}, "router": {"fit": "random"}}
    with pytest.raises(TrainingError, match="always on has its share"):
        run(open_checkpoint(workshop.build("ALWAYS", mixture=always)), capacity=1.0)
    single = open_checkpoint(workshop.build("ONE", mixture={"method": "routing", "top_k": 1, "router": {"fit": "random"}}))
    done = run(single, what=["experts"], capacity=1.0, overflow="random")
    assert any("trained with 2 experts per token" in note for note in done.record.notes)  # one alone leaves nothing to draw


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"gate": "sinkhorn"}, "gate: sinkhorn"),
        ({"losses": {"lm": 1.0, "balance": 0.1}}, "losses: balance"),
    ],
)
def test_what_chooses_among_all_experts_is_refused(workshop: Workshop, changes: dict[str, Any], where: str) -> None:
    for number, more in enumerate(({"train_top_k": 0}, {"train_top_k": 3}, {})):
        mixture = {} if more else {"mixture": {"method": "gating", "router": {"fit": "random"}}}
        with pytest.raises(TrainingError, match=f"(?s)all experts.*{where}.*3 experts per token of 3.*train_top_k to 2"):
            run(open_checkpoint(workshop.build(f"OUT-{number}", **mixture)), **changes, **more)
