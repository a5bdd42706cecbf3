"""`specialize --tags`: one model for several domains, each read with a reserved token; labels drawn anew; text of no domain."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast

import byte_level
from command_line import modekit
from conftest import character_tokenizer, save, tiny_model, write_text
from modekit.errors import MismatchError, SourceError, UnsupportedError
from modekit.evaluation.domains import Domain, score_domain
from modekit.evaluation.rows import with_tag
from modekit.experts.labelled import Labelled, Reading, read_material
from modekit.experts.moving import add_rows
from modekit.experts.specialize import specialize
from modekit.loaded.load import load_model
from modekit.loaded.text_training import Training
from modekit.run import Run
from modekit.text.document import Pair
from modekit.text.records import data_of
from modekit.text.sequences import TokenSequence, encode
from modekit.text.tags import add_tags, labels_of, tag_ids, tag_of, tagged
from pair_models import PAIR_FAMILIES, pair_model, pair_tokenizer
from refusal import refuse
from trained import tensors_of

TRAINING = Training(steps=6, batch_tokens=256, sequence_length=64, learning_rate=5e-3)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small bases, tied and not, with text of three domains; pairs of two domains, of the same sources."""
    root = tmp_path_factory.mktemp("tags")
    save(tiny_model(num_hidden_layers=1), root / "untied")
    save(tiny_model(num_hidden_layers=1, tie_word_embeddings=True), root / "tied")
    write_text(root / "text")
    return root


def labelled(root: Path, *labels: str, **drawn: Any) -> Labelled:
    return Labelled({label: [str(root / "text" / f"{label}.jsonl")] for label in labels}, **drawn)


def run(root: Path, base: str, out: Path, texts: Labelled, **options: Any) -> dict[str, Any]:
    return specialize(root / base, out, texts, root=root, **{"training": TRAINING, **options}).as_data()


# Tokens.


def byte_tokenizer(prefix: str, *, spaced: bool) -> PreTrainedTokenizerFast:
    """Pieces of bytes with a token before every text, or none; `spaced`: a text begins with a space of its own."""
    made = deepcopy(byte_level.byte_tokenizer())
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{prefix} $A".strip(), special_tokens=[("<s>", 0)]
    )
    return made


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Words with their space before them, as sentencepiece has them; the first word has one, too."""
    words = ["▁Some", "▁fever", "▁dose", "▁text", "▁of", "Some", "fever", "▁", "▁some", ",", "▁which"]
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


TOKENIZERS = {
    "characters": character_tokenizer,
    "bytes": lambda: byte_tokenizer("", spaced=False),
    "bytes, begun": lambda: byte_tokenizer("<s>", spaced=False),
    "bytes, spaced": lambda: byte_tokenizer("<s>", spaced=True),
    "sentencepiece": metaspace_tokenizer,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tag_is_one_token_that_is_read_and_changes_no_other(kind: str, tmp_path: Path) -> None:
    """As transformers reads it from the files: what is predicted of a text, and its bytes, are what they are without a tag."""
    tokenizer = TOKENIZERS[kind]()
    before = len(tokenizer)
    (law,) = add_tags(tokenizer, ["law"])
    assert law == before and add_tags(tokenizer, ["law"]) == ()
    assert add_tags(tokenizer, ["law", "med-1.x"]) == (before + 1,)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert labels_of(again) == ("law", "med-1.x") and tag_ids(again, ["med-1.x", "law"]) == (before + 1, before)
    assert again(f"fever{tag_of('law')}dose")["input_ids"].count(law) == 1
    text = "fever dose, of text, " * 9 + "some"
    plain = encode(again, [text], max_tokens=999, sequence_length=16)
    told = encode(again, [tagged(text, "law")], max_tokens=999, sequence_length=17)
    assert len(plain) > 2 and [each.with_tag(None).ids for each in told] == [each.ids for each in plain]
    assert [each.ids[each.tag] for each in told] == [law] * len(plain)
    assert [each.scored for each in told] == [each.scored for each in plain]
    assert again(tagged(text, "law"))["input_ids"][:17] == list(told[0].ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_white_space_that_a_text_begins_with_stays_behind_a_tag(kind: str) -> None:
    """What is trained on, what `eval --labels tag` reads, and the text without a tag: the same tokens, also of a source."""
    tokenizer = TOKENIZERS[kind]()
    (law,) = add_tags(tokenizer, ["law"])
    for text in ("\n    some text, of fever", "    Some text, dose", "\tdose of text", "  some fever"):
        (plain,) = encode(tokenizer, [text], max_tokens=999, sequence_length=99)
        (trained,) = encode(tokenizer, [tagged(text, "law")], max_tokens=999, sequence_length=99)
        assert [trained] == with_tag(tokenizer, [plain], "law") and trained.with_tag(None) == plain
        place = int(kind in ("bytes, begun", "bytes, spaced"))  # those write <s> first
        assert trained.tag == place and trained.ids[place] == law
        pair = Pair(text, "a dose")
        (plain,) = encode(tokenizer, [pair], max_tokens=999, sequence_length=99)
        (trained,) = encode(tokenizer, [tagged(pair, "law")], max_tokens=999, sequence_length=99)
        assert [trained] == with_tag(tokenizer, [plain], "law") and trained.with_tag(None) == plain


def test_a_tag_is_not_predicted(shop: Path) -> None:
    """The loss is the sum over the tokens that are predicted without the tag, given it; computed here by hand."""
    for tokenizer in (character_tokenizer(), begun_tokenizer()):
        model = tiny_model(num_hidden_layers=1)
        add_tags(tokenizer, ["law"])
        model.resize_token_embeddings(len(tokenizer))
        (sequence,) = encode(tokenizer, [tagged("of a deed", "law")], max_tokens=99, sequence_length=40)
        ids = list(sequence.ids)
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        scored = range(
            2, len(ids)
        )  # of [tag, first, ...] as of [<s>, tag, first, ...], less the first that has nothing before it
        wanted = -sum(float(logits[place - 1, ids[place]]) for place in scored) / len(scored)
        found = score_domain(model, Domain("law", None, [sequence, TokenSequence((5, 6, 7))][:1]), lambda _: None).loss
        assert found == pytest.approx(wanted, rel=1e-5)
        padded = [sequence, encode(tokenizer, ["deeds"], max_tokens=99, sequence_length=40)[0]]
        both = score_domain(model, Domain("law", None, padded), lambda _: None).loss
        alone = score_domain(model, Domain("law", None, padded[1:]), lambda _: None).loss
        assert both == pytest.approx(
            (found * len(scored) + alone * padded[1].scored) / (len(scored) + padded[1].scored), rel=1e-5
        )


def begun_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


# Models.


@pytest.mark.parametrize("train", ["mlp", "full"])
@pytest.mark.parametrize("base", ["tied", "untied"])
def test_new_rows_move_and_plain_transformers_loads_them(shop: Path, tmp_path: Path, base: str, train: Any) -> None:
    record = run(shop, base, tmp_path / "OUT", labelled(shop, "law", "code"), train=train)
    before, after = tensors_of(shop / base), tensors_of(tmp_path / "OUT")
    assert before.keys() == after.keys()
    rows = after["model.embed_tokens.weight"]
    mean = before["model.embed_tokens.weight"].mean(0)
    assert len(rows) == 98 and json.loads((tmp_path / "OUT" / "config.json").read_text())["vocab_size"] == 98
    assert not torch.equal(rows[96], rows[97]) and not torch.allclose(rows[96], mean, atol=1e-4)
    if train == "mlp":
        changed = {name for name in before if not torch.equal(before[name], after[name][:96])}
        assert changed == {name for name in before if ".mlp." in name}
        if base == "untied":
            assert torch.allclose(after["lm_head.weight"][96:], before["lm_head.weight"].mean(0), atol=1e-6)
    assert record["labels"] == {"tags": ["law", "code"]}
    losses = record["held_out_loss_by_label"]
    assert losses.keys() == {"law", "code"} and all(each["after"] < each["before"] for each in losses.values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "OUT")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "OUT")
    for domain in read_material(labelled(shop, "law", "code"), None, Reading(tokenizer, shop, TRAINING)).held_out:
        assert losses[domain.name]["after"] == pytest.approx(
            loss_of(model, domain), rel=1e-6
        )  # what was trained is what is saved
    with torch.inference_mode():
        logits = [model(**tokenizer(f"{tag_of(label)} a deed", return_tensors="pt")).logits for label in ("law", "code")]
    assert not torch.allclose(*logits)


def test_weights_do_not_decay_beside_new_tags(shop: Path, tmp_path: Path) -> None:
    """The embedding's other rows would, and what is measured would not be what is written."""
    with pytest.raises(UnsupportedError, match="weight decay would move rows"):
        run(shop, "tied", tmp_path / "OUT", labelled(shop, "law"), train="mlp", training=TRAINING.with_(weight_decay=0.1))


def test_rows_that_nothing_used_yet_are_taken_first() -> None:
    """As in models whose embedding is padded to a round number: it does not grow, and what was there stays."""
    model = tiny_model(num_hidden_layers=1, vocab_size=128)
    before = model.get_input_embeddings().weight.detach().clone()
    add_rows(model, (96, 97))
    after = model.get_input_embeddings().weight
    assert after.shape == (128, 32) and torch.allclose(after[96:98], before[:96].mean(0), atol=1e-7)
    assert torch.equal(after[:96], before[:96]) and torch.equal(after[98:], before[98:])


def write_pairs(folder: Path, count: int) -> dict[str, list[str]]:
    """The same sources under two labels: one wants their letters in capitals, the other as numbers."""
    draw = random.Random(1)
    sources = ["".join(draw.choice("abcdef") for _ in range(4)) for _ in range(count)]
    wanted = {
        "loud": [source.upper() for source in sources],
        "numbered": ["".join(str(ord(each) - 97) for each in source) for source in sources],
    }
    for label, targets in wanted.items():
        records = (json.dumps(data_of(Pair(*sides))) for sides in zip(sources, targets, strict=True))
        (folder / f"{label}.jsonl").write_text("\n".join(records))
    return {label: [str(folder / f"{label}.jsonl")] for label in wanted}


def test_a_tag_decides_how_a_source_is_translated(tmp_path: Path) -> None:
    """The label alone says which of two targets is wanted: with the right tag less loss than with the wrong one, by far."""
    texts = write_pairs(tmp_path, 400)
    torch.manual_seed(0)
    sizes = {**PAIR_FAMILIES["bart"], "encoder_layers": 1, "decoder_layers": 1, "init_std": 0.2}
    AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **sizes)).save_pretrained(tmp_path / "base")
    pair_tokenizer().save_pretrained(tmp_path / "base")
    training = Training(steps=50, batch_tokens=512, sequence_length=16, learning_rate=1e-2)
    record = specialize(
        tmp_path / "base", tmp_path / "OUT", Labelled(texts), root=tmp_path, train="full", training=training
    ).as_data()
    model, tokenizer = load_model(tmp_path / "OUT"), AutoTokenizer.from_pretrained(tmp_path / "OUT")
    held_out = read_material(Labelled(texts), None, Reading(tokenizer, tmp_path, training)).held_out
    ids = dict(zip(("loud", "numbered"), tag_ids(tokenizer, ("loud", "numbered")), strict=True))
    right, none = 0.0, 0.0
    for domain, other in zip(held_out, ("numbered", "loud"), strict=True):
        assert record["held_out_loss_by_label"][domain.name]["after"] == pytest.approx(loss_of(model, domain), rel=1e-4)
        wrong = Domain(domain.name, None, [each.with_tag(ids[other]) for each in domain.sequences])
        right += loss_of(model, domain)
        none += loss_of(model, Domain(domain.name, None, [each.with_tag(None) for each in domain.sequences]))
        assert loss_of(model, domain) + 1.0 < loss_of(model, wrong)
    assert right + 0.2 < none


def loss_of(model: Any, domain: Domain) -> float:
    return score_domain(model, domain, lambda _: None).loss


def test_a_base_with_tags_is_made_a_specialist_of_one_domain(shop: Path, tmp_path: Path) -> None:
    """By any kind of training: its tokenizer and its rows stay as they are but where all moves."""
    run(shop, "tied", tmp_path / "base", labelled(shop, "law", "code"))
    for train in ("mlp", "lora", "full"):
        out = tmp_path / train
        record = run(tmp_path, "base", out, labelled(shop, "law"), train=train)
        assert record["labels"] == {"tags": ["law"]} and "held_out_loss_by_label" not in record
        if train == "mlp":
            old, new = tensors_of(tmp_path / "base"), tensors_of(out)
            assert torch.equal(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"])
            assert labels_of(AutoTokenizer.from_pretrained(out)) == ("law", "code")
        if train == "lora":
            assert (out / "adapter_config.json").exists() and not (out / "tokenizer.json").exists()


# Labels that are drawn anew, and text of no domain.


def test_nothing_drawn_is_nothing_changed_and_drawing_changes_training_alone(shop: Path, tmp_path: Path) -> None:
    """A probability of 0 gives the bytes of none at all; held-out loss before any training is the same in all of them."""
    both = ("law", "code")
    plain = run(shop, "tied", tmp_path / "plain", labelled(shop, *both))
    zero = run(shop, "tied", tmp_path / "zero", labelled(shop, *both, randomise=0.0, randomise_to="generic"))
    drawn = run(shop, "tied", tmp_path / "drawn", labelled(shop, *both, randomise=0.5))
    again = run(shop, "tied", tmp_path / "again", labelled(shop, *both, randomise=0.5))
    for name in ("model.safetensors", "specialist.json", "tokenizer.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "zero" / name).read_bytes()
        assert (tmp_path / "drawn" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert plain == zero and drawn == again
    assert drawn["labels"] == {"tags": ["law", "code"], "randomise": 0.5, "randomise_to": "all"}
    assert drawn["held_out_loss"]["before"] == plain["held_out_loss"]["before"]
    assert drawn["training_loss"] != plain["training_loss"]
    assert drawn["training"]["steps"] == plain["training"]["steps"] == 6


# What is refused.


def test_an_adapter_has_no_place_for_new_tags(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no place for new tags"):
        run(shop, "tied", tmp_path / "OUT", labelled(shop, "law"), train="lora")
    assert not (tmp_path / "OUT").exists()


def test_encoder_and_decoder_with_an_embedding_each_have_no_place_for_new_tags(tmp_path: Path) -> None:
    """Before anything is trained; tags that are there already are read as ever."""
    texts, tokenizer = write_pairs(tmp_path, 40), pair_tokenizer()

    def save_base() -> None:
        sizes = dict.fromkeys(("vocab_size", "decoder_vocab_size"), len(tokenizer))
        apart = {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}
        pair_model("marian", **sizes, **apart, encoder_layers=1, decoder_layers=1).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")

    save_base()
    for train in ("mlp", "full", "lora"):
        with pytest.raises(UnsupportedError, match=r"an embedding each[\s\S]*BASE, --tags"):
            run(tmp_path, "base", tmp_path / "OUT", Labelled(texts), train=train, run=UNTRAINED)
    assert not (tmp_path / "OUT").exists()
    add_tags(tokenizer, texts)
    save_base()
    record = run(tmp_path, "base", tmp_path / "OUT", Labelled(texts), training=TRAINING.with_(steps=1))
    assert record["labels"] == {"tags": ["loud", "numbered"]}


def refuse_to_train(stage: str, _done: int, _total: int) -> None:
    assert stage != "train"


UNTRAINED = Run(progress=refuse_to_train)


def test_tokens_that_a_base_has_no_rows_for_are_one_clear_error(shop: Path, tmp_path: Path) -> None:
    """Text may have them. Tags alone may be beyond the rows, and only where text is read with tags."""
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["fever"])
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    plain = [str(shop / "text" / "medicine.jsonl")]
    for texts in (plain, labelled(shop, "medicine")):
        with pytest.raises(MismatchError, match=r"1 tokens that the model has no embedding for[\s\S]*'fever'") as caught:
            specialize(tmp_path / "base", tmp_path / "OUT", texts, root=shop, training=TRAINING, run=UNTRAINED)
        assert "--tags" not in str(caught.value)
    tokenizer = character_tokenizer()
    add_tags(tokenizer, ["medicine"])
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "own.jsonl").write_text("".join(f'{{"text": "<domain:medicine> a dose {n}"}}\n' for n in range(40)))
    own = [str(tmp_path / "own.jsonl")]
    with pytest.raises(MismatchError, match=r"no embedding for[\s\S]*'<domain:medicine>'[\s\S]*read text with --tags"):
        specialize(tmp_path / "base", tmp_path / "OUT", own, root=shop, training=TRAINING, run=UNTRAINED)
    assert not (tmp_path / "OUT").exists()


LAW = ("--text", "law=text/law.jsonl", "--tags")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--text", "text/law.jsonl", "--tags"), "a text without its domain"),
        (("--text", "a label=text/law.jsonl", "--tags"), "this is no label"),
        ((*LAW, "randomise_to=others"), "no effect"),
        ((*LAW, "--teacher", "untied"), "no effect"),
    ],
)
def test_options_that_are_wrong_or_dead_are_refused(
    shop: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(shop)
    assert words in refuse("specialize", "tied", "NO", *arguments)
    assert not (shop / "NO").exists()


def test_the_command_line_trains_with_tags_and_a_name_with_a_sign_is_a_file_without_them(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shop)
    few = ("steps=1", "sequence_length=32")
    drawn, generic = ("randomise=0.2", "randomise_to=others"), ("--generic", "text/medicine.jsonl", "generic_share=0.25")
    modekit("specialize", "tied", tmp_path / "OUT", "--text", "code=text/code.jsonl", *LAW, *drawn, *generic, *few)
    record = json.loads((tmp_path / "OUT" / "specialist.json").read_text())
    assert record["labels"] == {"tags": ["code", "law"], "randomise": 0.2, "randomise_to": "others"}
    assert record["generic"]["share"] == pytest.approx(0.25, abs=0.01)
    (tmp_path / "law=one.jsonl").write_bytes((shop / "text" / "law.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)
    modekit("specialize", str(shop / "tied"), "PLAIN", "--text", "law=one.jsonl", *few)
    record = json.loads((tmp_path / "PLAIN" / "specialist.json").read_text())
    assert "labels" not in record and record["text"]["documents"] == 48
