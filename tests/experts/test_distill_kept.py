"""A teacher's word on disk: several students share one pass, memory stays flat, and nothing else is taken for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Workshop, character_tokenizer, make_workshop, save, tiny_model
from kills import dies
from modekit.errors import MismatchError, SourceError
from modekit.evaluation.domains import Domain
from modekit.evaluation.loss import score_domain
from modekit.experts.distill import distill as distill_module
from modekit.experts.distill import kept_logits
from modekit.experts.distill.distill import Distillation, distill
from modekit.experts.distill.inputs import read_texts
from modekit.experts.distill.kept_logits import Header, KeptTeacher, keep
from modekit.experts.distill.settings import DistillSettings
from modekit.loaded.load import load_model
from modekit.loaded.text_training import Training
from modekit.run import QUIET
from modekit.text.sequences import TokenSequence
from modekit.text.tags import add_tags, tagged
from refusal import tree

TRAINING = Training(steps=6, batch_tokens=256, sequence_length=32, learning_rate=5e-3)
SEQUENCES = [
    TokenSequence(tuple((7 * number + 3 * place) % 92 + 4 for place in range(5 + number % 9)), 1) for number in range(40)
]


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    made = make_workshop(tmp_path, num_hidden_layers=1)
    save(tiny_model("qwen2", seed=9, hidden_size=48, num_hidden_layers=2), tmp_path / "teacher")
    return made


def asked(shop: Workshop, **changes: Any) -> Distillation:
    given: dict[str, Any] = {"texts": ["./text/law.jsonl"], "training": TRAINING, "top_k": 8, **changes}
    given.setdefault("keep", shop.root / "KEPT")
    return Distillation(shop.root / "base", shop.root / "teacher", root=shop.root, **given)


def header_of(top_k: int) -> Header:
    return Header(
        teacher="t",
        teacher_digest="0" * 64,
        tokenizer_digest="1" * 64,
        text_digest="2" * 64,
        vocabulary=96,
        top_k=top_k,
        temperatures=(1.0, 2.0),
        tokens=sum(len(each.ids) for each in SEQUENCES),
    )


@pytest.mark.parametrize("top_k", [5, 96])
def test_what_is_read_is_what_the_teacher_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top_k: int) -> None:
    """Over several blocks, in an order of its own, and with a pad in between."""
    monkeypatch.setattr(kept_logits, "_BLOCK", 64)
    model = tiny_model(seed=3)
    keep(tmp_path / "KEPT", header_of(top_k), model, SEQUENCES, run=QUIET)
    teacher = KeptTeacher(tmp_path / "KEPT", header_of(top_k), SEQUENCES)
    starts = torch.tensor([0, *(len(each.ids) for each in SEQUENCES)]).cumsum(0)
    rows = [31, 2, 3, 39, 0]
    width = max(len(SEQUENCES[row].ids) for row in rows)
    ids, real = torch.zeros((len(rows), width), dtype=torch.int64), torch.zeros((len(rows), width), dtype=torch.bool)
    for place, row in enumerate(rows):
        ids[place, : len(SEQUENCES[row].ids)] = torch.tensor(SEQUENCES[row].ids)
        real[place, : len(SEQUENCES[row].ids)] = True
    within = torch.arange(width).expand(real.shape)
    item = {"input_ids": ids, "real": real, "position_ids": within, "position": starts[rows][:, None] + within}
    predicted = real[:, :-1] & real[:, 1:]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=real.long()).logits[:, :-1][predicted]
    said = teacher.output_of(item, predicted)
    for temperature in (1.0, 2.0):
        _, found = said.beside(torch.zeros_like(logits), temperature)
        wanted = (logits / temperature).softmax(-1)
        assert torch.allclose(found[:, :top_k].exp(), wanted.gather(-1, said.ids_NK), atol=1e-5)
        if top_k < 96:
            rest = 1 - wanted.gather(-1, said.ids_NK).sum(-1)
            assert torch.allclose(found[:, -1].exp(), rest, atol=1e-5)


def test_a_second_student_reads_what_the_first_had_kept_and_the_teacher_is_not_asked(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(asked(shop), shop.root / "one")
    before = tree(shop.root / "KEPT")
    loaded: list[Path] = []
    real: Callable[..., Any] = distill_module.load_model
    monkeypatch.setattr(distill_module, "load_model", lambda folder, **rest: loaded.append(folder) or real(folder, **rest))
    record = distill(
        asked(shop, train="lora", settings=DistillSettings(losses={"total_variation": 1.0})), shop.root / "two"
    ).as_data()
    distill(asked(shop, settings=DistillSettings(temperature=1.0)), shop.root / "at one")  # which is kept besides 2
    assert shop.root / "teacher" not in loaded and tree(shop.root / "KEPT") == before
    assert record["held_out_kl"]["over"] == "the teacher's top 8 and the rest"


def test_all_tokens_kept_teach_what_the_teacher_itself_teaches(shop: Workshop) -> None:
    beside = distill(asked(shop, keep=None), shop.root / "beside").as_data()
    kept = distill(asked(shop, top_k=1_000), shop.root / "kept").as_data()
    assert kept["held_out_kl"]["over"] == beside["held_out_kl"]["over"] == "the whole vocabulary"
    assert kept["held_out_kl"]["after"] == pytest.approx(beside["held_out_kl"]["after"], rel=1e-3)
    assert kept["distillation_loss"]["last"] == pytest.approx(beside["distillation_loss"]["last"], rel=1e-3)


def test_text_with_tags_of_its_own_is_learned_alike_from_what_is_kept(tmp_path: Path) -> None:
    """Of what a teacher says of tags nothing is taken, whether it is asked itself or was before."""
    tokenizer = character_tokenizer()
    add_tags(tokenizer, ["law"], where="test")
    for seed, name in enumerate(("base", "teacher")):
        tiny_model(seed=seed, num_hidden_layers=1, vocab_size=97).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    lines = (json.dumps({"text": tagged(f"{number} of a deed", "law")}) for number in range(40))
    (tmp_path / "law.jsonl").write_text("\n".join(lines))
    shop, read = Workshop(tmp_path), read_texts(["./law.jsonl"], tmp_path, tokenizer, TRAINING, None)
    once = TRAINING.with_(steps=1, batch_tokens=read.corpus.tokens)
    beside, kept = (
        distill(asked(shop, texts=["./law.jsonl"], training=once, top_k=97, keep=place), tmp_path / name).as_data()
        for name, place in (("beside", None), ("kept", tmp_path / "KEPT"))
    )
    for said in ("held_out_kl", "distillation_loss", "training_loss", "held_out_loss"):
        found = {key: value for key, value in kept[said].items() if key != "over"}
        assert found == pytest.approx({key: beside[said][key] for key in found}, rel=1e-3), said
    scored = score_domain(load_model(tmp_path / "base"), Domain("law", None, read.sequences), lambda _: None).loss
    assert kept["training_loss"]["first"] == pytest.approx(scored, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"top_k": 9}, "the top 8, not 9"),
        ({"texts": ["./text/code.jsonl"]}, "other text"),
        ({"training": TRAINING.with_(sequence_length=16)}, "cut otherwise"),
        ({"settings": DistillSettings(temperature=3.0)}, "temperatures 1, 2"),
        ({"teacher": True}, "another teacher"),
    ],
)
def test_what_is_kept_of_something_else_is_refused_and_stays(shop: Workshop, changes: dict[str, Any], said: str) -> None:
    distill(asked(shop), shop.root / "one")
    if changes.pop("teacher", False):
        save(tiny_model("qwen2", seed=5, hidden_size=48, num_hidden_layers=2), shop.root / "teacher")
    before = tree(shop.root)
    with pytest.raises(MismatchError, match="not those that this distillation needs") as caught:
        distill(asked(shop, **changes), shop.root / "two")
    assert said in str(caught.value.found)
    assert tree(shop.root) == before


def test_a_pass_that_is_killed_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_logits, "_BLOCK", 64)
    model = tiny_model(seed=3, num_hidden_layers=1)
    keep(tmp_path / "WHOLE", header_of(5), model, SEQUENCES, run=QUIET)

    asked_again: list[int] = []
    passes = kept_logits._arrays

    def counted(model: Any, header: Any, block: Any) -> Any:
        asked_again.append(len(block))
        return passes(model, header, block)

    blocks = len(kept_logits._blocks_of(SEQUENCES))
    below = tmp_path / "below"
    below.mkdir()
    moment = 1
    while dies(lambda: keep(below / "KEPT", header_of(5), model, SEQUENCES, run=QUIET), below, moment):
        if list((below / "KEPT.partial").glob("new/*")) and not (below / "KEPT").exists():
            asked_again.clear()
            monkeypatch.setattr(kept_logits, "_arrays", counted)
            keep(below / "KEPT", header_of(5), model, SEQUENCES, run=QUIET)
            monkeypatch.setattr(kept_logits, "_arrays", passes)
            assert len(asked_again) <= blocks
            assert tree(below / "KEPT") == tree(tmp_path / "WHOLE")
            assert not (below / "KEPT.partial").exists()
            return
        moment += 1
    pytest.fail("no moment was found at which the pass had begun")


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 2},
        {"top_k": 0},
        {"top_k": 10**9},
        {"temperatures": []},
        {"temperatures": [0.0]},
        {"tokens": "x"},
        {"teacher": "a\nb"},
        {"more": 1},
        None,
    ],
)
def test_a_damaged_header_is_said(shop: Workshop, damage: dict[str, Any] | None) -> None:
    distill(asked(shop), shop.root / "one")
    path = shop.root / "KEPT" / "teacher.json"
    path.write_text("{" if damage is None else json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises((SourceError, MismatchError), match="kept logits"):
        distill(asked(shop), shop.root / "two")


def test_damaged_values_are_said(shop: Workshop) -> None:
    distill(asked(shop), shop.root / "one")
    path = shop.root / "KEPT" / "logits.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    path.write_bytes(bytes(content))
    with pytest.raises(SourceError, match="the kept logits are damaged"):
        distill(asked(shop), shop.root / "two")


def test_a_folder_that_is_no_kept_teacher_is_refused(shop: Workshop) -> None:
    with pytest.raises(SourceError, match="no kept logits"):
        distill(asked(shop, keep=shop.root / "text"), shop.root / "two")
    assert not list(shop.root.glob("two*"))


def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a block is held at once, however many there are."""
    monkeypatch.setattr(kept_logits, "_BLOCK", 64)
    held: list[int] = []
    passes = kept_logits._arrays

    def watched(model: Any, header: Any, block: Any) -> Any:
        found = passes(model, header, block)
        held.append(sum(array.nbytes for array in found.values()))
        return found

    monkeypatch.setattr(kept_logits, "_arrays", watched)
    keep(tmp_path / "KEPT", header_of(5), tiny_model(num_hidden_layers=1), SEQUENCES * 3, run=QUIET)
    assert len(held) > 12 and max(held) <= 64 * (5 * 4 + 5 * 4 + 2 * 4)
