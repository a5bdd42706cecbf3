"""Formulas of papers, each against a case whose result is known by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pools import tiny_adapters, tiny_pool
from transformers import AutoModelForCausalLM, AutoTokenizer

from peers import bitdelta, dume, lorahub, peft_rows, trained, twin, wemoe
from peers.bounds import Ensemble, PerRequest, mean_of, models_of, moved, per_request
from peers.mixtral import mixtral
from peers.peer import Pool
from peers.score import scores, texts_of
from peers.training import Steps, batches


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> Pool:
    return tiny_adapters(pool, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def ids(pool: Pool) -> torch.Tensor:
    return torch.tensor([AutoTokenizer.from_pretrained(pool.base)("the fever of the index rises")["input_ids"]])


def copies(pool: Pool) -> Pool:
    return replace(pool, whole=dict.fromkeys(pool.whole, pool.whole["a"]))


def test_averages_and_task_arithmetic() -> None:
    base, first, second = ({"w": torch.tensor([each])} for each in (1.0, 3.0, 2.0))
    assert mean_of([first, second])["w"].item() == 2.5
    assert moved(base, [first, second], [1.0, 0.5])["w"].item() == 1 + 2 + 0.5


def test_a_mixtral_of_copies_is_the_copy(pool: Pool, ids: torch.Tensor) -> None:
    model, *_ = models_of(pool)
    gates = [torch.randn(3, 32) for _ in range(2)]
    made = mixtral(model.config, model.state_dict(), [model.state_dict()] * 3, gates, 2)
    torch.testing.assert_close(made(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_a_posterior_is_what_bayes_says() -> None:
    class Says(torch.nn.Module):
        def __init__(self, chance: float) -> None:
            super().__init__()
            self.chances = torch.tensor([chance, 1 - chance])

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            return type("Output", (), {"logits": self.chances.log().expand(*input_ids.shape, 2)})

    ids_BS = torch.tensor([[1, 0, 0, 1]])
    models = [Says(0.9), Says(0.2)]
    uniform = Ensemble(models, posterior=False).logits(ids_BS).softmax(-1)[0, :, 0]
    torch.testing.assert_close(uniform, torch.full((4,), 0.55))
    first = torch.tensor([0.5, 0.9 / 1.1, 0.81 / 0.85, 0.081 / (0.081 + 0.032)])  # the first token is predicted by nobody
    found = Ensemble(models, posterior=True).logits(ids_BS).softmax(-1)[0, :, 0]
    torch.testing.assert_close(found, first * 0.9 + (1 - first) * 0.2)


def test_a_request_goes_to_the_model_of_its_text(pool: Pool) -> None:
    made = per_request(pool, Path())
    assert isinstance(made.model, PerRequest)
    texts = texts_of(pool.base, pool.text, 100)
    for name, sequences in texts.items():
        ids_BS = torch.tensor([sequences[0].ids])
        before = AutoModelForCausalLM.from_pretrained(pool.base)(ids_BS).logits
        torch.testing.assert_close(made.model.logits(ids_BS), before)  # shorter than the prefix
        long_BS = torch.tensor([sum((each.ids for each in sequences[:5]), ())])
        own = AutoModelForCausalLM.from_pretrained(pool.whole[name])(long_BS).logits
        torch.testing.assert_close(made.model.logits(long_BS)[:, 32:], own[:, 32:], atol=1e-5, rtol=0)


def test_ridge_finds_the_directions_of_two_domains() -> None:
    gates_ED = dume.ridge(torch.diag(torch.tensor([4.0, 1.0, 1.0])), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(gates_ED, torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))


def test_dume_of_copies_is_the_copy_and_of_two_beats_the_average(pool: Pool, tmp_path: Path) -> None:
    texts = texts_of(pool.base, pool.text, 200)
    same, own = (scores(model, texts, pool.base) for model in (dume.dume(copies(pool), tmp_path).model, pool.whole["a"]))
    assert same["b"][0] == pytest.approx(own["b"][0], abs=1e-4)
    gates = dume.gates_of(pool, *_averaged(pool))
    assert all(gate.shape == (2, 32) for gate in gates)


def _averaged(pool: Pool) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    states = [model.state_dict() for model in models_of(pool)]
    return mean_of(states), states


def test_wemoe_begins_as_task_arithmetic(pool: Pool, ids: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(pool.base)
    model.load_state_dict(moved(model.state_dict(), [each.state_dict() for each in models_of(pool)], [wemoe.FACTOR] * 2))
    torch.testing.assert_close(wemoe.wemoe(pool)(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_wemoe_reads_nothing_ahead(pool: Pool, ids: torch.Tensor) -> None:
    model = wemoe.wemoe(pool)
    for each in model.model.layers:
        torch.nn.init.normal_(each.mlp.router.second.weight)
    torch.testing.assert_close(model(ids).logits[:, :4], model(ids[:, :4]).logits, atol=1e-5, rtol=0)


def test_twin_merging_with_every_singular_value_is_the_expert_that_its_router_names(
    pool: Pool, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twin, "PREFIX", 8)
    monkeypatch.setattr(twin, "SHARES", (1.0,))
    model = twin.twin(pool, Path()).model
    assert isinstance(model, twin.Twin)
    for place, expert in enumerate(models_of(pool)):
        merged = model.merged([float(each == place) for each in range(2)])
        for name, weight in expert.named_parameters():
            torch.testing.assert_close(merged[name], weight.detach(), atol=1e-5, rtol=0)
    for place, sequences in enumerate(texts_of(pool.base, pool.text, 100).values()):
        shares = model.router.predict_proba(twin.embedded(model.shared, torch.tensor([sequences[0].ids[:8]])))[0]
        assert shares.argmax() == place
    shared, said = model.shared(ids).logits, model.logits(ids)
    torch.testing.assert_close(said[:, :7], shared[:, :7])
    assert not torch.allclose(said[:, 7:], shared[:, 7:], atol=1e-3)
    torch.testing.assert_close(said[:, :9], model.logits(ids[:, :9]), atol=1e-5, rtol=0)


def test_one_bit_keeps_signs_and_the_mean_size() -> None:
    made = bitdelta.one_bit(torch.zeros(2, 2), torch.tensor([[1.0, -3.0], [2.0, -2.0]]))
    assert made.tolist() == [[2.0, -2.0], [2.0, -2.0]]
    base = {"q_proj.weight": torch.zeros(4, 4), "norm.weight": torch.zeros(4), "head.weight": torch.zeros(3)}
    expert = {"q_proj.weight": torch.ones(4, 4), "norm.weight": torch.ones(4), "head.weight": torch.zeros(3)}
    assert bitdelta.bytes_of(base, expert) == 16 // 8 + 2 + 2 * 4


def test_training_lowers_the_loss_and_moves_gates_alone(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "STEPS", Steps(count=8, rate=3e-3, length=24))
    rows = list(batches(pool, trained.STEPS))
    assert [row.shape for row in rows] == [(2, 24)] * 8
    texts = texts_of(pool.base, pool.text, 200)
    base = scores(pool.base, texts, pool.base)
    for everything in (True, False):
        made = trained.btx(everything, pool, tmp_path / str(everything))
        found = scores(made.model, texts, pool.base)
        assert sum(nats for nats, _ in found.values()) < sum(nats for nats, _ in base.values())
        embedding = AutoModelForCausalLM.from_pretrained(made.model).get_input_embeddings().weight
        average = _averaged(pool)[0]["model.embed_tokens.weight"]
        assert torch.equal(embedding, average) != everything


def test_arrow_of_copies_is_the_copy(adapters: Pool, ids: torch.Tensor, tmp_path: Path) -> None:
    same = replace(adapters, experts=dict.fromkeys(("a", "b", "c"), adapters.experts["a"]))
    own = AutoModelForCausalLM.from_pretrained(adapters.whole["a"])(ids).logits
    torch.testing.assert_close(peft_rows.arrow(same, tmp_path).model.logits(ids), own, atol=1e-4, rtol=0)


def test_xlora_is_trained_and_reads_nothing_ahead(
    adapters: Pool, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_rows, "XLORA_STEPS", Steps(count=2, rate=1e-2, length=16))
    model = peft_rows.xlora(adapters, tmp_path).model
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(ids)[:, :4], model.logits(ids[:, :4]), atol=1e-5, rtol=0)


def test_lorahub_sums_factors(adapters: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lorahub.combined([torch.ones(2), torch.tensor([0.0, 4.0])], [2.0, 0.5]).tolist() == [2.0, 4.0]
    monkeypatch.setattr(lorahub, "SEARCHED", 3)
    made = lorahub.lorahub(adapters, tmp_path)
    texts = texts_of(adapters.base, adapters.text, 200)
    found, base = (scores(model, texts, adapters.base) for model in (made.model, adapters.base))
    assert sum(nats for nats, _ in found.values()) <= sum(nats for nats, _ in base.values()) + 1e-3
