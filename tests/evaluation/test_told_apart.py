"""Running scores in `inspect`: what they are of, how well they tell texts apart, and how a text is shown word by word."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from command_line import modekit as run
from conftest import Workshop, make_workshop
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.evaluation.domains import Domain, held_out_domains
from modekit.evaluation.inspection.inspect import inspect
from modekit.evaluation.inspection.text import inspect_text
from modekit.evaluation.inspection.tokens import words_of
from modekit.evaluation.inspection.unseen import auroc, detect_unseen
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.report.page import write_report

SMALL: dict[str, Any] = {"tokens_per_domain": 400, "sequence_length": 64}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Three domains, the base with text of none, and a domain that nothing was made for."""
    workshop = make_workshop(tmp_path_factory.mktemp("told"))
    texts = {"general": "river house green window morning street", "music": "QUJZ ##% ]]{{ WXQK ~~~ VBX??"}
    for name, words in texts.items():
        lines = [json.dumps({"text": f"{number} {words} {words[number % 9 :]}"}) for number in range(40)]
        (workshop.root / "text" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    general = {"name": "general", "model": "base", "text": "./text/general.jsonl"}
    workshop.recipe |= {
        "experts": [*workshop.recipe["experts"], general],
        "eval": {"music": "./text/music.jsonl"},
        "output": {"format": "modekit"},
    }
    return workshop


@pytest.fixture(scope="module", params=["lexical", "ngram"])
def mixture(request: pytest.FixtureRequest, shop: Workshop) -> Checkpoint:
    router = {"fit": request.param, **({"buckets": 4096} if request.param == "ngram" else {})}
    return open_checkpoint(shop.build(f"OUT-{request.param}", mixture={"unseen": "base", "router": router}))


@pytest.fixture
def domains(mixture: Checkpoint) -> list[Domain]:
    return held_out_domains(mixture, **SMALL)


def logits_of_model(mixture: Checkpoint, domains: list[Domain]) -> Iterator[tuple[str, torch.Tensor]]:
    """Domain and what the router inside the model says of each of its texts (S, E)."""
    model = load_model(mixture.folder)
    for domain in domains:
        for sequence in domain.sequences:
            with torch.inference_mode(), mixture_of(model, mixture).traced() as trace:
                model(input_ids=torch.tensor([sequence.ids]))
                yield domain.name, next(iter(trace))[0]


@given(
    st.lists(st.integers(0, 4).map(float), min_size=1, max_size=9),
    st.lists(st.integers(0, 4).map(float), min_size=1, max_size=9),
)
def test_auroc_counts_pairs(seen: list[float], unseen: list[float]) -> None:
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in seen for b in unseen]
    assert auroc(seen, unseen) == pytest.approx(sum(pairs) / len(pairs))


def test_auroc_of_nothing_is_nothing() -> None:
    assert auroc([], [1.0]) is None and auroc([1.0], []) is None


def test_it_is_what_the_model_decides_by(mixture: Checkpoint, domains: list[Domain]) -> None:
    told = detect_unseen(mixture, domains)
    assert told is not None
    leads: dict[str, list[torch.Tensor]] = {}
    for name, logits in logits_of_model(mixture, domains):
        leads.setdefault(name, []).append(logits[:, :3].amax(-1) - logits[:, 3])
    for name, each in leads.items():
        assert told.to_base[name] == pytest.approx(float((torch.cat(each) < 0).float().mean()), abs=1e-6), name
    seen = [lead for name in ("medicine", "law", "code") for lead in leads[name]]
    pairs = [float(a[31] > b[31]) for a in seen if len(a) >= 32 for b in leads["music"] if len(b) >= 32]
    assert pairs and told.auroc["experts over base"]["music"][0] == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert told.at == [32, 64, 128, 256] and told.auroc["energy"]["music"][3] is None
    assert set(told.auroc) == {"largest probability", "entropy", "energy", "experts over base"}


def test_text_that_is_far_from_all_is_told(mixture: Checkpoint, domains: list[Domain]) -> None:
    told = detect_unseen(mixture, domains)
    assert told is not None and told.auroc["experts over base"]["music"][0] > 0.95
    assert told.to_base["music"] > 0.6 > 0.15 > max(told.to_base[name] for name in ("medicine", "law", "code"))


def test_without_the_base_there_are_the_scores_that_need_none(shop: Workshop) -> None:
    experts = shop.recipe["experts"][:3]
    folder = shop.build("THREE", experts=experts, mixture={"router": {"fit": "lexical"}})
    checkpoint = open_checkpoint(folder)
    told = detect_unseen(checkpoint, held_out_domains(checkpoint, **SMALL))
    assert told is not None and told.to_base is None
    assert set(told.auroc) == {"largest probability", "entropy", "energy"}


def test_a_router_that_reads_hidden_states_has_none(shop: Workshop) -> None:
    checkpoint = open_checkpoint(shop.build("HIDDEN", mixture={"router": {"fit": "random"}}))
    assert detect_unseen(checkpoint, held_out_domains(checkpoint, **SMALL)) is None
    assert inspect_text(checkpoint, "fever artery").scores is None


def test_inspect_and_report_show_it(mixture: Checkpoint, domains: list[Domain]) -> None:
    data = inspect(mixture, **SMALL)
    told = detect_unseen(mixture, domains)
    assert told is not None and data.told_apart.to_base["music"] == pytest.approx(told.to_base["music"], rel=1e-5)
    shown = run("inspect", mixture.folder, "--tokens", "400", "--sequence-length", "64")
    assert "AUROC: the domains' text against music" in shown and "Tokens on which the base leads" in shown
    page = write_report(mixture).page.read_text()
    assert "Text of no domain" in page and "experts over base" in page


def test_a_text_is_shown_with_its_score_word_by_word(mixture: Checkpoint) -> None:
    text = "fever artery lesion nerve QUJZ ##% ]]{{ WXQK"
    trace = inspect_text(mixture, text)
    ids = AutoTokenizer.from_pretrained(mixture.folder)(text, return_tensors="pt").input_ids
    model = load_model(mixture.folder)
    with torch.inference_mode(), mixture_of(model, mixture).traced() as found:
        model(input_ids=ids)
        logits = next(iter(found))[0]
    wanted = logits[:, :3].amax(-1) - logits[:, 3]
    torch.testing.assert_close(torch.tensor(trace.scores["experts over base"]), wanted, atol=1e-4, rtol=1e-4)
    weights = torch.tensor(trace.weights[0])
    assert torch.equal(weights[:, 3] == 1.0, wanted < 0)  # below zero it is all the base's
    words, _ = words_of(trace, 50)
    assert words[-1].over_base == trace.scores["experts over base"][-1]
    shown = run("inspect", mixture.folder, "--text", text)
    assert "below zero the base leads" in " ".join(shown.split())
    letter = "ABCD"[words[-1].leader]
    assert f"{letter}{100 * words[-1].weights_E.max():.0f} {words[-1].loss:.1f} {words[-1].over_base:+.1f}" in shown


def test_windows_of_a_long_text_start_anew(mixture: Checkpoint) -> None:
    trace = inspect_text(mixture, "fever artery lesion nerve " * 3, sequence_length=16)
    scores = trace.scores["experts over base"]
    assert len(scores) == len(trace.tokens) and trace.windows > 1
    again = inspect_text(mixture, "".join(token.text for token in trace.tokens[:16]), sequence_length=64)
    assert scores[:16] == pytest.approx(again.scores["experts over base"][:16], abs=1e-4)
