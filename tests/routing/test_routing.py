"""Router fits: what is captured, what is solved, what a re-fit touches. Promise 7."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modekit.routing.inputs as inputs_module
from conftest import DOMAINS, Workshop
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.checkpoint.record import STATISTICS_FOLDER
from modekit.errors import TextError
from modekit.loaded.native import DenseView
from modekit.planning.mixture_config import averages_of
from modekit.planning.plan import ROUTER_FILE
from modekit.recipes.mixture import Router
from modekit.routing.fit import refit
from modekit.routing.inputs import DomainStatistics, GateInput, SlotStatistics, capture_domain
from modekit.routing.linear import fit_gates
from modekit.text.held_out import fit_documents
from modekit.text.sequences import TokenSequence, encode, make_batches
from refusal import tree
from rounding import assert_same_checkpoint

FIT: dict[str, Any] = {"fit": "logistic", "tokens_per_domain": 600, "sequence_length": 32, "keep_tokens": 256}


def fitted(workshop: Workshop, name: str = "OUT", **router: Any) -> Checkpoint:
    mixture = {"method": "routing", "top_k": 2, "router": {**FIT, **router}}
    return open_checkpoint(workshop.build(name, mixture=mixture))


def sequences_of(checkpoint: Checkpoint, place: int) -> list[TokenSequence]:
    expert = checkpoint.record.recipe.experts[place]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    documents = fit_documents(expert, checkpoint.recipe_root, place)
    return encode(tokenizer, documents, max_tokens=FIT["tokens_per_domain"], sequence_length=FIT["sequence_length"])


def capture(checkpoint: Checkpoint, place: int, sequences: list[TokenSequence], keep: int = 64) -> DomainStatistics:
    view = DenseView(checkpoint)
    view.use_expert(place)
    return capture_domain(view, sequences, [], read=GateInput(averages_of(Router())), keep_tokens=keep)


@pytest.fixture(scope="module")
def checkpoint(shared_workshop: Workshop) -> Checkpoint:
    return fitted(shared_workshop, "ROUTING")


def hand_made_inputs(checkpoint: Checkpoint, place: int, sequences: list[TokenSequence]) -> list[torch.Tensor]:
    """X per layer, one sequence at a time without any padding, from a dense model put together by hand."""
    root = checkpoint.recipe_root
    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32).eval()
    expert = AutoModelForCausalLM.from_pretrained(root / DOMAINS[place], dtype=torch.float32)
    seen: list[list[torch.Tensor]] = []
    for mine, theirs in zip(model.model.layers, expert.model.layers, strict=True):
        mine.mlp = theirs.mlp
        rows: list[torch.Tensor] = []
        seen.append(rows)
        mine.mlp.register_forward_pre_hook(lambda _m, args, rows=rows: rows.append(args[0][0]))
    with torch.inference_mode():
        for sequence in sequences:
            model(input_ids=torch.tensor([sequence.ids]))
    return [torch.cat(rows) for rows in seen]


def test_statistics_are_sums_over_what_the_router_reads(checkpoint: Checkpoint) -> None:
    sequences = sequences_of(checkpoint, 1)
    x_layers = hand_made_inputs(checkpoint, 1, sequences)
    statistics = capture(checkpoint, 1, sequences)
    assert statistics.tokens == len(x_layers[0]) == sum(len(sequence.ids) for sequence in sequences)
    kept = torch.linspace(0, statistics.tokens - 1, 64, dtype=torch.float64).round().long()
    for slot, x_TD in zip(statistics.slots, x_layers, strict=True):
        torch.testing.assert_close(slot.sum_D, x_TD.double().sum(0), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(slot.sample_ND.float(), x_TD[kept], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("fit", ["centroid", "logistic"])
def test_padding_and_batch_order_never_change_a_fit(checkpoint: Checkpoint, fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Router(fit=fit)
    reference = [capture(checkpoint, place, sequences_of(checkpoint, place)) for place in range(3)]

    def other_batches(sequences: Any, **_: Any) -> Any:
        yield from list(make_batches(sequences, tokens=70))[::-1]

    monkeypatch.setattr(inputs_module, "make_batches", other_batches)
    changed = [capture(checkpoint, place, sequences_of(checkpoint, place)) for place in range(3)]
    expected = torch.stack(fit_gates(settings, reference))
    gates = torch.stack(fit_gates(settings, changed))
    torch.testing.assert_close(gates, expected, rtol=5e-3, atol=5e-3 * float(expected.abs().max()))


def made_up_domains(hidden: int = 12, tokens: int = 400) -> list[DomainStatistics]:
    generator = torch.Generator().manual_seed(3)
    domains = []
    for count in (tokens, tokens // 2, tokens):
        centre = torch.randn(hidden, generator=generator, dtype=torch.float64)
        x_LTD = torch.randn((2, count, hidden), generator=generator, dtype=torch.float64) + centre
        slots = tuple(SlotStatistics(x_TD.sum(0), torch.zeros(hidden).double(), x_TD.half(), count) for x_TD in x_LTD)
        domains.append(DomainStatistics(count, slots, {}))
    return domains


def assert_same_up_to_a_temperature(gates_ED: torch.Tensor, expected_ED: torch.Tensor) -> None:
    torch.testing.assert_close(gates_ED / gates_ED.norm(), expected_ED / expected_ED.norm(), rtol=2e-2, atol=2e-3)


def test_the_temperature_is_the_likeliest_one() -> None:
    domains = made_up_domains()
    gates = fit_gates(Router(fit="centroid"), domains)
    x_ND = torch.cat([domain.slots[0].sample_ND.float() for domain in domains])
    labels = torch.cat([torch.full((domain.tokens,), place) for place, domain in enumerate(domains)])
    shares = torch.cat([torch.full((domain.tokens,), 1 / domain.tokens / 3) for domain in domains])

    def loss(factor: float) -> float:
        logits = x_ND @ gates[0].T * factor
        return float((torch.nn.functional.cross_entropy(logits, labels, reduction="none") * shares).sum())

    assert loss(1.0) <= min(loss(1.25), loss(0.8))


def test_centroid_is_the_mean_less_the_negatives_at_length_one() -> None:
    domains = made_up_domains()
    negative = torch.ones(12).double()
    domains[1] = replace(domains[1], slots=tuple(replace(slot, negative_D=negative) for slot in domains[1].slots))
    gates = fit_gates(Router(fit="centroid"), domains)
    expected = torch.stack([domain.slots[0].mean_D for domain in domains])
    expected[1] -= 1
    assert_same_up_to_a_temperature(gates[0].double(), expected / expected.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"router": {"temperature": 3.0}},
        {"top_k": 1},
        {"method": "linear"},
        {"router": {"fit": "random", "seed": 9}},
    ],
)
def test_refit_touches_the_router_alone_and_reads_no_text_again(
    workshop: Workshop, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = fitted(workshop)
    before = tree(checkpoint.folder)

    def no_forward(*_: Any, **__: Any) -> Any:
        raise AssertionError("a re-fit from kept statistics must not run the model")

    monkeypatch.setattr(inputs_module, "expert_view", no_forward)
    refit(checkpoint, changes)
    after = tree(checkpoint.folder)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= {ROUTER_FILE, "config.json", "modekit.json", ".modekit"}
    reopened = open_checkpoint(checkpoint.folder)
    expected_k = {"top_k": 1, "method": 3}.get(next(iter(changes)), 2)
    assert reopened.config["num_experts_per_tok"] == reopened.record.recipe.top_k == expected_k


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for every domain whose text is read."""
    read: list[int] = []
    real = inputs_module.capture_domain
    monkeypatch.setattr(inputs_module, "capture_domain", lambda *a, **k: (read.append(1), real(*a, **k))[1])
    return read


def test_interrupted_fit_goes_on_with_the_next_domain(workshop: Workshop, read: list[int]) -> None:
    checkpoint = fitted(workshop)
    expected = shutil.copytree(checkpoint.folder, workshop.root / "EXPECTED")
    (checkpoint.folder / STATISTICS_FOLDER / "law.safetensors").unlink()
    read.clear()
    refit(checkpoint, {})
    assert len(read) == 1
    assert_same_checkpoint(checkpoint.folder, expected)


def test_changed_text_is_read_again(workshop: Workshop, read: list[int]) -> None:
    checkpoint = fitted(workshop)
    text = workshop.root / "text" / "law.jsonl"
    text.write_text(text.read_text().replace("clause", "schedule"))
    read.clear()
    refit(checkpoint, {})
    assert len(read) == 1


def test_a_refit_needs_no_text_when_its_statistics_are_kept(workshop: Workshop) -> None:
    checkpoint = fitted(workshop)
    (workshop.root / "text").rename(workshop.root / "gone")
    assert refit(checkpoint, {"router": {"fit": "logistic"}}).record.router.status == "fitted"
    with pytest.raises(TextError, match="does not exist"):
        refit(checkpoint, {"router": {"tokens_per_domain": 300}})


def test_prompts_stand_in_for_text(workshop: Workshop) -> None:
    experts = [
        {"name": name, "model": f"./{name}", "prompts": [f"about {name}", f"more {name}"], "negative_prompts": ["the weather"]}
        for name in DOMAINS
    ]
    mixture = {"method": "routing", "router": {**FIT, "fit": "centroid"}}
    checkpoint = open_checkpoint(workshop.build(experts=experts, mixture=mixture))
    assert checkpoint.record.router.status == "fitted"
    assert checkpoint.record.router.text["law"]["documents"] == 2
