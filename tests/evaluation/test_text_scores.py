"""By how much experts stand above the base, word by word: `inspect --text` of a router that reads tokens."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from command_line import modekit as run
from conftest import Workshop, make_workshop
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.evaluation.inspection.text import inspect_text
from modekit.evaluation.inspection.tokens import words_of
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of


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


@pytest.fixture(scope="module")
def mixture(shop: Workshop) -> Checkpoint:
    return open_checkpoint(shop.build(mixture={"unseen": "base", "router": {"fit": "lexical"}}))


def test_a_router_that_reads_hidden_states_has_none(shop: Workshop) -> None:
    checkpoint = open_checkpoint(shop.build("HIDDEN", mixture={"router": {"fit": "random"}}))
    assert inspect_text(checkpoint, "fever artery").over_base is None


def test_a_text_is_shown_with_its_score_word_by_word(mixture: Checkpoint) -> None:
    text = "fever artery lesion nerve QUJZ ##% ]]{{ WXQK"
    trace = inspect_text(mixture, text)
    ids = AutoTokenizer.from_pretrained(mixture.folder)(text, return_tensors="pt").input_ids
    model = load_model(mixture.folder)
    with torch.inference_mode(), mixture_of(model, mixture).traced() as found:
        model(input_ids=ids)
        logits = next(iter(found))[0]
    wanted = logits[:, :3].amax(-1) - logits[:, 3]
    torch.testing.assert_close(torch.tensor(trace.over_base), wanted, atol=1e-4, rtol=1e-4)
    weights = torch.tensor(trace.weights[0])
    assert torch.equal(weights[:, 3] == 1.0, wanted < 0)  # below zero it is all the base's
    words, _ = words_of(trace, 50)
    assert words[-1].over_base == trace.over_base[-1]
    shown = run("inspect", mixture.folder, "--text", text)
    assert "below zero the base leads" in " ".join(shown.split())
    letter = "ABCD"[words[-1].leader]
    assert f"{letter}{100 * words[-1].weights_E.max():.0f} {words[-1].loss:.1f} {words[-1].over_base:+.1f}" in shown


def test_windows_of_a_long_text_start_anew(mixture: Checkpoint) -> None:
    trace = inspect_text(mixture, "fever artery lesion nerve " * 3, sequence_length=16)
    scores = trace.over_base or []
    assert len(scores) == len(trace.tokens) and trace.windows > 1
    again = inspect_text(mixture, "".join(token.text for token in trace.tokens[:16]), sequence_length=64)
    assert scores[:16] == pytest.approx((again.over_base or [])[:16], abs=1e-4)
