"""The table: honest losses, the right rows, nothing scored that set the router."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import modekit.evaluation.rows as rows_module
import modekit.loaded.experts as experts_module
from conftest import DOMAINS, Workshop, save
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import CheckpointError, TextError
from modekit.evaluation.domains import held_out_domains, score_domain, scored_on
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.inspection.inspect import inspect_text
from modekit.evaluation.results import Results, gap_error, mean_error
from modekit.experts.moving import trainable_parameters
from modekit.experts.specialize import specialize
from modekit.loaded.text_training import Training
from modekit.routing.fit import refit
from modekit.text.documents import read_documents
from modekit.text.held_out import fit_documents
from modekit.text.sequences import encode
from modekit.text.splits import digest_of, split_of

LOGISTIC = {"method": "routing", "top_k": 2, "router": {"fit": "logistic", "tokens_per_domain": 600, "sequence_length": 32}}


def ffn_specialists(workshop: Workshop) -> None:
    """Experts that differ from the base in the FFN alone."""
    for seed, name in enumerate(DOMAINS, 11):
        model = AutoModelForCausalLM.from_pretrained(workshop.root / "base", dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in trainable_parameters(model, "mlp"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        save(model, workshop.root / name)


@pytest.fixture(scope="module")
def evaluated(shared_workshop: Workshop) -> tuple[Checkpoint, Results]:
    checkpoint = open_checkpoint(shared_workshop.build("EVAL", mixture=LOGISTIC))
    return checkpoint, evaluate(checkpoint, tokens_per_domain=500, sequence_length=32)


def test_rows_and_their_order(evaluated: tuple[Checkpoint, Results]) -> None:
    _, results = evaluated
    assert [row.name for row in results.rows] == ["base", *DOMAINS, "weight average", "oracle", "mixture"]
    assert results.domains == list(DOMAINS)


def test_loss_is_the_mean_over_real_tokens(evaluated: tuple[Checkpoint, Results]) -> None:
    """Against one pass per sequence without any padding."""
    checkpoint, results = evaluated
    model = AutoModelForCausalLM.from_pretrained(checkpoint.recipe_root / "law", dtype=torch.float32).eval()
    domain = held_out_domains(checkpoint, tokens_per_domain=500, sequence_length=32)[1]
    total = count = 0.0
    with torch.inference_mode():
        for sequence in domain.sequences:
            ids = torch.tensor([sequence.ids])
            losses = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum")
            total, count = total + float(losses), count + len(sequence.ids) - 1
    score = results.row("law").scores["law"]
    assert score.loss == pytest.approx(total / count, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


def test_a_mixture_that_was_moved_alone_reads_texts_and_says_what_it_lacks(workshop: Workshop, tmp_path: Path) -> None:
    folder = shutil.move(workshop.build(mixture={"router": {"fit": "random"}}), tmp_path / "moved" / "OUT")
    moved = open_checkpoint(Path(folder))
    assert inspect_text(moved, "the heart moves").tokens
    with pytest.raises(TextError, match=r"(?s)the text does not exist.*moved.text.medicine.*move the text, too"):
        evaluate(moved)


def test_weight_average_is_the_average(evaluated: tuple[Checkpoint, Results]) -> None:
    checkpoint, results = evaluated
    models = [AutoModelForCausalLM.from_pretrained(checkpoint.recipe_root / name, dtype=torch.float32) for name in DOMAINS]
    state = {name: sum(m.state_dict()[name] for m in models) / 3 for name in models[0].state_dict()}
    models[0].load_state_dict(state)
    domain = held_out_domains(checkpoint, tokens_per_domain=500, sequence_length=32)[0]
    assert score_domain(models[0].eval(), domain, lambda _: None).loss == pytest.approx(
        results.row("weight average").scores["medicine"].loss, rel=1e-5
    )


def test_no_scored_document_set_the_router(evaluated: tuple[Checkpoint, Results]) -> None:
    checkpoint, _ = evaluated
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    used: set[tuple[int, ...]] = set()
    for place, expert in enumerate(checkpoint.record.recipe.experts):
        documents = fit_documents(expert, checkpoint.recipe_root, place)
        used |= {sequence.ids for sequence in encode(tokenizer, documents, max_tokens=10**6, sequence_length=200)}
    for domain in held_out_domains(checkpoint, tokens_per_domain=10**6, sequence_length=200):
        assert not used & {sequence.ids for sequence in domain.sequences}


def test_text_given_for_evaluation_loses_what_the_fit_has_seen(workshop: Workshop) -> None:
    (workshop.root / "text" / "poetry.jsonl").write_text(json.dumps({"text": "a rose is a rose"}))
    checkpoint = open_checkpoint(
        workshop.build(mixture=LOGISTIC, eval={"law": "./text/law.jsonl", "poetry": "./text/poetry.jsonl"})
    )
    domains = {domain.name: domain for domain in held_out_domains(checkpoint, tokens_per_domain=10**6, sequence_length=64)}
    seen = {digest_of(document) for document in fit_documents(checkpoint.record.recipe.experts[1], workshop.root, 1)}
    assert domains["law"].record["documents"] == 60 - len(seen)
    assert domains["poetry"].expert is None


def test_text_on_the_command_line_takes_the_place_of_the_recipe_s(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "poetry.jsonl").write_text(json.dumps({"text": "a rose is a rose"}))
    checkpoint = open_checkpoint(workshop.build(mixture=LOGISTIC))
    scored = scored_on(checkpoint, {"law": ["poetry.jsonl"], "music": ["poetry.jsonl"]}, tmp_path)
    domains = {domain.name: domain for domain in held_out_domains(scored, tokens_per_domain=100, sequence_length=64)}
    assert (
        list(domains) == [*DOMAINS, "music"] and domains["law"].record["documents"] == domains["music"].record["documents"] == 1
    )
    assert scored.identity == checkpoint.identity and scored_on(checkpoint, {}, tmp_path) is checkpoint


def test_an_unseen_domain_by_nearly_the_name_of_an_expert_is_pointed_out(evaluated: tuple[Checkpoint, Results]) -> None:
    texts = {"lw": ["text/law.jsonl"], "music": ["text/law.jsonl"]}
    scored = scored_on(evaluated[0], texts, evaluated[0].recipe_root)
    notes = evaluate(scored, tokens_per_domain=100, sequence_length=32, write=False).notes
    assert [note for note in notes if "unseen domain" in note] == [
        "no expert is called lw, so it is an unseen domain; did you mean 'law'?"
    ]
    assert "--text" in " ".join(notes) and "--text" not in " ".join(evaluated[1].notes)  # eval.json and report say so


def test_an_unseen_domain_called_base_has_no_expert(evaluated: tuple[Checkpoint, Results]) -> None:
    """Its row of the base is not its own expert's, that gains nothing."""
    scored = scored_on(evaluated[0], {"base": ["text/law.jsonl"]}, evaluated[0].recipe_root)
    notes = evaluate(scored, tokens_per_domain=100, sequence_length=32, write=False).notes
    assert not [note for note in notes if "base 0.000" in note]


def test_text_given_for_evaluation_loses_what_an_expert_was_trained_on(workshop: Workshop) -> None:
    """Without text for a fit, only the specialist's own list tells what it has seen."""
    (workshop.root / "law").rename(workshop.root / "old")
    training = Training(steps=1, batch_tokens=64, sequence_length=32)
    specialize(workshop.root / "base", workshop.root / "law", ["text/law.jsonl"], root=workshop.root, training=training)
    experts = [{"name": "law", "model": "./law"}, {"name": "code", "model": "./code"}]
    out = workshop.build(experts=experts, mixture={"router": {"fit": "random"}}, eval={"law": "./text/law.jsonl"})
    (domain,) = held_out_domains(open_checkpoint(out), tokens_per_domain=10**6, sequence_length=64)
    documents = read_documents(["text/law.jsonl"], root=workshop.root, where="law")
    assert domain.record["documents"] == len([d for d in documents if split_of(d) != "fit"]) < len(documents)


def test_oracle_of_ffn_specialists_closes_the_whole_gap(workshop: Workshop) -> None:
    training = Training(steps=12, batch_tokens=512, sequence_length=32, learning_rate=1e-2)
    for name in DOMAINS:
        shutil.rmtree(workshop.root / name)
        texts = [f"text/{name}.jsonl"]
        specialize(workshop.root / "base", workshop.root / name, texts, root=workshop.root, train="mlp", training=training)
    checkpoint = open_checkpoint(workshop.build(mixture=LOGISTIC))
    results = evaluate(checkpoint, tokens_per_domain=400, sequence_length=32)
    for name in DOMAINS:
        oracle, own = results.row("oracle").scores[name], results.row(name).scores[name]
        assert oracle.loss == pytest.approx(own.loss, abs=1e-4)
        assert own.gap_closed == pytest.approx(1.0) and oracle.gap_closed == pytest.approx(1.0, abs=1e-2)


def test_after_a_refit_only_the_mixture_is_run_again(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(workshop.build(mixture=LOGISTIC))
    first = evaluate(checkpoint, tokens_per_domain=300, sequence_length=32)
    checkpoint = refit(checkpoint, {"router": {"temperature": 0.01}})
    loaded: list[Path] = []
    real = rows_module.load_model
    for module in (rows_module, experts_module):
        monkeypatch.setattr(module, "load_model", lambda folder, **k: (loaded.append(folder), real(folder, **k))[1])
    second = evaluate(checkpoint, tokens_per_domain=300, sequence_length=32)
    assert loaded == [checkpoint.folder]
    assert second.rows[:-1] == first.rows[:-1] and second.rows[-1] != first.rows[-1]
    evaluate(checkpoint, tokens_per_domain=200, sequence_length=32)
    assert len(loaded) > 5  # other tokens: every row again


def test_parameters_are_counted(evaluated: tuple[Checkpoint, Results]) -> None:
    checkpoint, results = evaluated
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(checkpoint.folder).parameters())
    dense = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(checkpoint.recipe_root / "base").parameters())
    ffn = 3 * 3 * 32 * 48
    assert results.row("mixture").total_parameters == total
    assert results.row("mixture").active_parameters == total - ffn
    assert results.row("base").total_parameters == dense


def test_rows_whose_models_are_gone_are_left_out_and_named(workshop: Workshop) -> None:
    checkpoint = open_checkpoint(workshop.build(mixture=LOGISTIC))
    (workshop.root / "law").rename(workshop.root / "elsewhere")
    results = evaluate(checkpoint, tokens_per_domain=200, sequence_length=32)
    assert [row.name for row in results.rows] == ["base", "medicine", "code", "oracle", "mixture"]
    assert "law" in results.notes[0]


def test_given_weights_weigh_the_experts_and_leave_no_oracle(workshop: Workshop) -> None:
    """All weight on one expert: the mixture is the base with that expert's FFN."""
    ffn_specialists(workshop)
    mixture = {"method": "linear", "weights": {"medicine": 0, "law": 2, "code": 0}}
    results = evaluate(open_checkpoint(workshop.build(mixture=mixture)), tokens_per_domain=300, sequence_length=32)
    for name in DOMAINS:
        assert results.row("mixture").scores[name].loss == pytest.approx(results.row("law").scores[name].loss, abs=1e-4)
    assert "oracle" not in [row.name for row in results.rows] and "oracle" in results.notes[0]


def test_errors_are_the_spread_over_parts_of_the_text() -> None:
    """Against the text-book error of a mean, and the spread of many draws of the text for a ratio."""
    draw = np.random.default_rng(0)
    counts = draw.integers(20, 60, 20).astype(float)
    losses = draw.normal(4, 0.5, 20)
    plain = np.full(20, 40.0)
    assert mean_error(list(losses * plain), list(plain)) == pytest.approx(np.std(losses, ddof=1) / math.sqrt(20))

    def sums(seed: int) -> tuple[list[float], list[float], list[float]]:
        text = np.random.default_rng(seed).normal(4, 0.5, 20)  # what is hard is hard for every model
        gain = np.random.default_rng(seed + 9000).normal(0.3, 0.05, 20)
        return list(text * counts), list((text - gain) * counts), list((text - 0.5 * gain - 0.01) * counts)

    def closed(base: list[float], own: list[float], row: list[float]) -> float:
        return (sum(base) - sum(row)) / (sum(base) - sum(own))

    found = np.std([closed(*sums(seed)) for seed in range(400)])
    errors = [gap_error(*sums(seed)) for seed in range(40)]
    assert np.mean([error for error in errors if error is not None]) == pytest.approx(found, rel=0.15)
    base, own, row = sums(0)
    assert gap_error(base, own, base) == 0 and gap_error(base, own, own) == pytest.approx(0, abs=1e-12)
    assert gap_error(base, base, row) is None and gap_error(base, [], row) is None


def test_a_loss_that_is_no_number_is_an_error_and_not_a_result(workshop: Workshop) -> None:
    out = workshop.build()
    for shard in out.glob("model-expert-*.safetensors"):
        save_file({name: tensor * math.nan for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the loss is not finite\n\s+where:\s+oracle on the text 'medicine'"):
        evaluate(open_checkpoint(out), tokens_per_domain=100, sequence_length=32)
    assert not (out / "results").exists()
